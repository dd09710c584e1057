r"""Sharpness: how much the loss rises nearby.

.. math::
    S_m(w) = \frac1n\sum_{B}|B|\,\max_{\|T^{-1}\epsilon\|_p\le\rho}
    \big[L_B(w+\epsilon) - L_B(w)\big]

over shards B of m examples: like m-SAM, it takes the worst-case perturbation of each shard, not of
all examples at once.  With m=n it is the sharpness of the whole set.  T=1, or
:math:`T=|w|+\eta` in the adaptive form, whose value does not change when one layer is multiplied
by a number and the next divided by it.
"""

import torch
from torch import Tensor
from torch.func import grad_and_value

from .._ball import check_ball, dual_norm_perturbation, project
from .._checks import whole
from .._contracts import Loss, Network
from .._functional import MeanLoss, map_rows
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
    ascent, each as long as :math:`\rho`.  The highest loss on the way counts, that at w included:
    the result is a lower bound of the maximum, and never negative.  Where the gradient is 0 the
    ascent does not start, and it is 0.

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
        From output and targets to one loss per example, [n].
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

    def rise(rows: Tensor) -> Tensor:
        """The highest loss of one shard on the way, minus that at the start."""
        mean = MeanLoss(network, criterion, x[rows], y[rows], batch_size)
        loss = lambda u, *batch: mean.of(unflatten(w + T * u, shapes), *batch)
        u, values = torch.zeros_like(w), []
        for _ in range(steps):
            gradients, here = zip(*(grad_and_value(loss)(u, *batch) for batch in mean.batches))
            values.append(sum(here))
            # steps shorter than the radius end lower
            u = project(u + dual_norm_perturbation(sum(gradients), rho, p), rho, p)
        values.append(sum(loss(u, *batch) for batch in mean.batches))
        return torch.stack(values).amax(0) - values[0]

    rows = torch.arange(n, device=x.device)
    even = n // m * m
    mean = map_rows(rise, rows[:even].view(-1, m), chunk_size).sum() * (m / n)
    return mean + rise(rows[even:]) * ((n - even) / n) if even < n else mean
