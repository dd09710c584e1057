r"""Attacks: the small change of an input that raises its loss most.

.. math:: \max_{\|\delta\|_p\le\epsilon}\ \ell\big(f(x+\delta),\,y\big)

:func:`fgsm` takes one step, :func:`pgd` several.  Both are pure functions of a model, inputs and
labels, and compose with ``torch.func``; :func:`error_under_attack` is the instrument.  An attack is
*white box* when it uses the gradient of the network that it attacks, and *transferred* when it uses
that of another.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from .._ball import dual_norm_perturbation, project
from .._checks import hyperparameter, number, whole
from .._contracts import Loss, Network
from .._functional import check_examples, evaluation
from .._targets import checked_losses, error, example_losses
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

    For p = 2, along :math:`\nabla_x\ell/\|\nabla_x\ell\|`; for any p the
    :func:`~flatmin.dual_norm_perturbation` of each example, the optimum for a loss that is linear
    in x.

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
        :math:`\epsilon\ge0`, in the unit of the inputs: one number, or one per example, [n].
    p : float
        The norm that bounds the change of an example, in [1, ∞].
    criterion : callable
        From logits and y to one loss per example, [n].  To attack a targeted class, pass that class as y and
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
    return pgd(model, x, y, eps, p=p, steps=1, step_size=eps, criterion=criterion)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    p: float = math.inf,
    steps: int = 10,
    step_size: float | Tensor | None = None,
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
        :math:`\eta`, one number or [n]; default :math:`2\epsilon/\text{steps}`.

    Returns
    -------
    Tensor [n, ...]
        The changed inputs, without a graph, each within ``eps`` of its original.

    Notes
    -----
    For other p than 2 and ∞, a change out of the ball is scaled back, not to the closest point.

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
    check_examples("", x, y)
    number("p", p, 1, infinite=True)
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    _check_sizes(x, eps, step_size)
    step_size = 2 * eps / whole("steps", steps) if step_size is None else step_size
    eps, step_size = (v.to(x.dtype) if isinstance(v, Tensor) else v for v in (eps, step_size))
    each = lambda size: 0 if isinstance(size, Tensor) and size.ndim else None
    steepest: Any = partial(dual_norm_perturbation, p=p)
    if p == math.inf:  # the same, without its scaling
        steepest = lambda g, size: size * (g.sign() + 0 * g)
    climb = vmap(steepest, (0, each(step_size)))
    within = vmap(partial(project, p=p), (0, each(eps)))
    alone = isinstance(model, (torch.jit.ScriptModule, torch.nn.DataParallel))  # keep their buffers
    buffers = [] if alone or not isinstance(model, torch.nn.Module) else [*model.named_buffers()]

    def loss(moved: Tensor) -> Tensor:
        # copies, as a pass may change them in place
        x, own = moved.clone(), {name: b.clone() for name, b in buffers}
        output = functional_call(model, own, (x,)) if own else model(x)  # type: ignore[arg-type]
        losses = checked_losses(criterion(output, y), x, y)
        if not losses.requires_grad:
            raise ValueError(
                "model and criterion must be differentiable by x, got no gradient: is there an "
                "argmax, detach() or no_grad()?"
            )
        return losses.sum()

    uphill = grad(loss)
    moved = x
    with torch.no_grad(), evaluation(model):  # `grad` works inside no_grad
        for _ in range(whole("steps", steps)):
            moved = x + within(moved + climb(uphill(moved), step_size) - x, eps)
    return moved


def _check_sizes(x: Tensor, eps: Any, step_size: Any) -> None:
    """``eps`` and ``step_size``: one number, or one per example."""
    for name, size in {"eps": eps, "step_size": 0.0 if step_size is None else step_size}.items():
        hyperparameter(name, size, 0)
        if isinstance(size, Tensor) and size.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"{name} must be one number or one per example, shape ({len(x)},), "
                f"got shape {tuple(size.shape)}"
            )


def error_under_attack(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    p: float = math.inf,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    source: Model | None = None,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Tensor:
    """Instrument: the fraction of examples that are wrong under :func:`pgd`.

    Parameters
    ----------
    network : callable
        ``network(params, x)`` gives logits [n, ..., K], the classes last.
    y : Tensor
        Classes [n, ...].
    eps, p, steps, step_size, criterion
        As in :func:`pgd`; ``steps=1, step_size=eps`` is :func:`fgsm`.
    source : callable, optional
        A model, from inputs to logits, that the attack is transferred from: its gradient is used.
        Default: white box.  Its weights keep their type, which must be that of the network.
    batch_size : int, optional
        How many examples are attacked at once.  Default: all.

    Returns
    -------
    Tensor
        One number between 0 and 1; NaN if one of the logits is.

    Examples
    --------
    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(1, 2, bias=False)        # class 0 is where x is positive
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> on(model, error_under_attack, torch.tensor([[1.0], [0.2]]), torch.tensor([0, 0]), eps=0.25)
    tensor(0.5000)
    """
    model = (lambda x: network(params, x)) if source is None else source
    size = len(x) if batch_size is None else whole("batch_size", batch_size)
    _check_sizes(x, eps, step_size)

    def wrong(x: Tensor, y: Tensor, eps: Any, step_size: Any) -> Tensor:
        moved = pgd(model, x, y, eps, p=p, steps=steps, step_size=step_size, criterion=criterion)
        logits = network(params, moved)
        found = error(logits, y)
        return torch.where(logits.isnan().any(-1), math.nan, found)

    of_batches = lambda v: v.split(size) if isinstance(v, Tensor) and v.ndim else repeat(v)
    batches = zip(x.split(size), y.split(size), of_batches(eps), of_batches(step_size))
    return torch.cat([wrong(*batch) for batch in batches]).to(x.dtype).mean()
