"""Claims: statements of the book's prose that a cell has just computed.

``claim`` prints one line that is the same wherever the statement holds, and raises where it does
not.  The appendix of claims and ``make claims`` are made from these calls.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..stack import unexpectedly_diverged

__all__ = ["claim"]

_texts: dict[str, str] = {}


def claim(id: str, text: str, condition: Any) -> None:
    """State ``text``, which holds because ``condition`` was computed to be true.

    Parameters
    ----------
    id : str
        A name that stays, in lower case with hyphens: ``"flooding-holds-level"``.
    text : str
        The statement, as the prose makes it, without numbers that change with the seed.
    condition : bool
        One truth value (Python, NumPy, torch or xarray), computed in the cell.

    Raises
    ------
    AssertionError
        If the condition is false, or if the caller holds results of ``fit`` in which a run
        diverged without being expected to: its NaNs might have been averaged away.
    TypeError, ValueError
        If the condition is not one truth value, or the id is malformed or taken by another text.

    Notes
    -----
    Results are looked for among the variables of the caller, and in their lists, tuples and
    dictionaries.  Those that the caller no longer holds are not seen; ``fit`` warned of them.

    Where the environment variable ``FLATMIN_CLAIMS_LOG`` names a file, the outcome is appended to
    it as a line of JSON and nothing is raised: ``make claims`` asks which claims hold for other
    seeds, and wants to hear of all of them.

    Examples
    --------
    >>> claim("sum-of-angles", "a triangle's angles sum to 180 degrees", 60 + 60 + 60 == 180)
    ✓ sum-of-angles: a triangle's angles sum to 180 degrees
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"id must be lower-case words joined by hyphens, got {id!r}")
    if _texts.setdefault(id, text) != text:
        raise ValueError(f"id must be unique, but {id!r} already says: {_texts[id]}")
    value = np.asarray(condition.cpu() if hasattr(condition, "cpu") else condition)
    if value.dtype != bool or value.size != 1:
        raise TypeError(f"condition must be one truth value, got {condition!r}")
    caller = sys._getframe(1)
    diverged = list(dict.fromkeys(_diverged({**caller.f_globals, **caller.f_locals})))
    holds = bool(value.item()) and not diverged
    if log := os.environ.get("FLATMIN_CLAIMS_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": id, "text": text, "holds": holds}) + "\n")
    elif diverged:
        raise AssertionError(
            f"claim {id!r} rests on runs that diverged: {'; '.join(diverged)}. If that is meant, "
            "train them with fit(..., expect_divergence=True)."
        )
    elif not holds:
        raise AssertionError(f"claim {id!r} does not hold: {text}")
    print(f"{'✓' if holds else '✗'} {id}: {text}")


def _diverged(held: Any, depth: int = 3) -> Iterator[str]:
    """The runs that diverged unexpectedly in the results of ``fit`` that ``held`` contains."""
    if isinstance(held, Mapping) and not hasattr(held, "attrs"):
        held = list(held.values())
    if isinstance(held, list | tuple) and depth:
        for thing in list(held):
            yield from _diverged(thing, depth - 1)
    elif "diverged_at" in getattr(held, "data_vars", ()):
        yield from unexpectedly_diverged(held)
