"""Corrupt labels: mixup against dropout (Zhang et al. 2018, section 3.4).

A PreAct ResNet-18 is trained on CIFAR-10 with 20, 50 and 80 % wrong labels: plainly, with a dropout
layer in each block, with mixup, and with both.  We record the test error, at the best and the last
epoch, and how well the network fits the wrong and the true labels of the training images.  Epochs,
batches, weight decay, learning rate and its steps are those of the authors' code; the paper tried
several strengths and reports the best, and so does the figure where a record has several.

Our wrong label is one of the other nine classes.  If it is drawn from all ten, as "random noise"
may mean, only 72 % of the labels are wrong when 80 % are drawn.
"""

from collections.abc import Callable

import xarray as xr
from torch import Tensor, nn

from ...batch import Mixup
from ...layers import Dropout
from ...optimizer import SGD
from ...pipeline import Recipe
from ..plotting import COLORS
from ..statistics import mean_interval
from .vision import TINY, data_source, load, step_decay, train

SOURCE = "Zhang et al. 2018, section 3.4 and table 2"

_FULL = {
    "data": "cifar10",
    "train_size": 50_000,
    "width": 64,
    "stages": [2, 2, 2, 2],
    "label_noise": [0.2, 0.5, 0.8],
    "lr": 0.1,
    "weight_decay": 1e-4,
    "batch_size": 128,
    "epochs": 200,
    "augment": True,
    "evaluations": 100,
    "seeds": 5,
    "recipes": {
        "ERM": [{}],
        "dropout": [{"p": p} for p in (0.5, 0.7, 0.8, 0.9)],
        "mixup": [{"alpha": alpha} for alpha in (1, 2, 8, 32)],
        "mixup + dropout": [{"alpha": a, "p": p} for a in (1, 2, 4, 8) for p in (0.3, 0.5, 0.7)],
    },
}
_ONE_EACH = {
    "ERM": [{}],
    "dropout": [{"p": 0.5}],
    "mixup": [{"alpha": 8}],
    "mixup + dropout": [{"alpha": 4, "p": 0.3}],
}
SETTINGS = {
    "tiny": _FULL | TINY | {"stages": [1], "label_noise": [0.5], "recipes": _ONE_EACH},
    # For eight processes per GPU; a single one takes twice as long.  Without augmentation, so that
    # 40 epochs are enough to memorize wrong labels.
    "reduced": _FULL
    | {
        "train_size": 10_000,
        "width": 32,
        "batch_size": 256,
        "epochs": 40,
        "augment": False,
        "evaluations": 10,
        "recipes": _ONE_EACH,
    },
    "paper": _FULL,
}

# Test error in per cent at the best and at the last epoch: table 2.
PAPER = {
    "ERM": {0.2: (12.7, 16.6), 0.5: (18.8, 44.6), 0.8: (36.5, 73.9)},
    "dropout": {0.2: (8.8, 10.4), 0.5: (14.1, 15.5), 0.8: (30.9, 35.1)},
    "mixup": {0.2: (5.9, 6.4), 0.5: (11.3, 12.7), 0.8: (25.3, 30.9)},
    "mixup + dropout": {0.2: (6.2, 6.2), 0.5: (10.9, 10.9), 0.8: (24.0, 24.8)},
}


