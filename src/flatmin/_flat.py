"""SAM's arithmetic for a training loop: many weights as one vector, maybe in shards."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ball import direction, norm


class Member(NamedTuple):
    """A parameter that has a gradient; of a sharded one (DTensor), the local part."""

    weight: Tensor
    grad: Tensor
    layout: Any  # mesh and placements, or None
    group: dict[str, Any]

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.weight.dtype, self.weight.device, self.layout

    def scale(self) -> Tensor:
        """T = ρ (|w| + η), or ρ: flat, and at least in float32."""
        w = self.weight.flatten().to(torch.promote_types(self.weight.dtype, torch.float32))
        rho, eta = self.group["rho"], self.group["eta"]
        return rho * (w.abs() + eta) if self.group["adaptive"] else torch.full_like(w, rho)


def members_of(group: dict[str, Any]) -> Iterator[Member]:
    for w in group["params"]:
        g, layout = w.grad, None
        if g is None:
            continue
        if g.layout is not torch.strided or g.is_complex():
            raise TypeError(
                f"gradients must be dense and real, got one with layout {g.layout} and type "
                f"{g.dtype} (of an Embedding with sparse=True?)"
            )
        if hasattr(w, "placements"):
            layout = w.device_mesh, w.placements
            g = g if g.placements == w.placements else g.redistribute(*layout)
            w, g = w.to_local(), g.to_local()
        yield Member(w, g, layout, group)


Kinds = dict[tuple[Any, ...], list[Member]]


class FlatWeights:
    """All weights with the same p: one vector, in one piece of memory per kind.

    The memory holds first their gradients, then their values before the step.
    """

    def __init__(self, kinds: Kinds, last: "FlatWeights | None") -> None:
        self.weights = [m.weight for same in kinds.values() for m in same]
        self.shapes = {kind: [m.weight.shape for m in same] for kind, same in kinds.items()}
        self.pieces: list[Tensor]
        self.copies: list[Tensor]  # views of the pieces, shaped as the weights
        if last is not None and last.shapes == self.shapes:
            self.pieces, self.copies = last.pieces, last.copies
        else:
            self.pieces = [
                torch.empty(sum(x.numel() for x in shapes), dtype=dtype, device=device)
                for (dtype, device, _), shapes in self.shapes.items()
            ]
            self.copies = self.views(self.pieces)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """One vector, in pieces on their devices, in parts shaped as the weights."""
        pieces = whole.split([len(piece) for piece in self.pieces])
        return self.views([x.to(own.device) for x, own in zip(pieces, self.pieces, strict=True)])

    def views(self, pieces: Iterable[Tensor]) -> list[Tensor]:
        return [
            part.view(shape)
            for piece, shapes in zip(pieces, self.shapes.values(), strict=True)
            for part, shape in zip(piece.split([x.numel() for x in shapes]), shapes, strict=True)
        ]

    def perturbation(self, p: float, kinds: Kinds) -> tuple[list[Tensor], float]:
        """A direction for each weight and a number, whose products are ε̂.

        The number is NaN if a gradient is not finite.
        """
        members = [m for same in kinds.values() for m in same]
        grads = [m.grad for m in members]
        torch._foreach_copy_(self.copies, grads)
        g, norm_of_all = _joined(self.pieces), norm
        layouts = [layout for _, _, layout in kinds]
        if any(layouts):
            norm_of_all = partial(_norm_over_shards, layouts, [len(x) for x in self.pieces])
        rho, *others = {m.group["rho"] for m in members}
        if others or any(m.group["adaptive"] for m in members):
            T = _joined([torch.cat([m.scale() for m in same]) for same in kinds.values()])
            v, step = direction(T * g, 1, p, norm_of_all)
            return self.parts(T * v), step.item()
        if p == 2:
            length = norm_of_all(g, p).item()
            if 1e-15 < length < 1e15:  # no square left float32's range
                return grads, rho / length  # without a copy of the gradients
        v, step = direction(g, rho, p, norm_of_all)
        return self.parts(v), step.item()

    def save(self) -> None:
        torch._foreach_copy_(self.copies, self.weights)

    def move(self, v: list[Tensor], step: float) -> None:
        """w ← w + step · v, in place."""
        torch._foreach_add_(self.weights, v, alpha=step)

    def restore(self) -> None:
        torch._foreach_copy_(self.weights, self.copies)


def _joined(pieces: list[Tensor]) -> Tensor:
    """One vector, in at least float32, on the device of the first piece."""
    home = pieces[0].device
    whole = pieces[0] if len(pieces) == 1 else torch.cat([x.to(home) for x in pieces])
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def _norm_over_shards(layouts: list[Any], sizes: list[int], v: Tensor, p: float) -> Tensor:
    """‖v‖_p of a vector whose parts have these layouts: the norm of the norms of all shards."""
    norms = []
    for part, layout in zip(v.split(sizes), layouts, strict=True):
        norms.append(_over_shards(norm(part, p), p, layout))
    return norm(torch.stack(norms), p)


def _over_shards(part: Tensor, p: float, layout: Any) -> Tensor:
    """The p-norm of one number per shard."""
    if layout is None:
        return part
    mesh, placements = layout
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            shards = [torch.empty_like(part) for _ in range(mesh.size(dim))]
            torch.distributed.all_gather(shards, part, mesh.get_group(dim))
            part = norm(torch.stack(shards), p)
    return part


@torch.no_grad()
def all_finite(members: list[Member]) -> bool:
    """Whether no gradient is infinite or NaN, in any shard."""
    kinds: Kinds = {}
    for member in members:
        kinds.setdefault(member.kind, []).append(member)
    broken = []
    for (_, device, layout), same in kinds.items():
        grads = [m.grad for m in same]
        flag = torch.zeros((), dtype=torch.float32, device=device)  # whatever the default is
        if device.type in ("cpu", "cuda", "xpu"):  # as GradScaler does it: in one launch
            torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, torch.ones_like(flag))
        else:
            flag.fill_(not all(g.isfinite().all() for g in grads))
        broken.append(_over_shards(flag, math.inf, layout))
    return not any(broken)
