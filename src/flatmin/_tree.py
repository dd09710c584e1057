"""Weights as dictionaries of tensors, and arithmetic with them."""

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]


def plus(w: Params, v: Params, a: float | Tensor | None = None) -> Params:
    """w + a v; without ``a``, w + v."""
    return {name: x + (v[name] if a is None else a * v[name]) for name, x in w.items()}


def flatten(params: Params) -> Tensor:
    """All numbers in one vector."""
    return torch.cat([p.flatten() for p in params.values()])


def unflatten(v: Tensor, shapes: Mapping[str, torch.Size]) -> Params:
    """The inverse of :func:`flatten`."""
    parts = v.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}


def fused_plus(y: Tensor, a: float | Tensor, x: Tensor) -> Tensor:
    """y + a x in one pass over memory, which limits the speed of a stack."""
    return torch.addcmul(y, x, a) if isinstance(a, Tensor) else torch.add(y, x, alpha=a)


def decayed(grads: Params, weight_decay: float | Tensor, params: Params) -> Params:
    """The gradients with weight decay added to them."""
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return grads
    return {name: fused_plus(grads[name], weight_decay, w) for name, w in params.items()}
