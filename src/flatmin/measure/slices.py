r"""Loss landscapes: the loss along a few directions in weight space.

.. math:: \ell(a, b, \dots) = L\big(w + a\,d_1 + b\,d_2 + \dots\big)

A network with ReLUs computes the same function when one layer is multiplied by 10 and the next
divided by it, but the second network's loss looks ten times flatter in the first layer, since a
step of length 1 is ten times smaller relative to its weights.  Filter normalization removes that:
every filter of a direction is as long as the filter of the network that it is added to.

Many points of the grid are evaluated at once (``torch.func.vmap``).  :func:`loss_slice` is for a
module, :class:`LossSlice` for a whole stack of networks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._checks import number, whole
from .._functional import (
    Loss,
    MeanLoss,
    Network,
    as_function,
    inspecting,
    map_rows,
    plain_attention,
)
from .._random import normals
from .._targets import example_losses
from .._tree import Params

__all__ = ["LossSlice", "filter_normalized", "loss_slice", "random_direction"]


# -------------------------------------------------------------------------------------- directions


def filter_normalized(direction: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Params:
    r"""A direction whose filters are as long as the weights' own.

    .. math:: d_{l,i} \leftarrow \frac{d_{l,i}}{\|d_{l,i}\|}\,\|w_{l,i}\|

    with :math:`w_{l,i}` the i-th filter of layer l: the weights of one output channel, or unit,
    the i-th entry along the first dimension.  Parameters of fewer than two dimensions (biases,
    and scales of norms) do not move.

    Parameters
    ----------
    direction, params : dict of Tensor
        With the same names and shapes.

    Returns
    -------
    dict of Tensor
        Zero where the filter of either is zero.

    References
    ----------
    Li, Xu, Taylor, Studer & Goldstein, *Visualizing the Loss Landscape of Neural Nets*, NeurIPS
    2018, section 4.

    Examples
    --------
    >>> d = {"weight": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "bias": torch.ones(2)}
    >>> w = {"weight": torch.tensor([[0.0, 10.0], [0.0, -2.0]]), "bias": torch.ones(2)}
    >>> filter_normalized(d, w)
    {'weight': tensor([[6., 8.],
            [2., 0.]]), 'bias': tensor([0., 0.])}
    """
    _check_direction("direction", direction, params)
    length = lambda w: torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True)

    def normalized(d: Tensor, w: Tensor) -> Tensor:
        if w.ndim < 2:
            return torch.zeros_like(w)
        return d * (length(w) / length(d).clamp_min(torch.finfo(d.dtype).tiny))

    return {name: normalized(direction[name], w) for name, w in params.items()}


def random_direction(params: Mapping[str, Tensor], seed: int = 0, index: int = 0) -> Params:
    """A Gaussian direction, :func:`filter_normalized`.

    Parameters
    ----------
    params : dict of Tensor
        The weights, e.g. ``dict(model.named_parameters())``.
    seed, index : int
        Seed, and which of its directions.  In a network of many weights two directions are nearly
        orthogonal.

    Examples
    --------
    >>> d = random_direction({"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})
    >>> d["weight"].norm(dim=1)
    tensor([5., 1.])
    """
    params = {name: w.detach() for name, w in params.items()}
    return filter_normalized(normals(params, seed, "direction", index), params)


# ------------------------------------------------------------------------------------------ slices


def _slice(
    value: Callable[[Params], Tensor],
    params: Params,
    directions: Sequence[Params],
    coordinates: Sequence[Tensor],
    chunk_size: int,
) -> Tensor:
    """The kernel: ``value`` at every point of the grid."""

    def value_at(point: Tensor) -> Tensor:
        step = lambda name: sum(c * d[name] for c, d in zip(point, directions, strict=True))
        return value({name: w + step(name) for name, w in params.items()})

    grid = torch.stack(torch.meshgrid(*coordinates, indexing="ij"), -1)
    values = map_rows(value_at, grid.reshape(-1, len(directions)), chunk_size)
    return values.reshape(grid.shape[:-1])


def loss_slice(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    directions: Sequence[Mapping[str, Tensor]],
    coordinates: Sequence[Tensor],
    *,
    batch_size: int = 1000,
    chunk_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The loss on a line, or on a plane, through a network's weights.

    .. math:: \ell_{ij} = L\big(w + a_i\,d_1 + b_j\,d_2\big)

    The network is in evaluation mode: batch norm keeps the running statistics of :math:`w`.

    Parameters
    ----------
    model : Module
        The network at the origin.
    loss : callable
        ``loss(model(x), y)`` gives one number per example, or their mean.
    x, y : Tensor
        Examples [n, ...] and targets [n, ...], on the model's device.
    directions : sequence of dict of Tensor
        One for a line, two for a plane; each has a tensor for every parameter that requires a
        gradient, e.g. from :func:`random_direction`, or another network's weights minus these.
    coordinates : sequence of Tensor
        The steps along each direction, [A], [B], …, in units of the direction.
    batch_size, chunk_size : int
        How many examples, and how many points of the grid, are computed at once.  With a
        ``chunk_size`` of 1 ``vmap`` is not used.  The result depends on both only by rounding.
    dtype : torch.dtype, optional
        ``torch.float64`` computes with copies in double precision.

    Returns
    -------
    Tensor [A, B, ...]
        The mean loss over all examples at each point.

    Raises
    ------
    ValueError
        If a direction does not fit the parameters, or there is not one vector of coordinates per
        direction.

    Examples
    --------
    A linear model with squared error, :math:`\frac12(1-a)^2`:

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y, d = torch.ones(3, 1), torch.ones(3), {"weight": torch.ones(1, 1)}
    >>> loss_slice(model, squared, x, y, [d], [torch.tensor([0.0, 1.0, 3.0])])
    tensor([0.5000, 0.0000, 2.0000])
    """
    with inspecting(model), torch.no_grad():
        network, params, x, y = as_function(model, x, y, dtype)
        if not 1 <= len(directions) == len(coordinates):
            raise ValueError(
                "coordinates must be one vector per direction, "
                f"got {len(coordinates)} for {len(directions)}"
            )
        like = next(iter(params.values()))
        for d in directions:
            _check_direction("directions", d, params)
        for c in coordinates:
            if not isinstance(c, Tensor) or c.ndim != 1:
                raise ValueError(f"coordinates must be tensors of one dimension, got {c!r}")
        to = lambda t: t.detach().to(like.device, like.dtype)
        converted = [{name: to(d[name]) for name in params} for d in directions]
        value = MeanLoss(network, loss, x, y, batch_size)
        return _slice(value, params, converted, [to(c) for c in coordinates], chunk_size)


@dataclass(frozen=True)
class LossSlice:
    """Instrument: a filter-normalized slice of the loss, of many networks at once.

    For ``Networks.measure``, which returns [points] or [points, points] for each network.  All
    networks get the same Gaussian directions, each normalized to its own filters.

    Parameters
    ----------
    radius : float
        The slice goes from -radius to radius; at 1 each filter has moved by its own length.
    points : int
        Number of coordinates per direction; an odd one has the network itself in the middle.
    dimensions : {1, 2}
        A line or a plane.
    seed : int
        Seed of the directions.
    examples : int, optional
        How many examples of the split; default: all.
    loss : callable
        From logits [n, K] and targets to losses [n].
    batch_size, chunk_size : int
        As in :func:`loss_slice`, for each network of the stack.

    Examples
    --------
    >>> from flatmin import fit
    >>> from flatmin.book import MLP, two_gaussians
    >>> data = two_gaussians(test_size=100)
    >>> runs = fit(lambda: MLP(10, 16, 2), data, steps=20, seeds=3, networks="last")
    >>> networks = runs.networks
    >>> line = LossSlice(radius=1, points=11)
    >>> line.coordinates[:3]
    tensor([-1.0000, -0.8000, -0.6000])
    >>> networks.measure(line, data, "train").shape
    (3, 11)
    """

    radius: float = 1.0
    points: int = 21
    dimensions: int = 1
    seed: int = 0
    examples: int | None = None
    loss: Loss = example_losses
    batch_size: int = 1000
    chunk_size: int = 16

    def __post_init__(self) -> None:
        number("radius", self.radius, 0)
        for name in ("points", "batch_size", "chunk_size"):
            whole(name, getattr(self, name))
        if self.dimensions not in (1, 2):
            raise ValueError(f"dimensions must be 1 or 2, got {self.dimensions!r}")
        whole("seed", self.seed, 0)
        if self.examples is not None:
            whole("examples", self.examples)

    @property
    def coordinates(self) -> Tensor:
        """Where along each direction, [points]."""
        return torch.linspace(-self.radius, self.radius, self.points)

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions that it returns."""
        return ("coordinate",) if self.dimensions == 1 else ("coordinate_1", "coordinate_2")

    def __call__(self, network: Network, params: Params, x: Tensor, y: Tensor) -> Tensor:
        x, y = x[: self.examples], y[: self.examples]
        k, like = self.dimensions, next(iter(params.values()))
        directions = [random_direction(params, self.seed, i) for i in range(k)]
        value = MeanLoss(network, self.loss, x, y, self.batch_size)
        coordinates = [self.coordinates.to(like.device, like.dtype)] * k
        with plain_attention():
            return _slice(value, params, directions, coordinates, self.chunk_size)


# ------------------------------------------------------------------------------------------ checks


def _check_direction(
    name: str, direction: Mapping[str, Tensor], params: Mapping[str, Tensor]
) -> None:
    shapes = lambda named: {key: tuple(w.shape) for key, w in named.items()}
    if shapes(direction) != shapes(params):
        raise ValueError(
            f"{name} must have the names and shapes of the parameters, {shapes(params)}, "
            f"got {shapes(direction)}"
        )
