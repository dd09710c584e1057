"""Learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def lr_factor(schedule: str | Callable[[float], float], done: float) -> float:
    """The factor on the learning rate after a fraction ``done`` of training.

    Examples
    --------
    >>> lr_factor("cosine", 0.0), lr_factor("cosine", 0.5), lr_factor(lambda done: 1 - done, 0.25)
    (1.0, 0.5, 0.75)
    """
    return float((SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(done))


def check_schedule(schedule: Any) -> None:
    """Raise an error unless ``schedule`` is the name of a schedule or a function."""
    if not callable(schedule) and schedule not in list(SCHEDULES):
        raise ValueError(
            f"schedule must be one of {sorted(SCHEDULES)} or a function of the fraction of "
            f"training done, got {schedule!r}"
        )
