"""A module as a function of its weights, and its mean loss: the basis of all instruments."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ._checks import whole
from ._contracts import (
    RANDOM,
    Attributes,
    Loss,
    Network,
    check_function,
    check_model,
    criterion_of,
    explained,
    first_line,
    needs_gradient,
    no_random_numbers,
    where,
)
from ._targets import checked_losses
from ._tree import Params

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
        the parameters of the model that require a gradient.  One that takes a ``criterion`` but no
        gradient of it says so by an attribute, ``instrument.values_only = True``.
    x, y : Tensor
        Examples [n, ...] and targets [n, ...], on the model's device.
    dtype : torch.dtype, optional
        ``torch.float64`` computes with copies in double precision.  Default: that of the model, or
        single precision if that is half.
    **options
        Of the instrument.  Tensors of floating point numbers among them, such as ``x2``, get the
        precision of the computation; another model, ``source``, does not.

    Raises
    ------
    ValueError, TypeError
        If the model changes its input in place, draws random numbers, lets an example depend on
        others of its batch, or cannot be differentiated by ``torch.func``; the message says what to
        do.

    Examples
    --------
    >>> from flatmin.measure import gradient_norm
    >>> model = nn.Linear(2, 3)
    >>> on(model, gradient_norm, torch.zeros(1, 2), torch.tensor([0])).shape
    torch.Size([])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(instrument):
        raise TypeError(f"instrument must be a function, got {type(instrument).__name__}")
    if not callable(options.get("criterion", callable)):
        raise TypeError(f"criterion must be a function, got {options['criterion']!r}")
    try:
        inspect.signature(instrument).bind(None, None, x, y, **options)
    except TypeError as error:
        name = getattr(instrument, "__name__", repr(instrument))
        raise TypeError(
            f"instrument {name} must take (network, params, x, y) and its options: {error}"
        ) from error
    model = not_compiled(model)
    with inspecting(model), torch.no_grad():  # torch.func works inside no_grad
        function = as_function(model, x, y, dtype)
        precision = next(iter(function[1].values())).dtype
        normal = lambda v: v.clone() if v.is_inference() else v
        cast = lambda v: normal(v.to(precision) if v.is_floating_point() else v)
        options = {k: cast(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        chosen = partial(instrument, **options)
        check_function(*function, criterion_of(chosen), gradient=needs_gradient(chosen))
        with explained():
            return chosen(*function)


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
        if not isinstance(value, Tensor):
            got = type(value).__name__
            raise TypeError(f"instrument must return a tensor or named tensors, got a {got}")
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
    check_model(model)
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, torch.float32 or torch.float64, got {dtype!r}")
    types = {p.dtype for p in model.parameters()}
    if types & {torch.float16, torch.bfloat16}:
        dtype = dtype or torch.float32  # half precision is too short for differences of losses
    if len(types) > 1 and dtype is None:
        raise ValueError(f"dtype must be given for weights of several types, got {types}")
    trackable = lambda t: t.clone() if t.is_inference() else t  # autograd needs normal tensors
    cast = lambda t: trackable(t.to(dtype) if dtype and t.is_floating_point() else t)
    copy = lambda named: {name: cast(t.detach().clone()) for name, t in named}
    params = copy((name, p) for name, p in model.named_parameters() if p.requires_grad)
    frozen = copy((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    buffers = copy(model.named_buffers())

    def network(params: Params, x: Tensor) -> Any:
        with inspecting(model):
            return called(model, params, buffers, x, frozen)[0]

    return network, params, cast(x).clone(), cast(y).clone()


def called(
    model: nn.Module, params: Params, buffers: Params, x: Tensor, frozen: Params | None = None
) -> tuple[Any, Params]:
    """The output, and the buffers after the pass; those that are given stay as they are."""
    own = {name: b.clone() for name, b in buffers.items()}  # may be changed in place, or replaced
    weights = {f"model.{name}": w for name, w in {**params, **(frozen or {}), **own}.items()}
    output, after = functional_call(_Pass(model), weights, (x,))
    return output, {name: after.get(name, b) for name, b in own.items()}


class _Pass(nn.Module):
    """One pass of a model, and its buffers then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> tuple[Any, Params]:
        return self.model(x), dict(self.model.named_buffers())


