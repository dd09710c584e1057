"""How much faster is the stack than a loop over runs?

    python benchmarks/stack.py [--device cuda] [--record]

All sides train R networks, an MLP 40-100-100-10 with batches of 100 out of 4,000 examples (the
shape of MNIST-1D), by SGD with momentum: ``flatmin.fit`` trains all at once, the loops one after
another as in PyTorch's tutorials (``nn.Module``, ``torch.optim.SGD``).  The *loop* uses a
``DataLoader``, as is usual; the *lean loop* indexes tensors that are already on the device.  On a
GPU, where a loop waits for kernel launches, *graphs* is a loop whose step is one CUDA graph.  All
visit the data in a new order each epoch; the stack, the lean loop and the graphs end with the same
weights.

Only training steps are timed: no set-up, no capture, no evaluation.  Times are per step and run.  A
loop takes R times as long for R runs, so the loops train at most ten.
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
LOOPED = 10  # at most, runs in a loop
RUNS = (1, 3, 10, 30, 100, 300)
WIDTHS = (25, 100, 400)


def make_data(sizes=SIZES, examples=4000) -> Data:
    generator = torch.Generator().manual_seed(0)

    def noise(n):
        x = torch.randn(n, sizes[0], generator=generator)
        return x, torch.randint(sizes[-1], (n,), generator=generator)

    train, test = noise(examples), noise(100)
    name = "noise in the shape of MNIST-1D"
    return Data.of(*train, test=test, num_classes=sizes[-1], name=name)


class Steps:
    """Times the steps from ``first`` to ``last``."""

    def __init__(self, device, first: int, last: int):
        self.clock, self.first, self.last, self.step = Clock(device), first, last, 0

    def tick(self) -> None:
        """To be called once per step; the step after the last timed one stops the clock."""
        if self.step == self.first:
            self.clock.start()
        if self.step == self.last:
            self.seconds = self.clock.stop()
        self.step += 1


def time_stack(model, data, runs, steps, batch_size, device, **stages) -> float:
    """Seconds for ``steps`` steps of all runs, side by side."""
    timer = Steps(device, WARM_UP, WARM_UP + steps)

    def schedule(done):  # the optimizer calls it once in every step
        timer.tick()
        return 1.0

    total = WARM_UP + steps + 1
    recipe = Recipe(optimizer=SGD(lr=0.05, momentum=0.9, schedule=schedule), **stages)
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
    return timer.seconds


def single_runs(model, runs, device):
    """The seed, network and optimizer of one run after the other."""
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
        timer = Steps(device, WARM_UP, WARM_UP + steps)
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
        timer.tick()  # between two ticks: one batch, one step
        for batch_x, batch_y in itertools.islice(batches, WARM_UP + steps + 1):
            optimizer.zero_grad()
            batch = (part.to(device, non_blocking=True) for part in (batch_x, batch_y))
            objective(module, *batch).backward()
            optimizer.step()
            timer.tick()
        seconds += timer.seconds
    return seconds


def all_rows(seed, n, batch_size, device):
    """The rows of the examples that a run visits, step by step."""
    for epoch in itertools.count():
        yield from epoch_order(seed, epoch, n).to(device).split(batch_size)


def time_graphs(model, data, runs, steps, batch_size, device="cuda") -> float:
    """The lean loop with a CUDA graph as its step, captured once per run and replayed.

    All batches must have the same size: ``batch_size`` divides the number of examples.
    """
    x, y = data.x_train.to(device), data.y_train.to(device)
    seconds = 0.0
    for seed, module, optimizer in single_runs(model, runs, device):
        rows = torch.zeros(batch_size, dtype=torch.int64, device=device)
        graph = capture(module, optimizer, x, y, rows)
        timer = Steps(device, WARM_UP, WARM_UP + steps)
        timer.tick()
        visited = all_rows(seed, len(x), batch_size, device)
        for now in itertools.islice(visited, WARM_UP + steps + 1):
            rows.copy_(now)
            graph.replay()
            timer.tick()
        seconds += timer.seconds
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
    with torch.cuda.stream(side):  # warm up, and allocate the momentum
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()  # its gradients belong to the graph; each replay overwrites them
    with torch.no_grad():
        for p, w in zip(module.parameters(), before, strict=True):
            p.copy_(w)
            optimizer.state[p]["momentum_buffer"].zero_()
    return graph


def compare(bench, runs, sizes, data, steps) -> tuple[dict, dict]:
    """Seconds per step and run, and their floor: the multiplications of both passes; the bytes of
    eight reads or writes of the weights' size, five by the optimizer and three by the passes."""
    model = lambda: MLP(*sizes)
    few, device = min(runs, LOOPED), bench.device
    arguments = model, data, few, steps, BATCH, device
    calls = {
        "stack": lambda: time_stack(model, data, runs, steps, BATCH, device) / runs,
        "lean loop": lambda: time_loop(*arguments) / few,
        "loop": lambda: time_loop(*arguments, loader=True) / few,
    }
    if device == "cuda":
        calls["graphs"] = lambda: time_graphs(*arguments) / few
    row = bench.turns(calls, "stack", times=lambda function: function() / steps)
    floor = bench.floor(
        multiplications=BATCH * gradient_multiplications(model(), torch.zeros(1, sizes[0])),
        bytes=8 * 4 * size(model()),
        footprint=3 * 4 * size(model()) * runs,
    )
    return row, floor


def main(arguments=None) -> None:
    bench = Benchmark("stack", __doc__, arguments)
    data = make_data().to(bench.device)
    steps = 3 if bench.quick else STEPS
    part = bench.part("runs", "MLP 40-100-100-10, batch 100: per step and run", "stack")
    for runs in (1, 3) if bench.quick else RUNS:
        part.add({"runs": runs}, *compare(bench, runs, SIZES, data, steps))
    part = bench.part("parameters", "MLP 40-w-w-10, batch 100, 30 runs: per step and run", "stack")
    for width in (25,) if bench.quick else WIDTHS:
        sizes = (40, width, width, 10)
        case = {"w": width, "parameters": size(MLP(*sizes))}
        part.add(case, *compare(bench, 3 if bench.quick else 30, sizes, data, steps))
    bench.finish()


if __name__ == "__main__":
    main()
