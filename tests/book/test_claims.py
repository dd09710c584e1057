"""Claims: one line of output, or an error."""

import json
import sys

import numpy as np
import pytest
import torch
import xarray as xr

from flatmin import Recipe, best_step, fit
from flatmin.book import (
    MLP,
    checks,
    claim,
    first_seed,
    mean_interval,
    pm,
    seeds,
    stated,
    two_gaussians,
)
from flatmin.optimizer import SGD

TRUE = [
    True,
    np.True_,
    np.array(True),
    torch.tensor(True),
    torch.tensor([True]),
    xr.DataArray(True),
]
FALSE = [False, np.False_, torch.tensor(False), xr.DataArray(False)]


@pytest.mark.parametrize("condition", TRUE, ids=lambda c: type(c).__name__)
def test_a_true_claim_prints_one_line(condition, capsys):
    assert claim("some-id-2", "the statement, as it stands", condition) is None
    out, err = capsys.readouterr()
    assert out == "✓ some-id-2: the statement, as it stands\n"
    assert err == ""


@pytest.mark.parametrize("condition", FALSE, ids=lambda c: type(c).__name__)
def test_a_false_claim_raises(condition, capsys):
    with pytest.raises(AssertionError, match="claim 'some-id' does not hold: the statement"):
        claim("some-id", "the statement", condition)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "condition",
    [
        1,
        0,
        None,
        "yes",
        0.3,
        np.array([True, True]),
        torch.tensor([True, False]),
        torch.tensor(1),
        xr.DataArray([True, True]),
        [],
        np.array([], dtype=bool),
    ],
    ids=repr,
)
def test_a_condition_is_one_truth_value(condition):
    with pytest.raises(TypeError, match="condition must be one truth value, got "):
        claim("some-id", "the statement", condition)


