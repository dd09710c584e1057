r"""The ball :math:`\|\epsilon\|_p\le\rho`, and where a linear function on it is largest."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import hyperparameter


def check_ball(rho: float | Tensor, p: float | Tensor, eta: float | Tensor = 0.0) -> None:
    r"""Raise an error if the radius, the norm or :math:`\eta` is out of range."""
    hyperparameter("rho", rho, 0)
    hyperparameter("eta", eta, 0)
    hyperparameter("p", p, 1, infinite=True)


def norm(v: Tensor, p: float | Tensor) -> Tensor:
    """‖v‖_p of all entries; a stack may give a tensor p, one per run."""
    if isinstance(p, Tensor):
        return v.abs().pow(p).sum() ** (1 / p)
    if not v.numel():
        return v.new_zeros(())
    if p == math.inf:
        low, high = torch.aminmax(v)  # many times faster on a CPU than vector_norm
        return torch.maximum(-low, high)
    return torch.linalg.vector_norm(v, p)


def dual_norm_perturbation(g: Tensor, rho: float | Tensor, p: float | Tensor = 2.0) -> Tensor:
    r"""The step of length :math:`\rho` along which a linear function increases the most.

    .. math::
        \hat\epsilon = \arg\max_{\|\epsilon\|_p\le\rho}\langle g,\epsilon\rangle
        = \rho\,\frac{\operatorname{sign}(g)\,|g|^{q-1}}{\big\||g|^{q-1}\big\|_p},
        \qquad \tfrac1p+\tfrac1q=1

    It attains Hölder's bound: :math:`\|\hat\epsilon\|_p=\rho` and
    :math:`\langle g,\hat\epsilon\rangle=\rho\|g\|_q`.  For p=2 it is :math:`\rho g/\|g\|_2`, for
    p=∞ :math:`\rho\operatorname{sign}(g)`, and for p=1 all of :math:`\rho` is on the largest
    coordinate, or shared evenly by those that are equally large.

    Parameters
    ----------
    g : Tensor
        Any shape; all its entries are one vector.
    rho : float or Tensor
        The radius :math:`\rho\ge0`, in the unit of the weights.
    p : float or Tensor
        The norm, in [1, ∞]; ``math.inf`` is allowed.

    Returns
    -------
    Tensor
        :math:`\hat\epsilon`, in the shape and type of ``g``; zero if ``g`` is zero, all NaN if any
        of it is not finite.  Half precision is computed in float32.

    Notes
    -----
    In the ball :math:`\|T^{-1}\epsilon\|_p\le\rho` with :math:`T>0` for each coordinate, the
    step is :math:`T\,\hat\epsilon(Tg)`; adaptive SAM takes :math:`T=|w|+\eta`.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021, eq. 2; Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization*, ICML 2021.

    Examples
    --------
    >>> g = torch.tensor([3.0, -4.0])
    >>> dual_norm_perturbation(g, rho=0.5)
    tensor([ 0.3000, -0.4000])
    >>> dual_norm_perturbation(g, rho=0.5, p=1), dual_norm_perturbation(g, rho=0.5, p=math.inf)
    (tensor([ 0.0000, -0.5000]), tensor([ 0.5000, -0.5000]))
    """
    check_ball(rho, p)
    v, step = direction(g.to(torch.promote_types(g.dtype, torch.float32)), rho, p)
    return (step * v).to(g.dtype)


def direction(
    g: Tensor,
    rho: float | Tensor,
    p: float | Tensor,
    norm: Callable[[Tensor, float | Tensor], Tensor] = norm,
) -> tuple[Tensor, Tensor]:
    """The kernel: v and the number ρ/‖v‖_p, whose product is ε̂; NaN if g is not finite.

    ``g`` may be a part of a longer vector, of which ``norm`` knows the rest.
    """
    largest = norm(g, math.inf).detach()
    u = g / torch.where(largest > 0, largest, 1)  # the scale cancels, and powers stay in range
    if not isinstance(p, Tensor) and p in (1, math.inf):
        u = u.detach()  # the direction is constant almost everywhere
    if not isinstance(p, Tensor) and p == 2:
        v = u
    else:
        q_minus_1 = math.inf if not isinstance(p, Tensor) and p == 1 else 1 / (p - 1)
        v = u.sign() * u.abs() ** q_minus_1
    length = norm(v, p).clamp_min(1)  # it is 0, or at least max|v| = 1
    return v, rho / (length + 0 * largest)
