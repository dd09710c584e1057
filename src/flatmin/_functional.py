"""A module as a function of its weights, and its mean loss: the basis of all instruments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._checks import whole
from ._targets import checked_losses
from ._tree import Params

Loss = Callable[[Any, Tensor], Tensor]
Network = Callable[[Params, Tensor], Any]
T = TypeVar("T")
Marked = TypeVar("Marked", bound=Callable[..., Any])


def on(
    model: nn.Module,
    instrument: Callable[..., T],
    x: Tensor,
    y: Tensor,
    *,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> T:
    """An instrument, applied to one module.

    Parameters
    ----------
    model : Module
        Measured in evaluation mode; its mode, weights, buffers and ``.grad`` are left as they are.
    instrument : callable
        ``instrument(network, params, x, y, **options)``, such as :func:`sharpness`; ``params`` are
        the parameters of the model that require a gradient.
    x, y : Tensor
        Examples [n, ...] and targets [n, ...], on the model's device.
    dtype : torch.dtype, optional
        ``torch.float64`` computes with copies in double precision.  Default: that of the model, or
        single precision if that is half.
    **options
        Of the instrument.

    Examples
    --------
    >>> from flatmin.measure import gradient_norm
    >>> model = nn.Linear(2, 3)
    >>> on(model, gradient_norm, torch.zeros(1, 2), torch.tensor([0])).shape
    torch.Size([])
    """
    model = getattr(model, "_orig_mod", model)  # torch.func cannot see into a compiled model
    with inspecting(model), torch.no_grad():  # torch.func works inside no_grad
        return instrument(*as_function(model, x, y, dtype), **options)


def dims(*names: str, **of_fields: Sequence[str]) -> Callable[[Marked], Marked]:
    """Name the dimensions of what an instrument returns: of a tensor, or of each named value.

    A lambda around an instrument has no names; set its options with ``functools.partial``.

    >>> @dims("coordinate")
    ... def line(network, params, x, y): ...
    >>> @dims(value=["eigenvalue"], error=["eigenvalue"])
    ... def eigenvalues(network, params, x, y): ...
    """

    def mark(instrument: Marked) -> Marked:
        instrument.dims = of_fields or names  # type: ignore[attr-defined]
        return instrument

    return mark


def named_values(instrument: Any, found: Any, runs: int = 0) -> dict[str, tuple[Any, Tensor]]:
    """What an instrument returned, ``{name: (names of its dimensions, tensor)}``; "" for a tensor.

    ``runs`` is how many dimensions of the tensors come before those of the instrument.
    """
    fields = found._asdict() if hasattr(found, "_asdict") else found
    values = fields if isinstance(fields, dict) else {"": fields}
    while isinstance(instrument, partial):
        instrument = instrument.func
    names = getattr(instrument, "dims", None)
    named = {}
    for field, value in values.items():
        count = value.ndim - runs
        of_field = names.get(field) if isinstance(names, dict) else names
        of_field = [f"dim_{i}" for i in range(count)] if of_field is None else of_field
        if len(of_field) != count:
            raise ValueError(
                f"instrument.dims must name the {count} dimensions of what it returns, "
                f"got {of_field!r}"
            )
        named[field] = (tuple(of_field), value)
    return named


class MeanLoss:
    """L(w): the mean over all examples, computed batch by batch."""

    def __init__(
        self, network: Network, criterion: Loss, x: Tensor, y: Tensor, batch_size: int
    ) -> None:
        self.network, self.criterion, self.n = network, criterion, len(x)
        size = whole("batch_size", batch_size)
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def of(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The contribution of one batch; the sum over all batches is the mean."""
        losses = checked_losses(self.criterion(self.network(params, x), y), x, y)
        return losses.mean() * (len(x) / self.n)

    def __call__(self, params: Params) -> Tensor:
        parts = (self.of(params, x, y) for x, y in self.batches)  # at least one
        return sum(parts)  # type: ignore[return-value]


def as_function(
    model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None = None
) -> tuple[Network, Params, Tensor, Tensor]:
    """``network(params, x)``, a copy of the parameters that require a gradient, and the data.

    Each call of the network is in evaluation mode, also after the instrument has returned.
    """
    check_examples("", x, y)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, torch.float32 or torch.float64, got {dtype!r}")
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        dtype = dtype or torch.float32  # half precision is too short for differences of losses
    trackable = lambda t: t.clone() if t.is_inference() else t  # autograd needs normal tensors
    cast = lambda t: trackable(t.to(dtype) if dtype and t.is_floating_point() else t)
    copy = lambda named: {name: cast(t.detach().clone()) for name, t in named}
    params = copy((name, p) for name, p in model.named_parameters() if p.requires_grad)
    if not params:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    rest = copy((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    rest |= copy(model.named_buffers())

    def network(params: Params, x: Tensor) -> Any:
        with inspecting(model), unchanged(x):
            return functional_call(model, (params, rest), (x,))

    return network, params, cast(x).clone(), cast(y)


@contextmanager
def unchanged(x: Tensor) -> Iterator[None]:
    """Context: an error if a model changes its input in place, which every pass would see."""
    version = lambda: None if x.is_inference() else x._version  # those have none
    before = version()
    yield
    if version() != before:
        raise ValueError(
            "model must not change its input in place, as x -= 1 or Normalize(inplace=True) do: "
            "the next pass would see the changed input. Write x = x - 1"
        )


@contextmanager
def inspecting(model: nn.Module) -> Iterator[None]:
    """Context for instruments: evaluation mode, no inference mode, plain attention."""
    with evaluation(model), torch.inference_mode(False), plain_attention():
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Context: attention by the kernel that supports vmap and second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def map_rows(function: Callable[[Tensor], Tensor], rows: Tensor, chunk_size: int) -> Tensor:
    """``function`` of every row, ``chunk_size`` rows at a time."""
    if whole("chunk_size", chunk_size) == 1 or len(rows) == 1:
        return torch.stack([function(row) for row in rows])
    return vmap(function, chunk_size=chunk_size)(rows)


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Context: evaluation mode; afterwards every submodule is back in its own mode."""
    is_module = isinstance(model, nn.Module)  # a plain function has no modes
    modes = [(module, module.training) for module in model.modules()] if is_module else []
    try:
        if is_module:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_examples(which: str, x: Any, y: Any) -> int:
    for name, value in {"x": x, "y": y}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}{which} must be a tensor, got {type(value).__name__}")
    if x.ndim == 0 or y.ndim == 0 or not len(x) == len(y) >= 1:
        raise ValueError(
            f"x{which} and y{which} must hold the same number of examples, at least one, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return len(x)
