"""Explorable figures: sliders over precomputed lines, in plain JavaScript.

Works from a file, in the book, in JupyterLab and in Colab, without server or network.  Where
scripts do not run, a static picture of one frame is shown instead.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._extras import needs

with needs("plot", "flatmin.book.explorable"):
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from IPython.display import HTML

__all__ = ["Panel", "explorable"]


@dataclass(frozen=True)
class Panel:
    """One pair of axes of an explorable figure.

    Parameters
    ----------
    lines : mapping of str to (x, y)
        By label.  x and y have shape [n], the same in every frame, or [frames, n].
    colors : mapping of str to str
        A colour for each label.
    title, xlabel, ylabel : str
    xlim, ylim : pair of float
    dashed, dots : sequence of str
        Labels that are drawn dashed, or as dots.
    """

    lines: Mapping[str, tuple[Any, Any]]
    colors: Mapping[str, str]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xlim: tuple[float, float] = (0, 1)
    ylim: tuple[float, float] = (0, 1)
    dashed: Sequence[str] = ()
    dots: Sequence[str] = ()


def explorable(
    id: str,
    panels: Sequence[Panel],
    knob: str | Sequence[str],
    values: Sequence[Any],
    alt: str,
    start: int = 0,
    notes: Sequence[str] = (),
) -> HTML:
    """A figure with one or more sliders that choose its frame.

    Parameters
    ----------
    id : str
        The element's id, unique on the page.
    panels : sequence of Panel
        Drawn side by side, or stacked on a narrow screen.
    knob : str, or sequence of str
        What the slider sets, e.g. ``"flood level b"``; several names make several sliders.
    values : sequence, or a sequence of them
        The slider's value in each frame, as displayed.  With several sliders: the values of each,
        and one frame per combination, the last slider varying fastest.
    alt : str
        What the figure shows, in words.
    start : int
        The frame shown first, which is also the static picture.
    notes : sequence of str
        A line of text for each frame, below the slider.

    Returns
    -------
    IPython.display.HTML
        Displayed as a cell's last expression.

    Examples
    --------
    >>> panel = Panel({"y = bx": ([0, 1], [[0, 1], [0, 2]])}, {"y = bx": "#0072b2"}, ylim=(0, 2))
    >>> figure = explorable("slope", [panel], "slope b", [1, 2], alt="A line and its slope.")
    >>> 'type="range"' in figure.data and "http" not in figure.data.replace("http://www.w3.org", "")
    True
    """
    with needs("plot", "explorable()"):
        from IPython.display import HTML

    knobs = {knob: values} if isinstance(knob, str) else dict(zip(knob, values, strict=True))
    n = math.prod(len(v) for v in knobs.values())
    if not re.fullmatch(r"[A-Za-z][\w-]*", id):
        raise ValueError(f"id must be a letter, then letters, digits, '-' and '_', got {id!r}")
    if not panels:
        raise ValueError("panels must be at least one, got none")
    if not n or (notes and len(notes) != n):
        raise ValueError(f"notes must be one per value ({n}, at least 1), got {len(notes)}")
    if not 0 <= start < n:
        raise ValueError(f"start must be between 0 and {n - 1}, got {start}")
    data: dict[str, Any] = {
        "values": [[str(v) for v in values] for values in knobs.values()],
        "notes": list(notes),
        "panels": [_panel(panel, n) for panel in panels],
    }
    indices = np.unravel_index(start, [len(values) for values in knobs.values()])
    title = ", ".join(f"{name} = {values[i]}" for (name, values), i in zip(knobs.items(), indices))
    sliders = [
        _SLIDER.format(
            id=f"{id}-knob{k or ''}", name=html.escape(name), last=len(values) - 1, start=i
        )
        for k, ((name, values), i) in enumerate(zip(knobs.items(), indices))
    ]
    parts = {
        "ID": id,
        "ALT": html.escape(alt),
        "SLIDERS": "".join(sliders),
        "PNG": _static(data["panels"], title, start),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = "\n" + Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return HTML(re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template))


def _panel(panel: Panel, n: int) -> dict[str, Any]:
    """What the script draws: a line's x and y are [n][points], or [1][points] if all are the same."""
    lines = []
    for label, xy in panel.lines.items():
        if label not in panel.colors:
            raise ValueError(f"colors must have one for each line, got none for {label!r}")
        x, y = (np.atleast_2d(np.asarray(values, dtype=float)) for values in xy)
        for frames in (x, y):
            if len(frames) not in (1, n):
                raise ValueError(
                    f"line {label!r} must have 1 or {n} frames, as many as values, "
                    f"got {len(frames)}"
                )
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"line {label!r} must have as many x as y, got {x.shape[1]} and {y.shape[1]}"
            )
        lines.append(
            {
                "label": label,
                "color": panel.colors[label],
                "dashed": label in panel.dashed,
                "dots": label in panel.dots,
                "x": [_rounded(row) for row in x],
                "y": [_rounded(row) for row in y],
            }
        )
    return {
        "title": panel.title,
        "xlabel": panel.xlabel,
        "ylabel": panel.ylabel,
        "xlim": [float(v) for v in panel.xlim],
        "xticks": _ticks(*panel.xlim),
        "ylim": [float(v) for v in panel.ylim],
        "yticks": _ticks(*panel.ylim),
        "lines": lines,
    }


def _rounded(values: Any) -> list[float | None]:
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]


def _ticks(low: float, high: float) -> list[float | None]:
    return _rounded(t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high)


def _static(panels: Sequence[dict[str, Any]], title: str, start: int) -> str:
    """The frame ``start`` as a PNG, in base 64."""
    fig, axes = plt.subplots(1, len(panels), squeeze=False)
    for ax, panel in zip(axes[0], panels):
        for line in panel["lines"]:
            style = "o" if line["dots"] else "--" if line["dashed"] else "-"
            x, y = (np.array(v[start % len(v)], dtype=float) for v in (line["x"], line["y"]))
            ax.plot(x, y, style, color=line["color"], label=line["label"], markersize=4)
        ax.set(**{key: panel[key] for key in ("title", "xlabel", "ylabel", "xlim", "ylim")})
        ax.legend()
    fig.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    plt.close(fig)
    return base64.b64encode(buffer.getvalue()).decode()


_SLIDER = """
<div style="flex:1 1 20rem;display:flex;align-items:center;gap:0.7rem;flex-wrap:wrap">
<label for="{id}">{name} = <output style="font-variant-numeric:tabular-nums;
 display:inline-block;min-width:3.2em;font-weight:600"></output></label>
<input type="range" id="{id}" min="0" max="{last}" value="{start}" step="1"
 style="flex:1 1 12rem;min-width:10rem"></div>"""
