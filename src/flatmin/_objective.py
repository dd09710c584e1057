"""The loss of one batch, as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import grad_and_value

from ._tree import Params

Pass = tuple[Tensor, Params]  # a loss, and the buffers after its forward pass


@dataclass(frozen=True)
class Objective:
    r"""What a gradient stage is given: L(w) on one batch.

    ``objective(w)`` is what the loss stage makes of the example losses, ``objective.raw(w)`` is
    their plain mean.  Both are functions of the weights alone, ready for :mod:`torch.func`, and take
    ``rows`` (int64, below ``objective.size``) for a part of the batch.

    Attributes
    ----------
    evaluate : callable
        ``evaluate(w, buffers, rows, raw) -> (loss, new buffers)``.
    size : int
        How many examples the batch has.
    buffers : dict of Tensor
        What every pass starts from, such as batch statistics; none is changed in place.
    terms : tuple of callables
        Functions of the weights that are added to the loss, see :meth:`plus`.

    Notes
    -----
    A step has one loss and one set of new buffers, those of its first pass.  :meth:`gradient` keeps
    them on the way; after a stage that differentiates by itself, by ``grad(objective)``, they cost
    another forward pass.  Inside another transform (``grad``, ``vmap``) call ``grad(objective)``:
    what :meth:`gradient` kept there could not be used outside.

    Examples
    --------
    >>> import torch
    >>> from torch.func import grad
    >>> bowl = Objective.of(lambda w: 0.5 * 3.0 * w["w"] ** 2)
    >>> w = {"w": torch.tensor(2.0)}
    >>> bowl(w), bowl.gradient(w), grad(bowl.plus(lambda w: w["w"]))(w)
    (tensor(6.), {'w': tensor(6.)}, {'w': tensor(7.)})
    """

    evaluate: Callable[[Params, Params, Any, bool], Pass]
    size: int = 1
    buffers: Params = field(default_factory=dict)
    terms: tuple[Callable[[Params], Tensor], ...] = ()
    passes: list[Pass] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls, loss: Callable[[Params], Tensor], raw: Callable[[Params], Tensor] | None = None
    ) -> Objective:
        """An objective from a function of the weights, and from another one for ``raw``."""
        return cls(lambda w, buffers, rows, plain: ((raw or loss if plain else loss)(w), buffers))

    def value(self, w: Params, rows: Any = ..., raw: bool = False) -> Pass:
        """The loss, and the buffers after the pass: for ``grad(..., has_aux=True)``."""
        loss, buffers = self.evaluate(w, self.buffers, rows, raw)
        for term in self.terms:
            loss = loss + term(w)
        return loss, buffers

    def __call__(self, w: Params, rows: Any = ...) -> Tensor:
        return self.value(w, rows)[0]

    def raw(self, w: Params, rows: Any = ...) -> Tensor:
        """The plain mean of the example losses, without the loss stage."""
        return self.value(w, rows, raw=True)[0]

    def plus(self, term: Callable[[Params], Tensor]) -> Objective:
        """With ``term(w)`` added to the loss and to ``raw``."""
        return replace(self, terms=(*self.terms, term))

    def gradient(self, w: Params, rows: Any = ..., raw: bool = False) -> Params:
        """∇L(w); the loss and the buffers of the pass are kept for the step."""
        value = partial(self.value, rows=rows, raw=raw)
        gradient, seen = grad_and_value(value, has_aux=True)(w)
        self.keep(*seen)
        return gradient

    def keep(self, loss: Tensor, buffers: Params) -> None:
        """Say what the first pass found, instead of :meth:`gradient`."""
        self.passes.append((loss, buffers))

    def first_pass(self, w: Params) -> Pass:
        """The loss and the buffers that the step ends with."""
        return self.passes[0] if self.passes else self.value(w)
