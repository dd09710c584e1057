"""Every chapter: equal halves, first cell, figures, outputs, plain Markdown."""

import ast
import importlib
import re
from collections import Counter

import nbformat
import pytest
import yaml
from flatmin_book import claims_in, names_in, papers_in, public_name, stated_in
from notebooks import (
    BOOK,
    HEAD,
    bootstrap,
    chapters,
    differences,
    is_visible_code,
    key,
    plural,
    reading_minutes,
)

toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
in_toc = [
    page["file"]
    for part in toc["parts"]
    for entry in part["chapters"]
    for page in (entry, *entry.get("sections", ()))
]
COLUMNS = 80  # of code, which fit the column of a page
# Chapters of the first edition, whose visible code is wider. Rewriting one takes it off this list.
WIDE = (
    "03_gradient_penalty",
    "04_stiffness",
    "05_mixup",
    "06_sam",
    "09_together",
)
TIMING = re.compile(
    r"\d\s*(?:ms|µs|us|it/s|s/it)\b|\b\d+(?:\.\d+)?\s+(?:s|sec|secs|seconds|minutes)\b|\d%\|"
)


@pytest.fixture(params=chapters(), ids=key)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def data(cell):
    """The rich outputs of a cell: {type: text}."""
    return [output.data for output in cell.get("outputs", ()) if "data" in output]


def is_figure(cell):
    return any("image/png" in d or "image/svg+xml" in d for d in data(cell))


def test_the_table_of_contents_names_files_that_exist():
    assert [
        name
        for name in [toc["root"], *in_toc]
        if not any((BOOK / name).with_suffix(s).exists() for s in (".ipynb", ".md"))
    ] == []


def test_every_chapter_is_in_the_table_of_contents():
    names = [key(path) for path in chapters()]
    assert names and sorted(name for name in in_toc if re.search(r"\b\d\d_", name)) == names


def test_both_halves_are_equal(path):
    assert differences(path) == "", "edit the .md half, then: make notebooks"


def test_the_text_half_has_the_header_that_pairs_it_in_jupyter(path):
    header = yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])
    assert (
        header["jupytext"]["formats"] == "ipynb,md:myst"
        and header["kernelspec"]["name"] == "python3"
    )


def test_the_first_code_cell_is_the_bootstrap(cells):
    first = code(cells)[0]
    assert first.source == bootstrap(), "make notebooks updates it"
    assert set(first.metadata.tags) == {"remove-cell", "nbval-ignore-output"}


def test_a_chapter_begins_with_its_title_and_its_question(cells):
    imports = code(cells)[1]
    assert re.match("(#@title .+\n)?\n*(from|import) ", imports.source)
    assert not is_visible_code(imports)
    before = cells[: cells.index(imports)]
    text = "\n\n".join(cell.source for cell in before if cell.cell_type == "markdown")
    assert re.match(r"# .+\n\n(> .+\n\n)?## .*[Qq]uestion.*\n\n[\w[]", text)


def is_second_edition(path):
    """Whether a chapter has been rewritten: Chapters 3 to 6 and 9 have the first edition's form."""
    return key(path) not in WIDE


def test_a_chapter_says_how_long_it_takes(path, cells):
    if is_second_edition(path):
        head = HEAD.search(cells[0].source)
        assert head and head[1] == plural(reading_minutes(cells)).split()[0], "sync updates it"
        assert "?" not in head[0], "make notebooks measures the time to run"


def test_folded_cells_say_what_is_inside(path, cells):
    if is_second_edition(path):
        folded = [cell for cell in code(cells) if "hide-input" in cell.metadata.get("tags", ())]
        assert folded and all(re.match(r"#@title \w.+\n", cell.source) for cell in folded)


def test_checks_are_folded_and_print_one_line(path, cells):
    """No line of code that a reader sees is about the text."""
    for cell in code(cells) if is_second_edition(path) else ():
        if calls := re.findall(r"\b(?:claim|stated)\(", cell.source):
            assert not is_visible_code(cell) and "with checks():" in cell.source
            assert [o.text for o in cell.outputs] == [f"✓ {plural(len(calls), 'check')}\n"]


def test_a_lesson_and_its_evidence_name_each_other():
    names = [key(path) for path in chapters()]
    for name in (name for name in names if name.startswith("evidence/")):
        lesson = name.removeprefix("evidence/")
        assert f"({name}.ipynb" in (BOOK / f"{lesson}.md").read_text(encoding="utf-8")
        assert f"(../{lesson}.ipynb" in (BOOK / f"{name}.md").read_text(encoding="utf-8")


def test_what_is_folded_in_the_book_is_folded_everywhere(cells):
    for cell in code(cells):
        folded = "hide-input" in cell.metadata.get("tags", ())
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded, "JupyterLab"
        assert (cell.metadata.get("cellView") == "form") == folded, "Colab"


def test_visible_code_fits_the_column():
    long = {
        key(path): [
            f"cell {i}, line {j}: {len(line)} columns: {line}"
            for i, cell in enumerate(nbformat.read(path.with_suffix(".ipynb"), as_version=4).cells)
            if is_visible_code(cell)
            for j, line in enumerate(cell.source.splitlines(), 1)
            if len(line) > COLUMNS
        ]
        for path in chapters()
    }
    assert {name: lines for name, lines in long.items() if lines and name not in WIDE} == {}
    assert [name for name in WIDE if not long[name]] == [], "it fits now: take it off the list"


