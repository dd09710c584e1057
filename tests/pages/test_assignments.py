"""The assignments: no solution in students' notebooks, and the right points for each answer."""

import ast
import csv
import io
import json
import re
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import nbformat
import psutil
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
    assert len(found) == len(re.findall("^def [a-z]", text, re.M))  # others help them
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
        failed = {  # the parts of one seed have the same report
            (result.test_case.hidden, result.message[result.message.find("✗ check.") :].strip())
            for result in test.test_case_results
            if not result.passed
        }
        for hidden, text in failed:
            told = "".join(assignments.remarks({name: (0, [[hidden, text]])}))
            assert not hidden or str(assignments.HIDDEN_SEED) not in told
        graded[name] = round(test.score, 9), "\n".join(text for _, text in sorted(failed))
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


def test_every_cited_equation_is_in_its_chapter():
    sources = [*MASTERS, *(ROOT / "assignments" / "wrong").glob("*.py")]
    sources += (ROOT / "src" / "flatmin" / "book" / "check").glob("*.py")
    cited = {
        number
        for file in sources
        for number in re.findall(
            r"(?<![\w)\]])\(([1-9]\d?\.\d{1,2})\)", file.read_text(encoding="utf-8")
        )
    }
    assert len(cited) > 15
    for number in cited:
        [chapter] = BOOK.glob(f"{int(number.split('.')[0]):02}_*.md")
        assert rf"\tag{{{number}}}" in chapter.read_text(encoding="utf-8"), number


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
    assert nb.cells[0].source.startswith("# Assignment") and "flatmin" in nb.cells[2].source
    alone = nb.cells[1].source  # all that a student needs who has only this file
    for said in ("Colab", "Hand in", f"`{path.stem}.ipynb`", "assignments.md", "about a minute"):
        assert said in alone
    assert re.search(r"\*\*Time:\*\* about", nb.cells[0].source)
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
        lambda nb: nb.cells[2].outputs.append(nbformat.v4.new_output("stream", text="ok")),
        lambda nb: nb.cells[2].metadata.update(note="x"),
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
        for hidden in (False, True):
            points = [case.points for case in test.test_cases if case.hidden == hidden]
            assert len(points) > 1 and sum(points) == pytest.approx(1.5)


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


def right(file):
    """{question__style: function} of a file in assignments/right/."""
    env = {"__name__": file.stem}
    exec(compile(file.read_text(encoding="utf-8"), file.name, "exec"), env)
    return {
        name: value for name, value in env.items() if "__" in name.strip("_") and callable(value)
    }


RIGHT = {
    name: answer
    for file in sorted((ROOT / "assignments" / "right").glob("*.py"))
    for name, answer in right(file).items()
}


@pytest.mark.course
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_not_refused(name):
    question, _, _ = name.partition("__")
    seeds = (0, assignments.HIDDEN_SEED, 48151)
    for seed in seeds[:1] if question in EXPERIMENTS else seeds:
        report = getattr(check, question).run(RIGHT[name], seed)
        assert report, f"{report}"


def test_each_question_has_right_answers_of_eight_kinds():
    """An experiment has two, beside the reference."""
    counts = Counter(name.partition("__")[0] for name in RIGHT)
    for question in {name for path in MASTERS for name in worth(path)}:
        assert counts[question] >= (2 if question in EXPERIMENTS else 8), question


@pytest.mark.course
def test_a_verdict_that_was_typed_in_is_seen(path):
    """Even if it is right for the seeds that students see."""
    [name] = EXPERIMENTS & set(worth(path))
    reference = environment(path)[name]
    typed = {key: verdict for key, (_, verdict) in reference([0, 1, 2, 3, 4]).items()}
    report = getattr(check, name).run(
        lambda seeds: {key: (pair[0], typed[key]) for key, pair in reference(seeds).items()}
    )
    assert not report and "Was it typed in?" in str(report)


@pytest.mark.course
@pytest.mark.parametrize(("path", "name"), WRONG, ids=[name for _, name in WRONG])
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
    assert score < worth(path)[question] and messages.count(phrase) == 2, messages  # both seeds
    assert graded[other][0] == worth(path)[other]


