"""Build the assignments from their masters, and grade submissions.

    python tools/assignments.py build [NAME ...]              masters -> _build/assignments/
    python tools/assignments.py grade NAME FOLDER [-o FILE]   a folder of submissions -> a CSV

A master is assignments/NN_name.md.  A code cell tagged `points-4` is a question worth 4 points.  It
defines one function, named like the question and its check in flatmin.book.check, and its solution
is between `# BEGIN SOLUTION` and `# END SOLUTION`.  This script makes the rest: the exercise with
`raise NotImplementedError`, the cell that calls the check, and the autograder's two tests, a public
one with the student's inputs and a hidden one with others, worth half of the points each.
"""

import argparse
import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebooks import LANGUAGE, ROOT, bootstrap, choose, source
from otter.generate import main as generate

from flatmin._files import print_line, replace
from flatmin.book import check

MASTERS = ROOT / "assignments"
BUILD = ROOT / "_build" / "assignments"
HIDDEN_SEED = 2026  # of the hidden tests; a course sets its own: make assignments SEED=...
TIME_LIMIT = 600  # seconds per submission
SOLUTION = re.compile(r"^([ ]*)# BEGIN SOLUTION\n.*?# END SOLUTION$", re.S | re.M)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


# ---------------------------------------------------------------------------------------- masters


def masters(names=()):
    return choose("assignment", MASTERS, names)


def read(path):
    """The cells of a master."""
    return jupytext.read(path, fmt="md:myst").cells


def points(cell):
    """The points of a question's cell; 0 for other cells."""
    return sum(int(tag[7:]) for tag in cell.metadata.get("tags", ()) if tag.startswith("points-"))


def name_of(cell):
    """A question's name: that of its function."""
    [name] = re.findall(r"^def (\w+)", cell.source, re.M)
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


