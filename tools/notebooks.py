"""Sync, execute and check the chapters: pairs of a text half, to be edited, and a notebook.

python tools/notebooks.py sync  [NAME ...]   text half -> notebook, keeping the outputs of unchanged cells
python tools/notebooks.py run   [NAME ...]   sync, then execute in place: what gets committed
python tools/notebooks.py check              are both halves equal?
python tools/notebooks.py book               the book, from chapters executed on this machine
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
KEPT_METADATA = ("tags", "mystnb")
LANGUAGE = {"name": "python"}
CRASHES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def repository():
    """The `repository` section of _config.yml: url, branch, path_to_book."""
    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]


def source(version=None):
    """Where pip finds a version of the package: a release's tag, or the branch.

    A copy of a notebook in Colab thus keeps installing the package that it was written for.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    release, repo = Version(version or project["version"]), repository()
    return f"git+{repo['url']}@{repo['branch'] if release.is_prerelease else f'v{release}'}"


def bootstrap():
    """The source of every chapter's first code cell."""
    return (ROOT / "tools" / "bootstrap.py").read_text().strip().replace("SOURCE", source())


def chapters(names=()):
    """The paths of the text halves, all or those whose file name starts with one of `names`."""
    available = sorted(BOOK.glob("[0-9]*.md"))
    chosen = [
        path
        for path in available
        if not names or path.stem.startswith(tuple(Path(n).stem for n in names))
    ]
    if names and not chosen:
        sys.exit(
            f"no chapter is called {' or '.join(names)}; "
            f"there are {', '.join(path.stem for path in available)}"
        )
    return chosen


def read_text(path):
    """A text half as a notebook, with the metadata that both halves keep and hashes as cell ids."""
    notebook = jupytext.read(path, fmt="md:myst")
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict(
        {
            "jupytext": {"formats": "ipynb,md:myst"},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": LANGUAGE,
        }
    )
    seen = defaultdict(int)
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
        )
    return notebook


def keep_outputs(notebook, executed):
    """Copy outputs from `executed` to the code cells of `notebook` with the same source."""
    stored = defaultdict(list)
    for cell in executed.cells:
        if cell.cell_type == "code":
            stored[cell.source].append(cell)
    for cell in notebook.cells:
        if cell.cell_type == "code" and stored[cell.source]:
            old = stored[cell.source].pop(0)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def sync(path):
    target = path.with_suffix(".ipynb")
    notebook = read_text(path)
    if target.exists():
        keep_outputs(notebook, nbformat.read(target, as_version=4))
    write(notebook, target)
    return notebook


def write(notebook, path):
    """Validate a notebook and write it if it differs, so that unchanged pages are not rebuilt."""
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def execute(notebook, threads=1, **environment):
    """Execute in an empty folder, as in Colab.  With one thread, sums are the same everywhere."""
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **environment}
    with TemporaryDirectory() as empty:
        NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=1800,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=40"],
            resources={"metadata": {"path": empty}},
        ).execute(env={**os.environ, **environment})
    notebook.metadata["language_info"] = LANGUAGE  # the kernel wrote its version there
    return notebook


def execute_all(jobs):
    """Execute `jobs`, a list of (name, notebook, keywords), in parallel.  Returns {name: error}."""
    done = itertools.count(1)

    def run_job(job):
        name, notebook, keywords = job
        start, error = time.monotonic(), None
        try:
            execute(notebook, **keywords)
        except CRASHES as crash:
            error = crash
        status = f"FAILED\n{error}" if error else f"executed in {time.monotonic() - start:.0f} s"
        print(f"  [{next(done)}/{len(jobs)}] {name}: {status}", flush=True)
        return name, error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {name: error for name, error in pool.map(run_job, jobs) if error}


def run(paths):
    notebooks = {path: sync(path) for path in paths}
    base_seed = {"FLATMIN_SEED": "0"}
    failed = execute_all([(path.stem, notebook, base_seed) for path, notebook in notebooks.items()])
    for path, notebook in notebooks.items():
        if path.stem not in failed:
            write(notebook, path.with_suffix(".ipynb"))
    return failed


