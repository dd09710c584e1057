"""Stiffness and the distance of inputs: the critical length (Fort et al., arXiv 1901.09491)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import tensor, whole
from .._random import stream

__all__ = ["CriticalLength", "critical_length", "input_distance"]


def input_distance(x: Tensor) -> Tensor:
    r"""Distance of all pairs of inputs on the unit sphere, :math:`1-\cos(X_1, X_2)`: [n, n].

    Inputs of any shape [n, ...] and any real type are flattened; in single precision, or that of
    ``x`` if it is higher.  Distances lie in [0, 2].  An input that is all zeros has no direction: its
    distances are NaN.

    >>> input_distance(torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
    tensor([[0., 1., 2.],
            [1., 0., 1.],
            [2., 1., 0.]])
    """
    if tensor("x", x).ndim < 2:
        raise ValueError(f"x must be of shape [n, ...], got {list(x.shape)}")
    if x.is_complex():
        raise TypeError(f"x must be real, got {x.dtype}")
    x = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    x = x / x.abs().amax(1, keepdim=True)  # so that no square overflows or vanishes
    x = x / x.norm(dim=1, keepdim=True)
    return 1 - (x @ x.mT).clamp(-1, 1)


class CriticalLength(NamedTuple):
    """Where stiffness, fitted as a line in the inputs' distance, falls to zero.

    Attributes
    ----------
    xi : float
        The dynamical critical length: the distance at which the line crosses zero.  NaN if the
        line does not fall, or does not cross zero between the smallest and the largest distance
        of the pairs.
    low, high : float
        Its bootstrap interval of 95 %.  NaN unless the lines of at least 95 % of the resamples
        cross zero within the data.
    crossing : float
        Share of the resamples whose lines cross zero within the data.
    slope, intercept : float
        The line, by least squares.
    """

    xi: float
    low: float
    high: float
    crossing: float
    slope: float
    intercept: float


def critical_length(
    values: Tensor,
    distance: Tensor,
    classes1: Tensor,
    classes2: Tensor | None = None,
    *,
    resamples: int = 1000,
) -> CriticalLength:
    r"""Dynamical critical length ξ of the stiffness within classes, with a bootstrap interval.

    Over the pairs within a class, :math:`X_1\neq X_2`, the line

    .. math:: S \approx \alpha + \beta\,d, \qquad \xi = -\alpha/\beta,

    is fitted by least squares: up to the distance ξ, a step on an example helps its own class
    (Fort et al., arXiv 1901.09491).

    Parameters
    ----------
    values : Tensor
        Stiffness of each pair, [n1, n2].
    distance : Tensor
        Their distance, [n1, n2], see :func:`input_distance`.
    classes1, classes2 : Tensor
        Classes [n1] and [n2]; without the second, rows and columns are the same examples.
    resamples : int
        How many bootstrap resamples.

    Returns
    -------
    CriticalLength

    Notes
    -----
    The bootstrap draws *examples*, and takes all pairs of those drawn: n examples make n² pairs,
    but pairs that share an example vary together, and an interval from drawn pairs would be far
    too narrow.  An example that is drawn twice makes no pair with itself.

    Examples
    --------
    Points on an arc, and a stiffness that falls to zero at the distance ½:

    >>> angle = torch.linspace(0, 1.5, 30)
    >>> d = input_distance(torch.stack([angle.cos(), angle.sin()], 1))
    >>> result = critical_length(1 - 2 * d, d, torch.zeros(30))
    >>> round(result.xi, 4), round(result.low, 4), round(result.high, 4), result.crossing
    (0.5, 0.5, 0.5, 1.0)
    """
    others = {} if classes2 is None else {"classes2": classes2}
    for name, classes in {"classes1": classes1, **others}.items():
        if tensor(name, classes).ndim != 1:
            raise ValueError(f"{name} must be of shape [n], got {list(classes.shape)}")
    sizes = (len(classes1), len(classes1 if classes2 is None else classes2))
    for name, matrix in {"values": values, "distance": distance}.items():
        if tensor(name, matrix).shape != sizes:
            raise ValueError(f"{name} must have shape {sizes}, got {tuple(matrix.shape)}")
    whole("resamples", resamples)
    same = classes2 is None
    pairs = classes1[:, None] == (classes1 if classes2 is None else classes2)
    if same:
        pairs = pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    nan = math.nan
    s, d = values.double(), distance.double()
    if len(d[pairs].unique()) < 2:
        return CriticalLength(nan, nan, nan, 0.0, nan, nan)
    nearest, farthest = d[pairs].min(), d[pairs].max()
    middle = (nearest + farthest) / 2  # a centred distance keeps the sums below accurate
    centred = d - middle
    terms = [torch.ones_like(d), centred, centred**2, s, centred * s]
    terms = [torch.where(pairs, term, 0) for term in terms]

    def lines(weights1: Tensor, weights2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted least squares; example weights [B, n1] and [B, n2] make weights of pairs."""
        w, wd, wdd, ws, wds = [((weights1 @ t) * weights2).sum(1) for t in terms]
        slope = (w * wds - wd * ws) / (w * wdd - wd**2)
        intercept = (ws - slope * wd) / w - slope * middle
        xi = -intercept / slope
        falls_to_zero = (slope < 0) & (nearest <= xi) & (xi <= farthest)
        return slope, intercept, torch.where(falls_to_zero, xi, nan)

    def draw_counts(n: int, purpose: str) -> Tensor:
        """How often each of n examples is drawn, [B, n]."""
        draws = torch.randint(n, (resamples, n), generator=stream(0, purpose))
        return torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n)).to(s)

    slope, intercept, xi = (float(v) for v in lines(*(s.new_ones(1, n) for n in sizes)))
    weights1 = draw_counts(sizes[0], "bootstrap of rows")
    weights2 = weights1 if same else draw_counts(sizes[1], "bootstrap of columns")
    crossings = lines(weights1, weights2)[2]
    crossings = crossings[~crossings.isnan()]
    crossing, low, high = len(crossings) / resamples, nan, nan
    if crossing >= 0.95:
        low, high = crossings.quantile(crossings.new_tensor([0.025, 0.975])).tolist()
    return CriticalLength(xi, low, high, crossing, slope, intercept)
