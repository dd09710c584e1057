"""Stiffness during training, as in the stiffness paper (Fort et al., arXiv 1901.09491).

MLP, CNN and ResNet-20 without batch norm are trained by Adam with constant learning rates, on
inputs that are standardized and put on a sphere; with true and with random labels.  At a few steps
the gradients of fixed training and validation examples are compared: by class, and by the distance
of the inputs.

Differences from the paper: the sphere has radius √d instead of 1 (distances are the same), the
initial weights are PyTorch's, and the CNN ends with the mean over the image.

As the learning rate is constant, a run of t steps is the beginning of a longer one.  So each
measured step has its own stack of all learning rates and seeds, trained to that step.
"""

import dataclasses
from itertools import product

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...measure import (
    between_classes,
    class_matrix,
    on,
    residual_stiffness,
    stiffness,
    within_classes,
)
from ...optimizer import Adam
from ...pipeline import Recipe
from ...stack import fit
from ..distance import critical_length, input_distance
from ..models import MLP, SmallCNN, resnet20
from ..plotting import COLORS, band
from . import vision
from .display import shade
from .sam_spectrum import at_loss, common_levels, loss_axis

SOURCE = "Fort et al. 2019 (arXiv 1901.09491), the experiments on images"

_OURS = {
    "data": ["mnist", "cifar10"],
    "networks": ["MLP", "CNN"],
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
        "data": ["synthetic"],
        "lr": [1e-3],
        "moments": [0, 2],
        "train_size": 64,
        "probes": 50,
        "seeds": 2,
    },
    # Recorded in 59 s on an H100 shared by sixteen processes.
    "reduced": _OURS,
    # Networks, optimizer, batch size and number of probes are the paper's; its learning rates and
    # numbers of steps are unknown to us.  It also has CIFAR-100.
    "paper": _OURS
    | {
        "data": ["mnist", "fashion_mnist", "cifar10"],
        "networks": ["MLP", "CNN", "ResNet-20"],
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
    """Each data set and network, with true and with random labels, trained to each moment."""
    dims = {"data": "data", "network": "networks", "labels": "labels", "step": "moments"}
    values = product(*(settings[name] for name in dims.values()))
    return [dict(zip(dims, each)) for each in values]


def cost(settings: dict) -> float:
    runs = len(settings["lr"]) * len(settings["seeds"])
    trained = sum(max(unit["step"], 1) for unit in units(settings)) * settings["batch_size"]
    return runs * trained + len(units(settings)) * _measured(settings)


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    data, rates, seeds = _data(unit, settings), settings["lr"], settings["seeds"]
    probes = Probes(data, settings["probes"], work.device)
    runs = work.chunks(
        lambda size: fit(
            lambda: network(unit["network"], data),
            data,
            Recipe(optimizer=Adam()),
            steps=max(unit["step"], 1),
            batch_size=settings["batch_size"],
            grid={"lr": rates},
            seeds=seeds,
            evaluate_at=[unit["step"]],
            networks="best",
            select_by="train_loss",
            splits=["train", "validation", "test"],
            chunk_size=size,
            device=work.device,
            progress=work.progress,
            expect_divergence=True,
        ),
        len(rates) * len(seeds),
    )
    measured = [
        xr.concat([probes(runs.networks.module(lr=lr, seed=seed)) for seed in seeds], "seed")
        for lr in rates
    ]
    measured = xr.concat(measured, "lr").assign_coords(runs.networks.coords)
    work.progress(_measured(settings))
    result = xr.merge([runs.squeeze("step").drop_vars("step"), measured], combine_attrs="drop")
    result.attrs = {"data": vision.data_source(unit["data"])}
    return result


class Probes:
    """The fixed examples; ``probes(network)`` measures a network on them."""

    def __init__(self, data: vision.Data, count: int, device: torch.device):
        parts = [[part[:count] for part in data.split(s)] for s in ("train", "validation")]
        self.x, self.classes = (torch.cat(part).to(device) for part in zip(*parts))
        self.num_classes = data.num_classes
        self.distance = input_distance(self.x)
        n = len(parts[0][0])
        first, second = slice(0, n), slice(n, None)
        self.blocks = [(first, first), (first, second), (second, second)]  # as PAIRS

    def __call__(self, model: torch.nn.Module) -> xr.Dataset:
        """Stiffness by class and by distance; by class also for the softmax's residuals alone.

        ``within`` is the mean over pairs of one class, ``between`` over pairs of two classes.
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
        line = critical_length(values, distance, *classes, resamples=1)  # intervals are by seeds
        return xr.Dataset(
            {
                "within": float(within_classes(matrix)),
                "between": float(between_classes(matrix)),
                "residual_within": float(within_classes(base)),
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


def _data(unit: dict, settings: dict) -> vision.Data:
    """The data; a random label is right only by chance."""
    noise = 0.9 if unit["labels"] == "random" else 0.0
    data = vision.load(unit["data"], settings["train_size"], settings["probes"], noise)
    std, mean = torch.std_mean(data.x_train, (0, 2, 3), keepdim=True)

    def on_sphere(x):  # of radius √d, which is what the networks' initial weights are made for
        x = (x - mean) / std
        return x * (x[0].numel() / x.square().sum((1, 2, 3), keepdim=True)).sqrt()

    names = ("x_train", "x_validation", "x_test")
    return dataclasses.replace(data, **{name: on_sphere(getattr(data, name)) for name in names})


def network(name: str, data: vision.Data) -> torch.nn.Module:
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

    fig, ((within, between, distance), (rates, length, classes)) = plt.subplots(
        2, 3, figsize=(11, 6.6)
    )
    fresh, middle = record.sel(pairs="train-validation"), record.lr.values[record.sizes["lr"] // 2]
    cases = {
        f"{vision.TITLES[data][0]}, {network}": {"data": data, "network": network}
        for data in record.data.values.tolist()
        for network in record.network.values.tolist()
    }
    names = ("stiffness", "other", "another", "highlight", "ERM", "faint")
    colors = dict(zip(cases, [COLORS[name] for name in names * 2]))

    def pick(values, case: str, labels: str = "true", **more) -> xr.DataArray:
        return values.sel(**cases[case], labels=labels, **more).reset_coords(drop=True)

    points = {"marker": "o", "markersize": 3}
    for ax, values, measure, title in (
        (within, fresh.within, "cosine", "Within classes (cosine)"),
        (between, fresh.between, "sign", "Between classes (sign)"),
    ):
        for case, labels in product(cases, record.labels.values.tolist()):
            of_case = pick(values, case, labels, lr=middle, measure=measure)
            style = points | {"linestyle": "-" if labels == "true" else ":"}
            line = band(ax, of_case, "step", colors[case], **style)
            if labels == "true":
                line.set_label(case)
        ax.set(title=title, xlabel="step (dotted: random labels)", ylabel="stiffness")
    for case in cases:
        values = pick(fresh.by_distance, case, lr=middle, measure="cosine")
        values = values.isel(step=-1, drop=True).dropna("distance")
        if values.sizes["distance"]:
            band(distance, values, "distance", colors[case])
    distance.set(
        title="Within classes, at the end",
        xlabel="distance of the inputs",
        ylabel="stiffness (cosine)",
        ylim=(None, 1.25),
    )
    distance.legend(*within.get_legend_handles_labels(), fontsize=7.5, loc="upper right")
    last = [*cases][-1]
    loss = pick(record.train_loss, last)
    levels = common_levels(loss.stack(run=("lr", "seed")), "step")
    inner = pick(fresh.within, last, measure="cosine")
    with_xi = [case for case in cases if pick(fresh.xi, case, measure="cosine").notnull().any()]
    lined = [*with_xi, last][0]
    xi = pick(crossing(fresh), lined, measure="cosine")
    for i, lr in enumerate(record.lr.values):
        color = shade("highlight", (i + 1) / record.sizes["lr"])
        at_rate = lambda values: values.sel(lr=lr, drop=True)
        if levels:
            values = at_loss(at_rate(inner), at_rate(loss), levels, "step")
            band(rates, values, "level", color, **points).set_label(f"learning rate {lr:g}")
        band(length, at_rate(xi), "step", color, **points)
    rates.set(title=f"{last}, at equal loss", ylabel="within classes (cosine)")
    loss_axis(rates)
    if levels:
        rates.legend(fontsize=7.5)
    length.set(title=f"{lined}, critical length", xlabel="step", ylabel="ξ")
    covered = pick(fresh.by_distance, lined).notnull().any(["step", "lr", "measure", "seed"])
    farthest = float(record.distance[covered].max()) + (EDGES[1] - EDGES[0]) / 2
    length.axhline(farthest, color=COLORS["faint"], linewidth=1, zorder=0)
    for ax in (within, between, length):
        ax.set_xscale("symlog", linthresh=max(1, int(record.step[1])))
    length.set_xlim(within.get_xlim())
    matrix = pick(fresh.matrix, last, lr=middle, measure="sign").isel(step=-1).mean("seed")
    image = classes.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1)
    fig.colorbar(image, ax=classes, shrink=0.8, label="stiffness (sign)")
    classes.grid(False)
    classes.set(
        title=f"{last}, by class, at the end",
        xlabel="class, validation example",
        ylabel="class, training example",
    )
    for ax, note in (
        (within, "paper: falls with overfitting"),
        (between, "paper: random labels stay low"),
        (length, "later versions: larger rate, shorter ξ"),
    ):
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.12 * (high - low), high)
        ax.text(0.02, 0.02, note, transform=ax.transAxes, fontsize=8, color=COLORS["ERM"])
    return fig
