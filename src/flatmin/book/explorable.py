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
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import needs

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
    frames = [[_frames(p, label, n) for label in p.lines] for p in panels]
    data = {
        "values": [[str(v) for v in values] for values in knobs.values()],
        "notes": list(notes),
        "panels": [
            {
                "title": p.title,
                "xlabel": p.xlabel,
                "ylabel": p.ylabel,
                "xlim": [float(v) for v in p.xlim],
                "xticks": _ticks(p.xlim),
                "ylim": [float(v) for v in p.ylim],
                "yticks": _ticks(p.ylim),
                "lines": [
                    {
                        "label": label,
                        "color": p.colors[label],
                        "dashed": label in p.dashed,
                        "dots": label in p.dots,
                        "x": x,
                        "y": y,
                    }
                    for label, (x, y) in zip(p.lines, lines)
                ],
            }
            for p, lines in zip(panels, frames)
        ],
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
        "PNG": _static(panels, frames, title, start),
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return HTML(re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _TEMPLATE))


def _frames(panel: Panel, label: str, n: int) -> list[list[list[float | None]]]:
    """x and y of a line: [n][points], or [1][points] where it is the same in every frame."""
    if label not in panel.colors:
        raise ValueError(f"colors must have one for each line, got none for {label!r}")
    coordinates = []
    for values in panel.lines[label]:
        values = np.atleast_2d(np.asarray(values, dtype=float))
        if len(values) not in (1, n):
            raise ValueError(
                f"line {label!r} must have 1 or {n} frames, as many as values, got {len(values)}"
            )
        coordinates.append([[_round(v) for v in row] for row in values])
    x_points, y_points = (len(frames[0]) for frames in coordinates)
    if x_points != y_points:
        raise ValueError(f"line {label!r} must have as many x as y, got {x_points} and {y_points}")
    return coordinates


