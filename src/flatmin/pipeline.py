"""The training step as a pipeline; a :class:`Recipe` says what sits in each of its stages.

.. code-block:: text

    batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._functional import called
from ._objective import Objective
from ._stage import STAGES, Batch, BatchStage, GradientStage, LossStage, OptimizerStage, Step
from ._targets import checked_losses, example_losses
from ._tree import Params
from .gradient.plain import PlainGradient
from .loss.flooding import Flooding
from .optimizer.sgd import SGD

__all__ = [
    "Batch",
    "BatchStage",
    "GradientStage",
    "LossStage",
    "Objective",
    "OptimizerStage",
    "Recipe",
    "State",
    "Step",
    "example_losses",
    "step",
]


@dataclass(frozen=True)
class Recipe:
    """What sits in each stage of the training step, in their order.

    Parameters
    ----------
    batch : batch stage, optional
        What is shown in place of the examples: :class:`~flatmin.batch.Mixup` or another transform
        of :mod:`flatmin.batch`.  ``None``: the examples themselves.
    criterion : callable
        From outputs and targets to example losses [n].
    loss : loss stage
        From example losses to one number: :class:`~flatmin.loss.Flooding`, whose level 0 is the
        plain mean.
    gradient : gradient stage
        From an :class:`Objective` to the direction that is descended.
    optimizer : optimizer stage
        From the direction to the next weights.

    Raises
    ------
    TypeError
        If something does not belong in its stage; the message says where it does.

    Notes
    -----
    :class:`BatchStage`, :class:`LossStage`, :class:`GradientStage` and :class:`OptimizerStage` say
    what each stage is given and returns.  What a stage needs from one step to the next is its state:
    ``init(params)`` makes it, of tensors in tuples, lists or dictionaries, and each call returns it
    anew.

    Examples
    --------
    >>> recipe = Recipe(loss=Flooding(0.1), optimizer=SGD(lr=0.05))
    >>> recipe.hyperparameters()
    {'loss.flood_level': 0.1, 'optimizer.lr': 0.05, 'optimizer.momentum': 0.0, 'optimizer.weight_decay': 0.0}
    >>> recipe.with_values({"lr": 0.2}).optimizer.lr
    0.2
    """

    batch: BatchStage | None = None
    criterion: Callable[[Any, Tensor], Tensor] = example_losses
    loss: LossStage = field(default_factory=Flooding)
    gradient: GradientStage = field(default_factory=PlainGradient)
    optimizer: OptimizerStage = field(default_factory=SGD)

    def __post_init__(self) -> None:
        for stage in STAGES:
            _check_stage(stage, getattr(self, stage))
        wrong = isinstance(self.criterion, type) or hasattr(self.criterion, "stage")
        if wrong or not callable(self.criterion):
            raise TypeError(
                f"criterion must be a function of outputs and targets, got {self.criterion!r}"
            )
        if isinstance(self.criterion, nn.Module) and [*self.criterion.parameters()]:
            raise ValueError(
                f"criterion must have no parameters, which belong in the model, got {self.criterion}"
            )

    def hyperparameters(self) -> dict[str, Any]:
        """Every number in the tree of stages, by its path: ``{"optimizer.lr": 0.1, …}``."""
        return dict(_numbers(self))

    def path(self, name: str) -> str:
        """The path of a hyperparameter, from its path or from a last part that is unique."""
        paths = self.hyperparameters()
        found = [path for path in paths if name in (path, path.rpartition(".")[2])]
        if len(found) == 1 or name in found:
            return name if name in found else found[0]
        if found:
            raise ValueError(
                f"grid names must say which hyperparameter is meant, {' or '.join(found)}, "
                f"got {name!r}"
            )
        raise ValueError(
            f"grid names must be hyperparameters of the recipe, {sorted(paths)}, got {name!r}"
        )

    def with_values(self, values: Mapping[str, float | Tensor]) -> Recipe:
        """This recipe with other hyperparameters; tensors are allowed (``vmap`` passes them)."""
        recipe = self
        for name, value in values.items():
            recipe = bind(recipe, self.path(name), value)
        return recipe


def _check_stage(stage: str, part: Any) -> None:
    """Refuse what does not belong in a stage, and say where it belongs."""
    if part is None and stage == "batch":
        return
    name = f"{part.__module__}.{part.__qualname__}" if isinstance(part, type) else repr(part)
    if isinstance(part, torch.optim.Optimizer):
        name = f"a torch.optim.{type(part).__name__}"
    if name.startswith(("torch.optim.", "a torch.optim.")):
        raise TypeError(
            f"{stage} must be a stage for a stack of runs, such as flatmin.optimizer.SGD(lr=0.1), "
            f"got {name}"
        )
    if isinstance(part, nn.Module):
        raise TypeError(f"{stage} must be a stage, got the module {name}, for a loop of your own")
    if isinstance(part, type):
        raise TypeError(f"{stage} must be an instance, such as {part.__name__}(), got {name}")
    if (belongs := getattr(part, "stage", stage)) != stage:
        raise TypeError(
            f"{stage} must be a {stage} stage, but {name} belongs in the {belongs} stage: "
            f"Recipe({belongs}=...)"
        )
    methods = {"batch": "draw", "gradient": "init", "optimizer": "init"}
    if not callable(part) or not callable(getattr(part, methods.get(stage, "__call__"), None)):
        needed = f" with a method {methods[stage]}" if stage in methods else ""
        raise TypeError(
            f"{stage} must be callable{needed}, see flatmin.pipeline.{stage.capitalize()}Stage, "
            f"got {name}"
        )


def _numbers(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if f.name == "criterion":  # which evaluates all runs alike
            continue
        if isinstance(value, Real) and not isinstance(value, bool):
            yield path + f.name, value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _numbers(value, f"{path}{f.name}.")


def bind(part: Any, path: str, value: Any) -> Any:
    """``part`` with another value at the end of ``path``."""
    name, _, rest = path.partition(".")
    return replace(part, **{name: bind(getattr(part, name), rest, value) if rest else value})


class State(NamedTuple):
    """What a run carries from one step to the next."""

    params: Params
    buffers: Params
    gradient: Any
    optimizer: Any

    @classmethod
    def init(cls, recipe: Recipe, params: Params, buffers: Params) -> State:
        """Before the first step."""
        return cls(params, buffers, recipe.gradient.init(params), recipe.optimizer.init(params))


def step(
    model: nn.Module, recipe: Recipe, state: State, batch: Batch, draw: Params, t: int
) -> tuple[State, Tensor]:
    """One step of one run, through the stages in their order; and the loss before it."""
    if recipe.batch is not None:
        batch = recipe.batch(batch, draw)  # batch
        if batch.rows is not None and len(batch.rows) != len(batch.x):
            raise ValueError(
                f"batch.rows must say for each of the {len(batch.x)} examples that the batch stage "
                f"returns which it is, or be None, got {len(batch.rows)}"
            )

    def evaluate(w: Params, buffers: Params, rows: Any, raw: bool) -> tuple[Tensor, Params]:
        output, buffers = called(model, w, buffers, batch.x[rows])  # model
        losses = checked_losses(
            recipe.criterion(output, batch.y[rows]), batch.x[rows], batch.y[rows]
        )
        if raw:
            return losses.mean(), buffers
        return recipe.loss(
            losses, None if batch.rows is None else batch.rows[rows]
        ), buffers  # loss

    objective = Objective(evaluate, len(batch.x), state.buffers)
    direction, gradient = recipe.gradient(objective, state.params, state.gradient, t)  # gradient
    _check_like("gradient", direction, state.params)
    loss, buffers = objective.first_pass(state.params)
    params, optimizer = recipe.optimizer(direction, state.params, state.optimizer, t)  # optimizer
    _check_like("optimizer", params, state.params)
    return State(params, buffers, gradient, optimizer), loss


def _check_like(stage: str, found: Params, params: Params) -> None:
    kind = lambda named: {name: (w.shape, w.dtype) for name, w in named.items()}
    if kind(found) != kind(params):
        wrong = {*kind(found).items()} ^ {*kind(params).items()}
        raise ValueError(
            f"{stage} must return a tensor for each parameter, of its shape and type, got others "
            f"for {sorted({name for name, _ in wrong})}"
        )
