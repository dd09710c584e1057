"""How much faster is the stack than a loop over runs?

    python benchmarks/stack.py [--device cuda] [--record]

Both sides train R networks, an MLP 40-100-100-10 with batches of 100 out of 4,000 examples (the
shape of MNIST-1D), by SGD with momentum: ``flatmin.fit`` all at once, the loop one after another,
the way PyTorch's tutorials do it (``nn.Module``, ``torch.optim.SGD``): once with a ``DataLoader``, as
is usual, and once, "lean", by indexing tensors that are on the device already.  All visit the data in
a fresh order each epoch; stack and lean loop end with the same weights.  Timed are training steps alone: no set-up, no
evaluation.  The two sides take turns, so that a machine that slows down slows down both; the medians
of all turns are compared.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.data import Data
from flatmin.models import MLP
from flatmin.optimizers import SGD
from flatmin.training import Recipe, epoch_order, fit, initial_module

RUNS = (1, 3, 10, 30, 100, 300)
RECORD = Path(__file__).resolve().parent.parent / "results" / "benchmark_stack.json"
WARM_UP = 5  # steps before the clock starts


def make_data(sizes=(40, 100, 100, 10), examples=4000) -> Data:
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for split, n in {"train": examples, "validation": 0, "test": 100}.items():
        parts[f"x_{split}"] = torch.randn(n, sizes[0], generator=generator)
        parts[f"y_{split}"] = torch.randint(sizes[-1], (n,), generator=generator)
    clean = {f"y_{split}_clean": parts[f"y_{split}"] for split in ("train", "validation")}
    return Data("noise in the shape of MNIST-1D", sizes[-1], **parts, **clean)


class Clock:
    """Seconds between two steps, once the device has finished what came before each."""

    def __init__(self, device, first: int, last: int):
        self.device, self.first, self.last, self.step = device, first, last, 0

    def tick(self) -> None:
        """To be called before every step; one more step than is timed stops the clock."""
        if self.step in (self.first, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds = now if self.step == self.first else now - self.seconds
        self.step += 1


def time_stack(model, data, runs, steps, batch_size, device) -> float:
    """Seconds for ``steps`` steps of all runs, side by side."""
    clock = Clock(device, WARM_UP, WARM_UP + steps)

    def schedule(done):  # fit asks it before every step
        clock.tick()
        return 1.0

    total = WARM_UP + steps + 1
    recipe = Recipe(optimizer=SGD(lr=0.05, momentum=0.9, schedule=schedule))
    fit(model, data, recipe, steps=total, batch_size=batch_size, seeds=range(runs),
        evaluate_at=[total], splits=["test"], device=device)  # fmt: skip
    return clock.seconds


def time_loop(model, data, runs, steps, batch_size, device, loader=False) -> float:
    """Seconds for ``steps`` steps of all runs, one run after the other."""
    criterion = nn.CrossEntropyLoss()
    x, y = data.x_train.to(device), data.y_train.to(device)
    seconds = 0.0
    for seed in range(runs):
        module = initial_module(model, seed).to(device)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        clock = Clock(device, WARM_UP, WARM_UP + steps)
        if loader:
            loader = DataLoader(TensorDataset(data.x_train, data.y_train), batch_size, shuffle=True)
            batches = (batch for _ in itertools.count() for batch in loader)
        else:
            orders = (epoch_order(seed, epoch, len(x)).to(device) for epoch in itertools.count())
            batches = ((x[rows], y[rows]) for order in orders for rows in order.split(batch_size))
        clock.tick()  # between two ticks: one batch, one step
        for batch_x, batch_y in itertools.islice(batches, WARM_UP + steps + 1):
            optimizer.zero_grad()
            criterion(module(batch_x.to(device)), batch_y.to(device)).backward()
            optimizer.step()
            clock.tick()
        seconds += clock.seconds
    return seconds


def compare(runs, *, steps, repeats, device="cpu", sizes=(40, 100, 100, 10), examples=4000,
            batch_size=100) -> list[dict]:  # fmt: skip
    """One row a number of runs: milliseconds a step and run on both sides, and their ratio."""
    data = make_data(sizes, examples).to(device)
    model = lambda: MLP(*sizes)
    rows = []
    for n in runs:
        arguments = (model, data, n, steps, batch_size, device)
        time_stack(model, data, n, 1, batch_size, device)  # warm up
        turns = [
            (time_stack(*arguments), time_loop(*arguments), time_loop(*arguments, loader=True))
            for _ in range(repeats)
        ]
        stack, lean, loop = ([1e3 * s / steps / n for s in side] for side in zip(*turns, strict=True))
        times = {"stack": stack, "lean_loop": lean, "loop": loop}
        ratio = lambda side: statistics.median(b / a for a, b in zip(stack, side, strict=True))
        rows.append(
            {"runs": n, "ratio": ratio(loop), "lean_ratio": ratio(lean)}
            | {f"{name}_ms": statistics.median(side) for name, side in times.items()}
            | {f"{name}_ms_all": side for name, side in times.items()}
        )
    return rows


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=RECORD.parent.parent,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def setting(device, **more) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatmin": flatmin.__version__,
        "commit": commit(),
        **more,
    }


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=int, nargs="+", default=RUNS, help="how many runs to train")
    parser.add_argument("--steps", type=int, default=40, help="timed steps (40: an epoch)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--record", nargs="?", type=Path, const=RECORD, help="write the results here")
    chosen = parser.parse_args(arguments)
    if min(*chosen.runs, chosen.steps, chosen.repeats) < 1:
        parser.error("--runs, --steps and --repeats must be at least 1")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device on this machine")

    about = setting(chosen.device, steps=chosen.steps, repeats=chosen.repeats)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("MLP 40-100-100-10, batch 100; ms a step and run, medians\n")
    print(f"{'runs':>5} {'loop':>9} {'lean loop':>9} {'stack':>9} {'ratio':>7} {'lean':>7}")
    rows = []
    for n in chosen.runs:
        rows += compare([n], steps=chosen.steps, repeats=chosen.repeats, device=chosen.device)
        row = rows[-1]
        print(f"{n:>5} {row['loop_ms']:>9.3f} {row['lean_loop_ms']:>9.3f} {row['stack_ms']:>9.3f} "
              f"{row['ratio']:>6.1f}× {row['lean_ratio']:>6.1f}×", flush=True)  # fmt: skip
    if chosen.record:
        chosen.record.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"setting": about, "rows": rows}, indent=1, ensure_ascii=False)
        chosen.record.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {chosen.record}")


if __name__ == "__main__":
    main()
