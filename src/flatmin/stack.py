"""The stack: train every combination of a grid and several seeds at once.

A training step is a pipeline, and a :class:`Recipe` says what sits in each of its stages::

    batch ──▶ model ──▶ loss ──▶ gradient ──▶ optimizer

:func:`fit` runs the pipeline for a whole stack of networks side by side (``torch.func.vmap``).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from . import _random, _targets, pipeline
from ._checks import whole
from ._contracts import (
    Network,
    alike,
    check_function,
    check_model,
    constant_attributes,
    criterion_of,
    explained,
    needs_gradient,
    no_random_numbers,
    unchanged,
)
from ._functional import (
    called,
    evaluation,
    inspecting,
    named_values,
    not_compiled,
    over_rows,
    plain_kernels,
)
from ._random import stream
from ._targets import checked_losses, example_losses
from ._tree import Params
from .data import Data
from .pipeline import Batch, Recipe, State, Step

__all__ = [
    "Instrument",
    "Network",
    "Networks",
    "Runs",
    "best_step",
    "epoch_order",
    "error",
    "fit",
    "initial_module",
    "stream",
    "unexpectedly_diverged",
]


if TYPE_CHECKING:
    import xarray as xr

Instrument = Callable[[Network, Params, Tensor, Tensor], Any]
WAY_OUT = "fit(..., chunk_size=1) trains one run after another"
Metric = Callable[[Any, Tensor], Tensor]


def error(output: Tensor, y: Tensor) -> Tensor:
    """Whether the largest logit is that of another class: logits [n, ..., K], classes [n, ...]."""
    return _targets.error(
        output, y, "metrics must be given, metrics={} or your own, unless the output has"
    )


def initial_module(model: nn.Module | Callable[[], nn.Module], seed: int) -> nn.Module:
    """The network that seed ``seed`` starts from: ``model()``, or a copy of ``model`` itself."""
    if isinstance(model, nn.Module):
        return _copied(not_compiled(model))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(seed, "weights").initial_seed())
        made = model()
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must be or make a torch.nn.Module, got {type(made).__name__}")
    return not_compiled(made)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:  # of a tensor that is no leaf
        raise ValueError(
            "model must hold no result of a forward pass, which cannot be copied; for weight and "
            "spectral norm see torch.nn.utils.parametrizations"
        ) from error


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
    criterion : callable
        The recipe's, and of every instrument that takes one and is not given another.
    """

    template: nn.Module
    params: Params
    buffers: Params
    coords: dict[str, list[Any]]
    criterion: Callable[[Any, Tensor], Tensor] = example_losses

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.coords.values())

    def measure(
        self,
        instrument: Instrument,
        data: Data | Sequence[Data],
        split: str = "test",
        examples: int | None = None,
    ) -> Any:
        """Apply an instrument to every network at once.

        Parameters
        ----------
        instrument : callable
            ``instrument(network, params, x, y)`` for one network, written with ``torch.func``:
            one of :mod:`flatmin.measure`, its options set by :func:`functools.partial`, or your
            own.  ``network(params, x)`` is the output in evaluation mode.
        data : Data, or a sequence of Data with one per seed
        split : str
            Which part of the data: ``"train"``, ``"validation"``, ``"test"``, …
        examples : int, optional
            How many examples of the split, from the first on; default: all.

        Returns
        -------
        DataArray, or Dataset
            A Dataset if the instrument returns named values (a named tuple or a dictionary).
            Dimensions: the grid's names, ``seed``, and those of what the instrument returns: the
            names in its attribute ``dims``, or ``dim_0, …`` if it has none.
        """
        import xarray as xr  # here, so that importing flatmin is as fast as importing torch

        like = next(iter(self.params.values()))
        part = _Split.of(data, split, self.shape[-1], like.device, like.dtype)
        if not part.size:
            raise ValueError(f"split must have examples, got {split!r} of {data!r}")
        seed_of_run = torch.arange(len(like), device=like.device) % self.shape[-1]
        rows = None
        if examples is not None:
            rows = torch.arange(min(whole("examples", examples), part.size), device=like.device)
        x, y = part.take(seed_of_run, rows)
        instrument = _with_criterion(instrument, self.criterion)
        way_out = "measure one of them, networks.select(...) or on(networks.module(...), ...)"
        found = _measure(
            self.template, instrument, self.params, self.buffers, x, y, part.dim, way_out
        )
        arrays = {}
        for name, (dims, value) in named_values(instrument, found, runs=1).items():
            values = value.cpu().numpy().reshape(*self.shape, *value.shape[1:])
            arrays[name] = xr.DataArray(values, self.coords, (*self.coords, *dims))
        return arrays[""] if "" in arrays else xr.Dataset(arrays)

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
        return dataclasses.replace(
            self, params=take(self.params), buffers=take(self.buffers), coords=chosen
        )

    def module(self, **coords: Any) -> nn.Module:
        """One network as an ordinary module: ``networks.module(flood_level=0.1, seed=3)``."""
        if set(coords) != set(self.coords):
            raise ValueError(
                f"module() needs a value for each of {list(self.coords)}, got {coords}"
            )
        for name, value in coords.items():
            if np.ndim(value):
                raise ValueError(f"module() takes one value of {name}, got {value!r}")
        one = self.select(**coords)
        module = _copied(self.template)
        with torch.no_grad():
            for name, w in [*module.named_parameters(), *module.named_buffers()]:
                w.copy_((one.params | one.buffers)[name][0])
        return module

    def _index_of(self, name: str, value: float) -> int:
        values = self.coords[name]  # seeds and steps are whole numbers, all else has been rounded
        same = partial(np.isclose, rtol=1e-9, atol=0)
        whole_numbers = isinstance(values[0], int)
        hits = [
            i for i, v in enumerate(values) if (v == value if whole_numbers else same(v, value))
        ]
        if not hits:
            raise ValueError(f"{name} must be one of {list(self.coords[name])}, got {value!r}")
        return hits[0]


