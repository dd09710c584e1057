"""How long is each lesson, beside its measure, and which numbers of its prose does nothing hold?

python tools/reading.py [NAME ...]
"""

import re
import sys

import nbformat
from notebooks import BOOK, chapters, is_visible_code, key, prose, read, reading_minutes

from flatmin._files import print_line

sys.path.insert(0, str(BOOK / "_ext"))
from flatmin_book import claims_in, stated_in  # noqa: E402  (as the book lists them)

# Of a lesson; an evidence page may be long.
MEASURE = {
    "words": 3000,  # without exercises
    "visible code cells": 12,
    "lines of the longest": 15,
    "columns of the widest": 80,
    "figures": 6,
    "tables": 2,
}
NUMERAL = re.compile(r"(?<![\w.,])[-−+]?\d+(?:[.,]\d+)*(?: ± \d+(?:\.\d+)?)?(?: ?%| points| times)")


def kinds(cell):
    """The kinds of outputs of a cell."""
    data = [output.get("data", {}) for output in cell.get("outputs", ())]
    pictures = sum("image/png" in d or "explorable" in d.get("text/html", "") for d in data)
    tables = sum(
        "|--" in d.get("text/markdown", "") or "<table" in d.get("text/html", "") for d in data
    )
    return pictures, tables


def measured(path):
    """{what: number} of a chapter, and its minutes."""
    cells = nbformat.reads(read(path.with_suffix(".ipynb")), as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    visible = [cell.source.splitlines() for cell in filter(is_visible_code, cells)]
    figures, tables = (sum(counts) for counts in zip(*map(kinds, code)))
    numbers = (
        len(prose(cells).split()),
        len(visible),
        max(map(len, visible), default=0),
        max((len(line) for lines in visible for line in lines), default=0),
        figures,
        tables,
    )
    return dict(zip(MEASURE, numbers, strict=True)), reading_minutes(cells)


def uncovered(path):
    """The results in the prose of a chapter that no `stated` holds, each with words around it."""
    cells = nbformat.reads(read(path.with_suffix(".ipynb")), as_version=4).cells
    text = " ".join(prose(cells).split())
    for words in stated_in(path.with_suffix(".ipynb")):
        text = text.replace(words, re.sub(r"\d", "_", words))
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in NUMERAL.finditer(text)]


def main(names):
    for path in chapters(names):
        found, minutes = measured(path)
        notebook = path.with_suffix(".ipynb")
        print_line(
            f"\n{key(path)}: {minutes} minutes to read, "
            f"{len(claims_in(notebook))} claims, {len(stated_in(notebook))} stated numbers"
        )
        for what, number in found.items():
            limit = "" if "/" in key(path) else f" of {MEASURE[what]}"
            print_line(
                f"  {'!' if limit and number > MEASURE[what] else ' '} {number:>5}{limit:<8} {what}"
            )
        for words in uncovered(path):
            print_line(f"  ? … {words} …")


if __name__ == "__main__":
    main(sys.argv[1:])
