"""The optimizer place of a recipe: what turns a gradient into a step.

These are ``torch.optim``'s update rules as pure functions, so that a stack of runs can be stepped
at once and every run can have a learning rate, momentum or weight decay of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

Params = dict[str, Tensor]

SCHEDULES = {
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


def _check(place, **ranges) -> None:
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

    def __post_init__(self):
        _check(self, lr=(0, math.inf), momentum=(0, 1), weight_decay=(0, math.inf))

    def init(self, params: Params) -> dict[str, Params]:
        if not isinstance(self.momentum, Tensor) and self.momentum == 0:
            return {}
        return {"velocity": {name: torch.zeros_like(w) for name, w in params.items()}}

    def __call__(self, params: Params, grads: Params, state: dict, t: int, factor: float):
        lr = self.lr * factor
        new, velocity = {}, {}
        for name, w in params.items():
            g = grads[name]
            if isinstance(self.weight_decay, Tensor) or self.weight_decay:
                g = _plus(g, self.weight_decay, w)
            if state:
                velocity[name] = v = _plus(g, self.momentum, state["velocity"][name])
                g = _plus(g, self.momentum, v) if self.nesterov else v
            new[name] = _plus(w, -lr, g)
        return new, {"velocity": velocity} if state else {}


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

    def __post_init__(self):
        _check(self, lr=(0, math.inf), beta1=(0, 1), beta2=(0, 1), eps=(0, math.inf),
               weight_decay=(0, math.inf))

    def init(self, params: Params) -> dict[str, Params]:
        zeros = lambda: {name: torch.zeros_like(w) for name, w in params.items()}
        return {"mean": zeros(), "square": zeros()}

    def __call__(self, params: Params, grads: Params, state: dict, t: int, factor: float):
        lr = self.lr * factor
        new, mean, square = {}, {}, {}
        for name, w in params.items():
            g = grads[name]
            if isinstance(self.weight_decay, Tensor) or self.weight_decay:
                g = _plus(g, self.weight_decay, w)
            mean[name] = m = self.beta1 * state["mean"][name] + (1 - self.beta1) * g
            square[name] = s = self.beta2 * state["square"][name] + (1 - self.beta2) * g * g
            m, s = m / (1 - self.beta1 ** (t + 1)), s / (1 - self.beta2 ** (t + 1))
            new[name] = w - lr * m / (s.sqrt() + self.eps)
        return new, {"mean": mean, "square": square}
