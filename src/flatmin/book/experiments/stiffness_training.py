"""Stiffness during training, as in the stiffness paper (Fort et al., arXiv 1901.09491).

MLP, CNN and ResNet-20 without batch norm are trained by Adam with constant learning rates, on
inputs that are standardized and put on a sphere; with true and with random labels.  At a few steps
the gradients of fixed training and validation examples are compared: by class, and by the distance
of the inputs.  On CIFAR-100 three kinds of pairs are distinguished: of one class, of two classes in
one super-class, and of two super-classes.

Differences from the paper: the sphere has radius √d instead of 1 (distances are the same), the
initial weights are PyTorch's, and the CNN ends with the mean over the image.

As the learning rate is constant, a run of t steps is the beginning of a longer one.  So each
measured step has its own stack of all learning rates and seeds, trained to that step.
"""

import dataclasses
import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...measure import (
    between_classes,
    class_matrix,
    critical_length,
    input_distance,
    on,
    residual_stiffness,
    stiffness,
    within_classes,
)
from ...optimizer import Adam
from ...pipeline import Recipe
from ...stack import fit
from .. import datasets as sets
from ..models import MLP, SmallCNN, resnet20
from ..plotting import COLORS, band, use_style
from . import vision
from .sam_spectrum import at_loss, common_levels, loss_axis

SOURCE = "Fort et al. 2019 (arXiv 1901.09491), the experiments on images"

_OURS = {
    "cases": [
        ["mnist", "MLP"],
        ["mnist", "CNN"],
        ["cifar10", "MLP"],
        ["cifar10", "CNN"],
        ["cifar100", "CNN"],
    ],
    "labels": ["true", "random"],
    "lr": [3e-4, 1e-3, 3e-3],
    "moments": [0, 16, 64, 256, 1024, 4096],
    "train_size": 2000,
    "batch_size": 32,
    "probes": 500,
    "seeds": 3,
}
SETTINGS = {
    "tiny": _OURS
    | {
        "cases": [["synthetic", "MLP"], ["synthetic", "CNN"]],
        "lr": [1e-3],
        "moments": [0, 2],
        "train_size": 64,
        "probes": 50,
        "seeds": 2,
    },
    # Recorded in 59 s on an H100 shared by sixteen processes, without CIFAR-100.
    "reduced": _OURS,
    # Forward and backward pass of nine networks, 32 images each: 17 ms on an H100.
    "resnet20": _OURS
    | {
        "cases": [["cifar10", "ResNet-20"]],
        "lr": [1e-3],
        "moments": [0, 16, 64, 256, 1024],
    },
    # Networks, optimizer, batch size and numbers of probes (3,000 for 100 classes) are the paper's;
    # its learning rates and numbers of steps are unknown to us.
    "paper": _OURS
    | {
        "cases": [
            [d, n]
            for d in ("mnist", "fashion_mnist", "cifar10", "cifar100")
            for n in ("MLP", "CNN", "ResNet-20")
        ],
        "lr": [1e-4, 3e-4, 1e-3, 3e-3],
        "moments": [0, *(16 * 4**k for k in range(7))],
        "train_size": 40_000,
        "seeds": 5,
    },
}

PAIRS = ["train-train", "train-validation", "validation-validation"]
MEASURES = ["cosine", "sign"]
EDGES = np.linspace(0, 2, 21)  # of the distance bins


def units(settings: dict) -> list[dict]:
    """Each data set and network, with true and with random labels.

    CIFAR-100 is left out if ``FLATMIN_DATA`` names a folder that has no ``cifar-100-python``.
    """
    folder = os.environ.get("FLATMIN_DATA")
    missing = folder and not (Path(folder).expanduser() / "cifar-100-python").exists()
    return [
        {"data": data, "network": network, "labels": labels}
        for (data, network), labels in product(settings["cases"], settings["labels"])
        if not (missing and data == "cifar100")
    ]


