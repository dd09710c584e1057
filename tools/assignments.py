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
import contextlib
import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from notebooks import LANGUAGE, ROOT, bootstrap, choose, repository, source
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
    """All of them, or those whose names start so; 4 is 04."""
    return choose(
        "assignment", MASTERS, [f"0{n}" if re.fullmatch("[0-9]", n) else n for n in names]
    )


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


NEW_CELL = {"code": new_code_cell, "markdown": new_markdown_cell}


def notebook(cells):
    """A notebook of (type, source), without outputs and metadata."""
    return new_notebook(
        cells=[NEW_CELL[kind](text, id=f"cell-{i}") for i, (kind, text) in enumerate(cells)],
        metadata={"kernelspec": KERNEL, "language_info": LANGUAGE},
    )


HOW_TO_WORK = """\
**To work in Colab**, choose *File → Upload notebook* at colab.research.google.com and upload this \
file. On your own machine, open it in JupyterLab, with Python 3.11 or newer. Either way the next \
cell installs what is missing; no GPU is needed, and once it is solved the notebook runs in about a \
minute. Save often: in Colab, with *File → Download → Download .ipynb*.

**Hand in** this notebook, `{name}.ipynb`, with your code in place of each `raise \
NotImplementedError`. Leave the names of the functions and the cells with checks as they are; what \
the cells print is not graded, since everything is run again. A question without an answer may stay \
as it is.

**The rules**, how checks compare, and what they cannot see: [Assignments]({page})."""


def how_to_work(name):
    """What a student needs to know who has only the notebook."""
    repo = repository()
    page = f"{repo['url']}/blob/{repo['branch']}/{repo['path_to_book']}/assignments.md"
    return HOW_TO_WORK.format(name=name, page=page)


def assemble(cells, convert, name="assignment"):
    """A notebook from a master: a question becomes `convert(source)` and a call of its check."""
    parts = []
    for cell in cells:
        if points(cell):
            call = f"_ = check.{name_of(cell)}({name_of(cell)})"
            parts += [("code", convert(cell.source)), ("code", call)]
        else:
            parts.append((cell.cell_type, cell.source))
    first = [parts[0], ("markdown", how_to_work(name)), ("code", bootstrap())]
    return notebook([*first, *parts[1:]])


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
"""

OTTER_CASE = """

@test_case(points={points!r}, hidden={hidden})
def {kind}_{i}({name}):
    check.{name}.verify({name}, seed={seed}, part={part!r})
