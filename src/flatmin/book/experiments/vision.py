"""Train one image network that fills a device by itself.

:func:`train` does for one large network what :func:`flatmin.fit` does for a stack: it repeats
:func:`flatmin.pipeline.step`, from the same initial weights, with the same batches and draws (a test
compares them).  The images stay on the device, as bytes, and are augmented there; the network runs
in bfloat16 and channels-last; random numbers are drawn on the CPU once per epoch; and a step never
waits for the device.

A small network takes longer to launch than to compute.  (Functions of the weights launch more than
a loop with ``torch.optim``: on a CPU a step of a tiny network takes 1.7 times as long, one of a
ResNet as long.)  Then several processes can share one GPU:
``torchrun --nproc-per-node=8 -m flatmin.book.experiments NAME``.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim.swa_utils import update_bn

from ... import pipeline
from ..._checks import whole
from ..._random import stream
from ...data import Data
from ...gradient import PlainGradient
from ...pipeline import Batch, Recipe, State, Step
from ...stack import epoch_order, initial_module
from .. import datasets as sets

PADDING = 4


# -------------------------------------------------------------------------------------- the loop


def train(
    model: nn.Module | Callable[[], nn.Module],
    data: Data,
    recipe: Recipe,
    work,
    *,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = False,
    evaluate_at: int | Sequence[int] = 20,
    train_examples: int = 10_000,
    evaluation_batch_size: int = 1000,
    measure: Callable[[int, nn.Module], Mapping] | None = None,
    bf16: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, xr.Dataset]:
    """Train one network, and evaluate it along the way.

    Parameters
    ----------
    model : callable or Module
        As in :func:`flatmin.fit`.
    data : Data
        Images [n, channels, height, width].  Each channel is standardized by the mean and the
        standard deviation of the training images.
    recipe : Recipe
        The stages of the training step; the batch stage must not need a second stream.  Batch norm
        takes the statistics of the batch; under m-SAM those of each shard, and its running
        statistics are the mean over the shards.  In bfloat16, batch norm does not work under
        ``vmap``: there m-SAM needs ``chunk_size=1``.
    work : Work
        Device and progress, see :mod:`flatmin.book.experiments.runner`.
    epochs, batch_size, seed : int
        Each epoch visits all examples in a fresh order; the last batch may be smaller.
    augment : bool
        Shift each image by up to 4 pixels in each direction, padded with black, and mirror it with
        probability ½.
    evaluate_at : int or sequence of int
        The epochs after which to evaluate; a number n means 0 and n more, evenly spaced.
    train_examples : int
        Evaluate on at most this many training examples, the first ones.
    evaluation_batch_size : int
        Halved whenever the device's memory runs out.
    measure : callable, optional
        ``measure(epoch, model)``, called at each evaluation with the model in evaluation mode,
        returns further variables of the result, by name, as ``xarray.Dataset`` takes them.
    bf16 : bool
        On a GPU, compute the network in bfloat16 (weights, losses and steps stay in ``dtype``).
    dtype : torch.dtype

    Returns
    -------
    model : Module
        As it is after the last step, on the device, in evaluation mode.
    Dataset
        Dimension ``epoch``: ``{split}_loss`` and ``{split}_error`` of train, validation (if there
        is one) and test, the first two also as ``train_clean`` and ``validation_clean``, against
        the labels before noise.
    """
    steps = whole("epochs", epochs) * math.ceil(len(data.y_train) / whole("batch_size", batch_size))
    evaluation_epochs = _evaluation_epochs(evaluate_at, epochs)
    if getattr(recipe.batch, "second_stream", False):
        raise ValueError("recipe.batch must not need a second stream in vision.train")
    images = Images(data, work.device, dtype, augment)
    model = initial_module(model, seed).to(work.device, dtype, memory_format=torch.channels_last)
    network = _on_device(model, work.device, bf16)
    params = {name: w for name, w in network.named_parameters() if w.requires_grad}
    copies = lambda tensors: {name: w.detach().clone() for name, w in tensors}
    state = State.init(recipe, copies(params.items()), copies(network.named_buffers()))

    def evaluate(size: int) -> dict[str, float]:
        _put_weights(network, recipe, state, images, size)
        return _evaluate(network, images, recipe.criterion, train_examples, size)

    t, found = 0, {}
    for epoch in range(epochs + 1):
        if epoch in evaluation_epochs:
            values = work.chunks(evaluate, evaluation_batch_size)
            found[epoch] = xr.Dataset(values | dict(measure(epoch, model) if measure else {}))
        if epoch == epochs:
            break
        network.train()
        for batch, draw in _batches(images, recipe, seed, epoch, batch_size):
            state, _ = pipeline.step(network, recipe, state, batch, draw, Step(t, of=steps))
            t += 1
            work.progress(len(batch.y) * passes(recipe))
    _put_weights(network, recipe, state, images, evaluation_batch_size)
    return model, xr.concat(found.values(), "epoch").assign_coords(epoch=list(found))


class Bfloat16(nn.Module):
    """A network computed in bfloat16; its weights and its output keep their precision."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.network(x)
        return logits.to(x.dtype)


