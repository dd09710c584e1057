"""Bad input gets an error that names the argument, the value and what is allowed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def number(name: str, value: Any, least: float, most: float = math.inf) -> float:
    """A finite ``value`` as a float, or an error that names it."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (real and least <= value <= most):
        allowed = f"in [{least}, {most}]" if most < math.inf else f">= {least}"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around imports of packages that only ``extra`` brings: without them, say how to get them."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs the package {error.name!r}, which is not installed: "
            f"pip install 'flatmin[{extra}]'",
            name=error.name,
        ) from error
