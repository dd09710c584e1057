"""Experiments that take too long for a notebook; each has a module, a command and a record.

``python -m flatmin.book.experiments NAME`` runs one and writes ``results/NAME.nc.xz``; the chapters
plot what :func:`flatmin.book.experiments.record` reads from there.
"""

from .display import full_scale
from .records import FOLDERS, NAMES, check, default_size, experiment, plot, record, save
from .runner import Work, plan, run

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
