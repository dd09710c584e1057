"""Argument checks whose errors name the argument, the value and what is allowed."""

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def tensor(name: str, value: Any) -> Tensor:
    """``value`` itself, or an error that names it if it is no tensor."""
    if not isinstance(value, Tensor):
        array = isinstance(value, list | tuple | Real) or hasattr(value, "__array__")
        hint = f"; torch.as_tensor({name}) makes one" if array else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    return value


def whole(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def number(
    name: str,
    value: Any,
    least: float,
    most: float = math.inf,
    *,
    below: bool = False,
    infinite: bool = False,
) -> float:
    """``value`` as a float in [least, most], or an error that names it.

    ``below``: ``most`` itself is not allowed.  ``infinite``: infinity is.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    good = real and least <= value <= most and (infinite or math.isfinite(value))
    if not good or (below and value == most):
        bounded = most < math.inf or infinite
        allowed = f"in [{least}, {most}{')' if below else ']'}" if bounded else f">= {least}"
        raise ValueError(f"{name} must be a number {allowed}, got {value!r}")
    return float(value)


def hyperparameter(
    name: str, value: Any, least: float, most: float = math.inf, **how: bool
) -> None:
    """As :func:`number`, but a stack may pass a tensor with one value per run.

    Tensors are not inspected: that would wait for the device and fail under ``vmap``.
    """
    if not isinstance(value, Tensor):
        number(name, value, least, most, **how)


def known(condition: Tensor) -> bool:
    """Whether it holds; False under ``vmap``, where it may differ between runs."""
    try:
        return bool(condition)
    except RuntimeError:
        return False
