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
WRONG = [(path, name) for path in MASTERS for name in assignments.wrong(path)]
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


def environment(path, source=assignments.solution, keep=lambda name: True):
    """The names that a notebook's cells define; questions run as `source(text)` if `keep(name)`."""
    env = {}
    for cell in assignments.read(path):
        if cell.cell_type == "code" and (
            not assignments.points(cell) or keep(assignments.name_of(cell))
        ):
            text = source(cell.source) if assignments.points(cell) else cell.source
            exec(compile(text, path.stem, "exec"), env)
    return env


def scores(built, path, env, names):
    """{question: (points, messages)} by the autograder's own test files, without a kernel."""
    graded = {}
    with zipfile.ZipFile(built / "autograder" / f"{path.stem}.zip") as archive:
        for name in names:
            test = ExceptionTestFile.from_string(archive.read(f"tests/{name}.py").decode())
            test.run(env)
            graded[name] = (
                test.score,
                "\n".join(r.message or "" for r in test.test_case_results if not r.passed),
            )
    return graded


# ---------------------------------------------------------------------------------------- masters


def test_chapters_1_to_7_have_an_assignment():
    chapters = {
        path.name for folder in ("book", "drafts") for path in (ROOT / folder).glob("0[1-7]_*.md")
    }
    assert [path.name for path in MASTERS] == sorted(chapters) and len(MASTERS) == 7


def test_time_points_and_prerequisites_are_stated(path):
    cells = assignments.read(path)
    worth = assignments.questions(cells)
    assert 4 <= len(worth) <= 6
    first = cells[0].source
    assert re.search(r"\*\*Time:\*\* about \S+", first) and "**You need:**" in first
    number = {4: "four", 5: "five", 6: "six"}[len(worth)]
    assert f"**Points:** {sum(worth.values())}, in {number} questions." in first
    headings = re.findall(
        r"^## Question (\d) \((\d) points\): \w", "\n".join(c.source for c in cells), re.M
    )
    assert [(int(n), int(p)) for n, p in headings] == list(enumerate(worth.values(), 1))
    assert len(EXPERIMENTS & set(worth)) == 1


def test_every_question_has_a_check_a_docstring_and_an_exercise(path):
    for cell in assignments.read(path):
        if assignments.points(cell):
            name = assignments.name_of(cell)
            assert name in check.__all__
            [function] = [node for node in ast.parse(assignments.exercise(cell.source)).body]
            assert (
                ast.get_docstring(function)
                and ast.unparse(function.body[1:]) == "raise NotImplementedError"
            )
            assert "SOLUTION" not in assignments.solution(cell.source)


def test_every_question_has_one_check_and_every_check_a_question():
    questions = Counter(
        name for path in MASTERS for name in assignments.questions(assignments.read(path))
    )
    assert set(questions.values()) == {1} and set(questions) == set(check.__all__) - {
        "Check",
        "Report",
    }


def test_the_page_for_students_shows_the_message_of_a_check():
    env, (_, _, source) = {}, assignments.wrong(MASTERS[1])["flooded_step__decay_flooded"]
    exec(source, env)
    assert (
        f"```text\n{check.flooded_step.run(env['flooded_step'])}\n```"
        in (BOOK / "assignments.md").read_text()
    )


def test_the_page_for_instructors_shows_a_check_that_works():
    from flatmin.book.check.grading import question

    page = (BOOK / "instructors.md").read_text()
    env = {"question": question, "torch": check.grading.torch}
    exec(re.search(r"```python\n(@question\n.*?)```", page, re.S)[1], env)
    assert env["margins"].run(environment(MASTERS[0])["margins"])
    assert "took part in the maximum" in str(
        env["margins"].run(lambda z, y: z.gather(1, y[:, None])[:, 0] - z.amax(1))
    )


# ---------------------------------------------------------------------- students' notebooks


def test_student_notebooks_hold_no_solution(built, path):
    student = built / "student" / path.name.replace(".md", ".ipynb")
    assert assignments.leaks(student, path, assignments.HIDDEN_SEED) == []
    nb = nbformat.read(student, as_version=4)
    assert nb.cells[0].source.startswith("# Assignment") and "flatmin" in nb.cells[1].source
    assert "otter" not in student.read_text()
    for name in assignments.questions(assignments.read(path)):
        assert sum(cell.source == f"_ = check.{name}({name})" for cell in nb.cells) == 1


