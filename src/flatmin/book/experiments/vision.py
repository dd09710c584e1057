"""Train one image network that fills a device by itself.

:func:`train` does for one large network what :func:`flatmin.fit` does for a stack: the same recipe,
initial weights, batches and draws (a test compares them), but made fast on a GPU.  The images stay
on the device, as bytes, and are augmented there; the network runs in bfloat16 and channels-last;
random numbers are drawn on the CPU once per epoch; and a step never waits for the device, except
with SAM, which waits once per pass.

A small network takes longer to launch than to compute: of the 10 ms of a step, a ResNet-18 of half
the width and 256 images kept an H100 busy for 3.  Then several processes can share one GPU,
``torchrun --nproc-per-node=8 -m flatmin.book.experiments NAME``.  One process computed 22,000
gradients per second, eight together over 41,000, and 60,000 under NVIDIA's Multi-Process Service,
which runs their kernels at once.  ``torch.backends.cudnn.benchmark`` found no faster kernels.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import pad

from ... import optimizer as optimizers
from ..._checks import whole
from ..._random import stream
from ...data import Data
from ...gradient import SAM, PlainGradient
from ...loops import SAM as SAMOptimizer
from ...pipeline import Batch, Recipe, Step
from ...stack import epoch_order, initial_module
from .. import datasets as sets

__all__ = [
    "Images",
    "augmentation",
    "data_source",
    "load",
    "predict",
    "step_decay",
    "synthetic",
    "train",
]

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
    normalize: bool = True,
    evaluate_at: int | Sequence[int] = 20,
    train_examples: int = 10_000,
    evaluation_batch_size: int = 1000,
    measure: Callable[[int, nn.Module], Mapping] | None = None,
    state: Mapping | None = None,
    bf16: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, xr.Dataset]:
    """Train one network, and evaluate it along the way.

    Parameters
    ----------
    model : callable or Module
        As in :func:`flatmin.fit`.
    data : Data
        Images [n, channels, height, width].
    recipe : Recipe
        The stages of the training step.  The optimizer is :class:`flatmin.optimizer.SGD` or
        :class:`flatmin.optimizer.Adam`.  The gradient stage is the plain gradient or
        :class:`flatmin.gradient.SAM`, which becomes a :class:`flatmin.SAM` around the optimizer.
        Batch norm under m-SAM sees the shards one after the other.
    work : Work
        Device, checkpoints and progress, see :mod:`flatmin.book.experiments.runner`.
    epochs, batch_size, seed : int
        Each epoch visits all examples in a fresh order; the last batch may be smaller.
    augment : bool
        Shift each image by up to 4 pixels in each direction, padded with black, and mirror it with
        probability ½.
    normalize : bool
        Subtract the training images' mean from each channel and divide by the standard deviation.
    evaluate_at : int or sequence of int
        The epochs after which to evaluate; a number n means 0 and n more, evenly spaced.
    train_examples : int
        Evaluate on at most this many training examples, the first ones.
    evaluation_batch_size : int
        Halved whenever the device's memory runs out.
    measure : callable, optional
        ``measure(epoch, model)``, called at each evaluation with the model in evaluation mode,
        returns further variables of the result, by name, as ``xarray.Dataset`` takes them.
    state : mapping, optional
        The checkpoint to resume from, for a unit that trains more than once and so loads it itself;
        its other entries are kept.  Default: ``work.load()``.
    bf16 : bool
        On a GPU, compute the network in bfloat16 (weights, losses and steps stay in ``dtype``).
    dtype : torch.dtype

    Returns
    -------
    model : Module
        As it is after the last step, on the device.
    Dataset
        Dimension ``epoch``: ``{split}_loss`` and ``{split}_error`` of train, validation (if there
        is one) and test, the first two also as ``train_clean`` and ``validation_clean``, against
        the labels before noise.
    """
    steps_per_epoch = math.ceil(len(data.y_train) / whole("batch_size", batch_size))
    evaluation_epochs = _evaluation_epochs(evaluate_at, whole("epochs", epochs))
    model = initial_module(model, seed).to(work.device, dtype, memory_format=torch.channels_last)
    optimizer = _optimizer(recipe, model)
    network = _network(model, bf16 and work.device.type == "cuda", dtype)
    images = Images(data, work.device, dtype, augment, normalize)

    others = dict(work.load() or {} if state is None else state)
    t, records = others.pop("t", 0), others.pop("records", {})
    if t:
        model.load_state_dict(others.pop("model"))
        optimizer.load_state_dict(others.pop("optimizer"))
    for epoch in range(t // steps_per_epoch, epochs + 1):
        if epoch in evaluation_epochs and epoch not in records:
            model.eval()
            values = work.chunks(
                lambda size: _evaluate(network, images, recipe.criterion, train_examples, size),
                evaluation_batch_size,
            ) | dict(measure(epoch, model) if measure else {})
            records[epoch] = xr.Dataset(values).to_dict()
        if epoch == epochs:
            break
        model.train()
        for x, y, draw in _batches(images, recipe, seed, epoch, batch_size, t % steps_per_epoch):
            now = Step(t, of=epochs * steps_per_epoch)
            factor = optimizers.lr_factor(recipe.optimizer.schedule, now)
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.lr * factor
            _step(network, recipe, optimizer, x, y, draw, data.num_classes)
            t += 1
            work.progress(len(y) * passes(recipe))
            if work.due():
                work.save(
                    others
                    | {
                        "t": t,
                        "records": records,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    }
                )
    model.eval()
    evaluations = [xr.Dataset.from_dict(values) for values in records.values()]
    return model, xr.concat(evaluations, "epoch").assign_coords(epoch=list(records))


def _step(network, recipe: Recipe, optimizer, x: Tensor, y: Tensor, draw: dict, num_classes: int):
    """batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer"""
    if recipe.batch is not None:
        batch = recipe.batch(Batch(x, y, num_classes=num_classes), draw)
        x, y = batch.x, batch.y

    def backward(rows, loss_stage, share=1.0):
        optimizer.zero_grad()
        loss = loss_stage(recipe.criterion(network(x[rows]), y[rows]))
        (loss * share).backward()
        return loss.detach()

    if type(recipe.gradient) is PlainGradient:
        backward(slice(None), recipe.loss)
        optimizer.step()
        return

    def both_passes(rows, share):
        loss_stages = iter((torch.mean, recipe.loss))  # ε̂ comes from the raw loss
        return lambda: backward(rows, next(loss_stages), share)

    m = recipe.gradient.m or len(y)
    shards = [slice(a, min(a + m, len(y))) for a in range(0, len(y), m)]
    optimizer.step(
        [both_passes(s, (s.stop - s.start) * len(shards) / len(y)) for s in shards]
    )  # SAM takes the mean over shards, of which the last may be smaller


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


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Data,
    work,
    *,
    normalize: bool = True,
    bf16: bool = True,
    evaluation_batch_size: int = 1000,
) -> Tensor:
    """The classes that a network predicts for the training images: int64 [n], on the CPU."""
    dtype = next(model.parameters()).dtype
    network = _network(model.eval(), bf16 and work.device.type == "cuda", dtype)
    images = Images(data, work.device, dtype, normalize=normalize)
    return work.chunks(
        lambda size: torch.cat(
            [
                network(images.batch("train", rows)).argmax(1)
                for rows in torch.arange(len(data.y_train), device=work.device).split(size)
            ]
        ).cpu(),
        evaluation_batch_size,
    )


# --------------------------------------------------------------------------- images on the device


class Images:
    """A data set on the device, as bytes if that is exact, and its batches for a network.

    Parameters
    ----------
    data : Data
    device, dtype :
        Of the batches.
    augment : bool
        Put a black margin around the training images, for :func:`augmentation`.
    normalize : bool
        By mean and standard deviation of the training images, per channel.
    """

    def __init__(self, data: Data, device, dtype=torch.float32, augment=False, normalize=True):
        if data.x_train.ndim != 4:
            raise ValueError(
                "data must have images [n, channels, height, width], got inputs of "
                f"shape {list(data.x_train.shape[1:])}"
            )
        self.data, self.device, self.dtype = data, device, dtype
        self.height, self.width = data.x_train.shape[-2:]
        self.margin = PADDING if augment else 0
        std, mean = torch.std_mean(data.x_train, (0, 2, 3), keepdim=True)
        if not normalize:
            std, mean = torch.ones_like(std), torch.zeros_like(mean)
        std = std.clamp_min(1 / 255)
        self.pixels, self.scale, self.labels = {}, {}, {}
        for split in ("train", "validation", "test"):
            x, y = data.split(split)
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


def _batches(
    images: Images, recipe: Recipe, seed: int, epoch: int, size: int, start: int
) -> Iterator[tuple[Tensor, Tensor, dict]]:
    """The batches of an epoch from number ``start`` on; all draws are transferred at once."""
    labels, shape = images.data.y_train, images.data.x_train.shape[1:]
    order = epoch_order(seed, epoch, len(labels))
    parts = order.split(size)
    draws = [{} for _ in parts]
    if recipe.batch is not None:
        first = epoch * len(parts)
        draws = _to_device(
            [
                recipe.batch.draw(
                    Batch(torch.empty(len(rows), *shape, device="meta"), labels[rows], rows),
                    stream(seed, "batch", first + k),
                )
                for k, rows in enumerate(parts)
            ],
            images.device,
            images.dtype,
        )
    changes = [None] * len(parts)
    if images.margin:
        changes = augmentation(seed, epoch, len(labels)).to(images.device).split(size)
    device_labels = images.labels["train"]["train"]
    batches = list(zip(order.to(images.device).split(size), changes, draws))
    for rows, change, draw in batches[start:]:
        yield images.batch("train", rows, change), device_labels[rows], draw


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


def _network(model: nn.Module, bf16: bool, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function from images to logits, computed in bfloat16 if ``bf16``."""

    def network(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits = model(x)
        return logits.to(dtype)

    return network


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer from ``torch.optim``, with SAM around it if the recipe has it."""
    stage, params = recipe.optimizer, list(model.parameters())
    if type(stage) is optimizers.SGD:
        base = torch.optim.SGD(
            params,
            stage.lr,
            stage.momentum,
            weight_decay=stage.weight_decay,
            nesterov=stage.nesterov,
        )
    elif type(stage) is optimizers.Adam:
        base = torch.optim.Adam(
            params, stage.lr, (stage.beta1, stage.beta2), stage.eps, weight_decay=stage.weight_decay
        )
    else:
        raise ValueError(f"recipe.optimizer must be SGD or Adam, got {stage!r}")
    if getattr(recipe.batch, "second_stream", False):
        raise ValueError("recipe.batch must not draw a second stream in vision.train")
    gradient = recipe.gradient
    if type(gradient) is PlainGradient:
        return base
    if type(gradient) is not SAM or gradient.exact or not gradient.normalized:
        raise ValueError(
            "recipe.gradient must be the plain gradient or SAM with normalized=True and "
            f"exact=False, got {gradient!r}"
        )
    return SAMOptimizer(
        base, gradient.rho, gradient.p, gradient.adaptive, gradient.eta, model=model
    )


@torch.no_grad()
def _evaluate(
    network, images: Images, criterion, train_examples: int, size: int
) -> dict[str, float]:
    """Mean loss and error of each split; it waits for the device once."""
    sums = {}
    for split, pixels in images.pixels.items():
        n = min(len(pixels), train_examples) if split == "train" else len(pixels)
        for rows in torch.arange(n, device=images.device).split(size) if n else ():
            logits = network(images.batch(split, rows))
            for name, labels in images.labels[split].items():
                y = labels[rows]
                loss = criterion(logits, y).double().sum() / n
                wrong = (logits.argmax(1) != y).double().sum() / n
                so_far = sums.get(name, 0.0)
                sums[name] = so_far + torch.stack([loss, torch.where(loss.isnan(), loss, wrong)])
    values = torch.stack([*sums.values()]).tolist()
    return {
        f"{name}_{quantity}": value
        for name, pair in zip(sums, values)
        for quantity, value in zip(("loss", "error"), pair)
    }


def _evaluation_epochs(evaluate_at: int | Sequence[int], epochs: int) -> set[int]:
    if isinstance(evaluate_at, Integral):
        n = whole("evaluate_at", evaluate_at)
        evaluate_at = [round(k * epochs / n) for k in range(n + 1)]
    inside = [0 <= epoch <= epochs and epoch == int(epoch) for epoch in evaluate_at]
    if not inside or not all(inside):
        raise ValueError(f"evaluate_at must be epochs between 0 and {epochs}, got {evaluate_at}")
    return {int(epoch) for epoch in evaluate_at}


# -------------------------------------------------------------------------------------- the data


def synthetic(
    train_size: int | None = None, validation_size: int = 0, label_noise: float = 0.0, seed: int = 0
) -> Data:
    """600 + 200 made-up colour images of 32×32 in ten classes, for tests.

    Each class is a coarse pattern with noise.  The arguments are those of
    :func:`flatmin.book.cifar10`.

    Examples
    --------
    >>> synthetic(train_size=100, label_noise=0.2)
    Data('synthetic', 10 classes, inputs [3, 32, 32], 100 train (20 noisy), 0 validation, 200 test)
    """
    choice = sets._Choice(train_size, validation_size, label_noise, seed)
    return sets._assemble("synthetic", 10, *_made_up(), choice)


@functools.lru_cache(maxsize=1)
def _made_up() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = stream(0, "made-up images")
    pattern = torch.rand(10, 3, 4, 4, generator=generator).repeat_interleave(8, 2)
    y = torch.arange(800) % 10
    x = pattern.repeat_interleave(8, 3)[y] + 0.4 * torch.randn(800, 3, 32, 32, generator=generator)
    x = (x.clamp(0, 1) * 255).to(torch.uint8)
    return (x[:600], y[:600]), (x[600:], y[600:])


SETS = {
    "cifar10": sets.cifar10,
    "cifar100": sets.cifar100,
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
    """A set of images by name; its files are read once."""
    if name not in SETS:
        raise ValueError(f"data must be one of {sorted(SETS)}, got {name!r}")
    pool, test, num_classes = _read(name, os.environ.get("FLATMIN_DATA"))
    choice = sets._Choice(train_size, validation_size, label_noise, seed)
    return sets._assemble(name, num_classes, pool, test, choice)


@functools.lru_cache(maxsize=1)
def _read(name: str, folder: str | None):
    data = SETS[name]()
    pool, test = (_bytes(x)[0] for x in (data.x_train, data.x_test))
    return (pool, data.y_train), (test, data.y_test), data.num_classes


# MD5 sums of the official files, from torchvision.
OFFICIAL = {
    "cifar10": (
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    "cifar100": (
        "cifar-100-python",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
}
TITLES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "synthetic": "made-up images",
}


def data_source(name: str) -> str:
    """The name of the data in a record.

    A copy under ``FLATMIN_DATA`` is named by the first line of a file ``PROVENANCE`` next to its
    files, ``JPEG copy of CIFAR-10`` for example.  CIFAR files that are not the official ones never
    have the set's name alone.

    Examples
    --------
    >>> data_source("synthetic")
    'made-up images'
    """
    return _data_source(name, os.environ.get("FLATMIN_DATA"))


@functools.lru_cache
def _data_source(name: str, root: str | None) -> str:
    if root is None or name not in OFFICIAL:
        return TITLES[name]
    inside, sums = OFFICIAL[name]
    folder = Path(root).expanduser() / inside
    note = folder / "PROVENANCE"
    if note.exists() and (lines := note.read_text(encoding="utf-8").split("\n")) and lines[0]:
        return lines[0]
    same = all(
        hashlib.md5((folder / file).read_bytes()).hexdigest() == md5 for file, md5 in sums.items()
    )
    return TITLES[name] if same else f"a copy of {TITLES[name]}, not its official files"
