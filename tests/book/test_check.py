"""The code behind the checks: whatever a student submits, and what the reports say."""

import contextlib
import threading
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
import xarray as xr
from IPython.core.formatters import DisplayFormatter
from torch import nn

from flatmin import Recipe, fit
from flatmin.book import check, two_gaussians
from flatmin.book.check.grading import (
    DECIDED,
    UNDECIDED,
    Check,
    Mistake,
    OutOfTime,
    changed,
    difference,
    experiment,
    made_up_results,
    names_used,
    question,
    show,
    time_limit,
    verdict_of,
    where_different,
)
from flatmin.optimizer import SGD

CHECKS = {name: v for name, v in vars(check).items() if isinstance(v, Check)}


@question
def double(trial):
    """Twice a vector."""
    x = trial.randn(3)
    trial(
        "three numbers",
        {"x": x},
        want=2 * x,
        rivals={
            "That is x itself.": x,
            "That is half or a third of x.": [x / 2, x / 3],
        },
        hint="Two times.",
    )
    trial("a matrix", {"x": trial.randn(2, 2)}, want=2 * trial_matrix(trial), hint="Any shape.")


double.seconds = threading.TIMEOUT_MAX  # stops nothing, however busy the machine is


def trial_matrix(trial):
    """The matrix that `double` has just drawn, from the same seed."""
    generator = torch.Generator().manual_seed(1000 + trial.seed)
    torch.randn(3, generator=generator, dtype=torch.float64)
    return torch.randn(2, 2, generator=generator, dtype=torch.float64)


def report_text(answer, seed=0):
    report = double.run(answer, seed)
    assert not report
    return str(report)


def test_a_right_answer_passes_all_parts(capsys):
    report = double(lambda x: x + x)
    assert report
    assert capsys.readouterr().out == "✓ check.double\n  ✓ three numbers\n  ✓ a matrix\n"
    double.verify(lambda x: 2 * x, seed=5)


def test_a_mistake_is_shown_with_input_result_and_hint():
    text = report_text(lambda x: x)
    x = show(torch.randn(3, generator=torch.Generator().manual_seed(1000), dtype=torch.float64))
    assert text.splitlines()[0] == "✗ check.double" and f"input:  x = {x}" in text
    assert f"got:    {x}" in text and "wanted: [" in text and "hint:   That is x itself." in text


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        (lambda x: x / 3, "half or a third"),
        (lambda x: x * 5, "Two times."),
        (lambda x: None, "is a `return` missing?"),
        (lambda x: "six", "not str"),
        (lambda x: [2 * x, 2 * x], "The shape is [2, 3], it should be [3]"),
        (lambda x: [x, "x"], "A tensor should have come back, not list"),
        (lambda x: 2 * x[:2], "The shape is [2], it should be [3]"),
        (lambda x: 2 * x * torch.nan, "NaN"),
        (lambda x: 2 * x.to(torch.complex128), "complex"),
        (lambda x: 2 * x[0] if x.ndim == 1 else x, "The shape is []"),
        (lambda x: x.mul_(2), "changed its input `x` in place"),
        (lambda x: x.resize_(1), "changed its input `x` in place"),
        (lambda: 1, "It raised TypeError"),
        (lambda x: x @ torch.ones(7), "It raised RuntimeError"),
        (lambda x: torch.ones(3) if x.ndim == 1 and exit() else x, "It raised SystemExit"),
        (3.0, "A function was expected, not 3."),
        (None, "There is no function of this name"),
        (nn.Linear(2, 2), "It raised RuntimeError"),
    ],
)
def test_any_return_value_is_handled(answer, phrase):
    assert phrase in report_text(answer)


@pytest.mark.parametrize(
    "convert",
    [
        lambda v: v.float(),
        lambda v: v.numpy(),
        lambda v: xr.DataArray(v.numpy()),
        lambda v: v.tolist(),
        lambda v: v.clone().requires_grad_(),
        lambda v: nn.Parameter(v),
    ],
    ids=["float32", "numpy", "xarray", "list", "requires grad", "parameter"],
)
def test_numbers_may_come_back_in_any_container(convert):
    assert double.run(lambda x: convert(2 * x))


