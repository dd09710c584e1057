"""Write the skeleton of a chapter, which runs and passes every test, and enter it in the book.

python tools/new_chapter.py NAME [--title "Its title"]      book/09_NAME.md, .ipynb, _toc.yml, index.md, README.md
"""

import argparse
import re
import sys
from pathlib import Path

import notebooks
from notebooks import bootstrap, chapters, read, repository

from flatmin._files import replace

TEMPLATE = Path(__file__).with_suffix(".md")
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
    *_, match = re.finditer(pattern, text, re.S | re.M)
    return text[: match.end()] + new + text[match.end() :]


def pages(name, title):
    """{path: text}: the chapter, and the pages that list it."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        sys.exit(
            f"NAME must be lower-case letters, digits and _, starting with a letter, got {name!r}"
        )
    if any(path.stem[3:] == name for path in chapters()):
        sys.exit(f"NAME must be new, but there already is a chapter {name!r}")
    number = 1 + max(int(path.stem[:2]) for path in chapters())
    stem, last = f"{number:02d}_{name}", chapters()[-1].stem
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
    text = read(TEMPLATE)
    for placeholder, value in {
        "BOOTSTRAP": bootstrap(),
        "NUMBER": str(number),
        "TITLE": fields["title"],
        "SLUG": name.replace("_", "-"),
    }.items():
        text = text.replace(placeholder, value)
    toc, index, readme = (
        notebooks.BOOK / "_toc.yml",
        notebooks.BOOK / "index.md",
        notebooks.ROOT / "README.md",
    )
    return {
        notebooks.BOOK / f"{stem}.md": text,
        toc: after(read(toc), rf"^ *- file: {last}\n", f"      - file: {stem}\n"),
        index: after(
            read(index),
            rf"^:::\{{grid-item-card\}}[^\n]*\n:link: {last}\n.*?^:::\n",
            "\n" + CARD.format(**fields),
        ),
        readme: after(read(readme), rf"^\|[^\n]*{last}\.ipynb[^\n]*\n", ROW.format(**fields)),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="as in 09_NAME, for example weight_averaging")
    parser.add_argument("--title", default="", help="default: the name in words")
    chosen = parser.parse_args(arguments)
    new = pages(chosen.name, chosen.title)
    for path, text in new.items():
        replace(path, text)
    chapter = next(iter(new))
    failed = notebooks.run([chapter])
    names = ", ".join(str(path.relative_to(notebooks.ROOT)) for path in new)
    print(
        f"new-chapter: wrote {names} and the notebook. Edit {chapter.name}, then: make notebooks N={chapter.stem}"
    )
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
