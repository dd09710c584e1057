r"""The ball :math:`\|\epsilon\|_p\le\rho`, and where a linear function on it is largest."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import hyperparameter

Norm = Callable[[Tensor, float | Tensor], Tensor]  # ‖v‖_p as a function of v and p

ROW = 2**14  # so many numbers a norm adds one after the other


def check_ball(rho: float | Tensor, p: float | Tensor, eta: float | Tensor = 0.0) -> None:
    r"""Raise an error if the radius, the norm or :math:`\eta` is out of range."""
    hyperparameter("rho", rho, 0)
    hyperparameter("eta", eta, 0)
    hyperparameter("p", p, 1, infinite=True)
    for name, value in {"rho": rho, "p": p, "eta": eta}.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")


def norm(v: Tensor, p: float | Tensor) -> Tensor:
    """‖v‖_p of all entries; a stack may give a tensor p, one per run."""
    if isinstance(p, Tensor):
        return v.abs().pow(p).sum() ** (1 / p)
    if not v.numel():
        return v.new_zeros(())
    if p == math.inf:
        low, high = torch.aminmax(v)  # many times faster on a CPU than vector_norm
        return torch.maximum(-low, high)
    if v.numel() <= ROW:
        return torch.linalg.vector_norm(v, p)
    # On a CPU long sums in float32 lose their small terms: hence the norm of the norms of rows.
    v = v.flatten()
    rows, rest = v[: len(v) // ROW * ROW].view(-1, ROW), v[len(v) // ROW * ROW :]
    of_rows = torch.linalg.vector_norm(rows, p, dim=1)
    return norm(torch.cat([of_rows, norm(rest, p)[None]]), p)


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
        If ``g`` is not a tensor of floating point numbers.

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
    if not isinstance(g, Tensor):
        raise TypeError(f"g must be a tensor, got {type(g).__name__}")
    if not g.is_floating_point():
        raise TypeError(f"g must be floating point, got {g.dtype}")
    if g.layout is not torch.strided:
        raise TypeError(f"g must be dense, got the layout {g.layout}; g.to_dense() makes one")
    v, step = direction(g.to(torch.promote_types(g.dtype, torch.float32)), rho, p)
    return (step * v).to(g.dtype)


def project(u: Tensor, rho: float | Tensor, p: float) -> Tensor:
    """The closest point of the ball for p of 2 and ∞; for others its point on the way to 0."""
    if p == math.inf:
        return u.clamp(-rho, rho)  # type: ignore[arg-type]  # two floats or two tensors
    v, largest = over_largest(u, lambda u, _: u.abs().amax())  # fast under vmap
    return u * (rho / largest / norm(v, p).clamp_min(1)).clamp_max(1)  # u itself if it is 0


def over_largest(v: Tensor, norm: Norm = norm) -> tuple[Tensor, Tensor]:
    """v / max|v|, whose powers cannot overflow, and max|v|; 0 stays 0, with 1 for its maximum."""
    largest = norm(v, math.inf).detach()
    largest = torch.where(largest > 0, largest, 1)
    return v / largest, largest


def length(v: Tensor, norm: Norm = norm) -> Tensor:
    """‖v‖_2, also where squares would leave the range of the type."""
    u, largest = over_largest(v, norm)
    return largest * norm(u, 2)


def direction(
    g: Tensor, rho: float | Tensor, p: float | Tensor, norm: Norm = norm
) -> tuple[Tensor, Tensor]:
    r"""The kernel: v ∝ sign(g) |g|^(q-1) and ρ / ‖v‖_p, whose product is ε̂.

    The factor that v lacks cancels: its largest entry is 1.  ``g`` may be a part of a longer
    vector, of which ``norm`` knows the rest.  The number is NaN if an entry is not finite.
    """
    if not isinstance(p, Tensor) and p == 2:
        v = over_largest(g, norm)[0]
    else:
        if not isinstance(p, Tensor) and p in (1, math.inf):
            g = g.detach()  # the direction is constant almost everywhere
        # Exponents below 1 keep small entries in range, and come before the division; those
        # above 1 come after it.
        first, second = _split(p)
        v = g.sign() * over_largest(g.abs() ** first, norm)[0] ** second
    rho = rho + 0 * norm(g, math.inf).detach()  # for p = inf powers would hide a NaN
    return v, rho / norm(v, p).clamp_min(1e-30)  # a zero gradient gives no perturbation


def _split(p: float | Tensor) -> tuple[Any, Any]:
    """q - 1 = 1 / (p - 1) as a product of two exponents, at most 1 and at least 1."""
    if isinstance(p, Tensor):
        return (1 / (p - 1)).clamp(max=1), (1 / (p - 1)).clamp(min=1)
    q_minus_1 = math.inf if p == 1 else 1 / (p - 1)
    return min(q_minus_1, 1.0), max(q_minus_1, 1.0)