def passes(recipe: Recipe) -> int:
    """How many gradients a step takes."""
    return 1 if type(recipe.gradient) is PlainGradient else 2


def step_decay(*milestones: float, factor: float = 0.1) -> Callable[[float], float]:
    """A schedule: the learning rate is multiplied by ``factor`` at each milestone.

    Parameters
    ----------
    *milestones : float
        Fractions of training.

    Examples
    --------
    >>> [round(step_decay(0.5, 0.75)(done), 4) for done in (0.0, 0.49, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    return lambda done: factor ** sum(done >= milestone for milestone in milestones)


def predict(
    model: nn.Module, data: Data, work, *, bf16: bool = True, evaluation_batch_size: int = 1000
) -> Tensor:
    """The classes that a network predicts for the training images: int64 [n], on the CPU."""
    images = Images(data, work.device, next(model.parameters()).dtype)
    network, n = _on_device(model.eval(), work.device, bf16), len(data.y_train)
    logits = work.chunks(
        lambda size: _logits(network, images, "train", n, size), evaluation_batch_size
    )
    return logits.argmax(1).cpu()


# --------------------------------------------------------------------------- images on the device


class Images:
    """A data set on the device, as bytes if that is exact, and its batches for a network.

    Each channel is standardized by mean and standard deviation of the training images.

    Parameters
    ----------
    data : Data
    device, dtype :
        Of the batches.
    augment : bool
        Put a black margin around the training images, for :func:`augmentation`.
    """

    def __init__(self, data: Data, device, dtype=torch.float32, augment=False):
        if data.x_train.ndim != 4:
            raise ValueError(
                "data must have images [n, channels, height, width], got inputs of "
                f"shape {list(data.x_train.shape[1:])}"
            )
        self.data, self.device, self.dtype = data, device, dtype
        self.height, self.width = data.x_train.shape[-2:]
        self.margin = PADDING if augment else 0
        std, mean = torch.std_mean(data.x_train, (0, 2, 3), keepdim=True)
        std = std.clamp_min(1 / 255)
        self.pixels, self.scale, self.labels = {}, {}, {}
        for split in ("train", "validation", "test"):
            x, y = data.split(split)
            if not len(x):
                continue
            pixels, unit = _bytes(x)
            if split == "train":
                pixels = pad(pixels, [self.margin] * 4)
            pixels = pixels if unit > 1 else pixels.to(dtype)
            self.pixels[split] = pixels.permute(0, 2, 3, 1).contiguous().to(device)
            self.scale[split] = [v.to(device, dtype) for v in (1 / (unit * std), -mean / std)]
            self.labels[split] = {split: y.to(device)}
            if split != "test":
                clean = f"{split}_clean"
                self.labels[split][clean] = data.split(clean)[1].to(device)

    def batch(self, split: str, rows: Tensor, change: Tensor | None = None) -> Tensor:
        """Images ``rows`` [B], changed by rows of :func:`augmentation` [B, 3]: [B, C, H, W]."""
        pixels = self.pixels[split]
        if change is None:
            edge = self.margin if split == "train" else 0
            x = pixels[rows, edge : edge + self.height, edge : edge + self.width]
        else:
            down, right, mirrored = change[:, :, None].unbind(1)
            i = down + torch.arange(self.height, device=self.device)
            j = torch.arange(self.width, device=self.device)
            j = right + torch.where(mirrored == 1, j.flip(0), j)
            x = pixels[rows[:, None, None], i[:, :, None], j[:, None]]
        factor, offset = self.scale[split]
        return x.permute(0, 3, 1, 2).to(self.dtype) * factor + offset


def augmentation(seed: int, epoch: int, n: int) -> Tensor:
    """The changes of an epoch's n images: int64 [n, 3], down, right (0 … 8) and mirrored (0, 1)."""
    generator = stream(seed, "augmentation", epoch)
    shift = torch.randint(2 * PADDING + 1, (n, 2), generator=generator)
    return torch.cat([shift, torch.randint(2, (n, 1), generator=generator)], 1)


