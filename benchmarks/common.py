"""What the benchmarks share: turns, the least a method needs, and records.

A benchmark compares *sides*, of which one is the *unit*.  They take turns in one process, in an
order that rotates, so that a machine that slows down slows down all of them.  What counts is the
ratio to the unit within a turn: its median over the turns, and its quartiles.

The *floor* is what a method needs at least: its multiplications at the rate of a large matrix
product, or its bytes at the rate at which tensors are copied, whichever takes longer.  Both rates
are measured beside the turns, in the same process; whatever is not counted comes on top.

A record, ``results/benchmark_TOPIC.json`` or, of a GPU, ``…_cuda.json``, holds ``setting`` and
``parts``; each part holds rows, and a row a ``case``, the number of ``turns``, a ``floor`` (seconds
and what makes it), and ``sides``: median ``seconds``, ``ratio``, its ``quartiles``, and what else is
known (:data:`NOTES`).
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from torch import nn

import flatmin

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
TOPICS = ("stack", "sam", "m_sam", "stiffness", "spectrum", "mixup")
NOTES = {  # what a side may know besides its time, and how a table says it
    "products": "{} products",
    "product_seconds": "one alone {}",
    "error": "error {:.0e}",
    "outer_nodes": "{:.0f} outer nodes",
    "expected": "{:.3g}× by arithmetic",
    "peak_mib": "{:.0f} MiB",
    "copies": "makes {0[0]:.2f} copies of the weights at the first step, {0[1]:.2f} later",
}


def load() -> float:
    """How many processes wanted to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


LOAD = load()  # before anything here ran


def record_file(topic: str, device: str, folder: Path = RESULTS) -> Path:
    return folder / f"benchmark_{topic}{'' if device == 'cpu' else '_' + device}.json"


# --------------------------------------------------------------------------------------- the clock


