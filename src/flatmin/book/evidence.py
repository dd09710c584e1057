"""Small results that an evidence page computes and its lesson draws."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from .._files import replace
from .experiments.records import FOLDERS, environment

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["keep", "kept"]


def keep(name: str, results: xr.Dataset) -> None:
    """Leave results for a lesson, in ``results/evidence_NAME.json``.

    Only an author's run writes the file (``make notebooks``); everybody else's leaves it alone.

    Parameters
    ----------
    name : str
        Of the evidence page: ``"02_flooding"``.
    results : Dataset
        A few thousand numbers at most, kept with six digits.  Device and versions are added to its
        attributes, which should say the settings.
    """
    if not os.environ.get("FLATMIN_AUTHOR"):
        return
    import torch

    here = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here.pop("commit")  # the page and the file are in one
    content = results.assign_attrs(here | results.attrs).to_dict()
    for variable in content["data_vars"].values():
        variable["data"] = _rounded(variable["data"])
    replace(FOLDERS[1] / f"evidence_{name}.json", json.dumps(content, ensure_ascii=False) + "\n")


def kept(name: str) -> xr.Dataset:
    """The results that an evidence page has left, with device and versions in ``attrs``.

    Examples
    --------
    >>> "torch" in kept("02_flooding").attrs
    True
    """
    import xarray as xr

    for folder in FOLDERS:
        if (path := folder / f"evidence_{name}.json").exists():
            return xr.Dataset.from_dict(json.loads(path.read_text(encoding="utf-8")))
    raise FileNotFoundError(
        f"name must be of an evidence page that has left results, got {name!r}; "
        f"make notebooks N=evidence/{name} makes them"
    )


def _rounded(value: Any) -> Any:
    return [_rounded(v) for v in value] if isinstance(value, list) else float(f"{value:.6g}")