def differences(path):
    """The differences between a text half and its notebook, in words."""
    target = path.with_suffix(".ipynb")
    if not target.exists():
        return [f"{target.name} is missing"]
    text, notebook = read_text(path), nbformat.read(target, as_version=4)
    if len(text.cells) != len(notebook.cells):
        return [f"{len(text.cells)} cells in {path.name}, {len(notebook.cells)} in {target.name}"]
    differing = (
        []
        if text.metadata == notebook.metadata
        else [f"{path.stem}: the notebook's metadata is not the standard one"]
    )
    for i, (ours, theirs) in enumerate(zip(text.cells, notebook.cells, strict=True)):
        for key in ("cell_type", "source", "metadata"):
            if ours[key] != theirs[key]:
                differing.append(f"{path.stem}, cell {i}: {key} differs")
    return differing


def inputs():
    """A digest of what the chapters' outputs depend on, apart from their own cells."""
    digest = hashlib.sha256(
        f"{sys.version} {version('torch')} {os.environ.get('FLATMIN_SEED')}".encode()
    )
    for folder in ("src/flatmin", "results"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()


def book(build=ROOT / "_build"):
    """Copy the book to _build/source, and execute its changed chapters there."""
    source, executed = build / "source", build / "executed"
    executed.mkdir(parents=True, exist_ok=True)
    (source / "book").mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "_config.yml", source)
    pages = {
        path.relative_to(BOOK): path
        for path in BOOK.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    halves = {path.relative_to(BOOK) for path in chapters()}
    for page, path in pages.items():
        if page not in halves and page.with_suffix(".md") not in halves:
            (source / "book" / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / "book" / page)
    for path in [path for path in (source / "book").rglob("*") if path.is_file()]:
        if path.relative_to(source / "book") not in pages:
            path.unlink()

    notebooks, common, stale = {}, inputs(), []
    for path in chapters():
        notebook, cached = read_text(path), executed / f"{path.stem}.ipynb"
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        key = hashlib.sha256(json.dumps([common, cells]).encode()).hexdigest()
        old = nbformat.read(cached, as_version=4) if cached.exists() else None
        if old is not None and old.metadata.get("made_from") == key:
            keep_outputs(notebook, old)
        else:
            stale.append(path.stem)
        notebooks[path.stem] = notebook, key

    print(
        f"book: {len(stale)} of {len(notebooks)} chapters to execute{', one to four minutes each' if stale else ''}",
        flush=True,
    )
    threads = max(1, os.cpu_count() // max(1, len(stale)))
    failed = execute_all([(name, notebooks[name][0], {"threads": threads}) for name in stale])
    for name, (notebook, key) in notebooks.items():
        write(notebook, source / "book" / f"{name}.ipynb")
        if name in stale and name not in failed:
            notebook.metadata["made_from"] = key
            write(notebook, executed / f"{name}.ipynb")
    return failed


def render(build=ROOT / "_build"):
    """Render the changed pages of _build/source to _build/html.  Returns the exit status."""
    print("book: rendering (a minute and a half at first, then seconds)", flush=True)
    command = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
        "build",
        "-W",
        "--keep-going",
        "-n",
        "--quiet",
    ]
    result = subprocess.run(
        [*command, build / "source" / "book", "--path-output", build.parent],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        print(result.stdout + result.stderr, flush=True)
        shutil.rmtree(build / ".doctrees", ignore_errors=True)  # so that the next run warns again
    return result.returncode


def make_book():
    """Execute, render, and print the result in one line."""
    start = time.monotonic()
    if failed := book():
        print(f"book: NOT rendered, because these chapters failed (see above): {', '.join(failed)}")
        return failed
    status, page = render(), ROOT / "_build" / "html" / "index.html"
    took = f"{time.monotonic() - start:.0f} s"
    print(
        f"book: rendering FAILED after {took}, see the warnings above"
        if status
        else f"book: ready in {took}, open {page}"
    )
    return status


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["sync", "run", "check", "book"])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a chapter, or the start of its name"
    )
    arguments = parser.parse_args()
    paths = chapters(arguments.names)
    match arguments.command:
        case "sync":
            for path in paths:
                sync(path)
        case "run":
            return run(paths)
        case "book":
            return make_book()
        case "check":
            differing = [line for path in paths for line in differences(path)]
            print("\n".join(differing) or f"{len(paths)} chapters, both halves equal")
            return differing


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
