"""Flooding for a training loop of your own: a loss module, and accumulated gradients."""

from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import hyperparameter, tensor
from ..loss.flooding import flood

__all__ = ["FloodingLoss", "flood_gradients_"]


class FloodingLoss(nn.Module):
    """A loss function with a floor: ``flood(loss(...), flood_level)``.

    Parameters
    ----------
    loss : callable
        Any loss, e.g. ``nn.CrossEntropyLoss()``.  With ``reduction="none"`` every example is
        flooded by itself (iFlood), and then the mean is taken.
    flood_level : float or Tensor
        The level, see :func:`flood`.  A tensor moves with the module, ``criterion.to(device)``,
        and is not in its ``state_dict()``.

    Notes
    -----
    Log the raw loss: the flooded one never falls below the level.  Do not use this
    module with gradient accumulation: it would flood every microbatch by itself, which is
    another objective (see :func:`flood_gradients_`).  With ``reduction="none"``, an example that
    the loss ignores (``ignore_index``) has the loss 0, which is flooded to 2b and counts in the
    mean; leave such examples out.

    Examples
    --------
    >>> criterion = FloodingLoss(nn.MSELoss(), flood_level=0.5)
    >>> criterion(torch.zeros(2), torch.zeros(2))
    tensor(1.)
    """

    flood_level: float | Tensor

    def __init__(self, loss: Callable[..., Tensor], flood_level: float | Tensor) -> None:
        super().__init__()
        hyperparameter("flood_level", flood_level, 0)
        if not callable(loss):
            raise TypeError(f"loss must be a function, such as nn.MSELoss(), got {loss!r}")
        self.loss = loss
        if isinstance(flood_level, Tensor) and not isinstance(flood_level, nn.Parameter):
            self.register_buffer("flood_level", flood_level, persistent=False)
        else:
            self.flood_level = flood_level

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return flood(self.loss(*args, **kwargs), self.flood_level).mean()

    def extra_repr(self) -> str:
        return f"flood_level={self.flood_level}"


@torch.no_grad()
def flood_gradients_(
    parameters: Tensor | Iterable[Tensor], loss: float | Tensor, flood_level: float | Tensor
) -> None:
    r"""Turn accumulated gradients of the raw loss into those of the flooded loss, in place.

    Flooding changes a gradient by a sign only:
    :math:`\nabla(|L-b|+b) = \operatorname{sign}(L-b)\,\nabla L`.  So when a batch arrives in
    microbatches (or is spread over several processes), accumulate the gradient of the *raw* mean
    loss, and multiply it once by the sign for the *whole* batch.

    Parameters
    ----------
    parameters : Tensor or iterable of Tensor
        Those whose ``.grad`` holds the gradient of the mean loss of the whole batch and nothing
        else (a penalty that is not to be flooded, such as weight decay, is added afterwards).
        Parameters without a gradient are skipped; one that is named twice counts once.
    loss : float or Tensor
        Scalar: the raw mean loss of the whole batch; in a distributed run, after ``all_reduce``.
        If it is NaN, so are the gradients.
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
    hyperparameter("flood_level", flood_level, 0)
    loss = torch.as_tensor(loss) if isinstance(loss, Real) else tensor("loss", loss)
    above = loss.detach() - flood_level
    if above.ndim:
        raise ValueError(
            "loss must be one number, the mean over the whole batch, and flood_level too, got "
            f"shapes {tuple(loss.shape)} and {tuple(torch.as_tensor(flood_level).shape)}"
        )
    sign = torch.where(above.isnan(), above, above.sign())  # the sign of NaN would be 0
    alone = isinstance(parameters, Tensor) or not isinstance(parameters, Iterable)
    of: list[Any] = [parameters] if alone else list(parameters)
    for parameter in of:
        if not isinstance(parameter, Tensor):
            raise TypeError(
                "parameters must be tensors, such as model.parameters(), got "
                f"{type(parameter).__name__}"
            )
    for parameter in dict.fromkeys(of):
        if parameter.grad is not None:
            parameter.grad.mul_(sign.to(parameter.grad.device, parameter.grad.dtype))
