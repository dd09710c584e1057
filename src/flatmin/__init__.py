"""flatmin: flooding and its neighbours, tested, for training loops and for the book Flat Minima."""

from ._random import first_seed, seeds
from .attack import Attack, fgsm, pgd
from .claims import claim
from .data import (
    Data,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    mnist,
    mnist1d,
    sinusoid,
    spiral,
    two_gaussians,
)
from .flooding import Flooding, FloodingLoss, flood, flood_gradients_
from .landscape import LossSlice, filter_normalized, loss_slice, random_direction
from .mixup import (
    BatchTransform,
    Dirac,
    Gaussian,
    LabelSmoothing,
    Mixup,
    mix,
    mix_losses,
    soft_targets,
)
from .models import MLP, Dropout, ResNet, SmallCNN, resnet18, resnet20, resnet32
from .optimizers import SGD, Adam, TwoRates
from .penalty import GradientPenalty, gradient_norm, gradient_penalty
from .sam import SAM, SAMGradient, dual_norm_perturbation, sam_gradient
from .sharpness import AverageSharpness, Sharpness, average_sharpness
from .spectrum import (
    Density,
    HessianDensity,
    HessianEigenvalues,
    HessianTrace,
    eigenvalues,
    hessian_operator,
    hvp,
    lanczos,
    spectral_density,
)
from .statistics import mean_interval, pm
from .stiffness import (
    ClassStiffness,
    Stiffness,
    between_classes,
    class_matrix,
    critical_length,
    input_distance,
    network_stiffness,
    residual_stiffness,
    within_classes,
)
from .training import Networks, Recipe, best_step, fit

__all__ = [
    "Adam",
    "Attack",
    "AverageSharpness",
    "BatchTransform",
    "ClassStiffness",
    "Data",
    "Density",
    "Dirac",
    "Dropout",
    "Flooding",
    "FloodingLoss",
    "Gaussian",
    "GradientPenalty",
    "HessianDensity",
    "HessianEigenvalues",
    "HessianTrace",
    "LabelSmoothing",
    "LossSlice",
    "MLP",
    "Mixup",
    "Networks",
    "Recipe",
    "ResNet",
    "SAM",
    "SAMGradient",
    "SGD",
    "Sharpness",
    "SmallCNN",
    "Stiffness",
    "TwoRates",
    "average_sharpness",
    "best_step",
    "between_classes",
    "cifar10",
    "cifar100",
    "claim",
    "class_matrix",
    "critical_length",
    "digits",
    "dual_norm_perturbation",
    "eigenvalues",
    "fashion_mnist",
    "fgsm",
    "filter_normalized",
    "first_seed",
    "fit",
    "flood",
    "flood_gradients_",
    "gradient_norm",
    "gradient_penalty",
    "hessian_operator",
    "hvp",
    "input_distance",
    "lanczos",
    "loss_slice",
    "mean_interval",
    "mix",
    "mix_losses",
    "mnist",
    "mnist1d",
    "network_stiffness",
    "pgd",
    "pm",
    "random_direction",
    "residual_stiffness",
    "resnet18",
    "resnet20",
    "resnet32",
    "sam_gradient",
    "seeds",
    "sinusoid",
    "soft_targets",
    "spectral_density",
    "spiral",
    "two_gaussians",
    "within_classes",
]

__version__ = "0.2.0.dev0"
