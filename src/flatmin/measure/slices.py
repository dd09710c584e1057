r"""Loss landscapes: the loss along a direction in weight space.

.. math:: \ell(a) = L(w + a\,d)

A network with ReLUs computes the same function when one layer is multiplied by 10 and the next
divided by it, but the second network's loss looks ten times flatter in the first layer, since a
step of length 1 is ten times smaller relative to its weights.  Filter normalization removes that:
every filter of a direction is as long as the filter of the network that it is added to.
"""

import torch
from torch import Tensor

from .._ball import length
from .._checks import number, whole
from .._contracts import Loss, Network
from .._functional import MeanLoss, dims, map_rows
from .._random import normals
from .._targets import example_losses
from .._tree import Params, plus

__all__ = ["loss_slice"]


@dims("coordinate")
def loss_slice(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    radius: float = 1.0,
    points: int = 21,
    seed: int = 0,
    criterion: Loss = example_losses,
    batch_size: int = 1000,
    chunk_size: int = 16,
) -> Tensor:
    r"""Instrument: the loss on a line through the weights.

    .. math:: \ell_i = L(w + a_i\,d), \qquad -r \le a_i \le r

    with d a Gaussian direction, filter-normalized:

    .. math:: d_{l,i} \leftarrow \frac{d_{l,i}}{\|d_{l,i}\|}\,\|w_{l,i}\|

    with :math:`w_{l,i}` the i-th filter of layer l: the weights of one output channel, or unit,
    the i-th entry along the first dimension.  Parameters of fewer than two dimensions (biases,
    and scales of norms) do not move, nor do the running statistics of batch norm.  All networks of
    a stack get the same Gaussian numbers, normalized to their own filters.

    Parameters
    ----------
    radius : float
        r; at 1 each filter has moved by its own length.
    points : int
        Number of points, at least 2, evenly spaced; an odd one has the network itself in the middle.
    seed : int
        Seed of the direction.
    criterion : callable
        From output and targets to one loss per example, [n].
    batch_size, chunk_size : int
        How many examples, and how many points, are computed at once.  With a ``chunk_size`` of 1
        ``vmap`` is not used.  The result depends on both only by rounding.

    Returns
    -------
    Tensor [points]
        The mean loss over all examples at each point.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein, *Visualizing the Loss Landscape of Neural Nets*, NeurIPS
    2018, section 4.

    Examples
    --------
    A linear model with the squared error :math:`\frac12(2-w)^2`, at w=2:

    >>> from flatmin.measure import on
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.ones(3, 1), torch.full((3,), 2.0)
    >>> on(model, loss_slice, x, y, points=5, criterion=squared)
    tensor([2.0000, 0.5000, 0.0000, 0.5000, 2.0000])
    """
    number("radius", radius, 0)
    value = MeanLoss(network, criterion, x, y, batch_size)
    direction = _filter_normalized(normals(params, seed, "direction"), params)
    like = next(iter(params.values()))
    coordinates = torch.linspace(
        -radius, radius, whole("points", points, 2), device=like.device, dtype=like.dtype
    )
    return map_rows(lambda a: value(plus(params, direction, a)), coordinates, chunk_size)


loss_slice.values_only = True  # type: ignore[attr-defined]  # of the criterion, no gradient


def _filter_normalized(direction: Params, params: Params) -> Params:
    def of_filters(v: Tensor, p: float | Tensor) -> Tensor:
        return torch.linalg.vector_norm(v, p, dim=tuple(range(1, v.ndim)), keepdim=True)

    def normalized(d: Tensor, w: Tensor) -> Tensor:
        if w.ndim < 2 or not w.numel():
            return torch.zeros_like(w)
        unit = d / length(d, of_filters).clamp_min(torch.finfo(d.dtype).tiny)
        return unit * length(w, of_filters)

    return {name: normalized(direction[name], w) for name, w in params.items()}
