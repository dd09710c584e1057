"""Serve MathJax from the book itself and drop thebe, so that pages need no other host."""

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


def drop_thebe(app, pagename, templatename, context, doctree):
    def is_thebe(script):
        return (
            "thebe"
            in (
                str(getattr(script, "filename", script)) + str(getattr(script, "attributes", ""))
            ).lower()
        )

    context["script_files"] = [script for script in context["script_files"] if not is_thebe(script)]


def setup(app):
    app.connect("config-inited", use_local_mathjax)
    app.connect("build-finished", copy_mathjax)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
