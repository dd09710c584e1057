"""Build the assignments from their masters, and grade submissions.

    python tools/assignments.py build [NAME ...]                masters -> _build/assignments/{student,solution,autograder}
    python tools/assignments.py grade NAME FOLDER [-o FILE]     a folder of submitted notebooks -> a CSV

A master is assignments/NN_name.md.  A code cell tagged `points-4` is a question worth 4 points.  It
defines one function, named like the question and its check in flatmin.book.check, and its solution
is between `# BEGIN SOLUTION` and `# END SOLUTION`.  This script makes the rest: the exercise with
`raise NotImplementedError`, the cell that calls the check, and the autograder's two tests, a public
one with the student's inputs and a hidden one with others, worth half of the points each.
"""

import argparse
import ast
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell
from notebooks import LANGUAGE, ROOT, bootstrap, source

MASTERS = ROOT / "assignments"
BUILD = ROOT / "_build" / "assignments"
HIDDEN_SEED = 2026  # of the hidden tests; a course sets its own: make assignments SEED=...
TIME_LIMIT = 600  # seconds per submission
SOLUTION = re.compile(r"^([ ]*)# BEGIN SOLUTION\n.*?# END SOLUTION$", re.S | re.M)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": LANGUAGE,
}


# ---------------------------------------------------------------------------------------- masters


def masters(names=()):
    available = sorted(MASTERS.glob("[0-9]*.md"))
    chosen = [path for path in available if not names or path.stem.startswith(tuple(names))]
    if names and not chosen:
        sys.exit(
            f"no assignment is called {' or '.join(names)}; "
            f"there are {', '.join(path.stem for path in available)}"
        )
    return chosen


def read(path):
    """The cells of a master."""
    return jupytext.read(path, fmt="md:myst").cells


def points(cell):
    """The points of a question's cell; 0 for other cells."""
    tags = [tag for tag in cell.metadata.get("tags", ()) if tag.startswith("points-")]
    return int(tags[0].removeprefix("points-")) if tags else 0


def name_of(cell):
    """A question's name: that of the function that contains the solution."""
    tree = ast.parse(cell.source)
    lines = cell.source.splitlines()
    [name] = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("# BEGIN SOLUTION" in line for line in lines[node.lineno - 1 : node.end_lineno])
    ]
    return name


def questions(cells):
    """{name: points}"""
    return {name_of(cell): points(cell) for cell in cells if points(cell)}


def exercise(source):
    """A question's source as students get it."""
    return SOLUTION.sub(r"\1raise NotImplementedError", source)


def solution(source):
    """A question's source with its solution, without the marks."""
    return re.sub(r"^[ ]*# (BEGIN|END) SOLUTION\n?", "", source, flags=re.M)


def assemble(path, answer):
    """A notebook from a master: a question becomes `answer(cell)` and a call of its check."""
    cells = []
    for cell in read(path):
        if cell.cell_type == "markdown":
            cells.append(new_markdown_cell(cell.source))
            if len(cells) == 1:
                cells.append(new_code_cell(bootstrap()))
        elif points(cell):
            cells += [*answer(cell), new_code_cell(f"_ = check.{name_of(cell)}({name_of(cell)})")]
        else:
            cells.append(new_code_cell(cell.source))
    return numbered(new_notebook(cells=cells, metadata=METADATA))


def plain(path, convert):
    """A notebook from a master, with each question's source replaced by `convert(source)`."""
    return assemble(path, lambda cell: [new_code_cell(convert(cell.source))])


def wrong(path):
    """{question__mistake: (question, what the check must say, source)} of assignments/wrong/."""
    text = (path.parent / "wrong" / f"{path.stem}.py").read_text()
    answers = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            question = node.name.partition("__")[0]
            source = ast.get_source_segment(text, node).replace(
                f"def {node.name}(", f"def {question}(", 1
            )
            answers[node.name] = question, ast.get_docstring(node), source
    return answers


def numbered(nb):
    for i, cell in enumerate(nb.cells):
        cell.id = f"cell-{i}"
    return nb


# ------------------------------------------------------------------------------- what Otter makes


