r"""The Hessian's spectrum: how curved the loss is, and in how many directions.

.. math:: H = \nabla^2 L(w), \qquad Hv = \nabla\big(\nabla L(w)\cdot v\big)

A network's Hessian is too large to be written down, but its product with a vector costs only a few
gradients (:func:`hvp`, :func:`hessian_product`).  :func:`lanczos` turns k products into a k×k
matrix that has the outer eigenvalues of H, with error bounds (:func:`eigenvalues`), and, from
random vectors, its density (:func:`spectral_density`).  :func:`trace` needs only products.

All of them do a fixed number of products, so they run for a whole stack of networks at once.  For
one network, the package *curvlinops* has other matrices, eigenvectors and stopping rules.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vjp

from .._ball import length, norm, over_largest
from .._checks import known, number, tensor, whole
from .._contracts import Loss, Network
from .._functional import MeanLoss, dims
from .._random import numpy_stream
from .._targets import example_losses
from .._tree import Params, flatten, unflatten

__all__ = [
    "Density",
    "Eigenvalues",
    "Lanczos",
    "Trace",
    "eigenvalues",
    "hessian_product",
    "hvp",
    "lanczos",
    "spectral_density",
    "trace",
]

Product = Callable[[Tensor], Tensor]
Point = TypeVar("Point", Tensor, Params)


# ------------------------------------------------------------------------- Hessian-vector products


def hvp(f: Callable[[Point], Tensor], params: Point, v: Point) -> Point:
    r"""The product of a function's Hessian with a vector: :math:`Hv=\nabla(\nabla f\cdot v)`.

    Parameters
    ----------
    f : callable
        ``f(params) -> scalar``.
    params, v : Tensor or dict of Tensor
        The point and the vector, of the same structure.

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
    if _layout(params) != _layout(v):
        raise ValueError(
            f"v must have the structure of params, {_layout(params)}, got {_layout(v)}"
        )
    product = vjp(grad(f), params)[1]
    return product(v)[0]


def _layout(point: Any) -> Any:
    """The shape of a tensor, those of a dictionary's tensors, or the type of something else."""
    if isinstance(point, dict):
        return {name: _layout(x) for name, x in point.items()}
    return tuple(point.shape) if isinstance(point, Tensor) else type(point).__name__


