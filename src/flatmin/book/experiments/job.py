"""What a unit of an experiment works with: a device, checkpoints and a progress count."""

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
    """The work of one unit: its device, checkpoints and progress.

    Attributes
    ----------
    device : torch.device
        Where to compute.
    path : Path
        This unit's own folder for checkpoints, removed when the unit is finished.  On another
        device or with another commit the unit gets a new folder and starts anew.
    interrupted : bool
        Whether Ctrl-C or SIGTERM has requested a stop.

    Examples
    --------
    A loop that can be killed at any moment and, on a CPU, still gives the same result to the bit::

        state = work.load() or {"epoch": 0, "params": ...}
        while state["epoch"] < epochs:
            if work.due():
                work.save(state)
            state = one_epoch(state)            # with its own stream(seed, purpose, epoch)
            work.progress(examples)
    """

    def __init__(self, device: torch.device, path: Path, stop: list, bar: tqdm):
        self.device, self.path, self._stop, self._bar = device, path, stop, bar
        self.gradients, self._seconds_before, self._seconds_file = 0.0, 0.0, path / "seconds"
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError):
            self._seconds_before = float(self._seconds_file.read_text())
        self._started = self._saved = self._reported = time.monotonic()

    @property
    def interrupted(self) -> bool:
        return bool(self._stop)

    @property
    def seconds(self) -> float:
        """How long this unit has been computed, interrupted runs included."""
        return self._seconds_before + time.monotonic() - self._started

    def progress(self, gradients: float) -> bool:
        """Count single-example gradients; true if a stop is requested."""
        self.gradients += gradients
        self._bar.update(gradients)
        if time.monotonic() - self._reported > 5:  # also tells other ranks that this one is alive
            self._reported = time.monotonic()
            with replacing(self._seconds_file) as part:
                part.write_text(str(self.seconds))
        return self.interrupted

    def advance(self, gradients: float) -> None:
        """As :meth:`progress`, within a computation that saves nothing: a requested stop is now."""
        if self.progress(gradients):
            raise KeyboardInterrupt

    def due(self, every: float = 30.0) -> bool:
        """Whether to save now: every ``every`` seconds, and when a stop is requested."""
        return self.interrupted or time.monotonic() - self._saved >= every

    def save(self, state: dict) -> None:
        """Save ``state`` atomically: tensors, numbers, strings, dictionaries and lists of them.

        Raises KeyboardInterrupt afterwards if a stop is requested.
        """
        with replacing(self.path / "state") as part:
            torch.save({"state": state, "gradients": self.gradients, "seconds": self.seconds}, part)
        self._saved = time.monotonic()
        if self.interrupted:
            raise KeyboardInterrupt

    def load(self) -> dict | None:
        """The last saved state, with its tensors on the CPU, or None."""
        path = self.path / "state"
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            warnings.warn(f"{path} is damaged, its unit starts anew ({error})", stacklevel=2)
            return None
        self._seconds_before = max(self._seconds_before, saved["seconds"])
        self.progress(saved["gradients"])
        return saved["state"]

    def chunks(self, function: Callable, size: int):
        """Call ``function(size)``, with half the size whenever the device runs out of memory."""
        before = self.gradients
        while True:
            try:
                return function(size)
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            size //= 2  # here, as inside ``except`` the exception keeps the tensors alive
            warnings.warn(f"out of memory: retrying with {size} at a time", stacklevel=2)
            self.progress(before - self.gradients)
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def stopping() -> Iterator[list]:
    """A list to which the first Ctrl-C or SIGTERM is added; the second has its usual effect."""
    stop, handlers = [], {}

    def restore():
        for key, handler in handlers.items():
            signal.signal(key, handler)

    def request(key, frame):
        stop.append(key)
        restore()

    with contextlib.suppress(ValueError):  # outside the main thread, where no signal arrives
        for key in (signal.SIGINT, signal.SIGTERM):
            handlers[key] = signal.signal(key, request)
    try:
        yield stop
    finally:
        restore()