def test_an_answer_that_is_right_in_parts_earns_these_parts(built):
    """And the report says which."""
    path, name = MASTERS[1], "fraction_up"
    env = environment(path, without=name)
    right = environment(path)[name]
    env[name] = lambda down, up: right(down, up) if up >= down else 0.5
    [(score, messages)] = scores(built, path, env, [name]).values()
    assert score == pytest.approx(worth(path)[name] * 2 / 3)
    for said in ("✓ equal rates", "✓ larger steps up", "✗ larger steps down"):
        assert messages.count(said) == 2
    env[name] = lambda down, up: down / 0
    [(score, messages)] = scores(built, path, env, [name]).values()
    assert score == 0 and messages.count("ZeroDivisionError") == 2, "told once"


# ------------------------------------------------------------------------------- grades, by Otter


def graded(built, path, nb):
    """The points of a notebook, with the name of a kernel that is not installed here."""
    nb.metadata["kernelspec"] = {"name": "conda-env-ml-py", "display_name": "Python [conda env:ml]"}
    results = assignments.grade_one(nb, built / "autograder" / f"{path.stem}.zip")
    return {name: round(points, 9) for name, (points, _) in results.items()}


@pytest.mark.course
def test_otter_gives_the_reference_full_marks(built, path):
    nb = nbformat.read(built / "solution" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, nb) == worth(path)


@pytest.mark.course
def test_otter_gives_a_blank_notebook_nothing(built, path):
    nb = nbformat.read(built / "student" / f"{path.stem}.ipynb", as_version=4)
    assert graded(built, path, nb) == dict.fromkeys(worth(path), 0)


@pytest.mark.course
@pytest.mark.parametrize(("path", "name"), list(zip(MASTERS, NAMED)), ids=NAMED)
def test_otter_subtracts_the_points_of_one_mistake(built, path, name):
    """The experiment is left blank, to save time: it loses its own points and no others."""
    question, _, source = WRONG[path, name]
    lost = {question} | EXPERIMENTS

    def answered(text):
        defined = {node.name for node in ast.parse(text).body}
        if question in defined:
            return source
        return (assignments.exercise if defined & EXPERIMENTS else assignments.solution)(text)

    found = graded(built, path, notebook(path, answered))
    assert found[question] < worth(path)[question]  # parts of it may be right
    expected = {name: 0 if name in lost else points for name, points in worth(path).items()}
    assert {**found, question: 0} == expected


# --------------------------------------------------------------------------- folders of submissions


def some_answers(path):
    """A notebook with one question answered."""
    answered = lambda text: "def cosines" in text
    return notebook(
        path,
        lambda text: (assignments.solution if answered(text) else assignments.exercise)(text),
    )


def table(out):
    """{submission: row}"""
    rows = csv.DictReader(io.StringIO(out.read_text(encoding="utf-8")))
    return {row["submission"]: row for row in rows}


@pytest.fixture
def graded_at_once(monkeypatch):
    """Each notebook that can be graded gets 3 points for `cosines`, without running it."""
    seen = []

    def one(nb, archive):
        seen.append(nb)
        return {"cosines": (3.0, [[False, "Error:\n✗ check.one\n  seed=2026 told"]])}

    monkeypatch.setattr(assignments, "grade_one", one)
    return seen


def test_an_interruption_keeps_what_is_graded(tmp_path, monkeypatch):
    folder, out = tmp_path / "handed in", tmp_path / "grades.csv"
    folder.mkdir()
    for name in ("ada.IPYNB", "bob.ipynb"):
        nbformat.write(some_answers(MASTERS[3]), folder / name)
    calls = []

    def one(nb, archive):
        if calls:
            raise KeyboardInterrupt
        calls.append(nb)
        raise assignments.NotGraded("no reason")

    monkeypatch.setattr(assignments, "grade_one", one)
    with pytest.raises(SystemExit, match="grades.csv has 1 of 2 submissions"):
        assignments.grade(MASTERS[3], folder, out, folder / "ada.IPYNB")
    assert table(out)["ada.IPYNB"]["note"] == "not graded: no reason"
    feedback = (tmp_path / "grades" / "ada.IPYNB.txt").read_text(encoding="utf-8")
    assert feedback == "not graded: no reason\n"


