"""The Hessian's spectrum during training, SGD and SAM (Foret et al. 2021, section 4.2, figure 3).

Networks without batch norm are trained on CIFAR-10 by SGD and by SAM.  After some epochs we compute
the five largest eigenvalues, the trace and the density of the Hessian of the training loss, on a
fixed part of the training set and in single precision.  The comparison at equal epochs is the
paper's; :func:`at_loss` gives the fairer one, at equal training loss.  A larger batch, whose
examples share one perturbation, brings SAM closer to full-batch SAM; its baseline is SGD with the
same batch.

The paper's network is a WRN-40-10.  The size ``"paper"`` uses our residual network of the same
widths and number of blocks, whose blocks have their ReLU last.  The paper's text says "300 steps",
its figure epoch 300.
"""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr

from ...gradient import SAM, PlainGradient
from ...measure import Density, eigenvalues, on, spectral_density, trace
from ...optimizer import SGD
from ...pipeline import Recipe
from ..models import ResNet
from ..plotting import COLORS, band
from . import vision

SOURCE = "Foret et al. 2021, section 4.2 and figure 3 (left)"

#: Numbers in the paper's figure: {method: {epoch: (λmax, λmax/λ5)}}.
PAPER = {
    "SGD": {1: (62.9, 2.5), 50: (12.5, 1.7), 300: (24.2, 11.4)},
    "SAM": {1: (18.6, 3.6), 50: (8.9, 1.9), 300: (1.0, 2.6)},
}

_OURS = {
    "data": "cifar10",
    "train_size": 50_000,
    "blocks": [3, 3, 3],
    "width": 16,
    "augment": False,
    "methods": {
        "SGD": {"batch_size": 256, "lr": 0.1, "rho": 0.0},
        "SAM": {"batch_size": 256, "lr": 0.1, "rho": 0.05},
        "SGD, batch 1024": {"batch_size": 1024, "lr": 0.2, "rho": 0.0},
        "SAM, m = 1024": {"batch_size": 1024, "lr": 0.2, "rho": 0.05},
    },
    "weight_decay": 5e-4,
    "epochs": 20,
    "moments": [0, 1, 4, 10, 20],
    "examples": 1000,
    "lanczos_steps": 60,
    "density_steps": 60,
    "density_probes": 1,
    "trace_probes": 30,
    "seeds": 3,
}
SETTINGS = {
    "tiny": _OURS
    | {
        "data": "synthetic",
        "train_size": 48,
        "blocks": [1],
        "width": 4,
        "methods": {
            "SGD": {"batch_size": 16, "lr": 0.05, "rho": 0.0},
            "SAM": {"batch_size": 16, "lr": 0.05, "rho": 0.05},
        },
        "epochs": 2,
        "moments": [0, 2],
        "examples": 16,
        "lanczos_steps": 8,
        "density_steps": 4,
        "density_probes": 1,
        "trace_probes": 2,
        "seeds": 2,
    },
    # Recorded in 270 s on an H100 shared by sixteen processes.
    "reduced": _OURS
    | {"train_size": 25_000, "moments": [0, 2, 6, 20], "density_steps": 40, "trace_probes": 20},
    "paper": _OURS
    | {
        "blocks": [6, 6, 6],
        "width": 160,
        "augment": True,
        "epochs": 300,
        "moments": [0, 1, 5, 20, 50, 100, 150, 200, 250, 300],
        "examples": 5000,
        "lanczos_steps": 90,
        "density_steps": 90,
        "seeds": 5,
    },
}
RANKS = 5  # number of eigenvalues
SKETCH = 10  # number of directions whose part of the trace is exact


def units(settings: dict) -> list[dict]:
    return [{"method": name, "seed": s} for name in settings["methods"] for s in settings["seeds"]]


def cost(settings: dict) -> float:
    """Of training and of the products, each of which counts as two gradients per example."""
    trained = settings["epochs"] * settings["train_size"]
    measured = len(settings["moments"]) * _measured(settings)
    return len(settings["seeds"]) * sum(
        measured + trained * (2 if method["rho"] else 1) for method in settings["methods"].values()
    )


