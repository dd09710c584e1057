"""What tests of the built book share: the book, a server, and pages that must be without errors."""

import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from notebooks import ROOT

HTML = ROOT / os.environ.get("FLATMIN_HTML", "_build/check/_build/html")
PAGES = sorted(
    path.relative_to(HTML).as_posix()
    for path in [*HTML.glob("*.html"), *HTML.glob("evidence/*.html")]
)
TIMEOUT = 120_000  # milliseconds; a busy machine is no error

# what sticks out of the page, unless it scrolls inside something
TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth;
    const scrolls = e => e && (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
    return [...document.querySelectorAll('.bd-article *')]
        .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement) && !e.closest('mjx-assistive-mml'))
        .map(e => e.outerHTML.slice(0, 120));
}"""
# All WCAG 2 rules to AA, and axe-core's best practice (ordered headings, landmarks for everything).
# Contrast takes nine tenths of the time, so it is tested separately, for one text per pair of
# colours, size and weight.  axe-core does not see formulas as text, so `empty-table-header` would
# report headings that are not empty: test_page tests them itself.
RULES = """{resultTypes: ['violations'], preload: false, rules: {'color-contrast': {enabled: false}, 'empty-table-header': {enabled: false}},
    runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}"""
AXE = (
    "([context, options]) => axe.run(context, options).then(found => found.violations.flatMap("
    "v => v.nodes.map(n => `${v.id}: ${n.target} ${n.html.slice(0, 120)} ${n.failureSummary}`)))"
)


def missing(reason):
    """Skip with a reason; in CI, where the browser must exist, fail."""
    (pytest.fail if os.environ.get("FLATMIN_REQUIRE_WEB") else pytest.skip)(reason)


def serve(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    server.handle_error = lambda *_: None  # a page that is closed hangs up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def new_page(browser, **options):
    """A page that does not depend on the desktop's settings, closed at the end."""
    page = browser.new_page(reduced_motion="reduce", **options)
    page.set_default_timeout(TIMEOUT)
    try:
        yield page
    finally:
        page.close()


@contextmanager
def watched(browser, address, **options):
    """A new page that must be without errors."""
    troubles = []
    with new_page(browser, **options) as page:
        page.on(
            "request",
            lambda r: (
                r.url.startswith((address, "data:", "blob:"))
                or troubles.append(f"leaves the host: {r.url}")
            ),
        )
        # leaving a page aborts what is still under way, such as its icon
        aborted = lambda r: r.failure == "net::ERR_ABORTED"
        page.on("requestfailed", lambda r: aborted(r) or troubles.append(f"failed: {r.url}"))
        page.on("response", lambda r: r.status >= 400 and troubles.append(f"{r.status}: {r.url}"))
        page.on("console", lambda m: m.type == "error" and troubles.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: troubles.append(f"script: {e}"))
        yield page
    assert troubles == []
