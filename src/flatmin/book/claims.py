"""What the book's prose says, held against what a cell has just computed.

``claim`` is for statements that hold for other seeds, too, ``stated`` for numbers of this run.  Each
prints one line, always the same, if the prose is right, and raises if it is not; inside of
``checks`` they print one line together.  The appendix of claims and ``make claims`` are made from
the calls of ``claim``; a test finds each stated number in the text.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from .._files import print_line
from .._random import first_seed
from ..stack import unexpectedly_diverged
from .statistics import mean_interval

__all__ = ["checks", "claim", "stated"]

_NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?(?: ± \d+(?:\.\d+)?)?")
_lines: ContextVar[list[str] | None] = ContextVar("_lines", default=None)  # inside of `checks`

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
    _report(f"{'✓' if holds else '✗'} {id}: {text}")


def stated(text: str, values: Any, dim: str = "seed", *, exact: bool = False) -> None:
    """Hold a number that the chapter's text states against the run on the page.

    Parameters
    ----------
    text : str
        The words of the text with one number, ``"falls by 3.8 ± 0.7"`` or ``"3.8 points"``.
    values : DataArray, Tensor, sequence or number
        The values per seed, in the units of the text; with ``exact``, one number.
    dim : str
        What varies between repetitions.
    exact : bool
        Whether the number is deterministic: it must come out as printed.

    Raises
    ------
    AssertionError
        When an author executes the chapter (``make notebooks``): if mean and half-width of the 95 %
        interval do not come out as printed.  Later, since other processors round otherwise and
        training amplifies it: if the mean is not within one half-width of the stated one (the
        run's own, where none is stated), or the half-width not within a factor of two.
    ValueError
        If the text has no number or several, or an interval of what is exact.

    Notes
    -----
    With another base seed (``FLATMIN_SEED``) or on a GPU the numbers are others: both are printed.

    Examples
    --------
    >>> stated("an angle of 60 degrees", 180 / 3, exact=True)
    ✓ an angle of 60 degrees
    """
    if len(found := _NUMBER.findall(text)) != 1:
        raise ValueError(f"text must have one number, 3.8 or 3.8 ± 0.7, got {text!r}")
    number = found[0].replace("−", "-").replace("+", "").replace(",", "")
    mean, _, half = number.partition(" ± ")
    if exact and half:
        raise ValueError(f"text must have no interval with exact=True, got {text!r}")
    if exact:
        here = _printed(values, mean)
        right = here == mean
    else:
        run = mean_interval(_per_seed(values, dim), dim)
        m, h = float(run["mean"]), float(run["half"])
        here = f"{_printed(m, mean)} ± {_printed(h, half or mean)}"
        if first_seed() or torch.cuda.is_available():
            return _report(f"– {text}: here {here}")
        right = number in (here, here.partition(" ± ")[0])
        if not right and not os.environ.get("FLATMIN_AUTHOR"):
            width = float(half) if half else h
            right = abs(m - float(mean)) <= width and (not half or width / 2 <= h <= 2 * width)
    if not right:
        raise AssertionError(f"the text states {text!r}, the run gives {here}")
    _report(f"✓ {text}")


@contextmanager
def checks() -> Iterator[None]:
    """Let the claims and stated numbers inside print one line together.

    Examples
    --------
    >>> with checks():
    ...     claim("sum-of-angles", "a triangle's angles sum to 180 degrees", 60 + 60 + 60 == 180)
    ...     stated("an angle of 60 degrees", 180 / 3, exact=True)
    ✓ 2 checks
    """
    lines: list[str] = []
    token = _lines.set(lines)
    try:
        yield
    finally:
        _lines.reset(token)
    for line in (line for line in lines if line[0] != "✓"):
        print_line(line)
    right = sum(line[0] == "✓" for line in lines)
    print_line(f"✓ {right} check{'s' * (right != 1)}")


def _report(line: str) -> None:
    lines = _lines.get()
    print_line(line) if lines is None else lines.append(line)


def _printed(value: Any, like: str) -> str:
    """A number with the decimals of another."""
    text = f"{float(value):.{len(like.partition('.')[2])}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _per_seed(values: Any, dim: str) -> Any:
    import xarray as xr

    return (
        values if isinstance(values, xr.DataArray) else xr.DataArray(np.asarray(values), dims=dim)
    )


def _diverged(value: Any, depth: int = 3) -> Iterator[str]:
    """The runs that diverged unexpectedly in the results of ``fit`` that ``value`` contains."""
    if isinstance(value, Mapping) and not hasattr(value, "attrs"):
        value = list(value.values())
    if isinstance(value, list | tuple) and depth:
        for item in list(value):
            yield from _diverged(item, depth - 1)
    elif "diverged_at" in getattr(value, "data_vars", ()):
        yield from unexpectedly_diverged(value)
