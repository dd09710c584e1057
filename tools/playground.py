"""Record the picture that the playground shows where it cannot run, with headless Chromium.

    python tools/playground.py [FOLDER OF THE RENDERED BOOK]

Task 5 with seed 1, paused after its 3,000 steps.  Run it again after a change of the page.
"""

import io
import sys
from pathlib import Path

import pdf
from notebooks import BOOK, ROOT
from PIL import Image
from playwright.sync_api import sync_playwright

from flatmin._files import replace

PICTURE = BOOK / "_static" / "playground" / "recorded.webp"


def main(folder=ROOT / "_build/check/_build/html"):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=pdf.chromium(), args=pdf.FLAGS)
        page = browser.new_page(viewport={"width": 1240, "height": 1000}, color_scheme="light")
        page.goto(f"{Path(folder).resolve().as_uri()}/playground.html#preset=mixup")
        page.wait_for_selector("#the-playground[data-playing]")
        page.click("button.play")
        page.wait_for_function(
            "document.querySelector('.playground-counter').textContent === 'step 3,000'",
            timeout=600_000,
        )
        page.wait_for_timeout(1000)  # until the last frame is drawn
        page.add_style_tag(
            content=".playground :is(.playground-readings, .playground-toolbar, .chart:nth-child(n + 5))"
            "{ display: none !important }"
        )
        page.wait_for_timeout(500)
        figures = page.locator(".playground-figures")
        image = Image.open(io.BytesIO(figures.screenshot())).convert("RGB")
        browser.close()
    image.thumbnail((500, 2000))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=20, method=6)
    replace(PICTURE, buffer.getvalue())
    print(
        f"{PICTURE.relative_to(ROOT)}: {image.width} × {image.height}, {len(buffer.getvalue()):,} bytes"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
