"""The batch stage: what a network is shown in place of the examples."""

from .._targets import soft_targets
from .cutmix import CutMix
from .mixup import Mixup, combine, dirichlet_weights, mix, mix_losses
from .noise import Dirac, Gaussian, LabelSmoothing

__all__ = [
    "CutMix",
    "Dirac",
    "Gaussian",
    "LabelSmoothing",
    "Mixup",
    "combine",
    "dirichlet_weights",
    "mix",
    "mix_losses",
    "soft_targets",
]
