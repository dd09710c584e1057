r"""The Hessian's spectrum: how curved the loss is, and in how many directions.

.. math:: H = \nabla^2 L(w), \qquad Hv = \nabla\big(\nabla L(w)\cdot v\big)

A network's Hessian is too large to be written down, but its product with a vector costs only a few
gradients (:func:`hvp`, :func:`hessian_operator`).  :func:`lanczos` turns k products into a
k×k matrix that has the outer eigenvalues of H, with error bounds (:func:`eigenvalues`), and, from
random vectors, its density (:func:`spectral_density`).  :func:`trace` needs only products.

The instruments :class:`HessianEigenvalues`, :class:`HessianTrace` and :class:`HessianDensity` do
the same, with the same kernels, for a whole stack of networks at once.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vjp

from .._checks import number, whole
from .._functional import Loss, MeanLoss, Network, as_function, inspecting, plain_attention
from .._random import numpy_stream
from .._targets import example_losses
from .._tree import Params, flatten, unflatten

__all__ = [
    "Density",
    "Eigenvalues",
    "HessianDensity",
    "HessianEigenvalues",
    "HessianOperator",
    "HessianTrace",
    "Lanczos",
    "Trace",
    "eigenvalues",
    "hessian_operator",
    "hvp",
    "lanczos",
    "spectral_density",
    "trace",
]

Product = Callable[[Tensor], Tensor]
Point = TypeVar("Point", Tensor, Params)
MODES = ("reverse", "forward")


# ------------------------------------------------------------------------- Hessian-vector products


def hvp(f: Callable[[Point], Tensor], params: Point, v: Point, mode: str = "reverse") -> Point:
    r"""The product of a function's Hessian with a vector, for ``torch.func``.

    .. math:: Hv = \partial_\theta\,(\nabla f(\theta)\cdot v) = \partial_t\,\nabla f(\theta+tv)

    Parameters
    ----------
    f : callable
        ``f(params) -> scalar``.
    params, v : Tensor or dict of Tensor
        The point and the vector, of the same structure.
    mode : {"reverse", "forward"}
        The first form, by two backward passes, or the second, by a forward derivative of the
        backward pass (which not every operation of PyTorch supports).

    Returns
    -------
    Tensor or dict of Tensor
        Like ``params``.

    References
    ----------
    Pearlmutter, *Fast Exact Multiplication by the Hessian*, Neural Computation 6 (1994).

    Examples
    --------
    >>> f = lambda w: w[0] ** 2 * w[1]                           # H = [[2 w1, 2 w0], [2 w0, 0]]
    >>> hvp(f, torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0]))
    tensor([10.,  6.])
    """
    _check_mode(mode)
    return (_forward if mode == "forward" else _reverse)(f, params)(v)


def _reverse(f: Callable[[Point], Tensor], params: Point) -> Callable[[Point], Point]:
    """v ↦ Hv: the gradient is taken once, and each product is one more backward pass through it."""
    back = vjp(grad(f), params)[1]
    return lambda v: back(v)[0]


def _forward(f: Callable[[Point], Tensor], params: Point) -> Callable[[Point], Point]:
    return lambda v: jvp(grad(f), (params,), (v,))[1]


def _plain_reverse(
    f: Callable[[Tensor], Tensor], w: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """:func:`_reverse` by plain autograd, for models that ``torch.func`` refuses; and ∇f."""
    w = w.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(w), w, create_graph=True)
    if not g.requires_grad:  # f is linear
        return torch.zeros_like, g
    return lambda v: torch.autograd.grad(g, w, v, retain_graph=True)[0], g.detach()


@dataclass(frozen=True)
class HessianOperator:
    """A symmetric matrix, given by its products with vectors: ``operator(v)`` is Hv.

    Attributes
    ----------
    products : callable
        From vectors [k, P] to their products [k, P].
    size : int
        P.
    dtype, device
        Of the vectors.
    shapes : dict
        ``{name: shape}`` of the parameters, in the order in which a vector holds them.
    gradient : Tensor [P], optional
        The loss's gradient at the same point, if the operator computes it anyway.
    """

    products: Product
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    shapes: Mapping[str, torch.Size] | None = None
    gradient: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Hv for one vector [P] or several, [..., P]."""
        if v.shape[-1:] != (self.size,):
            raise ValueError(f"v must have shape [..., {self.size}], got {tuple(v.shape)}")
        return self.products(v.reshape(-1, self.size)).reshape(v.shape)

    def unflatten(self, v: Tensor) -> Params:
        """A vector [P] as a dict like the parameters, for example to move along an eigenvector."""
        if self.shapes is None:
            raise ValueError("shapes must be given for a vector to become a dict, got None")
        return unflatten(v, self.shapes)


