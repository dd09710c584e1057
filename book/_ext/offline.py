"""Serve MathJax from the book itself and drop what a page does not need, such as thebe."""

import shutil
from importlib.metadata import files
from pathlib import Path

# The full bundle: with a smaller one, a single \boldsymbol breaks all math of a page.
BUNDLE = "tex-chtml-full.js"
FONTS = "output/chtml/fonts/woff-v2"


def use_local_mathjax(app, config):
    config.mathjax_path = f"mathjax/{BUNDLE}"


def copy_mathjax(app, error):
    if error or app.builder.format != "html":
        return
    [bundle] = [f for f in files("sphinx-mathjax-offline") if f.match(f"static/mathjax/{BUNDLE}")]
    source, target = Path(bundle.locate()).parent, Path(app.outdir, "_static", "mathjax")
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)
    shutil.copy2(source / BUNDLE, target)


def drop_scripts(app, pagename, templatename, context, doctree):
    """Thebe asks another host; the playground loads its own files, in their order."""

    def dropped(file):
        words = f"{getattr(file, 'filename', file)} {getattr(file, 'attributes', '')}".lower()
        return "thebe" in words or "playground/" in words

    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context[kind] if not dropped(file)]


def setup(app):
    app.connect("config-inited", use_local_mathjax)
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", drop_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
