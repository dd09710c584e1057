"""For a training loop of your own: the methods in the forms that PyTorch users expect."""

from .flooding import FloodingLoss, flood_gradients_
from .mixup import BatchTransform
from .penalty import gradient_penalty
from .sam import SAM

__all__ = ["SAM", "BatchTransform", "FloodingLoss", "flood_gradients_", "gradient_penalty"]