def hessian_product(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Product:
    r"""The products of the Hessian of the mean loss with vectors, as a function.

    .. math:: v \mapsto Hv = \sum_B \frac{|B|}{n}\,\nabla^2 L_B(w)\,v

    Parameters
    ----------
    criterion : callable
        From output and targets to one loss per example, [n].
    batch_size : int, optional
        How many examples at once.  Default: all; the graph of the gradient is then made once and
        kept, so that a product costs one backward pass through it.

    Returns
    -------
    callable
        From v [P] to Hv [P]; the numbers of a vector are in the order of ``params``.

    Notes
    -----
    At a kink (of a ReLU) PyTorch takes the derivative of one side.

    Examples
    --------
    Linear regression, :math:`H=\frac1n X^\top X`:

    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.zeros(2)
    >>> product = on(model, hessian_product, x, y, criterion=squared)
    >>> product(torch.tensor([1.0, 0.0]))
    tensor([0.5000, 1.0000])
    """
    shapes, w = {name: v.shape for name, v in params.items()}, flatten(params)
    mean = MeanLoss(network, criterion, x, y, len(x) if batch_size is None else batch_size)
    loss_of = lambda batch: lambda w: mean.of(unflatten(w, shapes), *batch)
    if len(mean.batches) == 1:
        once = vjp(grad(loss_of(mean.batches[0])), w)[1]

    def product(v: Tensor) -> Tensor:
        _check_vector("v", v, len(w))
        if len(mean.batches) == 1:
            return once(v)[0]
        return sum(hvp(loss_of(batch), w, v) for batch in mean.batches)  # type: ignore

    return product


# ----------------------------------------------------------------------------------------- Lanczos


class Lanczos(NamedTuple):
    r"""The result of k steps of :func:`lanczos`: :math:`QHQ^\top=T`, tridiagonal.

    Attributes
    ----------
    alpha : Tensor [k]
        T's diagonal.
    beta : Tensor [k]
        T's off-diagonal, and last the length of the remainder.
    basis : Tensor [k, P]
        Q: orthonormal rows.
    dropped : Tensor
        The norm of what T leaves out of HQᵀ, besides the last remainder: rounding, for a symmetric
        H, and else as large as H - Hᵀ within the span of Q.
    """

    alpha: Tensor
    beta: Tensor
    basis: Tensor
    dropped: Tensor

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""The Ritz values :math:`\theta_i`, and their accuracy.

        Returns
        -------
        values : Tensor [k]
            T's eigenvalues, ascending; all three in double precision.  NaN if T is not finite.
        vectors : Tensor [k, k]
            T's eigenvectors :math:`s_i`, its columns; :math:`y_i=Q^\top s_i` is the Ritz vector.
        residuals : Tensor [k]
            :math:`\|Hy_i-\theta_iy_i\|\le\beta_k|s_{ki}|+` ``dropped``: H has an eigenvalue
            within this distance.
        """
        alpha, beta = self.alpha.double(), self.beta.double()
        T = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        finite = T.isfinite().all()
        values, vectors = torch.linalg.eigh(torch.where(finite, T, 0))  # eigh refuses NaN
        residuals = beta[-1] * vectors[-1].abs() + self.dropped.double()
        return torch.where(finite, values, math.nan), vectors, residuals


def lanczos(matvec: Product, q: Tensor, steps: int) -> Lanczos:
    r"""Lanczos' algorithm, with full reorthogonalization.

    .. math:: \beta_j q_{j+1} = Hq_j - \alpha_j q_j - \beta_{j-1}q_{j-1}, \qquad
              \alpha_j = q_j\cdot Hq_j

    In floating point the :math:`q_j` do not stay orthogonal by themselves: directions already found
    return, and copies of an eigenvalue appear ("ghosts").  Here each new vector is made orthogonal
    to *all* before it.

    Parameters
    ----------
    matvec : callable
        From v [P] to Hv [P], the product with a symmetric matrix.
    q : Tensor [P]
        The first vector, of any length but 0.
    steps : int
        How many products; P at most are done.

    Returns
    -------
    Lanczos
        Under ``vmap``, where nothing can be raised, NaN instead of an error.

    Raises
    ------
    ValueError
        If the first vector is 0, or if the products show an asymmetry: q_i·Hq_j and q_j·Hq_i differ
        by more than 1 % of T's largest entry, all together.  A smaller asymmetry may be rounding (in
        TF32, or where terms cancel); it is added to the residuals.  One product shows none.

    Notes
    -----
    *Breakdown.*  Where the remainder is 0 up to rounding, the vectors so far span all that can be
    reached from the first one.  Then :math:`\beta_j=0`, and the iteration continues from another
    vector, orthogonal to all before: so a double eigenvalue is found twice.

    References
    ----------
    Golub & Van Loan, *Matrix Computations*, chapter on Lanczos methods; Parlett, *The Symmetric
    Eigenvalue Problem*, SIAM 1998.

    Examples
    --------
    >>> H = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> lanczos(lambda v: H @ v, torch.ones(3), steps=2).alpha       # 7/3: the mean eigenvalue
    tensor([2.3333, 2.8095])
    >>> lanczos(lambda v: H @ v, torch.ones(3), steps=3).ritz()[0].float().round(decimals=4)
    tensor([1., 2., 4.])
    """
    _check_vector("q", q)
    whole("steps", steps)
    if known(~q.any()):
        raise ValueError("q must not be 0")
    found = _lanczos(matvec, q, steps)
    # Of a symmetric matrix only rounding is dropped, some 10 eps of T's size; 1 % leaves room for
    # products in TF32, or whose terms cancel.
    size = torch.maximum(found.alpha.abs().max(), found.beta.max())
    asymmetric = found.dropped > 0.01 * size
    if known(asymmetric):
        raise ValueError(
            "matvec must be the product with a symmetric matrix, got one whose q_i·Hq_j and "
            f"q_j·Hq_i differ by {(found.dropped / size).item():.0%} of T's largest entry"
        )
    return found._replace(alpha=torch.where(asymmetric, math.nan, found.alpha))


def _lanczos(matvec: Product, q: Tensor, steps: int) -> Lanczos:
    """The iteration, which takes any products, as they come from a network."""
    steps = min(steps, len(q))
    spare = torch.from_numpy(np.random.default_rng(0).standard_normal(len(q))).to(q)
    q = over_largest(q)[0]
    q = q / norm(q, 2)
    alpha: list[Tensor] = []
    beta: list[Tensor] = []
    dropped: list[Tensor] = []
    scale = q.new_zeros(())
    for j in range(steps):
        Hq = matvec(q)
        _check_vector("the result of matvec", Hq, len(q))
        if j == 0:
            basis = Hq.new_zeros(steps, len(q))  # under vmap Hq may have runs where q has none
        basis[j] = q
        alpha.append(q @ Hq)
        r = Hq - alpha[j] * q - (beta[j - 1] * basis[j - 1] if j else 0)
        scale = torch.maximum(scale, length(Hq))
        q, b = _next(r, spare.roll(j), basis[: j + 1], scale)
        beta.append(b)
        dropped.append(length(r - b * q))
    return Lanczos(torch.stack(alpha), torch.stack(beta), basis, length(torch.stack(dropped)))


def _next(r: Tensor, spare: Tensor, Q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The next vector of the basis and its β: r = βq, orthogonal to all rows of Q.

    After a breakdown (most of r lies in the span of Q, or what is left is rounding) β is 0, and the
    vector is the spare one without its part in the span.
    """
    both = torch.stack([r, spare])
    orthogonal, other = both - (both @ Q.mT) @ Q
    b = length(orthogonal)
    breakdown = b <= torch.maximum(length(r) / 2, 10 * torch.finfo(r.dtype).eps * scale)
    q = over_largest(torch.where(breakdown, other, orthogonal))[0]
    q = q - (q @ Q.mT) @ Q  # again: the spare one, too, may lie almost in the span
    return q / norm(q, 2).clamp_min(torch.finfo(q.dtype).tiny), torch.where(breakdown, 0, b)


