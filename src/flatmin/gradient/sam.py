r"""Sharpness-aware minimization: descend the worst loss of the neighbourhood.

.. math::
    \min_w \max_{\|\epsilon\|_p\le\rho} L(w+\epsilon), \qquad
    \hat\epsilon = \arg\max_{\|\epsilon\|_p\le\rho} \langle g, \epsilon\rangle, \qquad
    w \leftarrow w - \eta\,\nabla L(w+\hat\epsilon),

with :math:`g=\nabla L(w)`: the worst point is found to first order, and the derivative of
:math:`\hat\epsilon` itself is dropped.  One kernel, :func:`dual_norm_perturbation`, serves
:class:`SAM` for a stack of runs, :func:`sam_gradient` for ``torch.func``, and
:class:`flatmin.loops.SAM` for a training loop of your own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value
from torch.utils._pytree import tree_map

from .._ball import check_ball, dual_norm_perturbation
from .._checks import whole
from .._functional import over_rows
from .._objective import Objective
from .._stage import GradientStage
from .._tree import Params, flatten, plus, unflatten

__all__ = ["SAM", "sam_gradient"]

Result = tuple[Params, Tensor, Params]  # the direction, the loss, the new buffers


@dataclass(frozen=True)
class SAM(GradientStage):
    r"""Gradient stage of a recipe: the gradient at the worst point of the neighbourhood.

    .. math::
        d = \nabla L\big(w+\hat\epsilon(w)\big), \qquad
        \hat\epsilon = \arg\max_{\|T^{-1}\epsilon\|_p\le\rho}\langle\nabla L(w),\epsilon\rangle

    It costs two gradients, one after the other.

    Parameters
    ----------
    rho : float
        The radius :math:`\rho\ge0`; a grid may give one per run.  0 is the plain gradient.
    p : float
        The norm, in [1, ∞]; a grid may give one per run.
    adaptive : bool
        ``True``: :math:`T=|w|+\eta`, so that the neighbourhood scales with the weights (Kwon et
        al., ICML 2021).  ``False``: :math:`T=1`.
    eta : float
        :math:`\eta\ge0` of the adaptive form; if it is positive, weights of 0 are perturbed, too.
    normalized : bool
        ``False``: :math:`\hat\epsilon=\rho\,T^2g`, not divided by a norm (Andriushchenko &
        Flammarion, ICML 2022); p is then ignored.
    exact : bool
        Keep :math:`d\hat\epsilon/dw`, which SAM drops: the gradient of
        :math:`w\mapsto L(w+\hat\epsilon(w))`.  Costs about two more gradients.  For p in
        [1, 2], or ∞.  (At 1 and ∞ the direction is constant almost everywhere: only the derivative
        of T is left.)
    m : int, optional
        m-SAM: the batch is split into shards of m examples, in order (the last may be smaller);
        each has its own :math:`\hat\epsilon`, and the gradients are averaged over the examples.
        ``None``: the batch is one shard.
    chunk_size : int, optional
        How many shards are computed at once (``vmap``), to bound memory; 1 is a loop, the default
        is all.  The result does not depend on it.

    Notes
    -----
    With flooding, :math:`\hat\epsilon` comes from the raw loss, and the loss at
    :math:`w+\hat\epsilon` is flooded: the worst loss of the neighbourhood is held at the level.
    (If the first gradient were flooded too, :math:`\hat\epsilon` would point downhill below the
    level, and to first order the step would descend :math:`|L-b|+\rho\|g\|` instead of
    :math:`\big|L+\rho\|g\|-b\big|`: another method.)  With m-SAM every shard is flooded by itself.

    The loss of the step is the raw one at :math:`w`, and its buffers (batch statistics, dropout's
    counters) are those after the pass at :math:`w`; both passes start from the same buffers.  With
    several shards, whose batch statistics differ, the buffers are averaged.  All shards start from
    the same buffers, so :class:`~flatmin.layers.Dropout` drops the same units in each.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021.

    Examples
    --------
    For :math:`L=\frac12hw^2` SAM's gradient is :math:`h(w+\rho\,\mathrm{sign}\,w)`:

    >>> bowl = Objective.of(lambda params: 0.5 * 3.0 * params["w"] ** 2)
    >>> SAM(rho=0.1)(bowl, {"w": torch.tensor(2.0)}, (), t=0)[0]
    {'w': tensor(6.3000)}
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
                "p must be one number in [1, 2], or inf, if exact is True (in between, the "
                f"derivative is infinite wherever a gradient is 0), got {self.p!r}"
            )

    def perturbation(self, params: Params, gradient: Params) -> Params:
        """ε̂ at ``params``, where the loss has this ``gradient``."""
        w, g = flatten(params), flatten({name: gradient[name] for name in params})
        climb = partial(dual_norm_perturbation, p=self.p) if self.normalized else torch.mul
        if self.adaptive:
            T = w.abs() + self.eta
            epsilon = T * climb(T * g, self.rho)
        else:
            epsilon = climb(g, self.rho)
        return unflatten(epsilon, {name: w.shape for name, w in params.items()})

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        one = self._one_shard if self.m is None else self._all_shards
        direction, loss, buffers = one(objective, params)
        objective.keep(loss, buffers)
        return direction, state

    def _one_shard(self, objective: Objective, params: Params, rows: Any = ...) -> Result:
        raw = lambda w: objective.value(w, rows, raw=True)
        g, (loss, buffers) = grad_and_value(raw, has_aux=True)(params)
        perturbed = lambda w, epsilon: objective(plus(w, epsilon), rows)
        if self.exact:
            epsilon = lambda w: self.perturbation(w, grad(raw, has_aux=True)(w)[0])
            direction = grad(lambda w: perturbed(w, epsilon(w)))(params)
        else:
            direction = grad(perturbed)(params, self.perturbation(params, g))
        return direction, loss, buffers

    def _all_shards(self, objective: Objective, params: Params) -> Result:
        n = objective.size
        m = min(self.m or n, n)
        rows = torch.arange(n, device=next(iter(params.values())).device)
        full, rest = rows[: n // m * m].view(-1, m), rows[n // m * m :].view(1, -1)
        parts = [*full.split(self.chunk_size or len(full)), *[rest] * (n % m > 0)]
        one = lambda rows, buffers: self._one_shard(
            replace(objective, buffers=buffers), params, rows
        )
        of_shards = over_rows(one, 0, "gradient.SAM(chunk_size=1) does without it")
        average: Result | None = None
        for part in parts:  # each shard has its own buffers, which it may change in place
            own = {name: b.expand(len(part), *b.shape) for name, b in objective.buffers.items()}
            result = tree_map(_average, of_shards(part, own))
            average = _add(average, result, part.numel() / n)
        return average  # type: ignore[return-value]  # a batch has at least one part


def _average(x: Tensor) -> Tensor:
    return x.mean(0) if x.is_floating_point() else x[0]  # counters agree


def _add(total: Result | None, part: Result, weight: float) -> Result:
    """total + weight · part; None is zero."""
    times = lambda x: x * weight if x.is_floating_point() else x
    add = lambda a, x: a + times(x) if x.is_floating_point() else a
    return tree_map(times, part) if total is None else tree_map(add, total, part)


def sam_gradient(
    loss: Callable[[Params], Tensor],
    params: Params,
    rho: float | Tensor = 0.05,
    p: float | Tensor = 2.0,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    normalized: bool = True,
    exact: bool = False,
) -> Params:
    r"""SAM's gradient of a loss: :math:`\nabla L(w+\hat\epsilon)`, for ``torch.func``.

    Parameters
    ----------
    loss : callable
        ``loss(params) -> scalar``, which ``torch.func`` can differentiate.
    params : dict of Tensor
        The point :math:`w`.
    rho, p, adaptive, eta, normalized, exact
        As in :class:`SAM`.

    Returns
    -------
    dict of Tensor
        Like ``params``.

    Examples
    --------
    >>> sam_gradient(lambda params: 0.5 * 3.0 * params["w"] ** 2, {"w": torch.tensor(2.0)}, rho=0.1)
    {'w': tensor(6.3000)}
    """
    real = lambda w: isinstance(w, Tensor) and w.is_floating_point()
    if not isinstance(params, dict) or not params or not all(map(real, params.values())):
        raise TypeError(
            "params must be a dict of floating point tensors, such as "
            f"dict(model.named_parameters()), got {params!r}"
        )
    sam = SAM(rho, p, adaptive, eta, normalized, exact)  # type: ignore[arg-type]  # or tensors
    return sam(Objective.of(loss), params, (), t=0)[0]
