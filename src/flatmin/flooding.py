"""Flooding: keep the training loss from sinking below a level.

The kernel is one line, :func:`flood`.  Everything else in this room is that line in the forms a
training loop asks for: a loss module, gradient accumulation, and the loss place of a ``Recipe``.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn


def _check_level(level: float | Tensor) -> None:
    # A tensor of levels is not inspected: that would wait for the device, and fails under vmap.
    if isinstance(level, Tensor):
        return
    if not isinstance(level, Real) or isinstance(level, bool):
        raise TypeError(f"flood_level must be a number or a tensor, got {level!r}")
    if not (math.isfinite(level) and level >= 0):
        raise ValueError(f"flood_level must be a finite number >= 0, got {level!r}")


def flood(loss: Tensor, flood_level: float | Tensor) -> Tensor:
    r"""The flooded loss :math:`|\ell - b| + b`, elementwise.

    Above the level :math:`b` its gradient is that of the loss; below, the gradient's negative; at
    the level itself, zero.  What is flooded is what is passed in: the mean of a batch, the losses
    of single examples (then average *after* flooding), or one loss for each run of a stack.

    Parameters
    ----------
    loss : Tensor
        Any shape, in nats (or whatever the loss is measured in).
    flood_level : float or Tensor
        The level :math:`b \ge 0`, in the unit of the loss; a tensor must broadcast with ``loss``.

    Returns
    -------
    Tensor
        The broadcast shape of the two; never below ``flood_level``.

    Raises
    ------
    ValueError
        If ``flood_level`` is a number that is negative, infinite or NaN.

    References
    ----------
    Ishida et al., *Do We Need Zero Training Loss After Achieving Zero Training Error?*, ICML 2020.

    Examples
    --------
    >>> flood(torch.tensor([0.5, 0.1, 0.0]), 0.2)
    tensor([0.5000, 0.3000, 0.4000])
    """
    _check_level(flood_level)
    return (loss - flood_level).abs() + flood_level


class FloodingLoss(nn.Module):
    """A loss function with a floor: ``flood(loss(...), flood_level)``.

    Parameters
    ----------
    loss : callable
        Any loss, e.g. ``nn.CrossEntropyLoss()``.  With ``reduction="none"`` every example is
        flooded by itself (iFlood) and the mean is taken afterwards.
    flood_level : float or Tensor
        The level, see :func:`flood`.

    Notes
    -----
    Call the raw loss for logging: the flooded one never falls below the level.  Do not use this
    module with gradient accumulation: it would flood every microbatch by itself, which is
    another objective (see :func:`flood_gradients_`).

    Examples
    --------
    >>> criterion = FloodingLoss(nn.MSELoss(), flood_level=0.5)
    >>> criterion(torch.zeros(2), torch.zeros(2))
    tensor(1.)
    """

    def __init__(self, loss: Callable[..., Tensor], flood_level: float | Tensor) -> None:
        super().__init__()
        _check_level(flood_level)
        self.loss = loss
        self.flood_level = flood_level

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return flood(self.loss(*args, **kwargs), self.flood_level).mean()

    def extra_repr(self) -> str:
        return f"flood_level={self.flood_level}"


@torch.no_grad()
def flood_gradients_(
    parameters: Iterable[Tensor], loss: Tensor, flood_level: float | Tensor
) -> None:
    r"""Turn accumulated gradients of the raw loss into those of the flooded loss, in place.

    Flooding changes a gradient by a sign only:
    :math:`\nabla(|L-b|+b) = \operatorname{sign}(L-b)\,\nabla L`.  So when a batch arrives in
    microbatches (or is spread over several processes), accumulate the gradient of the *raw* mean
    loss, and multiply once by the sign that the *whole* batch decides.

    Parameters
    ----------
    parameters : iterable of Tensor
        Those whose ``.grad`` holds the gradient of the mean loss of the whole batch and nothing
        else (a penalty that is not to be flooded, such as weight decay, is added afterwards).
        Parameters without a gradient are left alone.
    loss : Tensor
        Scalar: the raw mean loss of the whole batch; in a distributed run, after ``all_reduce``.
    flood_level : float or Tensor
        The level, see :func:`flood`.

    Examples
    --------
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> total = 0.0
    >>> for x in torch.tensor([[0.1], [0.3]]):        # two microbatches of one
    ...     loss = (w * x).sum() / 2
    ...     loss.backward()
    ...     total = total + loss.detach()
    >>> flood_gradients_([w], total, flood_level=0.25)   # the batch's loss is 0.2: ascend
    >>> w.grad
    tensor([-0.2000])
    """
    _check_level(flood_level)
    sign = torch.sign(torch.as_tensor(loss).detach() - flood_level)
    if sign.ndim:
        raise ValueError(
            "loss must be one number, the mean over the whole batch, and flood_level too, got "
            f"shapes {tuple(torch.as_tensor(loss).shape)} and "
            f"{tuple(torch.as_tensor(flood_level).shape)}"
        )
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(sign.to(parameter.grad.device, parameter.grad.dtype))


@dataclass(frozen=True)
class Flooding:
    r"""The loss place of a recipe, flooded.

    Parameters
    ----------
    flood_level : float
        The level :math:`b`; a grid may give one a run.
    per_example : bool
        ``False``: :math:`|\bar\ell-b|+b` of the batch's mean (Ishida et al., ICML 2020).
        ``True``: the mean of :math:`|\ell_i-b|+b` (iFlood, Xie et al., ICLR 2022).

    Examples
    --------
    >>> losses = torch.tensor([0.0, 0.4])
    >>> Flooding(0.1)(losses), Flooding(0.1, per_example=True)(losses)
    (tensor(0.2000), tensor(0.3000))
    """

    flood_level: float = 0.0
    per_example: bool = False

    def __post_init__(self) -> None:
        _check_level(self.flood_level)

    def __call__(self, losses: Tensor) -> Tensor:
        if self.per_example:
            return flood(losses, self.flood_level).mean()
        return flood(losses.mean(), self.flood_level)
