"""The gradient stage: from the loss to the direction that is descended."""

from .._ball import dual_norm_perturbation
from .penalty import GradientPenalty
from .plain import PlainGradient
from .sam import SAM, sam_gradient

__all__ = [
    "SAM",
    "GradientPenalty",
    "PlainGradient",
    "dual_norm_perturbation",
    "sam_gradient",
]
