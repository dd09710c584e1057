"""The records of the experiments: where they are, what they contain, how they are plotted."""

import functools
import importlib
import io
import json
import lzma
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import xarray as xr

from ..._checks import number
from ..._files import replace

NAMES = [
    "flooding_synthetic",
    "double_descent",
    "stiffness_training",
    "mixup_corrupt",
    "sam_label_noise",
    "sam_spectrum",
]

HERE = Path(__file__).parent
FOLDERS = [HERE.parent / "results", HERE.parents[3] / "results"]  # in a wheel, in a checkout
SCHEMA = (
    "experiment size device machine python numpy torch cuda flatmin commit seeds settings seconds "
    "data cost"
).split()


def experiment(name: str) -> ModuleType:
    """The module of an experiment; :mod:`flatmin.book.experiments.runner` says what is in it."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    return importlib.import_module(f"{__package__}.{name}")


def default_size(name: str) -> str:
    """The size that is run and read by default.

    Examples
    --------
    >>> default_size("flooding_synthetic")
    'demo'
    """
    return getattr(experiment(name), "DEFAULT", "reduced")


def record_path(name: str, folder: str | os.PathLike, size: str | None = None) -> Path:
    """The path of a record: ``NAME.nc.xz``, or ``NAME-SIZE.nc.xz`` if not of the default size.

    Examples
    --------
    >>> record_path("flooding_synthetic", "results", "paper").name
    'flooding_synthetic-paper.nc.xz'
    """
    sizes = sorted(experiment(name).SETTINGS)
    if size not in (None, *sizes):
        raise ValueError(f"size must be one of {sizes}, got {size!r}")
    is_default = size in (None, default_size(name))
    return Path(folder) / f"{name if is_default else f'{name}-{size}'}.nc.xz"


def record(name: str, size: str | None = None) -> xr.Dataset:
    """The recorded results of an experiment, with device, versions and settings in ``attrs``.

    Parameters
    ----------
    name : str
        One of ``NAMES``.
    size : str, optional
        Default: the experiment's default size.

    Examples
    --------
    >>> "torch" in record("flooding_synthetic").attrs
    True
    """
    for folder in FOLDERS:
        if (path := record_path(name, folder, size)).exists():
            return read(path)
    command = f"python -m flatmin.book.experiments {name}" + (f" --size {size}" if size else "")
    raise FileNotFoundError(f"there is no record {path.name} yet; {command} makes one")


def check(record: xr.Dataset) -> None:
    """Raise a ValueError unless the attributes of a record say how it was made.

    ``experiment``, ``size``, ``device``, ``machine``, ``python``, ``numpy``, ``torch``, ``cuda``,
    ``flatmin``, ``commit``, ``seeds`` and ``settings`` (JSON), ``seconds`` (of all units together),
    ``data`` and ``cost`` (single-example gradients) must be there; one that was not recorded is
    ``"not recorded"``.  Answers are checked by ``flatmin.book.check``.

    Examples
    --------
    >>> check(record("flooding_synthetic"))
    >>> check(xr.Dataset(attrs=dict.fromkeys(SCHEMA[1:], 1)))
    Traceback (most recent call last):
    ValueError: record.attrs must have all keys of SCHEMA, got no 'experiment'
    """
    missing = [repr(key) for key in SCHEMA if not str(record.attrs.get(key, ""))]
    if missing:
        raise ValueError(f"record.attrs must have all keys of SCHEMA, got no {', '.join(missing)}")
    experiment(record.attrs["experiment"])
    for key in ("seconds", "cost"):
        number(key, record.attrs[key], 0)
    for key in ("seeds", "settings"):
        json.loads(record.attrs[key])
    if not record.data_vars:
        raise ValueError("record must have a variable, got none")


def save(name: str, dataset: xr.Dataset, folder: str | os.PathLike, size: str | None = None):
    """Check a record and write it to its :func:`record_path`."""
    check(dataset)
    path = record_path(name, folder, size)
    write(path, dataset)
    return path


def write(path: Path, dataset: xr.Dataset) -> None:
    """Write netCDF, compressed by xz; the file appears as a whole or not at all."""
    content = bytes(dataset.to_netcdf(engine="scipy"))
    # presets above 6 only have more memory, for contents of more than 8 MiB, and clear it each time
    replace(path, lzma.compress(content, preset=6 | lzma.PRESET_EXTREME))


def read(path: Path) -> xr.Dataset:
    """Read what :func:`write` wrote."""
    try:
        content = lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from error
    return xr.load_dataset(io.BytesIO(content), engine="scipy")


def plot(name: str, record: xr.Dataset):
    """An experiment's figure, drawn from its record alone, in the book's style."""
    from ..plotting import use_style

    use_style()
    return experiment(name).plot(record)


def environment(device: torch.device) -> dict[str, str]:
    """The device, machine, versions and commit of a computation."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "flatmin": version("flatmin"),
        "commit": commit(),
    }


@functools.cache
def commit() -> str:
    """The commit of the checkout that the package is imported from, or "–"."""
    root = HERE.parents[3]

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (root / ".git").exists():  # git would find another project's repository
            return "–"
        changed = git("status", "--porcelain", "--", "src")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "–"