def cost(settings: dict) -> float:
    steps = sum(max(step, 1) for step in settings["moments"])
    runs = len(settings["lr"]) * len(settings["seeds"])
    trained = runs * steps * settings["batch_size"]
    return len(units(settings)) * (trained + len(settings["moments"]) * _measured(settings))


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    data, rates, seeds = _data(unit, settings), settings["lr"], settings["seeds"]
    probes = Probes(data, settings["probes"], work.device)
    done = work.load() or {}
    for step in settings["moments"]:
        if step in done:
            continue
        runs = work.chunks(
            lambda size: fit(
                lambda: network(unit["network"], data),
                data,
                Recipe(optimizer=Adam()),
                steps=max(step, 1),
                batch_size=settings["batch_size"],
                grid={"lr": rates},
                seeds=seeds,
                evaluate_at=[step],
                networks="best",
                select_by="train_loss",
                splits=["train", "validation", "test"],
                chunk_size=size,
                device=work.device,
                progress=work.advance,
                expect_divergence=True,
            ),
            len(rates) * len(seeds),
        )
        measured = [
            xr.concat([probes(runs.networks.module(lr=lr, seed=seed)) for seed in seeds], "seed")
            for lr in rates
        ]
        measured = xr.concat(measured, "lr").assign_coords(runs.networks.coords)
        done[step] = xr.merge([runs.squeeze("step"), measured], combine_attrs="drop").to_dict()
        work.progress(_measured(settings))
        work.save(done)
    at_moments = [xr.Dataset.from_dict(done[step]) for step in settings["moments"]]
    result = xr.concat(at_moments, "step", data_vars="all", coords="different", compat="equals")
    result.attrs = {"data": vision.data_source(unit["data"])}
    return result


class Probes:
    """The fixed examples; ``probes(network)`` measures a network on them."""

    def __init__(self, data: sets.Data, count: int, device: torch.device):
        count *= 6 if data.num_classes == 100 else 1
        parts = [[part[:count] for part in data.split(s)] for s in ("train", "validation")]
        self.x, self.classes = (torch.cat(part).to(device) for part in zip(*parts))
        self.num_classes, self.groups = data.num_classes, None
        if data.num_classes == 100:
            self.groups = torch.tensor(sets.CIFAR100_SUPERCLASS, device=device)
        self.distance = input_distance(self.x)
        n = len(parts[0][0])
        first, second = slice(0, n), slice(n, None)
        self.blocks = [(first, first), (first, second), (second, second)]  # as PAIRS

    def __call__(self, model: torch.nn.Module) -> xr.Dataset:
        """Stiffness by class and by distance; by class also for the softmax's residuals alone.

        ``within`` is the mean over pairs of one class, ``between`` over pairs of two classes.  With
        super-classes, ``within_group`` is the mean over two classes in one of them, and ``between``
        and ``matrix`` are those of the super-classes.
        """
        of_gradients = on(model, stiffness, self.x, self.classes)
        with torch.no_grad():
            logits = torch.cat([model.eval()(x) for x in self.x.split(1000)])
        of_residuals = residual_stiffness(logits, self.classes)
        rows = []
        for measure in MEASURES:
            values, base = getattr(of_gradients, measure), getattr(of_residuals, measure)
            cells = [self._summary(values[block], base[block], *block) for block in self.blocks]
            rows.append(xr.concat(cells, "pairs"))
        return xr.concat(rows, "measure").assign_coords(measure=MEASURES, pairs=PAIRS)

    def _summary(self, values: Tensor, residual: Tensor, one: slice, two: slice) -> xr.Dataset:
        distance = self.distance[one, two]
        classes = (self.classes[one], None if one == two else self.classes[two])
        matrix, base = (
            class_matrix(v, *classes, num_classes=self.num_classes) for v in (values, residual)
        )
        within, base_within, within_group = within_classes(matrix), within_classes(base), math.nan
        if self.groups is not None:
            matrix, base = (class_matrix(m, self.groups, num_classes=20) for m in (matrix, base))
            within_group = within_classes(matrix)
        line = critical_length(values, distance, *classes, resamples=1)  # intervals are by seeds
        return xr.Dataset(
            {
                "within": float(within),
                "within_group": float(within_group),
                "between": float(between_classes(matrix)),
                "residual_within": float(base_within),
                "residual_between": float(between_classes(base)),
                "xi": line.xi,
                "slope": line.slope,
                "intercept": line.intercept,
                "matrix": (("class_1", "class_2"), matrix.cpu().numpy()),
                "by_distance": ("distance", self._by_distance(values, distance, *classes)),
            },
            {"distance": (EDGES[:-1] + EDGES[1:]) / 2},
        )

    def _by_distance(self, values: Tensor, distance: Tensor, one: Tensor, two) -> np.ndarray:
        """The mean over pairs of one class in each bin of distance."""
        pairs = one[:, None] == (one if two is None else two)
        if two is None:
            pairs.fill_diagonal_(False)
        pairs, distance, values = (t.cpu().numpy() for t in (pairs, distance, values))
        histogram = lambda **options: np.histogram(distance[pairs], EDGES, **options)[0]
        with np.errstate(invalid="ignore"):
            return histogram(weights=values[pairs]) / histogram()


