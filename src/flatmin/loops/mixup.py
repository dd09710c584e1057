"""Mixup and the other batch transforms, for a training loop of your own."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from .._checks import tensor, whole
from .._random import stream
from .._stage import Batch, BatchStage

__all__ = ["BatchTransform"]


class BatchTransform:
    """A batch transform for a training loop of your own, also as a collate function.

    Called with a batch of inputs and labels, it returns inputs and (for mixup and label smoothing)
    soft targets, which ``nn.CrossEntropyLoss`` takes.  Nothing is changed in place, and what a
    transform leaves as it is comes back itself, not as a copy; the inputs keep their dtype and
    device.

    With SAM, transform the batch before the step: called inside of a closure, it would draw anew in
    the second pass, and the two gradients would be of different batches.

    Parameters
    ----------
    transform : BatchStage
        Any batch stage: Mixup, Gaussian, LabelSmoothing, Dirac, or your own.
    num_classes : int
        K.
    seed : int
        Determines all draws: batch number t draws from ``stream(seed, "batch", t)``, as
        :func:`flatmin.fit` does for that seed.  Give each process of a distributed run its own.  In
        a worker of a ``DataLoader`` the draws also depend on the worker's seed, which is new in
        every epoch.

    Attributes
    ----------
    count : int
        How many batches have been drawn; set it to resume an interrupted run.

    Raises
    ------
    TypeError
        For anything but tensors, inputs that are not floating point, samples that are not pairs, a
        missing second batch if the transform's ``second_stream`` is true, or a second batch for a
        transform that would ignore it.
    ValueError
        For labels outside 0 … K−1 (checked on a CPU only: the check would wait for a GPU).  For
        labels with an ``ignore_index``, mix the inputs with :func:`~flatmin.mix` and the losses
        with :func:`~flatmin.mix_losses`.

    Examples
    --------
    >>> import torch
    >>> from flatmin.batch import Mixup
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
    >>> mixup = BatchTransform(Mixup(alpha=0.2), num_classes=2)
    >>> x, y = next(iter(DataLoader(data, batch_size=4, collate_fn=mixup.collate)))
    >>> x.shape, y.shape
    (torch.Size([4, 3]), torch.Size([4, 2]))

    Or after the loader, where the batch may be on a GPU already; and with a second loader:

    >>> loader, second = DataLoader(data, 4, shuffle=True), DataLoader(data, 4, shuffle=True)
    >>> for x, y in loader:
    ...     x, y = mixup(x, y)
    >>> for batch, other in zip(loader, second):
    ...     x, y = mixup(*batch, *other)
    """

    def __init__(self, transform: BatchStage, num_classes: int, seed: int = 0) -> None:
        if isinstance(transform, type) or not hasattr(transform, "draw"):
            raise TypeError(
                f"transform must be a batch stage, such as Mixup(0.2), got {transform!r}"
            )
        self.transform = transform
        self.num_classes = whole("num_classes", num_classes)
        self.seed = whole("seed", seed, 0)
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor, *other: Tensor) -> tuple[Tensor, Tensor]:
        if len(other) not in (0, 2):
            raise TypeError("other must be the inputs and the labels of a second batch")
        if getattr(self.transform, "second_stream", False) and not other:
            raise TypeError(
                "other must be a second batch if second_stream is True: transform(x, y, x2, y2)"
            )
        if other and not hasattr(self.transform, "second_stream"):
            raise TypeError(f"other must not be given: {self.transform!r} takes one batch")
        self._check("x", x, "y", y)
        if other:
            self._check("x2", other[0], "y2", other[1])
        second = Batch(other[0], other[1]) if other else None
        batch = Batch(x, y, num_classes=self.num_classes, other=second)
        draw = self.transform.draw(batch, self._generator())
        batch = self.transform(batch, {name: v.to(x.device) for name, v in draw.items()})
        self.count += 1
        return batch.x, batch.y

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """The batch of the samples ``(x, y)``: ``DataLoader(..., collate_fn=….collate)``."""
        batch = default_collate(samples)
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(f"samples must be pairs (x, y), got {type(samples[0]).__name__}")
        return self(*batch)

    def _generator(self) -> torch.Generator:
        worker = get_worker_info()
        purpose = "batch" if worker is None else f"batch/{worker.seed}"
        return stream(self.seed, purpose, self.count)

    def _check(self, x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
        n = tensor(x_name, x).shape[:1]
        if n != tensor(y_name, y).shape[:1] or not n:
            raise ValueError(
                f"{y_name} must have one row for each row of {x_name}, got shapes {list(y.shape)} "
                f"and {list(x.shape)}"
            )
        if y.ndim == 1 and y.device.type == "cpu" and len(y) and not y.is_floating_point():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"{y_name} must be in 0 … {self.num_classes - 1}, got {low} … {high}; for an "
                    "ignore_index, mix inputs with mix() and losses with mix_losses()"
                )
