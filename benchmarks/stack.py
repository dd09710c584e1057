"""How much faster is the stack than a loop over runs?

    python benchmarks/stack.py [--device cuda] [--record]

Both sides train R networks, an MLP 40-100-100-10 with batches of 100 out of 4,000 examples (the
shape of MNIST-1D), by SGD with momentum: ``flatmin.fit`` all at once, the loop one after another,
the way PyTorch's tutorials do it (``nn.Module``, ``torch.optim.SGD``): once with a ``DataLoader``,
as is usual, and once, "lean", by indexing tensors that are on the device already.  On a GPU, where a
loop waits for launches, there is also a loop whose step is one CUDA graph.  All visit the data in a
fresh order each epoch; the stack, the lean loop, and the one of graphs end with the same weights.

Timed are training steps alone: no set-up, no capture, no evaluation.  Times are those of a step and
run.  A loop takes R times as long for R runs, so that the loops train ten at most.
"""

import itertools

from common import Benchmark, Clock, gradient_multiplications, size  # isort: skip  (quiets progress bars)
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmin import Data, Recipe, fit
from flatmin.book import MLP
from flatmin.optimizer import SGD
from flatmin.stack import epoch_order, initial_module

SIZES = (40, 100, 100, 10)
BATCH = 100
STEPS = 40  # timed: an epoch
WARM_UP = 5  # steps before the clock starts
LOOPED = 10  # runs of a loop, at most
RUNS = (1, 3, 10, 30, 100, 300)
WIDTHS = (25, 100, 400)


def make_data(sizes=SIZES, examples=4000) -> Data:
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for split, n in {"train": examples, "validation": 0, "test": 100}.items():
        parts[f"x_{split}"] = torch.randn(n, sizes[0], generator=generator)
        parts[f"y_{split}"] = torch.randint(sizes[-1], (n,), generator=generator)
    clean = {f"y_{split}_clean": parts[f"y_{split}"] for split in ("train", "validation")}
    return Data("noise in the shape of MNIST-1D", sizes[-1], **parts, **clean)


class Steps:
    """Seconds between two steps."""

    def __init__(self, device, first: int, last: int):
        self.clock, self.first, self.last, self.step = Clock(device), first, last, 0

    def tick(self) -> None:
        """To be called before every step; one more step than is timed stops the clock."""
        if self.step == self.first:
            self.clock.start()
        if self.step == self.last:
            self.seconds = self.clock.stop()
        self.step += 1


def time_stack(model, data, runs, steps, batch_size, device, **places) -> float:
    """Seconds for ``steps`` steps of all runs, side by side."""
    steps_of = Steps(device, WARM_UP, WARM_UP + steps)

    def schedule(done):  # fit asks it before every step
        steps_of.tick()
        return 1.0

    total = WARM_UP + steps + 1
    recipe = Recipe(optimizer=SGD(lr=0.05, momentum=0.9, schedule=schedule), **places)
    fit(
        model,
        data,
        recipe,
        steps=total,
        batch_size=batch_size,
        seeds=range(runs),
        evaluate_at=[total],
        splits=["test"],
        device=device,
    )
    return steps_of.seconds


def single_runs(model, runs, device):
    """A network and its optimizer, for one run after the other."""
    for seed in range(runs):
        module = initial_module(model, seed).to(device)
        yield seed, module, torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def plain_loss(module, x, y):
    return nn.functional.cross_entropy(module(x), y)


def time_loop(
    model, data, runs, steps, batch_size, device, loader=False, objective=plain_loss
) -> float:
    """Seconds for ``steps`` steps of all runs, one run after the other."""
    x, y = data.x_train.to(device), data.y_train.to(device)
    seconds = 0.0
    for seed, module, optimizer in single_runs(model, runs, device):
        steps_of = Steps(device, WARM_UP, WARM_UP + steps)
        if loader:
            loader = DataLoader(
                TensorDataset(data.x_train.cpu(), data.y_train.cpu()),
                batch_size,
                shuffle=True,
                pin_memory=device == "cuda",
            )
            batches = (batch for _ in itertools.count() for batch in loader)
        else:
            batches = ((x[rows], y[rows]) for rows in all_rows(seed, len(x), batch_size, device))
        steps_of.tick()  # between two ticks: one batch, one step
        for batch_x, batch_y in itertools.islice(batches, WARM_UP + steps + 1):
            optimizer.zero_grad()
            batch = (part.to(device, non_blocking=True) for part in (batch_x, batch_y))
            objective(module, *batch).backward()
            optimizer.step()
            steps_of.tick()
        seconds += steps_of.seconds
    return seconds


