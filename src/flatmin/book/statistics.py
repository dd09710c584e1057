"""Means with confidence intervals, for all comparisons of the book."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..stack import Runs

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["mean_interval", "pm"]


def mean_interval(
    values: xr.DataArray | xr.Dataset | Runs, dim: str = "seed", confidence: float = 0.95
) -> xr.Dataset:
    r"""The mean over ``dim`` and its Student-t confidence interval.

    .. math:: \bar v \pm t_{(1+c)/2,\,n-1}\; s/\sqrt n

    For a comparison, pass the *difference* of two paired quantities: runs with the same seed
    share weights and batches, and what they share cancels.

    Parameters
    ----------
    values : DataArray, Dataset or Runs
        With a dimension ``dim`` of length :math:`n \ge 2`.
    dim : str
        What varies between repetitions.
    confidence : float
        The coverage :math:`c` in (0, 1) for normally distributed values.

    Returns
    -------
    Dataset
        ``mean``, ``low``, ``high`` and ``half`` (half the width), without ``dim``.  One NaN among
        the values makes all four NaN: a diverged run is not averaged away.  Of a Dataset or of
        Runs, every variable has the four along a dimension ``statistic``.

    Examples
    --------
    >>> import xarray as xr
    >>> v = xr.DataArray([1.0, 2.0, 3.0], dims="seed")
    >>> m = mean_interval(v)
    >>> round(float(m["mean"]), 3), round(float(m["low"]), 3), round(float(m["high"]), 3)
    (2.0, -0.484, 4.484)
    """
    import xarray as xr  # here, to keep importing flatmin fast
    from scipy.special import stdtrit

    dataset = values.data if isinstance(values, Runs) else values
    if isinstance(dataset, xr.Dataset):
        of_each = {
            name: mean_interval(v, dim, confidence).to_array("statistic")
            for name, v in dataset.data_vars.items()
        }
        return xr.Dataset(of_each)
    if not isinstance(values, xr.DataArray):
        raise TypeError(
            f"values must be a DataArray, a Dataset or Runs, got {type(values).__name__}"
        )
    if dim not in values.dims:
        raise ValueError(f"dim must be one of {list(values.dims)}, got {dim!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    n = values.sizes[dim]
    if n < 2:
        raise ValueError(f"values must have at least 2 along {dim!r} for an interval, got {n}")
    values = values.astype("float64")
    mean = values.mean(dim, skipna=False)
    half = values.std(dim, ddof=1, skipna=False) * stdtrit(n - 1, (1 + confidence) / 2) / n**0.5
    return xr.Dataset({"mean": mean, "low": mean - half, "high": mean + half, "half": half})


def pm(values: xr.DataArray, digits: int = 2, dim: str = "seed") -> str:
    """``"mean ± half"`` of :func:`mean_interval` as text, for tables and sentences.

    Examples
    --------
    >>> import xarray as xr
    >>> pm(xr.DataArray([1.0, 2.0, 3.0], dims="seed"), 1)
    '2.0 ± 2.5'
    """
    m = mean_interval(values, dim)
    return f"{float(m['mean']):.{digits}f} ± {float(m['half']):.{digits}f}"
