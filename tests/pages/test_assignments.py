"""The assignments: no solution in students' notebooks, and the right points for each answer."""

import ast
import csv
import io
import re
import zipfile
from collections import Counter

import nbformat
import pytest
from notebooks import BOOK, ROOT
from otter.test_files import ExceptionTestFile

import assignments
from flatmin.book import check

MASTERS = assignments.masters()
EXPERIMENTS = {
    "memorization",
    "flooding_effect",
    "level_walk",
    "stiffness_effect",
    "mixup_effect",
    "sam_effect",
    "sharpness_effect",
}
# those graded by Otter itself, one per assignment
NAMED = [
    "paired_interval__unpaired",
    "accumulate__sign_lost",
    "two_rate_loss__factor_two",
    "class_means__diagonal_left_in",
    "dirichlet_mixup__per_class",
    "sam_step__not_restored",
    "lanczos__no_reorthogonalization",
]


def worth(path):
    return assignments.questions(assignments.read(path))


def wrong(path):
    """{question__mistake: (question, what the check must say, source)} of assignments/wrong/."""
    text = (path.parent / "wrong" / f"{path.stem}.py").read_text(encoding="utf-8")
    found = re.findall(r'^def ((\w+?)__\w+)\(.*\):\n    """(.*)"""$', text, re.M)
    assert len(found) == text.count("\ndef ")
    return {
        name: (question, said, f"{text}\n{question} = {name}\n") for name, question, said in found
    }


WRONG = {(path, name): answer for path in MASTERS for name, answer in wrong(path).items()}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The output of `make assignments`, in a separate folder."""
    out = tmp_path_factory.mktemp("assignments")
    for path in MASTERS:
        assignments.build(path, out)
    return out


@pytest.fixture(params=MASTERS, ids=lambda path: path.stem)
def path(request):
    return request.param


def notebook(path, convert):
    return assignments.assemble(assignments.read(path), convert)


def environment(path, convert=assignments.solution, without=None):
    """The names that a master's cells define, with each question's source converted."""
    env = {}
    for cell in assignments.read(path):
        if cell.cell_type == "code" and assignments.points(cell) == 0:
            exec(cell.source, env)
        elif cell.cell_type == "code" and assignments.name_of(cell) != without:
            exec(compile(convert(cell.source), path.stem, "exec"), env)
    return env


def scores(built, path, env, names):
    """{question: (points, messages)} by the autograder's own test files, without a kernel."""
    graded = {}
    for name in names:
        test = autograder_test(built, path, name)
        test.run(env)
        failed = [result.message for result in test.test_case_results if not result.passed]
        graded[name] = test.score, "\n".join(failed)
    return graded


def autograder_test(built, path, name):
    with zipfile.ZipFile(built / "autograder" / f"{path.stem}.zip") as archive:
        return ExceptionTestFile.from_string(archive.read(f"tests/{name}.py").decode())


# ---------------------------------------------------------------------------------------- masters


def test_chapters_1_to_7_have_an_assignment():
    chapters = sorted(path.name for path in (ROOT / "book").glob("0[1-7]_*.md"))
    assert [path.name for path in MASTERS] == chapters and len(MASTERS) == 7


def test_time_points_and_prerequisites_are_stated(path):
    first, *rest = [cell.source for cell in assignments.read(path)]
    assert re.search(r"\*\*Time:\*\* about \S+", first) and "**You need:**" in first
    number = {4: "four", 5: "five", 6: "six"}[len(worth(path))]
    assert f"**Points:** {sum(worth(path).values())}, in {number} questions." in first
    headings = re.findall(r"^## Question (\d) \((\d) points\): \w", "\n".join(rest), re.M)
    assert [(int(n), int(p)) for n, p in headings] == list(enumerate(worth(path).values(), 1))
    assert len(EXPERIMENTS & set(worth(path))) == 1