def _measured(settings: dict) -> float:
    products = settings["lanczos_steps"] + settings["trace_probes"] + 2 * SKETCH
    products += settings["density_steps"] * settings["density_probes"]
    return 2.0 * products * settings["examples"]


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    method = settings["methods"][unit["method"]]
    data = vision.load(settings["data"], settings["train_size"])
    recipe = Recipe(
        gradient=SAM(method["rho"]) if method["rho"] else PlainGradient(),
        optimizer=SGD(method["lr"], 0.9, settings["weight_decay"], schedule="cosine"),
    )
    network = lambda: ResNet(
        num_classes=data.num_classes,
        in_channels=data.x_train.shape[1],
        width=settings["width"],
        batch_norm=False,
        stages=settings["blocks"],
    )
    examples = torch.arange(settings["examples"], device=work.device)
    x = vision.Images(data, work.device).batch("train", examples)
    y = data.y_train[: len(examples)].to(work.device)

    def measure(epoch: int, model: torch.nn.Module) -> dict:
        in_batches = lambda size: spectrum(model, x, y, settings, size)
        measured = work.chunks(in_batches, min(1000, len(x)))
        work.progress(_measured(settings))
        return measured

    _, result = vision.train(
        network,
        data,
        recipe,
        work,
        epochs=settings["epochs"],
        batch_size=method["batch_size"],
        seed=unit["seed"],
        augment=settings["augment"],
        evaluate_at=settings["moments"],
        measure=measure,
    )
    result.attrs = {
        "data": vision.data_source(settings["data"]),
        "parameters": sum(p.numel() for p in network().parameters()),
    }
    return result


def spectrum(model: torch.nn.Module, x, y, settings: Mapping, batch_size: int) -> dict:
    """The measurements of one network, as variables of a Dataset; NaN if it has diverged."""
    steps, probes = settings["density_steps"], settings["density_probes"]
    measure = lambda f, **how: on(model, f, x, y, batch_size=batch_size, **how)
    top = measure(eigenvalues, top=RANKS, steps=settings["lanczos_steps"])
    total = measure(trace, probes=settings["trace_probes"], sketch=SKETCH)
    density = measure(spectral_density, steps=steps, probes=probes)
    return {
        "eigenvalue": ("rank", top.value.cpu().numpy()),
        "eigenvalue_error": ("rank", top.error.cpu().numpy()),
        "trace": total.value.cpu().numpy(),
        "trace_standard_error": total.standard_error.cpu().numpy(),
        "density_nodes": (("probe", "node"), density.node.cpu().numpy()),
        "density_weights": (("probe", "node"), density.weight.cpu().numpy()),
    }


# ------------------------------------------------------------------------------ from the record


def at_loss(values: xr.DataArray, loss: xr.DataArray, levels: Sequence[float], dim: str):
    r"""Values of a run where its training loss first falls to a level.

    Between the evaluations :math:`i-1` and :math:`i` around it, values are interpolated linearly in
    the logarithm of the loss,

    .. math:: v = v_{i-1}
              + \frac{\log\ell_{i-1}-\log\ell}{\log\ell_{i-1}-\log\ell_i}\,(v_i-v_{i-1}),

    so that the logarithm of a power of the loss is exact.

    Parameters
    ----------
    values, loss : DataArray
        With the dimension ``dim`` in order of time; values may have more dimensions.
    levels : sequence of float
        Training losses.
    dim : str
        The dimension of the evaluations.

    Returns
    -------
    DataArray
        With ``level`` instead of ``dim``; NaN where a run never reaches a level, or starts below
        it.

    Examples
    --------
    >>> loss = xr.DataArray([4.0, 1.0, 0.25], dims="epoch")
    >>> at_loss(loss**2, loss, [4.0, 1.0, 0.25], "epoch").values
    array([16.    ,  1.    ,  0.0625])
    >>> np.exp(at_loss(np.log(3 * loss**2), loss, [2.0, 0.5], "epoch")).values.round(6)
    array([12.  ,  0.75])
    """

    def interpolate(values, loss):
        at_levels = np.full(len(levels), np.nan)
        for k, level in enumerate(levels):
            i = int(np.argmax(loss <= level))
            if loss[i] == level:
                at_levels[k] = values[i]
            elif i > 0:
                share = np.log(loss[i - 1] / level) / np.log(loss[i - 1] / loss[i])
                at_levels[k] = values[i - 1] + share * (values[i] - values[i - 1])
        return at_levels

    at_levels = xr.apply_ufunc(
        interpolate,
        values,
        loss,
        input_core_dims=[[dim], [dim]],
        output_core_dims=[["level"]],
        vectorize=True,
    )
    return at_levels.assign_coords(level=list(levels))


