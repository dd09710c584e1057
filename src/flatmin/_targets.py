"""Per-example losses, and their targets: labels or probabilities."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ._checks import hyperparameter, tensor, whole
from ._stage import Batch


def example_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each example, in nats: logits [n, K], classes [n] or soft targets [n, K]."""
    if not isinstance(logits, Tensor) or logits.ndim < 2 or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"logits must be of shape [n, K] with at least 2 classes, got {got}; any other output "
            "needs a criterion of your own"
        )
    if target.is_floating_point() and target.shape != logits.shape:
        raise ValueError(
            f"targets must be probabilities of each class, {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}; num_classes of Data.of says how many there are"
        )
    classes = target.dtype in (torch.int64, torch.uint8)
    shape = logits.shape[:1] + logits.shape[2:]
    if not target.is_floating_point() and not (classes and target.shape == shape):
        raise ValueError(
            f"targets must be classes, torch.int64 of shape {tuple(shape)}, got {target.dtype} of "
            f"shape {tuple(target.shape)}"
        )
    return cross_entropy(logits, target, reduction="none")


def error(output: Any, y: Tensor, needs: str = "network must return") -> Tensor:
    """Whether the largest logit is that of another class: logits [n, ..., K], classes [n, ...]."""
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    good = isinstance(output, Tensor) and output.shape[:-1] == y.shape and output.shape[-1] > 1
    # cross_entropy has the classes in dimension 1: here either would fit
    if not good or (output.ndim > 2 and output.shape[:1] + output.shape[2:] == y.shape):
        raise ValueError(
            f"{needs} K > 1 logits for each of the classes {tuple(y.shape)}, in a last dimension "
            f"that no other could be taken for, got {shape}"
        )
    return output.argmax(-1) != y


def checked_losses(losses: Any, x: Tensor, y: Tensor) -> Tensor:
    """What a criterion returned, if it is one loss per example, or one per target of an example.

    A mean or a sum would make batches of different sizes count wrongly, and a difference of [n, 1]
    and [n] makes n² losses.
    """
    good = isinstance(losses, Tensor) and losses.shape[:1] == x.shape[:1]
    if not good or losses.shape[1:] not in ((), y.shape[1:]):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        each = f" or {tuple(y.shape)}" if y.ndim > 1 else ""
        raise ValueError(
            f"criterion must return one loss per example (reduction='none'), shape ({len(x)},)"
            f"{each}, got {got}"
        )
    return losses


def soft_targets(
    y: Tensor,
    num_classes: int,
    smoothing: float | Tensor = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Targets as probabilities, optionally smoothed: :math:`(1-s)\,e_y + s/K`.

    Parameters
    ----------
    y : Tensor
        Labels, whole numbers [n] in 0 … K−1, or probabilities [n, K].  A label out of range, such
        as PyTorch's ``ignore_index`` −100, gives a row of zeros before smoothing.
    num_classes : int
        K.
    smoothing : float or Tensor
        :math:`s\in[0,1]`: how much of the probability is spread evenly over all classes.
    dtype : torch.dtype, optional
        Default: that of ``y`` if it is floating point, else float32.

    Returns
    -------
    Tensor [n, K]
        Probabilities that need no change are returned themselves, not a copy.

    Examples
    --------
    >>> soft_targets(torch.tensor([2, 0]), 4, smoothing=0.2)
    tensor([[0.0500, 0.0500, 0.8500, 0.0500],
            [0.8500, 0.0500, 0.0500, 0.0500]])
    """
    tensor("y", y)
    hyperparameter("smoothing", smoothing, 0, 1)
    dtype = dtype or (y.dtype if y.is_floating_point() else torch.float32)
    if y.ndim == 1 and not y.is_floating_point():
        y = y[:, None] == torch.arange(whole("num_classes", num_classes), device=y.device)
    elif y.ndim != 2 or y.shape[1] != num_classes:
        raise ValueError(
            f"y must be labels, whole numbers [n], or probabilities [n, {num_classes}], got "
            f"{y.dtype} of shape {list(y.shape)}"
        )
    y = y.to(dtype)
    if isinstance(smoothing, Tensor) or smoothing:
        y = (1 - smoothing) * y + smoothing / num_classes
    return y


def target_dtype(x: Tensor) -> torch.dtype:
    """At least single precision, so that labels of half-precision inputs are not rounded."""
    tensor("x", x)
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32


def floating(name: str, v: Tensor) -> Tensor:
    if not tensor(name, v).is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {v.dtype}: convert images first (x.float() / "
            "255); for tokens, mix the embeddings"
        )
    return v


def classes_of(batch: Batch) -> int:
    """The number of classes, for transforms that make soft targets."""
    if batch.num_classes is None:
        raise ValueError(
            "batch.num_classes must be set where labels become soft targets, got None: "
            "the targets of this data set are no classes"
        )
    return batch.num_classes
