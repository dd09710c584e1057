"""What does a SAM step cost beyond its two passes?

    python benchmarks/sam.py [--device cuda] [--record]

Two passes and one step of the base optimizer are the least that SAM can cost: that is 1.00.  Beside
it stand ``flatmin.SAM``, the one of ``pytorch-optimizer`` (from PyPI; left out where it is not
installed), and the textbook's: the algorithm written down as in most public implementations, with
its ``first_step`` and ``second_step`` as loops over the parameters.  All take turns in one process,
so that a machine that slows down slows down all; what is compared are the ratios of each turn, and
their median.

``shards`` times one m-SAM gradient, its shards side by side (``vmap``) and one after the other, and
``memory`` counts the bytes that one step of SAM allocates beyond what two plain passes do.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin import MLP, resnet20
from flatmin.sam import SAM, SAMGradient

try:
    from stack import setting
except ImportError:  # imported as benchmarks.sam
    from benchmarks.stack import setting

RECORD = Path(__file__).resolve().parent.parent / "results" / "benchmark_sam.json"
WARM_UP = 3


class Textbook:
    """SAM as most public implementations have it, with their choice of an adaptive form."""

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
    """What SAM cannot do without."""

    def __init__(self, base, rho):
        self.base = base

    def step(self, closure):
        loss = closure()
        closure()
        self.base.step()
        return loss


class PytorchOptimizer:
    """The one of pytorch-optimizer; its step() leaves the first pass to the caller."""

    def __init__(self, base, rho):
        import pytorch_optimizer

        params = [p for group in base.param_groups for p in group["params"]]
        settings = {name: base.defaults[name] for name in ("lr", "momentum")}
        self.sam = pytorch_optimizer.SAM(params, type(base), rho=rho, **settings)

    def step(self, closure):
        loss = closure()
        self.sam.step(closure)
        return loss


def sides() -> dict:
    found = {"two_passes": TwoPasses, "flatmin": SAM, "textbook": Textbook}
    try:
        import pytorch_optimizer  # noqa: F401

        found["pytorch_optimizer"] = PytorchOptimizer
    except ImportError:
        print("pytorch-optimizer is not installed: not measured\n")
    return found


NETWORKS = {
    "ResNet-20, batch 32": (lambda: resnet20(10), (32, 3, 32, 32)),
    "60 layers of 64 units, batch 32": (lambda: MLP(*[64] * 60, 10), (32, 64)),
}


class Loop:
    """One network, one batch, one optimizer, ready to step."""

    def __init__(self, network, side, device):
        make, shape = NETWORKS[network]
        torch.manual_seed(0)
        self.module = make().to(device).train()
        x = torch.randn(*shape, device=device)
        y = torch.randint(10, (len(x),), device=device)
        base = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        self.optimizer = side(base, 0.05)

        def closure():
            self.module.zero_grad()
            loss = nn.functional.cross_entropy(self.module(x), y)
            loss.backward()
            return loss

        self.step = lambda: self.optimizer.step(closure)


def take_turns(functions: dict, seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of each call; they take turns of one call, for ``seconds`` in all."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {name: [] for name in functions}
    for _ in range(WARM_UP):
        for function in functions.values():
            function()
    end, order = time.perf_counter() + seconds, list(functions.items())
    while time.perf_counter() < end:
        order = [*order[1:], order[0]]  # so that none always follows the same other
        for name, function in order:
            wait()
            started = time.perf_counter()
            function()
            wait()
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def medians(times: dict, unit: str) -> dict:
    """Median milliseconds of each side, and the median over the turns of its ratio to ``unit``."""
    row = {"turns": len(times[unit])}
    for name, each in times.items():
        row[f"{name}_ms"] = statistics.median(each)
        row[f"{name}_ratio"] = statistics.median(
            a / b for a, b in zip(each, times[unit], strict=True)
        )
    return row


def compare(network, *, seconds, device="cpu") -> dict:
    """Milliseconds a step of each side, and the ratio to two plain passes and a step."""
    loops = {name: Loop(network, side, device) for name, side in sides().items()}
    times = take_turns({name: loop.step for name, loop in loops.items()}, seconds, device)
    return {"network": network} | medians(times, "two_passes")


class Allocations(TorchDispatchMode):
    """Bytes of new memory, of all tensors that are made under it."""

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


def memory(network) -> dict:
    """Memory that the first and a later first_step() make, in copies of the weights."""
    loop = Loop(network, sides()["flatmin"], "cpu")
    size = sum(p.numel() * p.element_size() for p in loop.module.parameters())
    copies = []
    for _ in range(2):
        loss = sum((p**2).sum() for p in loop.module.parameters())
        loss.backward()
        with Allocations() as made:
            loop.optimizer.first_step()
        loop.optimizer.restore()
        copies.append(made.bytes / size)
    return {"network": network, "first_step_copies": copies[0], "later_step_copies": copies[1]}


def shards(*, seconds, device="cpu", n=128) -> list[dict]:
    """Milliseconds of an m-SAM gradient, side by side and in a loop."""
    torch.manual_seed(0)
    module = MLP(40, 100, 100, 10).to(device)
    x, y = torch.randn(n, 40, device=device), torch.randint(10, (n,), device=device)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def objective(params, buffers, rows=...):
        logits = functional_call(module, params, (x[rows],))
        return nn.functional.cross_entropy(logits, y[rows]), buffers

    objective.examples = n
    rows = []
    for m in (4, 16, 64):
        places = {"vmapped": SAMGradient(m=m), "looped": SAMGradient(m=m, chunk_size=1)}
        run = {name: partial(place, objective, params, {}) for name, place in places.items()}
        times = take_turns(run, seconds / 3, device)
        rows.append({"m": m, "shards": n // m} | medians(times, "vmapped"))
    return rows


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each comparison")
    parser.add_argument("--record", nargs="?", type=Path, const=RECORD, help="write results here")
    chosen = parser.parse_args(arguments)
    if chosen.seconds <= 0:
        parser.error("--seconds must be positive")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device on this machine")

    size = {"seconds": chosen.seconds, "device": chosen.device}
    about = setting(chosen.device, seconds=chosen.seconds)
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    rows = []
    for network in NETWORKS:
        row = compare(network, **size)
        rows.append(row)
        print(network, flush=True)
        for name in (key[:-3] for key in row if key.endswith("_ms")):
            print(f"  {name:<18} {row[f'{name}_ms']:8.2f} ms  {row[f'{name}_ratio']:.3f}×")
    print("\nm-SAM gradient, MLP 40-100-100-10, 128 examples: in turn / side by side")
    m_sam = shards(**size)
    for row in m_sam:
        print(f"  m = {row['m']:<3} {row['shards']:>3} shards  {row['looped_ms']:7.2f} ms / "
              f"{row['vmapped_ms']:6.2f} ms = {row['looped_ratio']:.1f}×")  # fmt: skip
    print("\nmemory made by first_step(), in copies of the weights: the first time, and later")
    copies = [memory(network) for network in NETWORKS]
    for row in copies:
        print(f"  {row['network']}: {row['first_step_copies']:.4f}, {row['later_step_copies']:.4f}")
    if chosen.record:
        chosen.record.parent.mkdir(parents=True, exist_ok=True)
        content = {"setting": about, "steps": rows, "shards": m_sam, "memory": copies}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        chosen.record.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {chosen.record}")


if __name__ == "__main__":
    main()
