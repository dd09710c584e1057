"""What is asked of a model and a criterion; what they or torch.func cannot do is an error."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    parameters = dict(model.named_parameters())
    for name, w in parameters.items():
        if nn.parameter.is_lazy(w) or w.is_meta:
            raise ValueError(f"model must have weights with values, got none for {name!r}")
        if w.is_complex():
            raise TypeError(
                f"model must have real parameters, got {name!r} of {w.dtype}: keep its real and "
                "imaginary parts, and torch.view_as_complex"
            )
    for path, m in model.named_modules():
        if getattr(m, "max_norm", None) or getattr(m, "scale_grad_by_freq", False):
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
    in_pieces: bool = True,
) -> None:
    """Refuse a network that is no function of weights and inputs, on the first two examples.

    If the mean of the criterion is taken in pieces, also refuse an example whose loss depends on
    other examples.
    """
    x, y = x[:2].clone(), y[:2].clone()
    try:
        with no_random_numbers(), unchanged("model", "input", x):
            output = network(params, x)
    except RuntimeError as error:
        raise ValueError(
            f"model must take examples of the type {x.dtype}, here of shape {tuple(x.shape)}, which "
            f"{where(error)} does not ({first_line(error)})"
        ) from error
    if criterion is None:
        return
    with unchanged("criterion", "targets", y):
        together = checked_losses(criterion(output, y), x, y)
    if not in_pieces:
        return
    try:
        singles = [(network(params, a), a, b) for a, b in zip(x.split(1), y.split(1), strict=True)]
        alone = torch.cat([checked_losses(criterion(output, b), a, b) for output, a, b in singles])
        good = torch.allclose(together, alone, rtol=1e-2, atol=1e-3, equal_nan=True)
    except ValueError:  # batch norm wants more than one example
        good = False
    if not good:
        raise ValueError(
            "model and criterion must give an example a loss that does not depend on the other "
            "examples of its batch; batch norm does with track_running_stats=True"
        )


def criterion_of(instrument: Callable[..., Any]) -> Loss | None:
    """The criterion that an instrument will use; None if it takes none."""
    parameter = inspect.signature(instrument).parameters.get("criterion")
    return None if parameter is None else parameter.default


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


@contextmanager
def constant_attributes(model: nn.Module) -> Iterator[None]:
    """Context: an error if a forward pass changes an attribute that is no parameter or buffer."""
    before = [dict(vars(module)) for module in model.modules()]
    yield
    for (path, module), attributes in zip(model.named_modules(), before, strict=True):
        own = type(module).__module__.startswith("torch.")  # PyTorch's layers know what they do
        for name, value in vars(module).items():
            if not own and attributes.get(name, before) is not value:
                raise ValueError(
                    "model must keep what its forward pass changes in buffers, "
                    f"self.register_buffer(...), got the attribute {f'{path}.{name}'.strip('.')!r}"
                )


@contextmanager
def no_random_numbers() -> Iterator[None]:
    """Context: an error if random numbers were drawn from PyTorch's global generators."""
    before = _random_states()
    yield
    if _random_states() != before:
        raise ValueError(
            "model and criterion must draw no random numbers, which no other pass would see again, "
            "but by flatmin.layers.Dropout, got others; torch.nn.functional.dropout, the dropout "
            "inside of attention and LSTM, and torch.rand draw them"
        )


def _random_states() -> list[bytes]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return [state.numpy().tobytes() for state in states]


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
