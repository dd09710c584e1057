r"""Attacks: the small change of an input that raises its loss most.

.. math:: \max_{\|\delta\|_p\le\epsilon}\ \ell\big(f(x+\delta),\,y\big), \qquad p\in\{2,\infty\}

:func:`fgsm` takes one step, :func:`pgd` several.  Both are pure functions of a model, inputs and
labels, and compose with ``torch.func``; :class:`Attack` applies them to a whole stack of networks
at once.  An attack is *white box* when it uses the gradient of the network that it attacks, and
*transferred* when it uses that of another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from .._checks import hyperparameter, whole
from .._functional import evaluation
from .._targets import example_losses
from .._tree import Params

__all__ = ["Attack", "fgsm", "pgd", "project", "random_start", "steepest"]

Model = Callable[[Tensor], Tensor]
Bounds = tuple[float, float] | None


def steepest(gradient: Tensor, p: float = math.inf) -> Tensor:
    r"""The :math:`\delta` of unit p-norm, for each example, that has the largest
    :math:`\langle g,\delta\rangle`; 0 where the gradient is 0.

    Parameters
    ----------
    gradient : Tensor [n, ...]
    p : {2, inf}
        2: :math:`g/\|g\|`.  inf: :math:`\operatorname{sign} g`.

    Examples
    --------
    >>> g = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    >>> steepest(g)
    tensor([[ 1., -1.],
            [ 0.,  0.]])
    >>> steepest(g, p=2)
    tensor([[ 0.6000, -0.8000],
            [ 0.0000,  0.0000]])
    """
    if p == math.inf:
        return gradient.sign()
    g = gradient.flatten(1)
    g = g / g.abs().amax(1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)  # squares underflow
    g = g / g.norm(dim=1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return g.reshape(gradient.shape)


def project(delta: Tensor, eps: float | Tensor, p: float = math.inf) -> Tensor:
    r"""For each example, the point of :math:`\|\delta\|_p\le\epsilon` closest to ``delta``.

    Examples
    --------
    >>> project(torch.tensor([[3.0, -4.0], [0.1, 0.0]]), eps=1.0, p=2)
    tensor([[ 0.6000, -0.8000],
            [ 0.1000,  0.0000]])
    """
    if p == math.inf:
        return delta.clamp(-eps, eps)  # type: ignore[arg-type]  # two floats or two tensors
    norm = delta.flatten(1).norm(dim=1).reshape(-1, *[1] * (delta.ndim - 1))
    return delta * (eps / norm.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    p: float = math.inf,
    bounds: Bounds = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = example_losses,
) -> Tensor:
    r"""One step to the edge of the ball: :math:`x+\epsilon\operatorname{sign}\nabla_x\ell`.

    For p = 2, along :math:`\nabla_x\ell/\|\nabla_x\ell\|`: in both cases the optimum for a loss
    that is linear in x.

    Parameters
    ----------
    model : callable
        From inputs [n, ...] to logits [n, K].  A module runs in evaluation mode; its mode, buffers
        and ``.grad`` are left as they were.
    x : Tensor [n, ...]
        Inputs, floating point; unchanged.
    y : Tensor
        Labels [n], or soft targets [n, K].
    eps : float or Tensor
        :math:`\epsilon\ge0`, in the unit of the inputs.
    p : {2, inf}
        The norm that bounds the change of an example.
    bounds : (low, high), optional
        Smallest and largest valid entry of an input; the result is clamped to them.
    criterion : callable
        From logits and y to the losses [n].  To attack a targeted class, pass that class as y and
        the negative loss.

    Returns
    -------
    Tensor [n, ...]
        The changed inputs, without a graph.

    Notes
    -----
    Where the loss of an example is exactly 0 in floating point, so is its gradient: a very
    confident network looks robust to any gradient-based attack.  Use float64 where that matters.

    References
    ----------
    Goodfellow, Shlens & Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015.

    Examples
    --------
    >>> model = lambda x: torch.cat([x, -x], 1)          # class 0 is where x is positive
    >>> fgsm(model, torch.tensor([[1.0]]), torch.tensor([0]), eps=0.25)
    tensor([[0.7500]])
    """
    return pgd(model, x, y, eps, steps=1, step_size=eps, p=p, bounds=bounds, criterion=criterion)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    p: float = math.inf,
    start: Tensor | None = None,
    bounds: Bounds = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = example_losses,
) -> Tensor:
    r"""Projected gradient ascent, also called iterated FGSM.

    .. math:: \delta \leftarrow \Pi_{\|\delta\|_p\le\epsilon}
              \big(\delta+\eta\,\operatorname*{argmax}_{\|d\|_p=1}\langle\nabla_x\ell,d\rangle\big)

    Parameters
    ----------
    model, x, y, eps, p, bounds, criterion
        As in :func:`fgsm`.
    steps : int
        Number of steps.
    step_size : float or Tensor, optional
        :math:`\eta`; default :math:`2\epsilon/\text{steps}`.
    start : Tensor [n, ...] or [restarts, n, ...], optional
        Where :math:`\delta` starts, e.g. from :func:`random_start`; default 0.  With several, each
        example keeps the result with the highest loss.

    Returns
    -------
    Tensor [n, ...]
        The changed inputs, without a graph, each within ``eps`` of its original.  (With ``bounds``
        that holds if the original lies within them.)

    References
    ----------
    Kurakin, Goodfellow & Bengio, *Adversarial Examples in the Physical World*, ICLR 2017 workshop;
    Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018.

    Examples
    --------
    >>> model = lambda x: torch.cat([x, -x], 1)
    >>> x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([0])
    >>> pgd(lambda x: model(x[:, :1]), x, y, eps=0.25, p=2)
    tensor([[0.7500, 1.0000]])
    """
    _check(eps, p, bounds)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    whole("steps", steps)
    step_size = 2 * eps / steps if step_size is None else step_size
    starts = torch.zeros_like(x)[None] if start is None else start
    if starts.shape[-x.ndim :] != x.shape or starts.ndim > x.ndim + 1:
        raise ValueError(
            f"start must have shape {list(x.shape)}, optionally after a dimension of restarts, "
            f"got {list(starts.shape)}"
        )
    losses = lambda x: criterion(model(x), y)
    uphill = grad(lambda x: losses(x).sum())

    def into_the_ball(moved: Tensor) -> Tensor:
        moved = x + project(moved - x, eps, p)
        return moved if bounds is None else moved.clamp(*bounds)

    def climb(delta: Tensor) -> Tensor:
        moved = into_the_ball(x + delta)
        for _ in range(steps):
            moved = into_the_ball(moved + step_size * steepest(uphill(moved), p))
        return moved

    with torch.no_grad(), evaluation(model):  # `grad` works inside no_grad
        first, *others = starts.reshape(-1, *x.shape)
        strongest = climb(first)
        for delta in others:
            candidate = climb(delta)
            stronger = losses(candidate) > losses(strongest)
            strongest = torch.where(stronger.reshape(-1, *[1] * (x.ndim - 1)), candidate, strongest)
    return strongest


def random_start(shape: tuple[int, ...], eps: float, p: float = math.inf, seed: int = 0) -> Tensor:
    r"""Changes drawn uniformly from the ball :math:`\|\delta\|_p\le\epsilon`, for :func:`pgd`.

    Parameters
    ----------
    shape : tuple of int
        [restarts, n, ...].
    eps, p
        As in :func:`fgsm`.
    seed : int
        Seed of the draws; no global random state is read or changed.

    Returns
    -------
    Tensor
        float64, on the CPU.

    Examples
    --------
    >>> start = random_start((5, 100, 40), eps=0.1, p=2)
    >>> bool((start.norm(dim=-1) <= 0.1).all())
    True
    """
    _check(eps, p)
    # NumPy, because under vmap PyTorch refuses to draw, even from an explicit generator.
    random = np.random.default_rng(whole("seed", seed, 0))
    if p == math.inf:
        return torch.from_numpy(random.uniform(-eps, eps, shape))
    direction = torch.from_numpy(random.standard_normal(shape)).flatten(2)
    direction = direction / direction.norm(dim=2, keepdim=True)
    radius = eps * random.random((*shape[:2], 1)) ** (1 / direction.shape[2])
    return (torch.from_numpy(radius) * direction).reshape(shape)


@dataclass(frozen=True)
class Attack:
    """An attack as an instrument: the fraction of examples that are wrong under it.

    Parameters
    ----------
    eps, p, bounds
        As in :func:`fgsm`.
    steps, step_size
        As in :func:`pgd`.  ``Attack(eps, steps=1, step_size=eps)`` is :func:`fgsm`.
    restarts : int
        Number of random starts; 0 starts from the examples themselves.
    seed : int
        Seed of the random starts.
    source : callable, optional
        A model, from inputs to logits, that the attack is transferred from: its gradient is used.
        Default: white box.

    Examples
    --------
    >>> from flatmin import fit
    >>> from flatmin.book import MLP, two_gaussians
    >>> data = two_gaussians(test_size=100)
    >>> runs = fit(lambda: MLP(10, 16, 2), data, steps=20, seeds=3, networks="last")
    >>> networks = runs.networks
    >>> white = networks.measure(Attack(eps=0.5), data)
    >>> source = networks.module(seed=runs.seed.values[0])
    >>> transferred = networks.measure(Attack(eps=0.5, source=source), data)
    >>> bool((white >= transferred).all())
    True
    """

    eps: float
    steps: int = 10
    step_size: float | None = None
    p: float = math.inf
    restarts: int = 0
    bounds: Bounds = None
    seed: int = 0
    source: Model | None = None

    def __post_init__(self) -> None:
        _check(self.eps, self.p, self.bounds)
        whole("steps", self.steps)
        whole("restarts", self.restarts, 0)
        whole("seed", self.seed, 0)

    def perturb(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        """The inputs, changed against ``model``, or against ``source`` if there is one."""
        start = None
        if self.restarts:
            start = random_start((self.restarts, *x.shape), self.eps, self.p, self.seed)
            start = start.to(x.device, x.dtype)
        return pgd(
            self.source or model,
            x,
            y,
            self.eps,
            steps=self.steps,
            step_size=self.step_size,
            p=self.p,
            start=start,
            bounds=self.bounds,
        )

    def __call__(
        self, network: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, y: Tensor
    ) -> Tensor:
        moved = self.perturb(lambda x: network(params, x), x, y)
        return (network(params, moved).argmax(-1) != y).to(x.dtype).mean()


def _check(eps: float | Tensor, p: float, bounds: Bounds = None) -> None:
    hyperparameter("eps", eps, 0)
    if p not in (2, math.inf):
        raise ValueError(f"p must be 2 or inf, got {p!r}")
    if bounds is not None and not (len(bounds) == 2 and bounds[0] < bounds[1]):
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
