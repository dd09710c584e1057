"""The gradient itself."""

from dataclasses import dataclass
from typing import Any

from .._objective import Objective
from .._stage import GradientStage
from .._tree import Params

__all__ = ["PlainGradient"]


@dataclass(frozen=True)
class PlainGradient(GradientStage):
    """The gradient stage of plain training: the gradient itself."""

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        return objective.gradient(params), state