def _measured(settings: dict) -> int:
    """The gradients of all probes of a stack."""
    return 2 * settings["probes"] * len(settings["lr"]) * len(settings["seeds"])


def _data(unit: dict, settings: dict) -> sets.Data:
    """The data; a random label is right only by chance."""
    classes = 100 if unit["data"] == "cifar100" else 10
    noise = 1 - 1 / classes if unit["labels"] == "random" else 0.0
    held_out = settings["probes"] * (6 if classes == 100 else 1)
    data = vision.load(unit["data"], settings["train_size"], held_out, noise)
    std, mean = torch.std_mean(data.x_train, (0, 2, 3), keepdim=True)

    def on_sphere(x):  # of radius √d, which is what the networks' initial weights are made for
        x = (x - mean) / std
        return x * (x[0].numel() / x.square().sum((1, 2, 3), keepdim=True)).sqrt()

    names = ("x_train", "x_validation", "x_test")
    return dataclasses.replace(data, **{name: on_sphere(getattr(data, name)) for name in names})


def network(name: str, data: sets.Data) -> torch.nn.Module:
    """One of the paper's networks, for a data set, with PyTorch's initial weights."""
    (channels, height, width), classes = data.x_train.shape[1:], data.num_classes
    return {
        "MLP": lambda: MLP(channels * height * width, 500, 300, 100, classes),
        "CNN": lambda: SmallCNN(channels, classes),
        "ResNet-20": lambda: resnet20(classes, channels, batch_norm=False),
    }[name]()


def crossing(record: xr.Dataset) -> xr.DataArray:
    r"""Where the lines :math:`\alpha+\beta d` fitted within classes cross zero, also beyond the data.

    Parameters
    ----------
    record : Dataset
        With ``intercept``, :math:`\alpha`, and ``slope``, :math:`\beta`.

    Returns
    -------
    DataArray
        :math:`-\alpha/\beta`; NaN where a line does not fall.

    Examples
    --------
    >>> crossing(xr.Dataset({"intercept": 1.0, "slope": ("line", [-0.5, 0.5])})).values
    array([ 2., nan])
    """
    return (-record.intercept / record.slope).where(record.slope < 0)


