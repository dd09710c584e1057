"""What CONTRIBUTING.md promises: new chapters pass the tests, names exist, code is clean."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from notebooks import BOOK, ROOT, chapters

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files that a new chapter touches, and their tests."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("book", "tools", "tests"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for path in (path for path in ROOT.iterdir() if path.is_file()):
        shutil.copy2(path, folder)
    return folder


def run(folder, *command):
    quiet = os.environ | {"TQDM_DISABLE": "1"}  # as in the Makefile
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=quiet, capture_output=True, text=True
    )


def test_a_new_chapter_passes_the_tests(copy):
    stem = f"{1 + max(int(path.stem[:2]) for path in chapters()):02d}_nobody_s_chapter"
    made = run(copy, "tools/new_chapter.py", stem[3:], "--title", "Nobody's chapter")
    assert made.returncode == 0, made.stdout + made.stderr
    assert f"Edit {stem}.md" in made.stdout
    for name in ("README.md", "book/index.md", "book/_toc.yml"):
        assert stem in (copy / name).read_text()
    tests = ["tests/pages/test_notebooks.py", "tests/pages/test_repository.py", "-k", "not a_move"]
    tested = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert tested.returncode == 0, tested.stdout
    again = run(copy, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", f"book/{stem}.ipynb")
    assert again.returncode == 0, again.stdout


@pytest.mark.parametrize("name", ["Weight", "2fast", "a-b", "sam"])
def test_a_bad_name_changes_nothing(copy, name):
    before = {path: path.read_bytes() for path in copy.rglob("*.md")}
    made = run(copy, "tools/new_chapter.py", name)
    assert made.returncode == 1 and "NAME must be" in made.stderr and repr(name) in made.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*.md")} == before


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(path):
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    steps = [step for job in jobs for step in job["steps"]]
    text = "\n".join(step.get("run", "") for step in steps)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert steps and set(re.findall(r"\bmake ([a-z-]+)", text)) <= set(targets)
    extras = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\.\[([\w,]+)\]", text):
        assert all(re.search(rf"^{name} = \[", extras, re.M) for name in extra.split(",")), extra
    assert all(
        (ROOT / file).exists()
        for file in re.findall(r"\bbash (\S+)|\bpython (\S+\.py)", text)
        for file in file
        if file
    )


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
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
        assert [path.name for path in pages if words in path.read_text()] == []


@pytest.mark.parametrize("words", ["check --no-fix --output-format concise", "format --check"])
def test_the_code_is_clean(words):
    command = [sys.executable, "-m", "ruff", *words.split(), "--no-cache", "."]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
