"""Experiments that are too long for a notebook: each a function, a command and a record.

``python -m flatmin.experiments NAME`` runs one and writes ``results/NAME.nc``; chapters draw what
:func:`record` reads from there.
"""

import importlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import xarray as xr

__all__ = ["NAMES", "record", "save"]

NAMES = ["flooding_synthetic"]

HERE = Path(__file__).parent
FOLDERS = [HERE.parent / "results", HERE.parents[2] / "results"]  # in a wheel, in a checkout


def record(name: str) -> xr.Dataset:
    """The recorded results of an experiment, with device, versions and settings in ``attrs``.

    Examples
    --------
    >>> "torch" in record("flooding_synthetic").attrs
    True
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    for folder in FOLDERS:
        if (path := folder / f"{name}.nc").exists():
            return xr.load_dataset(path, engine="scipy")
    raise FileNotFoundError(
        f"there is no record of {name!r}; make one with python -m flatmin.experiments {name}"
    )


def save(name: str, dataset: xr.Dataset, folder: str | os.PathLike) -> Path:
    """Write a record, all or nothing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.nc", folder / f"{name}.nc.part"
    dataset.attrs |= {
        "experiment": name,
        "flatmin": version("flatmin"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    dataset.attrs = {
        k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in dataset.attrs.items()
    }
    dataset.to_netcdf(part, engine="scipy")
    os.replace(part, path)
    return path


def run(name: str, **options) -> xr.Dataset:
    """Run an experiment by name."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}").run(**options)
