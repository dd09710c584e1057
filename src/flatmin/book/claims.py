"""Claims: statements of the book's prose that a cell has just checked.

``claim`` prints one line, always the same, if the statement holds, and raises if it does not.  The
appendix of claims and ``make claims`` are made from these calls.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._files import print_line
from ..stack import unexpectedly_diverged

__all__ = ["claim"]

# IPython keeps the results of cells under these names, also of a cell that has been run again.
_HISTORY = re.compile(r"_{1,3}|_\d+|_oh|Out")


def claim(id: str, text: str, condition: Any) -> None:
    """State ``text``, which holds because ``condition`` was computed and is true.

    Parameters
    ----------
    id : str
        A permanent name, in lower case with hyphens: ``"flooding-holds-level"``.  That no two
        claims of the book share one is checked where the list of claims is made.
    text : str
        The statement as in the prose, without numbers that change with the seed.
    condition : bool
        One truth value (Python, NumPy, torch or xarray), computed in the cell.

    Raises
    ------
    AssertionError
        If the condition is false, or if the caller holds results of ``fit`` in which a run
        diverged without being expected to: its NaNs might have been averaged away.
    TypeError, ValueError
        If the condition is not one truth value, or the id is malformed.

    Notes
    -----
    Results are searched for in the caller's variables, and in their lists, tuples and dictionaries.
    Those that the caller no longer holds are not found; ``fit`` warned of them.  So a cell may be
    run again with a better setting: its claim is about the results that replaced the old ones.

    If the environment variable ``FLATMIN_CLAIMS_LOG`` names a file, the outcome is appended to it
    as a line of JSON and nothing is raised: ``make claims`` collects the outcomes of all claims for
    other seeds.

    Examples
    --------
    >>> claim("sum-of-angles", "a triangle's angles sum to 180 degrees", 60 + 60 + 60 == 180)
    ✓ sum-of-angles: a triangle's angles sum to 180 degrees
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"id must be lower-case words joined by hyphens, got {id!r}")
    value = np.asarray(condition.cpu() if hasattr(condition, "cpu") else condition)
    if value.dtype != bool or value.size != 1:
        raise TypeError(f"condition must be one truth value, got {condition!r}")
    caller = sys._getframe(1)
    held = {**caller.f_globals, **caller.f_locals}
    held = {name: value for name, value in held.items() if not _HISTORY.fullmatch(name)}
    diverged = list(dict.fromkeys(_diverged(held)))
    holds = bool(value.item()) and not diverged
    if log := os.environ.get("FLATMIN_CLAIMS_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": id, "text": text, "holds": holds}) + "\n")
    elif diverged:
        raise AssertionError(
            f"claim {id!r} rests on runs that diverged: {'; '.join(diverged)}. "
            "If that is intended, train them with fit(..., expect_divergence=True)."
        )
    elif not holds:
        raise AssertionError(f"claim {id!r} does not hold: {text}")
    print_line(f"{'✓' if holds else '✗'} {id}: {text}")


def _diverged(value: Any, depth: int = 3) -> Iterator[str]:
    """The runs that diverged unexpectedly in the results of ``fit`` that ``value`` contains."""
    if isinstance(value, Mapping) and not hasattr(value, "attrs"):
        value = list(value.values())
    if isinstance(value, list | tuple) and depth:
        for item in list(value):
            yield from _diverged(item, depth - 1)
    elif "diverged_at" in getattr(value, "data_vars", ()):
        yield from unexpectedly_diverged(value)
