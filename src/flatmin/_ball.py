r"""The ball :math:`\|\epsilon\|_p\le\rho`, and where a linear function on it is largest."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import hyperparameter

Norm = Callable[[Tensor, float | Tensor], Tensor]  # ‖v‖_p as a function of v and p


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

    Raises
    ------
    TypeError
        If ``g`` is not floating point.

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
    if not g.is_floating_point():
        raise TypeError(f"g must be floating point, got {g.dtype}")
    single = g.to(torch.promote_types(g.dtype, torch.float32))
    v, step = direction(over_largest(single, p), rho, p)
    return (step * v).to(g.dtype)


def project(u: Tensor, rho: float | Tensor, p: float) -> Tensor:
    """The closest point of the ball for p of 2 and ∞; for others its point on the way to 0."""
    if p == math.inf:
        return u.clamp(-rho, rho)  # type: ignore[arg-type]  # two floats or two tensors
    return u * (rho / norm(u, p).clamp_min(torch.finfo(u.dtype).tiny)).clamp_max(1)


def over_largest(g: Tensor, p: float | Tensor, norm: Norm = norm) -> Tensor:
    """g / max|g|: the scale cancels in ε̂, and all powers stay in range.  NaN if g is not finite."""
    largest = norm(g, math.inf).detach()
    u = g / (torch.where(largest > 0, largest, 1) + 0 * largest)
    constant = not isinstance(p, Tensor) and p in (1, math.inf)
    return u.detach() if constant else u  # the direction is constant almost everywhere


def direction(
    u: Tensor, rho: float | Tensor, p: float | Tensor, norm: Norm = norm
) -> tuple[Tensor, Tensor]:
    """The kernel: v = sign(u) |u|^(q-1) and ρ / ‖v‖_p, whose product is ε̂.

    ``u`` may be a part of a longer vector, of which ``norm`` knows the rest.
    """
    if not isinstance(p, Tensor) and p == 2:
        v = u
    else:
        q_minus_1 = math.inf if not isinstance(p, Tensor) and p == 1 else 1 / (p - 1)
        v = u.sign() * u.abs() ** q_minus_1 + 0 * u  # the sign of NaN is 0
    return v, rho / norm(v, p).clamp_min(1e-30)  # a zero gradient gives no perturbation