def test_everything_that_is_handed_in_gets_a_row(tmp_path, graded_at_once):
    """Graded where that is possible, and else with what it is."""
    path, folder, out = MASTERS[3], tmp_path / "handed in", tmp_path / "grades of May.csv"
    nb = nbformat.writes(some_answers(path))
    other = nbformat.writes(notebook(MASTERS[0], assignments.solution))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("my work/eve.ipynb", nb)
        archive.writestr("__MACOSX/my work/._eve.ipynb", "x")
        archive.writestr("../../out.ipynb", nb)
        archive.writestr("out.ipynb", nb)
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members of one name
        archive.writestr("fay.ipynb", nb)
        archive.writestr("fay.ipynb", "{")
    strange = json.loads(nb) | {"nbformat_minor": 4, "metadata": {}}  # cells have no id in 4.4
    for cell in strange["cells"]:
        cell.pop("outputs", None)
        cell["more"] = {}
    of_99 = bytearray(zipped.getvalue())
    of_99[of_99.index(b"PK\x01\x02") + 6] = 99  # the version of zip that is needed
    good = {
        "a b/ada.ipynb": nb,
        "ada.ipynb": nb,
        "Bob.IPYNB": nb,
        "cyd.ipynb.txt": nb,
        "bom.ipynb": "\ufeff" + nb,
        "dan.py": "\n\n".join(cell.source for cell in some_answers(path).cells if cell.cell_type == "code"),
        "straße.ipynb": nb,
        "eve.zip": zipped.getvalue(),
        "fay.zip": twice.getvalue(),
        "=1+1.ipynb": nb,
        79 * "漢" + ".ipynb": nb,  # with .txt the name is too long for most file systems
        "strange.ipynb": json.dumps(strange),
        "ada.ipynb.txt/gil.ipynb": nb,
    }  # fmt: skip
    bad = {
        "half.ipynb": (nb[:100], "no notebook: "),
        "empty.ipynb": ("", "no notebook: "),
        "list.ipynb": ("[]", "no notebook: "),
        "latin.ipynb": ("größe".encode("latin-1"), "not UTF-8"),
        "other.ipynb": (other, "this is the assignment 01_generalization, not 04_stiffness"),
        "notes.pdf": (b"%PDF", "no notebook, but a file of the type .pdf"),
        "README": ("x", "no notebook, but a file of the type README"),
        "bad.zip": (b"PK", "a zip that cannot be opened"),
        "v99.zip": (bytes(of_99), "a zip that cannot be opened"),
    }
    for name, content in [*good.items(), *((name, content) for name, (content, _) in bad.items())]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "folder.ipynb").mkdir()
    (folder / "gone.ipynb").symlink_to(tmp_path / "nowhere.ipynb")
    (folder / "loop").symlink_to(folder)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
        (folder / hidden / "copy.ipynb").write_text(nb, encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"x")

    assignments.grade(path, folder, out, folder / "ada.ipynb")
    rows = table(out)
    zips = {"eve.zip", "fay.zip"}
    inside = {"eve.zip/my work/eve.ipynb", "eve.zip/../../out.ipynb", "eve.zip/out.ipynb"}
    inside |= {"fay.zip/fay.ipynb", "./=1+1.ipynb"}  # which no spreadsheet computes
    assert {name for name, row in rows.items() if not row["note"]} == good.keys() - zips - {
        "=1+1.ipynb"
    } | inside
    assert {row["total"] for row in rows.values() if not row["note"]} == {"3"}
    notes = {name: note for name, (_, note) in bad.items()} | {
        "folder.ipynb": "a folder with the name of a notebook",
        "ada.ipynb.txt": "a folder with the name of a notebook",
        "fay.zip/fay.ipynb (2)": "no notebook",
        "gone.ipynb": "a link that leads nowhere",
        "loop": "a link to a folder",
    }
    assert rows.keys() - good.keys() - inside == notes.keys()
    for name, note in notes.items():
        assert rows[name]["note"].startswith("not graded: ") and note in rows[name]["note"], name
        assert rows[name]["total"] == "0"
    told = tmp_path / "grades of May"
    said = {
        file.relative_to(told).as_posix(): file.read_text(encoding="utf-8")
        for file in told.rglob("*.txt")
    }
    assert len(said) == len(rows), "no feedback over another, none outside"
    assert {row["feedback"] for row in rows.values()} == said.keys()
    assert said["half.ipynb.txt"].startswith("not graded: no notebook")
    assert said["eve.zip/out.ipynb.txt"] == said["ada.ipynb.txt"]
    for name in (79 * "漢" + ".ipynb", "ada.ipynb.txt/gil.ipynb", "eve.zip/out.ipynb"):
        assert re.fullmatch(r"\d+\.txt", rows[name]["feedback"])
    assert said["ada.ipynb.txt"] == "3 of 20 points\n\n✗ check.one\n  seed=… told\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "grades of May",
        "grades of May.csv",
        "handed in",
    ]


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("grades", "a file such as grades.csv"),
        ("taken.csv", "a file such as grades.csv"),
        ("handed in.csv", "apart from the submissions"),
        ("handed in/grades.csv", "apart from the submissions"),
        ("feedback/x.csv", "there is a file of this name"),
        ("plain/grades.csv", "that can be written to"),
        ("", "a file such as grades.csv"),
    ],
)
def test_a_table_that_would_do_harm_is_refused_before_grading(
    tmp_path, graded_at_once, out, reason
):
    folder = tmp_path / "handed in"
    folder.mkdir()
    nbformat.write(some_answers(MASTERS[3]), folder / "ada.ipynb")
    (tmp_path / "taken.csv").mkdir()
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback" / "x").touch()
    (tmp_path / "plain").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=reason):
        assignments.grade(MASTERS[3], folder, tmp_path / out, folder / "ada.ipynb")
    assert graded_at_once == [] and sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_not_there_is_refused(tmp_path, graded_at_once):
    for folder in (tmp_path / "none", ROOT, ROOT.parent, Path("")):
        with pytest.raises(SystemExit, match="FROM must be a folder"):
            assignments.grade(MASTERS[3], folder, tmp_path / "grades.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="nothing was handed in"):
        assignments.grade(MASTERS[3], tmp_path / "empty", tmp_path / "grades.csv", tmp_path)


def test_feedback_by_number_is_not_over_anothers(tmp_path):
    taken = set()
    long = 300 * "x"
    told = [
        assignments.write_feedback(tmp_path, number, name, name, taken)
        for number, name in ((1, "2"), (2, long), (3, "_2"), (3, "4/a"), (4, long))
    ]
    assert told == ["2.txt", "_2.txt", "3.txt", "4/a.txt", "4.txt"]
    assert (tmp_path / "2.txt").read_text(encoding="utf-8") == "2"


def test_feedback_tells_of_hidden_tests_only_parts_and_hints():
    wrong = "Error:\n✗ check.one\n  ✓ a\n  ✗ b\n      It is {}.\n      hint:   Turn it."
    public, hidden = wrong.format("5"), wrong.format("6, and seed is 48151")
    brief = "✗ check.one\n  ✓ a\n  ✗ b\n      hint:   Turn it."
    results = {"one": (0, [[True, hidden], [False, public], [False, public]])}
    [said] = assignments.remarks(results)
    assert said == public[7:], "the hidden test's parts and hint are the same"
    assert assignments.remarks({"one": (0, [[True, hidden]])}) == [f"With other inputs:\n{brief}"]
    blank = "✗ check.one\n  ✗ your answer\n      Not answered yet"
    assert assignments.remarks({"one": (0, [[False, blank], [True, blank]])}) == [blank]


def test_an_error_of_a_check_is_told_to_the_instructor(tmp_path, monkeypatch):
    """And a student learns no seed from it."""
    folder, out = tmp_path / "handed in", tmp_path / "grades.csv"
    folder.mkdir()
    nbformat.write(some_answers(MASTERS[3]), folder / "ada.ipynb")
    message = "Traceback ...\n  check.cosines.verify(cosines, seed=48151)\nKeyError: 3"
    results = {"cosines": (0, [[False, message], [True, message]])}
    monkeypatch.setattr(assignments, "grade_one", lambda nb, archive: results)
    assignments.grade(MASTERS[3], folder, out, folder / "ada.ipynb")
    [row] = table(out).values()
    assert row["note"] == "check.cosines ended with an error: KeyError: 3"
    assert (tmp_path / "grades" / row["feedback"]).read_text(encoding="utf-8") == (
        "0 of 20 points\n\ncheck.cosines ended with an error of its own. Ask your instructor.\n"
    )


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


ENDS = {
    "endless": ("import re; re.match(r'(a+)+$', 'a' * 60 + 'b')", "stopped after 15 seconds"),
    "asleep": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "stopped after 15"),
    "exit": ("import os; os._exit(3)", "the notebook ended the grader"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "the notebook ended the grader"),
    "noise": ("import os; os.write(2, b'\\xff\\xfe'); os.write(1, b'\\xff')", ""),
    "leaves": ("import os, tempfile; os.chdir(tempfile.gettempdir())", ""),
}


