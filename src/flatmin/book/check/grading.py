"""The machinery behind every check: call an answer safely, compare its result, say what is wrong.

A check is a function that poses trials.  Each trial has a name, the inputs, the result that should
come back, and *rivals*: the results of common mistakes, with a hint for each.
"""

import copy
import ctypes
import itertools
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, update_wrapper
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ... import stack
from ..._files import print_line
from ...pipeline import Recipe
from ...stack import Networks, Runs, fit
from ..models import MLP
from ..statistics import mean_interval


class Mistake(Exception):
    """What is wrong with an answer: a sentence, then lines of (label, text)."""

    def __init__(self, sentence: str, **lines: Any) -> None:
        super().__init__(sentence)
        self.lines = {"": sentence, **{k: v for k, v in lines.items() if v}}


class Hopeless(Mistake):
    """A mistake after which the other parts are not tried: no answer, or one that never ends."""


@dataclass
class Report:
    """What a check found; true if the answer passed."""

    name: str
    part: str = ""  # that is being tried
    mistakes: dict[str, Mistake | None] = field(default_factory=dict)  # by part, None if it passed

    def __bool__(self) -> bool:
        return not any(self.mistakes.values())

    def __str__(self) -> str:
        """Each part, with the first mistake in full: those after it are often the same."""
        lines, told = [f"{'✓' if self else '✗'} {self.name}"], False
        for part, mistake in self.mistakes.items():
            lines.append(f"  {'✗' if mistake else '✓'} {part or 'your answer'}")
            if mistake and not told:
                told = True
                for label, text in mistake.lines.items():
                    first, *rest = str(text).splitlines() or [""]
                    lines.append(f"      {label + ':':8}{first}" if label else f"      {first}")
                    lines += [f"              {line}" for line in rest]
        return "\n".join(lines)

    def _ipython_display_(self) -> None:
        """Show nothing: the text has been printed."""


# --------------------------------------------------------------------------------- calling safely


class OutOfTime(BaseException):
    """Not an Exception, so that ``except Exception`` in an endless loop does not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the body after so many seconds, in any thread and on any system.

    It is raised between two lines of Python, so a single long call, such as a sleep, ends first;
    and again after as many seconds, in case a bare ``except:`` swallows it.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), threading.Event()

    def ring() -> None:
        while not done.wait(seconds):
            with lock:
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(OutOfTime)
                    )

    try:
        try:
            threading.Thread(target=ring, daemon=True).start()
            yield
        finally:
            with lock:
                done.set()
    finally:  # if it rang just now, in the lines above
        done.set()


def _where(error: BaseException, answer: Callable[..., Any]) -> str:
    """The last line of the student's own code in an error's traceback."""
    filename = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
    where = f"in line {frames[-1].lineno} of your cell: {frames[-1].line}" if frames else ""
    return where.removesuffix(": ")


# -------------------------------------------------------------------------------------- comparing


def _tensor(value: Any) -> Tensor | None:
    """A number, array, or tensor of either as a tensor; None if it is something else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.as_tensor(np.array(value))  # a copy: some arrays are read-only
    except (TypeError, ValueError, RuntimeError):
        return None


