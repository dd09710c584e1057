"""The built book in a browser: offline, light, complete, readable on phones and by screen readers.

Reads FLATMIN_HTML (`make test-web`: the book of `make test`); writes _build/screenshots.
"""

import re
import unicodedata
from html import unescape
from importlib.resources import files

import pdf
import pytest
from notebooks import ROOT
from web import AXE, HTML, PAGES, RULES, TOO_WIDE, new_page, watched

pytestmark = pytest.mark.web

CHAPTERS = [name for name in PAGES if re.search(r"\b\d\d_", name)]
SOURCES = sorted(str(path.relative_to(HTML)) for path in HTML.glob("_modules/**/*.html"))
SHOTS = ROOT / "_build" / "screenshots"
RENDERED = """() => {
    const math = [...document.querySelectorAll('.math')].length;
    return math === 0 || (window.MathJax?.startup?.promise && document.querySelectorAll('mjx-container').length >= math);
}"""
UNFOLD = "document.querySelectorAll('details').forEach(d => d.open = true)"
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
# formulas, and code of at most 80 columns, that are wider than their box, and by how many pixels
OVERFLOWING = """() => {
    const box = e => getComputedStyle(e).display === 'inline' ? box(e.parentElement) : e;
    const excess = e => e.matches('span.math')
        ? e.querySelector('mjx-math').getBoundingClientRect().right - box(e).getBoundingClientRect().right
        : e.scrollWidth - e.clientWidth;
    const columns = e => e.matches('pre') ? Math.max(...e.textContent.split('\\n').map(line => line.length)) : 0;
    return [...document.querySelectorAll('.math, pre')]
        .filter(e => e.checkVisibility() && columns(e) <= 80 && excess(e) > 0.5)
        .map(e => `${e.tagName} ${e.textContent.trim().slice(0, 60)}: ${Math.ceil(excess(e))} px`);
}"""


ONE_OF_EACH = """() => {
    const seen = new Set();
    const clear = color => color === 'transparent' || color.endsWith(', 0)');
    const ground = e => !e ? '' : clear(getComputedStyle(e).backgroundColor) ? ground(e.parentElement) : getComputedStyle(e).backgroundColor;
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || e.closest('mjx-assistive-mml, script, style') || !e.checkVisibility()) continue;
        const style = getComputedStyle(e);
        const look = [style.color, ground(e), style.fontSize, style.fontWeight, style.opacity].join();
        if (!seen.has(look)) e.setAttribute('data-one-of-each', '');
        seen.add(look);
    }
    for (const code of document.querySelectorAll('pre'))  // colours matter only for contrast
        if (!code.querySelector('[data-one-of-each]')) code.textContent = code.textContent;
    return seen.size;
}"""


def text(name):
    return (HTML / name).read_text(encoding="utf-8")


def rendered(page, address):
    page.goto(address, wait_until="load")
    page.wait_for_function(RENDERED)


def test_there_is_a_book(browser):
    assert "index.html" in PAGES and CHAPTERS and SOURCES


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_page(browser, address, name, width, scheme):
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with watched(browser, address, **view) as page:
        rendered(page, f"{address}/{name}")
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.locator("mjx-merror, .MathJax_Error").count() == 0, "a formula does not parse"
        silent = page.locator("img").evaluate_all(
            "all => all.filter(i => !i.alt.trim()).map(i => i.src)"
        )
        assert silent == [], "pictures without alt text"
        page.locator(".bd-article img:visible").evaluate_all(
            "all => Promise.all(all.map(i => i.decode()))"
        )
        assert page.locator("h1:visible").count() == 1
        assert (
            page.locator("th").evaluate_all("all => all.filter(e => !e.textContent.trim()).length")
            == 0
        )
        page.evaluate(UNFOLD)
        page.evaluate(SETTLED)
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(
            path=SHOTS / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.jpg",
            full_page=True,
            type="jpeg",
            quality=80,
        )
        page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
        assert page.evaluate(ONE_OF_EACH) > 3
        contrast = [
            {"include": [["[data-one-of-each]"]]},
            {"runOnly": ["color-contrast"], "resultTypes": ["violations"], "preload": False},
        ]
        assert page.evaluate(AXE, contrast) == []
        if scheme == "light":  # the other rules do not depend on colours
            assert page.evaluate(f"({AXE})([document, {RULES}])") == []


@pytest.mark.parametrize("name", PAGES)
def test_formulas_and_code_fit_their_column(browser, address, name):
    with new_page(browser) as page:
        rendered(page, f"{address}/{name}")
        page.add_style_tag(content="mjx-assistive-mml { display: none !important }")
        page.evaluate(UNFOLD)
        for width in (1280, 1440, 1680):
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate(SETTLED)
            assert page.evaluate(OVERFLOWING) == [], f"{name}, {width} px wide"


def test_the_packages_source_fits_a_phone(browser, address):
    with watched(browser, address, viewport={"width": 390, "height": 900}) as page:
        for name in SOURCES:
            page.goto(f"{address}/{name}", wait_until="load")
            assert page.evaluate(TOO_WIDE) == [], name
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name


@pytest.mark.parametrize("name", PAGES)
def test_a_page_with_its_own_pictures_is_light(name):
    pictures = set(re.findall(r'<img [^>]*src="([^":?]*)"', text(name)))
    files = [HTML / name, *((HTML / name).parent / picture for picture in pictures)]
    assert sum(file.stat().st_size for file in files) < 1.5e6


