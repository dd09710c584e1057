r"""Attacks: the small change of an input that raises its loss most.

.. math:: \max_{\|\delta\|_p\le\epsilon}\ \ell\big(f(x+\delta),\,y\big), \qquad p\in\{2,\infty\}

:func:`fgsm` takes one step, :func:`pgd` several.  Both are pure functions of a model, inputs and
labels, and compose with ``torch.func``; :func:`error_under_attack` is the instrument.  An attack is
*white box* when it uses the gradient of the network that it attacks, and *transferred* when it uses
that of another.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from .._checks import hyperparameter, whole
from .._functional import Loss, Network, evaluation
from .._targets import example_losses
from .._tree import Params

__all__ = ["error_under_attack", "fgsm", "pgd"]

Model = Callable[[Tensor], Tensor]


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    p: float = math.inf,
    criterion: Loss = example_losses,
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
    return pgd(model, x, y, eps, steps=1, step_size=eps, p=p, criterion=criterion)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    p: float = math.inf,
    criterion: Loss = example_losses,
) -> Tensor:
    r"""Projected gradient ascent from x, also called iterated FGSM.

    .. math:: \delta \leftarrow \Pi_{\|\delta\|_p\le\epsilon}
              \big(\delta+\eta\,\operatorname*{argmax}_{\|d\|_p=1}\langle\nabla_x\ell,d\rangle\big)

    Parameters
    ----------
    model, x, y, eps, p, criterion
        As in :func:`fgsm`.
    steps : int
        Number of steps.
    step_size : float or Tensor, optional
        :math:`\eta`; default :math:`2\epsilon/\text{steps}`.

    Returns
    -------
    Tensor [n, ...]
        The changed inputs, without a graph, each within ``eps`` of its original.

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
    hyperparameter("eps", eps, 0)
    if p not in (2, math.inf):
        raise ValueError(f"p must be 2 or inf, got {p!r}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    step_size = 2 * eps / whole("steps", steps) if step_size is None else step_size
    hyperparameter("step_size", step_size, 0)
    uphill = grad(lambda x: criterion(model(x), y).sum())
    moved = x
    with torch.no_grad(), evaluation(model):  # `grad` works inside no_grad
        for _ in range(whole("steps", steps)):
            delta = moved + step_size * _steepest(uphill(moved), p) - x
            moved = x + _project(delta, eps, p)
    return moved


def error_under_attack(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    p: float = math.inf,
    source: Model | None = None,
    criterion: Loss = example_losses,
) -> Tensor:
    """Instrument: the fraction of examples that are wrong under :func:`pgd`.

    Parameters
    ----------
    eps, steps, step_size, p, criterion
        As in :func:`pgd`; ``steps=1, step_size=eps`` is :func:`fgsm`.
    source : callable, optional
        A model, from inputs to logits, that the attack is transferred from: its gradient is used.
        Default: white box.

    Returns
    -------
    Tensor
        One number between 0 and 1.

    Examples
    --------
    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(1, 2, bias=False)        # class 0 is where x is positive
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> on(model, error_under_attack, torch.tensor([[1.0], [0.2]]), torch.tensor([0, 0]), eps=0.25)
    tensor(0.5000)
    """
    model = (lambda x: network(params, x)) if source is None else source
    moved = pgd(model, x, y, eps, steps=steps, step_size=step_size, p=p, criterion=criterion)
    return (network(params, moved).argmax(-1) != y).to(x.dtype).mean()


def _steepest(g: Tensor, p: float) -> Tensor:
    """For each example the direction of unit p-norm with the largest ⟨g, d⟩; 0 where g is 0."""
    if p == math.inf:
        return g.sign()
    tiny = torch.finfo(g.dtype).tiny
    flat = g.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)  # squares underflow
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(tiny)).reshape(g.shape)


def _project(delta: Tensor, eps: float | Tensor, p: float) -> Tensor:
    """For each example the closest point of the ball of radius eps."""
    if p == math.inf:
        return delta.clamp(-eps, eps)  # type: ignore[arg-type]  # two floats or two tensors
    norm = delta.flatten(1).norm(dim=1).reshape(-1, *[1] * (delta.ndim - 1))
    return delta * (eps / norm.clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)