def show(value: Any) -> str:
    """A value as text, in one line if possible."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return f"{value.item():.8g}" if not value.ndim else f"tensor({value.tolist()})"
        few = 16 if value.numel() <= 16 else 4
        rounded = [f"{x + 0.0:.6g}" for x in value.flatten()[:few].tolist()]  # 0, not -0
        rounded += ["…"] * (value.numel() > few)
        shape = "" if value.ndim == 1 else f", shape {list(value.shape)}"
        return f"[{', '.join(rounded)}]{shape}"
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (Tensor, float)) for v in value):
        return f"({', '.join(map(show, value))})"
    if callable(value):
        return f"the function {getattr(value, '__name__', '?')}"
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else text[:97] + "..."


def difference(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-8) -> str:
    """In words, how ``got`` differs from ``want``, a tensor or a tuple of them; "" if it does not.

    NaN equals NaN.
    """
    if isinstance(want, tuple):
        if isinstance(got, (np.ndarray, Tensor)) and got.ndim:
            got = list(got)
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"{len(want)} values should have come back"
        texts = (difference(g, w, rtol, atol) for g, w in zip(got, want))
        return next((f"item {i}: {text}" for i, text in enumerate(texts) if text), "")
    if got is None:
        return "None came back: is a `return` missing?"
    got_, want_ = _tensor(got), _tensor(want)
    assert want_ is not None, "want must be a tensor, or convertible to one"
    if got_ is None:
        kind = "tensor" if want_.ndim else "number"
        return f"a {kind} should have come back, not {type(got).__name__}"
    if not want_.ndim and got_.numel() == 1:
        got_ = got_.reshape(())  # an array of one number is a number
    if got_.shape != want_.shape:
        return f"the shape is {list(got_.shape)}, it should be {list(want_.shape)}"
    if got_.is_complex():
        return "a complex number came back"
    got_, want_ = got_.double(), want_.double()
    if (got_.isnan() & ~want_.isnan()).any():
        return "there is a NaN in it"
    if not torch.allclose(got_, want_, rtol=rtol, atol=atol, equal_nan=True):
        return "values are wrong" if want_.ndim else "the value is wrong"
    return ""


def where_different(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-8) -> str:
    """Of two tensors of one shape that are too large to be shown: where they differ, and how much."""
    got, want = _tensor(got), _tensor(want)
    if got is None or want is None or got.shape != want.shape or want.numel() <= 16:
        return ""
    got, want = got.double(), want.double()
    off = ~torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
    if not off.any():
        return ""
    first = tuple(off.nonzero()[0].tolist())
    largest = (got - want).abs().nan_to_num(torch.inf).max()
    return (
        f"first at {list(first)}: got {got[first]:.6g}, wanted {want[first]:.6g}; in "
        f"{int(off.sum())} of {off.numel()} places, by at most {largest:.6g}"
    )


def changed(before: Any, after: Any) -> bool:
    """Whether a tensor, or one in a list, was changed in place."""
    if isinstance(before, Tensor):
        return not torch.equal(before, after)
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
        self.input = ""  # of the last call, as the report shows it

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def number(self, low: float, high: float) -> float:
        """A random number with two decimals, easy to read and to type."""
        return round(low + (high - low) * float(self.rand()), 2)

    def filled(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module in double precision with random weights; no global random state is touched."""
        with torch.random.fork_rng(devices=[]):
            model = make().double()
        with torch.no_grad():
            for w in model.parameters():
                w.copy_(self.randn(*w.shape))
        return model

    def begin(self, part: str) -> None:
        """Begin this part; the one before has passed, if nothing else was said of it."""
        if self.report.part and part != self.report.part:
            self.report.mistakes.setdefault(self.report.part, None)
        self.report.part = part

    @contextmanager
    def noting(self, part: str) -> Iterator[None]:
        """Begin this part; a mistake in the body is noted, and does not end the check."""
        self.begin(part)
        try:
            yield
        except Hopeless:
            raise
        except Mistake as mistake:
            self.report.mistakes.setdefault(part, mistake)

    def fail(self, sentence: str, kind: type[Mistake] = Mistake, **lines: Any) -> None:
        raise kind(sentence, **{"input": self.input, **lines})

    def require(self, condition: Any, sentence: str, **lines: Any) -> None:
        if not bool(condition):
            self.fail(sentence, **lines)

    def call(
        self,
        part: str,
        inputs: Mapping[str, Any],
        changes: Collection[str] = (),
        through: Callable[..., Any] | None = None,
        shown: str = "",
    ) -> Any:
        """What the answer returns for copies of the inputs, which reports show as ``shown``.

        It may change the inputs named in ``changes``.  ``through(answer)``, if given, is called
        instead.
        """
        self.begin(part)
        self.input = shown or ", ".join(f"{k} = {show(v)}" for k, v in inputs.items())
        given = {k: v if k in changes else copy.deepcopy(v) for k, v in inputs.items()}
        try:
            with time_limit(self.seconds), torch.enable_grad():
                got = (through(self.answer) if through else self.answer)(*given.values())
        except OutOfTime:
            hint = "Is there a loop that never ends, or does it do more than was asked?"
            self.fail(f"It was stopped after {self.seconds:g} seconds.", Hopeless, hint=hint)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a student's code can raise
            if isinstance(error, NotImplementedError) and not str(error):
                raise Hopeless(
                    "Not answered yet: write your own code in place of `raise NotImplementedError`."
                ) from None
            where = _where(error, self.answer)
            if "a leaf Variable that requires grad" in str(error) and not changes:
                hint = "Work on a copy, such as x.clone(): the caller still needs what it passed."
                self.fail("It changed an input in place.", where=where, hint=hint)
            self.fail(f"It raised {type(error).__name__}: {error}", where=where)
        for name, value in given.items():
            self.require(
                name in changes or not changed(inputs[name], value),
                f"It changed its input `{name}` in place.",
                hint="Work on a copy, such as x.clone(): the caller still needs what it passed.",
            )
        return got

    def tensors(
        self, part: str, inputs: Mapping[str, Any], shapes: Mapping[str, list[int]], **options: Any
    ) -> list[Tensor]:
        """Call the answer; what comes back must be tensors of these shapes, given by name."""
        got = self.call(part, inputs, **options)
        self.require(
            isinstance(got, (tuple, list)) and len(got) == len(shapes),
            f"{len(shapes)} tensors should have come back: {', '.join(shapes)}.",
        )
        got = [value if _tensor(value) is None else _tensor(value) for value in got]
        for value, (name, shape) in zip(got, shapes.items()):
            right = isinstance(value, Tensor) and list(value.shape) == shape
            self.require(
                right,
                f"{name[0].upper()}{name[1:]} should be a tensor of shape {shape}.",
                got=show(value),
            )
            self.require(value.isfinite().all(), f"There is a NaN or an infinity in {name}.")
        return [value.detach().double() for value in got]

    def compare(
        self,
        got: Any,
        want: Any,
        rivals: Mapping[str, Any] | None = None,
        hint: str = "",
        **tolerances: float,
    ) -> None:
        """Fail unless ``got`` equals ``want``, with the hint of the rival it equals, or ``hint``.

        A rival that is a list stands for any of its entries.
        """
        text = difference(got, want, **tolerances)
        if not text:
            return
        for rival_hint, rival in (rivals or {}).items():
            rival = rival if isinstance(rival, list) else [rival]
            if any(not difference(got, each, **tolerances) for each in rival):
                hint = rival_hint
                break
        else:
            hint = hint if got is not None else ""
        differs = where_different(got, want, **tolerances)
        self.fail(
            text[0].upper() + text[1:] + "." * (text[-1] != "?"),
            got=show(got),
            wanted=show(want),
            differs=differs,
            hint=hint,
        )

    def __call__(
        self,
        part: str,
        inputs: Mapping[str, Any],
        want: Any,
        rivals: Mapping[str, Any] | None = None,
        hint: str = "",
        *,
        through: Callable[..., Any] | None = None,
        **tolerances: float,
    ) -> None:
        """Call the answer, and compare what comes back with ``want``.

        A mistake is noted, and the next part is tried all the same.
        """
        with self.noting(part):
            self.compare(self.call(part, inputs, (), through), want, rivals, hint, **tolerances)