class PreActResNet(nn.Module):
    r"""Residual network with pre-activation (He et al., ECCV 2016), for images of 32×32.

    .. math:: x \mapsto \mathrm{shortcut}(x) + F(x), \qquad F = \text{norm} \to \text{ReLU} \to
              \text{conv} \to \text{norm} \to \text{ReLU} \to \text{dropout} \to \text{conv}

    Where a block halves the image, its shortcut is a 1×1 convolution of the first ReLU's output.

    Parameters
    ----------
    num_classes, width : int
        Number of outputs; of channels in the first stage, doubled in each further stage.
    stages : sequence of int
        Number of blocks in each stage.
    dropout : float
        Probability of dropping a unit; it does not change the initial weights.

    Examples
    --------
    >>> sum(p.numel() for p in PreActResNet().parameters())
    11172170
    """

    def __init__(
        self, num_classes: int = 10, width: int = 64, stages=(2, 2, 2, 2), dropout: float = 0.0
    ):
        super().__init__()
        blocks, channels = [], width
        for stage, count in enumerate(stages):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_PreActBlock(channels, channels * stride, stride))
                channels *= stride
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if dropout:
            for block in self.blocks:
                block.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class _PreActBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        self.first = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        )
        self.dropout = nn.Identity()
        self.second = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.before(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.second(self.dropout(self.first(active)))


def units(settings: dict) -> list[dict]:
    """A unit is one run (with its bootstrap); ``variant`` numbers the strengths of its method."""
    return [
        {"recipe": name, "variant": variant, "label_noise": noise, "seed": seed}
        for name, variants in settings["recipes"].items()
        for variant in range(len(variants))
        for noise in settings["label_noise"]
        for seed in settings["seeds"]
    ]


def cost(settings: dict) -> float:
    return float(len(units(settings)) * settings["epochs"] * settings["train_size"])


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    strength = settings["recipes"][unit["recipe"]][unit["variant"]]
    alpha, p = strength.get("alpha", 0.0), strength.get("p", 0.0)
    optimizer = SGD(
        settings["lr"],
        momentum=0.9,
        weight_decay=settings["weight_decay"],
        schedule=step_decay(0.5, 0.75),
    )
    _, result = train(
        lambda: PreActResNet(width=settings["width"], stages=settings["stages"], dropout=p),
        load(settings["data"], settings["train_size"], 0, unit["label_noise"], unit["seed"]),
        Recipe(optimizer=optimizer, batch=Mixup(alpha) if alpha else None),
        work,
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        seed=unit["seed"],
        augment=settings["augment"],
        evaluate_at=settings["evaluations"],
    )
    result.attrs = {"data": data_source(settings["data"])}
    return result.assign(alpha=alpha, p=p)


def best_variant(record: xr.Dataset) -> xr.Dataset:
    """For each method and noise, the strength with the lowest mean test error at its best epoch."""
    best = record.test_error.min("epoch").mean("seed", skipna=False)
    return record.isel(variant=best.fillna(float("inf")).argmin("variant"))


def plot(record: xr.Dataset):
    """Test error at the last epoch (filled) and at the best of those that were looked at (open),
    with 95 % intervals over the seeds.

    Diamonds are the paper's numbers, for its full size.  The best epoch is the best on the test
    images, as in its table; so is, where a record has several, the strength of a method.
    """
    colors = {"ERM": "ERM", "dropout": "dropout", "mixup": "mixup", "mixup + dropout": "other"}
    best = best_variant(record).test_error

    def rows(noise: float) -> dict:
        return {
            name: (
                100 * best.sel(recipe=name, label_noise=noise),
                COLORS[colors[name]],
                PAPER[name].get(noise, ()),
            )
            for name in record.recipe.values
        }

    legend = "● last epoch, ○ best epoch; ◆ ◇ the paper"
    return panels(record, rows, legend, (1.5, 3.2, 2.8))


def panels(record: xr.Dataset, rows: Callable[[float], dict], legend: str, size: tuple):
    """A panel for each share of wrong labels.

    Parameters
    ----------
    record : Dataset
    rows : callable
        The rows of a share's panel, see :func:`plot_rows`.
    legend : str
        What the marks mean.
    size : tuple of float
        The figure's width without panels, the width of each panel, and the height, in inches.
    """
    import matplotlib.pyplot as plt

    noises, (margin, width, height) = record.label_noise.values, size
    fig, axes = plt.subplots(
        1, len(noises), figsize=(margin + width * len(noises), height), sharey=True, squeeze=False
    )
    for ax, noise in zip(axes[0], noises):
        plot_rows(ax, rows(noise))
        ax.set(title=f"{100 * noise:g} % wrong labels", xlabel="test error (%)")
    fig.supxlabel(legend, fontsize=8, color=COLORS["ERM"])
    return fig


def plot_rows(ax, rows: dict) -> None:
    """Plot each row: the errors at our last and best epoch, and the paper's numbers.

    Parameters
    ----------
    ax : Axes
    rows : dict
        ``{label: (errors, color, paper)}``: errors in per cent, dimensions ``seed`` and ``epoch``
        (or ``evaluation``); the paper's best and last, or one number, or none.
    """
    for y, (errors, color, paper) in enumerate(rows.values()):
        dim = next(d for d in errors.dims if d != "seed")
        errors = errors.dropna(dim, how="all")
        for value, dy, face in ((errors.isel({dim: -1}), 0.0, color), (errors.min(dim), -0.2, "w")):
            interval = mean_interval(value)
            ax.errorbar(
                float(interval["mean"]),
                y + dy,
                xerr=float(interval["half"]),
                fmt="o",
                color=color,
                markerfacecolor=face,
                capsize=3,
            )
        for number, face in zip(reversed(paper), (COLORS["faint"], "w")):
            ax.plot(number, y + 0.2, "D", color=COLORS["faint"], markerfacecolor=face, markersize=5)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
