"""How much faster is the Gram identity than per-example gradients?

    python benchmarks/stiffness.py [--sizes 500 1000 2000] [--record]

Cosine stiffness of all pairs of N examples, three ways:

- *identity*: ``flatmin.stiffness.stiffness``, which never forms a gradient of a linear layer;
- *vmap*: ``torch.func.vmap(grad)``, then one matrix product a parameter, as one writes it today;
- *loop*: one backward pass an example; the gradients are stacked and multiplied.

For the stiffness paper's MLP 784-500-300-100-10, and for its small CNN with 16, 32 and 32 channels
on 28×28 images.  Every measurement is a process of its own: so the peak of its memory, above what
the process held before, is that method's.  Times are the smallest of several turns.  Beside them
stands the arithmetic: multiplications of the identity and of the matrix products it replaces.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from stack import RECORD as STACK_RECORD
from stack import setting
from torch import nn
from torch.func import functional_call, grad, vmap

from flatmin import MLP, SmallCNN
from flatmin.stiffness import stiffness

RECORD = STACK_RECORD.with_name("benchmark_stiffness.json")
MODELS = {
    "mlp": (lambda: MLP(784, 500, 300, 100, 10), (784,)),
    "cnn": (lambda: SmallCNN(1, 10), (1, 28, 28)),
}
criterion = nn.CrossEntropyLoss(reduction="none")


def cosine(gram):
    norm = gram.diagonal().sqrt()
    return gram / norm / norm[:, None]


def identity(model, x, y):
    return stiffness(model, criterion, x, y).cosine


def by_vmap(model, x, y):
    params = {name: w.detach() for name, w in model.named_parameters()}
    loss = lambda params, x, y: criterion(functional_call(model, params, (x[None],)), y[None])[0]
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    return cosine(sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values()))


def by_loop(model, x, y):
    rows = []
    for one, label in zip(x.split(1), y.split(1)):
        gradient = torch.autograd.grad(criterion(model(one), label).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    rows = torch.stack(rows)
    return cosine(rows @ rows.T)


WAYS = {"identity": identity, "vmap": by_vmap, "loop": by_loop}


def measure(name: str, way: str, n: int, repeats: int) -> dict:
    """Seconds and peak memory (MiB above the start) of one way, in this process."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(n, *shape), torch.randint(10, (n,))
    WAYS[way](model, x[:4], y[:4])  # warm up
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = WAYS[way](model, x, y)
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checks = [float(result.sum()), float(result.abs().sum())]
    return {"seconds": min(seconds), "peak_mib": (after - before) / unit, "checks": checks}


def in_a_process(name: str, way: str, n: int, repeats: int) -> dict:
    command = [sys.executable, __file__, "--one", name, way, str(n), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def multiplications(n: int, sizes=(784, 500, 300, 100, 10)) -> tuple[float, float]:
    """Of the MLP: N²(I + O) a layer by the identity, N² IO by products of gradients."""
    layers = list(itertools.pairwise(sizes))
    return n * n * sum(i + o for i, o in layers), n * n * sum(i * o for i, o in layers)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000], help="numbers of examples")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} into results/")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        name, way, n, repeats = chosen.one
        print(json.dumps(measure(name, way, int(n), int(repeats))))
        return
    if min(*chosen.sizes, chosen.repeats) < 1:
        parser.error("--sizes and --repeats must be at least 1")

    about = setting("cpu", repeats=chosen.repeats, system=platform.system())
    print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    print(f"{'':>4} {'N':>5} {'identity':>14} {'vmap':>16} {'loop':>16} {'vmap/id.':>9} {'loop/id.':>9}")
    rows = []
    for name in chosen.models:
        for n in chosen.sizes:
            repeats = {"identity": chosen.repeats, "vmap": 1, "loop": 1}
            row = {way: in_a_process(name, way, n, repeats[way]) for way in WAYS}
            for way in ("vmap", "loop"):
                if any(abs(a - b) > 1e-3 * abs(b) + 1 for a, b in
                       zip(row["identity"]["checks"], row[way]["checks"])):  # fmt: skip
                    raise AssertionError(f"{way} and the identity disagree: {row}")
            ratio = {way: row[way]["seconds"] / row["identity"]["seconds"] for way in ("vmap", "loop")}
            text = [f"{row[w]['seconds'] * 1e3:.0f} ms {row[w]['peak_mib']:.0f} MiB" for w in WAYS]
            print(f"{name:>4} {n:>5} {text[0]:>14} {text[1]:>16} {text[2]:>16} "
                  f"{ratio['vmap']:>8.1f}× {ratio['loop']:>8.1f}×", flush=True)  # fmt: skip
            rows.append({"model": name, "examples": n, **row, "ratio": ratio})
            if name == "mlp":
                ours, theirs = multiplications(n)
                rows[-1] |= {"multiplications": ours, "multiplications_of_gradients": theirs}
    ours, theirs = multiplications(1)
    print(f"\nThe MLP's products: {theirs / ours:.0f}× fewer multiplications by the identity.")
    if chosen.record:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"setting": about, "rows": rows}, indent=1, ensure_ascii=False)
        RECORD.write_text(text + "\n", encoding="utf-8")
        print(f"written: {RECORD}")


if __name__ == "__main__":
    main()
