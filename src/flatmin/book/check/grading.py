"""The machinery behind every check: call an answer safely, compare its result, say what is wrong.

A check is a function that poses trials.  Each trial has a name, the inputs, the result that should
come back, and *rivals*: the results of common mistakes, with a hint for each.
"""

import copy
import ctypes
import linecache
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, overload

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..statistics import mean_interval


class Mistake(Exception):
    """What is wrong with an answer: a sentence, then lines of (label, text)."""

    def __init__(self, sentence: str, **lines: Any) -> None:
        super().__init__(sentence)
        self.lines = {"": sentence, **{k: v for k, v in lines.items() if v}}


@dataclass
class Report:
    """What a check found; true if the answer passed."""

    name: str
    passed_parts: list[str] = field(default_factory=list)
    part: str = ""
    mistake: Mistake | None = None

    def __bool__(self) -> bool:
        return self.mistake is None

    def __str__(self) -> str:
        lines = [f"{'✓' if self else '✗'} {self.name}"]
        lines += [f"  ✓ {part}" for part in self.passed_parts]
        if self.mistake:
            lines.append(f"  ✗ {self.part or 'your answer'}")
            for label, text in self.mistake.lines.items():
                first, *rest = str(text).splitlines() or [""]
                lines.append(f"      {label + ':':8}{first}" if label else f"      {first}")
                lines += [f"              {line}" for line in rest]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{self.name}: {'passed' if self else 'not passed'}>"

    def _ipython_display_(self) -> None:
        """Show nothing: the text has been printed."""


# --------------------------------------------------------------------------------- calling safely


class OutOfTime(BaseException):
    """Not an Exception, so that ``except Exception`` in an endless loop does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the body after so many seconds.

    In the main thread of Linux and macOS (Jupyter, Colab, scripts) an alarm raises it, which also
    ends a sleep and rings again every second.  On Windows and in other threads it is raised between
    two lines of Python.  A single long call into compiled code is not interrupted, and a bare
    ``except:`` inside an endless loop swallows the exception.
    """
    running = True

    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():

        def ring(*_: Any) -> None:
            if running:
                raise OutOfTime

        old_handler = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        try:
            try:
                yield
            finally:
                running = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old_handler)
        return

    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()

    def interrupt() -> None:
        with lock:
            if running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(OutOfTime))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            running = False
        timer.cancel()


def _where(error: BaseException, answer: Callable[..., Any]) -> str:
    """The last line of the student's own code in an error's traceback."""
    filename = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
    if not frames:
        return ""
    text = frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    return f"in line {frames[-1].lineno} of your cell" + (f": {text}" if text else "")


# -------------------------------------------------------------------------------------- comparing


def _tensor(value: Any) -> Tensor | None:
    """A number, array, or tensor of either as a tensor; None if it is something else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (bool, int, float, np.ndarray, np.generic, xr.DataArray, list, tuple)):
        try:
            return torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            return None
    return None


def show(value: Any) -> str:
    """A value as text, in one line if possible."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.numel() == 1:
            return f"{value.item():.8g}" if not value.ndim else f"tensor({value.tolist()})"
        if value.numel() > 16:
            return f"a tensor {list(value.shape)}, {value.dtype}".replace("torch.", "")
        rounded = [f"{x:.6g}" for x in value.flatten().tolist()]
        shape = "" if value.ndim == 1 else f", shape {list(value.shape)}"
        return f"[{', '.join(rounded)}]{shape}"
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, float)) for v in value):
        return f"({', '.join(map(show, value))})"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__} of {sum(p.numel() for p in value.parameters())} weights"
    if callable(value):
        return f"the function {getattr(value, '__name__', '?')}"
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else text[:97] + "..."


def difference(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-8) -> str:
    """In words, how ``got`` differs from ``want``; "" if it does not.

    Dicts and tuples are compared item by item.  NaN equals NaN.
    """
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping):
            return f"a dict with the keys {list(want)} should have come back"
        if missing := [key for key in want if key not in got]:
            return f"the dict that came back lacks {missing}"
        texts = (difference(got[key], want[key], rtol, atol) for key in want)
        return next((f"at {key!r}: {text}" for key, text in zip(want, texts) if text), "")
    if isinstance(want, tuple):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"{len(want)} values should have come back"
        texts = (difference(g, w, rtol, atol) for g, w in zip(got, want))
        return next((f"item {i}: {text}" for i, text in enumerate(texts) if text), "")
    if isinstance(want, str):
        return "" if isinstance(got, str) and got == want else f"it should be {want!r}"
    if got is None:
        return "None came back: is a `return` missing?"
    got_, want_ = _tensor(got), _tensor(want)
    assert want_ is not None, "want must be a tensor, or convertible to one"
    if got_ is None:
        kind = "tensor" if want_.ndim else "number"
        return f"a {kind} should have come back, not {type(got).__name__}"
    if got_.shape != want_.shape:
        return f"the shape is {list(got_.shape)}, it should be {list(want_.shape)}"
    if got_.is_complex():
        return "a complex number came back"
    got_, want_ = got_.double(), want_.double()
    if (got_.isnan() & ~want_.isnan()).any():
        return "there is a NaN in it"
    if not torch.allclose(got_, want_, rtol=rtol, atol=atol, equal_nan=True):
        return "the value is wrong" if not want_.ndim else "values are wrong"
    return ""


