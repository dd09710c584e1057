"""Pages that load fast and that all can read: small pictures, icons in the page, no script that holds it up.

The theme loads 1.5 MB of icons before it shows anything, and every script in the head waits for the one before.  Here
each page carries the few icons it shows, all scripts are deferred in their order, figures are stored as WebP without
loss and load when they come into sight, and what a page holds as data (the static picture of an explorable figure,
which a browser with scripts never shows) becomes a file.
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
    """Every drawing of Font Awesome (CC BY 4.0) that the theme ships, by name: [(width, height, path), …]."""
    found = {}
    drawing = r'[{,]"?([\w-]+)"?:\[(\d+),(\d+),\[[^\]]*\],"\w+","(M[^"]+)"\]'
    for name, *drawn in re.findall(drawing, FONTAWESOME.read_text()):
        found.setdefault(name, []).append(drawn)
    return found


def icon(match):
    """`<i class="fa-solid fa-moon">` as a drawing.  Where a name has several styles, the solid one is the last."""
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
    """All scripts run in their order after the page is there; what an inline one needs from them waits with it."""
    page = re.sub(r'<script src="[^"]*fontawesome\.js[^"]*"></script>', "", page)
    page = re.sub(r"<script(?![^>]* (?:defer|async)\b)(?=[^>]* src=)", "<script defer", page)
    return re.sub(
        r"<script>(DOCUMENTATION_OPTIONS\.pagename = [^<]*;)</script>",
        r'<script>addEventListener("DOMContentLoaded", () => { \1 });</script>',
        page,
    )


def lazy(page):
    """All figures but the first load when they come into sight, and nothing moves when they do."""
    above, first, below = (
        re.split(FIGURE, page, maxsplit=1) if FIGURE.search(page) else (page, "", "")
    )
    page = above + first + FIGURE.sub(r'\1loading="lazy" decoding="async" ', below)
    return SIZED.sub(r'<img width="\2" height="\3" \1', page)


def accessible(page):
    """What the theme leaves to do: tables scroll in a box of their own, and stay tables for a screen reader; an empty
    corner is no heading; the sidebar is a landmark; what is cited is an item of a list."""
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
    """The name of the file that holds a picture without loss: a third of the size that matplotlib writes."""
    name = hashlib.sha256(picture).hexdigest() + ".webp"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(io.BytesIO(picture)) as image:
            image.save(folder / name, lossless=True, exact=True)
    return name


def data_in_files(page, folder, up):
    """A page whose pictures are files."""
    return DATA.sub(
        lambda match: f'{match[1]}src="{up}_images/{as_webp(base64.b64decode(match[2]), folder)}"',
        page,
    )


class FiguresAsWebp(SphinxPostTransform):
    """The figures of the chapters, stored smaller."""

    default_priority = 5  # after MyST-NB has chosen what of an output is shown
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


def lighten(app):
    """Each page, as the templates make it and before it is written."""
    render = app.builder.templates.render

    def light(template, context):
        page = render(template, context)
        if not page.lstrip().startswith("<!DOCTYPE html>"):
            return page
        up = context["content_root"].removeprefix("./")
        page = data_in_files(THEBE.sub("", page), Path(app.outdir, "_images"), up)
        return accessible(lazy(deferred(ICON.sub(icon, page))))

    app.builder.templates.render = light


def setup(app):
    app.add_post_transform(FiguresAsWebp)
    app.connect("builder-inited", lambda app: app.builder.format == "html" and lighten(app))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
