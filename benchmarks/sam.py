"""What does a SAM step cost beyond its two passes?

    python benchmarks/sam.py [--device cuda] [--record]

Two passes and one step of the base optimizer are the least that SAM can cost; they are the unit.
The other sides are ``flatmin.SAM``, the SAM of ``pytorch-optimizer`` (from PyPI; skipped if not
installed), and a textbook SAM, written as in most public implementations: ``first_step`` and
``second_step`` are loops over the parameters.

*networks* measures a ResNet, where the passes dominate, and a network of 122 small tensors, where
they do not; and the memory that SAM allocates beyond two passes, in copies of the weights.
*parameters* varies the width of a small network at a small batch, where SAM's own reads and writes
of the weights matter most.
"""

from common import Benchmark, gradient_multiplications, size  # isort: skip  (quiets progress bars)
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin import SAM
from flatmin.book import MLP, resnet20

BATCH = 32
WIDTHS = (32, 128, 512, 1024)


class Textbook:
    """SAM as in most public implementations, with their adaptive form."""

    def __init__(self, base, rho, adaptive=False):
        self.base, self.rho, self.adaptive, self.old = base, rho, adaptive, {}
        self.params = [p for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self):
        power = lambda p, n: p.abs() ** n if self.adaptive else 1.0
        norm = torch.stack([(power(p, 1) * p.grad).norm(2) for p in self.params]).norm(2)
        scale = self.rho / (norm + 1e-12)
        for p in self.params:
            self.old[p] = p.data.clone()
            p.add_(power(p, 2) * p.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.params:
            p.data = self.old[p]
        self.base.step()

    def step(self, closure):
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


class TwoPasses:
    """The passes and the step that every SAM needs."""

    def __init__(self, base, rho):
        self.base = base

    def step(self, closure):
        loss = closure()
        closure()
        self.base.step()
        return loss


class PytorchOptimizer:
    """The SAM of pytorch-optimizer, whose step() leaves the first pass to the caller."""

    def __init__(self, base, rho):
        import pytorch_optimizer

        params = [p for group in base.param_groups for p in group["params"]]
        settings = {name: base.defaults[name] for name in ("lr", "momentum")}
        self.sam = pytorch_optimizer.SAM(params, type(base), rho=rho, **settings)

    def step(self, closure):
        loss = closure()
        self.sam.step(closure)
        return loss


SIDES = {"two passes": TwoPasses, "flatmin": SAM, "textbook": Textbook}
PEER = "pytorch-optimizer"


class Loop:
    """One network, one batch, one optimizer, ready to step."""

    def __init__(self, make, x, side, device):
        torch.manual_seed(0)
        self.module, self.x = make().to(device).train(), x.to(device)
        y = torch.randint(10, (len(x),)).to(device)
        base = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        self.optimizer = side(base, 0.05)

        def closure():
            self.module.zero_grad()
            loss = nn.functional.cross_entropy(self.module(self.x), y)
            loss.backward()
            return loss

        self.step = lambda: self.optimizer.step(closure)


class Allocations(TorchDispatchMode):
    """Counts the bytes of new memory that operations allocate."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves
        result = function(*args, **(kwargs or {}))
        tensors = filter(torch.is_tensor, leaves((args, kwargs)))
        known = {x.untyped_storage().data_ptr() for x in tensors}
        for x in leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.bytes += x.untyped_storage().nbytes()
        return result


def copies(make, x, device="cpu") -> list[float]:
    """Memory that our first and second first_step() allocate, in copies of the weights."""
    loop = Loop(make, x, SAM, device)
    allocated = []
    for _ in range(2):
        loss = sum((p**2).sum() for p in loop.module.parameters())
        loss.backward()
        with Allocations() as new:
            loop.optimizer.first_step()
        loop.optimizer.restore()
        allocated.append(new.bytes / (4 * size(loop.module)))
    return allocated


def compare(bench, make, x) -> tuple[dict, dict]:
    """Seconds per step, and their floor.

    Bytes: each pass reads the weights twice and writes a gradient; the ascent reads weights and
    gradient and writes weights, and saves the old ones, which are restored; SGD with momentum
    reads three tensors and writes two.
    """
    sides = SIDES | ({PEER: PytorchOptimizer} if PEER in bench.setting else {})
    loops = {name: Loop(make, x, side, bench.device) for name, side in sides.items()}
    row = bench.turns({name: loop.step for name, loop in loops.items()}, "two passes")
    module = loops["flatmin"].module
    floor = bench.floor(
        multiplications=2 * len(x) * gradient_multiplications(module, x.to(bench.device)),
        bytes=(2 * 3 + 3 + 2 + 2 + 5) * 4 * size(module),
        footprint=4 * 4 * size(module),
    )
    return row, floor


def main(arguments=None) -> None:
    bench = Benchmark("sam", __doc__, arguments, peers=[PEER])
    networks = {
        "ResNet-20": (lambda: resnet20(10), (BATCH, 3, 32, 32)),
        "60 layers of 64 units": (lambda: MLP(*[64] * 60, 10), (BATCH, 64)),
    }
    if bench.quick:
        networks = {"3 layers of 64 units": (lambda: MLP(64, 64, 64, 10), (BATCH, 64))}
    part = bench.part("networks", "A step, batch 32", "two passes")
    for name, (make, shape) in networks.items():
        row, floor = compare(bench, make, torch.randn(*shape))
        row["sides"]["flatmin"]["copies"] = copies(make, torch.randn(*shape), bench.device)
        part.add({"network": name, "parameters": size(make())}, row, floor)
    part = bench.part("parameters", "A step, MLP 64-w-w-10, batch 32", "two passes")
    for width in WIDTHS[:1] if bench.quick else WIDTHS:
        make = lambda width=width: MLP(64, width, width, 10)
        row = compare(bench, make, torch.randn(BATCH, 64))
        part.add({"w": width, "parameters": size(make())}, *row)
    bench.finish()


if __name__ == "__main__":
    main()
