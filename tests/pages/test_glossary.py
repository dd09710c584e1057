"""The glossary: every entry names its chapters, and each of them emphasises the word, which makes it a link."""

import re

import nbformat
import pytest
from glossary_links import forms, normalized
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from notebooks import BOOK, chapters, key

ENTRY = re.compile(r"^(\S.*)\n((?:  .*\n?)+)", re.M)
ENTRIES = dict(
    ENTRY.findall(
        (BOOK / "glossary.md").read_text(encoding="utf-8").split("```")[1].partition("\n\n")[2]
    )
)
CHAPTERS = [key(path) for path in chapters()]


def introduced_in(text):
    """The chapters that an entry names, in the brackets at its end."""
    return re.findall(r"<([\w/]+)>", re.search(r"\(Chapters? (.*)\)\s*$", text)[1])


def emphasised(path):
    """The texts that a chapter emphasises outside of headings and links, normalized."""
    parser = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
    texts = set()
    for cell in nbformat.read(path, as_version=4).cells:
        blocks = parser.parse(cell.source) if cell.cell_type == "markdown" else []
        for before, block in zip([None, *blocks], blocks):
            if block.type != "inline" or before.type == "heading_open":
                continue
            within, links = [], 0
            for token in block.children:
                links += (token.type == "link_open") - (token.type == "link_close")
                if token.type in ("em_open", "strong_open"):
                    within.append("")
                elif token.type in ("em_close", "strong_close"):
                    text = within.pop()
                    texts |= {normalized(text)} if not links else set()
                    within = [outer + text for outer in within]
                elif within:
                    within = [text + (token.content or " ") for text in within]
    return texts


def not_emphasised():
    """(term, chapter) for each chapter that an entry names but that never emphasises the term."""
    words = {name: emphasised(BOOK / f"{name}.ipynb") for name in CHAPTERS}
    return [
        (term, name)
        for term, text in ENTRIES.items()
        for name in introduced_in(text)
        if not forms(term) & words[name]
    ]


@pytest.mark.parametrize("term", ENTRIES)
def test_every_entry_names_its_chapters(term):
    assert introduced_in(ENTRIES[term]) and set(introduced_in(ENTRIES[term])) <= set(CHAPTERS)


def test_every_chapter_emphasises_the_words_it_introduces():
    assert not_emphasised() == [], (
        "write *term* where the chapter explains it; it becomes a link to the glossary"
    )


def test_no_two_entries_have_a_common_form():
    assert len(set().union(*map(forms, ENTRIES))) == sum(len(forms(term)) for term in ENTRIES)


@pytest.mark.parametrize(
    ("term", "plural"),
    [
        ("flat minimum", "flat minima"),
        ("Gram matrix", "gram matrices"),
        ("gradient penalty", "gradient penalties"),
        ("batch", "batches"),
        ("epoch", "epochs"),
        ("seed", "seeds"),
        ("vicinity", "vicinities"),
    ],
)
def test_forms(term, plural):
    assert forms(term) == {term.lower(), plural}


def test_normalized():
    assert (
        normalized("Early  stopping.") == "early stopping"
        and normalized("Taylor’s\nformula:") == "taylor's formula"
    )