def notebook(cells):
    """A notebook of (type, source), without outputs and metadata."""
    new = {"code": new_code_cell, "markdown": new_markdown_cell}
    return new_notebook(
        cells=[new[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(cells)],
        metadata={"kernelspec": KERNEL, "language_info": LANGUAGE},
    )


def assemble(cells, convert):
    """A notebook from a master: a question becomes `convert(source)` and a call of its check."""
    parts = []
    for cell in cells:
        if points(cell):
            call = f"_ = check.{name_of(cell)}({name_of(cell)})"
            parts += [("code", convert(cell.source)), ("code", call)]
        else:
            parts.append((cell.cell_type, cell.source))
    return notebook([parts[0], ("code", bootstrap()), *parts[1:]])


def leaks(student, cells, hidden_seed):
    """What a student notebook contains of solutions, of the hidden tests, or of a run."""

    def lines(texts):
        return {line.strip() for text in texts for line in text.splitlines()}

    sources = [cell.source for cell in cells]
    secret = {line for line in lines(sources) - lines(map(exercise, sources)) if len(line) > 8}
    text = "\n".join(cell.source for cell in student.cells)
    leaked = [line for line in secret | {"verify", f"seed={hidden_seed}"} if line in text]
    if student != notebook([(cell.cell_type, cell.source) for cell in student.cells]):
        leaked.append("outputs or metadata")
    code = "\n".join(cell.source for cell in student.cells if cell.cell_type == "code")
    if code.count("raise NotImplementedError") != len(questions(cells)):
        leaked.append("a question without its exercise")
    return leaked


# --------------------------------------------------------------------------------- the autograder

OTTER_TESTS = """\
from flatmin.book import check
from otter.test_files import test_case

OK_FORMAT = False
name = "{name}"
points = None


@test_case(points={half:g}, hidden=False)
def public({name}):
    check.{name}.verify({name}, seed=0)


@test_case(points={half:g}, hidden=True)
def hidden({name}):
    check.{name}.verify({name}, seed={seed})
"""


def autograder(worth, hidden_seed):
    """The zip that Otter grades with, here and on Gradescope."""
    with tempfile.TemporaryDirectory() as work:
        made, config, requirements = (Path(work, name) for name in ("zip", "config", "packages"))
        for name, total in worth.items():
            tests = OTTER_TESTS.format(name=name, half=total / 2, seed=hidden_seed)
            replace(Path(work, f"{name}.py"), tests)
        replace(config, json.dumps({"show_hidden": False, "show_stdout": False}))
        replace(
            requirements,
            "--extra-index-url https://download.pytorch.org/whl/cpu\n"
            f"otter-grader>=7\nflatmin[all] @ {source()}\n",
        )
        generate(
            tests_dir=work,
            output_path=str(made),
            config=str(config),
            requirements=str(requirements),
            overwrite_requirements=True,
            no_environment=True,
        )
        return made.read_bytes()


def build(path, out=BUILD, hidden_seed=HIDDEN_SEED):
    """Write student notebook, solution and autograder, unless the first contains a solution."""
    cells = read(path)
    worth = questions(cells)
    for name in worth:
        if not hasattr(check, name):
            sys.exit(
                f"{path.stem}: there is no check.{name}; write it in src/flatmin/book/check/, and "
                "export it in its __init__.py"
            )
    written = {"student": assemble(cells, exercise), "solution": assemble(cells, solution)}
    if leaked := leaks(written["student"], cells, hidden_seed):
        raise AssertionError(f"{path.stem}: the student notebook contains {leaked}")
    for folder, nb in written.items():
        nbformat.validate(nb)
        replace(out / folder / f"{path.stem}.ipynb", nbformat.writes(nb) + "\n")
    replace(out / "autograder" / f"{path.stem}.zip", autograder(worth, hidden_seed))
    print(f"  {path.stem}: {len(worth)} questions, {sum(worth.values())} points", flush=True)


# --------------------------------------------------------------------------------------- grading

# A submission's kernel may have another name, or none that is known here.
GRADE_ONE = f"""
import json, sys, nbformat
from otter.api import grade_submission
submission, archive, result = sys.argv[1:]
nb = nbformat.read(submission, as_version=4)
nb.metadata["kernelspec"] = {KERNEL}
nbformat.write(nb, "submission.ipynb")
graded = grade_submission("submission.ipynb", archive, quiet=True)
if graded.has_catastrophic_failure():
    raise graded.catastrophic_error
messages = lambda test: [case.message for case in test.test_case_results if not case.passed]
with open(result, "w", encoding="utf-8") as file:
    json.dump({{name: [test.score, messages(test)] for name, test in graded.results.items()}}, file)
"""


def grade_one(submission, archive, limit=TIME_LIMIT):
    """{question: [points, [messages]]} and a note, from a separate process with a time limit."""
    with tempfile.TemporaryDirectory() as work:
        result = Path(work, "result.json")
        process = subprocess.Popen(
            [sys.executable, "-c", GRADE_ONE, submission.resolve(), archive.resolve(), result],
            cwd=work,
            env={**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {}, f"not graded: stopped after {limit} seconds"
        if not result.exists():
            return {}, "not graded: " + (errors.strip().splitlines() or ["no result"])[-1]
        return json.loads(result.read_text(encoding="utf-8")), ""


def grade(path, folder, out, archive=None, jobs=1):
    """Grade the notebooks in a folder into a CSV: a row per submission, a column per question."""
    archive, feedback = archive or BUILD / "autograder" / f"{path.stem}.zip", out.with_suffix("")
    if not archive.exists():
        sys.exit(f"{archive} is missing: make assignments")
    if feedback.resolve() in (out.resolve(), folder.resolve()):
        sys.exit(
            f"the table must be a file such as grades.csv, got {out}; "
            f"feedback goes into the folder {feedback}"
        )
    submissions = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() == ".ipynb" and p.is_file() and ".ipynb_checkpoints" not in p.parts
    )
    if not submissions:
        sys.exit(f"no notebook in {folder}")
    worth = questions(read(path))
    rows = [["submission", "total", "out of", *worth, "note"]]
    with ThreadPoolExecutor(jobs) as pool:
        graded = pool.map(lambda submission: grade_one(submission, archive), submissions)
        for submission, (results, note) in zip(submissions, graded):
            name = submission.relative_to(folder)
            earned = [results.get(question, [0])[0] for question in worth]
            total, most = f"{sum(earned):g}", sum(worth.values())
            rows.append([name, total, most, *(f"{points:g}" for points in earned), note])
            said = {text for _, messages in results.values() for text in messages}
            remarks = sorted({text[max(text.find("✗ check."), 0) :].strip() for text in said})
            text = "\n\n".join([f"{total} of {most} points", *remarks, note]).strip() + "\n"
            replace(feedback / name.with_suffix(".txt"), text)
            table = io.StringIO()
            csv.writer(table).writerows(rows)
            replace(out, table.getvalue().encode(errors="surrogateescape"))  # any file name
            print_line(f"  {name}: {total} of {most}  {note}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    option = commands.add_parser("build").add_argument
    option("names", nargs="*", metavar="NAME", help="the start of a name; default: all")
    option("--seed", type=int, default=HIDDEN_SEED, help="seed of the hidden tests")
    option = commands.add_parser("grade").add_argument
    option("name", metavar="NAME")
    option("folder", type=Path, metavar="FOLDER")
    option("-o", "--out", type=Path, default=Path("grades.csv"))
    option("-j", "--jobs", type=int, default=1, help="submissions to grade at once")
    arguments = parser.parse_args()
    if arguments.command == "build":
        if arguments.seed < 1:
            parser.error("--seed must be a whole number >= 1; the checks that students see use 0")
        for path in masters(arguments.names):
            build(path, hidden_seed=arguments.seed)
        print(f"assignments: {BUILD.relative_to(ROOT)}/{{student,solution,autograder}}")
    else:
        path, *others = masters([arguments.name])
        if others:
            parser.error(f"NAME must be that of one assignment, got {arguments.name!r}")
        grade(path, arguments.folder, arguments.out, jobs=arguments.jobs)
        print(f"grades: {arguments.out}; messages of the checks: {arguments.out.with_suffix('')}/")


if __name__ == "__main__":
    main()
