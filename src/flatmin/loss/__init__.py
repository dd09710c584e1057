"""The loss stage: from per-example losses to one number."""

from .flooding import Flooding, flood

__all__ = ["Flooding", "flood"]
