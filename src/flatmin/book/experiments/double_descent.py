"""The test loss that falls a second time (Ishida et al. 2020, figure 1, c and d).

A ResNet-18 is trained on CIFAR-10 without augmentation, with and without flooding.  Without, the
test loss rises once the training loss has gone to zero; with, it falls again.  Learning rate 0.1,
momentum 0.9, 500 epochs and a fifth of the training images for validation are the paper's.  Batches
of 128, a constant learning rate and no weight decay are ours, as the paper's are unknown to us.
The figure shows the level that validation chooses.
"""

import xarray as xr

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ..models import ResNet
from ..plotting import COLORS, band
from .vision import TINY, data_source, load, train

SOURCE = "Ishida et al. 2020, figure 1 (c, d)"

PAPER = {
    "data": "cifar10",
    "train_size": 40_000,
    "validation_size": 10_000,
    "width": 64,
    "stages": [2, 2, 2, 2],
    "levels": [round(0.01 * k, 2) for k in range(21)],
    "lr": 0.1,
    "momentum": 0.9,
    "batch_size": 128,
    "epochs": 500,
    "evaluations": 100,
    "seeds": 5,
}
SETTINGS = {
    "tiny": PAPER | TINY | {"validation_size": 32, "stages": [1, 1], "levels": [0.0, 0.3]},
    # Recorded in 259 s on an H100 shared by sixteen processes.
    "reduced": PAPER
    | {
        "train_size": 10_000,
        "validation_size": 2000,
        "levels": [0.0, 0.05],
        "epochs": 65,
        "evaluations": 25,
        "seeds": 3,
    },
    "paper": PAPER,
}


def units(settings: dict) -> list[dict]:
    return [
        {"flood_level": level, "seed": seed}
        for level in settings["levels"]
        for seed in settings["seeds"]
    ]


def cost(settings: dict) -> float:
    return float(len(units(settings)) * settings["epochs"] * settings["train_size"])


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    data = load(
        settings["data"], settings["train_size"], settings["validation_size"], seed=unit["seed"]
    )
    _, result = train(
        lambda: ResNet(width=settings["width"], stages=settings["stages"]),
        data,
        Recipe(
            loss=Flooding(unit["flood_level"]), optimizer=SGD(settings["lr"], settings["momentum"])
        ),
        work,
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        seed=unit["seed"],
        evaluate_at=settings["evaluations"],
    )
    result.attrs = {"data": data_source(settings["data"])}
    return result


def plot(record: xr.Dataset):
    """Training and test loss without flooding and with it, and the test errors of both.

    The level is the one with the lowest validation error at the end (grey line); means of the
    seeds with 95 % intervals.  The loss before training may lie above the picture.
    """
    import matplotlib.pyplot as plt

    top = float(record.test_loss.isel(epoch=slice(1, None)).max())
    last = record.isel(epoch=-1).validation_error.mean("seed", skipna=False)
    chosen = last.sel(flood_level=record.flood_level > 0).idxmin("flood_level").item()
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.2))
    axes[0].sharey(axes[1])
    for ax, level, title, color in (
        (axes[0], 0.0, "No flooding", COLORS["ERM"]),
        (axes[1], chosen, f"Flooding, b = {chosen:g}", COLORS["flooding"]),
    ):
        run = record.sel(flood_level=level, drop=True)
        band(ax, run.test_loss, "epoch", color, "test", 6)
        band(ax, run.train_loss, "epoch", color, "training", 8, linestyle="--")
        ax.set(title=title, xlabel="epoch", ylabel="loss (nats)", ylim=(0, 1.1 * top))
        label, dy = ("flooding", -6) if level else ("none", 6)
        band(axes[2], 100 * run.test_error, "epoch", color, label, dy)
    axes[1].axhline(chosen, color=COLORS["faint"], linewidth=1, zorder=0)
    axes[2].set(title="Test error", xlabel="epoch", ylabel="%")
    return fig
