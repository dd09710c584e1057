"""The page of full-scale results is made from the registry and the records."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from flatmin_book import attribute_text, benchmarks_in
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from flatmin.book.experiments import NAMES, experiment, plan, records
from flatmin.book.experiments.display import duration

PAGE = """# Full scale

```{records-list}
```

## Benchmarks

```{benchmarks-list}
```
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Renders the page from a given folder of records."""

    def render(folder):
        here = tmp_path_factory.mktemp("book")
        (here / "index.md").write_text(PAGE, encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch, docutils_namespace():
            patch.setattr(records, "FOLDERS", [folder])
            patch.setattr("flatmin.book.experiments.FOLDERS", [folder])
            app = Sphinx(
                here,
                None,
                here / "out",
                here / "trees",
                "html",
                status=None,
                warningiserror=True,
                confoverrides={
                    "extensions": ["sphinx.ext.autodoc", "myst_parser", "flatmin_book"],
                    "project": "try",
                    "source_suffix": {".md": "markdown"},  # Sphinx keeps its default for later apps
                },
            )
            app.build()
        dependencies = {Path(path).name for path in app.env.dependencies["index"]}
        # so that a new record rebuilds the page
        assert dependencies >= {path.name for path in folder.iterdir()}
        return here / "out" / "index.html"

    return render


@pytest.fixture(scope="module")
def committed(page):
    return page(records.FOLDERS[1]).read_text(encoding="utf-8")


def section(html, name):
    return re.search(rf'<section id="{name.replace("_", "-")}">.*?</section>', html, re.S)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_names_its_source_and_its_commands(committed, name):
    here = section(committed, name)
    text = re.sub(r"<[^>]+>", "", here)
    assert experiment(name).SOURCE in unescape(text.replace("\n", " "))
    assert (
        f"python -m flatmin.book.experiments {name} --size paper" in text
        and "--size tiny" not in text
    )
    known = [
        size
        for size in experiment(name).SETTINGS
        if records.record_path(name, records.FOLDERS[1], size).exists()
    ]
    assert here.count("<figure") == here.count("<img") == len(known)
    assert ("not yet recorded" in text) == (len(known) < len(experiment(name).SETTINGS) - 1)


def test_a_record_is_shown_with_its_origin_its_figure_and_its_rate(committed):
    text = re.sub(r"<[^>]+>", "", section(committed, "flooding_synthetic"))
    known = records.record("flooding_synthetic").attrs
    seeds, took = len(json.loads(known["seeds"])), duration(known["seconds"])
    assert f"recorded on {known['device']}, {seeds} seeds, {took}" in text
    seconds, measured = plan("flooding_synthetic", "paper").seconds()
    size = measured.attrs["size"]
    assert f"not yet recorded; about {duration(seconds)} at the rate of {size}" in text
    assert all(attribute_text(known, key) in text for key in ("commit", "data", "torch"))
    alt = re.search(r'<img alt="([^"]*)"', section(committed, "flooding_synthetic"))[1]
    assert alt.startswith("flooding_synthetic, demo: Test accuracy")


def test_benchmarks_are_listed(committed):
    rows = section(committed, "benchmarks")
    names = [name for name, _ in benchmarks_in(records.FOLDERS[1])]
    assert names and all(name in rows for name in names)


def test_without_records_there_are_no_results(page, tmp_path):
    html = page(tmp_path).read_text(encoding="utf-8")
    assert "<img" not in html and "Nothing yet." in html
    for name in NAMES:
        states = re.sub(r"<[^>]+>", "", section(html, name))
        assert states.count("not yet recorded") == len(experiment(name).SETTINGS) - 1


def test_a_new_record_appears(page, tmp_path):
    known = records.record("flooding_synthetic")
    known.attrs |= {"size": "paper, seeds=10", "device": "A large GPU", "seconds": 7200.0}
    records.save("flooding_synthetic", known, tmp_path, "paper")
    shutil.copy(next(records.FOLDERS[1].glob("benchmark_*.json")), tmp_path)
    html = page(tmp_path).read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", section(html, "flooding_synthetic"))
    assert "recorded with seeds=10 on A large GPU, 10 seeds, 2.0 h" in text
    assert "at the rate" not in text  # a record with changed settings gives no rate
    assert json.loads(records.read(tmp_path / "flooding_synthetic-paper.nc.xz").attrs["seeds"])