@pytest.mark.parametrize(
    "where", ["source", "markdown", "output", "metadata", "notebook metadata", "hidden seed"]
)
def test_a_leak_would_be_found(built, tmp_path, where):
    path = MASTERS[1]
    nb = nbformat.read(built / "student" / f"{path.stem}.ipynb", as_version=4)
    line = "sign = 1 if loss > flood_level else -1"
    code = next(cell for cell in nb.cells if "def flooded_step" in cell.source)
    match where:
        case "source":
            code.source += f"\n    # {line}"
        case "markdown":
            nb.cells[0].source += line
        case "output":
            code.outputs = [nbformat.v4.new_output("stream", text="ok")]
        case "metadata":
            code.metadata["note"] = "x"
        case "notebook metadata":
            nb.metadata["otter"] = {"tests": {}}
        case "hidden seed":
            nb.cells[0].source += f"seed={assignments.HIDDEN_SEED}"
    nbformat.write(nb, tmp_path / "leaky.ipynb")
    assert assignments.leaks(tmp_path / "leaky.ipynb", path, assignments.HIDDEN_SEED)


def test_a_course_can_have_hidden_tests_of_its_own(built, tmp_path):
    assignments.build(MASTERS[3], tmp_path, hidden_seed=77)
    for folder, seed in ((tmp_path, 77), (built, assignments.HIDDEN_SEED)):
        with zipfile.ZipFile(folder / "autograder" / f"{MASTERS[3].stem}.zip") as archive:
            test = ExceptionTestFile.from_string(archive.read("tests/cosines.py").decode())
            assert f"seed={seed}" in test.source and "seed=0" in test.source
            assert [(case.points, case.hidden) for case in test.test_cases] == [
                (1.5, False),
                (1.5, True),
            ]


# ------------------------------------------------------------- grades, by the autograder's tests


def test_the_reference_gets_all_points_but_the_experiments(built, path):
    worth = assignments.questions(assignments.read(path))
    names = [name for name in worth if name not in EXPERIMENTS]
    for name, (score, messages) in scores(built, path, environment(path), names).items():
        assert score == worth[name], messages


def test_a_blank_notebook_scores_nothing(built, path):
    worth = assignments.questions(assignments.read(path))
    for env in (environment(path, assignments.exercise), {}):
        assert {
            name: score for name, (score, _) in scores(built, path, env, worth).items()
        } == dict.fromkeys(worth, 0)


def test_there_are_at_least_five_wrong_answers_per_assignment():
    for path in MASTERS:
        answers = assignments.wrong(path)
        assert len(answers) >= 5 and {question for question, _, _ in answers.values()} == set(
            assignments.questions(assignments.read(path))
        )
    assert len(WRONG) >= 35


def cheap(name):
    return name.partition("__")[0] not in EXPERIMENTS or name.rpartition("__")[2] in (
        "not_a_dict",
        "raises",
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=name, marks=[] if cheap(name) else pytest.mark.course)
        for path, name in WRONG
    ],
)
def test_a_wrong_answer_loses_its_points_with_a_hint(built, path, name, monkeypatch):
    """And it loses no other points: each check gets only its own function."""
    wrong, phrase, source = assignments.wrong(path)[name]
    if name == "level_walk__endless":
        monkeypatch.setattr(check.level_walk, "seconds", 1)
    env = environment(path, keep=lambda question: question != wrong)
    exec(compile(source, name, "exec"), env)
    worth = assignments.questions(assignments.read(path))
    others = [question for question in worth if question not in EXPERIMENTS and question != wrong]
    [(score, messages)] = scores(built, path, env, [wrong]).values()
    assert score == 0 and messages.count(phrase) == 2, messages  # for public and hidden inputs
    [other, *_] = others
    assert scores(built, path, env, [other])[other][0] == worth[other]


# ------------------------------------------------------------------------------- grades, by Otter


def graded(built, path, notebook, tmp_path):
    file = tmp_path / "submission.ipynb"
    nbformat.write(notebook, file)
    results, note = assignments.grade_one(file, built / "autograder" / f"{path.stem}.zip")
    assert note == ""
    return {name: points for name, (points, _) in results.items()}


@pytest.mark.course
def test_otter_gives_the_reference_full_marks(built, path, tmp_path):
    worth = assignments.questions(assignments.read(path))
    notebook = nbformat.read(built / "solution" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, notebook, tmp_path) == worth