def changed(before: Any, after: Any) -> bool:
    """Whether an input was changed in place."""
    if isinstance(before, Tensor):
        return before.shape != after.shape or not torch.equal(
            before.nan_to_num(), after.detach().nan_to_num()
        )
    if isinstance(before, nn.Module):
        return changed(before.state_dict(), after.state_dict())
    if isinstance(before, Mapping):
        return list(before) != list(after) or any(changed(before[k], after[k]) for k in before)
    if isinstance(before, (list, tuple)):
        return len(before) != len(after) or any(map(changed, before, after))
    return False


# -------------------------------------------------------------------------------------- the trial


class Trial:
    """One run of a check on one answer, with its own random numbers."""

    def __init__(
        self, answer: Callable[..., Any], seed: int, seconds: float, report: Report
    ) -> None:
        self.answer, self.seed, self.seconds, self.report = answer, seed, seconds, report
        self.generator = torch.Generator().manual_seed(1000 + seed)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def filled(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module in double precision with random weights; no global random state is touched."""
        with torch.random.fork_rng(devices=[]):
            model = make().double()
        with torch.no_grad():
            for w in model.parameters():
                w.copy_(self.randn(*w.shape))
        return model

    def number(self, low: float, high: float) -> float:
        """A random number with two decimals, easy to read and to type."""
        return round(low + (high - low) * float(self.rand()), 2)

    def call(
        self,
        part: str,
        inputs: Mapping[str, Any],
        changes: Collection[str] = (),
        through: Callable[..., Any] | None = None,
    ) -> Any:
        """What the answer returns for copies of the inputs.

        It may change the inputs named in ``changes``.  ``through(answer)``, if given, is called
        instead.
        """
        self.begin(part)
        given = {k: v if k in changes else copy.deepcopy(v) for k, v in inputs.items()}
        shown = ", ".join(f"{name} = {show(value)}" for name, value in inputs.items())
        try:
            with time_limit(self.seconds), torch.enable_grad():
                got = (through(self.answer) if through else self.answer)(*given.values())
        except OutOfTime:
            raise Mistake(
                f"It was stopped after {self.seconds:g} seconds.",
                input=shown,
                hint="Is there a loop that never ends?",
            ) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a student's code can raise
            if isinstance(error, NotImplementedError) and not str(error):
                raise Mistake(
                    "Not answered yet: write your own code in place of `raise NotImplementedError`."
                ) from None
            raise Mistake(
                f"It raised {type(error).__name__}: {error}",
                input=shown,
                where=_where(error, self.answer),
            ) from None
        for name, value in given.items():
            if name not in changes and changed(inputs[name], value):
                raise Mistake(
                    f"It changed its input `{name}` in place.",
                    input=shown,
                    hint="Work on a copy, such as x.clone(): the caller still needs what "
                    "it passed.",
                )
        return got

    def begin(self, part: str) -> None:
        """Begin this part; the one before has passed."""
        if self.report.part and part != self.report.part:
            self.report.passed_parts.append(self.report.part)
        self.report.part = part

    def require(self, condition: Any, sentence: str, **lines: Any) -> None:
        if not bool(condition):
            raise Mistake(sentence, **lines)

    def compare(
        self,
        got: Any,
        want: Any,
        rivals: Mapping[str, Any] | None = None,
        hint: str = "",
        rtol: float = 1e-5,
        atol: float = 1e-8,
        **lines: Any,
    ) -> None:
        """Fail unless ``got`` equals ``want``, with the hint of the rival it equals, or ``hint``.

        A rival that is a list stands for any of its entries.
        """
        text = difference(got, want, rtol, atol)
        if not text:
            return
        for rival_hint, rival in (rivals or {}).items():
            rival = rival if isinstance(rival, list) else [rival]
            if any(not difference(got, each, rtol, atol) for each in rival):
                hint = rival_hint
                break
        raise Mistake(
            text[0].upper() + text[1:] + ".", **lines, got=show(got), wanted=show(want), hint=hint
        )

    def __call__(
        self,
        part: str,
        inputs: Mapping[str, Any],
        want: Any,
        *,
        changes: Collection[str] = (),
        through: Callable[..., Any] | None = None,
        **compared: Any,
    ) -> Any:
        """Call, and compare what comes back with ``want``."""
        got = self.call(part, inputs, changes, through)
        shown = ", ".join(f"{name} = {show(value)}" for name, value in inputs.items())
        self.compare(got, want, input=shown, **compared)
        return got

    def experiment(
        self,
        truth: Callable[..., Any],
        rivals: Mapping[str, Callable[..., Any]] | None = None,
        seeds: int = 5,
        atol: float = 1e-3,
    ) -> None:
        """Check an answer ``{quantity: (differences, verdict)}`` from paired runs.

        First the differences must equal ``truth(seeds)``, {quantity: differences}; then each
        verdict must follow from the 95 % interval of the answer's own differences.
        """
        numbers = [100 * self.seed + k for k in range(seeds)]
        got = self.call("it runs", {"seeds": numbers})
        want, shown = truth(tuple(numbers)), f"seeds = {numbers}"
        self.begin("the differences, seed by seed")
        if not _is_experiment(got, want):
            keys = ", ".join(f"{key!r}: (one number per seed, 'lower')" for key in want)
            raise Mistake(
                "A dict should have come back: {quantity: (differences, verdict)}.",
                got=show(got),
                wanted=f"{{{keys}}}, or other verdicts",
            )
        differences = {key: got[key][0] for key in want}
        self.compare(
            differences,
            want,
            {rival_hint: f(want) for rival_hint, f in (rivals or {}).items()},
            atol=atol,
            rtol=0,
            input=shown,
            hint="Go through the settings once more: same seeds, same steps, and the "
            "difference in the order that the question names.",
        )
        for key in want:
            self.begin(f"the verdict on the {key}")
            (low, high, follows), verdict = verdict_of(got[key][0]), got[key][1]
            if not (isinstance(verdict, str) and verdict == follows):
                raise Mistake(
                    f"The verdict {show(verdict)} does not follow from your own data.",
                    data=f"95 % interval of the mean difference: [{low:.4g}, {high:.4g}]",
                    hint="'lower' and 'higher' need an interval that lies on one side of zero; "
                    "if zero is in it, five seeds have not decided.",
                )


def _is_experiment(got: Any, want: Mapping[str, Any]) -> bool:
    return isinstance(got, Mapping) and all(
        key in got and isinstance(got[key], (tuple, list)) and len(got[key]) == 2 for key in want
    )


def verdict_of(differences: Any) -> tuple[float, float, str]:
    """The 95 % interval of the mean of paired differences, and the verdict that follows from it."""
    values = np.asarray(_tensor(differences), dtype=float)
    m = mean_interval(xr.DataArray(values, dims="seed"))
    low, high = float(m.low), float(m.high)
    return low, high, "lower" if high < 0 else "higher" if low > 0 else "undecided"


class Check:
    """A check: call it with your function, and read what it prints.

    Parameters
    ----------
    answer : callable
        The function that answers the question.
    seed : int
        Seed of the check's random inputs.  The autograder uses seeds other than 0.
    """

    __name__: str  # of the function

    def __init__(self, pose: Callable[[Trial], None], seconds: float) -> None:
        update_wrapper(self, pose)
        self.pose, self.seconds = pose, seconds

    def run(self, answer: Callable[..., Any], seed: int = 0) -> Report:
        """The report, without printing it."""
        report = Report(f"check.{self.__name__}")
        try:
            if not callable(answer):
                name = self.__name__
                raise Mistake(
                    "There is no function of this name."
                    if answer is None
                    else f"A function was expected, not {show(answer)}.",
                    hint=f"Pass the function itself: check.{name}({name}).",
                )
            trial = Trial(answer, seed, self.seconds, report)
            self.pose(trial)
            trial.begin("")
        except Mistake as mistake:
            report.mistake = mistake
        return report

    def __call__(self, answer: Callable[..., Any], seed: int = 0) -> Report:
        report = self.run(answer, seed)
        print(report)
        return report

    def verify(self, answer: Callable[..., Any], seed: int = 0) -> None:
        """For the autograder: raise an AssertionError with the report, or pass in silence."""
        report = self.run(answer, seed)
        if not report:
            raise AssertionError(f"\n{report}")

    def __repr__(self) -> str:
        return f"<check.{self.__name__}>"


@overload
def question(pose: Callable[[Trial], None]) -> Check: ...


@overload
def question(*, seconds: float = 10) -> Callable[[Callable[[Trial], None]], Check]: ...


def question(pose: Callable[[Trial], None] | None = None, *, seconds: float = 10) -> Any:
    """Make a check from a function that poses trials; a call of the answer may take ``seconds``."""
    return Check(pose, seconds) if pose else lambda pose: Check(pose, seconds)
