"""Learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

from ._stage import Step

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def lr_factor(schedule: str | Callable[[float], float], t: int) -> float:
    """The factor on the learning rate in step ``t``.

    Every schedule but the constant one needs a :class:`~flatmin.pipeline.Step`, which knows how much
    of the training is done.

    Examples
    --------
    >>> t = Step(25, of=100)
    >>> lr_factor("cosine", Step(50, of=100)), lr_factor(lambda done: 1 - done, t)
    (0.5, 0.75)
    """
    if schedule == "constant":
        return 1.0
    if not isinstance(t, Step):
        raise TypeError(f"t must be a Step(t, of=steps) for the schedule {schedule!r}, got {t!r}")
    return float((SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(t.done))


def check_schedule(schedule: Any) -> None:
    """Raise an error unless ``schedule`` is the name of a schedule or a function."""
    if not callable(schedule) and schedule not in list(SCHEDULES):
        raise ValueError(
            f"schedule must be one of {sorted(SCHEDULES)} or a function of the fraction of "
            f"training done, got {schedule!r}"
        )
