"""What the benchmarks share: turns, floors and records.

A benchmark compares *sides*, one of which is the *unit*.  They take turns in one process, in
rotating order, so that a machine that slows down slows down all of them.  The result is the ratio
to the unit within a turn: its median and quartiles over the turns.

The *floor* is the least time that a method needs: its multiplications at the rate of a large matrix
product, or its bytes at the rate at which tensors are copied, whichever takes longer.  Both rates
are measured in the same process; anything that is not counted comes on top.

A record, ``results/benchmark_TOPIC.json`` or, on a GPU, ``…_cuda.json``, has a ``setting`` and
``parts``.  A part has rows, and each row a ``case``, the number of ``turns``, a ``floor`` (seconds,
and which of the two it is), and ``sides``: median ``seconds``, ``ratio``, its ``quartiles``, and
optional :data:`NOTES`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from torch import nn

import flatmin
from flatmin._files import print_line, replace
from flatmin.book.experiments.records import commit

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
TOPICS = ("stack", "sam", "m_sam", "stiffness", "spectrum", "mixup")
NOTES = {  # optional entries of a side, and how a table shows them
    "products": "{} products",
    "product_seconds": "{} per product",
    "error": "error {:.0e}",
    "outer_nodes": "{:.0f} outer nodes",
    "expected": "{:.3g}× by arithmetic",
    "peak_mib": "{:.0f} MiB",
    "copies": "allocates {0[0]:.2f} copies of the weights at the first step, {0[1]:.2f} later",
}


def load() -> float:
    """The average number of runnable processes over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


LOAD = load()  # before any benchmark has run


def record_file(topic: str, device: str, folder: Path = RESULTS) -> Path:
    return folder / f"benchmark_{topic}{'' if device == 'cpu' else '_' + device}.json"


# --------------------------------------------------------------------------------------- the clock


class Clock:
    """A stopwatch in seconds; on a GPU, it measures the time between two CUDA events."""

    def __init__(self, device: str = "cpu"):
        self.cuda = device == "cuda"

    def start(self) -> None:
        self.started = self._now()

    def stop(self) -> float:
        if not self.cuda:
            return self._now() - self.started
        ended = self._now()
        ended.synchronize()
        return self.started.elapsed_time(ended) / 1e3

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def time(self, function) -> float:
        self.start()
        function()
        return self.stop()


def compare(times: dict[str, list[float]], unit: str) -> dict:
    """A row: each side's median time, and the median and quartiles of its ratios to the unit."""
    sides = {}
    for name, each in times.items():
        ratios = [a / b for a, b in zip(each, times[unit], strict=True)]
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        sides[name] = {"seconds": statistics.median(each), "ratio": ratio, "quartiles": [low, high]}
    return {"turns": len(times[unit]), "sides": sides}


# --------------------------------------------------------------------------------------- the floor


