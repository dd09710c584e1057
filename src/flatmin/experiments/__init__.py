"""Experiments that are too long for a notebook: each a module, a command and a record.

``python -m flatmin.experiments NAME`` runs one and writes ``results/NAME.nc``; chapters draw what
:func:`flatmin.experiments.record` reads from there.
"""

from .core import plan, run
from .records import FOLDERS, NAMES, check, default_size, experiment, plot, record, save
from .shown import full_scale
from .work import Work

__all__ = [
    "FOLDERS",
    "NAMES",
    "Work",
    "check",
    "default_size",
    "experiment",
    "full_scale",
    "plan",
    "plot",
    "record",
    "run",
    "save",
]
