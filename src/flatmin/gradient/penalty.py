r"""Gradient penalties: descend to where the loss is low *and* its gradient is small.

One direction covers the whole family, with :math:`g=\nabla L` and :math:`H` its Hessian:

.. math::
    d = g + \lambda H v, \qquad
    v = g \;\text{ descends }\; L + \tfrac\lambda2\|g\|^2, \qquad
    v = g/\|g\| \;\text{ descends }\; L + \lambda\|g\|,

with :math:`Hv` exact, or as the difference of two gradients.  Its members include SAM, its
unnormalized form, the penalized gradient norm, implicit gradient regularization and the two-rate
form of flooding.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch.func import grad, grad_and_value, vjp

from .._ball import dual_norm_perturbation
from .._checks import hyperparameter, number
from .._objective import Objective
from .._stage import GradientStage
from .._tree import Params, flatten, plus, unflatten

__all__ = ["GradientPenalty"]


ENDS = {"forward": (1, 0), "backward": (0, -1), "central": (1, -1)}  # in units of rv


def _unit(v: Params) -> Params:
    """v / ‖v‖, or zero if v is zero."""
    shapes = {name: x.shape for name, x in v.items()}
    return unflatten(dual_norm_perturbation(flatten(v), rho=1.0), shapes)


@dataclass(frozen=True)
class GradientPenalty(GradientStage):
    r"""Gradient stage of a recipe: the gradient of a penalized loss.

    .. math:: d = g + \lambda D_r v, \qquad v = g \text{ or } g/\|g\|

    where :math:`D_rv` is the Hessian-vector product :math:`Hv`, or one of

    ============  =======================================  ==========================
    difference    :math:`D_r v`                            error
    ============  =======================================  ==========================
    ``None``      :math:`Hv`                               none
    ``forward``   :math:`[g(\theta+rv)-g(\theta)]/r`       :math:`O(r)`
    ``backward``  :math:`[g(\theta)-g(\theta-rv)]/r`       :math:`O(r)`
    ``central``   :math:`[g(\theta+rv)-g(\theta-rv)]/2r`   :math:`O(r^2)`
    ============  =======================================  ==========================

    No Hessian is ever formed.  In units of one gradient, the exact form costs about 3 (it
    differentiates backwards through the gradient), forward and backward 2, central 3.

    Parameters
    ----------
    penalty : float
        The weight :math:`\lambda \ge 0`; a grid may give one per run.  0 is the plain gradient.
    squared : bool
        ``True``: penalize :math:`\frac\lambda2\|g\|^2`, so :math:`v=g`.
        ``False``: penalize :math:`\lambda\|g\|`, so :math:`v=g/\|g\|` (0 at a zero gradient).
    difference : {None, "forward", "backward", "central"}
        How :math:`Hv` is computed.
    radius : float, optional
        :math:`r > 0` of a difference; by default :math:`r=\lambda`.  The point moves by
        :math:`r\|v\|`: in float32 keep that well above the weights' rounding errors (1e-3 of their
        size is safe, 1e-6 is noise).

    Notes
    -----
    With :math:`\alpha=\lambda/r` the forward difference is
    :math:`d=(1-\alpha)\,g(\theta)+\alpha\,g(\theta+rv)`, so at the default :math:`r=\lambda` it
    is the gradient at the displaced point, as in SAM.  Batch statistics (batch normalization) are
    those of the first evaluation.

    A flooded loss may be penalized too: below the level both :math:`g` and :math:`H` change sign,
    so the exact :math:`Hg` does not.

    References
    ----------
    Barrett & Dherin, *Implicit Gradient Regularization*, ICLR 2021; Foret et al.,
    *Sharpness-Aware Minimization*, ICLR 2021; Zhao, Zhang & Hu, *Penalizing Gradient Norm for
    Efficiently Improving Generalization*, ICML 2022; Karakida et al., *Understanding Gradient
    Regularization in Deep Learning*, ICML 2023.

    Examples
    --------
    For :math:`L=\frac12hw^2` the penalized gradient is :math:`hw+\lambda h^2w`:

    >>> import torch
    >>> bowl = Objective.of(lambda params: 0.5 * 3.0 * params["w"] ** 2)
    >>> GradientPenalty(0.1)(bowl, {"w": torch.tensor(2.0)}, (), t=0)[0]
    {'w': tensor(7.8000)}
    """

    penalty: float = 0.0
    squared: bool = True
    difference: str | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        hyperparameter("penalty", self.penalty, 0)
        if self.difference not in (None, *ENDS):
            raise ValueError(f"difference must be one of {(None, *ENDS)}, got {self.difference!r}")
        if self.radius is not None and self.difference is None:
            raise ValueError(
                f"radius is for a difference, but difference is None: got {self.radius!r}"
            )
        if isinstance(self.radius, Real) and not number("radius", self.radius, 0):
            raise ValueError(f"radius must be > 0, got {self.radius!r}")

    def __call__(
        self, objective: Objective, params: Params, state: Any, t: int
    ) -> tuple[Params, Any]:
        direction_of = (lambda g: g) if self.squared else _unit
        if self.difference is None:
            field: Any = grad_and_value(objective.value, has_aux=True)
            g, hessian_times, first_pass = vjp(field, params, has_aux=True)  # type: ignore[misc]
            objective.keep(*first_pass)
            return plus(g, hessian_times(direction_of(g))[0], self.penalty), state

        g = objective.gradient(params)
        v = direction_of(g)
        r = self.penalty if self.radius is None else self.radius
        alpha = 1.0 if self.radius is None else self.penalty / r
        high, low = ENDS[self.difference]
        at = lambda end: g if end == 0 else grad(objective)(plus(params, v, end * r))
        return plus(g, plus(at(high), at(low), -1), alpha / (high - low)), state

    # Members of the family by name: each returns an instance of the class above.

    @classmethod
    def sam(cls, rho: float) -> "GradientPenalty":
        r"""SAM with :math:`p=2`: :math:`g(\theta+\rho g/\|g\|)=\nabla(L+\rho\|g\|)+O(\rho^2)`."""
        return cls(rho, squared=False, difference="forward")

    @classmethod
    def unnormalized_sam(cls, rho: float) -> "GradientPenalty":
        r"""SAM without the division (Andriushchenko & Flammarion, ICML 2022):
        :math:`g(\theta+\rho g)=\nabla(L+\frac\rho2\|g\|^2)+O(\rho^2)`."""
        return cls(rho, difference="forward")

    @classmethod
    def penalized_norm(cls, alpha: float, radius: float) -> "GradientPenalty":
        r"""Zhao et al. (ICML 2022): :math:`(1-\alpha)g+\alpha\,g(\theta+rg/\|g\|)
        =\nabla(L+\alpha r\|g\|)+O(r^2)`; SAM at :math:`\alpha=1`."""
        penalty = number("alpha", alpha, 0) * number("radius", radius, 0)
        return cls(penalty, squared=False, difference="forward", radius=radius)