def layers(model: nn.Module, x) -> list[tuple[int, int, int]]:
    """(positions T, inputs I, outputs O) of each linear layer and convolution, for one example."""
    shapes = []

    def note(module, _, output):
        outputs, inputs = len(module.weight), module.weight[0].numel()
        shapes.append((output[:1].numel() // outputs, inputs, outputs))

    counted = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(note) for m in counted]
    training = model.training
    with torch.no_grad():
        model.eval()(x[:1])
    model.train(training)
    for hook in hooks:
        hook.remove()
    return shapes


def gradient_multiplications(model: nn.Module, x) -> int:
    """Multiplications of one example's gradient: TIO each for a layer's output, weights and input.

    The first layer's input needs none.
    """
    each = [t * i * o for t, i, o in layers(model, x)]
    return 3 * sum(each) - each[0]


def product_multiplications(model: nn.Module, x) -> int:
    r"""Multiplications of one example's Hessian-vector product, given forward and backward pass.

    Let V be the vector's part of a layer W, a and δ its known activations and gradients, and a dot
    the derivative along the vector.  Then ȧ' = Va + Wȧ; δ̇ = Vᵀδ' + Wᵀδ̇'; and the product is
    δ̇'aᵀ + δ'ȧᵀ.  The first layer's ȧ is 0, and its δ̇ is not needed.
    """
    each = [t * i * o for t, i, o in layers(model, x)]
    return 6 * sum(each) - 4 * each[0]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matmul_rate(device: str, repeats: int = 10) -> float:
    """Multiplications per second of a large matrix product, the best of ``repeats``."""
    n = 8192 if device == "cuda" else 512
    a, b, clock = *torch.randn(2, n, n, device=device), Clock(device)
    return n**3 / min(clock.time(lambda: a @ b) for _ in range(repeats))


def copy_rate(device: str, footprint: float, repeats: int = 10) -> float:
    """Bytes per second, read and written, of a copy between halves of ``footprint`` bytes."""
    n = int(min(max(footprint, 2**20), 2**28)) // 8
    a, b, clock = *torch.zeros(2, n, device=device), Clock(device)
    return 8 * n / min(clock.time(lambda: b.copy_(a)) for _ in range(repeats))


def floor(device: str, multiplications: float = 0, bytes: float = 0, footprint: float = 0) -> dict:
    """The least seconds needed; ``footprint`` is the size of the memory in which the bytes move."""
    needs = {
        "arithmetic": multiplications / matmul_rate(device),
        "bytes": bytes / copy_rate(device, footprint or bytes),
    }
    limit = max(needs, key=needs.get)
    return {
        "seconds": needs[limit],
        "of": limit,
        "multiplications": multiplications,
        "bytes": bytes,
    }


# ------------------------------------------------------------------------------------- one script


def warn_if_busy(when: str, load: float, own: int) -> None:
    if load > own + 0.5:
        print(
            f"\nWARNING: this machine was busy {when} (load {load}). Other load distorts times "
            "more than ratios; neither is what an idle machine would give.",
            flush=True,
        )


class Benchmark:
    """The run of one script: its options, turns, tables and record.

    Parameters
    ----------
    topic : str
        Names the record.
    text : str
        The script's docstring; ``--help`` shows its first line.
    arguments : list of str, optional
        The command line.
    peers : sequence of str
        Packages from PyPI whose versions are recorded in the setting.
    """

    def __init__(self, topic: str, text: str, arguments=None, peers=()):
        parser = argparse.ArgumentParser(description=text.split("\n")[0])
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument(
            "--seconds",
            type=float,
            default=3.0,
            help="time per comparison, unless three turns take longer",
        )
        parser.add_argument(
            "--quick", action="store_true", help="small sizes and one turn, to test that it runs"
        )
        parser.add_argument(
            "--record",
            nargs="?",
            type=Path,
            metavar="FILE",
            const=RESULTS,
            help="write the results to results/ or to FILE",
        )
        chosen = parser.parse_args(arguments)
        if chosen.seconds <= 0:
            parser.error("--seconds must be positive")
        if chosen.device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device on this machine")
        self.device, self.quick, self.file = chosen.device, chosen.quick, chosen.record
        if self.file == RESULTS:
            self.file = record_file(topic, self.device)
        self.seconds, self.least = (0.0, 1) if self.quick else (chosen.seconds, 3)
        torch.backends.cudnn.allow_tf32 = False  # float32 for all sides, as matrix products have it
        self.setting = setting(self.device, peers) | {"load": LOAD}
        if self.quick:
            self.setting["quick"] = True
        self.parts = []
        print(", ".join(f"{name} {value}" for name, value in self.setting.items()), flush=True)
        warn_if_busy("when this began", LOAD, 0)

    def turns(
        self, sides: dict, unit: str, *, times=None, least=None, seconds=None, warm_up=True
    ) -> dict:
        """A row of sides that take turns for ``seconds``, but at least ``least`` turns.

        ``times(function)`` returns how long a call took; default: the device's clock.  With
        ``warm_up``, each side is called once before, which is not counted.
        """
        times = times or Clock(self.device).time
        least, seconds = least or self.least, self.seconds if seconds is None else seconds
        measured, order = {name: [] for name in sides}, list(sides.items())
        end = time.perf_counter() + seconds
        for function in sides.values() if warm_up else ():
            times(function)
        while len(measured[unit]) < least or time.perf_counter() < end:
            order = [*order[1:], order[0]]  # so that no side always comes first
            for name, function in order:
                measured[name].append(times(function))
        return compare(measured, unit)

    def floor(self, **needs) -> dict:
        return floor(self.device, **needs)

    def part(self, name: str, title: str, unit: str) -> "Part":
        self.parts.append(part := Part(name, title, unit))
        return part

    def finish(self) -> None:
        """To be called last: records the machine's load and writes the record."""
        self.setting["load at the end"] = load()
        warn_if_busy("at the end", self.setting["load at the end"], self.setting["threads"])
        if self.file is None:
            return
        parts = {p.name: {"title": p.title, "unit": p.unit, "rows": p.rows} for p in self.parts}
        text = json.dumps({"setting": self.setting, "parts": parts}, indent=1, ensure_ascii=False)
        replace(self.file, text + "\n")
        print(f"\nwritten: {self.file}")


class Part:
    """A table of a record; its rows are printed as they are measured."""

    def __init__(self, name: str, title: str, unit: str):
        self.name, self.title, self.unit, self.rows = name, title, unit, []

    def add(self, case: dict, row: dict, floor: dict | None = None) -> dict:
        self.rows.append(row := {"case": case, "floor": floor} | row)
        if len(self.rows) == 1:
            print_line(f"\n{self.title}")
        print_line("  " + ", ".join(f"{name} {value}" for name, value in case.items()))
        for name, side in row["sides"].items():
            text = ", ".join([ratio_text(side), *notes(side)])
            print_line(f"    {name:<22} {seconds_text(side['seconds']):>8}  {text}")
        if floor:
            print_line(f"    {'floor':<22} {seconds_text(floor['seconds']):>8}  {floor['of']}")
        return row


# ---------------------------------------------------------------------------------- numbers as text


def seconds_text(seconds: float) -> str:
    """Three digits, in s, ms or µs."""
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * factor
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def ratio_text(side: dict) -> str:
    """A ratio with its quartiles, if it has any."""
    ratio, places = side["ratio"], 2 if side["ratio"] < 10 else 1 if side["ratio"] < 100 else 0
    spread = "–".join(f"{q:.{places}f}" for q in side.get("quartiles", ()))
    return f"{ratio:.{places}f}×" + (f" [{spread}]" if spread else "")


def notes(side: dict) -> list[str]:
    value = lambda name: seconds_text(side[name]) if name.endswith("seconds") else side[name]
    return [text.format(value(name)) for name, text in NOTES.items() if side.get(name) is not None]


# ------------------------------------------------------------------------------------ the setting


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(device: str, peers=()) -> dict:
    entries = {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatmin": flatmin.__version__,
        "commit": commit(),
    }
    for name in peers:
        if version(name):
            entries[name] = version(name)
        else:
            print(f"{name} is not installed: not measured")
    return entries