def plot(record: xr.Dataset):
    """Stiffness of a training and a validation example; means of the seeds with 95 % intervals.

    Above, at the middle learning rate: within classes, between classes, and within classes against
    the distance of the inputs.  Below, with true labels: by learning rate, at equal training loss;
    the distance ξ at which the fitted line crosses zero, also where that is beyond all distances of
    the data (grey line); and the sign stiffness of each two classes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    use_style()
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.6))
    fresh = record.sel(pairs="train-validation")
    cases = [
        case
        for case in product(record.data.values.tolist(), record.network.values.tolist())
        if bool(record.within.sel(data=case[0], network=case[1]).notnull().any())
    ]
    colors = dict(
        zip(
            cases,
            [COLORS[k] for k in ("stiffness", "other", "another", "highlight", "ERM", "faint")] * 2,
        )
    )
    middle = record.lr.values[record.sizes["lr"] // 2]
    pick = lambda values, case, labels, **more: values.sel(
        data=case[0], network=case[1], labels=labels, **more
    ).reset_coords(drop=True)
    panels = (
        ("within", "cosine", "Within classes (cosine)"),
        ("between", "sign", "Between classes (sign)"),
    )
    for ax, (name, measure, title) in zip(axes[0], panels):
        for case in cases:
            for labels in record.labels.values.tolist():
                values = pick(fresh[name], case, labels, lr=middle, measure=measure)
                line = band(
                    ax,
                    values,
                    "step",
                    colors[case],
                    marker="o",
                    markersize=3,
                    linestyle="-" if labels == "true" else ":",
                )
                if labels == "true":
                    line.set_label(_name(case))
        ax.set(title=title, xlabel="step (dotted: random labels)", ylabel="stiffness")
    for case in cases:
        within_group = pick(fresh.within_group, case, "true", lr=middle, measure="sign")
        if bool(within_group.notnull().all()):
            band(
                axes[0, 1],
                within_group,
                "step",
                colors[case],
                linestyle="-.",
                label="one super-class",
            )
        values = pick(fresh.by_distance, case, "true", lr=middle, measure="cosine")
        values = values.isel(step=-1, drop=True).dropna("distance")
        if values.sizes["distance"]:
            band(axes[0, 2], values, "distance", colors[case])
    axes[0, 2].set(
        title="Within classes, at the end",
        xlabel="distance of the inputs",
        ylabel="stiffness (cosine)",
        ylim=(None, 1.25),
    )
    axes[0, 2].legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7.5, loc="upper right")
    case = cases[-1]
    loss = pick(record.train_loss, case, "true")
    levels = common_levels(loss.stack(run=("lr", "seed")), "step")
    within = pick(fresh.within, case, "true", measure="cosine")
    has_xi = lambda case: bool(pick(fresh.xi, case, "true", measure="cosine").notnull().any())
    xi_case = next(filter(has_xi, cases), None)
    xi = pick(crossing(fresh), xi_case or case, "true", measure="cosine")
    for i, lr in enumerate(record.lr.values):
        share = (i + 1) / record.sizes["lr"]
        style = {
            "color": tuple(1 - share * (1 - c) for c in to_rgb(COLORS["highlight"])),
            "marker": "o",
            "markersize": 3,
        }
        at_rate = lambda values: values.sel(lr=lr, drop=True)
        if levels:
            line = band(
                axes[1, 0],
                at_loss(at_rate(within), at_rate(loss), levels, "step"),
                "level",
                **style,
            )
            line.set_label(f"learning rate {lr:g}")
        if xi_case:
            band(axes[1, 1], at_rate(xi), "step", **style)
    axes[1, 0].set(title=f"{_name(case)}, at equal loss", ylabel="within classes (cosine)")
    loss_axis(axes[1, 0])
    if levels:
        axes[1, 0].legend(fontsize=7.5)
    axes[1, 1].set(title=f"{_name(xi_case or case)}, critical length", xlabel="step", ylabel="ξ")
    if xi_case:
        covered = (
            pick(fresh.by_distance, xi_case, "true")
            .notnull()
            .any(["step", "lr", "measure", "seed"])
        )
        farthest = float(record.distance[covered].max()) + (EDGES[1] - EDGES[0]) / 2
        axes[1, 1].axhline(farthest, color=COLORS["faint"], linewidth=1, zorder=0)
    else:
        axes[1, 1].text(
            0.5,
            0.5,
            "no critical length:\nthe lines do not come down to 0",
            ha="center",
            transform=axes[1, 1].transAxes,
        )
        axes[1, 1].set(xticks=[], yticks=[])
    for ax in (*axes[0, :2], axes[1, 1]):
        if ax.lines:
            ax.set_xscale("symlog", linthresh=max(1, int(record.step[1])))
    axes[1, 1].set_xlim(axes[0, 0].get_xlim())
    matrix = pick(fresh.matrix, case, "true", lr=middle, measure="sign").isel(step=-1).mean("seed")
    matrix = matrix.dropna("class_1", how="all").dropna("class_2", how="all")
    image = axes[1, 2].imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1)
    fig.colorbar(image, ax=axes[1, 2], shrink=0.8, label="stiffness (sign)")
    axes[1, 2].grid(False)
    axes[1, 2].set(
        title=f"{_name(case)}, by class, at the end",
        xlabel="class, validation example",
        ylabel="class, training example",
    )
    for ax, note in (
        (axes[0, 0], "paper: falls with overfitting"),
        (axes[0, 1], "paper: random labels stay low"),
        (axes[1, 1], "later versions: larger rate, shorter ξ"),
    ):
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.12 * (high - low), high)
        ax.text(0.02, 0.02, note, transform=ax.transAxes, fontsize=8, color=COLORS["ERM"])
    return fig


def _name(case: tuple[str, str]) -> str:
    names = {
        "mnist": "MNIST",
        "fashion_mnist": "Fashion-MNIST",
        "cifar10": "CIFAR-10",
        "cifar100": "CIFAR-100",
    }
    return f"{names.get(case[0], case[0])}, {case[1]}"
