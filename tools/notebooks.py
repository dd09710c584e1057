"""Sync, execute and check the chapters: pairs of a text half, to be edited, and a notebook.

python tools/notebooks.py sync  [NAME ...]   text half -> notebook, keeping the outputs of unchanged cells
python tools/notebooks.py run   [NAME ...]   sync, then execute in place: what gets committed
python tools/notebooks.py check              are both halves equal?
python tools/notebooks.py book               the book, from chapters executed on this machine
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import tomllib
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupytext.compare import NotebookDifference, compare_notebooks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from packaging.version import Version

from flatmin._files import print_line, replace

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
BUILD = ROOT / "_build"
LANGUAGE = {"name": "python"}
HEAD = re.compile(
    r"^> Reading: (\S+) minutes?\. Running: (\S+) minutes? on one core\. You need: ", re.M
)
WORDS_A_MINUTE, LINES_A_MINUTE = 100, 10  # of prose with mathematics; of code
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
CRASHES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def read(path):
    return path.read_text(encoding="utf-8")


def repository():
    """The `repository` section of _config.yml: url, branch, path_to_book."""
    return yaml.safe_load(read(ROOT / "_config.yml"))["repository"]


def source(version=None):
    """Where pip finds a version of the package: a release's tag, or the branch.

    A copy of a notebook in Colab thus keeps installing the package that it was written for.
    """
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    release, repo = Version(version or project["version"]), repository()
    return f"git+{repo['url']}@{repo['branch'] if release.is_prerelease else f'v{release}'}"


def bootstrap():
    """The source of every chapter's first code cell."""
    return read(ROOT / "tools" / "bootstrap.py").strip().replace("SOURCE", source())


def key(path):
    """The name of a chapter: its path below book/, 02_flooding or evidence/02_flooding."""
    return path.relative_to(BOOK).with_suffix("").as_posix()


def choose(kind, folder, names):
    """The text halves in a folder, all or those whose path starts with one of `names`."""
    found = [*sorted(folder.glob("[0-9]*.md")), *sorted(folder.glob("evidence/[0-9]*.md"))]
    available = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    starts = tuple(re.sub(r"^book/|\.(md|ipynb)$", "", Path(name).as_posix()) for name in names)
    for start in starts:
        if not any(name.startswith(start) for name in available):
            sys.exit(f"no {kind} is called {start}; there are {', '.join(available)}")
    return [path for name, path in available.items() if not names or name.startswith(starts)]


def chapters(names=()):
    return choose("chapter", BOOK, names)


def parse(path, reads, **form):
    """A notebook or text half, read by a library's function; one that cannot be read is named."""
    try:
        return reads(read(path), **form)
    except Exception as error:  # the libraries raise a dozen kinds, and none names the file
        sys.exit(f"{path.name} cannot be read: mend it, or take it from git. {error}")


def digest(cell):
    """Of what a text half holds of a cell: its source, tags, and alt text."""
    held = [cell.cell_type, cell.source, *map(cell.metadata.get, ("tags", "mystnb"))]
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:12]


def read_text(path):
    """A text half as a notebook.  Its cell ids are digests, so that an edited notebook shows it."""
    notebook, seen = parse(path, jupytext.reads, fmt="md:myst"), Counter()
    if "formats" not in notebook.metadata.get("jupytext", {}):
        sys.exit(f"{path.name} must begin with a line --- and the header that pairs its halves")
    notebook.metadata.jupytext.pop("text_representation", None)
    notebook.metadata["language_info"] = LANGUAGE
    for cell in notebook.cells:
        if "hide-input" in cell.metadata.get("tags", ()):  # folded in JupyterLab and Colab, too
            cell.metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
        cell.id = digest(cell)
        seen[cell.id] += 1
        cell.id += f"-{seen[cell.id]}" if seen[cell.id] > 1 else ""
    return notebook


def keep_outputs(notebook, executed):
    """Copy outputs from `executed` to the code cells of `notebook` with the same source."""
    stored = defaultdict(list)
    for cell in executed.cells:
        stored[cell.source].append(cell)
    for cell in notebook.cells:
        if cell.cell_type == "code" and stored[cell.source]:
            old = stored[cell.source].pop(0)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count


