"""The loss stage: from the losses of the examples to one number."""

from .flooding import Flooding, flood

__all__ = ["Flooding", "flood"]
