"""The mean's confidence interval: equal to scipy's, with the right coverage, and NaN for NaN."""

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flatmin.book import mean_interval, pm
from flatmin.stack import Runs


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-6),
    st.sampled_from([0.5, 0.9, 0.95, 0.999]),
)
def test_interval_is_scipys_t_interval(values, confidence):
    m = mean_interval(xr.DataArray(values, dims="seed"), confidence=confidence)
    low, high = stats.t.interval(confidence, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose([m["low"], m["high"]], [low, high], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(m["mean"], np.mean(values), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(m["half"], (high - low) / 2, rtol=1e-9)


def test_every_combination_has_its_own_interval():
    values = xr.DataArray(
        np.random.default_rng(0).random((2, 5, 3)),
        dims=("lr", "seed", "step"),
        coords={"lr": [0.1, 0.2], "step": [0, 5, 9]},
    )
    m = mean_interval(values)
    assert m["mean"].dims == ("lr", "step")
    assert m.step.values.tolist() == [0, 5, 9]
    one = mean_interval(values.sel(lr=0.2, step=5))
    for name in ("mean", "low", "high", "half"):
        assert m[name].sel(lr=0.2, step=5).item() == pytest.approx(one[name].item(), rel=1e-12)
    assert mean_interval(values, dim="step")["mean"].dims == ("lr", "seed")


def test_every_variable_of_a_result_has_its_own_interval():
    rng = np.random.default_rng(1)
    dataset = xr.Dataset(
        {
            "loss": (("lr", "seed", "step"), rng.random((2, 5, 3))),
            "diverged_at": (("lr", "seed"), np.full((2, 5), -1)),
        },
        {"lr": [0.1, 0.2], "step": [0, 5, 9]},
    )
    for result in (dataset, Runs(dataset)):
        found = mean_interval(result)
        assert set(found.data_vars) == {"loss", "diverged_at"} and "seed" not in found.dims
        for name in found.data_vars:
            one = mean_interval(dataset[name])
            for statistic in ("mean", "low", "high", "half"):
                xr.testing.assert_equal(
                    found[name].sel(statistic=statistic, drop=True), one[statistic]
                )


def test_nan_is_not_averaged_away():
    values = xr.DataArray([[1.0, 2.0, 3.0], [1.0, math.nan, 3.0]], dims=("lr", "seed"))
    m = mean_interval(values)
    assert m.isel(lr=1).to_array().isnull().all()
    assert not m.isel(lr=0).to_array().isnull().any()
    assert not bool(m["low"].isel(lr=1) > -math.inf)  # so that no comparison holds


def test_whole_numbers_and_truth_values():
    assert mean_interval(xr.DataArray([1, 2, 3], dims="seed"))["mean"] == 2
    assert mean_interval(xr.DataArray([True, False], dims="seed"))["mean"] == 0.5
    single = xr.DataArray(np.array([1, 1 + 2**-20], dtype=np.float32), dims="seed")
    assert mean_interval(single)["half"] > 0


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("n", [2, 5, 20])
def test_coverage(n, confidence):
    repetitions = 20000
    values = np.random.default_rng(n).normal(3.0, 2.0, (repetitions, n))
    m = mean_interval(xr.DataArray(values, dims=("trial", "seed")), confidence=confidence)
    covered = float(((m["low"] < 3.0) & (m["high"] > 3.0)).mean())
    assert abs(covered - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / repetitions)


def test_bad_input_is_named():
    values = xr.DataArray([1.0, 2.0], dims="seed")
    with pytest.raises(ValueError, match=r"dim must be one of \['seed'\], got 'seeds'"):
        mean_interval(values, "seeds")
    for confidence in (0, 1, 95, -0.5, math.nan):
        with pytest.raises(ValueError, match=rf"confidence must lie in \(0, 1\), got {confidence}"):
            mean_interval(values, confidence=confidence)
    with pytest.raises(ValueError, match="at least 2 along 'seed'.*, got 1"):
        mean_interval(values[:1])
    for other in ([1.0, 2.0], np.ones(3), None):
        name = type(other).__name__
        with pytest.raises(
            TypeError, match=f"values must be a DataArray, a Dataset or Runs, got {name}"
        ):
            mean_interval(other)


def test_pm_is_the_interval_as_text():
    values = xr.DataArray([0.1, 0.2, 0.4], dims="seed")
    m = mean_interval(values)
    assert pm(values, 3) == f"{m['mean'].item():.3f} ± {m['half'].item():.3f}"
    assert pm(xr.DataArray([1.0, float("nan")], dims="run"), dim="run") == "nan ± nan"
