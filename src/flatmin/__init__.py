"""flatmin: flooding and its neighbours, tested, for training loops and for the book Flat Minima."""

from .claims import claim, first_seed, seeds
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
from .models import MLP, ResNet, SmallCNN, resnet18, resnet20, resnet32
from .optimizers import SGD, Adam, TwoRates
from .penalty import GradientPenalty, gradient_norm, gradient_penalty
from .statistics import mean_interval, pm
from .training import Networks, Recipe, best_step, fit

__version__ = "0.1.0"
