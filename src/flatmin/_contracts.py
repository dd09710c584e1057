"""What is asked of a model and a criterion; what they or torch.func cannot do is an error."""

import inspect
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._targets import checked_losses
from ._tree import Params

Loss = Callable[[Any, Tensor], Tensor]
Network = Callable[[Params, Tensor], Any]


def check_model(model: nn.Module) -> None:
    """Refuse what no pass could tell, or no derivative."""
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        raise TypeError(
            f"model must be the module that the {type(model).__name__} was made from: "
            "torch.func cannot see into it"
        )
    if torch.nn.utils.parametrize._cache_enabled:
        raise ValueError("model must be used outside of parametrize.cached(), which keeps weights")
    parameters = dict(model.named_parameters())
    for name, w in parameters.items():
        if nn.parameter.is_lazy(w) or w.is_meta:
            raise ValueError(f"model must have weights with values, got none for {name!r}")
        if w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"model must have parameters without gradient hooks, which torch.func does not call, "
                f"got one on {name!r}"
            )
        if w.is_complex():
            raise TypeError(
                f"model must have real parameters, got {name!r} of {w.dtype}: keep its real and "
                "imaginary parts, and torch.view_as_complex"
            )
    for path, m in model.named_modules():
        embedding = isinstance(m, (nn.Embedding, nn.EmbeddingBag))
        if embedding and (m.max_norm is not None or m.scale_grad_by_freq):
            raise ValueError(
                "model must have embeddings without max_norm, which changes weights in the forward "
                f"pass, and scale_grad_by_freq, which changes gradients, got {m} at {path!r}"
            )
    if not any(w.requires_grad for w in parameters.values()):
        raise ValueError("model must have a parameter that requires a gradient, got none")


def check_function(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    criterion: Loss | None,
    alone: bool = True,
    gradient: bool = True,
) -> None:
    """Refuse a network that is no function of weights and inputs, on the first two examples.

    Also a criterion of an example that depends on other examples (``alone``), or that has no
    ``gradient``.
    """
    x, y = x[:2].clone(), y[:2].clone()

    def values(w: Params, x: Tensor, y: Tensor) -> list[Tensor]:
        try:
            with no_random_numbers(), unchanged("model", "input", x):
                output = network(w, x)
        except RuntimeError as error:
            raise ValueError(
                f"model must take examples of the type {x.dtype}, here of shape {tuple(x.shape)}, "
                f"which {where(error)} does not ({first_line(error)})"
            ) from error
        if criterion is None:
            return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        with no_random_numbers(), unchanged("criterion", "targets", y):
            return [checked_losses(criterion(output, y), x, y)]

    with torch.enable_grad():
        first = values({name: w.detach().requires_grad_() for name, w in params.items()}, x, y)
    if gradient and criterion is not None and not any(v.requires_grad for v in first):
        raise ValueError(
            "model and criterion must be differentiable by the parameters, got no gradient: is "
            "there an argmax, detach() or no_grad()?"
        )
    if not alike(first, values(params, x, y)):
        raise ValueError(
            "model and criterion must give the same for the same weights, buffers and examples, "
            "got two different results: is something random, or kept from pass to pass?"
        )
    if not alone or criterion is None:
        return
    try:
        each = [values(params, *one) for one in zip(x.split(1), y.split(1), strict=True)]
        good = alike(first, [torch.cat([v for (v,) in each])])
    except ValueError:  # batch norm wants more than one example
        good = False
    if not good:
        raise ValueError(
            "model and criterion must give an example a loss that does not depend on the other "
            "examples of its batch; batch norm does with track_running_stats=True"
        )


def alike(one: Any, other: Any) -> bool:
    """Up to rounding, also that of TF32 on a GPU."""

    def close(a: Tensor, b: Tensor) -> bool:
        single = 1e-4 if a.device.type == "cpu" else 1e-2
        rounding = {torch.float64: 1e-6, torch.float32: single}.get(a.dtype, 5e-2)
        return torch.allclose(a, b.to(a.dtype), rounding, rounding, equal_nan=True)

    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(close(*pair) for pair in pairs if isinstance(pair[0], Tensor))


def criterion_of(instrument: Callable[..., Any]) -> Loss | None:
    """The criterion that an instrument will use; None if it takes none."""
    parameter = inspect.signature(instrument).parameters.get("criterion")
    return None if parameter is None else parameter.default


