r"""The ball :math:`\|T^{-1}\epsilon\|_p\le\rho`, and where a linear function on it is largest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import hyperparameter

Apply = Callable[..., list[Tensor]]  # apply(op, tensors, ...): an operation on each tensor


def check_ball(rho: float | Tensor, p: float | Tensor, eta: float | Tensor = 0.0) -> None:
    r"""Raise an error if the radius, the norm or :math:`\eta` is out of range."""
    hyperparameter("rho", rho, 0)
    hyperparameter("eta", eta, 0)
    hyperparameter("p", p, 1, infinite=True)


def dual_norm_perturbation(
    gradients: Sequence[Tensor],
    rho: float | Tensor,
    p: float | Tensor = 2.0,
    scales: Sequence[Tensor | float] | None = None,
) -> list[Tensor]:
    r"""The step of length :math:`\rho` along which a linear function increases the most.

    .. math::
        \hat\epsilon = \arg\max_{\|\epsilon\|_p\le\rho}\langle g,\epsilon\rangle
        = \rho\,\frac{\operatorname{sign}(g)\,|g|^{q-1}}{\big(\|g\|_q^q\big)^{1/p}},
        \qquad \tfrac1p+\tfrac1q=1

    It attains Hölder's bound: :math:`\|\hat\epsilon\|_p=\rho` and
    :math:`\langle g,\hat\epsilon\rangle=\rho\|g\|_q`.  For p=2 it is :math:`\rho g/\|g\|_2`, for
    p=∞ :math:`\rho\operatorname{sign}(g)`, and for p=1 all of :math:`\rho` is on the largest
    coordinate, or shared evenly by those that are equally large.

    Parameters
    ----------
    gradients : sequence of Tensor
        Taken together as one vector :math:`g`; any shapes.
    rho : float or Tensor
        The radius :math:`\rho\ge0`, in the unit of the weights.
    p : float or Tensor
        The norm, in [1, ∞]; ``math.inf`` is allowed.
    scales : sequence of Tensor or float, optional
        One :math:`T>0` per gradient, broadcast with it: the ball is then
        :math:`\|T^{-1}\epsilon\|_p\le\rho`, and
        :math:`\hat\epsilon=T\,\hat\epsilon_{\text{plain}}(Tg)`.  Adaptive SAM takes
        :math:`T=|w|+\eta`.

    Returns
    -------
    list of Tensor
        :math:`\hat\epsilon`, in the shapes and types of ``gradients``; zero if all of :math:`g` is
        zero, NaN if any of it is not finite.

    Notes
    -----
    First :math:`g` is divided by :math:`\max|g|`.  This cancels, but without it :math:`|g|^{q-1}`
    leaves the range of float32 at p=1.1 and :math:`|g|\approx10^{-6}`.  Half precision is computed
    in float32.

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
    """The kernel; ``total`` reduces one number per tensor to a single one, across any shards."""
    apply, total = apply_fused if foreach else apply_to_each, total or total_over_tensors
    single = lambda g: g.to(torch.promote_types(g.dtype, torch.float32))
    u, largest = _divided_by_largest([single(g) for g in gradients], apply, total)
    if scales is not None:
        u, _ = _divided_by_largest(apply("mul", u, scales), apply, total)
    if not isinstance(p, Tensor) and p in (1, math.inf):
        u = [x.detach() for x in u]  # what follows is constant almost everywhere
    v = u
    if isinstance(p, Tensor) or p != 2:
        q_minus_1 = math.inf if not isinstance(p, Tensor) and p == 1 else 1 / (p - 1)
        v = apply("mul", apply("sign", u), apply("pow", apply("abs", u), q_minus_1))
    length = total(_norms(v, p, apply), "sum", p) ** (1 / p)
    length = length.clamp_min(1)  # it is 0, or at least max|v| = 1
    v = apply("mul", v, rho / (length + 0 * largest))  # an infinity makes all of it NaN
    if scales is not None:
        v = apply("mul", v, scales)
    return [e.to(g.dtype) for e, g in zip(v, gradients, strict=True)]


def _divided_by_largest(
    vectors: list[Tensor], apply: Apply, total: Callable[..., Tensor]
) -> tuple[list[Tensor], Tensor]:
    largest = total(_norms(vectors, math.inf, apply), "amax").detach()
    return apply("div", vectors, torch.where(largest > 0, largest, 1)), largest


def _norms(vectors: list[Tensor], p: float | Tensor, apply: Apply) -> list[Tensor]:
    """The norm of each tensor; 0 for an empty one."""
    if isinstance(p, Tensor):
        return [v.abs().pow(p).sum().pow(1 / p) for v in vectors]
    norms = iter(apply("norm", [v for v in vectors if v.numel()], p))
    return [next(norms) if v.numel() else v.new_zeros(()) for v in vectors]


def total_over_tensors(parts: list[Tensor], op: str, power: float | Tensor = 1) -> Tensor:
    """One number per tensor, reduced to one: the ``op`` (sum, amax) of their powers."""
    home = parts[0].device
    numbers = torch.stack([x if x.device == home else x.to(home) for x in parts])
    return getattr(numbers if isinstance(power, int) and power == 1 else numbers**power, op)()


def apply_to_each(op: str, tensors: list[Tensor], other: Any = None) -> list[Tensor]:
    """``torch.<op>`` of each tensor, with its own ``other`` or one for all."""
    if op == "norm":
        return [torch.linalg.vector_norm(x, other) for x in tensors]
    if other is None:
        return [getattr(torch, op)(x) for x in tensors]
    if isinstance(other, (list, tuple)):
        return [getattr(torch, op)(x, y) for x, y in zip(tensors, other, strict=True)]
    placed = lambda x: other.to(x.device) if isinstance(other, Tensor) else other
    return [getattr(torch, op)(x, placed(x)) for x in tensors]


def apply_fused(op: str, tensors: list[Tensor], *other: Any) -> list[Tensor]:
    """As :func:`apply_to_each`, with few kernel launches; all tensors on one device."""
    return list(getattr(torch, f"_foreach_{op}")(tensors, *other)) if tensors else []