def test_an_unanswered_question_is_reported_as_such():
    def answer(x):
        raise NotImplementedError

    assert "Not answered yet" in report_text(answer)


def test_a_not_implemented_error_from_torch_is_an_error():
    assert "It raised NotImplementedError: no kernel" in report_text(
        lambda x: (_ for _ in ()).throw(NotImplementedError("no kernel"))
    )


def test_an_error_is_located_in_the_students_code():
    def answer(x):
        y = 2 * x
        return y.reshape(7)

    assert "in line" in report_text(answer) and "return y.reshape(7)" in report_text(answer)


def test_the_second_part_names_the_first_as_passed():
    text = report_text(lambda x: 2 * x if x.ndim == 1 else x)
    assert text.splitlines()[1:3] == ["  ✓ three numbers", "  ✗ a matrix"] and "Any shape." in text


def test_verify_raises_what_the_report_says():
    with pytest.raises(AssertionError, match="That is x itself"):
        double.verify(lambda x: x, seed=1)


def test_other_seeds_have_other_inputs():
    seen = []
    for seed in (0, 0, 1):
        double.run(lambda x: seen.append(x), seed)
    first = [x for x in seen if x.ndim == 1]  # of the two parts
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_answers_hard_coded_from_the_public_check_fail_the_hidden_one():
    answers = []
    double.run(lambda x: answers.append(2 * x) or 2 * x)
    by_heart = lambda x: answers[0] if x.ndim == 1 else answers[1]
    assert double.run(by_heart, 0) and not double.run(by_heart, 1)


def test_the_report_is_not_displayed_twice():
    report = double.run(lambda x: x)
    assert DisplayFormatter().format(report) == ({}, {})


# ------------------------------------------------------------------------------------- time limit


def forever(x):
    while True:
        pass


def swallowing(x):
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # noqa: S112
            continue


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(double, "seconds", 0.05)


@pytest.mark.parametrize("answer", [forever, swallowing])
def test_an_endless_loop_is_stopped(impatient, answer):
    assert "stopped after 0.05 seconds" in report_text(answer)


def test_a_second_alarm_stops_a_bare_except(impatient):
    def answer(x):
        try:
            forever(x)
        except:  # noqa: E722
            forever(x)

    assert "stopped after 0.05 seconds" in report_text(answer)


@pytest.mark.parametrize("answer", [forever, swallowing])
def test_an_endless_loop_is_also_stopped_in_a_thread(impatient, answer):
    texts = []
    thread = threading.Thread(target=lambda: texts.append(report_text(answer)), daemon=True)
    thread.start()
    thread.join(600)
    assert texts and "stopped after 0.05 seconds" in texts[0]


def test_no_alarm_follows_after_the_time_limit():
    with contextlib.suppress(OutOfTime), time_limit(0.05):  # a busy machine may take as long
        pass
    time.sleep(0.1)
    with pytest.raises(OutOfTime), time_limit(0.05):
        forever(0)


# -------------------------------------------------------------------------------------- comparing


def test_difference_goes_through_tuples():
    want = (1.0, torch.zeros(2))
    assert difference([1, np.zeros(2)], want) == ""
    assert difference((1, [0.0, 1.0]), want) == "item 1: values are wrong"
    assert difference((1.0,), want) == "2 values should have come back"


def test_difference_is_exact_to_the_tolerance():
    assert difference(1.0 + 1e-9, 1.0, rtol=1e-8, atol=0) == ""
    assert difference(1.0 + 1e-9, 1.0, rtol=1e-10, atol=0) == "the value is wrong"
    nan = torch.tensor([1.0, torch.nan])
    assert difference(nan, nan) == "" and difference(nan, torch.ones(2)) == "there is a NaN in it"
    assert difference(torch.ones(2), nan) == "values are wrong"


def test_changes_in_place_are_seen_in_lists_too():
    x = torch.tensor([1.0, 2.0])
    for value, change in (
        (x, lambda v: v.add_(1)),
        ([x, x], lambda v: v.pop()),
        ([(x, x), (x, x)], lambda v: v[1][0].add_(1)),
    ):
        other = deepcopy(value)
        assert not changed(value, other)
        change(other)
        assert changed(value, other)