class Runs:
    """What :func:`fit` returns: labelled results, and networks if they were asked for.

    Whatever a Dataset has can be asked of it: ``runs.test_error.mean("seed")``, ``runs.sizes``,
    ``runs["train_loss"]``, ``runs.sel(lr=0.1)``.

    Attributes
    ----------
    data : xarray.Dataset
        The results, with the dimensions (grid's names, ``seed``, ``step``).
    networks : Networks or None
        The trained networks.
    """

    def __init__(self, data: xr.Dataset, networks: Networks | None = None) -> None:
        self.data, self.networks = data, networks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("data", "networks"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)

    def __getitem__(self, key: Any) -> Any:
        return self.data[key]

    def __contains__(self, name: Any) -> bool:
        return name in self.data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.data)})

    def __repr__(self) -> str:
        count = 0 if self.networks is None else math.prod(self.networks.shape)
        return f"{self.data!r}\nwith {count or 'no'} networks"


def fit(
    model: nn.Module | Callable[[], nn.Module],
    data: Data | Sequence[Data] | tuple[Tensor, Tensor],
    recipe: Recipe = Recipe(),
    *,
    steps: int,
    batch_size: int | None = 100,
    grid: Mapping[str, Sequence[float]] | None = None,
    seeds: int | Sequence[int] = 5,
    evaluate_at: int | Sequence[int] = 20,
    splits: Sequence[str] | None = None,
    instruments: Mapping[str, Instrument] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    networks: Literal["last", "best"] | Sequence[int] | None = None,
    select_by: str = "validation_error",
    chunk_size: int | None = None,
    evaluation_batch_size: int = 1000,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    expect_divergence: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Runs:
    """Train every combination of ``grid`` and ``seeds`` at once, and return labelled results.

    Runs that share a seed start from the same weights and see the same batches, whatever their
    hyperparameters: differences between them are paired.  What the batch stage draws is a function
    of the seed, the step and that stage.  Splits are evaluated without the batch stage.

    Parameters
    ----------
    model : callable or Module
        Makes a network, ``lambda: MLP(40, 100, 100, 10)``, and is called once per seed; or a
        network, from whose weights and buffers every run starts.  What differs between seeds, or
        is changed by a forward pass, must be a parameter or a buffer.  The only random layer
        allowed is :class:`flatmin.layers.Dropout`, whose masks are a function of its buffers.
    data : Data, a sequence of Data, or (x, y)
        One for all runs, or one per seed, of equal shapes: then the data are random, too.  A pair
        of tensors is a training set alone.
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
        training split, see :meth:`Networks.measure`.  Named values become variables
        ``{instrument}_{value}``; dimensions without names, ``{variable}_dim_0``.
    metrics : mapping of str to callable
        ``metric(output, y)``, a tensor whose mean is reported for each split beside the loss.
        Default: ``{"error": error}`` if the targets are classes, else none.
    networks : {None, "last", "best"} or sequence of int
        Keep the networks after the last step, at the evaluated step that was best, or after each of
        these steps; they are in the attribute ``networks`` of the result.
    select_by : str
        The variable that "best" minimizes, e.g. ``"validation_error"`` or ``"validation_loss"``.
    chunk_size : int
        How many runs to train at once, to bound memory.  Results depend on it only by rounding.
        1 does without ``vmap``, for what that cannot run: ``nn.LSTM``, a branch that depends on
        data.
    evaluation_batch_size : int
        How many examples to evaluate at once; bounds memory too.
    device, dtype
        Default: the GPU if there is one, and float32.  Half precision rounds the grid's values, too.
    expect_divergence : bool
        Whether losses may become infinite or NaN: if true, there is no warning, and claims about
        the result are allowed.
    progress : callable
        Called after each step with the number of per-example gradients that it took, in place of
        the progress bar.

    Returns
    -------
    Runs
        Variables ``{split}_loss`` (mean, in nats for cross-entropy), one per split and metric
        (``{split}_error``, a fraction), and one per instrument, with dimensions (grid's names, ``seed``, ``step``), all in evaluation mode; and
        ``diverged_at``, the first step whose loss was not finite, or after which an evaluation
        found weights that were not (-1: none).  From that step on, a run's values are NaN.

    Raises
    ------
    ValueError
        For a grid that is empty or names no hyperparameter of the recipe, values out of range,
        sizes or shapes that disagree, and for a model that does what would go wrong in silence; the
        message says what, and what to do.

    Notes
    -----
    A parameter that the loss does not depend on has the gradient 0; weight decay acts on it.

    One call trains on one device.  Under ``torchrun`` the experiments of
    :mod:`flatmin.book.experiments` are sharded over the ranks: each rank calls ``fit`` for its own
    stacks.

    On a GPU, launching the kernels dominates the time of small networks: a step takes about as long
    for a hundred runs as for one (``benchmarks/README.md``).

    Examples
    --------
    >>> from flatmin.book import MLP, two_gaussians
    >>> from flatmin.loss import Flooding
    >>> runs = fit(lambda: MLP(10, 16, 2), two_gaussians(test_size=100), Recipe(loss=Flooding()),
    ...            steps=20, batch_size=None, grid={"flood_level": [0.0, 0.1]}, seeds=3)
    >>> dict(runs.test_error.sizes)
    {'flood_level': 2, 'seed': 3, 'step': 21}
    """
    plan = _Plan(**locals())  # its fields are the arguments
    started = time.perf_counter()
    off = {"disable": True} if progress else {}  # else TQDM_DISABLE decides
    total = plan.steps * plan.runs
    with tqdm(total=total, unit="step", leave=False, dynamic_ncols=True, **off) as bar:

        def advance(steps: int) -> None:  # of single runs
            bar.update(steps)
            if progress is not None:
                progress(steps * (plan.batch_size or plan.train_size))

        with plain_kernels(plan.template), explained():
            parts = torch.arange(plan.runs).split(plan.chunk_size or plan.runs)
            chunks = [_Chunk(plan, runs).train(advance) for runs in parts]
    joined = {
        part: {name: torch.cat([chunk[part][name] for chunk in chunks]) for name in chunks[0][part]}
        for part in chunks[0]
    }
    dataset = plan.label(joined.pop("values"))
    dataset.attrs |= plan.describe() | {"seconds": time.perf_counter() - started}
    if expect_divergence:
        dataset.attrs["divergence"] = "expected"
    if names := unexpectedly_diverged(dataset):
        warnings.warn(
            f"the loss of {len(names)} runs is not finite: {'; '.join(names)}. Their "
            "results are NaN from there.",
            stacklevel=2,
        )
    return Runs(dataset, plan.stack(joined) if joined else None)


def best_step(runs: Runs | xr.Dataset, by: str = "validation_error") -> xr.Dataset:
    """What each run would have reported had it stopped early, without training again.

    Parameters
    ----------
    runs : Runs or Dataset
        From :func:`fit`.
    by : str
        The variable to minimize; the first minimum counts.

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
    """
    names = sorted(str(name) for name, v in runs.data_vars.items() if "step" in v.dims)
    if by not in names:
        raise ValueError(f"by must be one of {names}, got {by!r}")
    score = runs[by].fillna(np.inf)
    return runs.isel(step=score.argmin("step"))


def unexpectedly_diverged(runs: Runs | xr.Dataset) -> list[str]:
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


# --------------------------------------------------------------------------- the data on the device


class _Split(NamedTuple):
    """A part of the data on the device: one for all runs, or one per seed, [S, n, ...]."""

    x: Tensor
    y: Tensor
    per_seed: bool

    @classmethod
    def of(
        cls, data: Any, name: str, seeds: int, device: torch.device, dtype: torch.dtype
    ) -> _Split:
        parts = [d.split(name) for d in _for_seeds(data, seeds)]
        kinds = {(tuple(x.shape), x.dtype, tuple(y.shape), y.dtype) for x, y in parts}
        if len(kinds) > 1:
            raise ValueError(
                f"data of all seeds must have one shape and type, got {sorted(map(str, kinds))} "
                f"for {name}"
            )
        per_seed = not isinstance(data, Data)
        x, y = (torch.stack(t) if per_seed else t[0] for t in zip(*parts, strict=True))
        # numbers in the precision of the weights, classes and tokens as they are
        cast = lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype)
        return cls(cast(x).clone(), cast(y).clone(), per_seed)  # whatever is done with them

    @property
    def size(self) -> int:
        return self.x.shape[1] if self.per_seed else self.x.shape[0]

    @property
    def dim(self) -> int | None:
        """Which dimension of what :meth:`take` returns counts runs, for ``vmap``."""
        return 0 if self.per_seed else None

    def take(self, seed_of_run: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What runs of these seeds see: everything, or the examples ``rows``, [B] or [R, B]."""
        if rows is None:
            return (self.x[seed_of_run], self.y[seed_of_run]) if self.per_seed else (self.x, self.y)
        at = (seed_of_run[:, None], rows) if self.per_seed else (rows,)
        return self.x[at], self.y[at]


def _for_seeds(data: Any, seeds: int) -> Sequence[Data]:
    """One Data, or one per seed."""
    if isinstance(data, Data):
        return [data]
    if not isinstance(data, Sequence) or not all(isinstance(d, Data) for d in data):
        raise TypeError(
            f"data must be one Data, a sequence of one per seed, or tensors (x, y), got {type(data)}"
        )
    if len(data) != seeds:
        raise ValueError(
            f"data must be one Data, or one per seed: got {len(data)} for {seeds} seeds"
        )
    return data


# ------------------------------------------------------------------------------------ the arguments


@dataclass
class _Plan:
    """The arguments of ``fit``, checked and completed."""

    model: Any
    data: Any
    recipe: Recipe
    steps: int
    batch_size: int | None
    grid: Any
    seeds: Any
    evaluate_at: Any
    splits: Any
    instruments: Any
    metrics: Any
    networks: Any
    select_by: str
    chunk_size: int | None
    evaluation_batch_size: int
    device: Any
    dtype: torch.dtype
    expect_divergence: bool
    progress: Any

    def __post_init__(self) -> None:
        self.dims: dict[str, tuple[str, ...]] = {}  # of what the instruments return
        self.sizes: dict[str, int] = {}
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {self.recipe!r}")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {self.dtype!r}")
        for name in ("instruments", "metrics"):
            parts = getattr(self, name) or {}
            if not isinstance(parts, Mapping) or not all(map(callable, parts.values())):
                raise TypeError(
                    f"{name} must be functions by name, {{name: function}}, got {parts!r}"
                )
        self.device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        for name in ("steps", "evaluation_batch_size", "batch_size", "chunk_size"):
            value = getattr(self, name)
            if value is not None or name in ("steps", "evaluation_batch_size"):
                setattr(self, name, whole(name, value))
        self._check_runs()
        self._check_data()
        if isinstance(self.evaluate_at, Integral):
            count = whole("evaluate_at", self.evaluate_at)
            self.evaluate_at = np.linspace(0, self.steps, count + 1).round()
        self.evaluate_at = self._checked_steps("evaluate_at", "", self.evaluate_at)
        named = self.networks is None or isinstance(self.networks, str)
        self.kept_at = [self.steps] if named and self.networks == "last" else []
        if not named:
            self.networks = np.atleast_1d(self.networks).tolist()
        if self.networks not in (None, "last", "best"):
            steps = [] if named else self.networks
            self.kept_at = self._checked_steps("networks", "None, 'last', 'best' or ", steps)
        self._check_names()
        self._make_networks()

    def _make_networks(self) -> None:
        """The template, and the weights and buffers of each seed, [S, ...]."""
        if isinstance(self.model, nn.Module):
            check_model(self.model)  # before a copy loses its hooks
        modules = [initial_module(self.model, seed) for seed in self.seeds]
        for module in modules:
            check_model(module)
        shapes = [[(name, w.shape) for name, w in _tensors(module)] for module in modules]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("model must have the same parameters and buffers for all seeds")
        self.template = _copied(modules[0]).to(self.device, self.dtype)
        params, buffers = stack_module_state(modules)
        for name in [name for name, w in params.items() if not w.requires_grad]:
            buffers[name] = params.pop(name)  # frozen
        cast = lambda w: w.detach().to(
            self.device, self.dtype if w.is_floating_point() else w.dtype
        )
        self.start = tree_map(cast, (params, buffers))
        self._check_loss()
        with torch.no_grad():
            self._check_networks(modules)

    def _check_loss(self) -> None:
        """Refuse a loss stage whose result is not one number with a gradient."""
        rows = torch.arange(self.batch_size or self.train_size, device=self.device)
        with torch.enable_grad():
            losses = torch.ones(len(rows), device=self.device, requires_grad=True)
            loss = self.recipe.loss(losses, rows)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ValueError(
                "loss must return one number that depends on the losses of the examples, got "
                f"{'no gradient' if isinstance(loss, Tensor) and not loss.ndim else loss!r}"
            )

    def _check_networks(self, modules: list[nn.Module]) -> None:
        """Refuse what would depend on more than weights, buffers and examples."""
        in_pieces = self.evaluation_batch_size < max(self.parts[s].size for s in self.splits)
        train, criterion = self.parts["train"], self.recipe.criterion
        two = torch.arange(min(2, train.size), device=self.device)[None]
        for i, module in enumerate(modules):
            params, buffers = tree_map(lambda w: w[i], self.start)
            x, y = (v[0] for v in train.take(torch.tensor([i], device=self.device), two))
            for training in (False, True):
                own, common = (
                    partial(_pass, model, training, buffers) for model in (module, self.template)
                )
                if i == 0:
                    check_function(common, params, x, y, criterion, in_pieces and not training)
                elif not alike(own(params, x), common(params, x)):
                    raise ValueError(
                        "model must keep what differs between seeds in parameters and buffers, "
                        f"self.register_buffer(...), got networks of seeds {self.seeds[0]} and "
                        f"{self.seeds[i]} that differ in something else"
                    )

    def _check_runs(self) -> None:
        """Seeds and grid: which runs there are, in row-major order."""
        if isinstance(self.seeds, Integral):
            self.seeds = _random.seeds(whole("seeds", self.seeds))
        integral = all(isinstance(seed, Integral) for seed in self.seeds)
        if not integral or not len(self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds must be whole numbers, at least one, and all different, got {self.seeds}"
            )
        self.seeds = [int(seed) for seed in self.seeds]
        self.grid = dict(self.grid or {})
        for name, values in self.grid.items():
            try:
                self.grid[name] = values = [float(v) for v in values]
            except (TypeError, ValueError):
                raise ValueError(f"grid[{name!r}] must be numbers, got {values!r}") from None
            if not values:
                raise ValueError(f"grid[{name!r}] must have at least one value, got none")
            for value in values:
                self.recipe.with_values({name: value})  # raises for a bad name or value
        if taken := {"seed", "step", "epoch"} & {*self.grid}:
            raise ValueError(
                f"grid names must not be those of a dimension of the result, got {sorted(taken)}: "
                "take the whole path"
            )
        self.paths = {name: self.recipe.path(name) for name in self.grid}
        if len(set(self.paths.values())) < len(self.paths):
            raise ValueError(f"grid names must be of different hyperparameters, got {self.paths}")
        self.coords = self.grid | {"seed": self.seeds}
        self.points = [
            dict(zip(self.grid, p, strict=True)) for p in itertools.product(*self.grid.values())
        ]
        self.runs = len(self.points) * len(self.seeds)

    def _check_data(self) -> None:
        if isinstance(self.data, tuple) and [*map(type, self.data)] == [Tensor, Tensor]:
            self.data = Data.of(*self.data)
        first = _for_seeds(self.data, len(self.seeds))[0]
        if self.splits is None:
            known = ("train", "validation", "test")
            every = _for_seeds(self.data, len(self.seeds))
            self.splits = [s for s in known if any(len(d.split(s)[0]) for d in every)]
        if self.metrics is None:
            self.metrics = {} if first.num_classes is None else {"error": error}
        self.parts = {
            split: _Split.of(self.data, split, len(self.seeds), self.device, self.dtype)
            for split in {"train", *self.splits}
        }
        for split in self.splits:
            if not self.parts[split].size:
                raise ValueError(f"splits must have examples, got {split!r} of {first!r}")
        n = len(first.x_train)
        if self.batch_size is not None:  # as in a DataLoader, a batch has at most all examples
            self.batch_size = min(self.batch_size, n)
        self.train_size, self.num_classes = n, first.num_classes

    def _checked_steps(self, name: str, others: str, steps: Any) -> list[int]:
        inside = [0 <= t <= self.steps and t == int(t) for t in steps]
        if not inside or not all(inside):
            got = getattr(self, name)
            raise ValueError(
                f"{name} must be {others}steps between 0 and {self.steps}, got {got!r}"
            )
        return sorted({int(t) for t in steps})

    def _check_names(self) -> None:
        if "loss" in self.metrics:
            raise ValueError("metrics must have names of their own, got 'loss', the criterion's")
        self.instruments = {
            name: _with_criterion(instrument, self.recipe.criterion)
            for name, instrument in (self.instruments or {}).items()
        }
        names = [f"{s}_{m}" for s in self.splits for m in ("loss", *self.metrics)]
        if taken := {*names, *self.coords, "diverged_at", "step", "epoch"} & {*self.instruments}:
            raise ValueError(f"instruments must have names of their own, got {sorted(taken)}")
        names += self.instruments
        chosen = isinstance(self.networks, str) and self.networks == "best"
        stem = [name for name in self.instruments if self.select_by.startswith(f"{name}_")]
        if chosen and self.select_by not in names and not stem:
            raise ValueError(f"select_by must be one of {names}, got {self.select_by!r}")

    def check_dims(self, variable: str, dims: Sequence[str], shape: torch.Size) -> None:
        for name, size in zip(dims, shape, strict=True):
            taken = name in (*self.coords, "step", "epoch") or dims.count(name) > 1
            if taken or self.sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"instruments must have names of their own for dimensions of {variable!r}, "
                    f"got {name!r} of size {size}"
                )

    def bound(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with the hyperparameters of a run."""
        recipe = self.recipe
        for name, value in values.items():
            recipe = pipeline.bind(recipe, self.paths[name], value)
        return recipe

    def stack(self, joined: dict[str, Params]) -> Networks:
        """The networks of all runs; those of several steps lie along a dimension ``step``."""
        coords = self.coords
        if not isinstance(self.networks, str):
            n = len(self.seeds)
            coords = self.grid | {"step": self.kept_at, "seed": self.seeds}
            # [grid × seed, step, ...] → [grid × step × seed, ...]
            order = lambda w: w.unflatten(0, (-1, n)).movedim(2, 1).flatten(0, 2)
            joined = {part: {k: order(w) for k, w in ws.items()} for part, ws in joined.items()}
        stacks = _to(joined, self.device)
        return Networks(
            self.template.eval(), **stacks, coords=coords, criterion=self.recipe.criterion
        )

    def label(self, values: Params) -> xr.Dataset:
        """The values [R, steps, ...], and ``diverged_at`` [R], by the names of their dimensions."""
        import xarray as xr

        per_epoch = math.ceil(self.train_size / (self.batch_size or self.train_size))
        epochs = [t / per_epoch for t in self.evaluate_at]
        coords = self.coords | {"step": self.evaluate_at, "epoch": ("step", epochs)}
        shape = tuple(len(v) for v in self.coords.values())
        arrays = {}
        for name, v in values.items():
            names = (*self.coords, "step", *self.dims.get(name, ()))[: len(shape) + v.ndim - 1]
            arrays[name] = (names, v.numpy().reshape(*shape, *v.shape[1:]))
        return xr.Dataset(arrays, coords)

    def describe(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "data": _for_seeds(self.data, len(self.seeds))[0].name,
            "recipe": _description(self.recipe),
            "steps": self.steps,
            "batch_size": self.batch_size or self.train_size,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else str(self.device),
            "dtype": str(self.dtype),
            "torch": torch.__version__,
        }


# ----------------------------------------------------------------------------------------- the loop


class _Chunk:
    """Some of the runs, trained side by side."""

    def __init__(self, plan: _Plan, runs: Tensor) -> None:
        self.plan, self.model = plan, plan.template
        self.seed_of_run = (runs % len(plan.seeds)).to(plan.device)
        self.points = [plan.points[run // len(plan.seeds)] for run in runs.tolist()]
        self.hyper = {
            name: torch.tensor([p[name] for p in self.points], dtype=plan.dtype, device=plan.device)
            for name in plan.grid
        }
        self.diverged_at = torch.full((len(runs),), -1, device=plan.device)
        self.state = self._initial_state()

    def _initial_state(self) -> State:
        plan = self.plan
        params, buffers = tree_map(lambda w: w[self.seed_of_run], plan.start)
        start = lambda params, buffers, hyper: State.init(plan.bound(hyper), params, buffers)
        return vmap(start)(params, buffers, self.hyper)

    def train(self, advance: Callable[[int], None]) -> dict[str, Params]:
        """The values at all evaluated steps, and the networks that are kept."""
        plan, records, kept, best = self.plan, [], [], None
        batches, draws = self._batches(), self._draws()
        for t in range(plan.steps + 1):
            if t in plan.evaluate_at:
                records.append(self._evaluate(t))
                if plan.networks == "best":
                    score = records[-1].get(plan.select_by)
                    if score is None or score.ndim != 1:
                        raise ValueError(
                            f"select_by must be a variable with one number per run and step, "
                            f"got {plan.select_by!r} among {[*records[-1]]}"
                        )
                    now = self._evaluated() | {"score": score}
                    best = now if best is None else _better(now, best)
            if t in plan.kept_at:
                kept.append(_to(self._evaluated(), "cpu"))
            if t < plan.steps:
                self._step(next(batches), next(draws), Step(t, of=plan.steps))
                advance(len(self.points))
        values = {name: torch.stack([r[name] for r in records], 1).cpu() for name in records[0]}
        result = {"values": values | {"diverged_at": self.diverged_at.cpu()}}
        if best is not None:
            return result | _to({part: best[part] for part in ("params", "buffers")}, "cpu")
        if kept and plan.networks != "last":
            return result | tree_map(lambda *weights: torch.stack(weights, 1), *kept)
        return result | (kept[0] if kept else {})

    def _step(self, batch: tuple[Tensor, ...], draw: Params, t: Step) -> None:
        """One step of the pipeline, for all runs at once."""
        plan = self.plan

        def one_run(
            state: State, hyper: Params, draw: Params, batch: tuple[Tensor, ...]
        ) -> tuple[State, Tensor]:
            x, y, rows, *other = batch
            second = Batch(other[0], other[1]) if other else None
            shown = Batch(x, y, rows, plan.num_classes, second)
            return pipeline.step(self.model, plan.bound(hyper), state, shown, draw, t)

        self.model.train()
        of_batch = 0 if plan.batch_size else plan.parts["train"].dim
        of_all = over_rows(one_run, (0, 0, 0, of_batch), WAY_OUT)
        x, y, *_ = batch
        weights = self.state.params.values()
        with (
            unchanged("model or batch stage", "input", x),
            unchanged("criterion or batch stage", "targets", y),
            unchanged("gradient or optimizer", "weights", *weights),
            no_random_numbers(),
            constant_attributes(self.model),
        ):
            self.state, loss = of_all(self.state, self.hyper, draw, batch)
        self._mark(~loss.isfinite(), t + 1)

    def _mark(self, broken: Tensor, t: int) -> None:
        self.diverged_at = torch.where(broken & (self.diverged_at < 0), t, self.diverged_at)

    @torch.no_grad()
    def _evaluate(self, t: int) -> Params:
        """Losses, metrics and instruments."""
        # The last step may have broken the weights before any loss shows it.
        finite = [w.reshape(len(w), -1).isfinite().all(1) for w in self.state.params.values()]
        self._mark(~torch.stack(finite).all(0), t)
        weights = self._evaluated()
        values: Params = {}
        for split in self.plan.splits:
            values |= self._means(split, **weights)
        train = self.plan.parts["train"]
        for name, instrument in self.plan.instruments.items():
            x, y = train.take(self.seed_of_run)
            found = _measure(
                self.model, instrument, **weights, x=x, y=y, dim=train.dim, way_out=WAY_OUT
            )
            for field, (dims, value) in named_values(instrument, found, runs=1).items():
                variable = f"{name}_{field}" if field else name
                dims = tuple(f"{variable}_{d}" if d.startswith("dim_") else d for d in dims)
                if variable in values:
                    raise ValueError(
                        f"instruments must return values with names of their own, got {variable!r}"
                    )
                self.plan.check_dims(variable, dims, value.shape[1:])
                values[variable], self.plan.dims[variable] = value.double(), dims
        healthy = self.diverged_at < 0
        where = lambda v: torch.where(healthy.view(-1, *[1] * (v.ndim - 1)), v, torch.nan)
        return {name: where(v) for name, v in values.items()}

    def _means(self, split: str, params: Params, buffers: Params) -> Params:
        """The means of the criterion and the metrics over a split."""
        metrics = {"loss": self.plan.recipe.criterion, **self.plan.metrics}
        size: list[float] = []

        def one_run(params: Params, buffers: Params, x: Tensor, y: Tensor) -> list[Tensor]:
            output, _ = called(self.model, params, buffers, x)
            copied = partial(tree_map, lambda v: v.clone() if isinstance(v, Tensor) else v)
            values = [metric(copied(output), copied(y)) for metric in metrics.values()]
            checked_losses(values[0], x, y)
            for name, v in zip(metrics, values, strict=True):
                if not isinstance(v, Tensor) or v.shape[:1] != x.shape[:1]:
                    got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
                    raise ValueError(
                        f"metrics[{name!r}] must return one number or more per example, "
                        f"[{len(x)}, ...], got {got}"
                    )
            size[:] = [v.numel() / len(x) for v in values]  # numbers per example, such as tokens
            return [_at_least_single(v).sum() for v in values]

        part = self.plan.parts[split]
        of_all = over_rows(one_run, (0, 0, part.dim, part.dim), WAY_OUT)
        sums = [torch.zeros((), dtype=torch.float64, device=part.x.device)] * len(metrics)
        for rows in torch.arange(part.size, device=part.x.device).split(
            self.plan.evaluation_batch_size
        ):
            x, y = part.take(self.seed_of_run, rows)
            with evaluation(self.model), no_random_numbers():
                found = of_all(params, buffers, x, y)
            sums = [total + value.double() for total, value in zip(sums, found, strict=True)]
        broken = sums[0].isnan()
        return {
            f"{split}_{name}": torch.where(broken, torch.nan, total / (part.size * per_example))
            for name, total, per_example in zip(metrics, sums, size, strict=True)
        }

    def _evaluated(self) -> dict[str, Params]:
        """What is evaluated and kept: the weights, or those that the optimizer names.

        Batch norm's statistics belong to the weights of training; for others, such as an average,
        they are those of one pass over the training set.
        """
        params, buffers = self.state.params, self.state.buffers
        if hasattr(self.plan.recipe.optimizer, "evaluated"):

            def of_run(run: State, hyper: Params) -> Params:
                optimizer: Any = self.plan.bound(hyper).optimizer
                return optimizer.evaluated(run.params, run.optimizer)

            params = vmap(of_run)(self.state, self.hyper)
            buffers = buffers | self._statistics(params)
        return {"params": params, "buffers": buffers}

    @torch.no_grad()
    def _statistics(self, params: Params) -> Params:
        """Batch norm's running statistics, taken anew from the training set."""
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
        momenta = [m.momentum for m in norms]
        running = ("running_mean", "running_var")
        names = [name for name in self.state.buffers if name.endswith(running)]
        if not norms or not names:
            return {}

        def after_pass(params: Params, buffers: Params, x: Tensor) -> Params:
            _, after = called(self.model, params, buffers, x)
            return {name: after[name] for name in names}

        train = self.plan.parts["train"]
        x, _ = train.take(self.seed_of_run)
        try:
            self.model.train()
            for m in norms:
                m.momentum = 1.0  # the statistics of this pass alone
            of_all = over_rows(after_pass, (0, 0, train.dim), WAY_OUT)
            return of_all(params, self.state.buffers, x)
        finally:
            self.model.eval()
            for m, momentum in zip(norms, momenta, strict=True):
                m.momentum = momentum

    def _rows(self) -> Iterator[tuple[Tensor, ...]]:
        """Which examples each seed visits, step by step: int64 [S, B], on the CPU.

        Followed by those of an independent order, if the batch stage has a ``second_stream``.
        """
        plan, n = self.plan, self.plan.train_size
        second = getattr(plan.recipe.batch, "second_stream", False)
        for epoch in itertools.count():
            streams = []
            for purpose in ("order", "second order") if second else ("order",):
                orders = [torch.arange(n)] * len(plan.seeds)
                if plan.batch_size is not None:
                    orders = [epoch_order(seed, epoch, n, purpose) for seed in plan.seeds]
                streams.append(torch.stack(orders).split(plan.batch_size or n, 1))
            yield from zip(*streams)

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of all runs: [R, B, ...], [R, B], rows [R, B]; a shared full batch as is."""
        plan, train = self.plan, self.plan.parts["train"]
        everything = torch.arange(plan.train_size, device=plan.device)
        everything = everything.expand(len(self.points), -1) if train.per_seed else everything
        full_batch = (*train.take(self.seed_of_run), everything) if not plan.batch_size else ()
        for streams in self._rows():
            if full_batch:
                yield full_batch * len(streams)
                continue
            of_runs = [r.to(plan.device, non_blocking=True)[self.seed_of_run] for r in streams]
            yield tuple(t for rows in of_runs for t in (*train.take(self.seed_of_run, rows), rows))

    def _draws(self) -> Iterator[Params]:
        """What the batch stage draws for all runs, on the CPU, so that nothing waits."""
        plan = self.plan
        if plan.recipe.batch is None:
            yield from itertools.repeat({})
        seeds, train = torch.arange(len(plan.seeds))[:, None], plan.parts["train"]
        labels = (
            train.y.cpu() if train.per_seed else train.y.cpu().expand(len(seeds), *train.y.shape)
        )
        shape = train.x.shape[1 + train.per_seed :]
        precision = torch.promote_types(plan.dtype, torch.float32)
        cast = lambda v: v.to(
            plan.device, precision if v.is_floating_point() else v.dtype, non_blocking=True
        )
        # Runs of one seed share their draws, unless they differ in the batch stage itself.
        stages = [plan.bound(point).batch for point in self.points]
        sources: list[tuple[int, Any]] = [*zip(self.seed_of_run.tolist(), stages, strict=True)]
        distinct = list(dict.fromkeys(sources))
        of_run = torch.tensor([distinct.index(source) for source in sources]).to(plan.device)
        for step, rows in enumerate(self._rows()):
            y, *other = (labels[seeds, some] for some in rows)
            x = torch.empty(y.shape[1], *shape, device="meta")  # only the shape is known here
            seen = [
                Batch(x, y[s], rows[0][s], plan.num_classes, *(Batch(x, o[s]) for o in other))
                for s in range(len(plan.seeds))
            ]
            with no_random_numbers():
                draws = [
                    transform.draw(seen[s], stream(plan.seeds[s], "batch", step))
                    for s, transform in distinct
                ]
            yield {
                name: cast(torch.stack([draw[name] for draw in draws]))[of_run] for name in draws[0]
            }


def _measure(
    template: nn.Module,
    instrument: Instrument,
    params: Params,
    buffers: Params,
    x: Tensor,
    y: Tensor,
    dim: int | None,
    way_out: str,
) -> Any:
    """What the instrument returns for each network; ``dim`` of x and y counts networks."""

    def one_run(params: Params, buffers: Params, x: Tensor, y: Tensor) -> Any:
        found = instrument(_network(template, buffers), params, x, y)
        if wrong := [leaf for leaf in tree_leaves(found) if not isinstance(leaf, Tensor)]:
            raise TypeError(
                f"instrument must return a tensor or named tensors, got a {type(wrong[0]).__name__}"
            )
        return found

    # half precision is too short for differences of losses
    copied = lambda v: _at_least_single(v).clone()  # an instrument may change them
    params, buffers, x, y = tree_map(copied, (params, buffers, x, y))
    criterion = criterion_of(instrument)
    example = (x, y) if dim is None else (x[0], y[0])
    with inspecting(template), explained(), no_random_numbers():
        network = _network(template, _first(buffers))
        gradient = needs_gradient(instrument)
        check_function(network, _first(params), *example, criterion, gradient=gradient)
        return over_rows(one_run, (0, 0, dim, dim), way_out)(params, buffers, x, y)


def _pass(model: nn.Module, training: bool, buffers: Params, params: Params, x: Tensor) -> Any:
    """The output in training or evaluation mode."""
    with evaluation(model):
        model.train(training)
        return called(model, params, buffers, x)[0]


def _network(template: nn.Module, buffers: Params) -> Network:
    return partial(_pass, template, False, buffers)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from itertools.chain(module.named_parameters(), module.named_buffers())


def _first(stacked: Params) -> Params:
    return {name: w[0] for name, w in stacked.items()}


def _with_criterion(instrument: Any, criterion: Callable[[Any, Tensor], Tensor]) -> Instrument:
    """The instrument with this criterion, unless it takes none or was given another."""
    parameter = inspect.signature(instrument).parameters.get("criterion")
    if parameter is None or parameter.default is not example_losses:
        return instrument
    return partial(instrument, criterion=criterion)


def _better(now: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The weights with the lower score."""
    better = (now["score"] < old["score"]) | old["score"].isnan()
    pick = lambda new, old: torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return tree_map(pick, now, old)


def _description(thing: Any) -> str:
    """A description without memory addresses, the same in every process."""
    if dataclasses.is_dataclass(thing):
        parts = (
            f"{f.name}={_description(getattr(thing, f.name))}" for f in dataclasses.fields(thing)
        )
        return f"{type(thing).__name__}({', '.join(parts)})"
    return getattr(thing, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _at_least_single(v: Tensor) -> Tensor:
    return v.float() if v.dtype in (torch.float16, torch.bfloat16) else v


def _to(tree: Any, device: torch.device | str) -> Any:
    return tree_map(lambda v: v.to(device), tree)
