"""Adam, as a pure function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._checks import hyperparameter
from .._schedule import check_schedule, lr_factor
from .._stage import OptimizerStage
from .._tree import Params, decayed

__all__ = ["Adam"]


@dataclass(frozen=True)
class Adam(OptimizerStage):
    r"""Adam (Kingma & Ba, 2015, Algorithm 1).

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \quad s \leftarrow \beta_2 s + (1-\beta_2) g^2,
        \quad \theta \leftarrow \theta - \eta\,\frac{m/(1-\beta_1^t)}{\sqrt{s/(1-\beta_2^t)}+\epsilon}

    Parameters
    ----------
    lr, beta1, beta2, eps : float
        As above; ``weight_decay`` is added to the gradient, ``schedule`` as in
        :class:`~flatmin.optimizer.SGD`.

    Examples
    --------
    >>> step = Adam(lr=0.1)
    >>> w = {"w": torch.tensor(1.0)}
    >>> new, _ = step({"w": torch.tensor(30.0)}, w, step.init(w), t=0)
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
        for name in ("lr", "eps", "weight_decay"):
            hyperparameter(name, getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            hyperparameter(name, getattr(self, name), 0, 1, below=True)
        check_schedule(self.schedule)

    def init(self, params: Params) -> dict[str, Params]:
        zeros = lambda: {name: torch.zeros_like(w) for name, w in params.items()}
        return {"mean": zeros(), "square": zeros()}

    def __call__(
        self, grads: Params, params: Params, state: dict[str, Params], t: int
    ) -> tuple[Params, dict[str, Params]]:
        lr = self.lr * lr_factor(self.schedule, t)
        grads = decayed(grads, self.weight_decay, params)
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
