"""Chapters as in Colab: alone, with Colab's packages and those that the first cell installs."""

import ast
import re
import sys
from importlib.metadata import packages_distributions, requires

import colab
import nbformat
import pytest
from notebooks import chapters, key
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def code_of(path):
    cells = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def text_of(path):
    cells = nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def imported(source):
    """The top-level packages that a cell imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a notebook belongs to no package"
            yield node.module.split(".")[0]


@pytest.fixture(params=chapters(), ids=key)
def path(request):
    return request.param


def test_a_chapter_imports_only_what_colab_has_or_the_first_cell_installs(path):
    ours = {
        Requirement(line).name
        for line in requires("flatmin")
        if "extra ==" not in line or re.search("data|plot", line)
    }
    have = {canonicalize_name(name) for name in {*colab.COLAB, *ours, "flatmin"}}
    owners = packages_distributions() | {"flatmin": ["flatmin"]}
    names = {
        name for source in code_of(path) for name in imported(source)
    } - sys.stdlib_module_names
    assert "flatmin" in names
    assert {
        name
        for name in names
        if not have & {canonicalize_name(owner) for owner in owners.get(name, ())}
    } == set()


def test_a_chapter_reads_no_other_file(path):
    """Neither pictures nor data: Colab has only the notebook."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img\b[^>]*\bsrc=[\"']([^\"']+)", text_of(path))
    assert [
        a or b for a, b in pictures if not (a or b).startswith(("https://", "data:", "attachment:"))
    ] == []
    read = re.findall(
        r"\b(?:open|imread|load_dataset|open_dataset|np\.load|torch\.load|read_text|Path)\(",
        "\n".join(code_of(path)),
    )
    assert read == []


def test_links_between_chapters_are_to_notebooks(path):
    """On GitHub and in Colab, relative links to other notebooks work."""
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(path))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.colab
def test_a_chapter_runs_alone_and_installs_flatmin(tmp_path):
    """For all chapters: make colab."""
    try:
        (tmp_path / "link").symlink_to(tmp_path)
    except OSError:
        pytest.skip("this system does not allow symbolic links")
    [first, *_] = chapters()
    notebook, added = colab.Colab(tmp_path / "colab").run(first)
    assert set(added) == {"flatmin", "mnist1d"}, "what Colab lacks, and nothing else"
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    text = "".join(output.get("text", "") for output in outputs)
    held = sum(int(n) for n in re.findall(r"✓ (\d+) checks", text))
    checked = re.findall(r"\b(?:claim|stated)\(\s*[\"']", "\n".join(code_of(first)))
    assert held == len(checked) > 0 and "✗" not in text
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_replaced_package_is_an_error(tmp_path, monkeypatch):
    """A test of the check: a first cell that installs another version of a package fails."""
    lists = iter([{"numpy": "2.0.2"}, {"numpy": "2.4.6", "flatmin": "0.1.0"}])
    machine = object.__new__(colab.Colab)
    machine.folder, machine.environment = tmp_path, {}
    monkeypatch.setattr(
        machine, "interpreter", lambda name: (tmp_path / name).mkdir(), raising=False
    )
    monkeypatch.setattr(machine, "installed", lambda python: next(lists), raising=False)
    options = {}
    execute = lambda self, **given: options.update(given)
    monkeypatch.setattr(colab.NotebookClient, "execute", execute)
    with pytest.raises(RuntimeError, match=r"replaced \{'numpy': \('2.0.2', '2.4.6'\)\}"):
        machine.run(chapters()[0])
    assert options["cleanup_kc"]  # no kernel is left behind
