"""The synthetic study of the flooding paper: three data sets, label noise, 51 flood levels.

A network with four hidden layers of 500 units (linear without bias, batch normalization, ReLU) is
trained with the full batch of 100 examples, some of whose labels are wrong, by SGD and by Adam.
Every seed has its own data, weights and label noise.  Nothing is selected during training: all
levels are recorded at all evaluated steps, on training, validation and clean test examples.  The
figures then choose the level by validation, with or without early stopping.

Network, optimizers and set sizes are, for all three sets, those of the authors' demo for the
sinusoid.  ``"paper"`` has the paper's levels and noise, and 500 epochs, the default of the authors'
script for synthetic data.  ``"demo"``, of which the evidence for Chapter 2 takes the early
stopping, has the demo's noise, levels and 200 epochs, and smaller test sets.
"""

import json
import math

import numpy as np
import xarray as xr

from ...loss import Flooding
from ...optimizer import SGD, Adam
from ...pipeline import Recipe
from ...stack import best_step, fit
from ..datasets import sinusoid, spiral, two_gaussians
from ..models import MLP
from ..plotting import COLORS, band, bars
from .display import shade

SOURCE = "Ishida et al. 2020, synthetic data"
DEFAULT = "demo"

SETS = {"two_gaussians": two_gaussians, "sinusoid": sinusoid, "spiral": spiral}
OPTIMIZERS = {"SGD": SGD(lr=0.01, momentum=0.9), "Adam": Adam(lr=1e-3)}
LEVELS = [round(0.01 * k, 2) for k in range(51)]

PAPER = {
    "sets": list(SETS),
    "label_noise": [0.01, 0.05, 0.1],
    "optimizers": list(OPTIMIZERS),
    "levels": LEVELS,
    "seeds": 10,
    "steps": 500,  # a step is an epoch: the batch is the full training set
    "evaluations": 50,
    "test_size": 20_000,
    "width": 500,
    "chunk_size": 510,
}
SETTINGS = {
    "tiny": PAPER
    | {
        "sets": ["two_gaussians", "spiral"],
        "label_noise": [0.1],
        "levels": [0.0, 0.3],
        "seeds": 2,
        "steps": 4,
        "evaluations": 2,
        "test_size": 50,
        "width": 8,
    },
    "demo": PAPER
    | {
        "label_noise": [0.1],
        "steps": 200,
        "evaluations": 20,
        "test_size": 2000,
        "levels": {"SGD": [0.0, 0.26, 0.27, 0.28], "Adam": [0.0, 0.24, 0.25, 0.26]},
        "chunk_size": 20,
    },
    "reduced": PAPER | {"levels": LEVELS[::2], "evaluations": 20, "test_size": 5000},
    "paper": PAPER,
}


def units(settings: dict) -> list[dict]:
    """A unit is a stack: all levels and seeds for one set, noise (if several) and optimizer."""
    several = len(settings["label_noise"]) > 1
    return [
        {"set": name} | ({"label_noise": noise} if several else {}) | {"optimizer": optimizer}
        for name in settings["sets"]
        for noise in settings["label_noise"]
        for optimizer in settings["optimizers"]
    ]


def cost(settings: dict) -> float:
    """Runs × (steps × 100 examples + all evaluations); an evaluation is a third of a gradient."""
    runs = sum(len(levels_of(unit, settings)) for unit in units(settings)) * len(settings["seeds"])
    return runs * settings["steps"] * 100.0 * per_gradient(settings)


def per_gradient(settings: dict) -> float:
    """The cost of a gradient, with its share of the evaluations."""
    evaluated = (settings["evaluations"] + 1) * (3 * 100 + settings["test_size"])
    return 1 + evaluated / 3 / (settings["steps"] * 100)


def levels_of(unit: dict, settings: dict) -> list[float]:
    """The flood levels: the same for both optimizers or, in the demo, one list for each."""
    levels = settings["levels"]
    return levels[unit["optimizer"]] if isinstance(levels, dict) else levels


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    """Train every level and seed of a unit as one stack."""
    seeds, levels, width = settings["seeds"], levels_of(unit, settings), settings["width"]
    noise = unit.get("label_noise", settings["label_noise"][0])
    data = [
        SETS[unit["set"]](label_noise=noise, test_size=settings["test_size"], seed=seed)
        for seed in seeds
    ]
    network = lambda: MLP(data[0].x_train.shape[1], *[width] * 4, 2, bias=False, batch_norm=True)
    runs = work.chunks(
        lambda size: fit(
            network,
            data,
            Recipe(loss=Flooding(), optimizer=OPTIMIZERS[unit["optimizer"]]),
            steps=settings["steps"],
            batch_size=None,
            grid={"flood_level": levels},
            seeds=seeds,
            evaluate_at=min(settings["steps"], settings["evaluations"]),
            splits=["train", "validation", "validation_clean", "test"],
            chunk_size=size,
            device=work.device,
            expect_divergence=True,
            progress=lambda gradients: work.progress(gradients * per_gradient(settings)),
        ),
        settings["chunk_size"],
    )
    runs = runs.data.map(
        lambda v: v.astype("float32") if v.dtype.kind == "f" else v
    )  # half the space
    runs = runs.assign({name: rounded(v) for name, v in runs.items() if name.endswith("_loss")})
    runs.attrs = {
        "data": "generated: " + ", ".join(settings["sets"]),
        "network": f"MLP d-{width}-{width}-{width}-{width}-2 without biases, with batch normalization",
        "optimizers": {name: repr(OPTIMIZERS[name]) for name in settings["optimizers"]},
        "batch_size": len(data[0].x_train),
        "dtype": "torch.float32",
    }
    if isinstance(settings["levels"], dict):  # by position, as the values depend on the optimizer
        runs = runs.rename(flood_level="level").assign_coords(
            level=range(len(levels)), flood_level=("level", levels)
        )
    return runs