# ------------------------------------------------------------------------ how a model is called


def not_compiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wraps, since torch.func cannot see into it."""
    original: nn.Module = getattr(model, "_orig_mod", model)
    return original


@contextmanager
def inspecting(model: nn.Module) -> Iterator[None]:
    """Context for instruments: evaluation mode, no inference mode, plain kernels."""
    with evaluation(model), torch.inference_mode(False), plain_kernels(model):
        yield


@contextmanager
def evaluation(model: Any) -> Iterator[None]:
    """Context: evaluation mode; afterwards all attributes of every submodule are as before."""
    attributes = Attributes(model) if isinstance(model, nn.Module) else None  # or a function
    try:
        if attributes is not None:
            model.eval()
        yield
    finally:
        if attributes is not None:
            attributes.restore()


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Context: kernels that support vmap and second derivatives, not compiled, without autocast."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as contexts:
            contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
            for device in ("cpu", "cuda"):
                contexts.enter_context(torch.autocast(device, enabled=False))
            if "torch._dynamo" in sys.modules:  # else nothing is compiled
                contexts.enter_context(torch.compiler.set_stance("force_eager"))
            if any(_has_special_kernel(module) for module in model.modules()):
                contexts.enter_context(_PlainKernels())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _has_special_kernel(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    norm = isinstance(module, _WeightNorm) or any(isinstance(hook, WeightNorm) for hook in hooks)
    return norm or bool(getattr(module, "sparse", False))


class _PlainKernels(TorchFunctionMode):
    """Weight norm by its formula, as the kernel's second derivative is wrong (PyTorch 2.13); dense
    gradients of embeddings."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._weight_norm:
            v, g, dim = args
            if dim == -1:  # one norm for all
                return v * (g / torch.linalg.vector_norm(v))
            others = [i for i in range(v.ndim) if i != dim % v.ndim]
            return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
        if func in (F.embedding, F.embedding_bag):
            kwargs = kwargs | {"sparse": False}
        return func(*args, **kwargs)


def over_rows(
    function: Callable[..., Any], in_dims: Any, way_out: str, chunk_size: int | None = None
) -> Callable[..., Any]:
    """``function`` of every row, by ``vmap``; chunks of one row do without it.

    An argument with ``None`` in ``in_dims`` is the same for all rows.  For what ``vmap`` cannot run,
    the error says the way out.
    """

    def of_row(i: int, args: Any) -> Any:
        dims = in_dims if isinstance(in_dims, tuple) else [in_dims] * len(args)
        pairs = zip(args, dims, strict=True)
        return function(*[a if d is None else tree_map(lambda t: t[i], a) for a, d in pairs])

    def of_all(*args: Any) -> Any:
        n = len(tree_leaves(args[0])[0])
        if n == 1 or chunk_size == 1:
            return tree_map(lambda *rows: torch.stack(rows), *[of_row(i, args) for i in range(n)])
        try:
            return vmap(function, in_dims, chunk_size=chunk_size)(*args)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if "random" in str(error):
                raise ValueError(RANDOM) from error
            with no_random_numbers():
                of_row(0, args)  # if it fails alone, that error comes first
            raise ValueError(
                f"model must run under torch.func.vmap, which {where(error)} does not "
                f"({first_line(error)}); {way_out}"
            ) from error

    return of_all


def map_rows(function: Callable[[Tensor], Tensor], rows: Tensor, chunk_size: int) -> Tensor:
    """``function`` of every row, ``chunk_size`` rows at a time."""
    way_out = "chunk_size=1 does without it"
    return over_rows(function, 0, way_out, whole("chunk_size", chunk_size))(rows)


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