def otter_master(path, hidden_seed):
    """The master in the format of `otter assign`, where raw cells mark each part."""
    config = {
        "init_cell": False,
        "export_cell": False,
        "check_all_cell": False,
        "run_tests": False,
        "overwrite_requirements": True,
        "tests": {"files": True, "ok_format": False},
        "generate": {
            "pdf": False,
            "show_stdout": False,
            "show_hidden": False,
            "print_summary": False,
        },
        "requirements": [
            "--extra-index-url https://download.pytorch.org/whl/cpu",
            "otter-grader>=7",
            f"flatmin[all] @ {source()}",
        ],
    }

    def marked(cell):
        name, half = name_of(cell), points(cell) / 2
        tests = [new_code_cell(otter_test(name, half, seed)) for seed in (0, hidden_seed)]
        mark = lambda text: new_raw_cell(f"# {text}")
        return [
            mark("BEGIN QUESTION\n" + json.dumps({"name": name, "check_cell": False})),
            mark("BEGIN SOLUTION"),
            new_code_cell(prompted(cell.source)),
            mark("END SOLUTION"),
            mark("BEGIN TESTS"),
            *tests,
            mark("END TESTS"),
            mark("END QUESTION"),
        ]

    nb = assemble(path, marked)
    nb.cells.insert(0, new_raw_cell("# ASSIGNMENT CONFIG\n" + json.dumps(config)))
    return numbered(nb)


def prompted(source):
    """A question's source with the marks by which Otter inserts `raise NotImplementedError`."""

    def marked(match):
        block, indent = match[0].replace("# BEGIN SOLUTION", "# BEGIN SOLUTION NO PROMPT"), match[1]
        return (
            f'{block}\n{indent}""" # BEGIN PROMPT\n{indent}raise NotImplementedError\n'
            f'{indent}""" # END PROMPT'
        )

    return SOLUTION.sub(marked, source)


def otter_test(name, worth, seed):
    return (
        f'""" # BEGIN TEST CONFIG\npoints: {worth:g}\nhidden: {str(bool(seed)).lower()}\n""" # END TEST CONFIG\n'
        f"def {'hidden' if seed else 'public'}(env):\n    from flatmin import check\n"
        f'    check.{name}.verify(env.get("{name}"), seed={seed})'
    )