def is_visible_code(cell):
    return cell.cell_type == "code" and not FOLDED & set(cell.metadata.get("tags", ()))


def prose(cells):
    """The text of a chapter: no exercises, code, display formulas, tags, and targets of links."""
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = re.sub(r"^## Exercises\n.*?(?=^## |\Z)", "", text, flags=re.S | re.M)
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<[^>]*>", " ", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", text)


def reading_minutes(cells):
    """How long one reads a chapter without its exercises, in steps of five minutes."""
    lines = sum(len(cell.source.splitlines()) for cell in cells if is_visible_code(cell))
    minutes = len(prose(cells).split()) / WORDS_A_MINUTE + lines / LINES_A_MINUTE
    return 5 * max(1, round(minutes / 5))


def plural(number, unit="minute"):
    return f"{number} {unit}{'s' * (number not in (1, '½', '1'))}"


def renew_head(path, seconds=None):
    """Say at the head of a chapter how long it takes to read, and to run if that was measured."""
    text = read(path)
    if head := HEAD.search(text):
        halves = None if seconds is None else max(1, math.ceil(seconds / 30))
        running = head[2] if halves is None else f"{halves // 2 or ''}{'½' * (halves % 2)}"
        reading = plural(reading_minutes(read_text(path).cells))
        new = f"> Reading: {reading}. Running: {plural(running)} on one core. You need: "
        if new != head[0]:
            replace(path, text[: head.start()] + new + text[head.end() :])


def sync(path):
    """Bring a notebook up to its text half.  A notebook with cells of somebody's own is refused."""
    renew_head(path)
    target, notebook = path.with_suffix(".ipynb"), read_text(path)
    if target.exists():
        old = parse(target, nbformat.reads, as_version=4)
        texts = {digest(cell) for cell in notebook.cells}
        own = [
            cell
            for cell in old.cells
            if digest(cell) not in texts and not cell.get("id", "").startswith(digest(cell))
        ]
        if own:
            sys.exit(
                f"{target.name} has cells ({len(own)}) whose text, tags or alt text was written there "
                f"and is not in {path.name}; the first begins {own[0].source[:60]!r}. Nothing was changed: copy them to "
                f"{path.name}, or save the notebook under another name and take the old one from git"
            )
        keep_outputs(notebook, old)
    write(notebook, path)
    return notebook


def write(notebook, path):
    """Write the notebook of a text half, if it differs: an unchanged page is not rebuilt."""
    nbformat.validate(notebook)
    target, text = path.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n"
    if not target.exists() or read(target) != text:
        replace(target, text)
    path.touch()  # JupyterLab opens a pair whose text half is the newer one, or that is equal


def execute(notebook, threads=1, **environment):
    """Execute in an empty folder, as in Colab.  With one thread, sums are the same everywhere."""
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1", **environment}
    with TemporaryDirectory() as empty:
        NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=1800,
            iopub_timeout=60,  # by default outputs that a busy machine delays by 4 s are lost
            raise_on_iopub_timeout=True,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=40"],
            resources={"metadata": {"path": empty}},
        ).execute(env={**os.environ, **environment})
    notebook.metadata["language_info"] = LANGUAGE  # the kernel wrote its version there


def execute_all(jobs, keep=lambda name, notebook, seconds: None):
    """Execute `jobs`, a list of (name, notebook, keywords), in parallel.  Returns {name: error}.

    `keep` gets each executed notebook, and its seconds, at once, so that an interruption costs only those running.
    """
    failed = {}

    def run_job(name, notebook, keywords):
        start, error = time.monotonic(), None
        try:
            execute(notebook, **keywords)
        except CRASHES as crash:
            error = crash
        return name, notebook, error, time.monotonic() - start

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            running = [pool.submit(run_job, *job) for job in jobs]
            for done, job in enumerate(as_completed(running), 1):
                name, notebook, error, seconds = job.result()
                if error:
                    failed[name] = error
                else:
                    keep(name, notebook, seconds)
                status = f"FAILED\n{error}" if error else f"executed in {seconds:.0f} s"
                print_line(f"  [{done}/{len(jobs)}] {name}: {status}")
        except KeyboardInterrupt:  # threads wait for their kernels, which end with this process
            os._exit(130)
    return failed