"""


def otter_tests(name, total, parts, hidden_seed):
    """Otter's file for a question: half of the points for each seed, shared by the check's parts."""
    text = OTTER_TESTS.format(name=name)
    for kind, seed in (("public", 0), ("hidden", hidden_seed)):
        for i, part in enumerate(parts, 1):
            text += OTTER_CASE.format(
                points=total / 2 / len(parts), hidden=kind == "hidden", kind=kind, i=i, name=name,
                seed=seed, part=part,
            )  # fmt: skip
    return text


def parts_of(cells):
    """{question: the names of its check's parts}.

    The reference solution is run, and must pass; those of the experiments, which take longer, are
    not run.
    """
    env, parts = {}, {}
    for cell in cells:
        if cell.cell_type == "code":
            exec(compile(solution(cell.source), "reference", "exec"), env)
    for name in questions(cells):
        question = getattr(check, name)
        parts[name] = list(question.parts)
        if not parts[name]:
            report = question.run(env[name])
            if not report:
                sys.exit(f"the reference solution of {name} fails:\n{report}")
            parts[name] = list(report.mistakes)
    return parts


def pinned_source():
    """Where pip finds the package as it is here: a branch is replaced by its commit."""
    address, _, branch = source().rpartition("@")
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return f"{address}@{branch if found.returncode else found.stdout.strip()}"


def seed_of(archive):
    """The seed of an autograder's hidden tests, or None."""
    if not archive.exists():
        return None
    with zipfile.ZipFile(archive) as made:
        tests = "".join(
            made.read(name).decode() for name in made.namelist() if name.endswith(".py")
        )
    seeds = set(re.findall(r"seed=(\d+)", tests)) - {"0"}
    return int(seeds.pop()) if seeds else None


def autograder(worth, parts, hidden_seed):
    """The zip that Otter grades with, here and on Gradescope."""
    with tempfile.TemporaryDirectory() as work:
        made, config, requirements = (Path(work, name) for name in ("zip", "config", "packages"))
        for name, total in worth.items():
            tests = otter_tests(name, total, parts[name], hidden_seed)
            replace(Path(work, f"{name}.py"), tests)
        replace(config, json.dumps({"show_hidden": False, "show_stdout": False}))
        replace(
            requirements,
            "--extra-index-url https://download.pytorch.org/whl/cpu\n"
            f"otter-grader=={version('otter-grader')}\nflatmin[all] @ {pinned_source()}\n",
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
    written = {
        folder: assemble(cells, convert, path.stem)
        for folder, convert in (("student", exercise), ("solution", solution))
    }
    if leaked := leaks(written["student"], cells, hidden_seed):
        raise AssertionError(f"{path.stem}: the student notebook contains {leaked}")
    for folder, nb in written.items():
        nbformat.validate(nb)
        replace(out / folder / f"{path.stem}.ipynb", nbformat.writes(nb) + "\n")
    archive = out / "autograder" / f"{path.stem}.zip"
    other = seed_of(archive) not in (None, hidden_seed)
    replace(archive, autograder(worth, parts_of(cells), hidden_seed))
    print(
        f"  {path.stem}: {len(worth)} questions, {sum(worth.values())} points"
        + ("; its hidden tests had another seed before" if other else ""),
        flush=True,
    )


# ------------------------------------------------------------------------------- submissions


class NotGraded(Exception):
    """Why a submission cannot be graded."""


READABLE = (".ipynb", ".ipynb.txt", ".ipynb.json", ".py")
LARGEST = 50e6  # bytes of a notebook in a zip


def submissions(folder):
    """(name, function that returns the notebook) of everything that was handed in.

    Hidden files are left out, and so are the copies that Jupyter and macOS make.  A zip gives each
    notebook in it.  What cannot be graded is here too: its function says why.
    """
    unreadable = []
    for here, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in folders:
            path = Path(here, name)
            if path.is_symlink():
                yield label(folder, path), refuse("a link to a folder, which is not followed")
            elif name.lower().endswith(READABLE):
                yield label(folder, path), refuse("a folder with the name of a notebook")
        for name in sorted(name for name in files if not hidden(name)):
            path = Path(here, name)
            if name.lower().endswith(".zip"):
                yield from in_zip(label(folder, path), path)
            else:
                yield label(folder, path), lambda path=path: parse(path.name, contents(path))
    for error in unreadable:
        yield label(folder, Path(error.filename)), refuse(f"a folder: {error.strerror}")


def hidden(name):
    return (name.startswith(".") and name.strip(".")) or name == "__MACOSX"


def label(folder, path):
    """Its path in the folder, which no spreadsheet takes for a formula."""
    name = path.relative_to(folder).as_posix()
    return f"./{name}" if name[0] in "=+-@" else name


def refuse(reason):
    def raises():
        raise NotGraded(reason)

    return raises


def contents(path):
    """The bytes of a file."""
    if path.is_symlink() and not path.exists():
        raise NotGraded("a link that leads nowhere")
    if not path.is_file():
        raise NotGraded("no file")
    return path.read_bytes()


def in_zip(name, path):
    try:
        archive = zipfile.ZipFile(io.BytesIO(contents(path)))
    except Exception as error:  # a zip can be wrong in many ways
        yield name, refuse(f"a zip that cannot be opened: {error}")
        return
    members = [
        member
        for member in archive.infolist()
        if member.filename.lower().endswith(READABLE)
        and not any(hidden(part) for part in Path(member.filename).parts)
    ]
    if not members:
        yield name, refuse("a zip without a notebook")
    for member in members:

        def extracted(member=member):
            if member.file_size > LARGEST:
                raise NotGraded(f"larger than {LARGEST / 1e6:g} MB")
            return parse(member.filename, archive.read(member))

        yield f"{name}/{member.filename.lstrip('/')}", extracted


def parse(name, content):
    """A notebook from a file's bytes: JSON, or a program whose cells jupytext knows."""
    if not name.lower().endswith(READABLE):
        raise NotGraded(f"no notebook, but a file of the type {Path(name).suffix or name}")
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError:
        raise NotGraded("no notebook: its text is not UTF-8") from None
    try:
        if name.lower().endswith(".py"):
            nb = jupytext.reads(text, fmt="py")
        else:
            nb = nbformat.reads(text, as_version=4)
        sources = [(cell.cell_type, cell.source) for cell in nb.cells if cell.cell_type in NEW_CELL]
        return notebook(sources)  # whatever else in it may be wrong
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotGraded(f"no notebook: {reason[:200]}") from None


def check_assignment(nb, path):
    """Refuse the notebook of another assignment."""
    code = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    defined = set(re.findall(r"^def (\w+)", code, re.M))
    theirs = [other.stem for other in masters() if defined & questions(read(other)).keys()]
    if theirs and path.stem not in theirs:
        raise NotGraded(f"this is the assignment {' and '.join(theirs)}, not {path.stem}")


# --------------------------------------------------------------------------------------- grading

GRADE_ONE = """
import json, sys
from otter.api import grade_submission
submission, archive, result = sys.argv[1:]
graded = grade_submission(submission, archive, quiet=True)
if graded.has_catastrophic_failure():
    raise graded.catastrophic_error
said = lambda test: [
    [case.test_case.hidden, case.message] for case in test.test_case_results if not case.passed
]
with open(result, "w", encoding="utf-8") as file:
    json.dump({name: [test.score, said(test)] for name, test in graded.results.items()}, file)
"""
# The grader looks for what a notebook leaves in the directory where it began.
STAY = "import os as _os; _here = _os.getcwd()", "_os.chdir(_here)"


class NoKernel(NotGraded):
    """No fault of the submission: kernels that start at once can choose the same port."""


NO_KERNEL = re.compile("Kernel (died before replying to kernel_info|didn't respond in)")
TRIES = 3


def grade_one(nb, archive, limit=TIME_LIMIT):
    """{question: [points, [(hidden, message)]]} of a notebook, from a process with a time limit.

    If its kernel does not start, it is tried again.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(NoKernel):
            return grade_once(nb, archive, limit)
    return grade_once(nb, archive, limit)


def grade_once(nb, archive, limit):
    first, last = map(new_code_cell, STAY)
    # the name of their kernel may be unknown here
    nb = new_notebook(cells=[first, *nb.cells, last], metadata={"kernelspec": KERNEL})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        result, errors = Path(work, "result.json"), Path(work, "errors.txt")
        nbformat.write(nb, Path(work, "submission.ipynb"))
        with errors.open("wb") as stderr:  # no pipe, which what a notebook starts would keep open
            process = subprocess.Popen(
                [sys.executable, "-c", GRADE_ONE, "submission.ipynb", archive.resolve(), result],
                cwd=work,
                env={
                    **os.environ,
                    "TQDM_DISABLE": "1",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONUTF8": "1",
                    "PIP_TARGET": work,  # what a notebook installs is gone with it
                },
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            RUNNING.add(process)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                stop(process)
                raise NotGraded(f"stopped after {limit} seconds") from None
            finally:
                RUNNING.discard(process)
        if not result.exists():
            said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = (said or [f"ended with code {process.returncode}"])[-1]
            if NO_KERNEL.search(last):
                raise NoKernel(f"its kernel did not start, so grade it again: {last}")
            raise NotGraded(f"the notebook ended the grader: {last}")
        return json.loads(result.read_text(encoding="utf-8"))


RUNNING = set()  # processes that grade


def stop(process):
    """End a process and all that it started: a kernel has a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def remarks(results):
    """What the checks said, by question.

    Of the hidden tests only the parts and the hint, if they are others, and never the seed.
    """
    found = []
    for name, (_, messages) in results.items():
        told = set()
        for hidden, text in sorted(messages):  # the public one first
            start = text.find("✗ check.")
            said = text[start:].strip() if start >= 0 else BROKEN.format(name=name)
            brief = "\n".join(re.findall(r"^(?:✗ check.*| +[✓✗] .*| +hint: .*)$", said, re.M))
            if (brief or said) not in told:
                told.add(brief or said)
                found.append(f"With other inputs:\n{brief}" if hidden and brief else said)
    return [re.sub(r"seed\s*=\s*\d+", "seed=…", text) for text in found]


BROKEN = "check.{name} ended with an error of its own. Ask your instructor."


def broken(results):
    """For the instructor: which checks ended with an error, and which."""
    return "; ".join(
        f"check.{name} ended with an error: {text.strip().splitlines()[-1]}"
        for name, (_, messages) in results.items()
        for text in dict.fromkeys(text for _, text in messages)
        if text.strip() and "✗ check." not in text
    )


def check_target(out, folder):
    """Refuse, before anything is graded, a table that could not be written or would do harm."""
    inside = folder.resolve()
    if not folder.is_dir() or inside == ROOT or inside in ROOT.parents:
        sys.exit(f"FROM must be a folder of submissions, got {folder}")
    if not out.suffix or out.is_dir():
        sys.exit(f"TO must be a file such as grades.csv, got {out}")
    feedback = out.with_suffix("")
    for name, path in (("table", out.resolve()), ("folder of feedback", feedback.resolve())):
        if path == inside or inside in path.parents or path in inside.parents:
            sys.exit(
                f"TO must keep the {name} apart from the submissions: {path} and {inside} "
                "lie in one another"
            )
    if feedback.exists() and not feedback.is_dir():
        sys.exit(f"TO needs the folder {feedback} for feedback, but there is a file of this name")
    try:
        feedback.mkdir(parents=True, exist_ok=True)
        for place in (out.parent, feedback):
            tempfile.TemporaryFile(dir=place).close()
        if out.exists():
            out.open("r+b").close()
    except OSError as error:
        sys.exit(f"TO must be a place that can be written to, got {out}: {error.strerror}")
    return feedback


def write_feedback(folder, number, name, text, taken):
    """Write a submission's text, and return where: under its name, or its number in the table."""
    inside = [part for part in Path(name).parts if part not in ("..", "/")]
    path = folder / Path(*inside[:-1], f"{inside[-1]}.txt")
    content = text.encode(errors="replace")
    try:
        if str(path).lower() in taken or path.is_dir():
            raise FileExistsError
        replace(path, content)
    except OSError:  # a name that is too long, another's, or that of another's folder
        path = folder / f"{number}.txt"
        while str(path).lower() in taken or path.is_dir():
            path = path.with_name(f"_{path.name}")
        replace(path, content)
    taken.add(str(path).lower())
    return path.relative_to(folder).as_posix()


def grade(path, folder, out, archive=None, jobs=1):
    """Grade what lies in a folder into a CSV: a row per submission, a column per question."""
    archive = archive or BUILD / "autograder" / f"{path.stem}.zip"
    feedback = check_target(out, folder)
    if not archive.exists():
        sys.exit(f"{archive} is missing: make assignments")
    found = list(submissions(folder))
    if not found:
        sys.exit(f"nothing was handed in: no file in {folder}")
    worth = questions(read(path))

    def graded(submission):
        """Its results, and why there are none; nothing that a submission does ends the grading."""
        try:
            nb = submission[1]()
            check_assignment(nb, path)
            results = grade_one(nb, archive)
            return {name: results[name] for name in worth if name in results}, broken(results)
        except NotGraded as reason:
            note = f"not graded: {reason}"
        except Exception as error:
            note = f"not graded: {type(error).__name__}: {error}".splitlines()[0]
        return {}, note.encode(errors="replace").decode()

    rows = [["submission", "total", "out of", *worth, "note", "feedback"]]
    taken, often = set(), Counter()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, (name, _), (results, note) in zip(
                itertools.count(1), found, pool.map(graded, found)
            ):
                often[name] += 1  # in a zip two can have one name
                name += f" ({often[name]})" * (often[name] > 1)
                earned = [round(results.get(question, [0])[0], 2) for question in worth]
                total, most = f"{sum(earned):g}", sum(worth.values())
                parts = [f"{total} of {most} points", *remarks(results)] if results else [note]
                text = "\n\n".join(parts) + "\n"
                told = write_feedback(feedback, number, name, text, taken)
                points = (f"{points:g}" for points in earned)
                rows.append([name, total, most, *points, note, told])
                table = io.StringIO()
                csv.writer(table).writerows(rows)
                replace(out, table.getvalue().encode(errors="surrogateescape"))  # any file name
                print_line(f"  {name}: {f'{total} of {most}' if results else note}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*RUNNING]:
                stop(process)
            sys.exit(f"stopped; {out} has {len(rows) - 1} of {len(found)} submissions")


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
    option("-o", "--out", type=Path, help="the table; default: grades_NAME.csv")
    option("-j", "--jobs", type=int, default=1, help="submissions to grade at once")
    arguments = parser.parse_args()
    if arguments.command == "build":
        if arguments.seed < 1:
            parser.error("--seed must be a whole number >= 1; the checks that students see use 0")
        for path in masters(arguments.names):
            build(path, hidden_seed=arguments.seed)
        if arguments.seed == HIDDEN_SEED:
            print(f"The hidden tests have the public seed {HIDDEN_SEED}. Your own: SEED=…")
        print(f"assignments: {BUILD.relative_to(ROOT)}/{{student,solution,autograder}}")
    else:
        path, *others = masters([arguments.name])
        if others:
            parser.error(f"NAME must be that of one assignment, got {arguments.name!r}")
        out = arguments.out or Path(f"grades_{path.stem}.csv")
        grade(path, arguments.folder, out, jobs=arguments.jobs)
        print(f"grades: {out}; messages of the checks: {out.with_suffix('')}/")


if __name__ == "__main__":
    main()
