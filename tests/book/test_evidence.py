"""What an evidence page leaves for its lesson."""

import json

import numpy as np
import pytest
import xarray as xr

from flatmin.book import keep, kept
from flatmin.book.experiments import records


@pytest.fixture
def folders(tmp_path, monkeypatch):
    wheel, checkout = tmp_path / "wheel", tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.setattr("flatmin.book.evidence.FOLDERS", [wheel, checkout])
    return checkout


RESULTS = xr.Dataset(
    {"error": (("level", "seed"), np.array([[1 / 3, 0.5], [0.25, np.nan]]))},
    {"level": [0.0, 0.08], "seed": [0, 1]},
    {"steps": 100},
)


def test_an_authors_run_leaves_what_a_lesson_reads(folders, monkeypatch):
    monkeypatch.setenv("FLATMIN_AUTHOR", "1")
    keep("02_flooding", RESULTS)
    found = kept("02_flooding")
    xr.testing.assert_allclose(found, RESULTS, rtol=1e-5)
    assert found.attrs["steps"] == 100 and found.attrs["torch"] and found.attrs["device"]
    assert [path.name for path in folders.iterdir()] == ["evidence_02_flooding.json"]


def test_a_readers_run_writes_nothing(folders, monkeypatch):
    monkeypatch.delenv("FLATMIN_AUTHOR", raising=False)
    keep("02_flooding", RESULTS)
    assert list(folders.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="got '02_flooding'; make notebooks N=evidence/02"):
        kept("02_flooding")


def test_what_is_kept_says_how_it_was_made():
    paths = sorted(records.FOLDERS[1].glob("evidence_*.json"))
    assert paths
    for path in paths:
        attrs = json.loads(path.read_text(encoding="utf-8"))["attrs"]
        assert {"device", "torch", "python", "seeds", "settings"} <= set(attrs), path.name