def hessian_operator(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 1000,
    mode: str = "reverse",
    dtype: torch.dtype | None = None,
) -> HessianOperator:
    r"""The Hessian of a module's mean loss over a data set, as an operator.

    .. math:: Hv = \sum_B \frac{|B|}{n}\,\nabla^2 L_B(w)\,v

    exactly: each batch B counts by its size, also a smaller last one.  The module runs in
    evaluation mode; its mode, buffers and ``.grad`` are left as they were.

    Parameters
    ----------
    model : Module
        The Hessian is taken with respect to its parameters that require a gradient, at their
        current values.
    loss : callable
        ``loss(model(x), y)`` gives one number per example, or their mean.
    x, y : Tensor
        Examples [n, ...] and targets [n, ...], on the model's device.
    batch_size : int
        How many examples at once.  If that is all of them, the graph of the gradient is made once
        and kept, so that a product costs one backward pass through it.
    mode : {"reverse", "forward"}
        As in :func:`hvp`.  ``"reverse"`` is plain autograd: it works for every model that PyTorch
        can differentiate twice.  ``"forward"`` can be several times faster for convolutions on a
        GPU.
    dtype : torch.dtype, optional
        ``torch.float64`` computes with copies in double precision.  Default: the model's own, or
        single precision if that is half.

    Returns
    -------
    HessianOperator

    Notes
    -----
    At a kink (of a ReLU) PyTorch takes the derivative of one side.  Attention uses its plain
    kernel, the only one with second derivatives.

    Examples
    --------
    Linear regression, :math:`H=\frac1n X^\top X`:

    >>> model = nn.Linear(2, 1, bias=False)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.zeros(2)
    >>> H = hessian_operator(model, squared, x, y)
    >>> H(torch.eye(2))
    tensor([[0.5000, 1.0000],
            [1.0000, 4.0000]])
    """
    _check_mode(mode)
    if dtype is None:
        first = next(iter(model.parameters()), torch.zeros(()))
        dtype = torch.promote_types(first.dtype, torch.float32)
    with inspecting(model), torch.enable_grad():
        network, params, x, y = as_function(model, x, y, dtype)
        shapes, w = {name: p.shape for name, p in params.items()}, flatten(params)
        mean = MeanLoss(network, loss, x, y, batch_size)
        derive = (lambda f, w: (_forward(f, w), None)) if mode == "forward" else _plain_reverse
        of_batch = lambda x, y: derive(lambda w: mean.of(unflatten(w, shapes), x, y), w)
        one_graph = mode == "reverse" and len(mean.batches) == 1
        kept_product, gradient = of_batch(*mean.batches[0]) if one_graph else (None, None)

    def products(vs: Tensor) -> Tensor:
        if kept_product is not None:
            return torch.stack([kept_product(v) for v in vs])
        with inspecting(model), torch.enable_grad():
            total = torch.zeros_like(vs)
            for batch in mean.batches:
                product, _ = of_batch(*batch)
                total += torch.stack([product(v) for v in vs])
        return total

    return HessianOperator(products, len(w), w.dtype, w.device, shapes, gradient)


# ----------------------------------------------------------------------------------------- Lanczos


