r"""Sharpness: how much the loss rises nearby.

.. math::
    S_m(w) = \frac1n\sum_{B}|B|\,\max_{\|T^{-1}\epsilon\|_p\le\rho}
    \big[L_B(w+\epsilon) - L_B(w)\big]

over shards B of m examples: like m-SAM, it takes the worst-case perturbation of each shard, not of
all examples at once.  With m=n it is the sharpness of the whole set.  T=1, or
:math:`T=|w|+\eta` in the adaptive form, whose value does not change when one layer is multiplied
by a number and the next divided by it.

:func:`sharpness` and :func:`average_sharpness` are for a module, the instruments :class:`Sharpness`
and :class:`AverageSharpness` for a whole stack of networks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from .._ball import check_ball, dual_norm_perturbation
from .._checks import whole
from .._functional import (
    Loss,
    MeanLoss,
    Network,
    as_function,
    inspecting,
    map_rows,
    plain_attention,
)
from .._random import normals
from .._targets import example_losses
from .._tree import Params, flatten, unflatten

__all__ = ["AverageSharpness", "Estimate", "Sharpness", "average_sharpness", "sharpness"]


# ------------------------------------------------------------------------------------- the kernels


@dataclass(frozen=True)
class _Neighbourhood:
    r"""The points :math:`\{w+Tu:\ \|u\|_p\le\rho\}`; adaptive or not, u is in a plain ball."""

    rho: float
    p: float
    adaptive: bool
    eta: float

    def at(self, w: Params, u: Params) -> Params:
        T = lambda w: w.abs() + self.eta if self.adaptive else 1
        return {name: w[name] + T(w[name]) * u[name] for name in w}

    def steepest(self, gradient: Params) -> Params:
        """The point of the edge where a linear function with this gradient is highest."""
        shapes = {name: g.shape for name, g in gradient.items()}
        u = dual_norm_perturbation(flatten(gradient), self.rho, self.p)
        return unflatten(u, shapes)

    def norm(self, u: Params) -> Tensor:
        return torch.linalg.vector_norm(torch.cat([x.flatten() for x in u.values()]), self.p)

    def on_the_edge(self, u: Params) -> Params:
        factor = self.rho / self.norm(u)
        return {name: x * factor for name, x in u.items()}

    def project(self, u: Params) -> Params:
        """The closest point for p of 2 and ∞; for others the point of the ball on the way to 0."""
        if self.p == math.inf:
            return {name: x.clamp(-self.rho, self.rho) for name, x in u.items()}
        length = self.norm(u)
        factor = (self.rho / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        return {name: x * factor for name, x in u.items()}


def _sharpness(
    loss: Callable[[Params], Tensor],
    slope: Callable[[Params], tuple[Params, Tensor]],
    w: Params,
    ball: _Neighbourhood,
    steps: int,
    starts: list[Params],
) -> Tensor:
    r"""The kernel, for one shard: ``loss(w)`` and ``slope(u) = (gradient, loss) at w + Tu``.

    The first start is SAM's :math:`\hat\epsilon`.  With ``steps=1`` and no other start it gives the
    result; otherwise the highest loss of all visited points does, :math:`w` included.
    """
    zero = {name: torch.zeros_like(x) for name, x in w.items()}
    g, loss_at_w = slope(zero)
    u = ball.steepest(g)
    if steps == 1 and not starts:
        return loss(ball.at(w, u)) - loss_at_w
    highest = loss_at_w
    for start in [u, *starts]:
        u = start
        for _ in range(steps - 1):
            g, value = slope(u)
            highest = torch.maximum(highest, value)
            step = ball.steepest(g)  # as long as the radius: shorter steps end lower
            u = ball.project({name: u[name] + step[name] for name in u})
        highest = torch.maximum(highest, loss(ball.at(w, u)))
    return highest - loss_at_w


def _over_shards(
    network: Network,
    loss: Loss,
    w: Params,
    x: Tensor,
    y: Tensor,
    ball: _Neighbourhood,
    *,
    m: int | None,
    steps: int,
    restarts: int,
    seed: int,
    batch_size: int,
    chunk_size: int,
) -> Tensor:
    """The mean over all shards, weighted by their numbers of examples."""
    n = len(x)
    m = min(m or n, n)
    starts = [ball.on_the_edge(normals(w, seed, "sharpness", i)) for i in range(restarts - 1)]

    def shard_sharpness(rows: Tensor) -> Tensor:
        mean = MeanLoss(network, loss, x[rows], y[rows], batch_size)

        def slope(u: Params) -> Any:
            # one batch after another: the graph of each is freed before the next
            climb = grad_and_value(lambda u, *batch: mean.of(ball.at(w, u), *batch))
            slopes = [climb(u, *batch) for batch in mean.batches]
            return {name: sum(g[name] for g, _ in slopes) for name in u}, sum(v for _, v in slopes)

        return _sharpness(mean, slope, w, ball, steps, starts)

    rows = torch.arange(n, device=x.device)
    mean = map_rows(shard_sharpness, rows[: n // m * m].view(-1, m), chunk_size).sum() * (m / n)
    return mean + shard_sharpness(rows[n // m * m :]) * (n % m / n) if n % m else mean


def _average_rise(
    network: Network,
    loss: Loss,
    w: Params,
    x: Tensor,
    y: Tensor,
    ball: _Neighbourhood,
    *,
    directions: int,
    seed: int,
    batch_size: int,
) -> Tensor:
    """The rise of the loss, averaged over two opposite points of the sphere: [directions]."""
    value = MeanLoss(network, loss, x, y, batch_size)

    def rise(i: int) -> Tensor:
        u = ball.on_the_edge(normals(w, seed, "average sharpness", i))
        opposite = {name: -v for name, v in u.items()}
        return (value(ball.at(w, u)) + value(ball.at(w, opposite))) / 2

    return torch.stack([rise(i) for i in range(directions)]) - value(w)


# ------------------------------------------------------------------------------------ for a module


def sharpness(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    rho: float = 0.05,
    *,
    p: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.01,
    steps: int = 1,
    restarts: int = 1,
    m: int | None = None,
    seed: int = 0,
    batch_size: int = 1000,
    chunk_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The rise of the loss under the worst perturbation found: (m-)sharpness.

    .. math::
        \frac1n\sum_B |B|\,\max_{\|T^{-1}\epsilon\|_p\le\rho}\big[L_B(w+\epsilon)-L_B(w)\big]

    With ``steps=1`` the perturbation is SAM's :math:`\hat\epsilon`
    (:func:`~flatmin.dual_norm_perturbation`).  More steps continue from there by projected gradient
    ascent, each as long as :math:`\rho`; restarts begin at random points of the ball's edge.  The
    highest loss on the way counts, so the result is neither below 0 nor below that of one step.  It
    is a lower bound of the maximum, and at least the first-order rise :math:`\rho\|Tg\|_q` where
    the loss is convex in the ball.

    The network is in evaluation mode; batch norm keeps its running statistics.

    Parameters
    ----------
    model : Module
        Its parameters that require a gradient are perturbed.
    loss : callable
        ``loss(model(x), y)`` gives one number per example, or their mean.
    x, y : Tensor
        Examples [n, ...] and targets [n, ...], on the model's device.
    rho : float
        The radius :math:`\rho\ge0`.
    p : float
        The norm, in [1, ∞].
    adaptive : bool
        ``True``: :math:`T=|w|+\eta`.  ``False``: :math:`T=1`.
    eta : float
        :math:`\eta\ge0` of the adaptive form; at 0 it is invariant to rescaling of layers.
    steps, restarts : int
        Number of steps from each start, and of starts.
    m : int, optional
        Examples per shard, taken in order; the last shard may have fewer.  Default: all.
    seed : int
        Seed of the random starts.
    batch_size, chunk_size : int
        How many examples of a shard, and how many shards, are computed at once.  Each shard
        needs its own copy of the weights.  The result depends on both only by rounding.
    dtype : torch.dtype, optional
        ``torch.float64`` computes with copies in double precision: otherwise a rise below 1e-6 of
        the loss is rounding.

    Returns
    -------
    Tensor
        One number, in the unit of the loss.

    References
    ----------
    Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
    2021 (m-sharpness); Kwon et al., *ASAM*, ICML 2021 (adaptive); Andriushchenko et al., *A Modern
    Look at the Relationship between Sharpness and Generalization*, ICML 2023.

    Examples
    --------
    Of :math:`L=\frac12(1-w)^2` at w=0 it is :math:`\rho+\frac12\rho^2`:

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> sharpness(model, squared, torch.ones(3, 1), torch.ones(3), rho=0.2)
    tensor(0.2200)

    Two examples that pull in opposite directions: together they are at a minimum, flatter than each
    alone.

    >>> x, y = torch.ones(2, 1), torch.tensor([1.0, -1.0])
    >>> sharpness(model, squared, x, y, 0.2, steps=3), sharpness(model, squared, x, y, 0.2, m=1)
    (tensor(0.), tensor(0.2200))
    """
    settings = Sharpness(
        rho, p, adaptive, eta, steps, restarts, m, seed, None, loss, batch_size, chunk_size
    )
    with inspecting(model), torch.no_grad():  # torch.func works inside no_grad
        return settings(*as_function(model, x, y, dtype))


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error."""

    mean: Tensor
    standard_error: Tensor


def average_sharpness(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.01,
    directions: int = 20,
    seed: int = 0,
    batch_size: int = 1000,
    dtype: torch.dtype | None = None,
) -> Estimate:
    r"""The rise of the loss in an average direction.

    .. math::
        \mathbb E\,L(w+Tu) - L(w), \qquad u \text{ uniform on the sphere } \|u\|_2=\rho;
        \qquad \approx \frac{\rho^2}{2P}\operatorname{tr}(THT)

    with P parameters.  It is linear in the loss, so shards make no difference: there is no
    m-sharpness of this kind.

    Parameters
    ----------
    model, loss, x, y, rho, adaptive, eta, batch_size, dtype
        As in :func:`sharpness`.
    directions : int
        How many, at least 2.  Both ends of each are averaged, which removes the slope.
    seed : int
        Seed of the directions.

    Returns
    -------
    Estimate
        Mean and standard error.

    Examples
    --------
    In one dimension there is one direction:

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> average_sharpness(model, squared, torch.ones(3, 1), torch.ones(3), rho=0.2).mean
    tensor(0.0200)
    """
    settings = AverageSharpness(rho, adaptive, eta, directions, True, seed, None, loss, batch_size)
    with inspecting(model), torch.no_grad():
        return Estimate(*settings(*as_function(model, x, y, dtype)))


# ----------------------------------------------------------------------------------- for the stack


@dataclass(frozen=True)
class Sharpness:
    """Instrument: :func:`sharpness`, of many networks at once.

    For ``Networks.measure`` and :func:`flatmin.fit` (``instruments={"sharp": Sharpness(m=8)}``).

    Parameters
    ----------
    rho, p, adaptive, eta, steps, restarts, m, seed
        As in :func:`sharpness`; all networks get the same random starts.
    examples : int, optional
        How many examples of the split; default: all.
    loss : callable
        From logits [n, K] and targets to losses [n].
    batch_size, chunk_size : int
        As in :func:`sharpness`, for each network of the stack.

    Returns
    -------
    Tensor
        One number.

    Examples
    --------
    >>> from flatmin import fit
    >>> from flatmin.book import MLP, two_gaussians
    >>> data = two_gaussians(test_size=100)
    >>> runs = fit(lambda: MLP(10, 16, 2), data, steps=20, seeds=3, networks="last")
    >>> networks = runs.networks
    >>> one = networks.measure(Sharpness(rho=0.1, m=1), data, "train")
    >>> bool((one > networks.measure(Sharpness(rho=0.1), data, "train")).all())
    True
    """

    rho: float = 0.05
    p: float = 2.0
    adaptive: bool = False
    eta: float = 0.01
    steps: int = 1
    restarts: int = 1
    m: int | None = None
    seed: int = 0
    examples: int | None = None
    loss: Loss = example_losses
    batch_size: int = 1000
    chunk_size: int = 16

    def __post_init__(self) -> None:
        check_ball(self.rho, self.p, self.eta)
        for name in ("steps", "restarts", "batch_size", "chunk_size"):
            whole(name, getattr(self, name))
        for name in ("m", "examples"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        whole("seed", self.seed, 0)

    def __call__(self, network: Network, params: Params, x: Tensor, y: Tensor) -> Tensor:
        with plain_attention():
            return _over_shards(
                network,
                self.loss,
                params,
                x[: self.examples],
                y[: self.examples],
                _Neighbourhood(self.rho, self.p, self.adaptive, self.eta),
                m=self.m,
                steps=self.steps,
                restarts=self.restarts,
                seed=self.seed,
                batch_size=self.batch_size,
                chunk_size=self.chunk_size,
            )


@dataclass(frozen=True)
class AverageSharpness:
    """Instrument: :func:`average_sharpness`, of many networks at once.

    Parameters
    ----------
    rho, adaptive, eta, directions, seed, batch_size
        As in :func:`average_sharpness`; all networks get the same directions.
    standard_error : bool
        Also return the standard error: [2].
    examples, loss
        As in :class:`Sharpness`.

    Returns
    -------
    Tensor
        One number.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01
    directions: int = 20
    standard_error: bool = False
    seed: int = 0
    examples: int | None = None
    loss: Loss = example_losses
    batch_size: int = 1000

    def __post_init__(self) -> None:
        check_ball(self.rho, 2, self.eta)
        whole("directions", self.directions, 2)
        whole("batch_size", self.batch_size)
        if self.examples is not None:
            whole("examples", self.examples)
        whole("seed", self.seed, 0)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions that it returns."""
        return ("part",) * self.standard_error

    def __call__(self, network: Network, params: Params, x: Tensor, y: Tensor) -> Tensor:
        with plain_attention():
            rise = _average_rise(
                network,
                self.loss,
                params,
                x[: self.examples],
                y[: self.examples],
                _Neighbourhood(self.rho, 2, self.adaptive, self.eta),
                directions=self.directions,
                seed=self.seed,
                batch_size=self.batch_size,
            )
        mean, error = rise.mean(), rise.std() / math.sqrt(self.directions)
        return torch.stack([mean, error]) if self.standard_error else mean
