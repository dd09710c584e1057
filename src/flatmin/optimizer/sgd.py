"""Gradient descent with momentum, or with separate rates for descent and ascent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import hyperparameter, whole
from .._schedule import check_schedule, lr_factor
from .._stage import OptimizerStage
from .._tree import Params, decayed, fused_plus

__all__ = ["SGD", "TwoRates"]


@dataclass(frozen=True)
class SGD(OptimizerStage):
    r"""Gradient descent with momentum :math:`\mu` and weight decay :math:`\lambda`.

    .. math:: v \leftarrow \mu v + (g + \lambda\theta), \qquad \theta \leftarrow \theta - \eta v

    Parameters
    ----------
    lr : float
        The learning rate :math:`\eta \ge 0`.
    momentum : float
        :math:`\mu` in [0, 1).
    weight_decay : float
        :math:`\lambda \ge 0`, added to the gradient after flooding or any other method: the
        penalty itself is never flooded.
    nesterov : bool
        Step along :math:`g + \mu v` instead of :math:`v`.
    schedule : str or callable
        ``"constant"``, ``"cosine"``, or a function from the fraction of training done to a factor.

    Examples
    --------
    >>> step = SGD(lr=0.5)
    >>> step({"w": torch.tensor(0.2)}, {"w": torch.tensor(1.0)}, {}, t=0)
    ({'w': tensor(0.9000)}, {})
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        hyperparameter("lr", self.lr, 0)
        hyperparameter("momentum", self.momentum, 0, 1, below=True)
        hyperparameter("weight_decay", self.weight_decay, 0)
        check_schedule(self.schedule)

    def init(self, params: Params) -> dict[str, Params]:
        if not isinstance(self.momentum, Tensor) and self.momentum == 0:
            return {}
        return {"velocity": {name: torch.zeros_like(w) for name, w in params.items()}}

    def __call__(
        self, grads: Params, params: Params, state: dict[str, Params], t: int
    ) -> tuple[Params, dict[str, Params]]:
        lr = self.lr * lr_factor(self.schedule, t)
        grads = decayed(grads, self.weight_decay, params)
        new: Params = {}
        velocity: Params = {}
        for name, w in params.items():
            g = grads[name]
            if state:
                velocity[name] = v = fused_plus(g, self.momentum, state["velocity"][name])
                g = fused_plus(g, self.momentum, v) if self.nesterov else v
            new[name] = fused_plus(w, -lr, g)
        return new, {"velocity": velocity} if state else {}


@dataclass(frozen=True)
class TwoRates(OptimizerStage):
    r"""Gradient descent that takes every ``period``-th step *up*, with a smaller rate.

    .. math::
        \theta \leftarrow \theta - \varepsilon_t\,(g + \lambda\theta), \qquad
        \varepsilon_t = \begin{cases} -\varepsilon_2 & \text{each period's last step} \\
        \varepsilon_1 & \text{otherwise} \end{cases}

    This is flooding without a level, from the start.  A step down and a step up together
    (``period=2``) make one step of rate :math:`\varepsilon_1-\varepsilon_2` on
    :math:`L+\frac{\varepsilon_1\varepsilon_2}{2(\varepsilon_1-\varepsilon_2)}\|g\|^2`, up to
    :math:`O(\varepsilon^3)`; at equal rates they descend :math:`\|g\|^2` alone.

    Parameters
    ----------
    lr, ascent_lr : float
        The rates :math:`\varepsilon_1 \ge 0` down and :math:`\varepsilon_2 \ge 0` up.
    period : int
        At least 2; 2 alternates.
    weight_decay : float
        :math:`\lambda \ge 0`; added to the gradient in both kinds of step.
    schedule : str or callable
        Multiplies both rates, as in :class:`SGD`.

    Examples
    --------
    On :math:`L=\frac12w^2` a pair multiplies w by :math:`(1-\varepsilon_1)(1+\varepsilon_2)`:

    >>> step, w = TwoRates(lr=0.5, ascent_lr=0.2), {"w": torch.tensor(1.0)}
    >>> for t in range(2):
    ...     w, _ = step(w, w, (), t)       # the gradient of L is w
    >>> w
    {'w': tensor(0.6000)}
    """

    lr: float = 0.1
    ascent_lr: float = 0.05
    period: int = 2
    weight_decay: float = 0.0
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        for name in ("lr", "ascent_lr", "weight_decay"):
            hyperparameter(name, getattr(self, name), 0)
        check_schedule(self.schedule)
        whole("period", self.period, 2)

    def __call__(self, grads: Params, params: Params, state: Any, t: int) -> tuple[Params, Any]:
        rate = self.lr if (t + 1) % self.period else -self.ascent_lr
        rate = rate * lr_factor(self.schedule, t)
        grads = decayed(grads, self.weight_decay, params)
        return {name: fused_plus(w, -rate, grads[name]) for name, w in params.items()}, state