def names_used(code: Any) -> set[str]:
    """The names in an answer's code, and in that of functions inside of it."""
    code = getattr(code, "__code__", code)
    inner = [const for const in getattr(code, "co_consts", ()) if hasattr(const, "co_names")]
    return set(getattr(code, "co_names", ())).union(*map(names_used, inner))


def plain_number(answer: Callable[..., Any]) -> Callable[..., Any]:
    """An answer whose number may be of any kind: Decimal, Fraction, SymPy's."""

    def number(*given: Any) -> Any:
        value = answer(*given)
        if isinstance(value, (np.ndarray, Tensor)):
            return value
        return float(value) if hasattr(value, "__float__") else value

    return number


def differentiated(answer: Callable[..., Any], name: str) -> Callable[..., Tensor]:
    """The gradient of what an answer returns, with respect to the input ``name``, a leaf.

    Both ``torch.autograd`` and ``torch.func`` may have been used inside.  If what comes back knows
    nothing of the input, the gradient is 0.
    """

    def gradient(**inputs: Any) -> Tensor:
        leaf = inputs[name]
        value = answer(*inputs.values())
        if not isinstance(value, Tensor) or not value.requires_grad:
            return torch.zeros_like(leaf)
        (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return torch.zeros_like(leaf) if found is None else found

    return gradient


# ------------------------------------------------------------------------------------- the checks


class Check:
    """A check: call it with your function, and read what it prints.

    Parameters
    ----------
    answer : callable
        The function that answers the question.
    seed : int
        Seed of the check's random inputs.  The autograder uses seeds other than 0.

    A call of the answer may take ``seconds``.
    """

    __name__: str  # of the function

    def __init__(
        self, pose: Callable[[Trial], None], seconds: float = 10, parts: Collection[str] = ()
    ) -> None:
        update_wrapper(self, pose)
        self.pose, self.seconds = pose, seconds
        self.parts = parts  # their names, if they are known before it is run
        self.last: tuple[Any, int, Report] | None = None

    def run(self, answer: Callable[..., Any], seed: int = 0) -> Report:
        """The report, without printing it."""
        name = self.__name__
        report = Report(f"check.{name}")
        try:
            if not callable(answer):
                raise Mistake(
                    "There is no function of this name."
                    if answer is None
                    else f"A function was expected, not {show(answer)}.",
                    hint=f"Keep the name `{name}`, and pass the function itself: "
                    f"check.{name}({name}).",
                )
            trial = Trial(answer, seed, self.seconds, report)
            self.pose(trial)
            trial.begin("")
        except Mistake as mistake:  # the parts after it are not tried
            report.mistakes[report.part] = report.mistakes.get(report.part) or mistake
        return report

    def __call__(self, answer: Callable[..., Any], seed: int = 0) -> Report:
        report = self.run(answer, seed)
        print_line(report)
        return report

    def verify(self, answer: Callable[..., Any], seed: int = 0, part: str | None = None) -> None:
        """For the autograder: raise an AssertionError with the report, or pass in silence.

        With ``part``, if this part has passed; the check itself is run once for all its parts.
        """
        if self.last is None or self.last[0] is not answer or self.last[1] != seed:
            self.last = answer, seed, self.run(answer, seed)
        report = self.last[2]
        if report.mistakes.get(part, True) if part is not None else not report:
            raise AssertionError(f"\n{report}")


question = Check  #: The decorator of a function that poses the trials of a question.

# -------------------------------------------------------------------------------- the experiments

# How far an error (two of 1000 test examples) and a loss may be off. An honest run differs by
# rounding alone, which training enlarges: in flooding to 2e-9 in a loss, else to less than 1e-11,
# and not in an error. One step more or less changes a loss by 0.01, an error by 0.004.
ERROR, LOSS = 0.0021, 1e-3

SETTINGS = (
    "Go through the settings once more: the seeds and the data sets (one a seed, or one for all); "
    "a function that makes the model, `lambda: MLP(…)`, not a model; momentum, schedule, batch "
    "size and dtype; the number of steps, and which of them count; test or training set."
)


def experiment(
    order: str, **quantities: float
) -> Callable[[Callable[..., Mapping[str, Any]]], Check]:
    """Make a check from the true result ``f(seeds)``: {quantity: one difference per seed}.

    ``quantities`` are those asked for, with ``_`` for a space, and how far a difference may be off;
    others in the true result are rivals. An answer is {quantity: (differences, verdict)}. Its
    differences must be the true ones, in the ``order`` "a minus b"; each verdict must follow from
    the 95 % interval of its own differences, also where these are made up, so that a verdict which
    does not depend on them is seen.
    """
    tolerances = {name.replace("_", " "): atol for name, atol in quantities.items()}
    numbers, verdicts = (
        {name: f"{name}, {part}" for name in tolerances} for part in ("seed by seed", "the verdict")
    )

    def make(truth: Callable[[tuple[int, ...]], Mapping[str, Any]]) -> Check:
        truth = lru_cache(truth)

        def pose(trial: Trial) -> None:
            first = next(iter(tolerances))
            seeds = [100 * trial.seed + k for k in range(10, 15)]
            with fitted_seeds() as fitted:
                got = _answers(trial, numbers[first], seeds, tolerances)
            true = truth(tuple(seeds))
            for name, atol in tolerances.items():
                with trial.noting(numbers[name]):
                    rivals, hint = _rivals(name, true, atol, order), SETTINGS
                    if fitted and fitted != set(seeds):
                        hint = "The seeds that were given have to go to `fit` and to the data; "
                        hint += "`fit` got others."
                    found, want = _pair(trial, got, name)[0], _tensor(true[name])
                    numeric = _tensor(found)  # shown in few digits
                    found = found if numeric is None else numeric
                    if numeric is None or numeric.shape != (len(seeds),):
                        hint = "One number a seed: five. A dimension of length 1 goes away with "
                        hint += "`.squeeze()`."
                    elif not numeric.any():
                        hint = "There is no difference at all. Are both runs the same, or taken at "
                        hint += "a step where they agree?"
                    trial.compare(found, want, rivals, hint, atol=atol, rtol=0)

            trial.begin(verdicts[first])
            trial.input = ""
            right = [name for name in tolerances if not trial.report.mistakes[numbers[name]]]
            made_up = []
            for statistic in (UNDECIDED, DECIDED) if right else ():
                shown = f"seeds = {seeds}, and made-up numbers from `fit`"
                with made_up_results(statistic):
                    made_up.append(_answers(trial, verdicts[first], seeds, tolerances, shown))
            for name in tolerances:
                with trial.noting(verdicts[name]):
                    trial.require(name in right, "Its differences are wrong, so it is not read.")
                    trial.input = ""
                    _follows(trial, *_pair(trial, got, name))
                    pairs = [_pair(trial, other, name) for other in made_up]
                    said = {str(verdict) for _, verdict in [_pair(trial, got, name), *pairs]}
                    for pair in pairs:
                        _follows(trial, *pair, made_up=True, typed=len(said) == 1)

        parts = [*numbers.values(), *verdicts.values()]
        return Check(update_wrapper(pose, truth), seconds=120, parts=parts)

    return make


def _rivals(name: str, true: Mapping[str, Any], atol: float, order: str) -> dict[str, Any]:
    """What common mistakes give in place of a quantity's true differences."""
    want = np.asarray(true[name])
    others = {
        f"These are the differences of another quantity: {other}.": [value, -np.asarray(value)]
        for other, value in true.items()
        if other != name and np.abs(value).max() > atol
    }
    return {
        f"The difference is the wrong way round: {order}.": -want,
        "It is 100 times too large: give fractions, not percent.": [100 * want, -100 * want],
        **others,
    }


def _answers(
    trial: Trial, part: str, seeds: list[int], keys: Collection[str], shown: str = ""
) -> Mapping[str, Any]:
    """The dict that the answer returns."""
    got = trial.call(part, {"seeds": seeds}, shown=shown)
    wanted = ", ".join(f"{key!r}: (one number per seed, 'lower')" for key in keys)
    trial.require(
        isinstance(got, Mapping),
        "A dict should have come back: {quantity: (differences, verdict)}.",
        got=show(got),
        wanted=f"{{{wanted}}}, or other verdicts",
    )
    return got


def _pair(trial: Trial, got: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """The differences of one quantity and the verdict, of one word."""
    there = f"the keys {', '.join(map(repr, got))}" if got else "an empty dict"
    trial.require(name in got, f"The key {name!r} is missing in the dict.", got=there)
    pair = got[name]
    trial.require(
        isinstance(pair, (tuple, list)) and len(pair) == 2,
        f"The value of {name!r} should be a tuple: (differences, verdict).",
        got=show(pair),
    )
    differences, verdict = pair
    trial.require(
        not isinstance(differences, str),
        "The differences come first, then the verdict.",
        got=show(pair),
    )
    if getattr(verdict, "size", None) == 1:  # an array's
        verdict = verdict.item()
    return differences, verdict.strip().lower() if isinstance(verdict, str) else verdict


def _follows(
    trial: Trial, differences: Any, verdict: Any, made_up: bool = False, typed: bool = False
) -> None:
    """Fail unless this is the verdict on these differences; ``typed`` if it is always the same."""
    data = "made-up data" if made_up else "your own data"
    values = _tensor(differences)
    if values is None or values.shape != (5,):
        trial.fail(f"With {data} there is not one difference per seed.", got=show(differences))
        return
    low, high, follows = verdict_of(values)
    where = {
        "lower": "The interval lies below zero",
        "higher": "The interval lies above zero",
        "undecided": "Zero is in the interval",
    }
    hint, word = f"{where[follows]}: that is {follows!r}.", str(verdict)
    if typed:
        hint = "Was it typed in? Here `fit` gave made-up numbers. Compute the verdict from the "
        hint += "ends of the 95 % interval, by Student's t."
    elif made_up and follows == "undecided" and word == ("lower" if low + high < 0 else "higher"):
        hint = "Here it is 'undecided': is there a branch for that? If there is, your interval is "
        hint += (
            "too narrow, or not that of the paired differences. By Student's t it reaches 2.776 "
        )
        hint += "standard errors to either side, with ddof=1. Too little are 1.96, a one-sided "
        hint += "interval, ddof=0, one standard error and the sign of the mean."
    if word == "undecided":
        hint += " If it was computed, the interval is too wide: a standard error is the standard "
        hint += "deviation over √5."
    if word not in where:
        hint = "The verdict is 'lower', 'higher' or 'undecided'."
    trial.require(
        word == follows,
        f"The verdict {show(verdict)} does not follow from {data}.",
        data=f"differences {show(values)}\n"
        f"95 % interval of their mean, by Student's t: [{low:.4g}, {high:.4g}]",
        hint=hint,
    )


# Mean over standard error of five made-up differences. The 95 % interval is 2.776 standard errors
# wide to either side; with 1.96, or with the variance divided by n, the first would be decided.
# They have two signs: only a verdict that was typed in is the same for both.
UNDECIDED, DECIDED = 2.6, -2.95


@contextmanager
def fitted_seeds() -> Iterator[set[int]]:
    """The seeds that `fit` is called with in the body."""
    seen: set[int] = set()

    def runs(data: xr.Dataset, networks: Networks | None) -> Runs:
        seen.update(data.seed.values.tolist())
        return Runs(data, networks)

    with patch.object(stack, "Runs", runs):
        yield seen


@contextmanager
def made_up_results(statistic: float) -> Iterator[None]:
    """In the body `fit` does not train, and it and `Networks.measure` return made-up numbers.

    These grow from call to call and along each dimension, times a factor of the seed.  So whatever
    is subtracted from what, the five differences are proportional to these factors, and their mean
    is ``statistic`` standard errors from zero.
    """
    calls = itertools.count()

    def exchanged(values: xr.DataArray, call: int) -> xr.DataArray:
        if values.dtype.kind != "f" or "seed" not in values.dims:
            return values
        ranks = [xr.DataArray(np.arange(n) / n, dims=[dim]) for dim, n in values.sizes.items()]
        ranks = [rank for rank in ranks if rank.dims != ("seed",)]
        factor = statistic + 5**0.5 * np.array([-1, 1, -1, 1, 0])[values.seed.values % 5]
        growing = 0.008 * (call + sum(ranks)) * xr.DataArray(factor, dims="seed")
        return xr.zeros_like(values) + 0.5 + growing

    def runs(data: xr.Dataset, networks: Networks | None) -> Runs:
        return Runs(data.map(exchanged, call=next(calls)), networks)

    def measure(*given: Any, **options: Any) -> Any:
        found, call = measured(*given, **options), next(calls)
        if isinstance(found, xr.Dataset):
            return found.map(exchanged, call=call)
        return exchanged(found, call)

    measured = Networks.measure
    with (
        patch.object(stack, "Runs", runs),
        patch.object(stack._Chunk, "_step", lambda *_: None),
        patch.object(Networks, "measure", measure),
    ):
        yield


def verdict_of(differences: Any) -> tuple[float, float, str]:
    """The 95 % interval of the mean of paired differences, and the verdict that follows from it."""
    values = np.asarray(_tensor(differences), dtype=float)
    m = mean_interval(xr.DataArray(values, dims="seed"))
    low, high = float(m.low), float(m.high)
    return low, high, "lower" if high < 0 else "higher" if low > 0 else "undecided"


def train(
    seeds: tuple[int, ...],
    data: Any,
    recipe: Recipe,
    steps: int,
    width: int = 32,
    activation: Callable[[], nn.Module] = nn.ReLU,
    **options: Any,
) -> Runs:
    """The experiments' runs on MNIST-1D, evaluated at the end if ``options`` do not say when."""
    return fit(
        lambda: MLP(40, width, 10, activation=activation),
        data,
        recipe,
        steps=steps,
        seeds=list(seeds),
        dtype=torch.float64,
        **{"evaluate_at": [steps], **options},
    )


def by_name(change: Any) -> dict[str, Any]:
    """Differences of runs as {quantity: one per seed}, those of the training set among them."""
    return {
        f"{name} {of}": change[f"{short}_{of}"].values
        for name, short in (("training", "train"), ("test", "test"))
        for of in ("loss", "error")
    }
