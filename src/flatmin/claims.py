"""Claims: statements of the book's prose that a cell has just computed.

``claim`` prints one line that is the same wherever the statement holds, and raises where it does
not.  The appendix of claims and ``make claims`` are made from these calls.
"""

import json
import os
import re
from typing import Any

import numpy as np

from ._checks import whole

__all__ = ["claim", "first_seed", "seeds"]

_said: dict[str, str] = {}
_diverged: list[str] = []


def first_seed() -> int:
    """The seed that a notebook's experiments start from.

    0, unless the environment variable ``FLATMIN_SEED`` moves it: base seed k starts at 1000 k,
    so that different base seeds share no run.

    Examples
    --------
    >>> first_seed() % 1000
    0
    """
    base = os.environ.get("FLATMIN_SEED", "0")
    if not base.isdecimal():
        raise ValueError(f"FLATMIN_SEED must be a whole number >= 0, got {base!r}")
    return 1000 * int(base)


def seeds(n: int) -> list[int]:
    """The ``n`` seeds of an experiment: consecutive numbers from :func:`first_seed`.

    Examples
    --------
    >>> len(seeds(5))
    5
    """
    return list(range(first_seed(), first_seed() + whole("n", n)))


def report_divergence(runs: list[str]) -> None:
    """Remember runs whose loss left the finite numbers, so that no claim is built on them."""
    _diverged.extend(runs)


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
        If the condition is false, or if a run diverged before (its NaNs might have been averaged
        away; see the argument ``expect_divergence`` of ``fit``).
    TypeError, ValueError
        If the condition is not one truth value, or the id is malformed or taken by another text.

    Notes
    -----
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
    if _said.setdefault(id, text) != text:
        raise ValueError(f"id must be unique, but {id!r} already says: {_said[id]}")
    value = np.asarray(condition.cpu() if hasattr(condition, "cpu") else condition)
    if value.dtype != bool or value.size != 1:
        raise TypeError(f"condition must be one truth value, got {condition!r}")
    holds = bool(value.item()) and not _diverged
    if log := os.environ.get("FLATMIN_CLAIMS_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": id, "text": text, "holds": holds}) + "\n")
    elif _diverged:
        raise AssertionError(
            f"claim {id!r} rests on runs that diverged: {'; '.join(_diverged)}. If that is meant, "
            "train them with fit(..., expect_divergence=True)."
        )
    elif not holds:
        raise AssertionError(f"claim {id!r} does not hold: {text}")
    print(f"{'✓' if holds else '✗'} {id}: {text}")
