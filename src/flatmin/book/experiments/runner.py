"""The runner: an experiment is a list of units, and a finished unit is never computed again.

An experiment is a module of this package, named in ``NAMES``, that has

``SOURCE``
    What it repeats: paper and section.
``SETTINGS``
    ``{size: settings}``; settings are a dictionary that JSON can store.  The sizes ``"tiny"``
    (seconds on a CPU, for tests), ``"reduced"`` (ten minutes on one large GPU) and ``"paper"`` must
    be there; ``DEFAULT`` names the size that is run by default (without it, ``"reduced"``).
    ``settings["seeds"]`` is a number; the functions below get the list of seeds instead, see
    :func:`flatmin.book.seeds`.
``units(settings)``
    The independent units: a list of different dictionaries, all with the same keys, such as
    ``{"method": "SAM", "seed": 0}``.
``run_unit(unit, settings, work)``
    The result of one unit: a Dataset *without* the unit's keys, which become the first dimensions
    of the record.  Its ``attrs`` must have ``data`` and may have more.  ``work`` is a :class:`Work`.
``cost(settings)``
    How many single-example gradients all units take together: the measure of time.
``plot(record)``
    The figure, from the record alone; its docstring is the caption.  If no single figure suits all
    records, ``drawing(record)`` returns the function that plots this one and has its caption.

:func:`run` computes the units one by one and writes each result, as a whole, to a file of its own.
So it can be killed at any moment: the same command goes on with the units that have no file, and the
one that was interrupted starts anew.  Under ``torchrun`` rank r of n takes the units r, r+n, r+2n, …,
on the GPU of its ``LOCAL_RANK``.  The ranks communicate only by the folder of these files (on several
machines a shared folder); whichever finds all of them there writes the record.  If several ranks
share a GPU, the time of a unit is divided by their number.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from ..._checks import whole
from ..._random import seeds as seed_list
from .records import default_size, environment, experiment, read, record, save, write


class Work:
    """What a unit is computed with: a device, and a count of the gradients that it takes.

    Attributes
    ----------
    device : torch.device
        Where to compute.
    gradients : float
        How many single-example gradients have been computed.
    """

    def __init__(self, device: torch.device, bar: tqdm):
        self.device, self.gradients, self._bar = device, 0.0, bar

    def progress(self, gradients: float) -> None:
        """Count single-example gradients."""
        self.gradients += gradients
        self._bar.update(gradients)

    def chunks(self, function: Callable, size: int):
        """Call ``function(size)``, with half the size whenever the device runs out of memory."""
        before = self.gradients
        while True:
            try:
                return function(size)
            except torch.OutOfMemoryError:
                if size <= 1:
                    raise
            size //= 2  # here, as inside ``except`` the exception keeps the tensors alive
            warnings.warn(f"out of memory: retrying with {size} at a time", stacklevel=2)
            self.progress(before - self.gradients)
            gc.collect()
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Plan:
    """An experiment at one size and its units; made by :func:`plan`."""

    name: str
    size: str
    changed: dict
    settings: dict
    units: list[dict]

    @property
    def title(self) -> str:
        """The size, and the settings changed in it."""
        return ", ".join([self.size, *(f"{k}={json.dumps(v)}" for k, v in self.changed.items())])

    @property
    def module(self) -> ModuleType:
        return experiment(self.name)

    @property
    def cost(self) -> float:
        return float(self.module.cost(self.settings))

    def file(self, unit: dict) -> str:
        """The file name of a unit's result: its values, and a hash of all that it depends on."""
        settings = {k: v for k, v in self.settings.items() if k != "seeds" or "seed" not in unit}
        key = json.dumps([self.name, version("flatmin"), unit, settings], sort_keys=True)
        label = re.sub(r"[^\w.=-]+", "_", "-".join(str(v) for v in unit.values()))[:80]
        return f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.nc.xz"

    def missing(self, folder: Path) -> list[dict]:
        """The units without a result."""
        return [unit for unit in self.units if not (folder / self.file(unit)).exists()]

    def seconds(self) -> tuple[float, xr.Dataset] | None:
        """The time it takes at the rate of a record, and that record, of this size or another.

        It assumes the same time per gradient.  Records with changed settings are not used.
        """
        for size in dict.fromkeys([self.size, "reduced", *self.module.SETTINGS]):
            with contextlib.suppress(FileNotFoundError):
                reference = record(self.name, size)
                if reference.attrs["size"] == size:
                    rate = float(reference.attrs["seconds"] / reference.attrs["cost"])
                    return self.cost * rate, reference
        return None


def plan(
    name: str, size: str | None = None, *, seeds: int | None = None, settings: Mapping | None = None
) -> Plan:
    """The settings of an experiment, checked and completed, and its units.

    Examples
    --------
    >>> todo = plan("flooding_synthetic", "tiny", settings={"steps": 3})
    >>> todo.title, len(todo.settings["seeds"]), todo.units[0]
    ('tiny, steps=3', 2, {'set': 'two_gaussians', 'optimizer': 'SGD'})
    """
    module, size = experiment(name), size or default_size(name)
    if size not in module.SETTINGS:
        raise ValueError(f"size must be one of {sorted(module.SETTINGS)}, got {size!r}")
    usual, changed = module.SETTINGS[size], dict(settings or {})
    if seeds is not None:
        changed["seeds"] = seeds
    for key, value in changed.items():
        if key not in usual:
            raise ValueError(f"settings must be among {sorted(usual)}, got {key!r}")
        if _kind(value) != _kind(usual[key]):
            raise ValueError(
                f"{key} must be a {_kind(usual[key])} like {json.dumps(usual[key])}, got {value!r}"
            )
    changed = {key: value for key, value in changed.items() if value != usual[key]}
    settings = json.loads(json.dumps(usual | changed))
    settings["seeds"] = seed_list(whole("seeds", settings["seeds"]))
    units = module.units(settings)
    if not units or len({json.dumps(unit) for unit in units}) < len(units):
        raise ValueError(f"settings must give different units, at least one, got {units}")
    return Plan(name, size, changed, settings, units)