@pytest.mark.course
@pytest.mark.parametrize("name", ENDS)
def test_one_submission_never_ends_the_grading(built, tmp_path, monkeypatch, name):
    path, folder, out = MASTERS[3], tmp_path / "submissions", tmp_path / "grades.csv"
    code, note = ENDS[name]
    folder.mkdir()
    nb = some_answers(path)
    kernel = tmp_path / "kernel"
    tell = f"import os; open({str(kernel)!r}, 'w').write(str(os.getpid()))"
    nb.cells[1:1] = [nbformat.v4.new_code_cell(source) for source in (tell, code)]
    nbformat.write(nb, folder / "ada.ipynb")
    (folder / "bob.ipynb").write_text("{", encoding="utf-8")
    one = assignments.grade_one
    limit = 15 if name in ("endless", "asleep") else 120
    monkeypatch.setattr(assignments, "grade_one", lambda nb, archive: one(nb, archive, limit))
    assignments.grade(path, folder, out, built / "autograder" / f"{path.stem}.zip", jobs=2)
    assert not runs(int(kernel.read_text(encoding="utf-8"))), "its kernel has ended, too"
    ada, bob = table(out).values()
    assert bob["note"].startswith("not graded: no notebook")
    feedback = (tmp_path / "grades" / "ada.ipynb.txt").read_text(encoding="utf-8")
    if note:
        assert ada["total"] == "0" and note in ada["note"] and note in feedback
    else:
        assert (ada["total"], ada["cosines"], ada["note"]) == ("3", "3", "")
        assert feedback.startswith("3 of 20 points\n") and feedback.count("✗ check.") == 4
        assert "Not answered yet" in feedback