class Lanczos(NamedTuple):
    r"""The result of k steps of :func:`lanczos`: :math:`Q^\top HQ=T`, tridiagonal.

    Attributes
    ----------
    alpha : Tensor [..., k]
        T's diagonal.
    beta : Tensor [..., k]
        T's off-diagonal, and last the length of the remainder, :math:`\|HQ-QT\|`.
    basis : Tensor [..., k, P]
        Q: orthonormal rows.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""The Ritz values :math:`\theta_i`, and their accuracy.

        Returns
        -------
        values : Tensor [..., k]
            T's eigenvalues, ascending; all three in double precision.  NaN if T is not finite.
        vectors : Tensor [..., k, k]
            T's eigenvectors :math:`s_i`, its columns; :math:`y_i=Q^\top s_i` is the Ritz vector.
        residuals : Tensor [..., k]
            :math:`\|Hy_i-\theta_iy_i\|=\beta_k|s_{ki}|`: H has an eigenvalue within this
            distance.
        """
        alpha, beta = self.alpha.double(), self.beta.double()
        off = torch.diag_embed(beta[..., :-1], 1)
        T = torch.diag_embed(alpha) + off + off.mT
        finite = T.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, T, 0))  # eigh refuses NaN
        values = torch.where(finite.squeeze(-1), values, math.nan)
        return values, vectors, beta[..., -1:] * vectors[..., -1, :].abs()


def lanczos(
    matvec: Product, v0: Tensor, steps: int, stop: Callable[[Lanczos], bool] | None = None
) -> Lanczos:
    r"""Lanczos' algorithm, with full reorthogonalization.

    .. math:: \beta_j q_{j+1} = Hq_j - \alpha_j q_j - \beta_{j-1}q_{j-1}, \qquad
              \alpha_j = q_j\cdot Hq_j

    In floating point the :math:`q_j` do not stay orthogonal by themselves: directions already found
    return, and copies of an eigenvalue appear ("ghosts").  Here each new vector is made orthogonal
    to *all* before it.

    Parameters
    ----------
    matvec : callable
        From [..., P] to [..., P], the products with a symmetric matrix: a
        :class:`HessianOperator`, or ``lambda v: v @ matrix``.
    v0 : Tensor [..., P]
        The first vector; not 0.  Leading dimensions count independent runs; ``vmap`` works too.
    steps : int
        How many products, at most P.
    stop : callable, optional
        Called with the result after each step; true ends the iteration.

    Returns
    -------
    Lanczos

    Notes
    -----
    *Breakdown.*  Where the remainder is 0 up to rounding (most of it lies in the span of the
    vectors before), these span all that can be reached from ``v0``.  Then :math:`\beta_j=0`, and
    the iteration continues from another vector, orthogonal to all before: so a double eigenvalue is
    found twice.

    References
    ----------
    Golub & Van Loan, *Matrix Computations*, chapter on Lanczos methods; Parlett, *The Symmetric
    Eigenvalue Problem*, SIAM 1998.

    Examples
    --------
    >>> H = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> result = lanczos(lambda v: v @ H, torch.ones(3), steps=2)
    >>> result.alpha                               # 7/3 is the mean of the eigenvalues
    tensor([2.3333, 2.8095])
    >>> lanczos(lambda v: v @ H, torch.ones(3), steps=3).ritz()[0].float().round(decimals=4)
    tensor([1., 2., 4.])
    """
    size, tiny = v0.shape[-1], torch.finfo(v0.dtype).tiny
    steps = min(whole("steps", steps), size)
    length = lambda v: torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    spare = torch.from_numpy(np.random.default_rng(0).standard_normal(size)).to(v0)
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    largest = torch.zeros_like(v0[..., :1])
    q = v0 / length(v0)
    for j in range(steps):
        w = matvec(q)
        if j == 0:  # like w, which vmap may batch where v0 is not
            capacity = steps if stop is None else min(steps, 16)
            basis = w.new_zeros(*w.shape[:-1], capacity, size)
        elif j == basis.shape[-2]:
            basis = torch.cat([basis, torch.zeros_like(basis)], -2)
        basis[..., j, :] = q
        vectors = basis[..., : j + 1, :]
        alpha.append((w * q).sum(-1))
        largest = torch.maximum(largest, length(w))
        w = w - alpha[j][..., None] * q
        if j:
            w = w - beta[j - 1][..., None] * basis[..., j - 1, :]
        both = torch.stack([w, spare.roll(j).expand_as(w)], -2)
        remainder, replacement = _orthogonal(both, vectors).unbind(-2)
        rounding = torch.maximum(length(w) / 2, 10 * torch.finfo(w.dtype).eps * largest)
        breakdown = length(remainder) <= rounding
        beta.append(torch.where(breakdown, 0, length(remainder)).squeeze(-1))
        q = torch.where(breakdown, replacement, remainder)
        q = q / length(q).clamp_min(tiny)
        result = Lanczos(torch.stack(alpha, -1), torch.stack(beta, -1), vectors)
        if stop is not None and stop(result):
            break
    return result


