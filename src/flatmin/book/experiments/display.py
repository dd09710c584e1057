"""What the book shows of an experiment: its figure and where it comes from, or that there is none."""

from __future__ import annotations

import base64
import html
import inspect
import io
import json
import struct
from typing import TYPE_CHECKING

from .records import experiment, plot, record

if TYPE_CHECKING:
    import xarray as xr
    from IPython.display import HTML, Markdown

__all__ = ["caption", "duration", "full_scale", "origin", "picture"]

DPI = 160  # shown at 100, so sharp on dense screens


def full_scale(name: str, size: str | None = None) -> HTML | Markdown:
    """An experiment in a chapter: the figure of its record, or how to make one.

    Parameters
    ----------
    name, size
        As in :func:`record`.

    Returns
    -------
    HTML or Markdown
        For a notebook.

    Examples
    --------
    >>> "Ishida et al. 2020" in full_scale("flooding_synthetic").data
    True
    """
    from IPython.display import HTML, Markdown

    source = experiment(name).SOURCE
    command = f"python -m flatmin.book.experiments {name}" + (f" --size {size}" if size else "")
    try:
        found = record(name, size)
    except FileNotFoundError:
        return Markdown(f"*Not yet recorded* ({source}). This makes the record: `{command}`")
    png = picture(found)
    image = base64.b64encode(png).decode()
    width, height = (100 * pixels // DPI for pixels in struct.unpack(">2I", png[16:24]))
    words = html.escape(caption(name, found))
    return HTML(
        f'<img src="data:image/png;base64,{image}" alt="{words}" width="{width}" height="{height}" '
        'style="max-width:100%;height:auto">'
        f'<div class="figure-caption"><p>{words} ({html.escape(source)}; {html.escape(origin(found))}.)</p></div>'
    )


def caption(name: str, record: xr.Dataset | None = None) -> str:
    """What an experiment's figure shows, of this record, in words."""
    module = experiment(name)
    chooses = record is not None and hasattr(module, "drawing")
    drawn = module.drawing(record) if chooses else module.plot
    return " ".join(inspect.cleandoc(drawn.__doc__).split())


def origin(record: xr.Dataset) -> str:
    """Where a record was made, from what, and in how long.

    Examples
    --------
    >>> from flatmin.book.experiments import record
    >>> origin(record("flooding_synthetic")).startswith("size demo, 10 seeds, generated: ")
    True
    """
    about = record.attrs
    return (
        f"size {about['size']}, {len(json.loads(about['seeds']))} seeds, {about['data']}; "
        f"on {about['device']}, PyTorch {about['torch']}, in {duration(float(about['seconds']))}"
    )


def duration(seconds: float) -> str:
    """Seconds, in the unit that suits them.

    Examples
    --------
    >>> duration(59), duration(600), duration(9000), duration(90_000)
    ('59 s', '10 min', '2.5 h', '25 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 2 else f"{hours:.{1 if hours < 10 else 0}f} h"


def picture(record: xr.Dataset) -> bytes:
    """The figure of a record, as PNG."""
    import matplotlib.pyplot as plt

    from ..plotting import use_style

    with plt.rc_context():
        use_style()
        figure = plot(record.attrs["experiment"], record)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        plt.close(figure)
    return file.getvalue()
