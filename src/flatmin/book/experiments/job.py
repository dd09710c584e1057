"""What a unit of an experiment is given: a device, checkpoints, a count of its progress."""

import contextlib
import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ..._files import replacing


class Work:
    """What a unit is given to work with.

    Attributes
    ----------
    device : torch.device
        Where to compute.
    path : Path
        A folder of this unit's own, for checkpoints, removed when the unit is finished.  A unit
        that goes on on another device or with another commit gets another one, and starts anew.
    interrupted : bool
        Whether Ctrl-C or SIGTERM has asked for a stop.

    Examples
    --------
    A loop that can be killed at any moment, and whose result is the same on a CPU, to the bit::

        state = work.load() or {"epoch": 0, "params": ...}
        while state["epoch"] < epochs:
            if work.due():
                work.save(state)
            state = one_epoch(state)            # with its own stream(seed, purpose, epoch)
            work.progress(examples)
    """

    def __init__(self, device: torch.device, path: Path, stop: list, bar: tqdm):
        self.device, self.path, self._stop, self._bar = device, path, stop, bar
        self.gradients, self._before, self._note = 0.0, 0.0, path / "seconds"
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            self._before = float(self._note.read_text())
        self._started = self._saved = self._noted = time.monotonic()

    @property
    def interrupted(self) -> bool:
        return bool(self._stop)

    @property
    def seconds(self) -> float:
        """How long this unit has been computed, before interruptions and since."""
        return self._before + time.monotonic() - self._started

    def progress(self, gradients: float) -> bool:
        """Count gradients of single examples; true if a stop is asked for."""
        self.gradients += gradients
        self._bar.update(gradients)
        if time.monotonic() - self._noted > 5:  # also a sign of life for the other ranks
            self._noted = time.monotonic()
            with replacing(self._note) as part:
                part.write_text(str(self.seconds))
        return self.interrupted

    def due(self, every: float = 30.0) -> bool:
        """Whether to save now: each ``every`` seconds, and when a stop is asked for."""
        return self.interrupted or time.monotonic() - self._saved >= every

    def save(self, state: dict) -> None:
        """Keep ``state``: tensors, numbers, strings, dictionaries and lists of them.

        All or nothing.  Raises KeyboardInterrupt afterwards if a stop is asked for.
        """
        with replacing(self.path / "state") as part:
            torch.save({"state": state, "gradients": self.gradients, "seconds": self.seconds}, part)
        self._saved = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def load(self) -> dict | None:
        """The state that was saved last, with its tensors on the CPU, or None."""
        path = self.path / "state"
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            warnings.warn(f"{path} is damaged, its unit starts anew ({error})", stacklevel=2)
            return None
        self._before = max(self._before, saved["seconds"])
        self.progress(saved["gradients"])
        return saved["state"]

    def chunks(self, function: Callable, size: int):
        """``function(size)``, again with half the size whenever the device's memory runs out."""
        before = self.gradients
        while True:
            try:
                return function(size)
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            size //= 2  # here, since the exception has held on to the tensors until now
            warnings.warn(f"out of memory: goes on with {size} at once", stacklevel=2)
            self.progress(before - self.gradients)
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def stopping() -> Iterator[list]:
    """Ctrl-C and SIGTERM fill the list; the second of them has its usual effect."""
    stop, usual = [], {}

    def restore():
        for key, handler in usual.items():
            signal.signal(key, handler)

    def ask(key, frame):
        stop.append(key)
        restore()

    with contextlib.suppress(ValueError):  # outside the main thread nobody interrupts
        for key in (signal.SIGINT, signal.SIGTERM):
            usual[key] = signal.signal(key, ask)
    try:
        yield stop
    finally:
        restore()
