"""m-SAM by m, and m-sharpness against the gap (Foret et al. 2021, section 4.1, figure 3).

A small network is trained by SAM with one perturbation per shard of m examples, for several m and,
for each, several radii.  Then the m'-sharpness of every network is compared with its generalization
gap, for several m'.  All radii and seeds of one m are one stack.

The network has no batch norm, so that each example has its own gradient, and there is no
augmentation.  The paper's network is "a small ResNet"; for the right panel of its figure it
measures other networks, those of a competition, and uses mutual information.
"""

from functools import partial

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from ... import measure
from ...gradient import SAM
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..plotting import COLORS, band
from . import vision
from .display import shade
from .stiffness_training import network

SOURCE = "Foret et al. 2021, section 4.1 and figure 3 (middle, right)"

_OURS = {
    "data": "cifar10",
    "network": "CNN",
    "train_size": 10_000,
    "validation_size": 5000,
    "m": [1, 4, 16, 64, 256],
    "rho": [0.0, 0.02, 0.05, 0.1, 0.2],
    "lr": 0.05,
    "batch_size": 256,
    "epochs": 40,
    "measured_m": [1, 4, 16, 64, 256, 1024],
    "examples": 1024,
    "radius": 0.05,
    "shards": 256,
    "seeds": 3,
}
SETTINGS = {
    "tiny": _OURS
    | {
        "data": "synthetic",
        "train_size": 32,
        "validation_size": 32,
        "m": [4, 16],
        "rho": [0.0, 0.05],
        "batch_size": 16,
        "epochs": 2,
        "measured_m": [4, 16],
        "examples": 16,
        "seeds": 2,
    },
    # Recorded in 156 s on an H100 shared by sixteen processes.  The network is too small to
    # memorize the labels.
    "reduced": _OURS,
    "paper": _OURS
    | {
        "network": "ResNet-20",
        "train_size": 45_000,
        "rho": [0.0, 0.01, 0.02, 0.05, 0.1, 0.15],
        "lr": 0.1,
        "epochs": 200,
        "measured_m": [1, 4, 16, 64, 256, 1024, 4096],
        "examples": 4096,
        "shards": 16,
        "seeds": 5,
    },
}


def units(settings: dict) -> list[dict]:
    return [{"m": m} for m in settings["m"]]


def cost(settings: dict) -> float:
    trained = _steps(settings) * 2 * settings["batch_size"]
    runs = len(settings["rho"]) * len(settings["seeds"])
    return len(settings["m"]) * (runs * trained + _measured(settings))


