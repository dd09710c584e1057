"""Print the whole book as one PDF from its rendered pages, with headless Chromium.

    python tools/pdf.py [-o FILE] [FOLDER OF THE RENDERED BOOK]

This needs no network and no LaTeX.  The articles of all pages are joined into one page with a cover
and a table of contents.  Links between chapters become links within the PDF, explorable figures
show their static picture, solutions are unfolded, and code that the book folds is left out.
"""

import argparse
import io
import posixpath
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import yaml
from bs4 import BeautifulSoup
from notebooks import BOOK, ROOT

from flatmin._files import replace

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
]
SCALE, WIDTH = 0.78, 174  # of the print; in millimetres, between the margins
# Replaces what a page shows by the whole book, and sets its formulas.
REPLACE = """async html => {
    await MathJax.startup.promise;
    document.body.className = 'whole-book';
    document.body.innerHTML = html;
    document.title = document.querySelector('h1').textContent;
    await Promise.all([...document.images].map(image => image.decode()));
    await MathJax.typesetPromise();
    await document.fonts.ready;
}"""
# Reduces the font of formulas and tables that are too wide for the paper.
FIT = """() => {
    for (const formula of document.querySelectorAll('div.math > mjx-container')) {
        const box = formula.parentElement, size = parseFloat(formula.style.fontSize) || 100;
        if (box.scrollWidth > box.clientWidth)
            formula.style.fontSize = size * Math.max(0.5, 0.98 * box.clientWidth / box.scrollWidth) + '%';
    }
    for (const table of document.querySelectorAll('table')) {
        const box = table.parentElement;
        for (let size = 92; size >= 50 && box.scrollWidth > box.clientWidth; size -= 4) table.style.fontSize = size + '%';
    }
}"""
NUMBER = """pages => document.querySelectorAll('nav a').forEach(
    a => a.querySelector('b').textContent = pages[decodeURIComponent(a.hash.slice(1))])"""
WIDE = """() => [...document.querySelectorAll('article *')].filter(e =>
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 2 && !e.closest('mjx-assistive-mml')
    ).map(e => e.outerHTML.slice(0, 150))"""


def chromium():
    """The path of a Chromium or Chrome on this machine, or None."""
    names = ("google-chrome", "chromium", "chromium-browser")
    return next(filter(None, map(shutil.which, names)), None)


def parts():
    """(caption, [page, …]) of the table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    pages = lambda entry: [entry["file"], *(page["file"] for page in entry.get("sections", ()))]
    return [
        (part.get("caption"), [page for entry in part["chapters"] for page in pages(entry)])
        for part in toc["parts"]
    ]


def article(folder, name, names):
    """The article of a page, with its name in all anchors, and links into the PDF or to the web."""
    rendered = BeautifulSoup((folder / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
    article = rendered.select_one("article.bd-article")
    for left_out in article.select("script, a.headerlink, details.above-input"):
        left_out.decompose()
    for details in article.select("details"):
        details["open"] = ""
    for key in ("id", "for", "aria-labelledby"):
        for element in article.select(f"[{key}]"):
            element[key] = f"{name}--{element[key]}"
    here = lambda target: posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    for picture in article.select("img[src]"):
        picture["src"] = here(picture["src"]) if ":" not in picture["src"] else picture["src"]
    for link in article.select("a[href]"):
        target, _, anchor = link["href"].partition("#")
        page = here(target).removesuffix(".html") if target else name
        if page in names:
            link["href"] = f"#{page}--{anchor}" if anchor else f"#{page}"
        elif ":" not in target:
            del link["href"]
    article["id"] = name
    return article


def headings(article, level):
    """The headings at a level, inside the sections that have their anchors."""
    return article.select(f"section[id] > h{level}")


def line(anchor, title, kind):
    return f'<li class="{kind}"><a href="#{anchor}"><span>{title}</span><i></i><b>000</b></a></li>'


def book(folder):
    """The whole book as HTML; the table of contents has no page numbers yet."""
    names = ["index"] + [name for _, group in parts() for name in group]
    articles = {name: article(folder, name, names) for name in names}
    toc = ""
    for caption, group in [(None, ["index"])] + parts():
        toc += f"<li class='part'>{caption}</li>" if caption else ""
        for name in group:
            [heading] = headings(articles[name], 1)
            toc += line(name, "Preface" if name == "index" else heading.decode_contents(), "page")
            if re.match(r"\d", name.rpartition("/")[2]):
                for heading in headings(articles[name], 2):
                    toc += line(heading.parent["id"], heading.decode_contents(), "section")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    address = config["repository"]["url"]
    return f"""
<header><h1>{config["title"]}</h1><p>Why do solutions in flat regions of the loss generalize?<br>An executable textbook</p>
<img src="_static/cover.svg" alt="A sharp and a flat minimum">
<p>{config["author"]}<br>{datetime.now(UTC):%B %Y}</p><p><a href="{address}">{address}</a></p></header>
<nav><h2>Contents</h2><ol>{toc}</ol></nav>
{"".join(map(str, articles.values()))}"""


def numbers(file):
    """{anchor: page} of a PDF."""
    from pypdf import PdfReader

    reader = PdfReader(file)
    pages = {
        name: reader.get_destination_page_number(target)
        for name, target in reader.named_destinations.items()
    }
    return {name.removeprefix("/"): page + 1 for name, page in pages.items() if page is not None}


def make(browser, folder, target):
    """Print twice: the first PDF gives the page numbers for the table of contents."""
    page = browser.new_page(
        viewport={"width": round(WIDTH / 25.4 * 96 / SCALE), "height": 1100}, color_scheme="light"
    )
    page.set_default_timeout(600_000)
    page.emulate_media(media="print")
    page.goto((folder / "notation.html").as_uri())  # only pages with formulas load MathJax
    page.evaluate(REPLACE, book(folder))
    page.evaluate(FIT)
    for wide in page.evaluate(WIDE)[:5]:
        print(f"pdf: wider than the paper: {wide}", file=sys.stderr)
    paper = {
        "scale": SCALE,
        "prefer_css_page_size": True,
        "print_background": True,
    }
    page.evaluate(NUMBER, numbers(io.BytesIO(page.pdf(**paper))))
    replace(target, page.pdf(**paper, outline=True, tagged=True))
    page.close()


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_build/html")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "_build/flat-minima.pdf")
    options = parser.parse_args(arguments)
    if not chromium():
        sys.exit("pdf: no Chromium on this machine (Debian: apt-get install chromium)")
    if not (options.folder / "index.html").exists():
        sys.exit(f"pdf: no rendered book in {options.folder}; run: make book")
    if shutil.which("fc-list") and not subprocess.check_output(["fc-list", ":lang=zh"]):
        print(
            "pdf: no Chinese font here, so the glossary will show boxes "
            "(Debian: apt-get install fonts-noto-cjk)",
            file=sys.stderr,
        )
    from playwright.sync_api import sync_playwright

    print("pdf: typesetting and printing the book, a minute or two", file=sys.stderr)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        make(browser, options.folder.resolve(), options.output.resolve())
        browser.close()
    print(f"pdf: {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
