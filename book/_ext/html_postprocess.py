"""Postprocess each HTML page, so that it loads fast and is accessible.

The theme loads 1.5 MB of icons before it shows anything, and its scripts block the page.  Here each
page contains only the icons it shows, all scripts are deferred in their order, figures are stored
as lossless WebP and load when they come into view, and embedded pictures (the static picture of an
explorable figure, which a browser with scripts never shows) become files.
"""

import base64
import functools
import hashlib
import io
import re
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.transforms.post_transforms import SphinxPostTransform

FONTAWESOME = (
    files("pydata_sphinx_theme") / "theme/pydata_sphinx_theme/static/scripts/fontawesome.js"
)
ICON = re.compile(r'<(i|span) class="([^"]*\bfa-[^"]*)"([^>]*)></\1>')
DATA = re.compile(r'(<img [^>]*?)src="data:image/png;base64,([^"]+)"')
FIGURE = re.compile(r'(<img )(?=[^>]*src="(?:\.\./)*_images/)')
SIZED = re.compile(r'<img ([^>]*)style="width: (\d+)px; height: (\d+)px;"')
THEBE = re.compile(
    r'<script type="text/x-thebe-config">.*?</script>|<script>kernelName = .*?</script>|<link [^>]*thebe[^>]*>',
    re.S,
)


@functools.cache
def icons():
    """{name: [(width, height, path), …]} of the theme's icons from Font Awesome (CC BY 4.0)."""
    drawings = {}
    drawing = r'[{,]"?([\w-]+)"?:\[(\d+),(\d+),\[[^\]]*\],"\w+","(M[^"]+)"\]'
    for name, *shape in re.findall(drawing, FONTAWESOME.read_text()):
        drawings.setdefault(name, []).append(shape)
    return drawings


def icon(match):
    """`<i class="fa-solid fa-moon">` as an SVG.  Of several styles of a name, the last is solid."""
    classes, rest = match[2].split(), match[3]
    [name] = [
        word.removeprefix("fa-")
        for word in classes
        if word.startswith("fa-") and word[3:] in icons()
    ]
    width, height, path = icons()[name][-1]
    return (
        f'<svg class="svg-inline--fa {" ".join(classes)}"{rest} aria-hidden="true" focusable="false" '
        f'viewBox="0 0 {width} {height}"><path fill="currentColor" d="{path}"/></svg>'
    )


def deferred(page):
    """Defer all scripts, in their order, and the inline script that needs one of them."""
    page = re.sub(r'<script src="[^"]*fontawesome\.js[^"]*"></script>', "", page)
    page = re.sub(r"<script(?![^>]* (?:defer|async)\b)(?=[^>]* src=)", "<script defer", page)
    return re.sub(
        r"<script>(DOCUMENTATION_OPTIONS\.pagename = [^<]*;)</script>",
        r'<script>addEventListener("DOMContentLoaded", () => { \1 });</script>',
        page,
    )


def lazy(page):
    """Load all figures but the first lazily; width and height are given, so that nothing moves."""
    above, first, below = (
        re.split(FIGURE, page, maxsplit=1) if FIGURE.search(page) else (page, "", "")
    )
    page = above + first + FIGURE.sub(r'\1loading="lazy" decoding="async" ', below)
    return SIZED.sub(r'<img width="\2" height="\3" \1', page)


def accessible(page):
    """Fix what the theme leaves out: tables scroll in their own box and stay tables for a screen
    reader; an empty corner is no heading; the sidebar is a landmark; a reference is a list item."""
    box = '<div class="pst-scrollable-table-container">'
    page = re.sub(
        f"({box})?(<table.*?</table>)",
        lambda m: m[0] if m[1] else f"{box}{m[2]}</div>",
        page,
        flags=re.S,
    )
    page = re.sub(r"<th\b([^>]*)>((?:\s|</?p>|&nbsp;|\xa0)*)</th>", r"<td\1>\2</td>", page)
    page = page.replace(' role="doc-biblioentry"', ' role="listitem"')
    return page.replace(
        '<div id="pst-primary-sidebar"',
        '<div id="pst-primary-sidebar" role="complementary" aria-label="Book"',
    )


def as_webp(picture, folder):
    """Store a picture as lossless WebP, a third of matplotlib's size, and return its file name."""
    name = hashlib.sha256(picture).hexdigest() + ".webp"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(picture)) as image:
            image.save(folder / name, lossless=True, exact=True)
    return name


def data_in_files(page, folder, up):
    """Move the embedded pictures of a page to files."""
    return DATA.sub(
        lambda match: f'{match[1]}src="{up}_images/{as_webp(base64.b64decode(match[2]), folder)}"',
        page,
    )


class FiguresAsWebp(SphinxPostTransform):
    """Store the figures of the chapters as WebP."""

    default_priority = 5  # after MyST-NB has chosen which form of an output to show
    formats = ("html",)

    def run(self):
        source = Path(self.env.srcdir)
        for image in self.document.findall(nodes.image):
            path = source / image["uri"]
            if path.suffix == ".png" and path.parent.name == "jupyter_execute":
                image["uri"] = str(
                    Path(image["uri"]).with_name(as_webp(path.read_bytes(), path.parent))
                )
                image["candidates"] = {"*": image["uri"]}
                self.env.images.add_file(self.env.docname, image["uri"])


def postprocess_pages(app):
    """Change each page after the templates have made it and before it is written."""
    render = app.builder.templates.render

    def render_and_postprocess(template, context):
        page = render(template, context)
        if not page.lstrip().startswith("<!DOCTYPE html>"):
            return page
        up = context["content_root"].removeprefix("./")
        page = data_in_files(THEBE.sub("", page), Path(app.outdir, "_images"), up)
        return accessible(lazy(deferred(ICON.sub(icon, page))))

    app.builder.templates.render = render_and_postprocess


def setup(app):
    app.add_post_transform(FiguresAsWebp)
    app.connect(
        "builder-inited", lambda app: app.builder.format == "html" and postprocess_pages(app)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
