"""Print the whole book as one PDF from its rendered pages, with headless Chromium.

    python tools/pdf.py [-o FILE] [FOLDER OF THE RENDERED BOOK]

This needs no network and no LaTeX.  The articles of all pages are joined into one page with a cover
and a table of contents.  Links between chapters become links within the PDF, explorable figures
show their static picture, solutions are unfolded, and code that the book folds is left out.
"""

import argparse
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from notebooks import BOOK, ROOT

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
SCALE, WIDTH = 0.78, 174  # of the print; in millimetres, between the margins
TYPESET = """() => window.MathJax?.startup?.promise?.then(
    () => document.querySelectorAll('mjx-container').length >= document.querySelectorAll('.math').length)"""
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


def parts():
    """(caption, [page, …]) of the table of contents."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    return [
        (part.get("caption"), [entry["file"] for entry in part["chapters"]])
        for part in toc["parts"]
    ]


def article(folder, name, names):
    """The article of a page, with its name in all anchors, and links into the PDF or to the web."""
    [text] = re.findall(
        r'<article class="bd-article">(.*?)</article>', (folder / f"{name}.html").read_text(), re.S
    )
    text = re.sub(r"<script\b.*?</script>", "", text, flags=re.S)
    text = re.sub(r'<a class="headerlink".*?</a>', "", text, flags=re.S)
    text = re.sub(r'<details class="[^"]*\babove-input[^"]*">.*?</details>', "", text, flags=re.S)
    text = re.sub(r"<details(?![^>]* open)", "<details open", text)
    text = re.sub(r'(<[^>]* )(id|for|aria-labelledby)="([^"]*)"', rf'\1\2="{name}--\3"', text)
    text = re.sub(r'loading="lazy" ', "", text)
    text = re.sub(
        r'src="(_\w+/[^"]*)"', lambda match: f'src="{(folder / match[1]).as_uri()}"', text
    )

    def link(match):
        target, _, anchor = match[1].partition("#")
        page = target.removesuffix(".html") if target else name
        if ":" in target:
            return match[0]
        return (
            f' href="#{page}--{anchor}"'
            if page in names and anchor
            else f' href="#{page}"'
            if page in names
            else ""
        )

    return re.sub(r' href="([^"]*)"', link, text)


def heading(text, level):
    """[(anchor, title)] of an article's sections at a level."""
    pattern = (
        rf'<section[^>]* id="([^"]*)"[^>]*>(?:\s*<span[^>]*></span>)*\s*<h{level}>(.*?)</h{level}>'
    )
    return [
        (anchor, re.sub(r"</?a\b[^>]*>", "", title))
        for anchor, title in re.findall(pattern, text, re.S)
    ]


def line(anchor, title, kind):
    return f'<li class="{kind}"><a href="#{anchor}"><span>{title}</span><i></i><b>000</b></a></li>'


def book(folder):
    """The whole book as one page of HTML; the table of contents has no page numbers yet."""
    index = (folder / "index.html").read_text()
    names = ["index"] + [name for _, group in parts() for name in group]
    articles = {name: article(folder, name, names) for name in names}
    styles = "\n".join(re.findall(r"<link [^>]*\bstylesheet[^>]*>", index)).replace(
        'href="_static', f'href="{folder.as_uri()}/_static'
    )
    math = re.search(
        r"<script>window\.MathJax = .*?</script>",
        next(a.read_text() for a in folder.glob("0*.html")),
    )[0]
    toc = ""
    for caption, group in [(None, ["index"])] + parts():
        toc += f"<li class='part'>{caption}</li>" if caption else ""
        for name in group:
            [(_, title)] = heading(articles[name], 1)
            toc += line(name, "Preface" if name == "index" else title, "page")
            if name[0].isdigit():
                toc += "".join(
                    line(anchor, text, "section") for anchor, text in heading(articles[name], 2)
                )
    texts = "".join(
        f'<article class="bd-article" id="{name}">{text}</article>'
        for name, text in articles.items()
    )
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    return f"""<!DOCTYPE html>
<html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8"><title>{config["title"]}</title>
{styles}{math}<script defer src="{folder.as_uri()}/_static/mathjax/tex-chtml-full.js"></script></head>
<body class="whole-book">
<header><h1>{config["title"]}</h1><p>Why do solutions in flat regions of the loss generalize?<br>An executable textbook</p>
<img src="{folder.as_uri()}/_static/cover.svg" alt="A sharp and a flat minimum">
<p>{config["author"]}<br>{datetime.now(UTC):%B %Y}</p><p><a href="{config["repository"]["url"]}">{config["repository"]["url"]}</a></p></header>
<nav><h2>Contents</h2><ol>{toc}</ol></nav>
{texts}</body></html>"""


def numbers(path):
    """{anchor: page} of a PDF."""
    from pypdf import PdfReader

    reader = PdfReader(path)
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
    with TemporaryDirectory() as temporary:
        source = Path(temporary, "book.html")
        source.write_text(book(folder))
        page.goto(source.as_uri(), wait_until="load")
        page.wait_for_function(TYPESET)
        page.evaluate(FIT)
        for wide in page.evaluate(WIDE)[:5]:
            print(f"pdf: wider than the paper: {wide}", file=sys.stderr)
        paper = {
            "path": target,
            "scale": SCALE,
            "prefer_css_page_size": True,
            "print_background": True,
        }
        page.pdf(**paper)
        page.evaluate(NUMBER, numbers(target))
        page.pdf(**paper, outline=True, tagged=True)
    page.close()


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_build/html")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "_build/flat-minima.pdf")
    options = parser.parse_args(arguments)
    executable = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not executable:
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

    options.output.parent.mkdir(parents=True, exist_ok=True)
    print("pdf: typesetting and printing the book, a minute or two", file=sys.stderr)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        make(browser, options.folder.resolve(), options.output.resolve())
        browser.close()
    print(f"pdf: {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