def test_the_button_of_a_folded_cell_says_what_is_inside():
    lesson = text("02_flooding.html")
    buttons = re.findall(r"<summary[^>]*>.*?</summary>", lesson, re.S)
    words = " ".join(re.sub(r"<[^>]+>", " ", button) for button in buttons)
    assert "How Figure 2.1 is drawn" in words and "Checks" in words and "source" not in words


def test_the_book_works_anywhere(browser, anywhere):
    for name in ("index.html", CHAPTERS[0], SOURCES[0]):
        # a new page each time: leaving a page would abort what is still loading
        with watched(browser, anywhere) as page:
            rendered(page, f"{anywhere}/{name}")
            page.locator("svg.svg-inline--fa:visible").nth(2).wait_for()  # icons
            page.wait_for_function("[...document.fonts].every(font => font.status !== 'error')")


@pytest.mark.parametrize("words", ["flat minimum", "锐度"])
def test_search_finds_a_word_wherever_the_book_is(browser, anywhere, words):
    with new_page(browser) as page:
        page.goto(f"{anywhere}/index.html")
        page.keyboard.press("ControlOrMeta+k")
        page.keyboard.type(words)
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a[href*='glossary.html']")


def test_search_finds_every_word_of_the_glossary(browser, address):
    terms = [
        " ".join(unescape(term).split())
        for term in re.findall(r'<dt id="term-[^"]*">(.*?)<a', text("glossary.html"), re.S)
    ]
    assert len(terms) > 50
    search = "words => Search._performSearch(...Search._parseQuery(words)).map(result => result[0])"
    with new_page(browser) as page:
        page.goto(f"{address}/search.html?q=flatness")
        page.wait_for_selector("#search-results li")  # the index has arrived
        found = {term: set(page.evaluate(search, term)) for term in terms}
    assert [term for term, names in found.items() if not {"glossary"} < names] == [], (
        "found in the glossary and in a chapter"
    )


def test_the_words_that_a_chapter_introduces_link_to_the_glossary():
    entries = re.findall(r'<dt id="(term-[^"]*)">.*?<dd>(.*?)</dd>', text("glossary.html"), re.S)
    links = {
        name: set(re.findall(r'href="(?:\.\./)?glossary\.html#(term-[^"]*)"', text(name)))
        for name in CHAPTERS
    }
    introduced = [
        (term, name)
        for term, entry in entries
        for name in re.findall(r'href="([\w/]+\.html)"', entry.rpartition("(Chapter")[2])
    ]
    assert (
        len(introduced) >= len(entries)
        and [(term, name) for term, name in introduced if term not in links[name]] == []
    )


@pytest.mark.parametrize("name", [name for name in CHAPTERS if 'class="explorable"' in text(name)])
def test_explorable_figures_obey_the_keyboard(browser, address, name):
    with new_page(browser) as page:
        rendered(page, f"{address}/{name}")
        drawing = "id => document.getElementById(id).querySelector('.stage').innerHTML"
        for figure in page.locator(".explorable").all():
            id = figure.get_attribute("id")
            for knob in figure.locator("input").all():
                assert knob.evaluate("knob => knob.labels.length") == 1
                knob.evaluate(
                    "knob => { const before = document.createElement('button'); knob.before(before); before.focus(); }"
                )
                page.keyboard.press("Tab")
                assert knob.evaluate("knob => document.activeElement === knob")
                seen = []
                for key in ("Home", "End"):
                    page.keyboard.press(key)
                    seen.append((knob.get_attribute("aria-valuetext"), page.evaluate(drawing, id)))
                assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_the_whole_book_as_a_pdf(browser, tmp_path):
    """Page numbers are right, every formula is typeset, no link is lost."""
    from pypdf import PdfReader

    target = tmp_path / "book.pdf"
    pdf.make(browser, HTML.resolve(), target)
    reader = PdfReader(target)
    # With some fonts the text has ligatures: ﬀ for ff.
    plain = [unicodedata.normalize("NFKC", page.extract_text()) for page in reader.pages]
    texts = [re.sub(r"\s+", " ", page) for page in plain]
    assert len(texts) > 200 and target.stat().st_size < 50e6
    assert not re.search(r"Math input error|\\\(|\\\[|\\(?:frac|nabla|tag)\b", " ".join(texts))
    starts, names = pdf.numbers(target), [name for _, group in pdf.parts() for name in group]
    contents = " ".join(texts[1 : starts["index"] - 1])
    for name in names:
        [heading] = pdf.headings(pdf.article(HTML, name, names), 1)
        title = " ".join(heading.get_text().split())
        assert title[:30] in texts[starts[name] - 1], f"{title!r} begins on page {starts[name]}"
        assert re.search(rf"{re.escape(title[-20:])}\s*{starts[name]}\b", contents), (
            f"the contents do not give the page of {title!r}"
        )
    outline = [entry.title for entry in reader.outline if not isinstance(entry, list)]
    assert len(outline) >= len(names) and reader.trailer["/Root"]["/MarkInfo"]["/Marked"]
    wanted = {
        str(a["/Dest"]).removeprefix("/")
        for page in reader.pages
        for a in page.get("/Annots", [])
        for a in [a.get_object()]
        if "/Dest" in a
    }
    assert len(wanted) > 300 and wanted <= starts.keys()