def _check_vector(name: str, v: Any, length: int | None = None) -> None:
    tensor = isinstance(v, Tensor)
    good = tensor and v.dim() == 1 and v.is_floating_point() and length in (None, len(v))
    if not good:
        numbers = "" if length is None else f"{length} "
        got = f"{v.dtype} of shape {tuple(v.shape)}" if tensor else type(v).__name__
        raise ValueError(f"{name} must be a vector of {numbers}real numbers, got {got}")


# ------------------------------------------------------------------------------------- eigenvalues


class Eigenvalues(NamedTuple):
    """The outer eigenvalues of a Hessian, in double precision.

    Attributes
    ----------
    value : Tensor [k]
        The largest ones, and after them the smallest: descending, by sign and not by magnitude.
    error : Tensor [k]
        There is an eigenvalue within this distance of the value.
    """

    value: Tensor
    error: Tensor


@dims(value=["eigenvalue"], error=["eigenvalue"])
def eigenvalues(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    top: int = 1,
    bottom: int = 0,
    steps: int = 30,
    seed: int = 0,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Eigenvalues:
    r"""Instrument: the largest and the smallest eigenvalues, by :func:`lanczos`.

    Parameters
    ----------
    top, bottom : int
        How many from each end.
    steps : int
        How many products.
    seed : int
        Seed of the first vector, which is the same for all networks.
    criterion, batch_size
        As in :func:`hessian_product`.

    Returns
    -------
    Eigenvalues
        NaN if the products are not finite.

    Notes
    -----
    The errors are residuals :math:`r=\|Hy-\theta y\|`, which bound the distance to an eigenvalue
    without any assumption (and are at least 10 roundings of the largest).  For a symmetric matrix
    the value is better than that: its error is at most :math:`r^2` over the distance to the next
    eigenvalue.  No method that uses only products can exclude that the first vector misses a
    direction.  A multiple eigenvalue (each one, of a linear regression with several outputs) is found
    again only after the steps that find all distinct ones: with few steps copies are missing.

    Where the products are mostly rounding, as in float32 where all probabilities are 0 or 1, or not
    those of a symmetric matrix, because a second derivative is wrong, the errors are as large as the
    asymmetry.

    Examples
    --------
    >>> from functools import partial
    >>> from flatmin import fit
    >>> from flatmin.book import MLP, two_gaussians
    >>> data = two_gaussians(test_size=100)
    >>> runs = fit(lambda: MLP(10, 16, 2), data, steps=20, seeds=3, networks="last")
    >>> found = runs.networks.measure(partial(eigenvalues, top=5, bottom=1), data, "train")
    >>> found.value.dims, found.value.shape
    (('seed', 'eigenvalue'), (3, 6))
    """
    w = flatten(params)
    k = whole("top", top, 0) + whole("bottom", bottom, 0)
    if not 1 <= k <= len(w):
        raise ValueError(
            f"top + bottom must be from 1 to {len(w)}, the number of parameters, got {k}"
        )
    if whole("steps", steps) < k:
        raise ValueError(f"steps must be at least top + bottom = {k}, got {steps!r}")
    product = hessian_product(network, params, x, y, criterion=criterion, batch_size=batch_size)
    start = torch.as_tensor(_stream(seed, "eigenvalues").standard_normal(len(w))).to(w)
    values, _, residuals = _lanczos(product, start, steps).ritz()
    rounding = 10 * torch.finfo(w.dtype).eps * values.abs().max()
    outer = [*range(-1, -1 - top, -1), *range(bottom - 1, -1, -1)]
    return Eigenvalues(values[outer], torch.maximum(residuals, rounding)[outer])


# ------------------------------------------------------------------------------------------- trace


class Trace(NamedTuple):
    """An estimate of a Hessian's trace, and its standard error; both in double precision."""

    value: Tensor
    standard_error: Tensor


def trace(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    probes: int = 20,
    sketch: int = 10,
    seed: int = 0,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Trace:
    r"""Instrument: the trace, by random vectors (Hutch++).

    .. math:: \operatorname{tr}H = \operatorname{tr}(QHQ^\top)
              + \mathbb E\,u\cdot Hu, \qquad u=(1-Q^\top Q)z, \quad z_i=\pm1

    The rows of Q span H times a few random vectors, so they hold most of the large eigenvalues,
    which are counted exactly; random signs z estimate only the small rest (Hutchinson's estimator).
    It is unbiased.

    Parameters
    ----------
    probes : int
        How many z, at least 2; one product each.
    sketch : int
        How many rows Q has, two products each; 0 is Hutchinson's estimator.
    seed : int
        Seed of all random vectors, which are the same for all networks.
    criterion, batch_size
        As in :func:`hessian_product`.

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
    Where H is diagonal, as in this linear regression, each z gives the exact trace:

    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.diag(torch.tensor([2.0, 4.0])), torch.zeros(2)
    >>> found = on(model, trace, x, y, sketch=0, criterion=squared)
    >>> found.value.item(), found.standard_error.item()
    (10.0, 0.0)
    """
    w = flatten(params)
    whole("probes", probes, 2)
    sketch = min(whole("sketch", sketch, 0), len(w))
    product = hessian_product(network, params, x, y, criterion=criterion, batch_size=batch_size)
    products = lambda vs: torch.stack([product(v) for v in vs]) if len(vs) else vs
    quadratic = lambda vs: (vs * products(vs)).double().sum(1)  # v·Hv of each row
    Q = _signs(sketch, w, seed, "trace", 0)
    if sketch:
        Q = torch.linalg.qr(over_largest(products(Q).mT)[0]).Q.mT
    z = _signs(probes, w, seed, "trace", 1)
    rest, size = over_largest(quadratic(z - (z @ Q.mT) @ Q))
    value = quadratic(Q).sum() + size * rest.mean()
    return Trace(value, size * rest.std() / math.sqrt(probes))


# ----------------------------------------------------------------------------------------- density


class Density(NamedTuple):
    r"""A spectral density, :math:`\frac1P\sum_i\delta(\lambda-\lambda_i)`, as points with weights.

    Attributes
    ----------
    node : Tensor [probes, steps]
        Where the eigenvalues are; in double precision, as the weights.
    weight : Tensor [probes, steps]
        The share of eigenvalues at each; every row sums to 1.
    """

    node: Tensor
    weight: Tensor

    def smooth(self, at: Tensor, sigma: float) -> Tensor:
        r"""The density as a curve: every point becomes a Gaussian of width :math:`\sigma`.

        Parameters
        ----------
        at : Tensor
            Where to evaluate it, of any shape.
        sigma : float
            In the unit of the eigenvalues.

        Returns
        -------
        Tensor
            In the shape of ``at``: the mean over the probes; its integral is 1.

        Examples
        --------
        >>> density = Density(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.75, 0.25]]))
        >>> density.smooth(torch.tensor([0.0, 2.0]), sigma=0.1) * 0.1 * math.sqrt(2 * math.pi)
        tensor([0.7500, 0.2500])
        """
        if not number("sigma", sigma, 0):
            raise ValueError(f"sigma must be > 0, got {sigma!r}")
        z = (tensor("at", at)[..., None] - self.node.flatten()) / sigma
        height = self.weight.flatten() / (len(self.node) * sigma * math.sqrt(2 * math.pi))
        return (height * torch.exp(-(z**2) / 2)).sum(-1)


@dims(node=["probe", "point"], weight=["probe", "point"])
def spectral_density(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 80,
    probes: int = 10,
    seed: int = 0,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Density:
    r"""Instrument: the density of the eigenvalues, by stochastic Lanczos quadrature.

    From a random unit vector v, k steps of :func:`lanczos` give the Gauss quadrature

    .. math:: v\cdot f(H)v \approx \sum_i s_{1i}^2\,f(\theta_i), \qquad
              \mathbb E\,v\cdot f(H)v = \frac1P\sum_i f(\lambda_i),

    which is exact for polynomials f of a degree below 2k, with :math:`\theta_i` and :math:`s_i` the
    eigenvalues and eigenvectors of the tridiagonal matrix T.

    Parameters
    ----------
    steps, probes : int
        k, and how many vectors (of random signs) are averaged; one product a step and probe.
    seed : int
        Seed of the vectors, which are the same for all networks.
    criterion, batch_size
        As in :func:`hessian_product`.

    Returns
    -------
    Density

    References
    ----------
    Ubaru, Chen & Saad, *Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature*, SIAM J.
    Matrix Anal. Appl. 38 (2017); Ghorbani, Krishnan & Xiao, *An Investigation into Neural Net
    Optimization via Hessian Eigenvalue Density*, ICML 2019.

    Examples
    --------
    Linear regression with the eigenvalues 0, 0, 0 and 5:

    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(4, 1, bias=False)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.tensor([[5**0.5, 0, 0, 0]]), torch.zeros(1)
    >>> density = on(model, spectral_density, x, y, steps=2, probes=1, criterion=squared)
    >>> density.node.float().round(decimals=4).abs(), density.weight.float().round(decimals=4)
    (tensor([[0., 5.]]), tensor([[0.7500, 0.2500]]))
    """
    w = flatten(params)
    product = hessian_product(network, params, x, y, criterion=criterion, batch_size=batch_size)
    starts = _signs(whole("probes", probes), w, seed, "density")
    whole("steps", steps)
    ritz = [_lanczos(product, v, steps).ritz() for v in starts]
    return Density(
        torch.stack([values for values, _, _ in ritz]),
        torch.stack([vectors[0] ** 2 for _, vectors, _ in ritz]),
    )


# ---------------------------------------------------------------------------------- random vectors


def _stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    return numpy_stream(whole("seed", seed, 0), purpose, index)


def _signs(count: int, w: Tensor, seed: int, purpose: str, index: int = 0) -> Tensor:
    """Vectors of random signs [count, P]; from NumPy, as vmap refuses PyTorch's generators."""
    drawn = _stream(seed, purpose, index).integers(0, 2, (count, len(w))) * 2 - 1
    return torch.from_numpy(drawn).to(w.device, w.dtype)