class OnDevice:
    """Like a tensor on a GPU, which NumPy cannot convert before it is moved to the CPU."""

    def __array__(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return torch.tensor(True)


def test_a_condition_on_a_device(capsys):
    claim("on-device", "the statement", OnDevice())
    assert capsys.readouterr().out == "✓ on-device: the statement\n"


@pytest.mark.parametrize(
    "id", ["", "Upper", "two words", "under_score", "-a", "a-", "a--b", "ü", "a\n"]
)
def test_ids_are_words_joined_by_hyphens(id):
    with pytest.raises(
        ValueError, match="id must be lower-case words joined by hyphens, got "
    ) as e:
        claim(id, "the statement", True)
    assert repr(id) in str(e.value)


def test_a_claim_can_be_edited_and_run_again(capsys):
    """That two claims of the book share no id is a test of the chapters."""
    claim("edited", "the statement", True)
    claim("edited", "a better statement", True)
    assert capsys.readouterr().out == "✓ edited: the statement\n✓ edited: a better statement\n"


@pytest.fixture(scope="module")
def diverged():
    """Runs at two learning rates, one of which diverges."""
    settings = dict(steps=4, seeds=2, grid={"lr": [0.1, 1e30]}, evaluate_at=2, device="cpu")
    with pytest.warns(UserWarning, match="the loss of 2 runs is not finite: lr=1e"):
        recipe = Recipe(optimizer=SGD(weight_decay=1.0))
        return fit(lambda: MLP(10, 2), two_gaussians(test_size=10), recipe, **settings)


# The ways in which a notebook may store its results.
KEPT = {
    "a variable": lambda runs: runs,
    "the Dataset": lambda runs: runs.data,
    "a dictionary": lambda runs: {"SGD": runs},
    "a pair": lambda runs: (runs, None),
    "a list of pairs": lambda runs: [("SGD", (runs, None))],
    "the best step": lambda runs: best_step(runs, "validation_loss"),
    "one run": lambda runs: runs.sel(lr=1e30, seed=0),
    "the end": lambda runs: runs.isel(step=-1),
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_a_claim_on_diverged_runs_is_an_error(keep, diverged, capsys):
    runs = keep(diverged)  # noqa: F841  # the claim looks for it
    with pytest.raises(AssertionError, match="'some-id' rests on runs that diverged") as raised:
        claim("some-id", "the statement", True)
    assert str(raised.value).count("seed=0 at step ") == 1
    assert "expect_divergence=True" in str(raised.value)
    assert capsys.readouterr().out == ""


def test_a_claim_on_other_runs_is_allowed(diverged, capsys):
    runs = diverged.sel(lr=[0.1])  # noqa: F841
    expected = diverged.assign_attrs(divergence="expected")  # noqa: F841  # as fit writes it
    del diverged
    claim("some-id", "the statement", True)
    assert capsys.readouterr().out == "✓ some-id: the statement\n"


def test_a_claim_looks_at_the_variables_of_a_notebook(diverged):
    with pytest.raises(AssertionError, match="lr=1e+30, seed=1 at step".replace("+", r"\+")):
        exec('claim("some-id", "the statement", True)', {"claim": claim, "runs": diverged})


CELL = """
import warnings
from flatmin import Recipe, fit
from flatmin.book import MLP, claim, two_gaussians
from flatmin.optimizer import SGD
data = two_gaussians(train_size=20, test_size=10)
def cell(lr, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the loss is not finite
        recipe = Recipe(optimizer=SGD(lr=lr, weight_decay=1.0))
        return fit(lambda: MLP(10, 2), data, recipe, steps=4, seeds=1, device="cpu", **more)
"""
CLAIM = 'claim("finite", "the loss is finite", bool(runs.train_loss.notnull().all()))'
ANY = 'claim("any", "something else", True)'


def test_a_cell_that_diverged_can_be_run_again(capsys):
    """In one namespace, as a notebook has."""
    names = {}
    exec(CELL, names)
    exec("runs = cell(1e30)", names)
    with pytest.raises(AssertionError, match="rests on runs that diverged"):
        exec(ANY, names)
    exec("runs = cell(0.1)", names)
    exec(CLAIM, names)
    exec("runs = cell(1e30, expect_divergence=True)", names)
    exec(ANY, names)
    assert capsys.readouterr().out == "✓ finite: the loss is finite\n✓ any: something else\n"
    exec("sweep = {'SGD': [cell(1e30)]}", names)
    with pytest.raises(AssertionError, match="rests on runs that diverged"):
        exec(ANY, names)


def test_the_history_of_a_notebook_is_not_held_against_a_claim(tmp_path, monkeypatch, capsys):
    """IPython keeps what a cell displayed as _, Out[2] and _2, whatever the cell shows later."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the shell replaces it
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    run = lambda source: shell.run_cell(source, store_history=True)
    for source in (CELL, "cell(1e30)", "cell(1e30)", "cell(1e30)"):
        run(source).raise_error()
    assert {"_", "__", "___", "_2", "Out", "_oh"} <= set(shell.user_ns)
    assert (shell.user_ns["_"].diverged_at >= 0).all() and len(shell.user_ns["Out"]) == 3
    run("runs = cell(0.1)").raise_error()
    capsys.readouterr()
    run(CLAIM).raise_error()
    assert capsys.readouterr().out == "✓ finite: the loss is finite\n"
    run("_runs = cell(1e30)").raise_error()  # a name of the reader's own
    assert isinstance(run(ANY).error_in_exec, AssertionError)


def test_the_log_lists_all_claims(tmp_path, monkeypatch, capsys, diverged):
    later = lambda runs=diverged: runs  # hides the runs
    del diverged
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("FLATMIN_CLAIMS_LOG", str(log))
    claim("one", "größer als 0", True)
    claim("two", "the second", False)
    runs = later()  # noqa: F841
    claim("three", "the third", True)
    assert [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] == [
        {"id": "one", "text": "größer als 0", "holds": True},
        {"id": "two", "text": "the second", "holds": False},
        {"id": "three", "text": "the third", "holds": False},
    ]
    assert capsys.readouterr().out.splitlines() == [
        "✓ one: größer als 0",
        "✗ two: the second",
        "✗ three: the third",
    ]
    with pytest.raises(TypeError):  # a wrong type still raises
        claim("four", "the fourth", 1)


def test_seeds(monkeypatch):
    assert first_seed() == 0
    assert seeds(3) == [0, 1, 2]
    monkeypatch.setenv("FLATMIN_SEED", "7")
    assert first_seed() == 7000
    assert seeds(2) == [7000, 7001]
    assert seeds(np.int64(1)) == [7000]
    assert all(type(seed) is int for seed in seeds(np.int64(3)))


@pytest.mark.parametrize("value", ["", "-1", "1.5", "one", "²"])
def test_bad_base_seed(monkeypatch, value):
    monkeypatch.setenv("FLATMIN_SEED", value)
    with pytest.raises(
        ValueError, match="FLATMIN_SEED must be a whole number >= 0, got "
    ) as raised:
        first_seed()
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("n", [0, -1, 2.0, "5", None, True])
def test_bad_number_of_seeds(n):
    with pytest.raises(ValueError, match=f"n must be a whole number >= 1, got {n!r}"):
        seeds(n)


# -------------------------------------------------------------------------------- stated numbers

VALUES = xr.DataArray([-3.1, -4.6, -3.9, -4.2, -3.2], dims="seed")  # -3.80 ± 0.80
BOTH = [VALUES, VALUES.values, torch.tensor(VALUES.values), VALUES.values.tolist()]


@pytest.fixture
def author(monkeypatch):
    monkeypatch.setenv("FLATMIN_AUTHOR", "1")


@pytest.mark.parametrize("values", BOTH, ids=lambda values: type(values).__name__)
def test_for_the_author_a_number_comes_out_as_printed(author, values, capsys):
    assert pm(VALUES, 2) == "-3.80 ± 0.80"
    for text in ("by −3.8 ± 0.8 points", "by -3.80 ± 0.80", "−3.8 points", "-4"):
        stated(text, values)
        assert capsys.readouterr().out == f"✓ {text}\n"
    for text in ("by −3.7 ± 0.8", "−3.8 ± 0.7", "−3.81", "3.8", "−3.80 ± 0.8"):
        if text == "−3.80 ± 0.8":  # each part has its own decimals
            stated(text, values)
            continue
        with pytest.raises(
            AssertionError, match=rf"states '{text}', the run gives -[34]\.?\d* ± 0"
        ):
            stated(text, values)


def test_later_a_number_may_move_within_its_interval(monkeypatch):
    monkeypatch.delenv("FLATMIN_AUTHOR", raising=False)
    half = float(mean_interval(VALUES)["half"])
    for shift in (-0.79, 0.79):
        stated("−3.8 ± 0.8", VALUES + shift)
        stated("−3.8", VALUES + np.sign(shift) * 0.99 * half)
    for shift in (-0.81, 0.81):
        with pytest.raises(AssertionError, match="the run gives"):
            stated("−3.8 ± 0.8", VALUES + shift)
        with pytest.raises(AssertionError, match="the run gives"):
            stated("−3.8", VALUES + np.sign(shift) * 1.01 * half)
    spread = lambda factor: VALUES.mean() + factor * (VALUES - VALUES.mean())
    for factor in (0.52, 1.98):
        stated("−3.8 ± 0.80", spread(factor))
        stated("−3.8", spread(factor))
    for factor in (0.48, 2.03):
        with pytest.raises(AssertionError, match="the run gives"):
            stated("−3.8 ± 0.80", spread(factor))


def test_rounding_in_the_text_is_no_difference():
    """The number of the author's run holds for the same run, however narrow its interval."""
    narrow = 3.4 + 0.01 * VALUES
    stated("about 3", narrow)
    stated("3.4 ± 0.0", narrow)
    with pytest.raises(AssertionError, match="the run gives"):
        stated("about 4", narrow)


def test_a_run_that_diverged_is_not_averaged_away():
    with pytest.raises(AssertionError, match="the run gives nan"):
        stated("−3.8 ± 0.8", VALUES.where(VALUES < -4))


def test_other_seeds_and_devices_print_both_numbers(author, monkeypatch, capsys):
    monkeypatch.setenv("FLATMIN_SEED", "3")
    stated("−2.0 ± 0.10 points", VALUES)
    assert capsys.readouterr().out == "– −2.0 ± 0.10 points: here -3.8 ± 0.80\n"
    monkeypatch.delenv("FLATMIN_SEED")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stated("−2 points", VALUES)
    assert capsys.readouterr().out == "– −2 points: here -4 ± 1\n"
    with pytest.raises(AssertionError, match="the run gives 61"):
        stated("60 degrees", 61, exact=True)  # deterministic everywhere


def test_an_exact_number_comes_out_as_printed(capsys):
    stated("2,410 weights", 2410, exact=True)
    stated("0.0", -1e-9, exact=True)
    for text, value in (("2,400 weights", 2410), ("0.33", 0.3366)):
        with pytest.raises(AssertionError, match="the run gives"):
            stated(text, value, exact=True)
    with pytest.raises(ValueError, match="no interval with exact=True, got '1.0 ± 0.0'"):
        stated("1.0 ± 0.0", 1.0, exact=True)


@pytest.mark.parametrize("text", ["", "points", "3 of 5", "3.8 ± 0.7 and 2"])
def test_a_text_has_one_number(text):
    with pytest.raises(ValueError, match="text must have one number, .* got "):
        stated(text, VALUES)


def test_checks_print_one_line(capsys):
    with checks():
        claim("some-id", "the statement", True)
        stated("−3.8 ± 0.8", VALUES)
    assert capsys.readouterr().out == "✓ 2 checks\n"
    claim("some-id", "the statement", True)
    assert capsys.readouterr().out == "✓ some-id: the statement\n"


def test_checks_show_what_is_not_right(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FLATMIN_SEED", "1")
    monkeypatch.setenv("FLATMIN_CLAIMS_LOG", str(tmp_path / "log"))
    with checks():
        claim("some-id", "the statement", False)
        claim("other-id", "the statement", True)
        stated("−3.8 ± 0.8", VALUES)
    out = capsys.readouterr().out.splitlines()
    assert out == ["✗ some-id: the statement", "– −3.8 ± 0.8: here -3.8 ± 0.8", "✓ 1 check"]
    monkeypatch.delenv("FLATMIN_CLAIMS_LOG")
    with pytest.raises(AssertionError, match="does not hold"), checks():
        claim("some-id", "the statement", False)
    assert capsys.readouterr().out == ""
