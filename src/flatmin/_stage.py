"""What sits in a stage of the training step: a frozen dataclass with ``init`` and a call.

Inheriting from these saves a method or two; whatever has the methods will do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._objective import Objective
from ._tree import Params

STAGES = ("batch", "loss", "gradient", "optimizer")


class Batch(NamedTuple):
    """What a step is shown.

    Attributes
    ----------
    x, y : Tensor [n, ...]
        Inputs, and targets as the criterion takes them.
    rows : Tensor [n], optional
        Which examples of the training set these are, int64.
    num_classes : int, optional
        Of the labels, where they are classes.
    other : Batch, optional
        A second batch, drawn independently, for a transform whose ``second_stream`` is true.
    """

    x: Tensor
    y: Tensor
    rows: Tensor | None = None
    num_classes: int | None = None
    other: Batch | None = None


class BatchStage:
    """From the examples to what is shown in their place: ``transform(batch, draw) -> batch``."""

    stage = "batch"

    def draw(self, batch: Batch, generator: torch.Generator) -> Params:
        """All random numbers for one batch, made on the CPU; only the shape of ``batch.x`` is known."""
        return {}

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        raise NotImplementedError


class LossStage:
    """From the example losses [n] of a batch to one number: ``loss(losses, rows) -> scalar``."""

    stage = "loss"

    def __call__(self, losses: Tensor, rows: Tensor | None) -> Tensor:
        raise NotImplementedError


class GradientStage:
    """From an objective to a direction: ``gradient(objective, w, state, t) -> (direction, state)``."""

    stage = "gradient"

    def init(self, params: Params) -> Any:
        """The state before the first step."""
        return ()

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        raise NotImplementedError


class OptimizerStage:
    """From a direction to the next weights: ``optimizer(direction, w, state, t) -> (w, state)``."""

    stage = "optimizer"

    def init(self, params: Params) -> Any:
        """The state before the first step."""
        return ()

    def __call__(self, grads: Params, params: Params, state: Any, t: int) -> tuple[Params, Any]:
        raise NotImplementedError


class Step(int):
    """The number of a step, which also knows how much of the training is ``done``, in [0, 1).

    Examples
    --------
    >>> t = Step(25, of=100)
    >>> t % 10, t.done
    (5, 0.25)
    """

    of: int
    done: float

    def __new__(cls, t: int, of: int) -> Step:
        step = super().__new__(cls, t)
        step.of, step.done = of, t / of
        return step

    def __getnewargs__(self) -> Any:  # for copies and pickles
        return int(self), self.of