def needs_gradient(instrument: Callable[..., Any]) -> bool:
    """Not if its attribute ``values_only`` says so, or if the gradient is that of a ``source``."""
    source = inspect.signature(instrument).parameters.get("source")
    transferred = source is not None and source.default is not None
    while isinstance(instrument, partial):
        instrument = instrument.func
    return not (transferred or getattr(instrument, "values_only", False))


@contextmanager
def unchanged(who: str, what: str, *tensors: Tensor) -> Iterator[None]:
    """Context: an error if somebody changes a tensor in place, which every pass would see."""
    versions = lambda: [None if t.is_inference() else t._version for t in tensors]
    before = versions()
    yield
    if versions() != before:
        raise ValueError(
            f"{who} must not change its {what} in place, as x -= 1 or Normalize(inplace=True) do: "
            f"the next pass would see the changed {what}. Write x = x - 1"
        )


HOLDERS = (dict, list, set, deque)


class Attributes:
    """All attributes of every submodule, and what lists and dictionaries among them hold."""

    def __init__(self, model: nn.Module) -> None:
        self.values = [(vars(module), dict(vars(module))) for module in model.modules()]
        self.held = [
            (v, list(v.items() if isinstance(v, dict) else v))
            for _, values in self.values
            for name, v in values.items()
            if isinstance(v, HOLDERS) and "hooks" not in name
        ]

    def restore(self) -> None:
        for now, before in [*self.values, *self.held]:
            now.clear()
            (now.extend if isinstance(now, (list, deque)) else now.update)(before)


@contextmanager
def constant_attributes(model: nn.Module) -> Iterator[None]:
    """Context: an error if a forward pass changes an attribute that is no parameter or buffer."""
    before = [*_attributes(model)]
    yield
    for old, new in itertools.zip_longest(before, _attributes(model), fillvalue=("", before)):
        if old[1] is not new[1]:
            raise ValueError(
                "model must keep what its forward pass changes in buffers that are tensors from the "
                f"start, self.register_buffer(...), got the attribute {new[0] or old[0]!r}"
            )


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values, also of what is held, but for PyTorch's own layers."""
    for path, module in model.named_modules():
        own = type(module).__module__.startswith("torch.")
        for name, value in () if own else vars(module).items():
            if name == "training" or "hooks" in name:
                continue
            yield f"{path}.{name}".strip("."), value
            if isinstance(value, HOLDERS):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, v in items:
                    yield f"{path}.{key if name == '_buffers' else name}".strip("."), v


RANDOM = (
    "random numbers must come from flatmin.layers.Dropout or the draws of a batch stage, which can be "
    "repeated, got others; nn.Dropout, the dropout inside of attention and LSTM, torch.rand, NumPy "
    "and Python draw them"
)


@contextmanager
def no_random_numbers() -> Iterator[None]:
    """Context: an error if numbers were drawn from PyTorch's global generators."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    generators: list[Any] = [torch.random, *[torch.cuda] * on_cuda]
    states = [g.get_rng_state() for g in generators]
    yield
    now = [g.get_rng_state() for g in generators]
    if any(map(np.any, (a.numpy() != b.numpy() for a, b in zip(states, now, strict=True)))):
        for g, state in zip(generators, states, strict=True):
            g.set_rng_state(state)
        raise ValueError(RANDOM)


@contextmanager
def explained() -> Iterator[None]:
    """Context: what torch.func cannot do with a model is an error that names the layer."""
    try:
        yield
    except RuntimeError as error:
        signs = ("derivative", "double backward", "torch.func", "functorch", "vmap")
        known = where(error) != NOWHERE or any(sign in str(error) for sign in signs)
        if isinstance(error, torch.OutOfMemoryError) or not known:
            raise
        raise ValueError(
            f"model must be differentiable by torch.func (twice for a Hessian), which "
            f"{where(error)} is not ({first_line(error)})"
        ) from error


NOWHERE = "something in it"


def where(error: BaseException) -> str:
    """The innermost module in which an error arose."""
    where, trace = NOWHERE, error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            where = f"a layer of the type {type(module).__name__}"
        trace = trace.tb_next
    return where


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].partition(". ")[0][:200]
