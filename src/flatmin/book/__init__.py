"""What the book's chapters and its course share: data sets, networks, claims, statistics.

Figures are in :mod:`flatmin.book.plotting` and :mod:`flatmin.book.explorable`, experiments too long
for a notebook in :mod:`flatmin.book.experiments`, checks of assignments in ``flatmin.book.check``.
"""

from .._random import first_seed, seeds
from .claims import checks, claim, stated
from .datasets import (
    CIFAR100_SUPERCLASS,
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
from .distance import CriticalLength, critical_length, input_distance
from .evidence import keep, kept
from .models import MLP, ResNet, SmallCNN, resnet20
from .statistics import mean_interval, pm

__all__ = [
    "CIFAR100_SUPERCLASS",
    "CriticalLength",
    "MLP",
    "ResNet",
    "SmallCNN",
    "cifar10",
    "checks",
    "cifar100",
    "claim",
    "critical_length",
    "digits",
    "fashion_mnist",
    "first_seed",
    "input_distance",
    "keep",
    "kept",
    "mean_interval",
    "mnist",
    "mnist1d",
    "pm",
    "resnet20",
    "seeds",
    "sinusoid",
    "spiral",
    "stated",
    "two_gaussians",
]
