"""Write the skeleton of a lesson and its evidence page, which run and pass every test, and enter them in the book.

python tools/new_chapter.py NAME [--title "Its title"]      book/NN_NAME, book/evidence/NN_NAME (.md, .ipynb), _toc.yml, index.md, README.md
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import notebooks
from notebooks import bootstrap, chapters, read, repository

from flatmin._files import replace

TEMPLATES = {"": "new_chapter.md", "evidence/": "new_evidence.md"}
CARD = """:::{{grid-item-card}} {number}. {title}
:link: {stem}
:link-type: doc

What the chapter shows, in one or two lines.
:::
"""
ROW = "| {number} | [{title}]({folder}/{stem}.ipynb): what it shows | [open in Colab]({colab}) |\n"
COLAB = "https://colab.research.google.com/github/{slug}/blob/{branch}/{folder}/{stem}.ipynb"


def after(text, pattern, new):
    """`text` with `new` inserted after the last match of a pattern."""
    *_, match = re.finditer(pattern, text, re.M)
    return text[: match.end()] + new + text[match.end() :]


def pages(name, title):
    """{path: text}: the chapter, and the pages that list it."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        sys.exit(
            f"NAME must be lower-case letters, digits and _, starting with a letter, got {name!r}"
        )
    taken = {int(path.stem[:2]): path.stem for path in chapters()}
    if any(stem[3:] == name for stem in taken.values()):
        sys.exit(f"NAME must be new, but there already is a chapter {name!r}")
    number = next(number for number in itertools.count(1) if number not in taken)
    stem, before = f"{number:02d}_{name}", taken[max(n for n in taken if n < number)]
    repo = repository()
    fields = {
        "number": number,
        "title": title or name.replace("_", " ").capitalize(),
        "stem": stem,
        "folder": repo["path_to_book"],
        "branch": repo["branch"],
        "slug": "/".join(repo["url"].rstrip("/").split("/")[-2:]),
    }
    fields["colab"] = COLAB.format(**fields)
    placeholders = {
        "BOOTSTRAP": bootstrap(),
        "NUMBER": str(number),
        "TITLE": fields["title"],
        "SLUG": name.replace("_", "-"),
        "STEM": stem,
    }
    texts = {}
    for folder, template in TEMPLATES.items():
        text = read(Path(__file__).with_name(template))
        for placeholder, value in placeholders.items():
            text = text.replace(placeholder, value)
        texts[notebooks.BOOK / f"{folder}{stem}.md"] = text
    toc, index, readme = (
        notebooks.BOOK / "_toc.yml",
        notebooks.BOOK / "index.md",
        notebooks.ROOT / "README.md",
    )
    entry = f"      - file: {stem}\n        sections:\n          - file: evidence/{stem}\n"
    return texts | {
        toc: after(read(toc), rf"^      - file: {before}\n(?:        .*\n)*", entry),
        index: after(
            read(index),
            rf"^:::\{{grid-item-card\}}[^\n]*\n:link: {before}\n(?:.*\n)*?:::\n",
            "\n" + CARD.format(**fields),
        ),
        readme: after(read(readme), rf"^\|[^\n]*{before}\.ipynb[^\n]*\n", ROW.format(**fields)),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="as in NN_NAME, for example weight_averaging")
    parser.add_argument("--title", default="", help="default: the name in words")
    chosen = parser.parse_args(arguments)
    new = pages(chosen.name, chosen.title)
    for path, text in new.items():
        replace(path, text)
    made = [path for path in new if path.suffix == ".md" and path.stem[3:] == chosen.name]
    failed = notebooks.run(made)
    names = ", ".join(str(path.relative_to(notebooks.ROOT)) for path in new)
    stem = made[0].stem
    print(
        f"new-chapter: wrote {names} and the notebooks. Edit {stem}.md and evidence/{stem}.md, then: "
        f"make notebooks N='{stem} evidence/{stem}'"
    )
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
