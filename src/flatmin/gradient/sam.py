r"""Sharpness-aware minimization: descend the worst loss of the neighbourhood.

.. math::
    \min_w \max_{\|\epsilon\|_p\le\rho} L(w+\epsilon), \qquad
    \hat\epsilon = \arg\max_{\|\epsilon\|_p\le\rho} \langle g, \epsilon\rangle, \qquad
    w \leftarrow w - \eta\,\nabla L(w+\hat\epsilon),

with :math:`g=\nabla L(w)`: to first order, the worst point is where the gradient says it is, and
the derivative of :math:`\hat\epsilon` itself is dropped.  One kernel,
:func:`dual_norm_perturbation`, stands behind two faces: :class:`SAM` for a stack of runs, with
:func:`sam_gradient` for ``torch.func``, and :class:`flatmin.loops.SAM` for a training loop of your
own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.utils._pytree import tree_map

from .._ball import check_ball, dual_norm_perturbation
from .._checks import whole
from .._tree import Params, plus

__all__ = ["SAM", "sam_gradient"]

Found = tuple[Params, Tensor, Params]  # the direction, the loss, the new buffers


@dataclass(frozen=True)
class SAM:
    r"""The gradient place of a recipe: the gradient at the worst point of the neighbourhood.

    .. math::
        d = \nabla L\big(w+\hat\epsilon(w)\big), \qquad
        \hat\epsilon = \arg\max_{\|T^{-1}\epsilon\|_p\le\rho}\langle\nabla L(w),\epsilon\rangle

    It costs two gradients, one after the other.

    Parameters
    ----------
    rho : float
        The radius :math:`\rho\ge0`; a grid may give one a run.  At 0 it is the plain gradient.
    p : float
        Which norm, in [1, ∞]; a grid may give one a run.
    adaptive : bool
        ``True``: :math:`T=|w|+\eta`, so that the neighbourhood scales with the weights (Kwon et
        al., ICML 2021).  ``False``: :math:`T=1`.
    eta : float
        :math:`\eta\ge0` of the adaptive form, which keeps weights of 0 in the game.
    normalized : bool
        ``False``: :math:`\hat\epsilon=\rho\,T^2g`, not divided by a norm (Andriushchenko &
        Flammarion, ICML 2022); p plays no part then.
    exact : bool
        Keep :math:`d\hat\epsilon/dw`, which SAM drops: the gradient of
        :math:`w\mapsto L(w+\hat\epsilon(w))`.  Costs about two more.  For p in [1, 2], or ∞.  (At 1
        and ∞ the direction is constant almost everywhere: there is only T's derivative to keep.)
    m : int, optional
        m-SAM: the batch falls into shards of m examples, in order (the last may be smaller); each
        has an :math:`\hat\epsilon` of its own, and the gradients are averaged over the examples.
        ``None``: the batch is one shard.
    chunk_size : int, optional
        How many shards are computed side by side (``vmap``), to bound memory; 1 is a loop.  By
        default all.  The result does not depend on it.

    Notes
    -----
    With flooding, :math:`\hat\epsilon` comes from the raw loss, and the loss at
    :math:`w+\hat\epsilon` is flooded: the worst loss of the neighbourhood floats on the level.
    (Were the first gradient flooded too, :math:`\hat\epsilon` would point downhill below it, and
    the step descend :math:`|L-b|+\rho\|g\|` in place of :math:`\big|L+\rho\|g\|-b\big|`, to first
    order: another method.)  With m-SAM every shard is flooded by itself.

    The loss that is returned is the raw one at :math:`w`, and so are the buffers (batch statistics,
    dropout's counters); both passes start from the same buffers.  Of several shards, whose batch
    statistics differ, the buffers are averaged.

    The objective may carry what SAM asks for beyond ``objective(params, buffers)``:
    ``objective.raw``, the same without the loss place, and for m-SAM ``objective.examples``, the
    size of the batch, and a third argument ``rows`` (int64) of both: which examples to take.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021.

    Examples
    --------
    For :math:`L=\frac12hw^2` SAM's gradient is :math:`h(w+\rho\,\mathrm{sign}\,w)`:

    >>> bowl = lambda params, buffers: (0.5 * 3.0 * params["w"] ** 2, buffers)
    >>> direction, loss, _ = SAM(rho=0.1)(bowl, {"w": torch.tensor(2.0)}, {})
    >>> direction, loss
    ({'w': tensor(6.3000)}, tensor(6.))
    """

    rho: float = 0.05
    p: float = 2.0
    adaptive: bool = False
    eta: float = 0.01
    normalized: bool = True
    exact: bool = False
    m: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_ball(self.rho, self.p, self.eta)
        for name in ("m", "chunk_size"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        if self.exact and (isinstance(self.p, Tensor) or 2 < self.p < math.inf):
            raise ValueError(
                "p must be one number in [1, 2], or inf, where exact is True (between, the "
                f"derivative is infinite wherever a gradient is 0), got {self.p!r}"
            )

    def perturbation(self, params: Params, gradient: Params) -> Params:
        """ε̂ at ``params``, where the loss has this ``gradient``."""
        g = [gradient[name] for name in params]
        scales = [w.abs() + self.eta for w in params.values()] if self.adaptive else None
        if self.normalized:
            epsilon = dual_norm_perturbation(g, self.rho, self.p, scales)
        else:
            epsilon = [
                self.rho * x if scales is None else self.rho * t**2 * x
                for x, t in zip(g, scales or g, strict=True)
            ]
        return dict(zip(params, epsilon, strict=True))

    def __call__(self, objective: Callable[..., Any], params: Params, buffers: Params) -> Found:
        raw = getattr(objective, "raw", objective)
        if self.m is None:
            return self._one(objective, raw, params, buffers)
        if not hasattr(objective, "examples"):
            raise TypeError(
                "objective must have an attribute `examples`, the size of the batch, "
                f"where m is set, got {objective!r}"
            )
        return self._shards(objective, raw, params, buffers)

    def _one(
        self,
        objective: Callable[..., Any],
        raw: Callable[..., Any],
        params: Params,
        buffers: Params,
        *rows: Tensor,
    ) -> Found:
        g, (loss, new_buffers) = grad_and_value(raw, has_aux=True)(params, buffers, *rows)

        def worst(params: Params, perturbation: Params) -> Any:
            return objective(plus(params, perturbation), buffers, *rows)

        if self.exact:
            climb = lambda params: grad(raw, has_aux=True)(params, buffers, *rows)[0]
            full = lambda params: worst(params, self.perturbation(params, climb(params)))
            direction, _ = grad(full, has_aux=True)(params)
        else:
            direction, _ = grad(worst, has_aux=True)(params, self.perturbation(params, g))
        return direction, loss, new_buffers

    def _shards(
        self, objective: Any, raw: Callable[..., Any], params: Params, buffers: Params
    ) -> Found:
        n, m = objective.examples, min(self.m, objective.examples)
        rows = torch.arange(n, device=next(iter(params.values())).device)
        full, rest = rows[: n // m * m].view(-1, m), rows[n // m * m :].view(1, -1)
        parts = [*full.split(self.chunk_size or len(full)), *[rest] * (n % m > 0)]
        one = lambda rows, buffers: self._one(objective, raw, params, buffers, rows)
        average: Found | None = None
        for part in parts:
            if len(part) == 1:
                found = one(part[0], buffers)
            else:  # each shard has buffers of its own, which it may change in place
                own = {name: b.expand(len(part), *b.shape) for name, b in buffers.items()}
                found = tree_map(_average, vmap(one)(part, own))
            average = _add(average, found, part.numel() / n)
        return average  # type: ignore[return-value]  # a batch has at least one part


def _average(x: Tensor) -> Tensor:
    return x.mean(0) if x.is_floating_point() else x[0]  # counters agree


def _add(total: Found | None, found: Found, weight: float) -> Found:
    """total + weight · found; None is zero."""
    times = lambda x: x * weight if x.is_floating_point() else x
    add = lambda a, x: a + times(x) if x.is_floating_point() else a
    return tree_map(times, found) if total is None else tree_map(add, total, found)


def sam_gradient(
    loss: Callable[[Params], Tensor],
    params: Params,
    rho: float | Tensor = 0.05,
    p: float | Tensor = 2.0,
    **settings: Any,
) -> Params:
    r"""SAM's gradient of a loss: :math:`\nabla L(w+\hat\epsilon)`, for ``torch.func``.

    Parameters
    ----------
    loss : callable
        ``loss(params) -> scalar``, written with ``torch.func`` in mind.
    params : dict of Tensor
        The point :math:`w`.
    rho, p, **settings
        As in :class:`SAM`: ``adaptive``, ``eta``, ``normalized``, ``exact``.

    Returns
    -------
    dict of Tensor
        Like ``params``.

    Examples
    --------
    >>> sam_gradient(lambda params: 0.5 * 3.0 * params["w"] ** 2, {"w": torch.tensor(2.0)}, rho=0.1)
    {'w': tensor(6.3000)}
    """
    place = SAM(rho, p, **settings)  # type: ignore[arg-type]  # see Recipe: or tensors
    return place(lambda params, buffers: (loss(params), buffers), params, {})[0]
