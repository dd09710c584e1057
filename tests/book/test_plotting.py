"""Figures draw the mean and its interval."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from flatmin.book import mean_interval
from flatmin.book.plotting import COLORS, band, bars, label_end, use_style


@pytest.fixture
def ax():
    with plt.rc_context():
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


VALUES = xr.DataArray(
    np.random.default_rng(0).random((5, 4)), dims=("seed", "step"), coords={"step": [0, 10, 25, 40]}
)


@pytest.mark.parametrize("values", [VALUES, VALUES.T], ids=["seed, step", "step, seed"])
def test_band_draws_the_mean_and_its_interval(ax, values):
    line = band(ax, values, color=COLORS["SAM"], label="SAM", dy=3, linestyle="--")
    m = mean_interval(VALUES)
    assert line.get_xdata().tolist() == [0, 10, 25, 40]
    np.testing.assert_allclose(line.get_ydata(), m["mean"])
    assert line.get_color() == COLORS["SAM"]
    assert line.get_linestyle() == "--"
    (area,) = ax.collections
    vertices = area.get_paths()[0].vertices
    for name in ("low", "high"):
        for x, y in zip(m.step.values, m[name].values, strict=True):
            assert np.isclose(vertices, (x, y)).all(1).any(), f"{name} at {x} is not on the edge"
    assert vertices[:, 1].max() == pytest.approx(m["high"].max().item())
    assert vertices[:, 1].min() == pytest.approx(m["low"].min().item())
    (text,) = ax.texts
    assert text.get_text() == "SAM"
    assert text.xy == (40, pytest.approx(m["mean"][-1].item()))


def test_band_against_another_dimension_without_a_label(ax):
    values = VALUES.rename(step="rho")
    assert band(ax, values, x="rho").get_xdata().tolist() == [0, 10, 25, 40]
    assert not ax.texts


@pytest.mark.parametrize("values", [VALUES.expand_dims(lr=2), VALUES[0], VALUES.rename(step="rho")])
def test_band_needs_seed_and_x(ax, values):
    with pytest.raises(ValueError, match="values must have the dimensions 'seed' and 'step', got"):
        band(ax, values)
    assert not ax.lines


def test_bars_draw_a_dot_and_an_interval_per_row(ax):
    rows = {"ERM": VALUES[:, 0], "flooding": VALUES[:, 1]}
    bars(ax, rows, {"flooding": "#0072b2"}, unit=100)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["ERM", "flooding"]
    for row, (container, value) in enumerate(zip(ax.containers, rows.values(), strict=True)):
        m = mean_interval(value)
        dot, caps, _ = container
        assert dot.get_xdata()[0] == pytest.approx(100 * m["mean"].item())
        assert dot.get_ydata()[0] == row
        ends = sorted(cap.get_xdata()[0] for cap in caps)
        assert ends == pytest.approx([100 * m["low"].item(), 100 * m["high"].item()])
    assert ax.containers[1][0].get_color() == "#0072b2"
    assert ax.containers[0][0].get_color() == COLORS["ERM"]
    low, high = ax.get_ylim()
    assert low > high  # the first row is on top


def test_label_end_stands_at_the_last_point(ax):
    label_end(ax, [1, 2, 3], xr.DataArray([5.0, 6.0, 7.0]), "here", "red", dy=4)
    assert ax.texts[0].xy == (3.0, 7.0)
    assert ax.texts[0].get_text() == "here"


def test_colors_are_different_and_legible_on_white():
    assert len(set(COLORS.values())) == len(COLORS)
    for name in set(COLORS) - {"faint"}:
        channels = np.array(matplotlib.colors.to_rgb(COLORS[name]))
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        contrast = 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)
        assert contrast >= 3, f"{name}: WCAG 2.1 asks for 3:1 between graphics and background"


def test_matplotlib_accepts_the_style():
    with plt.rc_context():
        use_style()
        assert plt.rcParams["axes.grid"]
        fig, ax = plt.subplots()
        band(ax, VALUES, label="x")
        fig.canvas.draw()
        plt.close(fig)
