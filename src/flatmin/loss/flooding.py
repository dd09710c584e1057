"""Flooding: keep the training loss from sinking below a level."""

from dataclasses import dataclass

from torch import Tensor

from .._checks import hyperparameter, tensor
from .._stage import LossStage

__all__ = ["Flooding", "flood"]


def flood(loss: Tensor, flood_level: float | Tensor) -> Tensor:
    r"""The flooded loss :math:`|\ell - b| + b`, elementwise.

    Above the level :math:`b` its gradient is that of the loss, below it the negative, and at the
    level zero.  The input may be the mean of a batch, the losses of single examples (then average
    *after* flooding), or one loss per run of a stack.

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
    TypeError
        If ``loss`` is no tensor.
    ValueError
        If ``flood_level`` is a number that is negative, infinite or NaN.

    References
    ----------
    Ishida et al., *Do We Need Zero Training Loss After Achieving Zero Training Error?*, ICML 2020.

    Examples
    --------
    >>> import torch
    >>> flood(torch.tensor([0.5, 0.1, 0.0]), 0.2)
    tensor([0.5000, 0.3000, 0.4000])
    """
    hyperparameter("flood_level", flood_level, 0)
    return (tensor("loss", loss) - flood_level).abs() + flood_level


@dataclass(frozen=True)
class Flooding(LossStage):
    r"""Flooding as the loss stage of a recipe.

    Parameters
    ----------
    flood_level : float
        The level :math:`b`; a grid may give one per run.
    per_example : bool
        ``False``: :math:`|\bar\ell-b|+b` of the batch's mean (Ishida et al., ICML 2020).
        ``True``: the mean of :math:`|\ell_i-b|+b` (iFlood, Xie et al., ICLR 2022).

    Examples
    --------
    >>> import torch
    >>> losses = torch.tensor([0.0, 0.4])
    >>> Flooding(0.1)(losses), Flooding(0.1, per_example=True)(losses)
    (tensor(0.2000), tensor(0.3000))
    """

    flood_level: float = 0.0
    per_example: bool = False

    def __post_init__(self) -> None:
        hyperparameter("flood_level", self.flood_level, 0)

    def __call__(self, losses: Tensor, rows: Tensor | None = None) -> Tensor:
        if not self.per_example:
            return flood(tensor("losses", losses).mean(), self.flood_level)
        each = tensor("losses", losses).reshape(len(losses), -1).mean(1)
        return flood(each, self.flood_level).mean()