def test_every_question_has_a_docstring_and_an_exercise(path):
    for cell in assignments.read(path):
        if assignments.points(cell):
            [function] = ast.parse(assignments.exercise(cell.source)).body
            assert ast.get_docstring(function)
            assert ast.unparse(function.body[1:]) == "raise NotImplementedError"
            assert "SOLUTION" not in assignments.solution(cell.source)


def test_every_question_has_one_check_and_every_check_a_question():
    questions = Counter(name for path in MASTERS for name in worth(path))
    assert questions == Counter({*check.__all__} - {"Check", "Report"})


def test_the_page_for_students_shows_the_message_of_a_check():
    env, (_, _, source) = {}, WRONG[MASTERS[1], "flooded_step__decay_flooded"]
    exec(source, env)
    page = (BOOK / "assignments.md").read_text(encoding="utf-8")
    assert f"```text\n{check.flooded_step.run(env['flooded_step'])}\n```" in page


def test_the_page_for_instructors_shows_a_check_that_works():
    from flatmin.book.check.grading import question

    page = (BOOK / "instructors.md").read_text(encoding="utf-8")
    env = {"question": question, "torch": check.grading.torch}
    exec(re.search(r"```python\n(@question\n.*?)```", page, re.S)[1], env)
    assert env["margins"].run(environment(MASTERS[0])["margins"])
    mistaken = env["margins"].run(lambda z, y: z.gather(1, y[:, None])[:, 0] - z.amax(1))
    assert "took part in the maximum" in str(mistaken)


# ---------------------------------------------------------------------- students' notebooks


def test_student_notebooks_hold_no_solution(built, path):
    text = (built / "student" / f"{path.stem}.ipynb").read_text(encoding="utf-8")
    nb, cells = nbformat.reads(text, as_version=4), assignments.read(path)
    assert assignments.leaks(nb, cells, assignments.HIDDEN_SEED) == []
    assert nb.cells[0].source.startswith("# Assignment") and "flatmin" in nb.cells[1].source
    assert "otter" not in text
    calls = Counter(cell.source for cell in nb.cells)
    assert all(calls[f"_ = check.{name}({name})"] == 1 for name in worth(path))


def code_of(nb, name):
    return next(cell for cell in nb.cells if f"def {name}" in cell.source)


def add(cell, text):
    cell.source += text


LINE = "fall, rise = -math.log(1 - down), math.log(1 + up)  # p · rise = (1 - p) · fall"


@pytest.mark.parametrize(
    "leak",
    [
        lambda nb: add(code_of(nb, "flooded_step"), "\n# sign = 1 if loss > flood_level else -1"),
        lambda nb: add(nb.cells[0], LINE),
        lambda nb: add(nb.cells[0], f"seed={assignments.HIDDEN_SEED}"),
        lambda nb: nb.cells[1].outputs.append(nbformat.v4.new_output("stream", text="ok")),
        lambda nb: nb.cells[1].metadata.update(note="x"),
        lambda nb: nb.metadata.update(otter={"tests": {}}),
        lambda nb: nb.cells.remove(code_of(nb, "flooded_step")),
    ],
    ids=["code", "text", "hidden seed", "output", "metadata", "notebook metadata", "no exercise"],
)
def test_a_leak_is_found(leak):
    nb, cells = notebook(MASTERS[1], assignments.exercise), assignments.read(MASTERS[1])
    assert assignments.leaks(nb, cells, assignments.HIDDEN_SEED) == []
    leak(nb)
    assert assignments.leaks(nb, cells, assignments.HIDDEN_SEED)