def test_code_on_other_pages_fits_the_column():
    """Printed text wraps, so it may be longer."""
    block = re.compile(r"^```(?:bash|python)\n(.*?)^```", re.S | re.M)
    pages = [path for path in BOOK.rglob("*.md") if path not in chapters()]
    blocks = [
        (path.name, code)
        for path in pages
        for code in block.findall(path.read_text(encoding="utf-8"))
    ]
    assert (
        len(blocks) > 20
        and [
            f"{name}: {len(line)} columns: {line}"
            for name, code in blocks
            for line in code.splitlines()
            if len(line) > COLUMNS
        ]
        == []
    )


def test_outputs_are_stored_and_none_is_an_error(cells):
    assert [cell.execution_count for cell in code(cells)] == list(range(1, len(code(cells)) + 1)), (
        "executed top to bottom?"
    )
    kinds = Counter(output.output_type for cell in code(cells) for output in cell.outputs)
    assert kinds["error"] == 0 and kinds.total() > 0


def test_nothing_on_stderr_and_no_timing_is_stored(cells):
    for cell in code(cells):
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not TIMING.search(text), text


def test_every_figure_has_alt_text_and_a_caption(cells):
    for cell, following in zip(cells, [*cells[1:], None]):
        if cell.cell_type == "code" and is_figure(cell):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) > 20, (
                f"no alt text for readers who cannot see the figure:\n{cell.source}"
            )
            assert (
                following is not None
                and following.cell_type == "markdown"
                and "**Figure" in following.source
            ), cell.source
    for html in (d["text/html"] for cell in code(cells) for d in data(cell) if "text/html" in d):
        assert all(
            re.search(r"""\balt=["'][^"']+""", image) for image in re.findall(r"<img\b[^>]*>", html)
        )


def test_pictures_in_markdown_have_alt_text(cells):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not re.search(r"!\[\s*\]\(", text) and all(
        "alt=" in tag for tag in re.findall(r"<img\b[^>]*>", text)
    )


def test_markdown_is_plain(cells):
    """Colab and GitHub do not render MyST directives and roles."""
    for cell in cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"^(```+)(?!\{).*?^\1", "", cell.source, flags=re.S | re.M)
            assert not re.search(r"^\s*(?::::+|```+)\s*\{|\{[\w:.-]+\}`", prose, re.M), cell.source


def test_markdown_boxes_are_closed(cells):
    """A box needs blank lines and must be in one cell: Jupyter renders cells one by one."""
    for cell in cells:
        if cell.cell_type == "markdown":
            for tag in ("div", "details"):
                assert len(re.findall(rf"<{tag}\b", cell.source)) == cell.source.count(
                    f"</{tag}>"
                ), cell.source
            assert not re.search(r"<div class=[^\n]*>\n(?!\n)", cell.source), (
                f"no blank line after <div>:\n{cell.source}"
            )


def test_code_is_plain_python_and_short(cells):
    """No magics, which are not Python; no long cells, which belong in the package."""
    for cell in code(cells):
        ast.parse(cell.source)
        assert len(cell.source.splitlines()) <= 40, cell.source
        assert "ipywidgets" not in cell.source and "clear_output" not in cell.source


def test_claims_are_found_and_unique():
    ids = Counter(name for path in chapters() for name, _ in claims_in(path.with_suffix(".ipynb")))
    assert ids and [name for name, times in ids.items() if times > 1] == []


def not_found_once(stated, text):
    """The stated numbers that a text does not have exactly once, each as a whole."""
    words = " ".join(text.split())
    whole = lambda each: rf"(?<![\d.,−-]){re.escape(each)}(?![\d]|[.,]\d| ±)"
    return [each for each in stated if len(re.findall(whole(each), words)) != 1]


def test_a_stated_number_is_found_as_a_whole():
    text = "It falls\nby 3.8 ± 0.7 points to 12.5 %, by 3 then by 3."
    assert not_found_once(["falls by 3.8 ± 0.7", "to 12.5 %", "by 3 then"], text) == []
    wrong = ["2.5 %", "12.5 ± 1", "by 3.8", "3.8 ± 0", "by 3", "by 3.9 ± 0.7"]
    assert not_found_once(wrong, text) == wrong


def test_stated_numbers_are_in_the_text(path, cells):
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert not_found_once(stated_in(path.with_suffix(".ipynb")), text) == []


def documented(name):
    """Whether the API reference has an entry for a full name or for its module."""
    entries = re.findall(
        r"auto(?:module|function):: (\S+)", (BOOK / "api.md").read_text(encoding="utf-8")
    )
    return name in entries or name.rsplit(".", 1)[0] in entries


def test_what_a_chapter_imports_is_in_the_api_reference(path):
    names = names_in(path.with_suffix(".ipynb"))
    assert names and [name for name in names if not documented(name)] == []


@pytest.mark.parametrize(
    "package", ["", "batch", "loss", "gradient", "optimizer", "measure", "loops", "book"]
)
def test_what_a_package_exports_is_in_the_api_reference(package):
    package = importlib.import_module(f"flatmin.{package}".rstrip("."))
    things = [getattr(package, name) for name in package.__all__]
    names = [public_name(thing) for thing in things if hasattr(thing, "__qualname__")]
    assert names and [name for name in names if not documented(name)] == []


def test_every_comparison_with_a_paper_has_a_verdict(path):
    """A lesson leaves the comparison to its evidence page."""
    rows = papers_in(path.with_suffix(".ipynb"))
    assert all(row["finding"] and row["ours"] and row["verdict"] for row in rows)
    compares = "evidence/" in key(path) or not is_second_edition(path)
    assert bool(rows) == compares
