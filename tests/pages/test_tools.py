"""The scripts in tools/, on a book of one chapter; the bootstrap cell, with a mock of pip."""

import importlib.util
import subprocess
from importlib.machinery import PathFinder
from importlib.metadata import version

import claims
import nbformat
import notebooks
import pytest
from flatmin_book import claims_in
from notebooks import bootstrap, chapters, differences

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


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A book of one chapter."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "01_try.md").write_text(CHAPTER)
    (tmp_path / "book" / "index.md").write_text("# Cover")
    (tmp_path / "_config.yml").write_text("title: try")
    (tmp_path / "src" / "flatmin").mkdir(parents=True)
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path / "book")
    return tmp_path


def test_run_executes_in_place_and_gives_the_same_bytes_again(tree):
    target = tree / "book" / "01_try.ipynb"
    assert notebooks.run(chapters()) == {}
    first = target.read_bytes()
    assert notebooks.run(chapters()) == {} and target.read_bytes() == first
    notebooks.sync(chapters()[0])
    assert target.read_bytes() == first
    assert differences(chapters()[0]) == []
    outputs = [cell.outputs[0].text for cell in code_cells(nbformat.read(target, as_version=4))]
    assert outputs == ["2\n", "[] 1\n"]


def test_sync_keeps_the_outputs_of_unchanged_cells_only(tree):
    [path] = chapters()
    notebooks.run([path])
    path.write_text(CHAPTER.replace("1 + 1", "1 + 2").replace("Prose", "New prose"))
    assert differences(path) == ["01_try, cell 1: source differs", "01_try, cell 2: source differs"]
    notebooks.sync(path)
    changed, unchanged = code_cells(nbformat.read(path.with_suffix(".ipynb"), as_version=4))
    assert changed.outputs == [] and unchanged.outputs and differences(path) == []


def test_book_executes_only_what_changed_and_leaves_the_tree_alone(tree, capsys):
    [path] = chapters()
    rendered = tree / "_build" / "source" / "book" / "01_try.ipynb"

    def executed():
        assert notebooks.book(tree / "_build") == {}
        return "01_try: executed" in capsys.readouterr().out

    assert executed() and not executed()
    path.write_text(CHAPTER.replace("Prose", "New prose"))
    assert not executed() and "New prose" in rendered.read_text() and r"2\n" in rendered.read_text()
    path.write_text(CHAPTER.replace("1 + 1", "1 + 2"))
    assert executed() and r"3\n" in rendered.read_text()
    (tree / "src" / "flatmin" / "new.py").write_text("")
    assert executed()
    assert not path.with_suffix(".ipynb").exists() and (rendered.parent / "index.md").exists()
    assert not (rendered.parent / path.name).exists()


def test_a_cell_that_raises_is_reported_and_nothing_is_written(tree, capsys):
    [path] = chapters()
    path.write_text(CHAPTER.replace("1 + 1", "1 / 0"))
    assert (
        list(notebooks.run([path])) == ["01_try"] and "ZeroDivisionError" in capsys.readouterr().out
    )
    assert all(
        cell.outputs == []
        for cell in code_cells(nbformat.read(path.with_suffix(".ipynb"), as_version=4))
    )
    assert list(notebooks.book(tree / "_build")) == ["01_try"]


def with_claims(*lines):
    body = "\n".join(lines)
    return CHAPTER.replace("print(1 + 1)", f"import os\nfrom flatmin.book import claim\n{body}")


def test_claims_marks_what_fails_and_what_is_never_reached(tree, monkeypatch, capsys):
    [path] = chapters()
    monkeypatch.setattr(claims, "SEEDS", [1, 2])
    seed = 'os.environ["FLATMIN_SEED"]'
    path.write_text(
        with_claims(
            'claim("always", "it holds", True)',
            f'claim("odd", "the seed is odd", {seed} == "1")',
            f'assert {seed} != "2"',
            'claim("last", "it is reached", True)',
        )
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
    chapters()[0].write_text(with_claims('claim("always", "it holds", True)'))
    assert (
        claims.main([]) == 0
        and "claims: 1 of 1 hold, 0 chapter runs crashed" in capsys.readouterr().out
    )


def test_claims_list_requires_plain_strings(tree):
    [path] = chapters()
    path.write_text(with_claims('claim("a-" + "b", "computed name", True)'))
    notebooks.sync(path)
    with pytest.raises(ValueError, match="plain strings: claim"):
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


def test_make_book_ends_with_a_one_line_summary(tree, monkeypatch, capsys):
    [path] = chapters()
    last = lambda: capsys.readouterr().out.rstrip().splitlines()[-1]
    monkeypatch.setattr(notebooks, "book", lambda: {})
    for status, summary in (
        (0, "book: ready in 0 s, open "),
        (1, "book: rendering FAILED after 0 s, see the warnings above"),
    ):
        monkeypatch.setattr(notebooks, "render", lambda status=status: status)
        assert notebooks.make_book() == status and last().startswith(summary)
    monkeypatch.setattr(notebooks, "book", lambda: {path.stem: "error"})
    assert (
        notebooks.make_book()
        and last() == "book: NOT rendered, because these chapters failed (see above): 01_try"
    )
