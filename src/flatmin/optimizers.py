"""The optimizer place of a recipe: what turns a gradient into a step.

These are ``torch.optim``'s update rules as pure functions, so that a stack of runs can be stepped
at once and every run can have a learning rate, momentum or weight decay of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._checks import whole

Params = dict[str, Tensor]
State = dict[str, Params]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def lr_factor(schedule: str | Callable[[float], float], done: float) -> float:
    """What a schedule multiplies the learning rate by when a fraction ``done`` of training is over.

    Examples
    --------
    >>> lr_factor("cosine", 0.0), lr_factor("cosine", 0.5), lr_factor(lambda done: 1 - done, 0.25)
    (1.0, 0.5, 0.75)
    """
    return float((SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(done))


def _check(place: Any, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(place, name)
        if isinstance(value, Tensor):  # a stack's values were checked one by one
            continue
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and low <= value < high):
            raise ValueError(f"{name} must be a number in [{low}, {high}), got {value!r}")
    if not callable(place.schedule) and place.schedule not in list(SCHEDULES):
        raise ValueError(
            f"schedule must be one of {sorted(SCHEDULES)} or a function of the fraction of "
            f"training done, got {place.schedule!r}"
        )


def _plus(y: Tensor, a: float | Tensor, x: Tensor) -> Tensor:
    """y + a x in one pass over memory, which is what bounds a stack's speed."""
    return torch.addcmul(y, x, a) if isinstance(a, Tensor) else torch.add(y, x, alpha=a)


def _decayed(grads: Params, weight_decay: float | Tensor, params: Params) -> Params:
    """The gradients with weight decay added to them."""
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return grads
    return {name: _plus(grads[name], weight_decay, w) for name, w in params.items()}


@dataclass(frozen=True)
class SGD:
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
    >>> step({"w": torch.tensor(1.0)}, {"w": torch.tensor(0.2)}, {}, t=0, factor=1.0)
    ({'w': tensor(0.9000)}, {})
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        _check(self, lr=(0, math.inf), momentum=(0, 1), weight_decay=(0, math.inf))

    def init(self, params: Params) -> State:
        if not isinstance(self.momentum, Tensor) and self.momentum == 0:
            return {}
        return {"velocity": {name: torch.zeros_like(w) for name, w in params.items()}}

    def __call__(
        self, params: Params, grads: Params, state: State, t: int, factor: float
    ) -> tuple[Params, State]:
        lr, grads = self.lr * factor, _decayed(grads, self.weight_decay, params)
        new: Params = {}
        velocity: Params = {}
        for name, w in params.items():
            g = grads[name]
            if state:
                velocity[name] = v = _plus(g, self.momentum, state["velocity"][name])
                g = _plus(g, self.momentum, v) if self.nesterov else v
            new[name] = _plus(w, -lr, g)
        return new, {"velocity": velocity} if state else {}


@dataclass(frozen=True)
class TwoRates:
    r"""Gradient descent that takes every ``period``-th step *up*, with a smaller rate.

    .. math::
        \theta \leftarrow \theta - \varepsilon_t\,(g + \lambda\theta), \qquad
        \varepsilon_t = \begin{cases} -\varepsilon_2 & \text{each period's last step} \\
        \varepsilon_1 & \text{otherwise} \end{cases}

    Flooding without a level, from the start.  A step down and a step up together (``period=2``)
    make one step of rate :math:`\varepsilon_1-\varepsilon_2` on
    :math:`L+\frac{\varepsilon_1\varepsilon_2}{2(\varepsilon_1-\varepsilon_2)}\|g\|^2`, but for
    :math:`O(\varepsilon^3)`; at equal rates they descend :math:`\|g\|^2` alone.

    Parameters
    ----------
    lr, ascent_lr : float
        The rates :math:`\varepsilon_1 \ge 0` down and :math:`\varepsilon_2 \ge 0` up.
    period : int
        At least 2; 2 takes turns.
    weight_decay : float
        :math:`\lambda \ge 0`; part of what is descended and ascended.
    schedule : str or callable
        Multiplies both rates, as in :class:`SGD`.

    Examples
    --------
    On :math:`L=\frac12w^2` a pair multiplies w by :math:`(1-\varepsilon_1)(1+\varepsilon_2)`:

    >>> step, w = TwoRates(lr=0.5, ascent_lr=0.2), {"w": torch.tensor(1.0)}
    >>> for t in range(2):
    ...     w, _ = step(w, w, {}, t=t, factor=1.0)       # the gradient of L is w
    >>> w
    {'w': tensor(0.6000)}
    """

    lr: float = 0.1
    ascent_lr: float = 0.05
    period: int = 2
    weight_decay: float = 0.0
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        _check(self, lr=(0, math.inf), ascent_lr=(0, math.inf), weight_decay=(0, math.inf))
        whole("period", self.period, 2)

    def init(self, params: Params) -> State:
        return {}

    def __call__(
        self, params: Params, grads: Params, state: State, t: int, factor: float
    ) -> tuple[Params, State]:
        rate = (self.lr if (t + 1) % self.period else -self.ascent_lr) * factor
        grads = _decayed(grads, self.weight_decay, params)
        return {name: _plus(w, -rate, grads[name]) for name, w in params.items()}, {}


@dataclass(frozen=True)
class Adam:
    r"""Adam (Kingma & Ba, 2015, Algorithm 1).

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad s \leftarrow \beta_2 s + (1-\beta_2) g^2,
        \quad \theta \leftarrow \theta - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{s/(1-\beta_2^t)}+\epsilon}

    Parameters
    ----------
    lr, beta1, beta2, eps : float
        As above; ``weight_decay`` is added to the gradient, ``schedule`` as in :class:`SGD`.

    Examples
    --------
    >>> step = Adam(lr=0.1)
    >>> w = {"w": torch.tensor(1.0)}
    >>> new, _ = step(w, {"w": torch.tensor(30.0)}, step.init(w), t=0, factor=1.0)
    >>> new                          # the first step is lr long, whatever the gradient's size
    {'w': tensor(0.9000)}
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: str | Callable[[float], float] = "constant"

    def __post_init__(self) -> None:
        _check(
            self,
            lr=(0, math.inf),
            beta1=(0, 1),
            beta2=(0, 1),
            eps=(0, math.inf),
            weight_decay=(0, math.inf),
        )

    def init(self, params: Params) -> State:
        zeros = lambda: {name: torch.zeros_like(w) for name, w in params.items()}
        return {"mean": zeros(), "square": zeros()}

    def __call__(
        self, params: Params, grads: Params, state: State, t: int, factor: float
    ) -> tuple[Params, State]:
        lr, grads = self.lr * factor, _decayed(grads, self.weight_decay, params)
        new: Params = {}
        mean: Params = {}
        square: Params = {}
        for name, w in params.items():
            g = grads[name]
            mean[name] = m = self.beta1 * state["mean"][name] + (1 - self.beta1) * g
            square[name] = s = self.beta2 * state["square"][name] + (1 - self.beta2) * g * g
            m, s = m / (1 - self.beta1 ** (t + 1)), s / (1 - self.beta2 ** (t + 1))
            new[name] = w - lr * m / (s.sqrt() + self.eps)
        return new, {"mean": mean, "square": square}
