"""What do the shards of m-SAM cost, side by side and in a loop?

    python benchmarks/m_sam.py [--device cuda] [--record]

One m-SAM gradient of an MLP 40-100-100-10 and 128 examples, in shards of m; each shard has its own
perturbation.  ``flatmin.gradient.SAM`` computes the shards side by side (``vmap``), or in a loop
with ``chunk_size=1``; *by hand* is what one would write without it: a loop over the shards in plain
PyTorch, with two backward passes each.  All three compute the same gradient, with the same
arithmetic for every m; what grows with the number of shards is the number of calls, or of perturbed
weights.
"""

from functools import partial

from common import Benchmark, gradient_multiplications, size  # isort: skip  (quiets progress bars)
import torch
from torch import nn
from torch.func import functional_call

from flatmin.book import MLP
from flatmin.gradient import SAM
from flatmin.pipeline import Objective

EXAMPLES = 128
RHO = 0.05
SHARDS = (1, 2, 4, 8, 16, 32, 64)


def by_hand(module, x, y, m) -> list[torch.Tensor]:
    """The m-SAM gradient by plain autograd, in a loop over the shards."""
    params = list(module.parameters())
    total = [torch.zeros_like(p) for p in params]
    for a, b in zip(x.split(m), y.split(m), strict=True):
        gradient = torch.autograd.grad(nn.functional.cross_entropy(module(a), b), params)
        with torch.no_grad():
            norm = torch.stack([g.norm() for g in gradient]).norm()
            old = [p.clone() for p in params]
            torch._foreach_add_(params, torch._foreach_mul(gradient, RHO / norm))
        gradient = torch.autograd.grad(nn.functional.cross_entropy(module(a), b), params)
        with torch.no_grad():
            torch._foreach_copy_(params, old)
            torch._foreach_add_(total, gradient, alpha=len(a) / len(x))
    return total


def sides(shards: int, device="cpu") -> dict:
    """One m-SAM gradient, three ways."""
    torch.manual_seed(0)
    module = MLP(40, 100, 100, 10).to(device)
    x, y = torch.randn(EXAMPLES, 40).to(device), torch.randint(10, (EXAMPLES,)).to(device)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params, buffers, rows, raw):
        logits = functional_call(module, params, (x[rows],))
        return nn.functional.cross_entropy(logits, y[rows]), buffers

    m = EXAMPLES // shards
    ours = lambda sam: sam(Objective(loss, EXAMPLES), params, (), t=0)
    return {
        "side by side": partial(ours, SAM(RHO, m=m)),
        "in a loop": partial(ours, SAM(RHO, m=m, chunk_size=1)),
        "by hand": partial(by_hand, module, x, y, m),
    }


def main(arguments=None) -> None:
    bench = Benchmark("m_sam", __doc__, arguments)
    title = "An m-SAM gradient, MLP 40-100-100-10, 128 examples"
    part = bench.part("shards", title, "side by side")
    module = MLP(40, 100, 100, 10)
    per_example = gradient_multiplications(module, torch.zeros(1, 40))
    for shards in (1, 4) if bench.quick else SHARDS:
        row = bench.turns(sides(shards, bench.device), "side by side")
        floor = bench.floor(
            multiplications=2 * EXAMPLES * per_example,
            bytes=4
            * 4
            * size(module)
            * shards,  # gradient and perturbed weights, each written and read
            footprint=2 * 4 * size(module) * shards,
        )
        part.add({"shards": shards, "m": EXAMPLES // shards}, row, floor)
    bench.finish()


if __name__ == "__main__":
    main()