# ------------------------------------------------------------------------------------ experiments


@experiment("heads minus nothing", heads=0.01, tails=0.01)
def tossing(seeds):
    """An experiment whose true result is cheap to compute."""
    heads = np.array(seeds) % 7 + 10.0
    return {"heads": heads, "tails": np.zeros(5), "coins": 2 * heads}


def tossed(heads="higher", tails="undecided", sign=1):
    return lambda seeds: {
        "heads": (xr.DataArray(sign * (np.array(seeds) % 7 + 10.0), dims="seed"), heads),
        "tails": (torch.zeros(5), tails),
    }


@pytest.mark.parametrize("seed", [0, 3])
def test_an_experiment_needs_the_data_and_the_matching_verdict(seed):
    assert tossing.run(tossed(), seed)
    assert "does not follow from your own data" in str(tossing.run(tossed(tails="lower"), seed))
    assert "does not follow from your own data" in str(tossing.run(tossed(heads="undecided"), seed))
    text = str(tossing.run(tossed(heads="undecided"), seed))
    assert "The interval lies above zero: that is 'higher'." in text and "differences [" in text
    text = str(tossing.run(tossed(tails="lower"), seed))
    assert "Zero is in the interval: that is 'undecided'." in text
    for verdict in (np.ones(5), None, 3, "no idea"):
        text = str(tossing.run(tossed(heads=verdict), seed))
        assert "does not follow from your own data" in text and "The verdict is 'lower'," in text
    assert "wrong way round: heads minus nothing." in str(tossing.run(tossed(sign=-1), seed))
    assert "A dict should have come back" in str(tossing.run(lambda seeds: [1, 2], seed))
    assert "another quantity: coins" in str(tossing.run(tossed(sign=2), seed))
    assert "give fractions, not percent" in str(tossing.run(tossed(sign=-100), seed))
    assert "There is no difference at all" in str(tossing.run(tossed(sign=0), seed))
    assert "Go through the settings" in str(tossing.run(tossed(sign=1.1), seed))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "The key 'tails' is missing in the dict."),
        (1, "The value of 'tails' should be a tuple: (differences, verdict)."),
        (("undecided", np.zeros(5)), "The differences come first, then the verdict."),
    ],
)
def test_each_quantity_is_judged_by_itself(value, said):
    def answer(seeds):
        heads = tossed()(seeds)["heads"]
        return {"heads": heads, "Tails": heads} | ({} if value is None else {"tails": value})

    report = tossing.run(answer)
    # its numbers do not come from `fit`, so its verdict may be computed from them
    assert [bool(report.mistakes[part]) for part in tossing.parts] == [False, True, False, True]
    assert said in str(report)
    assert value is not None or "got:    the keys 'heads', 'Tails'" in str(report)


def test_the_length_of_the_differences_is_named():
    seed = 0
    assert "shape is [4]" in str(
        tossing.run(
            lambda seeds: {"heads": (np.ones(4), "higher"), "tails": (np.zeros(5), "undecided")},
            seed,
        )
    )


def test_verdicts():
    assert (
        verdict_of([1.0, 1.1, 0.9])[2] == "higher" and verdict_of([-1.0, -1.1, -0.9])[2] == "lower"
    )
    assert (
        verdict_of([1.0, -1.1, 0.9])[2] == "undecided" and verdict_of([0.0, 0.0])[2] == "undecided"
    )


def trained(lr, seeds, **options):
    """A linear layer, trained or not."""
    return fit(
        lambda: nn.Linear(10, 2), two_gaussians(20, 20), Recipe(optimizer=SGD()), steps=4,
        grid={"lr": lr}, seeds=seeds, dtype=torch.float64, evaluate_at=[0, 4], **options,
    )  # fmt: skip


def by_grid(seeds):
    v = trained([0.0, 0.5], seeds).test_loss.isel(step=-1)
    return v.sel(lr=0.5) - v.sel(lr=0.0)


def by_calls(seeds):
    one, other = (trained([lr], seeds).test_loss.isel(step=-1, lr=0) for lr in (0.5, 0.0))
    return one - other