STARTS_AT_LAST = """
import os, pathlib, sys
tried = pathlib.Path({place!r}, "tried")
count = len(tried.read_bytes()) if tried.exists() else 0
tried.write_bytes(b"x" * (count + 1))
if count < {failures}:
    raise RuntimeError("Kernel died before replying to kernel_info")
pathlib.Path(sys.argv[3]).write_text('{{"one": [1, []]}}', encoding="utf-8")
"""


@pytest.mark.parametrize(("failures", "graded"), [(0, True), (2, True), (3, False)])
def test_a_kernel_that_does_not_start_is_tried_again(tmp_path, monkeypatch, failures, graded):
    program = STARTS_AT_LAST.format(place=str(tmp_path), failures=failures)
    monkeypatch.setattr(assignments, "GRADE_ONE", program)
    nb = notebook(MASTERS[3], assignments.exercise)
    if graded:
        assert assignments.grade_one(nb, tmp_path / "none.zip") == {"one": [1, []]}
    else:
        with pytest.raises(assignments.NotGraded, match="its kernel did not start"):
            assignments.grade_one(nb, tmp_path / "none.zip")
    assert len((tmp_path / "tried").read_bytes()) == min(failures + 1, assignments.TRIES)


def test_the_autograder_pins_what_it_installs(built, path):
    with zipfile.ZipFile(built / "autograder" / f"{path.stem}.zip") as archive:
        wanted = archive.read("environment.yml").decode()
    assert re.search(r"- otter-grader==\d", wanted)
    assert re.search(r"- flatmin\[all\] @ git\+https://\S+@([0-9a-f]{40}|v\d\S*)$", wanted, re.M)


def test_a_rebuild_without_the_courses_seed_says_so(tmp_path, capsys):
    assignments.build(MASTERS[3], tmp_path, hidden_seed=77)
    assert "another seed" not in capsys.readouterr().out
    assignments.build(MASTERS[3], tmp_path)
    assert "its hidden tests had another seed before" in capsys.readouterr().out


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
