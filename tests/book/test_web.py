"""The built book in a real browser: offline, complete, readable on a phone and in the dark.

Reads FLATMIN_HTML (`make test-web`: the book of `make test`), leaves pictures in _build/screenshots.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from notebooks import ROOT

pytestmark = pytest.mark.web

HTML = ROOT / os.environ.get("FLATMIN_HTML", "_build/check/_build/html")
PAGES = sorted(path.name for path in HTML.glob("*.html"))
SHOTS = ROOT / "_build" / "screenshots"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]
RENDERED = """() => {
    const math = [...document.querySelectorAll('.math')].length;
    return math === 0 || (window.MathJax?.startup?.promise && document.querySelectorAll('mjx-container').length >= math);
}"""
# what sticks out of the page, unless it scrolls inside something
TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    const scrolls = e => e && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
    return [...document.querySelectorAll('.bd-article *')]
        .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement) && !e.closest('mjx-assistive-mml'))
        .map(e => e.outerHTML.slice(0, 120));
}"""


def missing(reason):
    """Skip, saying why; where the browser must be there (CI), fail."""
    (pytest.fail if os.environ.get("FLATMIN_REQUIRE_WEB") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not executable:
        missing("no Chromium on this machine (Debian: apt-get install chromium)")
    if not PAGES:
        missing(f"no book in {HTML}: make test-book")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_there_is_a_book(browser):
    assert "index.html" in PAGES and any(name[0].isdigit() for name in PAGES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_page(browser, address, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    troubles = []
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or troubles.append(f"leaves the host: {r.url}"))
    page.on("requestfailed", lambda r: troubles.append(f"failed: {r.url}"))
    page.on("response", lambda r: r.status >= 400 and troubles.append(f"{r.status}: {r.url}"))
    page.on("console", lambda m: m.type == "error" and troubles.append(f"console: {m.text}"))
    page.on("pageerror", lambda e: troubles.append(f"script: {e}"))
    try:
        page.goto(f"{address}/{name}", wait_until="networkidle")
        page.wait_for_function(RENDERED, timeout=15000)
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.locator("mjx-merror, .MathJax_Error").count() == 0, "a formula does not parse"
        silent = page.locator("img").evaluate_all("all => all.filter(i => !i.alt.trim()).map(i => i.src)")
        assert silent == [], "pictures without alt text"
        broken = page.locator("img").evaluate_all("all => all.filter(i => i.complete && !i.naturalWidth && i.checkVisibility()).map(i => i.src)")
        assert broken == []
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{Path(name).stem}-{width}-{scheme}.png", full_page=True)
        assert troubles == []
    finally:
        page.close()