def test_nothing_is_written_that_leaks(tmp_path, monkeypatch):
    monkeypatch.setattr(assignments, "exercise", lambda source: source)
    with pytest.raises(AssertionError, match="02_flooding: the student notebook contains"):
        assignments.build(MASTERS[1], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_course_can_have_hidden_tests_of_its_own(built, tmp_path):
    assignments.build(MASTERS[3], tmp_path, hidden_seed=77)
    for folder, seed in ((tmp_path, 77), (built, assignments.HIDDEN_SEED)):
        test = autograder_test(folder, MASTERS[3], "cosines")
        assert f"seed={seed}" in test.source and "seed=0" in test.source
        cases = [(case.points, case.hidden) for case in test.test_cases]
        assert cases == [(1.5, False), (1.5, True)]


# ------------------------------------------------------------- grades, by the autograder's tests


def test_the_reference_gets_all_points_but_the_experiments(built, path):
    names = [name for name in worth(path) if name not in EXPERIMENTS]
    for name, (score, messages) in scores(built, path, environment(path), names).items():
        assert score == worth(path)[name], messages


def test_a_blank_notebook_scores_nothing(built, path):
    for env in (environment(path, assignments.exercise), {}):
        graded = scores(built, path, env, worth(path))
        assert {name: score for name, (score, _) in graded.items()} == dict.fromkeys(worth(path), 0)


def test_there_are_at_least_five_wrong_answers_per_assignment(path):
    assert len(wrong(path)) >= 5
    assert {question for question, _, _ in wrong(path).values()} == set(worth(path))


def cheap(name):
    question, _, mistake = name.partition("__")
    return question not in EXPERIMENTS or mistake in ("not_a_dict", "raises")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=name, marks=[] if cheap(name) else pytest.mark.course)
        for path, name in WRONG
    ],
)
def test_a_wrong_answer_loses_its_points_with_a_hint(built, path, name, monkeypatch):
    """And it loses no other points: each check gets only its own function."""
    question, phrase, source = WRONG[path, name]
    if name == "level_walk__endless":
        monkeypatch.setattr(check.level_walk, "seconds", 1)
    env = environment(path, without=question)
    exec(compile(source, name, "exec"), env)
    other = next(name for name in worth(path) if name not in EXPERIMENTS | {question})
    graded = scores(built, path, env, [question, other])
    score, messages = graded[question]
    assert score == 0 and messages.count(phrase) == 2, messages  # for public and hidden inputs
    assert graded[other][0] == worth(path)[other]


# ------------------------------------------------------------------------------- grades, by Otter


def graded(built, path, nb, tmp_path):
    """The points of a notebook, saved with the name of a kernel that is not installed here."""
    nb.metadata["kernelspec"] = {"name": "conda-env-ml-py", "display_name": "Python [conda env:ml]"}
    nbformat.write(nb, tmp_path / "submission.ipynb")
    results, note = assignments.grade_one(
        tmp_path / "submission.ipynb", built / "autograder" / f"{path.stem}.zip"
    )
    assert note == ""
    return {name: points for name, (points, _) in results.items()}


@pytest.mark.course
def test_otter_gives_the_reference_full_marks(built, path, tmp_path):
    nb = nbformat.read(built / "solution" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, nb, tmp_path) == worth(path)


@pytest.mark.course
def test_otter_gives_a_blank_notebook_nothing(built, path, tmp_path):
    nb = nbformat.read(built / "student" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, nb, tmp_path) == dict.fromkeys(worth(path), 0)


@pytest.mark.course
@pytest.mark.parametrize(("path", "name"), list(zip(MASTERS, NAMED)), ids=NAMED)
def test_otter_subtracts_the_points_of_one_mistake(built, path, name, tmp_path):
    """The experiment is left blank, to save time: it loses its own points and no others."""
    question, _, source = WRONG[path, name]
    lost = {question} | EXPERIMENTS

    def answered(text):
        defined = {node.name for node in ast.parse(text).body}
        if question in defined:
            return source
        return (assignments.exercise if defined & EXPERIMENTS else assignments.solution)(text)

    expected = {name: 0 if name in lost else points for name, points in worth(path).items()}
    assert graded(built, path, notebook(path, answered), tmp_path) == expected


