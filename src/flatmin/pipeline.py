"""The training step as a pipeline; a :class:`Recipe` says what sits in each of its stages.

.. code-block:: text

    batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from ._targets import example_losses
from ._tree import Params
from .loss.flooding import Flooding
from .optimizer.sgd import SGD

__all__ = ["Recipe", "example_losses", "plain_gradient", "step"]


def plain_gradient(
    objective: Callable[..., Any], params: Params, buffers: Params
) -> tuple[Params, Tensor, Params]:
    """The gradient stage of plain training: the gradient itself.

    A gradient stage gets ``objective(params, buffers) -> (loss, new buffers)`` and the point at
    which to evaluate it.  It returns the direction to descend, the loss and the new buffers.  It
    may also use ``objective.raw``, with the plain mean of the example losses as its loss stage,
    ``objective.examples``, the batch size n, and a third argument ``rows`` of both functions
    (int64, values below n), the part of the batch to evaluate.
    """
    gradient, (loss, buffers) = grad_and_value(objective, has_aux=True)(params, buffers)
    return gradient, loss, buffers


@dataclass(frozen=True)
class Recipe:
    """What sits in each stage of the training step.

    Parameters
    ----------
    loss : callable
        From the example losses [n] of the batch to one number: :class:`~flatmin.loss.Flooding`,
        whose level 0 is the plain mean.
    gradient : callable
        From an objective to the direction that is descended, see :func:`plain_gradient`.
    optimizer : SGD or Adam
        From the direction to the step.
    criterion : callable
        From logits [n, K] and targets to example losses [n].
    batch : batch transform, optional
        What is shown in place of the examples: :class:`~flatmin.batch.Mixup` or another transform
        of :mod:`flatmin.batch`.  ``None``: the examples themselves.

    Notes
    -----
    A batch transform is a frozen dataclass with two methods.  ``draw(y, generator, shape,
    *y_other)`` makes all random draws for a batch with labels ``y`` and inputs of ``shape``, on the
    CPU: a dict of tensors.  Calling it, ``transform(x, y, draw, num_classes, *other)``, computes
    from them the ``x, y`` that one run is shown.  ``other`` holds the inputs and labels of a second
    batch if the transform has an attribute ``second_stream`` that is true; else it is empty.

    Examples
    --------
    >>> recipe = Recipe(loss=Flooding(0.1), optimizer=SGD(lr=0.05, momentum=0.9))
    >>> sorted(recipe.hyperparameters())
    ['flood_level', 'lr', 'momentum', 'weight_decay']
    """

    loss: Callable[[Tensor], Tensor] = field(default_factory=Flooding)
    gradient: Callable[..., tuple[Params, Tensor, Params]] = plain_gradient
    optimizer: Any = field(default_factory=SGD)
    criterion: Callable[[Tensor, Tensor], Tensor] = example_losses
    batch: Any = field(default=None, kw_only=True)

    def hyperparameters(self) -> dict[str, tuple[str, float]]:
        """The numbers in the stages, by name: ``{name: (stage, value)}``.

        Fields declared ``int`` or ``int | None`` are left out: they set shapes, which all runs
        share.  So is a name that occurs in two stages, because it is ambiguous.
        """
        numbers = self._numbers_by_name().items()
        return {name: entries[0] for name, entries in numbers if len(entries) == 1}

    def _numbers_by_name(self) -> dict[str, list[tuple[str, float]]]:
        numbers: dict[str, list[tuple[str, float]]] = {}
        for stage in ("batch", "loss", "gradient", "optimizer"):
            part = getattr(self, stage)
            if dataclasses.is_dataclass(part):
                for f in dataclasses.fields(part):
                    value = getattr(part, f.name)
                    is_number = isinstance(value, Real) and not isinstance(value, bool)
                    if is_number and not _sets_a_shape(f):
                        numbers.setdefault(f.name, []).append((stage, value))
        return numbers

    def with_values(self, values: Mapping[str, float | Tensor]) -> Recipe:
        """This recipe with other hyperparameters; tensors are allowed (``vmap`` passes them)."""
        known = self.hyperparameters()
        changed: dict[str, dict[str, float | Tensor]] = {}
        for name, value in values.items():
            if name not in known:
                if stages := [stage for stage, _ in self._numbers_by_name().get(name, [])]:
                    raise ValueError(
                        f"grid names must be hyperparameters of one stage, but {name!r} is in "
                        f"{' and '.join(stages)}"
                    )
                raise ValueError(
                    f"grid names must be hyperparameters of the recipe, {sorted(known)}, "
                    f"got {name!r}"
                )
            changed.setdefault(known[name][0], {})[name] = value
        return replace(
            self, **{stage: replace(getattr(self, stage), **new) for stage, new in changed.items()}
        )


def _sets_a_shape(f: dataclasses.Field[Any]) -> bool:
    """Whether a field is declared ``int`` or ``int | None``, as a type or in a string."""
    names = {"int"} if f.type is int else {*re.findall(r"\w+", str(f.type))}
    return "int" in names and names <= {"int", "None", "Optional", "Union", "typing"}


def step(
    model: nn.Module,
    recipe: Recipe,
    params: Params,
    buffers: Params,
    optimizer: Any,
    batch: tuple[Tensor, ...],
    draw: Params,
    num_classes: int,
    t: int,
    factor: float,
) -> tuple[Params, Params, Any, Tensor]:
    """One step of one run, through the stages in their order.

    Returns the new weights, buffers and optimizer state, and the loss before the step.
    """
    x, y, *other = batch
    if recipe.batch is not None:
        x, y = recipe.batch(x, y, draw, num_classes, *other)

    def objective(
        params: Params, buffers: Params, rows: Any = ..., loss: Any = recipe.loss
    ) -> tuple[Tensor, Params]:
        buffers = {name: b.clone() for name, b in buffers.items()}  # updated in place below
        logits = functional_call(model, (params, buffers), (x[rows],))
        return loss(recipe.criterion(logits, y[rows])), buffers

    described: Any = objective  # Any: mypy allows no attributes on a function
    described.raw, described.examples = partial(objective, loss=torch.mean), len(x)

    gradient, loss, buffers = recipe.gradient(objective, params, buffers)
    params, optimizer = recipe.optimizer(params, gradient, optimizer, t, factor)
    return params, buffers, optimizer, loss