def common_levels(loss: xr.DataArray, dim: str, count: int = 6) -> list[float]:
    """Training losses that all runs pass, evenly spaced on a logarithmic axis, descending.

    >>> common_levels(xr.DataArray([[4.0, 1.0], [2.0, 0.5]], dims=("seed", "epoch")), "epoch", 2)
    [2.0, 1.0]
    """
    high, low = float(loss.max(dim).min()), float(loss.min(dim).max())
    return np.geomspace(high, low, count).tolist() if high > low > 0 else []


def by_batch_size(record: xr.Dataset) -> list[list[str]]:
    """The names of the methods, grouped by batch size."""
    size = {k: v["batch_size"] for k, v in json.loads(record.attrs["settings"])["methods"].items()}
    return [[k for k in size if size[k] == each] for each in dict.fromkeys(size.values())]


def loss_axis(ax) -> None:
    """A logarithmic x axis for training losses, falling from left to right, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.invert_xaxis()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("training loss (nats)")
    if not ax.lines:
        ax.text(0.1, 0.5, "no loss that all runs come by", transform=ax.transAxes)


def plot(record: xr.Dataset):
    """At equal epochs beside the paper, at equal training loss, and the density at the end.

    Means and intervals are those of logarithms.  Equal losses are those by which all runs of one
    batch size come.
    """
    import matplotlib.pyplot as plt

    fig, ((one, two), (three, four)) = plt.subplots(2, 2, figsize=(9.5, 6.4))
    color = lambda method: COLORS["SAM" if method.startswith("SAM") else "ERM"]
    largest = np.log10(record.eigenvalue.isel(rank=0).clip(1e-12))
    fifth = np.log10(record.eigenvalue.isel(rank=-1).clip(1e-12))

    def lines(ax, values: xr.DataArray, x: str, **style) -> None:
        for method in values.method.values.tolist():
            values_of = values.sel({"method": method}, drop=True)
            line = band(ax, values_of, x, color(method), **style)
            line.set(label=method, linestyle="-" if method in PAPER else "--")

    share = record.epoch / record.epoch.max()
    for ax, values, k in ((one, largest, 0), (two, largest - fifth, 1)):
        lines(ax, values.assign_coords(epoch=share), "epoch", marker="o", markersize=3)
        for method, points in PAPER.items():
            x, y = zip(*((epoch / 300, math.log10(v[k])) for epoch, v in points.items()))
            ax.plot(
                x,
                y,
                "D",
                color=color(method),
                markerfacecolor="none",
                label=f"{method}, paper (WRN-40-10)",
            )
    one.set(title="λ max at equal epochs", xlabel="share of the training", ylabel="log₁₀ λ max")
    two.set(
        title="λ max / λ5 at equal epochs",
        xlabel="share of the training",
        ylabel="log₁₀ of the ratio",
    )
    for methods in by_batch_size(record):
        loss = record.train_loss.sel({"method": methods})
        if levels := common_levels(loss, "epoch"):
            at_levels = at_loss(largest.sel({"method": methods}), loss, levels, "epoch")
            lines(three, at_levels, "level", marker="o", markersize=3)
    loss_axis(three)
    three.set(title="λ max at equal training loss", ylabel="log₁₀ λ max")
    last = record.isel(epoch=-1)
    low, high = float(last.density_nodes.min()), float(last.density_nodes.max())
    grid, width = torch.linspace(low, high, 400, dtype=torch.double), (high - low) / 100

    def smooth(nodes, weights):
        density = Density(torch.tensor(nodes), torch.tensor(weights))
        return np.log10(1e-6 + density.smooth(grid, width).numpy())

    density = xr.apply_ufunc(
        smooth,
        last.density_nodes,
        last.density_weights,
        vectorize=True,
        input_core_dims=[["probe", "node"]] * 2,
        output_core_dims=[["eigenvalue"]],
    ).assign_coords(eigenvalue=grid.numpy())
    lines(four, density, "eigenvalue")
    four.set(
        title="Density at the end",
        xlabel="eigenvalue",
        ylabel="log₁₀ of the density",
        ylim=(-6, float(density.max()) + 0.5),
    )
    four.legend(*one.get_legend_handles_labels(), fontsize=7.5)
    return fig
