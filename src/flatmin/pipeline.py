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
    """The gradient place, filled with the gradient itself.

    Whatever sits here gets ``objective(params, buffers) -> (loss, new buffers)`` and the point to
    take it at, and returns the direction to descend, the loss, and the new buffers.  It may ask for
    more: ``objective.raw`` has the plain mean of the example losses in the loss place,
    ``objective.examples`` is the size n of the batch, and both functions take a third argument
    ``rows`` (int64, values below n), the part of the batch to look at.
    """
    gradient, (loss, buffers) = grad_and_value(objective, has_aux=True)(params, buffers)
    return gradient, loss, buffers


@dataclass(frozen=True)
class Recipe:
    """What sits in each place of the training step.

    Parameters
    ----------
    loss : callable
        From the batch's example losses [n] to one number: :class:`~flatmin.loss.Flooding`, whose level
        0 is the plain mean.
    gradient : callable
        From an objective to the direction that is descended, see :func:`plain_gradient`.
    optimizer : SGD or Adam
        From the direction to the step.
    criterion : callable
        From logits [n, K] and targets to example losses [n].
    batch : vicinity, optional
        What is shown in place of the examples: :class:`~flatmin.batch.Mixup` or another
        distribution of :mod:`flatmin.batch`.  ``None``: the examples themselves.

    Notes
    -----
    Whatever sits in the batch place is a frozen dataclass with two methods.  ``draw(y, generator,
    shape, *y_other)`` makes all random draws for a batch with labels ``y`` and inputs of ``shape``,
    on the CPU: a dict of tensors.  ``place(x, y, draw, num_classes, *other)`` computes what is
    shown from them: ``x, y``, for one run.  ``other`` holds the inputs and labels of a second batch
    where the place has an attribute ``second_stream`` that is true, and is empty otherwise.

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
        """The numbers in the places, by name: ``{name: (place, value)}``.

        Whole numbers by declaration (``int``, ``int | None``) are none: they set shapes, which all
        runs share.  A name that two places have is left out, for nobody could say which of them is
        meant.
        """
        return {name: of[0] for name, of in self._numbers().items() if len(of) == 1}

    def _numbers(self) -> dict[str, list[tuple[str, float]]]:
        found: dict[str, list[tuple[str, float]]] = {}
        for place in ("batch", "loss", "gradient", "optimizer"):
            part = getattr(self, place)
            if dataclasses.is_dataclass(part):
                for f in dataclasses.fields(part):
                    value = getattr(part, f.name)
                    number = isinstance(value, Real) and not isinstance(value, bool)
                    if number and not _sets_a_shape(f):
                        found.setdefault(f.name, []).append((place, value))
        return found

    def with_values(self, values: Mapping[str, float | Tensor]) -> Recipe:
        """This recipe with other hyperparameters; tensors are allowed (``vmap`` passes them)."""
        places = self.hyperparameters()
        changed: dict[str, dict[str, float | Tensor]] = {}
        for name, value in values.items():
            if name not in places:
                if doubled := [place for place, _ in self._numbers().get(name, [])]:
                    raise ValueError(
                        f"grid names must be hyperparameters of one place, but {name!r} is one of "
                        f"{' and '.join(doubled)}"
                    )
                raise ValueError(
                    f"grid names must be hyperparameters of the recipe, {sorted(places)}, "
                    f"got {name!r}"
                )
            changed.setdefault(places[name][0], {})[name] = value
        return replace(
            self, **{place: replace(getattr(self, place), **new) for place, new in changed.items()}
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

    Returns the new weights, buffers and optimizer's state, and the loss before the step.
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

    about: Any = objective
    about.raw, about.examples = partial(objective, loss=torch.mean), len(x)

    gradient, loss, buffers = recipe.gradient(objective, params, buffers)
    params, optimizer = recipe.optimizer(params, gradient, optimizer, t, factor)
    return params, buffers, optimizer, loss