def by_steps(seeds):
    v = trained([0.5], seeds).test_loss.isel(lr=0)
    return v.sel(step=4) - v.sel(step=0)


def seed_by_seed(seeds):
    return [float(by_calls([seed]).squeeze()) for seed in seeds]


def by_instrument(seeds):
    def weight(network, params, x, y):
        return params["weight"].sum()

    networks = trained([0.0, 0.5], seeds, networks="last").networks
    return networks.measure(weight, two_gaussians(20, 20), "train").diff("lr").squeeze()


@pytest.mark.parametrize("statistic", [UNDECIDED, DECIDED])
@pytest.mark.parametrize("differences", [by_grid, by_calls, by_steps, seed_by_seed, by_instrument])
def test_made_up_differences_have_a_known_statistic(differences, statistic):
    before = differences([300, 301, 302, 303, 304])
    with made_up_results(statistic):
        found = torch.as_tensor(np.asarray(differences([300, 301, 302, 303, 304])))
    assert float(found.mean().abs() / found.std() * 5**0.5) == pytest.approx(abs(statistic))
    assert np.array_equal(before, differences([300, 301, 302, 303, 304])), "all is as it was"


def test_the_two_made_up_means_have_two_signs():
    """So a verdict that was typed in is told from one of a narrow interval."""
    signs = []
    for statistic in (UNDECIDED, DECIDED):
        with made_up_results(statistic):
            signs.append(np.sign(by_grid([10, 11, 12, 13, 14]).mean()))
    assert sorted(signs) == [-1, 1]


@experiment("trained minus untrained", loss=1e-3)
def training(seeds):
    """What training changes in the test loss."""
    return {"loss": by_grid(seeds).values}


def test_seeds_that_do_not_reach_fit_are_named():
    text = str(training.run(lambda seeds: {"loss": (by_grid(5), "lower")}))
    assert "The seeds that were given have to go to `fit`" in text
    report = training.run(lambda seeds: {"loss": (by_grid([*seeds[:4], 3]), "lower")}, seed=777)
    hints = [mistake.lines.get("hint", "") for mistake in report.mistakes.values() if mistake]
    assert "`fit` got others" in hints[0]
    assert "777" not in "".join(hints), "students see the hints of hidden tests"


def by_interval(quantile, correction=1):
    def verdict(d):
        half = quantile * d.std(correction=correction) / len(d) ** 0.5
        return "lower" if d.mean() < -half else "higher" if d.mean() > half else "undecided"

    return verdict


VERDICTS = {
    "right": (by_interval(2.776445), True),
    "normal": (by_interval(1.96), False),
    "variance over n": (by_interval(2.776445, correction=0), False),
    "one-sided": (by_interval(2.131847), False),
    "one difference": (by_interval(2.776445 * 5**0.5), False),
    "sign of the mean": (by_interval(0.0), False),
    "typed in, right for these data": (lambda d: "lower", False),
    "typed in": (lambda d: "undecided", False),
}
HINTS = {
    "normal": "too narrow",
    "variance over n": "too narrow",
    "one-sided": "too narrow",
    "sign of the mean": "too narrow",
    "typed in, right for these data": "Was it typed in?",
}


@pytest.mark.parametrize("name", VERDICTS)
def test_a_verdict_must_be_computed_by_students_t(name):
    verdict, right = VERDICTS[name]

    def answer(seeds):
        d = torch.from_numpy(by_grid(seeds).values)
        return {"loss": (d, verdict(d))}

    report = training.run(answer)
    assert bool(report) == right, str(report)
    assert right or "does not follow from" in str(report)
    if name in HINTS:
        assert "does not follow from made-up data" in str(report)
        assert HINTS[name] in str(report) and "differences [" in str(report)


def test_an_interval_that_is_too_wide_is_named():
    @experiment("untrained minus itself", loss=1e-3)
    def nothing(seeds):
        """No difference, seed by seed."""
        return {"loss": np.zeros(5)}

    def answer(seeds):
        v = by_grid(seeds)
        d = torch.from_numpy((v if abs(v).max() < 0.1 else 0 * v).values)  # 0 where it is real
        return {"loss": (d, by_interval(2.776445 * 5**0.5)(d))}

    assert "the interval is too wide" in str(nothing.run(answer))


