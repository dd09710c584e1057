"""Weight averaging: train with one set of weights, and be judged by their average."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import hyperparameter, whole
from .._stage import OptimizerStage, Step
from .._tree import Params

__all__ = ["EMA", "SWA"]


@dataclass(frozen=True)
class EMA(OptimizerStage):
    r"""The exponential moving average of another optimizer's weights.

    .. math:: \bar\theta \leftarrow \beta\,\bar\theta + (1-\beta)\,\theta

    Training goes on with :math:`\theta`; what is evaluated and kept is :math:`\bar\theta`, which
    starts at the initial weights.

    Parameters
    ----------
    inner : optimizer stage
        What makes the steps.  ``grid={"optimizer.inner.lr": …}`` sweeps its rate.
    decay : float
        :math:`\beta` in [0, 1): an average over about :math:`1/(1-\beta)` steps.

    References
    ----------
    Polyak & Juditsky, *Acceleration of Stochastic Approximation by Averaging*, SIAM J. Control and
    Optimization 30 (1992).

    Examples
    --------
    >>> from flatmin.optimizer import SGD
    >>> ema, w = EMA(SGD(lr=1.0), decay=0.5), {"w": torch.tensor(0.0)}
    >>> w, state = ema({"w": torch.tensor(-8.0)}, w, ema.init(w), t=0)
    >>> w, ema.evaluated(w, state)
    ({'w': tensor(8.)}, {'w': tensor(4.)})
    """

    inner: OptimizerStage
    decay: float = 0.99

    def __post_init__(self) -> None:
        hyperparameter("decay", self.decay, 0, 1, below=True)

    def init(self, params: Params) -> Any:
        return self.inner.init(params), dict(params)

    def __call__(self, grads: Params, params: Params, state: Any, t: int) -> tuple[Params, Any]:
        inner, average = state
        params, inner = self.inner(grads, params, inner, t)
        average = {
            name: self.decay * mean + (1 - self.decay) * params[name]
            for name, mean in average.items()
        }
        return params, (inner, average)

    def evaluated(self, params: Params, state: Any) -> Params:
        """The average."""
        return state[1]


@dataclass(frozen=True)
class SWA(OptimizerStage):
    r"""Stochastic weight averaging: the plain mean of the weights late in training.

    .. math:: \bar\theta \leftarrow \bar\theta + \frac{\theta-\bar\theta}{k+1}

    after every ``every``-th step once a share ``start`` of the training is done, k such steps later.
    Until then the weights themselves are evaluated.

    Parameters
    ----------
    inner : optimizer stage
        What makes the steps, with a large, constant rate at the end.
    start : float
        The share of the training, in [0, 1), after which weights are averaged.
    every : int
        How many steps lie between two weights that are averaged.

    References
    ----------
    Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, UAI 2018.

    Examples
    --------
    >>> from flatmin.optimizer import SGD
    >>> swa, w = SWA(SGD(lr=1.0), start=0.5), {"w": torch.tensor(0.0)}
    >>> state = swa.init(w)
    >>> for t in range(4):
    ...     w, state = swa({"w": torch.tensor(-1.0)}, w, state, Step(t, of=4))
    >>> w, swa.evaluated(w, state)                  # the mean of 3 and 4
    ({'w': tensor(4.)}, {'w': tensor(3.5000)})
    """

    inner: OptimizerStage
    start: float = 0.75
    every: int = 1

    def __post_init__(self) -> None:
        hyperparameter("start", self.start, 0, 1, below=True)
        whole("every", self.every)

    def init(self, params: Params) -> Any:
        w = next(iter(params.values()))
        at_least_single = torch.promote_types(w.dtype, torch.float32)  # bfloat16 counts to 256
        count = torch.zeros((), dtype=at_least_single, device=w.device)
        return self.inner.init(params), dict(params), count

    def __call__(self, grads: Params, params: Params, state: Any, t: int) -> tuple[Params, Any]:
        if not isinstance(t, Step):
            raise TypeError(f"t must be a Step(t, of=steps), got {t!r}")
        inner, mean, count = state
        params, inner = self.inner(grads, params, inner, t)
        late: bool | Tensor = t.done >= self.start
        takes_part = late * float((t + 1) % self.every == 0) * torch.ones_like(count)
        count = count + takes_part
        share = takes_part / count.clamp_min(1)
        mean = {name: m + share.to(m.dtype) * (params[name] - m) for name, m in mean.items()}
        return params, (inner, mean, count)

    def evaluated(self, params: Params, state: Any) -> Params:
        """The mean, or the weights themselves where there is none yet."""
        _, mean, count = state
        return {name: torch.where(count > 0, mean[name], w) for name, w in params.items()}
