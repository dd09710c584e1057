"""What the book shows of an experiment: its figure and origin, or how to record it."""

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

__all__ = ["caption", "duration", "full_scale", "origin", "picture", "shade"]

DPI = 160  # shown at 100, so sharp on dense screens


def full_scale(name: str, size: str | None = None) -> HTML | Markdown:
    """The figure of an experiment's record for a chapter, or the command that makes the record.

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
        recorded = record(name, size)
    except FileNotFoundError:
        return Markdown(f"*Not yet recorded* ({source}). This makes the record: `{command}`")
    png = picture(recorded)
    image = base64.b64encode(png).decode()
    width, height = (100 * pixels // DPI for pixels in struct.unpack(">2I", png[16:24]))
    text = html.escape(caption(name, recorded))
    return HTML(
        f'<img src="data:image/png;base64,{image}" alt="{text}" width="{width}" height="{height}" '
        'style="max-width:100%;height:auto">'
        f'<div class="figure-caption"><p>{text} ({html.escape(source)}; {html.escape(origin(recorded))}.)</p></div>'
    )


def caption(name: str, record: xr.Dataset | None = None) -> str:
    """The caption of an experiment's figure, for this record if one is given."""
    module = experiment(name)
    has_drawings = record is not None and hasattr(module, "drawing")
    function = module.drawing(record) if has_drawings else module.plot
    return " ".join(inspect.cleandoc(function.__doc__).split())


def origin(record: xr.Dataset) -> str:
    """Where and from what data a record was made, and how long it took.

    Examples
    --------
    >>> from flatmin.book.experiments import record
    >>> origin(record("flooding_synthetic")).startswith("size demo, 10 seeds, generated: ")
    True
    """
    attrs = record.attrs
    return (
        f"size {attrs['size']}, {len(json.loads(attrs['seeds']))} seeds, {attrs['data']}; "
        f"on {attrs['device']}, PyTorch {attrs['torch']}, in {duration(float(attrs['seconds']))}"
    )


def duration(seconds: float) -> str:
    """Seconds as text, in a suitable unit.

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

    with plt.rc_context():
        figure = plot(record.attrs["experiment"], record)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        plt.close(figure)
    return file.getvalue()


def shade(name: str, share: float) -> tuple[float, ...]:
    """A colour of the book mixed with white, of which ``share`` is the colour.

    Examples
    --------
    >>> shade("other", 0.0)
    (1.0, 1.0, 1.0)
    """
    from matplotlib.colors import to_rgb

    from ..plotting import COLORS

    return tuple(1 - share * (1 - c) for c in to_rgb(COLORS[name]))
