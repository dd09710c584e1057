"""The stack: train every combination of a grid and several seeds at once.

A training step is a pipeline, and a :class:`Recipe` says what sits in each of its stages::

    batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer

:func:`fit` runs the pipeline for a whole stack of networks side by side (``torch.func.vmap``).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.dropout import _DropoutNd
from tqdm import tqdm

from . import _random, pipeline
from ._checks import whole
from ._files import replacing
from ._functional import Network
from ._random import stream
from ._schedule import lr_factor
from ._tree import Params
from .data import Data
from .pipeline import Recipe

__all__ = [
    "Instrument",
    "Network",
    "Networks",
    "best_step",
    "epoch_order",
    "fit",
    "initial_module",
    "stream",
    "unexpectedly_diverged",
]


if TYPE_CHECKING:
    import xarray as xr

Instrument = Callable[[Network, Params, Tensor, Tensor], Tensor]


def initial_module(model: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network that seed ``seed`` starts from: ``model()``, or a copy of ``model`` itself."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(seed, "weights").initial_seed())
        return model()


def epoch_order(seed: int, epoch: int, n: int, purpose: str = "order") -> Tensor:
    """The order in which seed ``seed`` visits ``n`` examples in epoch ``epoch``: int64 [n]."""
    return torch.randperm(n, generator=stream(seed, purpose, epoch))


@dataclass(frozen=True)
class Networks:
    """Trained networks, stacked: one for every combination of the grid and the seeds.

    Attributes
    ----------
    params, buffers : dict of Tensor
        Each with a leading dimension R, the number of runs.
    coords : dict
        ``{dimension: values}`` in order; the last is ``seed``.  Runs are in row-major order.
    template : nn.Module
        The architecture, in evaluation mode.
    """

    template: nn.Module
    params: Params
    buffers: Params
    coords: dict[str, list[Any]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.coords.values())

    def measure(
        self, instrument: Instrument, data: Data | Sequence[Data], split: str = "test"
    ) -> xr.DataArray:
        """Apply an instrument to every network at once.

        Parameters
        ----------
        instrument : callable
            ``instrument(network, params, x, y) -> Tensor`` for one network, written with
            ``torch.func``; ``network(params, x)`` gives logits in evaluation mode.
        data : Data, or a sequence of Data with one per seed
        split : str
            Which part of the data: ``"train"``, ``"validation"``, ``"test"``, …

        Returns
        -------
        DataArray
            Dimensions: the grid's names, ``seed``, and ``dim_0, …`` for those of what the
            instrument returns.
        """
        import xarray as xr  # here, so that importing flatmin is as fast as importing torch

        device = next(iter(self.params.values())).device
        x, y, per_run = _split(data, split, self.shape[-1], device, self._dtype)
        if per_run:
            runs = torch.arange(math.prod(self.shape), device=device) % self.shape[-1]
            x, y = x[runs], y[runs]
        measured = _measure(self.template, instrument, self.params, self.buffers, x, y, per_run)
        values = measured.cpu().numpy()
        dims = [*self.coords, *(f"dim_{i}" for i in range(values.ndim - 1))]
        return xr.DataArray(values.reshape(*self.shape, *values.shape[1:]), self.coords, dims)

    def select(self, **coords: Any) -> Networks:
        """Some of the networks: ``networks.select(flood_level=[0.0, 0.1])`` keeps all seeds."""
        keep = []
        for name in coords:
            if name not in self.coords:
                raise ValueError(f"select() takes the dimensions {list(self.coords)}, got {name!r}")
        for name, values in self.coords.items():
            wanted = np.atleast_1d(coords.get(name, values)).tolist()
            keep.append([self._index_of(name, value) for value in wanted])
        grid = np.meshgrid(*keep, indexing="ij")
        runs = torch.from_numpy(np.ravel_multi_index(grid, self.shape).ravel())
        take = lambda stacked: {name: w[runs.to(w.device)] for name, w in stacked.items()}
        pairs = zip(self.coords.items(), keep)
        chosen = {name: [values[i] for i in indices] for (name, values), indices in pairs}
        return Networks(self.template, take(self.params), take(self.buffers), chosen)

    def module(self, **coords: Any) -> nn.Module:
        """One network as an ordinary module: ``networks.module(flood_level=0.1, seed=3)``."""
        if set(coords) != set(self.coords):
            raise ValueError(
                f"module() needs a value for each of {list(self.coords)}, got {coords}"
            )
        one = self.select(**coords)
        module = copy.deepcopy(self.template)
        with torch.no_grad():
            for name, w in [*module.named_parameters(), *module.named_buffers()]:
                w.copy_((one.params | one.buffers)[name][0])
        return module

    def _index_of(self, name: str, value: float) -> int:
        hits = np.flatnonzero(np.isclose(self.coords[name], value, rtol=1e-9, atol=0))
        if not len(hits):
            raise ValueError(f"{name} must be one of {list(self.coords[name])}, got {value!r}")
        return int(hits[0])

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.params.values())).dtype


class _Options(TypedDict, total=False):
    """The arguments that both overloads of :func:`fit` share."""

    batch_size: int | None
    grid: Mapping[str, Sequence[float]] | None
    seeds: int | Sequence[int]
    evaluate_at: int | Sequence[int]
    splits: Sequence[str] | None
    instruments: Mapping[str, Instrument] | None
    select_by: str
    chunk_size: int | None
    evaluation_batch_size: int
    device: str | torch.device | None
    dtype: torch.dtype
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    expect_divergence: bool
    progress: Callable[[int], bool] | None


@overload
def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Data | Sequence[Data],
    recipe: Recipe = ...,
    *,
    steps: int,
    networks: None = None,
    **options: Unpack[_Options],
) -> xr.Dataset: ...


@overload
def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Data | Sequence[Data],
    recipe: Recipe = ...,
    *,
    steps: int,
    networks: Literal["last", "best"],
    **options: Unpack[_Options],
) -> tuple[xr.Dataset, Networks]: ...


def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Data | Sequence[Data],
    recipe: Recipe = Recipe(),
    *,
    steps: int,
    batch_size: int | None = 100,
    grid: Mapping[str, Sequence[float]] | None = None,
    seeds: int | Sequence[int] = 5,
    evaluate_at: int | Sequence[int] = 20,
    splits: Sequence[str] | None = None,
    instruments: Mapping[str, Instrument] | None = None,
    networks: Literal["last", "best"] | None = None,
    select_by: str = "validation_error",
    chunk_size: int | None = None,
    evaluation_batch_size: int = 1000,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    expect_divergence: bool = False,
    progress: Callable[[int], bool] | None = None,
) -> xr.Dataset | tuple[xr.Dataset, Networks]:
    """Train every combination of ``grid`` and ``seeds`` at once, and return labelled results.

    Runs that share a seed start from the same weights and see the same batches, whatever their
    hyperparameters: differences between them are paired.  What the batch stage draws is a function
    of the seed, the step and that stage.  Splits are evaluated without the batch stage.

    Parameters
    ----------
    model : callable or Module
        Makes a network, ``lambda: MLP(40, 100, 100, 10)``, and is called once per seed; or a
        network, from whose weights every run starts.  The only random layer allowed is
        :class:`flatmin.layers.Dropout`.
    data : Data, or a sequence of Data
        One for all runs, or one per seed, of equal shapes: then the data are random, too.
    recipe : Recipe
        What sits in the stages of the training step.
    steps : int
        How many optimizer steps.
    batch_size : int or None
        Each epoch visits the training set in a fresh order, in batches of this size, of which the
        last may be smaller, as in a ``DataLoader``; ``None`` takes the full batch.
    grid : mapping of str to sequence of float
        Hyperparameters of the recipe by name; every combination is trained.
    seeds : int or sequence of int
        A number of seeds, counted from :func:`flatmin.book.first_seed`, or the seeds themselves.
    evaluate_at : int or sequence of int
        The steps after which all splits are evaluated; a number n means 0 and n more, evenly
        spaced.
    splits : sequence of str
        Which parts of the data; default: train, validation (if there is one) and test.
    instruments : mapping of str to callable
        Further measurements at those steps: ``instrument(network, params, x, y)`` gets the
        training split, see :meth:`Networks.measure`, and returns a scalar.
    networks : {None, "last", "best"}
        Also return the networks after the last step, or at the evaluated step that was best.
    select_by : str
        The variable that "best" minimizes, e.g. ``"validation_error"`` or ``"validation_loss"``.
    chunk_size : int
        How many runs to train at once, to bound memory.  Results do not depend on it.
    evaluation_batch_size : int
        How many examples to evaluate at once; bounds memory too.
    device, dtype
        Default: the GPU if there is one, and float32.
    checkpoint : path
        Where to save the state every ``checkpoint_every`` steps.  A call with the same arguments
        resumes from there, and on a CPU ends with bitwise the same results.  With another
        ``chunk_size`` it resumes from the last chunk that was finished.
    expect_divergence : bool
        Whether losses may become infinite or NaN: if true, there is no warning, and claims about
        the result are allowed.
    progress : callable
        Called after each step with the number of per-example gradients that it took, in place of
        the progress bar.  If it returns true, the checkpoint is saved and ``KeyboardInterrupt``
        raised.

    Returns
    -------
    Dataset, or (Dataset, Networks)
        Variables ``{split}_loss`` (mean, in nats), ``{split}_error`` (fraction) and one per
        instrument, with dimensions (grid's names, ``seed``, ``step``), all in evaluation mode; and
        ``diverged_at``, the first step whose loss was not finite, or after which an evaluation
        found weights that were not (-1: none).  From that step on, a run's values are NaN.

    Raises
    ------
    ValueError
        For a grid that is empty or names no hyperparameter of the recipe, values out of range,
        sizes or shapes that disagree, or a checkpoint of another experiment.

    Notes
    -----
    One call trains on one device.  Under ``torchrun`` the experiments of
    :mod:`flatmin.book.experiments` are sharded over the ranks: each rank calls ``fit`` for its own
    stacks.

    On a GPU, launching the kernels dominates the time of small networks: a step takes about as long
    for a hundred runs as for one (``benchmarks/README.md``).

    Examples
    --------
    >>> from flatmin.book import MLP, two_gaussians
    >>> from flatmin.loss import Flooding
    >>> runs = fit(lambda: MLP(10, 16, 2), two_gaussians(test_size=100), Recipe(Flooding()),
    ...            steps=20, batch_size=None, grid={"flood_level": [0.0, 0.1]}, seeds=3)
    >>> dict(runs.test_error.sizes)
    {'flood_level': 2, 'seed': 3, 'step': 21}
    """
    plan = _Plan(
        model,
        data,
        recipe,
        steps,
        batch_size,
        dict(grid or {}),
        seeds,
        evaluate_at,
        splits,
        dict(instruments or {}),
        networks,
        select_by,
        chunk_size,
        evaluation_batch_size,
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        dtype,
    )
    started = time.perf_counter()
    saved = _Checkpoint(checkpoint, checkpoint_every, plan)
    batch = plan.batch_size or plan.train_size
    off = {"disable": True} if progress else {}  # else TQDM_DISABLE decides
    with tqdm(
        total=plan.steps * plan.runs, unit="step", leave=False, dynamic_ncols=True, **off
    ) as bar:

        def advance(steps: int) -> bool:  # of single runs
            bar.update(steps)
            return progress is not None and bool(progress(steps * batch))

        advance(plan.steps * saved.runs)
        while saved.runs < plan.runs:
            runs = plan.run_index[saved.runs :][: plan.chunk_size]
            saved.finish(_train(plan, runs, saved, advance))
    values = {
        name: torch.cat([chunk["values"][name] for chunk in saved.finished])
        for name in saved.finished[0]["values"]
    }
    dataset = plan.label(values)
    dataset.attrs |= plan.describe() | {"seconds": time.perf_counter() - started}
    if expect_divergence:
        dataset.attrs["divergence"] = "expected"
    if names := unexpectedly_diverged(dataset):
        warnings.warn(
            f"the loss of {len(names)} runs is not finite: {'; '.join(names)}. Their "
            "results are NaN from there.",
            stacklevel=2,
        )
    if networks is None:
        return dataset
    stacked = {
        part: {
            name: torch.cat([chunk[part][name] for chunk in saved.finished]).to(plan.device)
            for name in saved.finished[0][part]
        }
        for part in ("params", "buffers")
    }
    return dataset, Networks(plan.template.eval(), **stacked, coords=plan.coords)


def best_step(
    runs: xr.Dataset, by: str = "validation_error", patience: int | None = None
) -> xr.Dataset:
    """What each run would have reported had it stopped early, without training again.

    Parameters
    ----------
    runs : Dataset
        From :func:`fit`.
    by : str
        The variable to minimize; the first minimum counts.
    patience : int
        Stop after ``patience`` evaluations without a new minimum.  ``None``: search all steps.

    Returns
    -------
    Dataset
        Without the dimension ``step``, which becomes a coordinate: the step chosen for each run.

    Examples
    --------
    >>> import xarray as xr
    >>> loss = xr.DataArray([[3.0, 2.0, 2.5, 2.6, 1.0]], dims=("seed", "step"))
    >>> runs = xr.Dataset({"validation_loss": loss}, coords={"step": range(5)})
    >>> best_step(runs, "validation_loss").step.values
    array([4])
    >>> best_step(runs, "validation_loss", patience=2).step.values
    array([1])
    """
    names = sorted(str(name) for name, v in runs.data_vars.items() if "step" in v.dims)
    if by not in names:
        raise ValueError(f"by must be one of {names}, got {by!r}")
    score = runs[by].fillna(np.inf)
    if patience is not None:
        whole("patience", patience)
        axis = score.get_axis_num("step")
        low = np.minimum.accumulate(score.values, axis)
        index = np.arange(score.sizes["step"]).reshape(
            [-1 if d == "step" else 1 for d in score.dims]
        )
        new = low < np.roll(low, 1, axis)  # at index 0 it does not matter
        last_new = np.maximum.accumulate(np.where(new, index, 0), axis)
        stopped = np.logical_or.accumulate(index - last_new >= patience, axis)
        score = score.where(~stopped, np.inf)
    return runs.isel(step=score.argmin("step"))


def unexpectedly_diverged(runs: xr.Dataset) -> list[str]:
    """The runs of a result of :func:`fit` whose loss became infinite or NaN, by name and step.

    Empty if the call said that it expects divergence.
    """
    if "divergence" in runs.attrs:
        return []
    diverged = np.atleast_1d(runs.diverged_at)
    names = [[f"{d}={c}" for c in np.atleast_1d(runs[d])] for d in runs.diverged_at.dims]
    return [
        f"{', '.join(labels[i] for labels, i in zip(names, at))} at step {diverged[at]}"
        for at in np.ndindex(diverged.shape)
        if diverged[at] >= 0
    ]


# ------------------------------------------------------------------------------ implementation


@dataclass
class _Plan:
    """The arguments of ``fit``, checked and completed."""

    model: Any
    data: Any
    recipe: Recipe
    steps: int
    batch_size: int | None
    grid: dict[str, Any]
    seeds: Any
    evaluate_at: Any
    splits: Any
    instruments: dict[str, Any]
    networks: str | None
    select_by: str
    chunk_size: int | None
    evaluation_batch_size: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("steps", "evaluation_batch_size", "batch_size", "chunk_size"):
            value = getattr(self, name)
            if value is not None or name in ("steps", "evaluation_batch_size"):
                setattr(self, name, whole(name, value))
        if self.networks not in (None, "last", "best"):
            raise ValueError(f"networks must be None, 'last' or 'best', got {self.networks!r}")
        if isinstance(self.seeds, Integral):
            self.seeds = _random.seeds(whole("seeds", self.seeds))
        integral = all(isinstance(seed, Integral) for seed in self.seeds)
        if not integral or not len(self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds must be whole numbers, at least one, and all different, got {self.seeds}"
            )
        self.seeds = [int(seed) for seed in self.seeds]
        for name, values in self.grid.items():
            try:
                self.grid[name] = values = [float(v) for v in values]
            except (TypeError, ValueError):
                raise ValueError(f"grid[{name!r}] must be numbers, got {values!r}") from None
            if not values:
                raise ValueError(f"grid[{name!r}] must have at least one value, got none")
            for value in values:
                self.recipe.with_values({name: value})  # raises for a bad name or value
        self._check_data()
        if isinstance(self.evaluate_at, Integral):
            count = whole("evaluate_at", self.evaluate_at)
            self.evaluate_at = np.linspace(0, self.steps, count + 1).round()
        inside = [0 <= t <= self.steps and t == int(t) for t in self.evaluate_at]
        if not inside or not all(inside):
            raise ValueError(
                f"evaluate_at must be steps between 0 and {self.steps}, got {self.evaluate_at}"
            )
        self.evaluate_at = sorted({int(t) for t in self.evaluate_at})
        names = [f"{s}_{m}" for s in self.splits for m in ("loss", "error")]
        if taken := {*names, "diverged_at"} & {*self.instruments}:
            raise ValueError(f"instruments must have names of their own, got {sorted(taken)}")
        names += self.instruments
        if self.networks == "best" and self.select_by not in names:
            raise ValueError(f"select_by must be one of {names}, got {self.select_by!r}")

        self.coords = self.grid | {"seed": self.seeds}
        self.points = points = list(itertools.product(*self.grid.values()))
        self.runs = len(points) * len(self.seeds)
        self.chunk_size = self.chunk_size or self.runs
        self.run_index = torch.arange(self.runs)
        self.seed_of_run = self.run_index % len(self.seeds)
        self.hyper_of_run = {
            name: torch.tensor([p[i] for p in points], dtype=self.dtype).repeat_interleave(
                len(self.seeds)
            )
            for i, name in enumerate(self.grid)
        }
        self.template = initial_module(self.model, self.seeds[0]).to(self.device, self.dtype)
        for name, m in self.template.named_modules():
            if isinstance(m, (_DropoutNd, nn.RReLU)) and getattr(m, "p", True):
                raise ValueError(
                    "model must have no random layer but flatmin.layers.Dropout, "
                    f"got {m} at {name!r}"
                )

    def _check_data(self) -> None:
        first = _first_data(self.data, len(self.seeds))
        if self.splits is None:
            self.splits = ["train", *["validation"] * (len(first.x_validation) > 0), "test"]
        self.tensors = {
            split: _split(self.data, split, len(self.seeds), self.device, self.dtype)
            for split in {"train", *self.splits}
        }
        for split in self.splits:
            if not len(first.split(split)[0]):
                raise ValueError(f"splits must have examples, got {split!r} of {first!r}")
        n = len(first.x_train)
        if self.batch_size is not None and self.batch_size > n:
            raise ValueError(
                f"batch_size must be at most the {n} training examples, "
                f"or None for the full batch, got {self.batch_size}"
            )
        self.train_size, self.num_classes = n, first.num_classes
        self.steps_per_epoch = math.ceil(n / self.batch_size) if self.batch_size else 1

    def values_of(self, run: int) -> dict[str, float]:
        return dict(zip(self.grid, self.points[run // len(self.seeds)]))

    def label(self, values: dict[str, Tensor]) -> xr.Dataset:
        import xarray as xr

        shape = tuple(len(v) for v in self.coords.values())
        coords = self.coords | {
            "step": self.evaluate_at,
            "epoch": ("step", [t / self.steps_per_epoch for t in self.evaluate_at]),
        }
        dims = (*self.coords, "step")
        return xr.Dataset(
            {
                name: (dims[: len(shape) + v.ndim - 1], v.numpy().reshape(*shape, *v.shape[1:]))
                for name, v in values.items()
            },
            coords,
        )

    def describe(self) -> dict[str, Any]:
        first = self.data if isinstance(self.data, Data) else self.data[0]
        return {
            "data": first.name,
            "recipe": _description(self.recipe),
            "steps": self.steps,
            "batch_size": self.batch_size or self.train_size,
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else str(self.device),
            "dtype": str(self.dtype),
            "torch": torch.__version__,
        }

    def fingerprint(self) -> str:
        """What must be equal for a checkpoint to be resumed."""
        content = hashlib.sha256()
        for split in sorted(self.tensors):
            for tensor in self.tensors[split][:2]:
                content.update(_bytes(tensor))
        weights = hashlib.sha256(_description(self.template).encode())
        for name, w in self.template.state_dict().items():
            weights.update(name.encode() + _bytes(w))
        return repr(
            self.describe()
            | {
                "data": content.hexdigest(),
                "weights": weights.hexdigest(),
                "grid": self.grid,
                "seeds": self.seeds,
                "evaluate_at": self.evaluate_at,
                "splits": list(self.splits),
                "instruments": sorted(self.instruments),
                "networks": self.networks,
                "select_by": self.select_by,
            }
        )


def _train(
    plan: _Plan, runs: Tensor, saved: _Checkpoint, advance: Callable[[int], bool]
) -> dict[str, Any]:
    """Train one chunk of runs to the end."""
    seed_of_run = plan.seed_of_run[runs].to(plan.device)
    hyper = {name: v[runs].to(plan.device) for name, v in plan.hyper_of_run.items()}
    step, evaluate = _step(plan), _evaluate(plan)
    resumed = saved.current_of(runs)
    if resumed:
        t = resumed["t"]
        state, records = (_to(resumed[part], plan.device) for part in ("state", "records"))
    else:
        t, state, records = 0, _start(plan, seed_of_run, hyper), []
    stop = advance(t * len(runs))
    batches, draws = _batches(plan, seed_of_run, t), _draws(plan, runs, t)
    while True:
        if t in plan.evaluate_at and not resumed:  # a saved state has been evaluated already
            values = evaluate(state, seed_of_run, t)
            if plan.networks == "best":
                state["best"] = _better(state, values[plan.select_by])
            records.append(values)
        if not resumed:
            saved.save(t, state, records, now=stop)
        if t == plan.steps:
            break
        if stop:
            raise KeyboardInterrupt
        factor = lr_factor(plan.recipe.optimizer.schedule, t / plan.steps)
        state |= step(state, hyper, next(batches), next(draws), t, factor)
        t, resumed = t + 1, None
        stop = advance(len(runs))
    values = {name: torch.stack([r[name] for r in records], 1).cpu() for name in records[0]}
    values["diverged_at"] = state["diverged_at"].cpu()
    final = state["best"] if plan.networks == "best" else state
    keep = ("params", "buffers") if plan.networks else ()
    return {"values": values} | {part: _to(final[part], "cpu") for part in keep}


def _start(plan: _Plan, seed_of_run: Tensor, hyper: Params) -> dict[str, Any]:
    modules = [initial_module(plan.model, seed) for seed in plan.seeds]
    params, buffers = stack_module_state(modules)
    for name in [name for name, w in params.items() if not w.requires_grad]:
        buffers[name] = params.pop(name)  # frozen
    for_runs = lambda w: w.detach().to(
        plan.device, plan.dtype if w.is_floating_point() else w.dtype
    )[seed_of_run]
    params = {name: for_runs(w) for name, w in params.items()}
    buffers = {name: for_runs(b) for name, b in buffers.items()}
    optimizer = plan.recipe.with_values(hyper).optimizer.init(params)
    never = torch.full((len(seed_of_run),), -1, device=plan.device)
    return {"params": params, "buffers": buffers, "optimizer": optimizer, "diverged_at": never}


def _step(plan: _Plan) -> Callable[..., dict[str, Any]]:
    """One step of the pipeline, for all runs of a chunk at once."""

    def one_run(
        params: Params,
        buffers: Params,
        optimizer: Any,
        hyper: Params,
        draw: Params,
        batch: tuple[Tensor, ...],
        *,
        t: int,
        factor: float,
    ) -> Any:
        recipe = plan.recipe.with_values(hyper)
        return pipeline.step(
            plan.template,
            recipe,
            params,
            buffers,
            optimizer,
            batch,
            draw,
            plan.num_classes,
            t,
            factor,
        )

    def step(
        state: dict[str, Any],
        hyper: Params,
        batch: tuple[Tensor, ...],
        draw: Params,
        t: int,
        factor: float,
    ) -> dict[str, Any]:
        plan.template.train()
        shared = None if plan.batch_size is None and not plan.tensors["train"][2] else 0
        stacked = vmap(
            lambda *args: one_run(*args, t=t, factor=factor), in_dims=(0, 0, 0, 0, 0, shared)
        )
        params, buffers, optimizer, loss = stacked(
            state["params"], state["buffers"], state["optimizer"], hyper, draw, batch
        )
        broken = ~loss.isfinite() & (state["diverged_at"] < 0)
        return {
            "params": params,
            "buffers": buffers,
            "optimizer": optimizer,
            "diverged_at": torch.where(broken, t + 1, state["diverged_at"]),
        }

    return step


def _evaluate(plan: _Plan) -> Callable[..., Params]:
    """Losses, errors and instruments of all runs of a chunk."""

    def one_run(params: Params, buffers: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(plan.template, (params, buffers), (x,))
        return plan.recipe.criterion(logits, y).sum(), (logits.argmax(-1) != y).sum()

    @torch.no_grad()
    def evaluate(state: dict[str, Any], seed_of_run: Tensor, t: int) -> Params:
        plan.template.eval()
        # The last step may have broken the weights before any loss shows it.
        finite = [w.reshape(len(w), -1).isfinite().all(1) for w in state["params"].values()]
        broken = ~torch.stack(finite).all(0) & (state["diverged_at"] < 0)
        state["diverged_at"] = torch.where(broken, t, state["diverged_at"])
        values = {}
        for split in plan.splits:
            x, y, per_run = plan.tensors[split]
            n = x.shape[1] if per_run else x.shape[0]
            loss = error = x.new_zeros((), dtype=torch.float64)
            for part in torch.arange(n, device=x.device).split(plan.evaluation_batch_size):
                rows = (seed_of_run[:, None], part) if per_run else part
                dim = 0 if per_run else None
                stacked = vmap(one_run, in_dims=(0, 0, dim, dim))
                losses, wrong = stacked(state["params"], state["buffers"], x[rows], y[rows])
                loss, error = loss + losses.double(), error + wrong.double()
            values[f"{split}_loss"] = loss / n
            values[f"{split}_error"] = torch.where(loss.isnan(), torch.nan, error / n)
        x, y, per_run = plan.tensors["train"]
        for name, instrument in plan.instruments.items():
            rows = (seed_of_run,) if per_run else ...
            values[name] = _measure(
                plan.template,
                instrument,
                state["params"],
                state["buffers"],
                x[rows],
                y[rows],
                per_run,
            ).double()
            if values[name].ndim > 1:
                raise ValueError(
                    f"instruments must return one number, but {name!r} returned shape "
                    f"{tuple(values[name].shape[1:])}"
                )
        healthy = state["diverged_at"] < 0
        return {name: torch.where(healthy, v, torch.nan) for name, v in values.items()}

    return evaluate


def _measure(
    template: nn.Module,
    instrument: Instrument,
    params: Params,
    buffers: Params,
    x: Tensor,
    y: Tensor,
    per_run: bool,
) -> Tensor:
    def one_run(params: Params, buffers: Params, x: Tensor, y: Tensor) -> Tensor:
        network = lambda params, x: functional_call(template, (params, buffers), (x,))
        return instrument(network, params, x, y)

    dim = 0 if per_run else None
    template.eval()
    return vmap(one_run, in_dims=(0, 0, dim, dim))(params, buffers, x, y)


def _rows(plan: _Plan, t: int) -> Iterator[tuple[Tensor, ...]]:
    """Which examples each seed visits, from step t on: int64 [S, B], on the CPU.

    Followed by those of an independent order, if the batch stage has a ``second_stream``.
    """
    n, second = plan.train_size, getattr(plan.recipe.batch, "second_stream", False)
    while True:
        epoch, position = divmod(t, plan.steps_per_epoch)
        streams = []
        for purpose in ("order", "second order") if second else ("order",):
            orders = [torch.arange(n)] * len(plan.seeds)
            if plan.batch_size is not None:
                orders = [epoch_order(seed, epoch, n, purpose) for seed in plan.seeds]
            streams.append(torch.stack(orders).split(plan.batch_size or n, 1)[position:])
        yield from zip(*streams)
        t += len(streams[0])


def _batches(plan: _Plan, seed_of_run: Tensor, t: int) -> Iterator[tuple[Tensor, ...]]:
    """The batches of all runs from step t on: [R, B, ...] and [R, B]; a shared full batch as is."""
    x, y, per_run = plan.tensors["train"]
    if plan.batch_size is None:
        x, y = (x[seed_of_run], y[seed_of_run]) if per_run else (x, y)
        take = lambda rows: ...
    else:
        offset = (seed_of_run * plan.train_size)[:, None] if per_run else 0
        x, y = (x.flatten(0, 1), y.flatten(0, 1)) if per_run else (x, y)
        take = lambda rows: rows.to(plan.device, non_blocking=True)[seed_of_run] + offset
    for streams in _rows(plan, t):
        yield tuple(part[rows] for rows in map(take, streams) for part in (x, y))


def _draws(plan: _Plan, runs: Tensor, t: int) -> Iterator[Params]:
    """What the batch stage draws for all runs from step t on: on the CPU, so that nothing waits."""
    if plan.recipe.batch is None:
        yield from itertools.repeat({})
    x, y, per_run = plan.tensors["train"]
    labels = y.cpu() if per_run else y.cpu().expand(len(plan.seeds), -1)
    shape = x.shape[2:] if per_run else x.shape[1:]
    precision = torch.promote_types(plan.dtype, torch.float32)
    # Runs of one seed share their draws, unless they differ in the batch stage itself.
    sources = [
        (run % len(plan.seeds), plan.recipe.with_values(plan.values_of(run)).batch)
        for run in runs.tolist()
    ]
    distinct = list(dict.fromkeys(sources))
    of_run = torch.tensor([distinct.index(source) for source in sources]).to(plan.device)
    for step, streams in enumerate(_rows(plan, t), t):
        y, *other = (labels.gather(1, rows) for rows in streams)
        size = (y.shape[1], *shape)
        draws = [
            transform.draw(y[s], stream(plan.seeds[s], "batch", step), size, *(o[s] for o in other))
            for s, transform in distinct
        ]
        stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        yield {
            name: v.to(
                plan.device, precision if v.is_floating_point() else v.dtype, non_blocking=True
            )[of_run]
            for name, v in stacked.items()
        }


def _better(state: dict[str, Any], score: Tensor) -> Any:
    """The weights with the lowest score so far."""
    now = {"params": state["params"], "buffers": state["buffers"], "score": score}
    old = state.get("best", now)
    better = (score < old["score"]) | old["score"].isnan()
    pick = lambda new, old: torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return torch.utils._pytree.tree_map(pick, now, old)


class _Checkpoint:
    """Finished chunks, in memory and, if there is a path, on disk with the chunk being trained."""

    def __init__(self, path: str | os.PathLike[str] | None, every: int, plan: _Plan) -> None:
        whole("checkpoint_every", every)
        self.path = Path(path) if path is not None else None
        self.every = every
        self.finished: list[dict[str, Any]] = []
        self.current: dict[str, Any] | None = None
        self.fingerprint = plan.fingerprint() if path is not None else ""
        if self.path is not None and self.path.exists():
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            other = content.get("fingerprint", "something else")
            if other != self.fingerprint:
                raise ValueError(
                    f"checkpoint must come from the same experiment, but {self.path} has\n"
                    f"{other}\nand this call\n{self.fingerprint}\n"
                    "Name another file, or delete that one."
                )
            self.finished, self.current = content["finished"], content["current"]

    @property
    def runs(self) -> int:
        """How many runs are finished."""
        return sum(len(chunk["values"]["diverged_at"]) for chunk in self.finished)

    def current_of(self, runs: Tensor) -> dict[str, Any] | None:
        """The state of the chunk being trained, if it has as many runs as this one."""
        same = self.current and len(self.current["state"]["diverged_at"]) == len(runs)
        return self.current if same else None

    def save(self, t: int, state: dict[str, Any], records: list[Params], now: bool = False) -> None:
        if self.path is not None and (now or t and t % self.every == 0):
            self._write({"t": t, "state": _to(state, "cpu"), "records": _to(records, "cpu")})

    def finish(self, chunk: dict[str, Any]) -> None:
        self.finished.append(chunk)
        self.current = None
        self._write()

    def _write(self, current: dict[str, Any] | None = None) -> None:
        if self.path is None:
            return
        content = {"fingerprint": self.fingerprint, "finished": self.finished, "current": current}
        with replacing(self.path) as part:
            torch.save(content, part)


def _first_data(data: Any, seeds: int) -> Data:
    """The first Data, after a check that there is one, or one per seed."""
    if isinstance(data, Data):
        return data
    if not isinstance(data, Sequence) or not all(isinstance(d, Data) for d in data):
        raise TypeError(f"data must be one Data, or a sequence of one per seed, got {type(data)}")
    if len(data) != seeds:
        raise ValueError(
            f"data must be one Data, or one per seed: got {len(data)} for {seeds} seeds"
        )
    return data[0]


def _split(
    data: Any, split: str, seeds: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, bool]:
    """x, y of a split on the device, and whether they have a leading dimension of seeds."""
    if isinstance(data, Data):
        x, y = data.split(split)
        return x.to(device, dtype), y.to(device), False
    _first_data(data, seeds)
    parts = [d.split(split) for d in data]
    shapes = {tuple(x.shape) for x, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"data of all seeds must have one shape, got {sorted(shapes)} for {split}")
    x, y = (torch.stack(tensors) for tensors in zip(*parts))
    return x.to(device, dtype), y.to(device), True


def _description(thing: Any) -> str:
    """A description without memory addresses, the same in every process."""
    if dataclasses.is_dataclass(thing):
        parts = (
            f"{f.name}={_description(getattr(thing, f.name))}" for f in dataclasses.fields(thing)
        )
        return f"{type(thing).__name__}({', '.join(parts)})"
    return getattr(thing, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _to(tree: Any, device: torch.device | str) -> Any:
    return torch.utils._pytree.tree_map(
        lambda v: v.to(device) if isinstance(v, Tensor) else v, tree
    )