def _round(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _ticks(limits: tuple[float, float]) -> list[float | None]:
    ticks = MaxNLocator(5).tick_values(*limits)
    return [_round(t) for t in ticks if limits[0] <= t <= limits[1]]


def _static(panels: Sequence[Panel], frames: list[Any], title: str, start: int) -> str:
    fig, axes = plt.subplots(1, len(panels), squeeze=False)
    shown_frame = lambda frames: np.array(frames[start % len(frames)], dtype=float)
    for ax, panel, lines in zip(axes[0], panels, frames):
        for label, (x, y) in zip(panel.lines, lines):
            style = "o" if label in panel.dots else "--" if label in panel.dashed else "-"
            x, y = shown_frame(x), shown_frame(y)
            ax.plot(x, y, style, color=panel.colors[label], label=label, markersize=4)
        ax.set(
            title=panel.title,
            xlabel=panel.xlabel,
            ylabel=panel.ylabel,
            xlim=panel.xlim,
            ylim=panel.ylim,
        )
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

_TEMPLATE = """
<div class="explorable" id="@ID@">
<img alt="@ALT@" src="data:image/png;base64,@PNG@" style="max-width:100%">
<div class="stage" role="img" aria-label="@ALT@" hidden
 style="display:none;flex-wrap:wrap;gap:0.5rem"></div>
<div class="controls" style="display:none;align-items:center;gap:0.7rem;flex-wrap:wrap">@SLIDERS@
<span class="note" aria-live="polite" style="flex-basis:100%;min-height:1.5em"></span>
</div>
<script>
(function () {
  const root = document.getElementById("@ID@"), data = @DATA@;
  const stage = root.querySelector(".stage"), knobs = [...root.querySelectorAll("input")];
  const W = 360, H = 250, L = 46, R = 10, T = 26, B = 40;
  const NS = "http://www.w3.org/2000/svg";
  const add = (parent, tag, attributes, text) => {
    const e = document.createElementNS(NS, tag);
    for (const k in attributes) e.setAttribute(k, attributes[k]);
    if (text !== undefined) e.textContent = text;
    parent.appendChild(e);
    return e;
  };
  const drawn = [];
  data.panels.forEach((p, i) => {
    const X = v => L + (v - p.xlim[0]) / (p.xlim[1] - p.xlim[0]) * (W - L - R);
    const Y = v => H - B - (v - p.ylim[0]) / (p.ylim[1] - p.ylim[0]) * (H - T - B);
    const svg = add(stage, "svg", {viewBox: `0 0 ${W} ${H}`, "font-size": 11, fill: "currentColor",
      "font-family": "sans-serif", style: "flex:1 1 300px;max-width:560px;min-width:260px"});
    const clip = add(add(svg, "clipPath", {id: `@ID@-clip${i}`}), "rect",
      {x: L, y: T, width: W - L - R, height: H - T - B});
    for (const t of p.xticks) {
      add(svg, "line", {x1: X(t), x2: X(t), y1: T, y2: H - B, stroke: "currentColor", opacity: .13});
      add(svg, "text", {x: X(t), y: H - B + 14, "text-anchor": "middle", opacity: .8}, t);
    }
    for (const t of p.yticks) {
      add(svg, "line", {x1: L, x2: W - R, y1: Y(t), y2: Y(t), stroke: "currentColor", opacity: .13});
      add(svg, "text", {x: L - 5, y: Y(t) + 4, "text-anchor": "end", opacity: .8}, t);
    }
    add(svg, "text", {x: L, y: 14, "font-weight": 600}, p.title);
    add(svg, "text", {x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle"}, p.xlabel);
    add(svg, "text", {x: 11, y: (T + H - B) / 2, "text-anchor": "middle",
      transform: `rotate(-90 11 ${(T + H - B) / 2})`}, p.ylabel);
    const plot = add(svg, "g", {"clip-path": `url(#@ID@-clip${i})`});
    p.lines.forEach((line, j) => {
      const shape = add(plot, "path", line.dots
        ? {fill: "none", stroke: line.color, "stroke-width": 7, "stroke-linecap": "round"}
        : {fill: "none", stroke: line.color, "stroke-width": 2,
           "stroke-dasharray": line.dashed ? "5 4" : "none"});
      add(svg, "line", {x1: W - R - 112, x2: W - R - 94, y1: T + 8 + 14 * j, y2: T + 8 + 14 * j,
        stroke: line.color, "stroke-width": 3, "stroke-dasharray": line.dashed ? "5 4" : "none"});
      add(svg, "text", {x: W - R - 89, y: T + 12 + 14 * j}, line.label);
      drawn.push(k => {
        const x = line.x[k % line.x.length], y = line.y[k % line.y.length];
        let d = "", pen = false;
        for (let m = 0; m < Math.max(x.length, y.length); m++) {
          const u = x[Math.min(m, x.length - 1)], v = y[Math.min(m, y.length - 1)];
          if (u === null || v === null) { pen = false; continue; }
          const point = X(u).toFixed(1) + " " + Y(v).toFixed(1);
          d += line.dots ? `M${point}l.01 0` : (pen ? "L" : "M") + point;
          pen = true;
        }
        shape.setAttribute("d", d);
      });
    });
  });
  const draw = () => {
    const k = knobs.reduce((k, knob, i) => k * data.values[i].length + +knob.value, 0);
    drawn.forEach(f => f(k));
    root.querySelectorAll("output").forEach((output, i) => {
      output.textContent = data.values[i][+knobs[i].value];
      knobs[i].setAttribute("aria-valuetext", output.textContent);
    });
    root.querySelector(".note").textContent = data.notes[k] || "";
  };
  knobs.forEach(knob => knob.addEventListener("input", draw));
  root.querySelector("img").style.display = "none";
  stage.hidden = false;
  stage.style.display = root.querySelector(".controls").style.display = "flex";
  draw();
})();
</script>
</div>
"""
