"""Store the chapters' figures as lossless WebP, a third of matplotlib's size.

As PNG, five pages with their figures are heavier than 1.5 MB.
"""

import base64
import io
import re
from pathlib import Path

from docutils import nodes
from PIL import Image
from sphinx.transforms.post_transforms import SphinxPostTransform

EMBEDDED = re.compile(r"data:image/png;base64,([\w+/=]+)")


def as_webp(png):
    """The bytes of a PNG (a path or an open file) as lossless WebP."""
    file = io.BytesIO()
    with Image.open(png) as image:
        image.save(file, "webp", lossless=True, exact=True)
    return file.getvalue()


def embedded_as_webp(match):
    picture = as_webp(io.BytesIO(base64.b64decode(match[1])))
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


class FiguresAsWebp(SphinxPostTransform):
    """Change figures, and the static pictures inside explorable ones."""

    default_priority = 5  # after MyST-NB has chosen which form of an output to show
    formats = ("html",)

    def run(self):
        for image in self.document.findall(nodes.image):
            path = Path(self.env.srcdir, image["uri"])
            if path.suffix == ".png" and path.parent.name == "jupyter_execute":
                path.with_suffix(".webp").write_bytes(as_webp(path))
                image["uri"] = image["uri"].removesuffix(".png") + ".webp"
                image["candidates"] = {"*": image["uri"]}
                self.env.images.add_file(self.env.docname, image["uri"])
        for raw in self.document.findall(nodes.raw):
            raw[:] = [nodes.Text(EMBEDDED.sub(embedded_as_webp, raw.astext()))]


def setup(app):
    app.add_post_transform(FiguresAsWebp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