@pytest.mark.course
def test_otter_gives_a_blank_notebook_nothing(built, path, tmp_path):
    worth = assignments.questions(assignments.read(path))
    notebook = nbformat.read(built / "student" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, notebook, tmp_path) == dict.fromkeys(worth, 0)


@pytest.mark.course
@pytest.mark.parametrize(("path", "name"), list(zip(MASTERS, NAMED)), ids=NAMED)
def test_otter_subtracts_the_points_of_one_mistake(built, path, name, tmp_path):
    """The experiment is left blank, to save time: it loses its own points and no others."""
    wrong, _, source = assignments.wrong(path)[name]
    worth = assignments.questions(assignments.read(path))

    def answered(text):
        names = {node.name for node in ast.parse(text).body}
        return (
            source
            if wrong in names
            else assignments.exercise(text)
            if names & EXPERIMENTS
            else assignments.solution(text)
        )

    lost = {wrong, *(EXPERIMENTS & set(worth))}
    expected = {question: 0 if question in lost else points for question, points in worth.items()}
    assert graded(built, path, assignments.plain(path, answered), tmp_path) == expected


@pytest.mark.course
def test_a_folder_becomes_a_table(built, tmp_path, monkeypatch, capsys):
    """Even if half of the answers are missing, a file is no notebook, or a cell never ends."""
    path = MASTERS[3]
    worth = assignments.questions(assignments.read(path))
    folder = tmp_path / "submissions"
    (folder / "late").mkdir(parents=True)
    some = assignments.plain(
        path,
        lambda text: (
            assignments.solution(text) if "def cosines" in text else assignments.exercise(text)
        ),
    )
    nbformat.write(some, folder / "ada.ipynb")
    (folder / "late" / "bob.ipynb").write_text("{")
    some.cells.insert(1, nbformat.v4.new_code_cell("while True: pass"))
    nbformat.write(some, folder / "cyd.ipynb")
    limit = 60
    one = assignments.grade_one
    monkeypatch.setattr(
        assignments, "grade_one", lambda s, a: one(s, a, limit if "cyd" not in s.name else 20)
    )
    assignments.grade(
        path, folder, tmp_path / "grades.csv", built / "autograder" / f"{path.stem}.zip", jobs=2
    )
    rows = {
        row["submission"]: row
        for row in csv.DictReader(io.StringIO((tmp_path / "grades.csv").read_text()))
    }
    assert list(rows) == ["ada.ipynb", "cyd.ipynb", "late/bob.ipynb"]
    assert (
        rows["ada.ipynb"]["total"] == rows["ada.ipynb"]["cosines"] == "3"
        and rows["ada.ipynb"]["out of"] == "20"
    )
    assert {rows["ada.ipynb"][name] for name in worth} == {"0", "3"} and rows["ada.ipynb"][
        "note"
    ] == ""
    assert rows["cyd.ipynb"]["note"] == "not graded: stopped after 20 seconds"
    assert (
        rows["late/bob.ipynb"]["note"].startswith("not graded: ")
        and rows["late/bob.ipynb"]["total"] == "0"
    )
    feedback = (tmp_path / "grades" / "ada.txt").read_text()
    assert feedback.startswith("3 of 20 points\n") and feedback.count("✗ check.") == 4
    assert "Not answered yet" in feedback and "ada.ipynb: 3 of 20" in capsys.readouterr().out


@pytest.mark.course
def test_a_student_runs_all_cells_in_jupyter(built, tmp_path):
    """No cell stops the notebook; a loop that never ends is stopped, in the kernel's main thread."""
    from nbclient import NotebookClient

    nb = nbformat.read(built / "student" / f"{MASTERS[1].stem}.ipynb", as_version=4)
    cell = next(cell for cell in nb.cells if "def flooded_step" in cell.source)
    cell.source = cell.source.replace("raise NotImplementedError", "while True: pass")
    cell.source += "\ncheck.flooded_step.seconds = 0.5"
    NotebookClient(
        nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    printed = [
        "".join(o.get("text", "") for o in cell.outputs)
        for cell in nb.cells
        if cell.source.startswith("_ = check.")
    ]
    assert len(printed) == len(assignments.questions(assignments.read(MASTERS[1]))) and all(
        text.startswith("✗ check.") for text in printed
    )
    assert [
        ("stopped after 0.5 seconds" in text, "Not answered yet" in text) for text in printed
    ] == [(i == 3, i != 3) for i in range(len(printed))]