def test_an_interruption_keeps_what_is_graded(tmp_path, monkeypatch):
    (tmp_path / "ada.IPYNB").touch()
    (tmp_path / "bob.ipynb").touch()

    def one(submission, archive):
        if submission.name == "bob.ipynb":
            raise KeyboardInterrupt
        return {}, "not graded: no JSON"

    monkeypatch.setattr(assignments, "grade_one", one)
    out, archive = tmp_path / "grades.csv", tmp_path / "ada.IPYNB"
    with pytest.raises(KeyboardInterrupt):
        assignments.grade(MASTERS[3], tmp_path, out, archive)
    assert "ada.IPYNB,0,20," in out.read_text(encoding="utf-8")
    feedback = (tmp_path / "grades" / "ada.txt").read_text(encoding="utf-8")
    assert feedback == "0 of 20 points\n\nnot graded: no JSON\n"


@pytest.mark.course
def test_a_folder_becomes_a_table(built, tmp_path, monkeypatch, capsys):
    """Even if half of the answers are missing, a file is no notebook, or a cell never ends."""
    path, folder, out = MASTERS[3], tmp_path / "submissions", tmp_path / "grades.csv"
    (folder / "late" / "folder.ipynb").mkdir(parents=True)
    some = notebook(
        path,
        lambda text: (
            assignments.solution(text) if "def cosines" in text else assignments.exercise(text)
        ),
    )
    nbformat.write(some, folder / "ada.ipynb")
    (folder / "late" / "bob.ipynb").write_text("{", encoding="utf-8")
    some.cells.insert(1, nbformat.v4.new_code_cell("while True: pass"))
    nbformat.write(some, folder / "cyd.ipynb")
    one = assignments.grade_one
    monkeypatch.setattr(
        assignments, "grade_one", lambda s, a: one(s, a, 20 if "cyd" in s.name else 60)
    )
    archive = built / "autograder" / f"{path.stem}.zip"
    for taken in (tmp_path / "grades", tmp_path / "submissions.csv"):
        with pytest.raises(SystemExit, match="a file such as grades.csv"):
            assignments.grade(path, folder, taken, archive)
    assignments.grade(path, folder, out, archive, jobs=2)
    header, *rows = csv.reader(io.StringIO(out.read_text(encoding="utf-8")))
    assert header == ["submission", "total", "out of", *worth(path), "note"]
    ada, cyd, bob = (dict(zip(header, row)) for row in rows)
    assert ada == {
        **dict.fromkeys(worth(path), "0"),
        "submission": "ada.ipynb",
        "total": "3",
        "out of": "20",
        "cosines": "3",
        "note": "",
    }
    assert cyd["submission"] == "cyd.ipynb"
    assert cyd["note"] == "not graded: stopped after 20 seconds"
    assert bob["submission"] == "late/bob.ipynb" and bob["total"] == "0"
    assert bob["note"].startswith("not graded: ")
    feedback = (tmp_path / "grades" / "ada.txt").read_text(encoding="utf-8")
    assert feedback.startswith("3 of 20 points\n") and feedback.count("✗ check.") == 4
    assert "Not answered yet" in feedback and "ada.ipynb: 3 of 20" in capsys.readouterr().out


@pytest.mark.course
def test_a_student_runs_all_cells_in_jupyter(built, tmp_path):
    """No cell stops the notebook; an endless loop is stopped, in the kernel's main thread."""
    from nbclient import NotebookClient

    nb = nbformat.read(built / "student" / f"{MASTERS[1].stem}.ipynb", as_version=4)
    cell = code_of(nb, "flooded_step")
    cell.source = cell.source.replace("raise NotImplementedError", "while True: pass")
    cell.source += "\ncheck.flooded_step.seconds = 0.5"
    NotebookClient(
        nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    checks = [cell for cell in nb.cells if cell.source.startswith("_ = check.")]
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in checks]
    assert len(printed) == len(worth(MASTERS[1]))
    for question, text in zip(worth(MASTERS[1]), printed):
        endless = question == "flooded_step"
        assert text.startswith(f"✗ check.{question}")
        assert ("stopped after 0.5 seconds" in text) == endless
        assert ("Not answered yet" in text) != endless
