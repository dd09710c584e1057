"""A browser, and the built book on a server."""

import pdf
import pytest
from web import HTML, PAGES, TIMEOUT, missing, serve


@pytest.fixture(scope="module")
def browser():
    if not pdf.chromium():
        missing("no Chromium on this machine (Debian: apt-get install chromium)")
    if not PAGES:
        missing(f"no book in {HTML}: make test-book")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=pdf.chromium(), args=pdf.FLAGS, timeout=TIMEOUT
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address():
    yield from serve(HTML)


@pytest.fixture(scope="module", params=["file", "server", "sub-path"])
def anywhere(request):
    """The book as a folder of files, as a server's root, and as a folder on a server."""
    if request.param == "file":
        yield HTML.as_uri()
    else:
        start = serve(HTML if request.param == "server" else HTML.parent)
        yield next(start) + (f"/{HTML.name}" if request.param == "sub-path" else "")
        next(start, None)
