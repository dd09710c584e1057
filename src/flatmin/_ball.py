r"""The ball :math:`\|T^{-1}\epsilon\|_p\le\rho` around a point, and where a linear function is largest in it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import hyperparameter

Each = Callable[..., list[Tensor]]  # an operation on each of several tensors


def check_ball(rho: float | Tensor, p: float | Tensor, eta: float | Tensor = 0.0) -> None:
    r"""Errors for a radius, a norm or an :math:`\eta` out of range."""
    hyperparameter("rho", rho, 0)
    hyperparameter("eta", eta, 0)
    hyperparameter("p", p, 1, infinite=True)


def dual_norm_perturbation(
    gradients: Sequence[Tensor],
    rho: float | Tensor,
    p: float | Tensor = 2.0,
    scales: Sequence[Tensor | float] | None = None,
) -> list[Tensor]:
    r"""The step of length :math:`\rho` that climbs a linear function the most.

    .. math::
        \hat\epsilon = \arg\max_{\|\epsilon\|_p\le\rho}\langle g,\epsilon\rangle
        = \rho\,\frac{\operatorname{sign}(g)\,|g|^{q-1}}{\big(\|g\|_q^q\big)^{1/p}},
        \qquad \tfrac1p+\tfrac1q=1

    By Hölder's inequality, with equality: :math:`\|\hat\epsilon\|_p=\rho` and
    :math:`\langle g,\hat\epsilon\rangle=\rho\|g\|_q`.  For p=2 it is :math:`\rho g/\|g\|_2`, for
    p=∞ :math:`\rho\operatorname{sign}(g)`, and for p=1 all of :math:`\rho` on the largest
    coordinate; coordinates that are equally large share it equally.

    Parameters
    ----------
    gradients : sequence of Tensor
        Taken together as one vector :math:`g`; any shapes.
    rho : float or Tensor
        The radius :math:`\rho\ge0`, in the unit of the weights.
    p : float or Tensor
        Which norm, in [1, ∞]; ``math.inf`` is allowed.
    scales : sequence of Tensor or float, optional
        One :math:`T>0` a gradient, broadcast with it: the ball is then
        :math:`\|T^{-1}\epsilon\|_p\le\rho`, and
        :math:`\hat\epsilon=T\,\hat\epsilon_{\text{plain}}(Tg)`.  Adaptive SAM takes
        :math:`T=|w|+\eta`.

    Returns
    -------
    list of Tensor
        :math:`\hat\epsilon`, in the shapes and types of ``gradients``; zero where all of :math:`g`
        is zero, NaN where any of it is not finite.

    Notes
    -----
    Everything is divided by :math:`\max|g|` first.  It cancels, but :math:`|g|^{q-1}` alone leaves
    the range of float32 at p=1.1 and :math:`|g|\approx10^{-6}`.  Half precision is computed in
    float32.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021, eq. 2; Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization*, ICML 2021.

    Examples
    --------
    >>> g = [torch.tensor([3.0]), torch.tensor([-4.0])]
    >>> dual_norm_perturbation(g, rho=0.5)
    [tensor([0.3000]), tensor([-0.4000])]
    >>> dual_norm_perturbation(g, rho=0.5, p=1), dual_norm_perturbation(g, rho=0.5, p=math.inf)
    ([tensor([0.]), tensor([-0.5000])], [tensor([0.5000]), tensor([-0.5000])])
    """
    check_ball(rho, p)
    return perturbation(list(gradients), rho, p, scales)


def perturbation(
    gradients: Sequence[Tensor],
    rho: float | Tensor,
    p: float | Tensor,
    scales: Sequence[float | Tensor] | None = None,
    total: Callable[..., Tensor] | None = None,
    foreach: bool = False,
) -> list[Tensor]:
    """The kernel; ``total`` reduces one number per tensor to a single one, across shards if there are any."""
    each, total = on_each_at_once if foreach else on_each, total or total_of
    single = lambda g: g.to(torch.promote_types(g.dtype, torch.float32))
    u, largest = _over_largest([single(g) for g in gradients], each, total)
    if scales is not None:
        u, _ = _over_largest(each("mul", u, scales), each, total)
    if not isinstance(p, Tensor) and p in (1, math.inf):
        u = [x.detach() for x in u]  # what follows is constant almost everywhere
    v = u
    if isinstance(p, Tensor) or p != 2:
        q_minus_1 = math.inf if not isinstance(p, Tensor) and p == 1 else 1 / (p - 1)
        v = each("mul", each("sign", u), each("pow", each("abs", u), q_minus_1))
    length = total(_norms(v, p, each), "sum", p) ** (1 / p)
    length = length.clamp_min(1)  # it is 0, or at least max|v| = 1
    v = each("mul", v, rho / (length + 0 * largest))  # an infinity is NaN everywhere
    if scales is not None:
        v = each("mul", v, scales)
    return [e.to(g.dtype) for e, g in zip(v, gradients, strict=True)]


def _over_largest(
    vectors: list[Tensor], each: Each, total: Callable[..., Tensor]
) -> tuple[list[Tensor], Tensor]:
    largest = total(_norms(vectors, math.inf, each), "amax").detach()
    return each("div", vectors, torch.where(largest > 0, largest, 1)), largest


def _norms(vectors: list[Tensor], p: float | Tensor, each: Each) -> list[Tensor]:
    """One norm a tensor; an empty one has none."""
    if isinstance(p, Tensor):
        return [v.abs().pow(p).sum().pow(1 / p) for v in vectors]
    full = iter(each("norm", [v for v in vectors if v.numel()], p))
    return [next(full) if v.numel() else v.new_zeros(()) for v in vectors]


def total_of(parts: list[Tensor], op: str, power: float | Tensor = 1) -> Tensor:
    home = parts[0].device
    each = torch.stack([x if x.device == home else x.to(home) for x in parts])
    return getattr(each if isinstance(power, int) and power == 1 else each**power, op)()


def on_each(op: str, tensors: list[Tensor], other: Any = None) -> list[Tensor]:
    if op == "norm":
        return [torch.linalg.vector_norm(x, other) for x in tensors]
    if other is None:
        return [getattr(torch, op)(x) for x in tensors]
    if isinstance(other, (list, tuple)):
        return [getattr(torch, op)(x, y) for x, y in zip(tensors, other, strict=True)]
    on = lambda x: other.to(x.device) if isinstance(other, Tensor) else other
    return [getattr(torch, op)(x, on(x)) for x in tensors]


def on_each_at_once(op: str, tensors: list[Tensor], *other: Any) -> list[Tensor]:
    """The same, in a few launches for all tensors of one device."""
    return list(getattr(torch, f"_foreach_{op}")(tensors, *other)) if tensors else []
