"""The gradient itself, and the gradient of another stage with a bound on its length."""

from dataclasses import dataclass, field
from typing import Any

from .._checks import hyperparameter
from .._objective import Objective
from .._stage import GradientStage
from .._tree import Params, norm

__all__ = ["Clipped", "PlainGradient"]


@dataclass(frozen=True)
class PlainGradient(GradientStage):
    """The gradient stage of plain training: the gradient itself."""

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        return objective.gradient(params), state


@dataclass(frozen=True)
class Clipped(GradientStage):
    r"""The direction of another gradient stage, shortened to at most ``max_norm``.

    .. math:: d \leftarrow d\,\min\big(1,\ c/\|d\|\big)

    Parameters
    ----------
    max_norm : float
        :math:`c>0`, the longest that the direction of all weights together may be.
    inner : gradient stage
        Whose direction is clipped.

    References
    ----------
    Pascanu, Mikolov & Bengio, *On the Difficulty of Training Recurrent Neural Networks*, ICML 2013.

    Examples
    --------
    >>> import torch
    >>> bowl = Objective.of(lambda w: 3.0 * w["a"] + 4.0 * w["b"])
    >>> w = {"a": torch.zeros(()), "b": torch.zeros(())}
    >>> Clipped(max_norm=1.0)(bowl, w, (), t=0)[0]
    {'a': tensor(0.6000), 'b': tensor(0.8000)}
    """

    max_norm: float = 1.0
    inner: GradientStage = field(default_factory=PlainGradient)

    def __post_init__(self) -> None:
        hyperparameter("max_norm", self.max_norm, 0)

    def init(self, params: Params) -> Any:
        return self.inner.init(params)

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        direction, state = self.inner(objective, params, state, t)
        length = norm(direction)
        factor = (self.max_norm / length.clamp_min(1e-30)).clamp_max(1)
        return {name: factor * d for name, d in direction.items()}, state
