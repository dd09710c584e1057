"""Instruments: measurements of a trained network."""

from .._functional import dims, on
from .attack import error_under_attack, fgsm, pgd
from .flatness import sharpness
from .gram import (
    ClassStiffness,
    Stiffness,
    between_classes,
    class_matrix,
    class_stiffness,
    gradient_norm,
    residual_stiffness,
    stiffness,
    within_classes,
)
from .hessian import (
    Density,
    Eigenvalues,
    Lanczos,
    Trace,
    eigenvalues,
    hessian_product,
    hvp,
    lanczos,
    spectral_density,
    trace,
)
from .slices import loss_slice

__all__ = [
    "ClassStiffness",
    "Density",
    "Eigenvalues",
    "Lanczos",
    "Stiffness",
    "Trace",
    "between_classes",
    "class_matrix",
    "class_stiffness",
    "dims",
    "eigenvalues",
    "error_under_attack",
    "fgsm",
    "gradient_norm",
    "hessian_product",
    "hvp",
    "lanczos",
    "loss_slice",
    "on",
    "pgd",
    "residual_stiffness",
    "sharpness",
    "spectral_density",
    "stiffness",
    "trace",
    "within_classes",
]