def _steps(settings: dict) -> int:
    return settings["epochs"] * -(-settings["train_size"] // settings["batch_size"])


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    data = vision.load(settings["data"], settings["train_size"], settings["validation_size"])
    steps = _steps(settings)
    recipe = Recipe(
        gradient=SAM(m=unit["m"], chunk_size=settings["shards"]),
        optimizer=SGD(settings["lr"], momentum=0.9, schedule="cosine"),
    )
    runs = work.chunks(
        lambda size: fit(
            lambda: network(settings["network"], data),
            data,
            recipe,
            steps=steps,
            batch_size=settings["batch_size"],
            grid={"rho": settings["rho"]},
            seeds=settings["seeds"],
            evaluate_at=[steps],
            networks="last",
            splits=["train", "validation", "test"],
            chunk_size=size,
            device=work.device,
            expect_divergence=True,
            progress=lambda gradients: work.progress(2 * gradients),
        ),
        len(settings["rho"]) * len(settings["seeds"]),
    )
    result = runs.isel(step=-1, drop=True)
    result["sharpness"] = xr.concat(
        [sharpness(runs.networks, data, m, settings) for m in settings["measured_m"]], "measured_m"
    ).assign_coords(measured_m=settings["measured_m"])
    work.progress(_measured(settings))
    result.attrs = {"data": vision.data_source(settings["data"])}
    return result


def sharpness(networks, data, m: int, settings: dict) -> xr.DataArray:
    """m-sharpness of a stack's networks, on the first examples of the training set."""
    instrument = partial(measure.sharpness, rho=settings["radius"], m=m, batch_size=256)
    by_seed = [
        networks.select(seed=[seed]).measure(instrument, data, "train", settings["examples"])
        for seed in settings["seeds"]
    ]
    return xr.concat(by_seed, "seed")


def _measured(settings: dict) -> int:
    """The gradients of a unit's measurements: two per example."""
    runs = len(settings["rho"]) * len(settings["seeds"])
    return runs * 2 * settings["examples"] * len(settings["measured_m"])


# ------------------------------------------------------------------------------ from the record


def best_radius(record: xr.Dataset) -> xr.Dataset:
    """For each m, the radius with the lowest mean validation error."""
    mean = record.validation_error.mean("seed", skipna=False).fillna(np.inf)
    return record.isel(rho=mean.argmin("rho"))


def correlation(record: xr.Dataset, given: str | None = None) -> xr.DataArray:
    r"""Rank correlation of m-sharpness with the gap, over all m and radii, for each seed.

    The gap is test error minus training error.  With ``given``, a variable c of the record, it is
    the partial correlation,

    .. math:: r_{ab\cdot c}=\frac{r_{ab}-r_{ac}\,r_{bc}}{\sqrt{(1-r_{ac}^2)(1-r_{bc}^2)}}.

    Runs that diverged are left out; the runs with radius 0, which are the same for each m, count
    once.

    Returns
    -------
    DataArray
        Dimensions ``measured_m`` and ``seed``.
    """
    gap = record.test_error - record.train_error
    distinct = ((record.rho > 0) | (record.m == record.m[0])).broadcast_like(gap)

    def correlate(distinct, *rows):
        keep = distinct & np.isfinite(rows).all(0)
        if keep.sum() < 3:
            return np.nan
        with np.errstate(invalid="ignore", divide="ignore"):  # if all values of a row are equal
            r = np.corrcoef(rankdata(np.array(rows)[:, keep], axis=1))
        if len(rows) < 3:
            return r[0, 1]
        rest = (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)
        return (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt(rest) if rest > 1e-9 else np.nan

    rows = [distinct, record.sharpness, gap, *([record[given]] if given else [])]
    stacked = [row.stack(run=("m", "rho")) for row in rows]
    return xr.apply_ufunc(
        correlate, *stacked, input_core_dims=[["run"]] * len(rows), vectorize=True
    )


def plot(record: xr.Dataset):
    """Test error over the radius, and over m with the radius that validation chooses; correlations.

    The correlation is that of m-sharpness with the gap between test and training error.
    """
    import matplotlib.pyplot as plt

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.4))
    count = record.sizes["m"]
    for i, m in enumerate(record.m.values):  # the smaller m, the stronger the colour
        color = shade("SAM", 0.25 + 0.75 * (count - 1 - i) / max(1, count - 1))
        line = band(left, 100 * record.test_error.sel(m=m, drop=True), "rho", color)
        line.set_label(f"m = {m}")
    left.legend(loc="upper left", fontsize=7.5)
    left.set(title="Test error", xlabel="radius ρ", ylabel="%")
    best = best_radius(record).test_error.drop_vars("rho")
    band(middle, 100 * best, "m", COLORS["SAM"], marker="o")
    for m, rho, y in zip(record.m.values, best_radius(record).rho.values, 100 * best.mean("seed")):
        middle.annotate(
            f"ρ = {rho:g}", (m, y), (0, 7), textcoords="offset points", ha="center", fontsize=7.5
        )
    middle.set(title="… radius chosen by validation", xlabel="m, of training", ylabel="%")
    middle_note = "paper (figure 3): lower for smaller m"
    views = {
        "as it is": (None, COLORS["ERM"]),
        "given the training loss": ("train_loss", COLORS["another"]),
    }
    for label, (given, color) in views.items():
        line = band(right, correlation(record, given), "measured_m", color, marker="o")
        line.set_label(label)
    right.axhline(0, color="#555555", linewidth=0.8)
    right.legend(loc="lower left")
    right.set(
        title="m-sharpness and the gap",
        xlabel="m, of the measure",
        ylim=(-1.05, 1.3),
        ylabel="rank correlation",
    )
    right_note = "paper (figure 3): rises as m falls"
    panels = ((middle, record.m, middle_note), (right, record.measured_m, right_note))
    for ax, values, note in panels:
        ax.text(0.02, 0.98, note, transform=ax.transAxes, va="top", fontsize=8, color=COLORS["ERM"])
        ax.set_xscale("log", base=2)
        ax.set_xlim(float(values.min()) / 1.5, float(values.max()) * 1.5)
    return fig
