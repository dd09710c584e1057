"""Instruments: measurements of a trained network."""

from .._functional import dims, on
from .._pairs import (
    CriticalLength,
    between_classes,
    class_matrix,
    critical_length,
    input_distance,
    within_classes,
)
from .attack import error_under_attack, fgsm, pgd
from .flatness import sharpness
from .gram import (
    ClassStiffness,
    Stiffness,
    class_stiffness,
    gradient_norm,
    residual_stiffness,
    stiffness,
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
from .slices import filter_normalized, loss_slice

__all__ = [
    "ClassStiffness",
    "CriticalLength",
    "Density",
    "Eigenvalues",
    "Lanczos",
    "Stiffness",
    "Trace",
    "between_classes",
    "class_matrix",
    "class_stiffness",
    "critical_length",
    "dims",
    "eigenvalues",
    "error_under_attack",
    "fgsm",
    "filter_normalized",
    "gradient_norm",
    "hessian_product",
    "hvp",
    "input_distance",
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