def rounded(losses: xr.DataArray) -> xr.DataArray:
    """Losses rounded to 16 binary (nearly five decimal) digits, which compress well.

    >>> rounded(xr.DataArray([1.0, 0.123456789], dims="step")).values.round(6)
    array([1.      , 0.123457])
    """
    fraction, exponent = np.frexp(losses.values)
    return losses.copy(data=np.ldexp(np.round(fraction * 2**16) / 2**16, exponent))


def chosen(study: xr.Dataset, stop: bool) -> tuple[xr.DataArray, xr.DataArray]:
    """Accuracy on clean test labels in per cent: without flooding, and at the level chosen.

    The level is chosen for each seed by the error on *clean* validation labels, as in the authors'
    demo; ``stop`` chooses the step in the same way; otherwise it is the last step.
    """
    study = best_step(study, "validation_clean_error") if stop else study.isel(step=-1)
    level = "level" if "level" in study.dims else "flood_level"
    flooded = study.isel({level: slice(1, None)})
    flooded = flooded.isel({level: flooded.validation_clean_error.argmin(level)})
    return 100 * (1 - study.test_error.isel({level: 0})), 100 * (1 - flooded.test_error)


def plot(record: xr.Dataset):
    """Accuracies where a record has few levels, gains against the level where it has many."""
    return drawing(record)(record)


def drawing(record: xr.Dataset):
    """The figure that suits a record: one of few levels, or of many."""
    return sweeps if record.sizes.get("flood_level", 0) > 5 else accuracies


def accuracies(record: xr.Dataset):
    """Test accuracy with flooding and without, after the last epoch and stopped early; means and
    95 % intervals over the seeds, levels and steps chosen by clean validation labels."""
    import matplotlib.pyplot as plt

    if "label_noise" not in record.dims:
        record = record.expand_dims(label_noise=json.loads(record.attrs["settings"])["label_noise"])
    sets, noises, optimizers = (record[k].values for k in ("set", "label_noise", "optimizer"))
    fig, axes = plt.subplots(
        len(noises),
        len(sets),
        figsize=(1.6 + 2.5 * len(sets), 0.6 + 2.1 * len(noises)),
        sharex="col",
        sharey=True,
        squeeze=False,
    )
    (plain, flooded), (plain_stopped, flooded_stopped) = (chosen(record, s) for s in (False, True))
    lines = {
        "no flooding": (plain, COLORS["ERM"]),
        "flooding": (flooded, COLORS["flooding"]),
        "stopped early": (plain_stopped, COLORS["early stopping"]),
        "flooding, stopped early": (flooded_stopped, COLORS["highlight"]),
    }
    for row, noise in zip(axes, noises):
        for ax, name in zip(row, sets):
            rows, colors = {}, {}
            for optimizer in optimizers:
                for label, (accuracy, color) in lines.items():
                    cell = {"set": name, "label_noise": noise, "optimizer": optimizer}
                    rows[f"{optimizer}: {label}"] = accuracy.sel(cell)
                    colors[f"{optimizer}: {label}"] = color
            bars(ax, rows, colors)
            ax.set_title(f"{name.replace('_', ' ')}, {100 * noise:g} % noise")
    for ax in axes[-1]:
        ax.set_xlabel("test accuracy (%)")
    return fig


def gains(record: xr.Dataset) -> xr.DataArray:
    """What each level adds to the test accuracy after the last epoch, in points."""
    error = 100 * record.test_error.isel(step=-1)
    return error.sel(flood_level=0, drop=True) - error


def entropy(label_noise: float) -> float:
    r"""Entropy, in nats, of whether a label is wrong: :math:`-p\log p-(1-p)\log(1-p)`.

    Examples
    --------
    >>> round(entropy(0.1), 3)
    0.325
    """
    return -sum(p * math.log(p) for p in (label_noise, 1 - label_noise) if p)


def sweeps(record: xr.Dataset):
    """Accuracy on the test set at each level minus that without flooding, after the last epoch:
    means and 95 % bands over the seeds, the darker the more labels are wrong; cut off at −10.

    Dotted is the entropy of the wrong labels: the training loss of a network that is certain of the
    true labels up to the share of wrong ones.
    """
    import matplotlib.pyplot as plt

    all_gains = gains(record)
    sets, noises, optimizers = (record[k].values for k in ("set", "label_noise", "optimizer"))
    fig, axes = plt.subplots(
        len(optimizers),
        len(sets),
        figsize=(9, 0.6 + 2.4 * len(optimizers)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, optimizer in zip(axes, optimizers):
        for ax, name in zip(row, sets):
            for k, noise in enumerate(noises, 1):
                color = shade("flooding", k / len(noises))
                gain = all_gains.sel(set=name, label_noise=noise, optimizer=optimizer, drop=True)
                band(ax, gain, "flood_level", color).set_label(f"{100 * noise:g} % wrong")
                ax.axvline(entropy(noise), color=color, linestyle=":", linewidth=1.2)
            ax.axhline(0, color=COLORS["faint"], linewidth=0.8, zorder=0)
            ax.set(title=f"{name.replace('_', ' ')}, {optimizer}", ylim=(-10, 11))
        row[0].set_ylabel("gain (points)")
    for ax in axes[-1]:
        ax.set_xlabel("flood level b (nats)")
    axes[0, -1].legend(fontsize=7.5, loc="lower left")
    return fig
