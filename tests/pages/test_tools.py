"""The scripts in tools/, on a book of one chapter; the bootstrap cell, with a mock of pip."""

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

import claims
import nbformat
import notebooks
import pytest
import reading
from flatmin_book import claims_in
from notebooks import bootstrap, chapters, differences, read

from flatmin._files import replace

CHAPTER = """---
jupytext:
  formats: ipynb,md:myst
kernelspec:
  display_name: Python 3
  name: python3
---

# A title

```{code-cell} ipython3
:tags: [nbval-ignore-output]

print(1 + 1)
```

Prose.

```{code-cell} ipython3
import os
print(os.listdir("."), os.environ["OMP_NUM_THREADS"])
```
"""


CONFIG = """title: try
only_build_toc_files: true
exclude_patterns: ["[0-9]*.md"]
"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A book of one chapter."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "01_try.md").write_text(CHAPTER, encoding="utf-8")
    (tmp_path / "book" / "index.md").write_text("# Cover", encoding="utf-8")
    (tmp_path / "_config.yml").write_text(CONFIG, encoding="utf-8")
    (tmp_path / "src" / "flatmin").mkdir(parents=True)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path / "book")
    monkeypatch.setattr(notebooks, "BUILD", tmp_path / "_build")
    return tmp_path


def test_run_executes_in_place_and_gives_the_same_bytes_again(tree):
    target = tree / "book" / "01_try.ipynb"
    assert notebooks.run(chapters()) == {}
    first = target.read_bytes()
    assert notebooks.run(chapters()) == {} and target.read_bytes() == first
    notebooks.sync(chapters()[0])
    assert target.read_bytes() == first
    assert differences(chapters()[0]) == ""
    outputs = [cell.outputs[0].text for cell in code_cells(nbformat.read(target, as_version=4))]
    assert outputs == ["2\n", "[] 1\n"]


def test_the_head_of_a_chapter_says_how_long_it_takes(tree, monkeypatch):
    path = tree / "book" / "01_try.md"
    head = "> Reading: ? minutes. Running: ? minutes on one core. You need: a pencil.\n\n"
    text = read(path).replace("title\n", "title\n\n" + head + 1900 * "word " + "\n")
    replace(path, text)
    notebooks.sync(path)
    assert "> Reading: 20 minutes. Running: ? minutes on one core. You need: a pencil." in read(
        path
    )
    for seconds, words in (
        (1, "½ minute"),
        (31, "1 minute"),
        (61, "1½ minutes"),
        (95, "2 minutes"),
    ):
        notebooks.renew_head(path, seconds)
        assert f"20 minutes. Running: {words} on one core. You need" in read(path)
    assert not notebooks.run([path])
    assert "Running: ½ minute on" in read(path) and differences(path) == ""
    assert "Running: ½ minute on" in read(path.with_suffix(".ipynb"))


def test_a_lesson_and_its_evidence_are_two_chapters(tree):
    lesson, evidence = tree / "book" / "01_try.md", tree / "book" / "evidence" / "01_try.md"
    replace(evidence, CHAPTER.replace("1 + 1", "1 + 2"))
    assert [notebooks.key(path) for path in chapters()] == ["01_try", "evidence/01_try"]
    for names, path in (
        (["01"], lesson),
        (["book/01_try.md"], lesson),
        (["evidence/01"], evidence),
        (["book/evidence/01_try.ipynb"], evidence),
    ):
        assert chapters(names) == [path]
    assert notebooks.run(chapters()) == {} and not any(map(differences, chapters()))
    firsts = [code_cells(nbformat.read(p.with_suffix(".ipynb"), 4))[0] for p in chapters()]
    assert [cell.outputs[0].text for cell in firsts] == ["2\n", "3\n"]


def test_sync_keeps_the_outputs_of_unchanged_cells_only(tree):
    [path] = chapters()
    notebooks.run([path])
    replace(path, CHAPTER.replace("1 + 1", "1 + 2").replace("Prose", "New prose"))
    assert "1 + 2" in differences(path)
    notebooks.sync(path)
    changed, unchanged = code_cells(nbformat.read(path.with_suffix(".ipynb"), as_version=4))
    assert changed.outputs == [] and unchanged.outputs and differences(path) == ""


@pytest.mark.parametrize("change", ["a new cell", "an edited cell", "a new text", "an alt text"])
def test_sync_loses_nothing_that_was_written_in_the_notebook(tree, change):
    """By an editor that knows nothing of the text half."""
    [path] = chapters()
    notebooks.sync(path)
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    if change == "an edited cell":
        notebook.cells[1].source += "; my_answer = 42"
    elif change == "an alt text":
        notebook.cells[1].metadata["mystnb"] = {"image": {"alt": "my_answer"}}
    else:
        new = nbformat.v4.new_code_cell if change == "a new cell" else nbformat.v4.new_markdown_cell
        notebook.cells.append(new("my_answer = 42"))
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    before = path.with_suffix(".ipynb").read_bytes()
    for command in (notebooks.sync, lambda path: notebooks.run([path]), lambda _: notebooks.book()):
        with pytest.raises(SystemExit, match=r"01_try.ipynb has cells .*another name"):
            command(path)
    assert path.with_suffix(".ipynb").read_bytes() == before and differences(path)
    assert read(path) == CHAPTER


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("01_try.ipynb", "", "01_try.ipynb cannot be read: .* JSON"),  # a write that failed
        ("01_try.ipynb", "[]", "01_try.ipynb cannot be read: "),
        ("01_try.md", CHAPTER.replace("output]", "output"), "01_try.md cannot be read: .*YAML"),
        ("01_try.md", f"\ufeff{CHAPTER}", "01_try.md must begin with a line ---"),
        ("01_try.md", "", "01_try.md must begin with a line ---"),
    ],
)
def test_a_damaged_half_is_named_and_nothing_is_written(tree, name, content, message):
    [path] = chapters()
    notebooks.sync(path)
    replace(tree / "book" / name, content)
    before = {half: half.read_bytes() for half in (tree / "book").iterdir()}
    for command in (notebooks.sync, differences):
        with pytest.raises(SystemExit, match=message):
            command(path)
    assert {half: half.read_bytes() for half in (tree / "book").iterdir()} == before


def test_an_interruption_keeps_what_was_executed(tree, monkeypatch):
    """It does not wait for the chapters that are running, and leaves their stored outputs."""
    replace(tree / "book" / "02_next.md", CHAPTER.replace("1 + 1", "2 + 2"))
    executed, real = [], notebooks.execute

    def interrupted(notebook, **environment):
        executed.append(notebook.cells[1].source)
        if executed[-1] == "print(2 + 2)":
            raise KeyboardInterrupt
        real(notebook, **environment)

    monkeypatch.setattr(notebooks, "execute", interrupted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="130"):
        notebooks.run(chapters())
    first, second = (nbformat.read(p.with_suffix(".ipynb"), as_version=4) for p in chapters())
    assert first.cells[1].outputs and not second.cells[1].outputs
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            notebooks.book()
    assert executed == ["print(1 + 1)", "print(2 + 2)"] * 2 + ["print(2 + 2)"]


def test_each_name_must_be_that_of_a_chapter(tree):
    assert [path.stem for path in chapters(["book/01_try.md"])] == ["01_try"]
    with pytest.raises(SystemExit, match="no chapter is called 99; there are 01_try"):
        chapters(["01", "99"])


def test_a_notebook_is_written_in_utf_8_and_replaced_whole(tree, monkeypatch):
    [path] = chapters()
    replace(path, CHAPTER.replace("Prose", "✓ Prosa für alle"))
    notebooks.run([path])
    before = path.with_suffix(".ipynb").read_bytes()
    assert "✓ Prosa für alle".encode() in before
    replace(path, CHAPTER)

    def full(self, *_, **__):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        notebooks.sync(path)
    assert path.with_suffix(".ipynb").read_bytes() == before


def test_book_shows_what_this_machine_computes(tree, capsys):
    """It executes only what changed, and takes nothing that a notebook stores."""
    [path] = chapters()
    replace(tree / "book" / "_toc.yml", "{format: jb-book, root: index, chapters: [file: 01_try]}")
    replace(path, CHAPTER.replace("print(1 + 1)", "print(40 + 1 + 1)"))
    notebooks.run([path])
    stored = read(path.with_suffix(".ipynb"))
    replace(path.with_suffix(".ipynb"), stored.replace(r"42\n", r"77\n"))

    def executed():
        capsys.readouterr()
        assert not notebooks.book()
        out = capsys.readouterr().out
        assert out.splitlines()[-1].startswith("book: ready in ")
        return "01_try: executed" in out, read(tree / "_build" / "html" / "01_try.html")

    again, page = executed()
    assert again and ">42\n" in page and ">77\n" not in page
    replace(path, CHAPTER.replace("print(1 + 1)", "print(40 + 1 + 1)").replace("Pro", "New pro"))
    again, page = executed()
    assert not again and ">42\n" in page and "New prose" in page
    replace(tree / "src" / "flatmin" / "new.py", "")
    assert executed()[0]


def test_a_cell_that_raises_is_reported_and_nothing_is_written(tree, capsys):
    [path] = chapters()
    replace(path, CHAPTER.replace("1 + 1", "1 / 0"))
    assert (
        list(notebooks.run([path])) == ["01_try"] and "ZeroDivisionError" in capsys.readouterr().out
    )
    assert all(
        cell.outputs == []
        for cell in code_cells(nbformat.read(path.with_suffix(".ipynb"), as_version=4))
    )
    assert list(notebooks.book()) == ["01_try"]
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last == "book: NOT rendered, because these chapters failed (see above): 01_try"


def test_a_warning_of_the_renderer_fails_each_time(tree, capsys):
    [path] = chapters()
    replace(tree / "book" / "_toc.yml", "{format: jb-book, root: index, chapters: [file: 01_try]}")
    replace(path, CHAPTER.replace("Prose", "[nowhere](nowhere.md)"))
    for _ in range(2):
        assert notebooks.book()
        assert capsys.readouterr().out.splitlines()[-1].startswith("book: rendering FAILED after ")


def with_claims(*lines):
    body = "\n".join(lines)
    return CHAPTER.replace("print(1 + 1)", f"import os\nfrom flatmin.book import claim\n{body}")


def test_claims_marks_what_fails_and_what_is_never_reached(tree, monkeypatch, capsys):
    [path] = chapters()
    monkeypatch.setattr(claims, "SEEDS", [1, 2])
    seed = 'os.environ["FLATMIN_SEED"]'
    replace(
        path,
        with_claims(
            'claim("always", "it holds", True)',
            f'claim("odd", "the seed is odd", {seed} == "1")',
            f'assert {seed} != "2"',
            'claim("last", "it is reached", True)',
        ),
    )
    assert claims.main([]) == 1
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith("  ") and len(line.split()) == 3
    }
    assert rows == {"always": ["✓", "✓"], "odd": ["✓", "✗"], "last": ["✓", "–"]}
    assert "claims: 4 of 6 hold, 1 chapter runs crashed" in out


def test_claims_succeeds_when_all_hold(tree, monkeypatch, capsys):
    monkeypatch.setattr(claims, "SEEDS", [3])
    replace(chapters()[0], with_claims('claim("always", "it holds", True)'))
    assert (
        claims.main([]) == 0
        and "claims: 1 of 1 hold, 0 chapter runs crashed" in capsys.readouterr().out
    )


def test_reading_measures_a_lesson_and_names_the_numbers_that_nothing_holds(tree, capsys):
    [path] = chapters()
    text = with_claims('stated("falls by 3.8 points", [3.7, 3.9])', "x = 1").replace(
        "Prose.", "It falls by 3.8 points, or by 12.5 %; $a$ is one word.\n\n$$ 7 % $$"
    )
    replace(path, text + "\n## Exercises\n\nNot counted, 5 %.\n\n## Summary\n\nShort.\n")
    notebooks.sync(path)
    found, minutes = reading.measured(path)
    assert found == {
        "words": 19,  # with the signs of two headings
        "visible code cells": 2,
        "lines of the longest": 4,
        "columns of the widest": 53,
        "figures": 0,
        "tables": 0,
    }
    assert minutes == 5
    reading.main([])
    out = capsys.readouterr().out
    assert "01_try: 5 minutes to read, 0 claims, 1 stated numbers" in out and "!" not in out
    assert "12.5 %" in out.split("?")[1] and out.count("?") == 1
    replace(path, text.replace("x = 1", "x = 1" + " " * 80 + "# wide"))
    notebooks.sync(path)
    reading.main(["01"])
    assert "!    91 of 80   columns of the widest" in capsys.readouterr().out


def test_claims_list_requires_plain_strings(tree):
    [path] = chapters()
    replace(path, with_claims('claim("a-" + "b", "computed name", True)'))
    notebooks.sync(path)
    with pytest.raises(ValueError, match="claim must be given plain strings: claim"):
        claims_in(path.with_suffix(".ipynb"))


def test_bootstrap_installs_only_without_flatmin_and_keeps_torch(monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    exec(bootstrap(), {})
    assert commands == []

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flatmin" else find(name)
    )
    exec(bootstrap(), {})
    monkeypatch.setenv("FLATMIN_PIP", "flatmin-0.1.0-py3-none-any.whl")
    exec(bootstrap(), {})
    kept = [f"torch=={version('torch')}", f"numpy=={version('numpy')}"]
    assert [command[-3:] for command in commands] == [
        [f"flatmin[all] @ {notebooks.source()}", *kept],
        ["flatmin-0.1.0-py3-none-any.whl", *kept],
    ]


@pytest.mark.parametrize(
    "beside, installs",
    [
        (None, True),
        ("flatmin/readme.txt", True),  # a folder, which Python takes for a namespace
        ("flatmin/src/flatmin/__init__.py", True),  # a checkout
        ("flatmin/__init__.py", False),
        ("flatmin.py", False),  # importing from it fails, and the error names the file
    ],
)
def test_a_folder_beside_the_notebook_is_no_installation(tmp_path, monkeypatch, beside, installs):
    if beside:
        (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / beside).touch()
    commands, find = [], importlib.util.find_spec
    monkeypatch.setattr(subprocess, "check_call", commands.append)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (
            PathFinder.find_spec(name, [str(tmp_path)]) if name == "flatmin" else find(name)
        ),
    )
    exec(bootstrap(), {})
    assert len(commands) == installs


def test_a_notebook_installs_its_own_version():
    repo = notebooks.repository()
    assert notebooks.source("0.2.0.dev0") == f"git+{repo['url']}@{repo['branch']}"
    assert notebooks.source("0.1.0") == f"git+{repo['url']}@v0.1.0"