def build(path, out=BUILD, hidden_seed=HIDDEN_SEED):
    """Write student notebook, solution and autograder; check that the first has no solution."""
    from otter.assign import main as assign

    from flatmin.book import check

    for name in questions(read(path)):
        if not hasattr(check, name):
            sys.exit(
                f"{path.stem}: there is no check.{name}; write it in src/flatmin/book/check/ and export it in its __init__.py"
            )

    for folder in ("student", "solution", "autograder"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        master = Path(work) / f"{path.stem}.ipynb"
        nbformat.write(otter_master(path, hidden_seed), master)
        with contextlib.redirect_stdout(io.StringIO()):
            assign(str(master), str(Path(work) / "dist"), no_pdfs=True, no_run_tests=True)
        [archive] = (Path(work) / "dist" / "autograder").glob("*.zip")
        shutil.copy(archive, out / "autograder" / f"{path.stem}.zip")
        student = nbformat.read(
            Path(work) / "dist" / "student" / f"{path.stem}.ipynb", as_version=4
        )
    written = {"student": clean(student), "solution": plain(path, solution)}
    for folder, nb in written.items():
        nbformat.validate(nb)
        nbformat.write(nb, out / folder / f"{path.stem}.ipynb")
    if leaked := leaks(out / "student" / f"{path.stem}.ipynb", path, hidden_seed):
        raise AssertionError(f"{path.stem}: the student notebook contains {leaked}")


def clean(nb):
    """A copy without metadata and outputs; without them, Otter runs all its tests at the end."""
    kept = [
        new_code_cell(cell.source) if cell.cell_type == "code" else new_markdown_cell(cell.source)
        for cell in nb.cells
    ]
    return numbered(new_notebook(cells=kept, metadata=METADATA))


def leaks(student, master, hidden_seed):
    """The parts of the solution or of the hidden tests that a student notebook contains."""
    nb, text = nbformat.read(student, as_version=4), Path(student).read_text()
    sources = [cell.source for cell in read(master)]
    common = {line.strip() for source in sources for line in exercise(source).splitlines()}
    secret = {
        line.strip()
        for source in sources
        for block in SOLUTION.finditer(source)
        for line in block[0].splitlines()
    } - common
    leaked = [line for line in secret if len(line) > 8 and json.dumps(line)[1:-1] in text]
    leaked += [
        word
        for word in ("BEGIN", "SOLUTION", "PROMPT", "verify", f"seed={hidden_seed}", "env.get")
        if word in text
    ]
    leaked += ["outputs" for cell in nb.cells if cell.get("outputs") or cell.get("execution_count")]
    leaked += ["cell metadata" for cell in nb.cells if cell.metadata or cell.get("attachments")]
    leaked += ["notebook metadata"] if nb.metadata != METADATA else []
    exercises = sum(
        cell.source.count("raise NotImplementedError")
        for cell in nb.cells
        if cell.cell_type == "code"
    )
    return leaked + (
        ["a question without its exercise"] if exercises != len(questions(read(master))) else []
    )


# --------------------------------------------------------------------------------------- grading

GRADE_ONE = """
import json, sys
from otter.api import grade_submission
graded = grade_submission(sys.argv[1], sys.argv[2], quiet=True)
if graded.has_catastrophic_failure():
    raise graded.catastrophic_error
results = {name: [[case.test_case.points, case.passed, case.message or ""]
                  for case in test.test_case_results]
           for name, test in graded.results.items()}
open(sys.argv[3], "w").write(json.dumps(results))
"""


def grade_one(submission, archive, limit=TIME_LIMIT):
    """{question: (points, [messages])} and a note, from a separate process with a time limit."""
    with tempfile.TemporaryDirectory() as work:
        result = Path(work) / "result.json"
        copy = shutil.copy(submission, Path(work) / "submission.ipynb")
        process = subprocess.Popen(
            [sys.executable, "-c", GRADE_ONE, str(copy), str(Path(archive).resolve()), str(result)],
            cwd=work,
            env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {}, f"not graded: stopped after {limit} seconds"
        if not result.exists():
            return {}, "not graded: " + (errors.strip().splitlines() or ["no result"])[-1]
        results = json.loads(result.read_text())
    return {
        name: (
            sum(worth for worth, passed, _ in cases if passed),
            [message for _, passed, message in cases if not passed],
        )
        for name, cases in results.items()
    }, ""


def reports(message):
    """The part of an Otter message that our check wrote."""
    return message[message.find("✗ check.") :].strip() if "✗ check." in message else message.strip()


def grade(path, folder, out, archive=None, jobs=1):
    """Grade the notebooks in a folder into a CSV: a row per submission, a column per question."""
    archive = archive or BUILD / "autograder" / f"{path.stem}.zip"
    if not archive.exists():
        sys.exit(f"{archive} is missing: make assignments")
    worth = questions(read(path))
    submissions = sorted(
        p for p in Path(folder).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
    )
    if not submissions:
        sys.exit(f"no notebook in {folder}")
    rows = []
    with ThreadPoolExecutor(jobs) as pool:
        for submission, (results, note) in zip(
            submissions, pool.map(lambda s: grade_one(s, archive), submissions)
        ):
            earned = {name: results[name][0] if name in results else 0 for name in worth}
            total = sum(earned.values())
            rows.append(
                {
                    "submission": str(submission.relative_to(folder)),
                    "total": f"{total:g}",
                    "out of": sum(worth.values()),
                    **{name: f"{v:g}" for name, v in earned.items()},
                    "note": note,
                }
            )
            remarks = {reports(message) for _, messages in results.values() for message in messages}
            feedback = Path(out).with_suffix("") / submission.relative_to(folder).with_suffix(
                ".txt"
            )
            feedback.parent.mkdir(parents=True, exist_ok=True)
            feedback.write_text(
                "\n\n".join([f"{total:g} of {sum(worth.values())} points", *sorted(remarks)]) + "\n"
            )
            print(
                f"  {rows[-1]['submission']}: {total:g} of {sum(worth.values())}  {note}",
                flush=True,
            )
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="an assignment, or the start of its name; default: all",
    )
    command.add_argument("--seed", type=int, default=HIDDEN_SEED, help="seed of the hidden tests")
    command = commands.add_parser("grade")
    command.add_argument("name", metavar="NAME")
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command.add_argument("-o", "--out", type=Path, default=Path("grades.csv"))
    command.add_argument("-j", "--jobs", type=int, default=1, help="submissions to grade at once")
    arguments = parser.parse_args()
    if arguments.command == "build":
        if arguments.seed < 1:
            parser.error("--seed must be a whole number >= 1; the checks that students see use 0")
        for path in masters(arguments.names):
            build(path, hidden_seed=arguments.seed)
            worth = questions(read(path))
            print(
                f"  {path.stem}: {len(worth)} questions, {sum(worth.values())} points", flush=True
            )
        print(f"assignments: {BUILD.relative_to(ROOT)}/{{student,solution,autograder}}")
    else:
        [path] = masters([arguments.name])
        grade(path, arguments.folder, arguments.out, jobs=arguments.jobs)
        print(f"grades: {arguments.out}; messages of the checks: {arguments.out.with_suffix('')}/")


if __name__ == "__main__":
    main()
