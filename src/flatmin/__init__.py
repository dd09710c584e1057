"""flatmin: flooding, gradient penalties, mixup, SAM and the instruments that measure flatness.

A training step is a pipeline, and the folders are its stages::

    batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer

:mod:`flatmin.batch`, :mod:`flatmin.loss`, :mod:`flatmin.gradient` and :mod:`flatmin.optimizer` hold
what can fill a stage, :mod:`flatmin.measure` the instruments, and :mod:`flatmin.loops` the same
methods for a training loop of your own.  :mod:`flatmin.book` holds what the book's chapters share.
The top level exports what most people need.
"""

from . import batch, gradient, layers, loops, loss, measure, optimizer  # noqa: F401
from ._ball import dual_norm_perturbation
from ._targets import soft_targets
from .batch import mix, mix_losses
from .data import Data
from .gradient import sam_gradient
from .loops import SAM, BatchTransform, FloodingLoss, flood_gradients_, gradient_penalty
from .loss import flood
from .measure import (
    eigenvalues,
    fgsm,
    gradient_norm,
    hvp,
    loss_slice,
    pgd,
    sharpness,
    spectral_density,
    stiffness,
)
from .pipeline import Recipe
from .stack import Networks, Runs, best_step, fit

__all__ = [
    "BatchTransform",
    "Data",
    "FloodingLoss",
    "Networks",
    "Recipe",
    "Runs",
    "SAM",
    "best_step",
    "dual_norm_perturbation",
    "eigenvalues",
    "fgsm",
    "fit",
    "flood",
    "flood_gradients_",
    "gradient_norm",
    "gradient_penalty",
    "hvp",
    "loss_slice",
    "mix",
    "mix_losses",
    "pgd",
    "sam_gradient",
    "sharpness",
    "soft_targets",
    "spectral_density",
    "stiffness",
]

__version__ = "0.2.0.dev0"