def all_rows(seed, n, batch_size, device):
    """Which examples a run visits, step by step."""
    for epoch in itertools.count():
        yield from epoch_order(seed, epoch, n).to(device).split(batch_size)


def time_graphs(model, data, runs, steps, batch_size, device="cuda") -> float:
    """The lean loop, but for its step: a CUDA graph, captured once a run and replayed.

    Batches must be of one size: ``batch_size`` divides the number of examples.
    """
    x, y = data.x_train.to(device), data.y_train.to(device)
    seconds = 0.0
    for seed, module, optimizer in single_runs(model, runs, device):
        rows = torch.zeros(batch_size, dtype=torch.int64, device=device)
        graph = capture(module, optimizer, x, y, rows)
        steps_of = Steps(device, WARM_UP, WARM_UP + steps)
        steps_of.tick()
        visited = all_rows(seed, len(x), batch_size, device)
        for now in itertools.islice(visited, WARM_UP + steps + 1):
            rows.copy_(now)
            graph.replay()
            steps_of.tick()
        seconds += steps_of.seconds
    return seconds


def capture(module, optimizer, x, y, rows) -> "torch.cuda.CUDAGraph":
    """One step of training on the batch ``rows`` as a CUDA graph; the weights stay as they are."""
    before = [p.detach().clone() for p in module.parameters()]

    def step():
        optimizer.zero_grad(set_to_none=True)
        plain_loss(module, x[rows], y[rows]).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up, and make room for the momentum
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # its gradients are the graph's own, which each replay writes anew
    with torch.no_grad():
        for p, w in zip(module.parameters(), before, strict=True):
            p.copy_(w)
            optimizer.state[p]["momentum_buffer"].zero_()
    return graph


def compare(bench, runs, sizes, data, steps) -> tuple[dict, dict]:
    """Seconds a step and run, and their floor: forward and backward pass, and the optimizer's five
    readings and writings of numbers in the size of the weights, beside three of the passes."""
    model = lambda: MLP(*sizes)
    few, device = min(runs, LOOPED), bench.device
    arguments = model, data, few, steps, BATCH, device
    a_step = {
        "stack": lambda: time_stack(model, data, runs, steps, BATCH, device) / runs,
        "lean loop": lambda: time_loop(*arguments) / few,
        "loop": lambda: time_loop(*arguments, loader=True) / few,
    }
    if device == "cuda":
        a_step["graphs"] = lambda: time_graphs(*arguments) / few
    row = bench.turns(a_step, "stack", times=lambda function: function() / steps)
    least = bench.floor(
        multiplications=BATCH * gradient_multiplications(model(), torch.zeros(1, sizes[0])),
        bytes=8 * 4 * size(model()),
        footprint=3 * 4 * size(model()) * runs,
    )
    return row, least


def main(arguments=None) -> None:
    bench = Benchmark("stack", __doc__, arguments)
    data = make_data().to(bench.device)
    steps = 3 if bench.quick else STEPS
    part = bench.part("runs", "MLP 40-100-100-10, batch 100: a step and run", "stack")
    for runs in (1, 3) if bench.quick else RUNS:
        part.add({"runs": runs}, *compare(bench, runs, SIZES, data, steps))
    part = bench.part("parameters", "MLP 40-w-w-10, batch 100, 30 runs: a step and run", "stack")
    for width in (25,) if bench.quick else WIDTHS:
        sizes = (40, width, width, 10)
        case = {"w": width, "parameters": size(MLP(*sizes))}
        part.add(case, *compare(bench, 3 if bench.quick else 30, sizes, data, steps))
    bench.finish()


if __name__ == "__main__":
    main()