class Clock:
    """Seconds that pass on a device; on a GPU between two events, once it has reached them."""

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
    found = []

    def note(module, _, output):
        outputs, inputs = len(module.weight), module.weight[0].numel()
        found.append((output[:1].numel() // outputs, inputs, outputs))

    known = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(note) for m in known]
    training = model.training
    with torch.no_grad():
        model.eval()(x[:1])
    model.train(training)
    for hook in hooks:
        hook.remove()
    return found


def gradient_multiplications(model: nn.Module, x) -> int:
    """Of one example's gradient: TIO for a layer's output, for its weights, and for its input.

    The first layer's input needs none.
    """
    each = [t * i * o for t, i, o in layers(model, x)]
    return 3 * sum(each) - each[0]


def product_multiplications(model: nn.Module, x) -> int:
    r"""Of one example's Hessian times a vector, forward and backward pass being known.

    With V for the vector's part of a layer W, a and δ for what is known, a dot for what is not:
    ȧ' = Va + Wȧ; δ̇ = Vᵀδ' + Wᵀδ̇'; and the product is δ̇'aᵀ + δ'ȧᵀ.  The first layer's ȧ is 0, and
    its δ̇ nobody asks for.
    """
    each = [t * i * o for t, i, o in layers(model, x)]
    return 6 * sum(each) - 4 * each[0]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matmul_rate(device: str, repeats: int = 10) -> float:
    """Multiplications a second of a large matrix product, at its best."""
    n = 8192 if device == "cuda" else 512
    a, b, clock = *torch.randn(2, n, n, device=device), Clock(device)
    return n**3 / min(clock.time(lambda: a @ b) for _ in range(repeats))


def copy_rate(device: str, footprint: float, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a copy from one half of so much memory to the other."""
    n = int(min(max(footprint, 2**20), 2**28)) // 8
    a, b, clock = *torch.zeros(2, n, device=device), Clock(device)
    return 8 * n / min(clock.time(lambda: b.copy_(a)) for _ in range(repeats))


def floor(device: str, multiplications: float = 0, bytes: float = 0, footprint: float = 0) -> dict:
    """Seconds needed at least; ``footprint``: in how much memory the bytes move."""
    needs = {
        "arithmetic": multiplications / matmul_rate(device),
        "bytes": bytes / copy_rate(device, footprint or bytes),
    }
    of = max(needs, key=needs.get)
    return {"seconds": needs[of], "of": of, "multiplications": multiplications, "bytes": bytes}


# ------------------------------------------------------------------------------------- one script


def warn_if_busy(when: str, load: float, own: int) -> None:
    if load > own + 0.5:
        print(
            f"\nWARNING: this machine was busy {when} (load {load}). Turns share what slows them "
            "down, so ratios suffer less than times; neither is an idle machine's.",
            flush=True,
        )


class Benchmark:
    """One script at work: its options, its turns, its tables and its record.

    Parameters
    ----------
    topic : str
        Names the record.
    text : str
        The script's docstring; its first line is what ``--help`` says.
    arguments : list of str, optional
        The command line.
    peers : sequence of str
        Packages from PyPI whose versions belong to the setting.
    """

    def __init__(self, topic: str, text: str, arguments=None, peers=()):
        parser = argparse.ArgumentParser(description=text.split("\n")[0])
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        parser.add_argument(
            "--seconds",
            type=float,
            default=3.0,
            help="of each comparison, if three turns take no longer",
        )
        parser.add_argument(
            "--quick", action="store_true", help="small sizes, one turn: does it run?"
        )
        parser.add_argument(
            "--record",
            nargs="?",
            type=Path,
            metavar="FILE",
            const=RESULTS,
            help="write the results, into results/ or this file",
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
        """A row of sides that take turns, for so many seconds, and ``least`` turns anyway.

        ``times(function)`` says how long a call took; default: the device's clock.  With
        ``warm_up`` one call of each comes before, and is not counted.
        """
        times = times or Clock(self.device).time
        least, seconds = least or self.least, self.seconds if seconds is None else seconds
        found, order = {name: [] for name in sides}, list(sides.items())
        end = time.perf_counter() + seconds
        for function in sides.values() if warm_up else ():
            times(function)
        while len(found[unit]) < least or time.perf_counter() < end:
            order = [*order[1:], order[0]]  # so that none always follows the same other
            for name, function in order:
                found[name].append(times(function))
        return compare(found, unit)

    def floor(self, **needs) -> dict:
        return floor(self.device, **needs)

    def part(self, name: str, title: str, unit: str) -> "Part":
        self.parts.append(part := Part(name, title, unit))
        return part

    def finish(self) -> None:
        """To be called last: says how busy the machine is by now, and writes the record."""
        self.setting["load at the end"] = load()
        warn_if_busy("at the end", self.setting["load at the end"], self.setting["threads"])
        if self.file is None:
            return
        parts = {p.name: {"title": p.title, "unit": p.unit, "rows": p.rows} for p in self.parts}
        text = json.dumps({"setting": self.setting, "parts": parts}, indent=1, ensure_ascii=False)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {self.file}")


class Part:
    """A table of a record: its rows appear as they are measured."""

    def __init__(self, name: str, title: str, unit: str):
        self.name, self.title, self.unit, self.rows = name, title, unit, []

    def add(self, case: dict, row: dict, floor: dict | None = None) -> dict:
        self.rows.append(row := {"case": case, "floor": floor} | row)
        if len(self.rows) == 1:
            print(f"\n{self.title}")
        print("  " + ", ".join(f"{name} {value}" for name, value in case.items()))
        for name, side in row["sides"].items():
            text = ", ".join([of_unit(side), *notes(side)])
            print(f"    {name:<22} {duration(side['seconds']):>8}  {text}")
        if floor:
            print(f"    {'floor':<22} {duration(floor['seconds']):>8}  {floor['of']}", flush=True)
        return row


# ------------------------------------------------------------------------------------- how it reads


def duration(seconds: float) -> str:
    unit, factor = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * factor
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def of_unit(side: dict) -> str:
    """A ratio with its quartiles, if there are any."""
    ratio, places = side["ratio"], 2 if side["ratio"] < 10 else 1 if side["ratio"] < 100 else 0
    spread = "–".join(f"{q:.{places}f}" for q in side.get("quartiles", ()))
    return f"{ratio:.{places}f}×" + (f" [{spread}]" if spread else "")


def notes(side: dict) -> list[str]:
    say = lambda name: duration(side[name]) if name.endswith("seconds") else side[name]
    return [text.format(say(name)) for name, text in NOTES.items() if side.get(name) is not None]


# ------------------------------------------------------------------------------------ the setting


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache  # before a record is written, which makes the tree differ from it
def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(device: str, peers=()) -> dict:
    found = {
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
            found[name] = version(name)
        else:
            print(f"{name} is not installed: not measured")
    return found