def _bytes(x: Tensor) -> tuple[Tensor, int]:
    """Images as bytes, and 255, if that is exact; otherwise unchanged, and 1."""
    pixels = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return (pixels, 255) if torch.equal(pixels.to(x.dtype).div_(255), x) else (x, 1)


# --------------------------------------------------------------------------- parts of the loop


def _on_device(model: nn.Module, device: torch.device, bf16: bool) -> nn.Module:
    return Bfloat16(model) if bf16 and device.type == "cuda" else model


def _batches(
    images: Images, recipe: Recipe, seed: int, epoch: int, size: int
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """The batches of an epoch and their draws; all draws are transferred at once."""
    data, device = images.data, images.device
    labels, shape = data.y_train, data.x_train.shape[1:]
    order = epoch_order(seed, epoch, len(labels))
    parts = order.split(size)
    draws: list[dict[str, Tensor]] = [{} for _ in parts]
    if recipe.batch is not None:
        seen = [  # of the images only the shape is known
            Batch(
                torch.empty(len(rows), *shape, device="meta"), labels[rows], rows, data.num_classes
            )
            for rows in parts
        ]
        generators = [stream(seed, "batch", epoch * len(parts) + k) for k in range(len(parts))]
        draws = _to_device(list(map(recipe.batch.draw, seen, generators)), device, images.dtype)
    changes = [None] * len(parts)
    if images.margin:
        changes = augmentation(seed, epoch, len(labels)).to(device).split(size)
    for rows, change, draw in zip(order.to(device).split(size), changes, draws):
        x, y = images.batch("train", rows, change), images.labels["train"]["train"][rows]
        yield Batch(x, y, rows, data.num_classes), draw


def _to_device(draws: list[dict[str, Tensor]], device, dtype) -> list[dict[str, Tensor]]:
    """The draws on the device, in one transfer per name."""
    moved: list[dict] = [{} for _ in draws]
    for name, first in draws[0].items():
        values = [draw[name] for draw in draws]
        flat = torch.cat([v.flatten() for v in values])
        flat = flat.to(device, dtype if first.is_floating_point() else None)
        for out, v, part in zip(moved, values, flat.split([v.numel() for v in values])):
            out[name] = part.view(v.shape)
    return moved


@torch.no_grad()
def _put_weights(network: nn.Module, recipe: Recipe, state: State, images: Images, size: int):
    """Give the network a run's weights, or those that the optimizer names, for evaluation.

    Batch norm's statistics belong to the weights of training; for others, such as an average, they
    are taken anew from the training images.
    """
    evaluated = getattr(recipe.optimizer, "evaluated", None)
    weights = evaluated(state.params, state.optimizer) if evaluated else state.params
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, w in (weights | state.buffers).items():
        own[name].copy_(w)
    if evaluated:
        rows = torch.arange(len(images.data.y_train), device=images.device)
        update_bn((images.batch("train", part) for part in rows.split(size)), network)
    network.eval()


@torch.no_grad()
def _logits(network: nn.Module, images: Images, split: str, count: int, size: int) -> Tensor:
    """What the network says of the first images of a split, ``size`` at a time."""
    rows = torch.arange(count, device=images.device)
    return torch.cat([network(images.batch(split, part)) for part in rows.split(size)])


def _evaluate(
    network: nn.Module, images: Images, criterion: Callable, train_examples: int, size: int
) -> dict[str, float]:
    """Mean loss and error of each split."""
    values = {}
    for split, pixels in images.pixels.items():
        n = min(len(pixels), train_examples) if split == "train" else len(pixels)
        logits = _logits(network, images, split, n, size)
        for name, labels in images.labels[split].items():
            loss = criterion(logits, labels[:n]).double().mean().item()
            error = (logits.argmax(1) != labels[:n]).double().mean().item()
            values[f"{name}_loss"] = loss
            values[f"{name}_error"] = math.nan if math.isnan(loss) else error
    return values


def _evaluation_epochs(evaluate_at: int | Sequence[int], epochs: int) -> set[int]:
    if isinstance(evaluate_at, Integral):
        n = whole("evaluate_at", evaluate_at)
        evaluate_at = [round(k * epochs / n) for k in range(n + 1)]
    inside = [0 <= epoch <= epochs and epoch == int(epoch) for epoch in evaluate_at]
    if not inside or not all(inside):
        raise ValueError(f"evaluate_at must be epochs between 0 and {epochs}, got {evaluate_at}")
    return {int(epoch) for epoch in evaluate_at}


# -------------------------------------------------------------------------------------- the data


def synthetic() -> Data:
    """600 + 200 made-up colour images of 32×32 in ten classes, for tests.

    Each class is a coarse pattern with noise.
    """
    generator = stream(0, "made-up images")
    pattern = torch.rand(10, 3, 4, 4, generator=generator).repeat_interleave(8, 2)
    y = torch.arange(800) % 10
    x = pattern.repeat_interleave(8, 3)[y] + 0.4 * torch.randn(800, 3, 32, 32, generator=generator)
    x = (x.clamp(0, 1) * 255).to(torch.uint8)
    pool, test = (x[:600], y[:600]), (x[600:], y[600:])
    return sets._assemble("synthetic", 10, pool, test, None, 0, 0.0, 0)


# The settings of the smallest size of the experiments that train one network per unit.
TINY = {
    "data": "synthetic",
    "train_size": 64,
    "width": 4,
    "batch_size": 32,
    "epochs": 2,
    "evaluations": 1,
    "seeds": 2,
}
SETS = {
    "cifar10": sets.cifar10,
    "mnist": sets.mnist,
    "fashion_mnist": sets.fashion_mnist,
    "synthetic": synthetic,
}


def load(
    name: str,
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """A set of images by name, with the arguments of :func:`flatmin.book.cifar10`.

    Its files are read once.

    Examples
    --------
    >>> load("synthetic", train_size=100, label_noise=0.2)
    Data('synthetic', 10 classes, inputs [3, 32, 32], 100 train (20 noisy), 0 validation, 200 test)
    """
    if name not in SETS:
        raise ValueError(f"data must be one of {sorted(SETS)}, got {name!r}")
    pool, test, num_classes = _read(name)
    how = train_size, validation_size, label_noise, seed
    return sets._assemble(name, num_classes, pool, test, *how)


@functools.lru_cache(maxsize=1)
def _read(name: str):
    data = SETS[name]()
    pool, test = (_bytes(x)[0] for x in (data.x_train, data.x_test))
    return (pool, data.y_train), (test, data.y_test), data.num_classes


TITLES = {
    "cifar10": ("CIFAR-10", "cifar-10-batches-py"),
    "mnist": ("MNIST", "mnist"),
    "fashion_mnist": ("Fashion-MNIST", "fashion_mnist"),
    "synthetic": ("made-up images", ""),
}


def data_source(name: str) -> str:
    """The name of the data in a record.

    Only downloads, whose sums are checked, have the set's name alone.  A copy under
    ``FLATMIN_DATA`` is named by the first line of a file ``PROVENANCE`` next to its files, such as
    ``JPEG copy of CIFAR-10``.

    Examples
    --------
    >>> data_source("synthetic")
    'made-up images'
    """
    (title, folder), root = TITLES[name], os.environ.get("FLATMIN_DATA")
    if not folder or not root:
        return title
    note = Path(root).expanduser() / folder / "PROVENANCE"
    first = note.read_text(encoding="utf-8").partition("\n")[0] if note.exists() else ""
    return first or f"a copy of {title}"
