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
    of the record.  Its ``attrs`` must have ``data`` and may have more.  ``work`` is a
    :class:`flatmin.book.experiments.Work`.
``cost(settings)``
    How many single-example gradients all units take together: the measure of time.
``plot(record)``
    The figure, from the record alone; its docstring is the caption.  If no single figure suits all
    records, ``drawing(record)`` returns the function that plots this one and has its caption.

:func:`run` computes the units one by one and writes each result atomically to its own file.  So it
can be killed at any moment: the same command resumes with the missing units, and within a unit from
its last checkpoint.  Under ``torchrun`` rank r of n takes the units r, r+n, r+2n, …, on the GPU of
its ``LOCAL_RANK``.  The ranks communicate only by the folder of these files (on several machines a
shared folder), and rank 0 assembles the record.  If several ranks share a GPU, the time of a unit
is divided by their number.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from ..._checks import number, whole
from ..._files import replacing
from ..._random import seeds as seed_list
from .job import Work, stopping
from .records import default_size, environment, experiment, read, record, save


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
        return f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

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
        if _kind(value) != _kind(usual[key]) and None not in (value, usual[key]):
            raise ValueError(
                f"{key} must be a {_kind(usual[key])} like {json.dumps(usual[key])}, got {value!r}"
            )
    changed = {key: value for key, value in changed.items() if value != usual[key]}
    settings = json.loads(json.dumps(usual | changed))
    settings["seeds"] = seed_list(whole("seeds", settings["seeds"]))
    units = module.units(settings)
    distinct = {json.dumps(unit, sort_keys=True) for unit in units}
    if not units or len(distinct) < len(units) or len({tuple(unit) for unit in units}) > 1:
        raise ValueError(
            "units must be a list, not empty, of different dictionaries with the same keys, "
            f"got {units}"
        )
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
    patience: float = 600.0,
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
    patience : float
        How many seconds rank 0 waits for other ranks that show no sign of life.

    Returns
    -------
    Dataset or None
        The record, as :func:`flatmin.book.experiments.record` reads it; None on all ranks but the first.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C or SIGTERM, once the unit has saved its state.  A second one stops at once.
    TimeoutError
        If units of other ranks do not arrive; the message names them.
    """
    todo = plan(name, size, seeds=seeds, settings=settings)
    rank, ranks, local_rank, local_ranks = map(
        _torchrun_number, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    number("patience", patience, 0)
    folder, chosen_device = Path(out) / f"{name}.parts", _device(device, local_rank)
    sharing = _sharing(chosen_device, local_ranks)
    mine = todo.units[rank::ranks]
    with (
        stopping() as stop,
        tqdm(
            desc=name,
            total=todo.cost * len(mine) / len(todo.units),
            unit="gradients",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            disable=True if rank else None,
        ) as bar,
    ):
        for unit in mine:
            if stop:
                raise KeyboardInterrupt
            if (part := _read(folder / todo.file(unit))) is None:
                _run_unit(todo, unit, folder, chosen_device, sharing, stop, bar)
            else:
                bar.update(part.attrs["gradients"])
    if rank:
        return None
    _wait(todo, folder, patience)
    path = save(name, _assemble(todo, folder), out, todo.size)
    return read(path)


def _run_unit(
    todo: Plan, unit: dict, folder: Path, device: torch.device, sharing: int, stop: list, bar: tqdm
) -> None:
    """Compute one unit and write its result; its time is divided by ``sharing``."""
    computed_on, path = environment(device), folder / todo.file(unit)
    if sharing > 1:
        computed_on["device"] += f", shared by {sharing} processes"
    environment_hash = hashlib.sha256(json.dumps(computed_on).encode()).hexdigest()[:8]
    work = Work(device, folder / f"{path.name}-{environment_hash}.work", stop, bar)
    result = todo.module.run_unit(dict(unit), json.loads(json.dumps(todo.settings)), work)
    if {*unit} & {*result.variables}:
        raise ValueError(f"run_unit must return a Dataset without {[*unit]}, got {result}")
    result.attrs = (
        {
            key: value if isinstance(value, (str, int, float, np.number)) else json.dumps(value)
            for key, value in result.attrs.items()
        }
        | computed_on
        | {"seconds": work.seconds / sharing, "gradients": work.gradients}
    )
    content = bytes(result.to_netcdf(engine="scipy"))
    with replacing(path) as part:
        part.write_bytes(hashlib.sha256(content).digest() + content)
    for leftover in folder.glob(f"{path.name}-*.work"):
        shutil.rmtree(leftover, ignore_errors=True)


def _read(path: Path) -> xr.Dataset | None:
    """A unit's result; None if there is none or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        warnings.warn(f"{path} is damaged, its unit is computed again", stacklevel=2)
        path.unlink()
        return None
    return xr.load_dataset(io.BytesIO(content[32:]), engine="scipy")


def _wait(todo: Plan, folder: Path, patience: float) -> None:
    """Wait for the results of other ranks, as long as something changes in the folder."""
    before, changed_at = None, time.monotonic()
    while missing := todo.missing(folder):
        current = {}
        for where, _, files in os.walk(folder):
            for path in (os.path.join(where, file) for file in files):
                with contextlib.suppress(OSError):  # it may just have been removed
                    current[path] = os.stat(path).st_mtime_ns
        if before is None:
            print(f"{todo.name}: waiting for {len(missing)} units of other ranks", flush=True)
        if current != before:
            before, changed_at = current, time.monotonic()
        if time.monotonic() - changed_at > patience:
            raise TimeoutError(
                f"no sign of life from other ranks for {patience:g} s, and {len(missing)} of "
                f"{len(todo.units)} units are missing: {'; '.join(map(describe, missing))}. "
                "Run the same command to compute these."
            )
        time.sleep(min(1.0, patience / 10))


def _assemble(todo: Plan, folder: Path) -> xr.Dataset:
    """The record: the results of all ranks, in the order of the units."""
    parts = [_read(folder / todo.file(unit)) for unit in todo.units]
    if any(part is None for part in parts):
        raise RuntimeError(
            "a unit's file was damaged meanwhile; the same command computes it again"
        )
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
    values = {}
    for part in parts:
        for key, value in part.attrs.items():
            values.setdefault(key, {})[str(value)] = value
    del values["gradients"]
    joined.attrs = {
        key: "; ".join(several) if len(several) > 1 else next(iter(several.values()))
        for key, several in values.items()
    } | {
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


def _torchrun_number(key: str) -> int:
    """A number that torchrun sets, or its value without torchrun."""
    least = int(key.endswith("WORLD_SIZE"))
    value = os.environ.get(key, str(least))
    return whole(key, int(value) if value.isdecimal() else value, least)


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