def _orthogonal(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their parts in the span of orthonormal rows."""
    return rows - (rows @ basis.mT) @ basis


# ------------------------------------------------------------------------------------- eigenvalues


class Eigenvalues(NamedTuple):
    """The outer eigenvalues of a Hessian.

    Attributes
    ----------
    values : Tensor [k]
        The largest ones, and after them the smallest: descending, by sign and not by magnitude.
    errors : Tensor [k]
        There is an eigenvalue within this distance of the value.
    vectors : Tensor [k, P]
        Their Ritz vectors, of unit length.
    """

    values: Tensor
    errors: Tensor
    vectors: Tensor


def eigenvalues(
    hessian: HessianOperator | Tensor,
    top: int = 1,
    bottom: int = 0,
    *,
    tol: float = 1e-3,
    max_steps: int = 200,
    seed: int = 0,
) -> Eigenvalues:
    r"""The largest and the smallest eigenvalues, by :func:`lanczos`.

    It starts from a random vector, plus the gradient, in equal parts, where the operator has it:
    gradients of networks in training lie mostly in the space of the largest eigenvalues, which
    saves about one product in six.  The random part still reaches every direction.

    Parameters
    ----------
    hessian : HessianOperator, or Tensor [P, P]
    top, bottom : int
        How many from each end.
    tol : float
        It stops when each residual is at most ``tol`` times the largest :math:`|\theta|`.
    max_steps : int
        The most products; if they do not suffice, there is a warning.
    seed : int
        Seed of the first vector.

    Returns
    -------
    Eigenvalues

    Notes
    -----
    ``errors`` are residuals :math:`r=\|Hy-\theta y\|`, which bound the distance to an eigenvalue
    without any assumption (and are at least 10 roundings of the largest).  For a symmetric matrix
    the value is better than that: its error is at most :math:`r^2` over the distance to the next
    eigenvalue.  No method that uses only products can exclude that the first vector misses a
    direction.

    References
    ----------
    Gur-Ari, Roberts & Dyer, *Gradient Descent Happens in a Tiny Subspace*, 2018.

    Examples
    --------
    >>> H = torch.diag(torch.tensor([-3.0, 0.0, 1.0, 2.0]))
    >>> eigenvalues(H, top=2, bottom=1).values.round(decimals=3)
    tensor([ 2.,  1., -3.])
    """
    hessian = _operator(hessian)
    k = _check_counts(top, bottom, hessian.size)
    if whole("max_steps", max_steps) < k:
        raise ValueError(f"max_steps must be at least top + bottom = {k}, got {max_steps!r}")
    number("tol", tol, 0)

    def converged(result: Lanczos) -> bool:
        if not result.beta[-1].isfinite():
            raise ValueError("hessian must have finite products, got NaN or infinity")
        if len(result.alpha) < k:
            return False
        values, errors, _ = _outer_eigenvalues(result, top, bottom)
        return bool((errors <= tol * values.abs().max()).all())

    v0 = _vectors(1, hessian, seed, "eigenvalues", "normal")[0]
    if hessian.gradient is not None:
        v0 = F.normalize(v0, dim=0) + F.normalize(hessian.gradient, dim=0)
    result = lanczos(hessian, v0, max_steps, converged)
    values, errors, vectors = _outer_eigenvalues(result, top, bottom)
    if not converged(result):
        warnings.warn(
            f"after {max_steps} steps the errors of the eigenvalues are up to "
            f"{errors.max():.2g}: give more steps, or a tol above {tol:g}",
            stacklevel=2,
        )
    vectors = vectors.mT.to(result.basis.dtype) @ result.basis
    return Eigenvalues(values.to(hessian.dtype), errors.to(hessian.dtype), vectors)


def _outer_eigenvalues(result: Lanczos, top: int, bottom: int) -> tuple[Tensor, Tensor, Tensor]:
    """The outer Ritz values, descending; their errors; their vectors [..., steps, k]."""
    values, vectors, residuals = result.ritz()
    rounding = 10 * torch.finfo(result.alpha.dtype).eps * values.abs().amax(-1, keepdim=True)
    indices = [*range(-1, -1 - top, -1), *range(bottom - 1, -1, -1)]
    errors = torch.maximum(residuals, rounding)
    return values[..., indices], errors[..., indices], vectors[..., indices]


# ------------------------------------------------------------------------------------------- trace


class Trace(NamedTuple):
    """An estimate of a Hessian's trace.

    Attributes
    ----------
    value, standard_error : float
    probes : int
        How many random vectors the standard error is computed from.
    """

    value: float
    standard_error: float
    probes: int


def trace(
    hessian: HessianOperator | Tensor,
    *,
    tol: float = 0.05,
    sketch: int = 10,
    max_probes: int = 200,
    seed: int = 0,
) -> Trace:
    r"""The trace, by random vectors: Hutch++.

    .. math:: \operatorname{tr}H = \operatorname{tr}(Q^\top HQ)
              + \mathbb E\,u\cdot Hu, \qquad u=(1-QQ^\top)z, \quad z_i=\pm1

    The columns of Q span H times a few random vectors, so they hold most of the large eigenvalues,
    which are counted exactly; random signs z estimate only the small rest (Hutchinson's estimator).
    It is unbiased.

    Parameters
    ----------
    hessian : HessianOperator, or Tensor [P, P]
    tol : float
        It stops, after at least 16 probes, when half the width of the 95 % confidence interval is
        at most ``tol`` times the estimate.
    sketch : int
        How many columns Q has; 0 is Hutchinson's estimator.  They cost two products each.
    max_probes : int
        The most probes; if they do not suffice, there is a warning.
    seed : int
        Seed of all random vectors.

    Returns
    -------
    Trace

    References
    ----------
    Hutchinson, *A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing
    Splines*, 1989; Meyer, Musco, Musco & Woodruff, *Hutch++: Optimal Stochastic Trace Estimation*,
    SOSA 2021.

    Examples
    --------
    For a diagonal matrix every z gives the exact trace:

    >>> trace(torch.diag(torch.tensor([1.0, 2.0, 4.0])), sketch=0)
    Trace(value=7.0, standard_error=0.0, probes=16)
    """
    from scipy.special import stdtrit  # here, to keep importing flatmin fast

    hessian = _operator(hessian)
    number("tol", tol, 0)
    sketch = min(whole("sketch", sketch, 0), hessian.size)
    whole("max_probes", max_probes, 2)
    signs = lambda count, index: _vectors(count, hessian, seed, "trace", "signs", index)
    Q, exact = _sketch(hessian, signs(sketch, 0))
    if sketch == hessian.size:
        return Trace(exact.item(), 0.0, 0)
    samples: list[float] = []
    while (probes := len(samples)) < max_probes:
        block = min(8, max_probes - probes)
        samples += _samples(hessian, Q, signs(block, 1 + probes)).tolist()
        probes += block
        value = exact.item() + np.mean(samples)
        standard_error = np.std(samples, ddof=1) / math.sqrt(probes)
        half_width = stdtrit(probes - 1, 0.975) * standard_error
        if probes >= 16 and half_width <= tol * abs(value):
            break
    else:
        if half_width > tol * abs(value):
            warnings.warn(
                f"after {probes} probes the trace is {value:.3g} ± {half_width:.2g} "
                f"(95 %): give more probes, or a tol above {tol:g}",
                stacklevel=2,
            )
    return Trace(float(value), float(standard_error), probes)


def _sketch(products: Product, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q [s, P] with most of the large eigenvalues, and tr QHQᵀ."""
    Q = torch.linalg.qr(products(signs).mT).Q.mT if len(signs) else signs
    return Q, (Q * products(Q)).double().sum() if len(signs) else signs.new_zeros(()).double()


def _samples(products: Product, Q: Tensor, signs: Tensor) -> Tensor:
    u = signs - (signs @ Q.mT) @ Q
    return (u * products(u)).double().sum(-1)


# ----------------------------------------------------------------------------------------- density


class Density(NamedTuple):
    r"""A spectral density, :math:`\frac1P\sum_i\delta(\lambda-\lambda_i)`, as points with weights.

    Attributes
    ----------
    nodes : Tensor [probes, steps]
        Where the eigenvalues are.
    weights : Tensor [probes, steps]
        The share of eigenvalues at each; every row sums to 1.
    """

    nodes: Tensor
    weights: Tensor

    def smooth(self, at: Tensor, sigma: float) -> Tensor:
        r"""The density as a curve: every point becomes a Gaussian of width :math:`\sigma`.

        Parameters
        ----------
        at : Tensor [G]
            Where to evaluate it.
        sigma : float
            In the unit of the eigenvalues.

        Returns
        -------
        Tensor [G]
            The mean over the probes; its integral is 1.

        Examples
        --------
        >>> density = Density(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.75, 0.25]]))
        >>> density.smooth(torch.tensor([0.0, 2.0]), sigma=0.1) * 0.1 * math.sqrt(2 * math.pi)
        tensor([0.7500, 0.2500])
        """
        if not number("sigma", sigma, 0):
            raise ValueError(f"sigma must be > 0, got {sigma!r}")
        z = (at[:, None] - self.nodes.flatten()) / sigma
        height = self.weights.flatten() / (len(self.nodes) * sigma * math.sqrt(2 * math.pi))
        return (height * torch.exp(-(z**2) / 2)).sum(1)


def spectral_density(
    hessian: HessianOperator | Tensor,
    *,
    steps: int = 80,
    probes: int = 10,
    seed: int = 0,
    memory: float = 2**30,
) -> Density:
    r"""The density of the eigenvalues, by stochastic Lanczos quadrature.

    From a random unit vector v, k steps of :func:`lanczos` give the Gauss quadrature

    .. math:: v\cdot f(H)v \approx \sum_i s_{1i}^2\,f(\theta_i), \qquad
              \mathbb E\,v\cdot f(H)v = \frac1P\sum_i f(\lambda_i),

    which is exact for polynomials f of a degree below 2k, with :math:`\theta_i` and :math:`s_i` the
    eigenvalues and eigenvectors of the tridiagonal matrix T.

    Parameters
    ----------
    hessian : HessianOperator, or Tensor [P, P]
    steps, probes : int
        k, and how many vectors (of random signs) are averaged.
    seed : int
        Seed of the vectors.
    memory : float
        Bytes to plan with for the vectors that Lanczos keeps: it sets how many probes run side by
        side on a GPU.  On a CPU they run one by one.

    Returns
    -------
    Density
        In double precision.

    References
    ----------
    Ubaru, Chen & Saad, *Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature*, SIAM J.
    Matrix Anal. Appl. 38 (2017); Ghorbani, Krishnan & Xiao, *An Investigation into Neural Net
    Optimization via Hessian Eigenvalue Density*, ICML 2019.

    Examples
    --------
    >>> H = torch.diag(torch.tensor([0.0, 0.0, 0.0, 5.0]))
    >>> density = spectral_density(H, steps=2, probes=1)
    >>> density.nodes.round(decimals=4).abs(), density.weights
    (tensor([[0., 5.]], dtype=torch.float64), tensor([[0.7500, 0.2500]], dtype=torch.float64))
    """
    hessian = _operator(hessian)
    steps = min(whole("steps", steps), hessian.size)
    vs = _vectors(whole("probes", probes), hessian, seed, "density", "signs")
    bytes_each = steps * hessian.size * vs.element_size()
    at_most = max(1, int(number("memory", memory, 1) / bytes_each))
    side_by_side = 1 if vs.device.type == "cpu" else at_most  # one basis fits a cache better
    parts = [_quadrature(lanczos(hessian, v, steps)) for v in vs.split(side_by_side)]
    return Density(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _quadrature(result: Lanczos) -> tuple[Tensor, Tensor]:
    values, vectors, _ = result.ritz()
    return values, vectors[..., 0, :] ** 2


# ----------------------------------------------------------------------------------- for the stack


@dataclass(frozen=True, kw_only=True)
class _Instrument:
    """What the instruments of the Hessian share."""

    examples: int | None = None
    seed: int = 0
    loss: Loss = example_losses

    def __post_init__(self) -> None:
        if self.examples is not None:
            whole("examples", self.examples)
        whole("seed", self.seed, 0)

    def __call__(self, network: Network, params: Params, x: Tensor, y: Tensor) -> Tensor:
        x, y = x[: self.examples], y[: self.examples]
        shapes, w = {name: p.shape for name, p in params.items()}, flatten(params)
        mean = MeanLoss(network, self.loss, x, y, max(1, len(x)))
        with plain_attention():
            product = _reverse(lambda w: mean(unflatten(w, shapes)), w)
            products = lambda vs: torch.stack([product(v) for v in vs])
            return self.of(HessianOperator(products, len(w), w.dtype, w.device, shapes))

    def of(self, hessian: HessianOperator) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class HessianEigenvalues(_Instrument):
    """Instrument: the outer eigenvalues of the Hessian, of many networks at once.

    For ``Networks.measure`` and, for a single eigenvalue, :func:`flatmin.fit`
    (``instruments={"lambda_max": HessianEigenvalues()}``).

    Parameters
    ----------
    top, bottom : int
        As in :func:`eigenvalues`.
    steps : int
        How many Lanczos steps.
    errors : bool
        Also return the errors: [2, k].
    examples : int, optional
        How many examples of the split; default: all.
    seed : int
        Seed of the first vector, which is the same for all networks.
    loss : callable
        From logits [n, K] and targets to losses [n].

    Returns
    -------
    Tensor
        [k] with k = top + bottom, or one number if k is 1.

    Examples
    --------
    >>> from flatmin import fit
    >>> from flatmin.book import MLP, two_gaussians
    >>> data = two_gaussians(test_size=100)
    >>> runs = fit(lambda: MLP(10, 16, 2), data, steps=20, seeds=3, networks="last")
    >>> networks = runs.networks
    >>> networks.measure(HessianEigenvalues(top=5, bottom=1), data, "train").shape
    (3, 6)
    """

    top: int = 1
    bottom: int = 0
    steps: int = 30
    errors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        k = _check_counts(self.top, self.bottom)
        if whole("steps", self.steps) < k:
            raise ValueError(f"steps must be at least top + bottom = {k}, got {self.steps!r}")

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions that it returns, see :meth:`~flatmin.Networks.measure`."""
        return ("part",) * self.errors + ("eigenvalue",) * (self.top + self.bottom > 1)

    def of(self, hessian: HessianOperator) -> Tensor:
        _check_counts(self.top, self.bottom, hessian.size)
        v0 = _vectors(1, hessian, self.seed, "eigenvalues", "normal")[0]
        result = lanczos(hessian, v0, self.steps)
        values, errors, _ = _outer_eigenvalues(result, self.top, self.bottom)
        values = torch.stack([values, errors]) if self.errors else values
        return values.squeeze(-1) if self.top + self.bottom == 1 else values


@dataclass(frozen=True)
class HessianTrace(_Instrument):
    """Instrument: the Hessian's trace, of many networks at once; see :func:`trace`.

    Parameters
    ----------
    probes, sketch : int
        How many random vectors, and how many columns of Q.
    standard_error : bool
        Also return the standard error: [2].
    examples, seed, loss
        As in :class:`HessianEigenvalues`.

    Returns
    -------
    Tensor
        One number.
    """

    probes: int = 20
    sketch: int = 10
    standard_error: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("probes", self.probes, 2)
        whole("sketch", self.sketch, 0)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions that it returns."""
        return ("part",) * self.standard_error

    def of(self, hessian: HessianOperator) -> Tensor:
        signs = lambda count, index: _vectors(count, hessian, self.seed, "trace", "signs", index)
        Q, exact = _sketch(hessian, signs(min(self.sketch, hessian.size), 0))
        samples = _samples(hessian, Q, signs(self.probes, 1))
        value, error = exact + samples.mean(), samples.std() / math.sqrt(self.probes)
        return torch.stack([value, error]) if self.standard_error else value


@dataclass(frozen=True)
class HessianDensity(_Instrument):
    """Instrument: the spectral density, of many networks at once; see :func:`spectral_density`.

    Parameters
    ----------
    steps, probes : int
        As in :func:`spectral_density`; all networks get the same vectors.
    examples, seed, loss
        As in :class:`HessianEigenvalues`.

    Returns
    -------
    Tensor [2, probes, steps]
        Nodes and weights: ``Density(*values)`` for one network.
    """

    dims = ("part", "probe", "node")
    steps: int = 80
    probes: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps)
        whole("probes", self.probes)

    def of(self, hessian: HessianOperator) -> Tensor:
        vs = _vectors(self.probes, hessian, self.seed, "density", "signs")
        quadratures = [_quadrature(lanczos(hessian, v, self.steps)) for v in vs]
        return torch.stack([torch.stack(part) for part in zip(*quadratures, strict=True)])


# ------------------------------------------------------------------------------ vectors and checks


def _vectors(
    count: int, like: HessianOperator, seed: int, purpose: str, kind: str, index: int = 0
) -> Tensor:
    """Random vectors [count, P], normal or of signs; from NumPy, as vmap refuses PyTorch's."""
    random = numpy_stream(whole("seed", seed, 0), purpose, index)
    shape = (count, like.size)
    normal = kind == "normal"
    drawn = random.standard_normal(shape) if normal else random.integers(0, 2, shape) * 2 - 1
    return torch.from_numpy(drawn).to(like.device, like.dtype)


def _operator(hessian: HessianOperator | Tensor) -> HessianOperator:
    if isinstance(hessian, HessianOperator):
        return hessian
    if not isinstance(hessian, Tensor):
        raise TypeError(f"hessian must be a HessianOperator or a tensor, got {hessian!r}")
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be a matrix [P, P], got shape {tuple(hessian.shape)}")
    return HessianOperator(lambda vs: vs @ hessian, len(hessian), hessian.dtype, hessian.device)


def _check_counts(top: int, bottom: int, size: float = math.inf) -> int:
    k = whole("top", top, 0) + whole("bottom", bottom, 0)
    if not 1 <= k <= size:
        allowed = "at least 1" if k < 1 else f"at most {size}, the number of parameters"
        raise ValueError(f"top + bottom must be {allowed}, got {k}")
    return k


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