def run(paths):
    author = {"FLATMIN_SEED": "0", "FLATMIN_AUTHOR": "1"}  # stated numbers come out as printed

    def keep(name, executed, seconds):
        path = BOOK / f"{name}.md"
        renew_head(path, seconds)
        notebook = read_text(path)
        keep_outputs(notebook, executed)
        write(notebook, path)

    return execute_all([(key(path), sync(path), author) for path in paths], keep)


def differences(path):
    """How the halves of a chapter differ, in words; empty if they are equal."""
    target = path.with_suffix(".ipynb")
    if not target.exists():
        return f"{target.name} is missing"
    try:
        notebook = parse(target, nbformat.reads, as_version=4)
        compare_notebooks(notebook, read_text(path), fmt="md:myst")
    except NotebookDifference as difference:
        return f"{key(path)}: {difference}"
    path.touch()
    return ""


def executed():
    """The cache of executed chapters: emptied when anything but their cells has changed."""
    known = hashlib.sha256(
        f"{sys.version} {version('torch')} {os.environ.get('FLATMIN_SEED')}".encode()
    )
    for folder in ("src/flatmin", "results"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                known.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    folder = BUILD / "executed" / known.hexdigest()
    for old in BUILD.glob("executed/*"):
        if old != folder:
            shutil.rmtree(old)
    return get_cache(folder)


def book():
    """Execute the chapters whose code is not in the cache, and render the book from it."""
    start, cache, stale = time.monotonic(), executed(), {}
    for path in chapters():
        notebook = sync(path)
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            stale[path] = notebook
    print(
        f"book: {len(stale)} of {len(chapters())} chapters to execute"
        + (", one to four minutes each" if stale else ""),
        flush=True,
    )
    if stale:  # Sphinx would not see that only outputs changed
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    threads = max(1, os.cpu_count() // max(1, len(stale)))
    jobs = [(key(path), notebook, {"threads": threads}) for path, notebook in stale.items()]

    def keep(name, notebook, _):
        bundle = CacheBundleIn(notebook, str(BOOK / f"{name}.md"))
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)

    failed = execute_all(jobs, keep)
    if failed:
        print(f"book: NOT rendered, because these chapters failed (see above): {', '.join(failed)}")
        return failed
    print("book: rendering (a minute and a half at first, then seconds)", flush=True)
    status = render(cache)
    took = f"{time.monotonic() - start:.0f} s"
    print(
        f"book: rendering FAILED after {took}, see the warnings above"
        if status
        else f"book: ready in {took}, open {BUILD / 'html' / 'index.html'}"
    )
    return status


def render(cache):
    """`jupyter-book build`, with outputs from the cache.  Returns the exit status."""
    from jupyter_book.sphinx import build_sphinx

    overrides = {
        "external_toc_path": str(BOOK / "_toc.yml"),
        "latex_individualpages": False,
        "nitpicky": True,
        "nb_execution_mode": "cache",
        "nb_execution_cache_path": str(cache.path),
        "nb_execution_raise_on_error": True,
    }
    # it looks at every object in memory, torch's deprecated ones too
    warnings.filterwarnings("ignore", category=FutureWarning, module="sphinx_external_toc")
    status = build_sphinx(
        BOOK,
        BUILD / "html",
        noconfig=True,
        path_config=ROOT / "_config.yml",
        confoverrides=overrides,
        warningiserror=True,
        keep_going=True,
        quiet=True,
    )
    if status:
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)  # so that the next run warns again
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
            return book()
        case "check":
            differing = [words for words in map(differences, paths) if words]
            print("\n".join(differing) or f"{len(paths)} chapters, both halves equal")
            return differing


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
