"""One style for all figures: a colour per method, error bands, labels on the lines."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ._extras import needs
from .statistics import mean_interval

with needs("plot", "flatmin.book.plotting"):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.lines import Line2D

__all__ = ["COLORS", "band", "bars", "label_end", "use_style"]

#: One colour per method throughout the book (from or near Okabe & Ito's palette, for colour-blind
#: readers), and further ones for everything else.
COLORS = {
    "ERM": "#5b5b5b",
    "flooding": "#0072b2",
    "gradient penalty": "#3f9ad1",
    "mixup": "#008c67",
    "SAM": "#d55e00",
    "early stopping": "#b8860b",
    "stiffness": "#a8588a",
    "weight decay": "#501e00",
    "dropout": "#460078",
    "other": "#111111",
    "another": "#3c5a00",
    "highlight": "#c4304c",
    "faint": "#b5b5b5",
}


def use_style() -> None:
    """Set the book's style for all figures that follow, sharp on high-resolution screens."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 3.2),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#555555",
            "axes.labelcolor": "#222222",
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e8e8e8",
            "grid.linewidth": 0.8,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "xtick.color": "#555555",
            "ytick.color": "#555555",
            "font.size": 10,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )
    with contextlib.suppress(ImportError):  # outside a notebook there is no inline backend
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def label_end(ax: Axes, x: Any, y: Any, text: str, color: str, dy: float = 0.0) -> None:
    """Write ``text`` beside the last point of a line, shifted up by ``dy`` points."""
    ax.annotate(
        text,
        (float(np.asarray(x)[-1]), float(np.asarray(y)[-1])),
        xytext=(5, dy),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=9,
        annotation_clip=False,
    )


def band(
    ax: Axes,
    values: xr.DataArray,
    x: str = "step",
    color: str = COLORS["ERM"],
    label: str = "",
    dy: float = 0.0,
    **line: Any,
) -> Line2D:
    """Draw the mean over seeds and its 95 % confidence band against a dimension.

    Parameters
    ----------
    ax : Axes
    values : DataArray
        With the dimensions ``seed`` and ``x`` only.
    x : str
        The dimension on the horizontal axis.
    color, label, dy :
        Style of the line; its label is at the right end, shifted up by ``dy`` points.
    **line :
        Passed on to ``Axes.plot``.

    Examples
    --------
    >>> import xarray as xr
    >>> coords = {"step": [0, 9]}
    >>> values = xr.DataArray([[0.0, 1.0], [1.0, 2.0]], coords, ("seed", "step"))
    >>> fig, ax = plt.subplots()
    >>> band(ax, values).get_ydata()
    array([0.5, 1.5])
    >>> plt.close(fig)
    """
    if set(values.dims) != {"seed", x}:
        raise ValueError(f"values must have the dimensions 'seed' and {x!r}, got {values.dims}")
    m = mean_interval(values)
    (drawn,) = ax.plot(m[x], m["mean"], color=color, **line)
    ax.fill_between(m[x], m["low"], m["high"], color=color, alpha=0.18, linewidth=0)
    if label:
        label_end(ax, m[x], m["mean"], label, color, dy)
    return drawn


def bars(
    ax: Axes,
    values: Mapping[str, xr.DataArray],
    colors: Mapping[str, str] | None = None,
    unit: float = 1.0,
) -> None:
    """Draw one dot with a 95 % interval per row: ``{row label: DataArray over seeds}``.

    Parameters
    ----------
    ax : Axes
    values : dict of str to DataArray
        From top to bottom.
    colors : dict of str to str
        The colours of the rows that are not grey.
    unit : float
        What the values are multiplied by, e.g. 100 for per cent.
    """
    for row, (label, value) in enumerate(values.items()):
        m = mean_interval(value) * unit
        color = (colors or {}).get(label, COLORS["ERM"])
        ax.errorbar(float(m["mean"]), row, xerr=float(m["half"]), fmt="o", color=color, capsize=3)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