def test_an_experiment_earns_its_parts():
    """A verdict is not read where its differences are wrong."""
    answer = tossed()
    halved = lambda seeds: answer(seeds) | {"tails": (np.ones(5), "higher")}
    report = tossing.run(halved)
    assert list(report.mistakes) == tossing.parts
    assert [part for part, mistake in report.mistakes.items() if not mistake] == [
        "heads, seed by seed",
        "heads, the verdict",
    ]
    assert "so it is not read" in str(report.mistakes["tails, the verdict"])


# ------------------------------------------------------------------------------------ all checks


def test_all_checks_are_exported_and_documented():
    assert CHECKS and set(CHECKS) == set(check.__all__) - {"Check", "Report"}
    for name, one in CHECKS.items():
        assert one.__doc__.endswith(".") and one.__name__ == name


NONSENSE = {
    "None": lambda *a: None,
    "number": lambda *a: 3.5,
    "tuple": lambda *a: (),
    "dict": lambda *a: {},
    "str": lambda *a: "x",
    "list": lambda *a: [1, "x"],
    "NaN": lambda *a: torch.full((2, 2), torch.nan),
    "inputs": lambda *a: a,
    "no arguments": lambda: 0,
    "no function": 7,
    "missing": None,
}


@pytest.mark.parametrize("name", CHECKS)
def test_no_check_accepts_nonsense_or_breaks_on_it(name):
    for kind, answer in NONSENSE.items():
        report = CHECKS[name].run(answer)
        [*mistakes] = filter(None, report.mistakes.values())
        assert not report and isinstance(mistakes[0], Mistake) and str(report), kind


def test_checks_do_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    for name in ("accumulate", "dirichlet_mixup", "lanczos", "sam_step"):
        CHECKS[name].run(lambda *a: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_result_says_where_it_differs():
    @question
    def table(trial):
        """Five times five."""
        trial("all of it", {"n": 5}, torch.arange(25.0).view(5, 5))

    def answer(n):
        value = torch.arange(25.0).view(5, 5)
        value[1, 3] += 0.25
        value[4, 4] -= 2
        return value

    text = str(table.run(answer))
    assert "first at [1, 3]: got 8.25, wanted 8; in 2 of 25 places, by at most 2" in text
    assert where_different(torch.ones(3), torch.zeros(3)) == "", "what is small is shown"


@pytest.mark.parametrize("container", [tuple, list, np.array, torch.tensor])
def test_a_pair_may_come_in_any_container(container):
    assert difference(container([1.0, 2.0]), (1.0, 2.0)) == ""
    assert "item 1" in difference(container([1.0, 3.0]), (1.0, 2.0))


@pytest.mark.parametrize("verdict", ["undecided", "Undecided", " UNDECIDED "])
def test_a_verdict_may_be_written_in_capitals(verdict):
    @experiment("a minus b", error=0.01)
    def effect(seeds):
        """An effect that is none."""
        return {"error": np.array([0.1, -0.1, 0.0, 0.1, -0.1])}

    differences = [0.1, -0.1, 0.0, 0.1, -0.1]
    assert effect.run(lambda seeds: {"error": (differences, verdict)})
    assert not effect.run(lambda seeds: {"error": (differences, "lower")})


def test_a_change_of_a_leaf_in_place_is_named():
    @question
    def moved(trial):
        """One more."""
        x = torch.ones(2).requires_grad_()
        trial("a leaf", {"x": x}, torch.full((2,), 2.0))

    def answer(x):
        x += 1
        return x

    assert "It changed an input in place" in str(moved.run(answer))
    assert moved.run(lambda x: x + 1)


def test_a_forbidden_name_is_seen_in_a_function_inside_an_answer():
    def answer(a, b):
        def interval(d):
            return [mean_interval(v) for v in d]  # noqa: F821

        return interval(a - b)

    assert "mean_interval" in names_used(answer) and names_used(max) == set()
    assert "without mean_interval" in str(check.paired_interval.run(answer))