def _kind(value) -> str:
    """The type of a value, as JSON names it."""
    kinds = {bool: "truth value", (int, float): "number", str: "string", (list, tuple): "list"}
    return next((kind for types, kind in kinds.items() if isinstance(value, types)), "dictionary")


def run(
    name: str,
    size: str | None = None,
    *,
    out: str | os.PathLike = "results",
    device: str | None = None,
    seeds: int | None = None,
    settings: Mapping | None = None,
) -> xr.Dataset | None:
    """Run an experiment, or its missing units, and write its record.

    Parameters
    ----------
    name : str
        One of ``NAMES``.
    size : str, optional
        One of the experiment's sizes: ``"tiny"``, ``"reduced"``, ``"paper"``.  Default: see
        :func:`default_size`.
    out : path
        The folder of the record, and of ``NAME.parts`` with the results of finished units.
    device : str, optional
        Default: the GPU if there is one, under ``torchrun`` that of the process's rank.
    seeds : int, optional
        How many seeds.
    settings : mapping, optional
        Values that replace those of the size.

    Returns
    -------
    Dataset or None
        The record, as :func:`flatmin.book.experiments.record` reads it; None if units of other
        ranks are missing.
    """
    todo = plan(name, size, seeds=seeds, settings=settings)
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    ranks, neighbours = (int(os.environ.get(key, 1)) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    folder, chosen_device = Path(out) / f"{name}.parts", _device(device, local_rank)
    mine, share = todo.units[rank::ranks], todo.cost / len(todo.units)
    bar = tqdm(
        desc=name,
        total=share * len(mine),
        unit="gradients",
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=True if rank else None,
    )
    with bar:
        for unit in mine:
            path = folder / todo.file(unit)
            if path.exists():
                bar.update(share)
            else:
                write(path, _run_unit(todo, unit, chosen_device, neighbours, bar))
    if todo.missing(folder):
        return None
    return read(save(name, _assemble(todo, folder), out, todo.size))


def _run_unit(
    todo: Plan, unit: dict, device: torch.device, neighbours: int, bar: tqdm
) -> xr.Dataset:
    """Compute one unit, of whose time on a shared device only its share counts."""
    computed_on, sharing = environment(device), _sharing(device, neighbours)
    if sharing > 1:
        computed_on["device"] += f", shared by {sharing} processes"
    started = time.monotonic()
    settings = json.loads(json.dumps(todo.settings))  # a copy, which the unit may change
    result = todo.module.run_unit(dict(unit), settings, Work(device, bar))
    if {*unit} & {*result.variables}:
        raise ValueError(f"run_unit must return a Dataset without {[*unit]}, got {result}")
    scalar = lambda value: isinstance(value, (str, int, float, np.number))
    result.attrs = {k: v if scalar(v) else json.dumps(v) for k, v in result.attrs.items()}
    result.attrs |= computed_on | {"seconds": (time.monotonic() - started) / sharing}
    return result


def _assemble(todo: Plan, folder: Path) -> xr.Dataset:
    """The record: the results of all ranks, in the order of the units."""
    parts = [read(folder / todo.file(unit)) for unit in todo.units]
    dims = {dim: list(dict.fromkeys(unit[dim] for unit in todo.units)) for dim in todo.units[0]}

    def join(rows: list, names: list[str]) -> xr.Dataset:
        if not names:
            return rows[0][1]
        dim, *rest = names
        groups = {v: [row for row in rows if row[0][dim] == v] for v in dims[dim]}
        present = [value for value, group in groups.items() if group]
        return xr.concat(
            [join(groups[value], rest) for value in present],
            dim,
            data_vars="all",
            join="outer",
            coords="different",
            compat="equals",
            combine_attrs="drop",
        ).assign_coords({dim: present})

    joined = join(list(zip(todo.units, parts)), list(dims)).sel(dims)
    for key in parts[0].attrs:
        several = {str(part.attrs[key]): part.attrs[key] for part in parts}
        joined.attrs[key] = "; ".join(several) if len(several) > 1 else parts[0].attrs[key]
    joined.attrs |= {
        "experiment": todo.name,
        "size": todo.title,
        "seeds": json.dumps(todo.settings["seeds"]),
        "settings": json.dumps(todo.settings),
        "seconds": float(sum(part.attrs["seconds"] for part in parts)),
        "cost": todo.cost,
    }
    return joined


def describe(unit: dict) -> str:
    """A unit in one line.

    Examples
    --------
    >>> describe({"method": "SAM", "seed": 0})
    'method=SAM seed=0'
    """
    return " ".join(f"{key}={value}" for key, value in unit.items())


def _sharing(device: torch.device, processes: int) -> int:
    """How many of a machine's processes share one device, at most."""
    return -(-processes // torch.cuda.device_count()) if device.type == "cuda" else 1


def _device(name: str | None, local_rank: int) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that PyTorch finds here, got {name!r}") from error
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device
