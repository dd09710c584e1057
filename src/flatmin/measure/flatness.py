r"""Sharpness: how much the loss rises nearby.

.. math::
    S_m(w) = \frac1n\sum_{B}|B|\,\max_{\|T^{-1}\epsilon\|_p\le\rho}
    \big[L_B(w+\epsilon) - L_B(w)\big]

over shards B of m examples: like m-SAM, it takes the worst-case perturbation of each shard, not of
all examples at once.  With m=n it is the sharpness of the whole set.  T=1, or
:math:`T=|w|+\eta` in the adaptive form, whose value does not change when one layer is multiplied
by a number and the next divided by it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from .._ball import check_ball, dual_norm_perturbation
from .._checks import whole
from .._functional import Loss, MeanLoss, Network, map_rows
from .._targets import example_losses
from .._tree import Params, flatten, unflatten

__all__ = ["sharpness"]


def sharpness(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    rho: float = 0.05,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.01,
    steps: int = 1,
    m: int | None = None,
    criterion: Loss = example_losses,
    batch_size: int = 1000,
    chunk_size: int = 16,
) -> Tensor:
    r"""Instrument: the rise of the loss under the worst perturbation found, (m-)sharpness.

    .. math::
        \frac1n\sum_B |B|\,\max_{\|T^{-1}\epsilon\|_p\le\rho}\big[L_B(w+\epsilon)-L_B(w)\big]

    With ``steps=1`` the perturbation is SAM's :math:`\hat\epsilon`
    (:func:`~flatmin.dual_norm_perturbation`).  More steps continue from there by projected gradient
    ascent, each as long as :math:`\rho`, and the highest loss on the way counts.  The result is a
    lower bound of the maximum; where the gradient is 0 the ascent does not start, and it is 0.

    Parameters
    ----------
    rho : float
        The radius :math:`\rho\ge0`.
    p : float
        The norm, in [1, ∞].
    adaptive : bool
        ``True``: :math:`T=|w|+\eta`.  ``False``: :math:`T=1`.
    eta : float
        :math:`\eta\ge0` of the adaptive form; at 0 it is invariant to rescaling of layers.
    steps : int
        Number of steps.
    m : int, optional
        Examples per shard, taken in order; the last shard may have fewer.  Default: all.
    criterion : callable
        From output and targets to losses [n], or their mean.
    batch_size, chunk_size : int
        How many examples of a shard, and how many shards, are computed at once.  Each shard
        needs its own copy of the weights.  The result depends on both only by rounding.

    Returns
    -------
    Tensor
        One number, in the unit of the loss.  In single precision a rise below 1e-6 of the loss is
        rounding.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021 (m-sharpness); Kwon et al., *ASAM*, ICML 2021 (adaptive); Andriushchenko et al., *A Modern
    Look at the Relationship between Sharpness and Generalization*, ICML 2023.

    Examples
    --------
    Of :math:`L=\frac12(1-w)^2` at w=0 it is :math:`\rho+\frac12\rho^2`.  Two examples that pull in
    opposite directions are together at a minimum, flatter than each alone:

    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> how = dict(rho=0.2, criterion=lambda output, y: (output[:, 0] - y) ** 2 / 2)
    >>> on(model, sharpness, torch.ones(3, 1), torch.ones(3), **how)
    tensor(0.2200)
    >>> x, y = torch.ones(2, 1), torch.tensor([1.0, -1.0])
    >>> on(model, sharpness, x, y, steps=3, **how), on(model, sharpness, x, y, m=1, **how)
    (tensor(0.), tensor(0.2200))
    """
    check_ball(rho, p, eta)
    whole("steps", steps)
    n = len(x)
    m = n if m is None else min(whole("m", m), n)
    shapes, w = {name: v.shape for name, v in params.items()}, flatten(params)
    T = w.abs() + eta if adaptive else 1
    at = lambda u: unflatten(w + T * u, shapes)

    def of_shard(rows: Tensor) -> Tensor:
        mean = MeanLoss(network, criterion, x[rows], y[rows], batch_size)

        def slope(u: Tensor) -> Any:
            # one batch after another: the graph of each is freed before the next
            climb = grad_and_value(lambda u, *batch: mean.of(at(u), *batch))
            gradients, values = zip(*(climb(u, *batch) for batch in mean.batches))
            return sum(gradients), sum(values)

        return _rise(lambda u: mean(at(u)), slope, torch.zeros_like(w), rho, p, steps)

    rows = torch.arange(n, device=x.device)
    even = n // m * m
    mean = map_rows(of_shard, rows[:even].view(-1, m), chunk_size).sum() * (m / n)
    return mean + of_shard(rows[even:]) * ((n - even) / n) if even < n else mean


def _rise(
    loss: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], tuple[Tensor, Tensor]],
    zero: Tensor,
    rho: float,
    p: float,
    steps: int,
) -> Tensor:
    """max L(w + Tu) - L(w) over the ball of u; ``slope(u)`` is the gradient and the loss."""
    steepest = lambda g: dual_norm_perturbation(g, rho, p)
    g, start = slope(zero)
    u = steepest(g)
    if steps == 1:
        return loss(u) - start
    highest = start
    for _ in range(steps - 1):
        g, here = slope(u)
        highest = torch.maximum(highest, here)
        u = _project(u + steepest(g), rho, p)  # steps shorter than the radius end lower
    return torch.maximum(highest, loss(u)) - start


def _project(u: Tensor, rho: float, p: float) -> Tensor:
    """The closest point of the ball for p of 2 and ∞; for others its point on the way to 0."""
    if p == math.inf:
        return u.clamp(-rho, rho)
    length = torch.linalg.vector_norm(u, p)
    return u * (rho / length.clamp_min(torch.finfo(u.dtype).tiny)).clamp_max(1)
