"""The first edition's name for :mod:`flatmin.book.check`, the checks of the assignments."""

from .book.check import *  # noqa: F403
