"""The optimizer stage: from the direction to the step.

These are ``torch.optim``'s update rules as pure functions, so that a stack of runs can be stepped
at once and every run can have its own learning rate, momentum or weight decay.
"""

from .._schedule import lr_factor
from .adam import Adam
from .averaging import EMA, SWA
from .sgd import SGD, TwoRates

__all__ = ["EMA", "SGD", "SWA", "Adam", "TwoRates", "lr_factor"]
