"""What CONTRIBUTING.md promises: new chapters pass the tests, and what it names exists."""

import inspect
import re
import shutil

import new_chapter
import notebooks
import pytest
import yaml
from notebooks import BOOK, ROOT, chapters, read
from pages import test_notebooks

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The repository's files that a new chapter reads and changes."""
    for name in ("_config.yml", "pyproject.toml", "README.md", "tools/bootstrap.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "evidence").mkdir()
    for path in [BOOK / "_toc.yml", *BOOK.glob("*.md"), *BOOK.glob("evidence/*.md")]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path / "book")
    return tmp_path


def test_a_new_chapter_passes_the_tests(copy, capsys):
    numbers = {int(path.stem[:2]) for path in chapters()}
    number = next(n for n in range(1, 100) if n not in numbers)
    stem = f"{number:02d}_nobody_s_chapter"
    assert not new_chapter.main([stem[3:], "--title", "Nobody's chapter"])
    assert f"Edit {stem}.md" in capsys.readouterr().out
    assert all(stem in read(copy / name) for name in ("README.md", "book/index.md"))
    toc = yaml.safe_load(read(copy / "book" / "_toc.yml"))
    (lessons,) = (part["chapters"] for part in toc["parts"] if part.get("caption") == "Chapters")
    at = [lesson["file"] for lesson in lessons].index(stem)
    assert lessons[at]["sections"] == [{"file": f"evidence/{stem}"}]
    assert all(lessons[at - 1]["file"] < stem < later["file"] for later in lessons[at + 1 :])

    for path in (copy / "book" / f"{stem}.md", copy / "book" / "evidence" / f"{stem}.md"):
        made = notebooks.nbformat.reads(read(path.with_suffix(".ipynb")), as_version=4)
        given = {"path": path, "cells": made.cells}
        done = 0
        for name, test in vars(test_notebooks).items():
            wanted = inspect.signature(test).parameters if name.startswith("test_") else ()
            if wanted and set(wanted) <= set(given):
                test(**{key: given[key] for key in wanted})
                done += 1
        assert done >= 10


@pytest.mark.parametrize("name", ["Weight", "2fast", "a-b", "sam"])
def test_a_bad_name_changes_nothing(copy, name):
    before = {path: path.read_bytes() for path in copy.rglob("*.*")}
    with pytest.raises(SystemExit, match=f"NAME must be .*'{name}'"):
        new_chapter.main([name])
    assert {path: path.read_bytes() for path in copy.rglob("*.*")} == before


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    jobs = yaml.safe_load(read(path))["jobs"].values()
    steps = [step for job in jobs for step in job["steps"]]
    text = "\n".join(step.get("run", "") for step in steps)
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M)
    assert steps and set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)
    extras = read(ROOT / "pyproject.toml")
    for extra in re.findall(r"\.\[([\w,]+)\]", text):
        assert all(re.search(rf"^{name} = \[", extras, re.M) for name in extra.split(",")), extra
    assert all(
        (ROOT / file).exists()
        for files in re.findall(r"\bbash (\S+)|\bpython (\S+\.py)", text)
        for file in files
        if file
    )


def test_contributing_names_what_exists():
    text = read(ROOT / "CONTRIBUTING.md")
    targets = re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M)
    assert set(re.findall(r"`?make ([a-z][a-z-]+)", text)) <= set(targets)
    for path in re.findall(
        r"`((?:src|tests|tools|book|assignments|benchmarks|results|\.github)/[\w./]+)`", text
    ):
        if "NN_" not in path and "NAME" not in path:
            assert (ROOT / path).exists(), path


def test_no_skeleton_is_left():
    """The template's own words have been replaced in the chapters and the pages that list them."""
    pages = [ROOT / "README.md", BOOK / "index.md", *chapters()]
    for words in (
        "What the chapter shows, in one or two lines",
        "]: what it shows",
        "Replace everything, but keep the sections",
    ):
        assert [path.name for path in pages if words in read(path)] == []
