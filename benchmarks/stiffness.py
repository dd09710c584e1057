"""How much faster are Gram identities than per-example gradients?

    python benchmarks/stiffness.py [--sizes 500 1000 2000] [--record]

Cosine stiffness of all pairs of N examples, four ways:

- *identity*: ``flatmin.stiffness.stiffness``, which never forms a gradient of a linear layer;
- *vmap*: ``torch.func.vmap(grad)``, then one matrix product a parameter, as one writes it today;
- *chunks*: the same, 256 examples at a time;
- *loop*: one backward pass an example; the gradients are stacked and multiplied.

For three networks on 28×28 images: the stiffness paper's MLP 784-500-300-100-10; LeNet-5 (with ReLU
and max-pooling), a small CNN whose parameters are mostly in linear layers; and the paper's small
CNN of 16, 32 and 32 channels, whose parameters are nearly all in convolutions of large maps.

Every measurement is a process of its own: so the peak of its memory, above what the process held
before, is that method's.  Times are the smallest of several turns.  Beside them stands the *floor*:
the multiplications that the way needs at least (:func:`multiplications`), at the rate of a large
matrix product, measured in the same process.  Pooling, reading and writing come on top.

Where T positions of a convolution make T² (I + O) > IO, its gradients are formed: then symmetry saves
half of their product, nothing more, so that for the last network no ratio can exceed 2 by arithmetic.
The multiplications' ratio, in brackets, says what to expect.
"""

import argparse
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
ENOUGH = 20.0  # seconds, after which a way gets no other turn


def lenet(width: float = 1) -> nn.Module:
    """LeNet-5 of today, 61,706 parameters (LeCun et al. 1998, Proc. IEEE 86)."""
    a, b, c, d = (round(width * channels) for channels in (6, 16, 120, 84))
    convolutions = [nn.Conv2d(1, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Conv2d(a, b, 5), nn.ReLU(), nn.MaxPool2d(2)]  # fmt: skip
    return nn.Sequential(*convolutions, MLP(25 * b, c, d, 10))


MODELS = {
    "mlp": (lambda w: MLP(784, *(round(w * width) for width in (500, 300, 100)), 10), (784,)),
    "lenet": (lenet, (1, 28, 28)),
    "cnn": (lambda w: SmallCNN(1, 10, [round(w * c) for c in (16, 32, 32)]), (1, 28, 28)),
}
criterion = nn.CrossEntropyLoss(reduction="none")


def cosine(gram):
    norm = gram.diagonal().sqrt()
    return gram / norm / norm[:, None]


def identity(model, x, y):
    return stiffness(model, criterion, x, y).cosine


def by_vmap(model, x, y, chunk_size=None):
    params = {name: w.detach() for name, w in model.named_parameters()}
    loss = lambda params, x, y: criterion(functional_call(model, params, (x[None],)), y[None])[0]
    gradients = vmap(grad(loss), (None, 0, 0), chunk_size=chunk_size)(params, x, y)
    return cosine(sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values()))


def by_chunks(model, x, y):
    return by_vmap(model, x, y, chunk_size=256)


def by_loop(model, x, y):
    rows = []
    for one, label in zip(x.split(1), y.split(1)):
        gradient = torch.autograd.grad(criterion(model(one), label).sum(), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]))
    rows = torch.stack(rows)
    return cosine(rows @ rows.T)


WAYS = {"identity": identity, "vmap": by_vmap, "chunks": by_chunks, "loop": by_loop}


def multiplications(model, x) -> dict[str, tuple[int, int]]:
    """Of the identity, and of products of gradients: (for an example, for a pair of examples).

    A layer with T positions, I inputs, and O outputs at each takes TIO for its output, TIO for the
    δ before it (the first needs none), and TIO for a gradient, if that is formed.  A pair takes IO,
    or by the identity min(T² (I + O), IO), for half of the pairs, as the matrix is symmetric.
    """
    layers = []

    def note(module, _, output):
        outputs, inputs = len(module.weight), module.weight[0].numel()
        layers.append((output[0].numel() // outputs, inputs, outputs))

    known = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(note) for m in known]
    model(x[:1])
    for hook in hooks:
        hook.remove()
    through = [t * i * o for t, i, o in layers]
    formed = [t * t * (i + o) > i * o for t, i, o in layers]
    both = 2 * sum(through) - through[0]
    identity = both + sum(m for m, form in zip(through, formed) if form)
    pair = sum(min(t * t * (i + o), i * o) for t, i, o in layers)
    gradients = both + sum(through), sum(i * o for _, i, o in layers)
    return {"identity": (identity, pair / 2), "gradients": gradients}


def matmul_rate(size: int = 1024) -> float:
    """Multiplications a second of a large matrix product."""
    a, b, seconds = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return size**3 / min(seconds)


def measure(name: str, width: float, way: str, n: int, repeats: int) -> dict:
    """Seconds, their floor, and peak memory (MiB above the start) of one way, in this process."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(width), torch.randn(n, *shape), torch.randint(10, (n,))
    WAYS[way](model, x[:4], y[:4])  # warm up
    example, pair = multiplications(model, x)["identity" if way == "identity" else "gradients"]
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        result = WAYS[way](model, x, y)
        seconds.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    needed = n * example + n * n * pair
    return {
        "seconds": min(seconds),
        "multiplications": needed,
        "floor": needed / matmul_rate(),  # seconds; last, as it takes memory too
        "peak_mib": (after - before) / unit,
        "checks": [float(result.sum()), float(result.abs().sum())],
    }


def in_a_process(*what) -> dict:
    command = [sys.executable, __file__, "--one", *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def compare(name: str, width: float, n: int, repeats: int, ways) -> dict:
    """One row: each way, and how many times the identity's time and multiplications it takes."""
    row = {way: in_a_process(name, width, way, n, repeats) for way in ways}
    for way in ways[1:]:
        pairs = zip(row["identity"]["checks"], row[way]["checks"])
        if any(abs(a - b) > 1e-3 * abs(b) + 1 for a, b in pairs):
            raise AssertionError(f"{way} and the identity disagree: {row}")
    ours = row["identity"]
    ratio = {way: row[way]["seconds"] / ours["seconds"] for way in ways[1:]}
    floors = {way: row[way]["multiplications"] / ours["multiplications"] for way in ways[1:]}
    text = [f"{name:>5} {width:>5g} {n:>5}"]
    for way in WAYS:
        if way in row:
            s, floor, mib = (row[way][key] for key in ("seconds", "floor", "peak_mib"))
            text.append(f"{f'{1e3 * s:.0f} ({1e3 * floor:.0f}) ms {mib:.0f} MiB':>26}")
            if way in ratio:
                text.append(f"{f'{ratio[way]:.1f}× ({floors[way]:.1f}×)':>16}")
    print(*text, flush=True)
    return {"model": name, "width": width, "examples": n, **row, "ratio": ratio, "floors": floors}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000], help="numbers of examples")
    parser.add_argument("--widths", type=float, nargs="*", default=[0.5, 1, 2, 4],
                        help="of the hidden layers, 1 as published, at N = 1000")  # fmt: skip
    parser.add_argument("--grow", type=int, nargs="*", default=[250, 500, 1000, 2000, 4000, 8000],
                        help="the same, for the identity alone")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=5, help=f"turns of each way, or {ENOUGH:g} seconds")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} into results/")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        name, width, way, n, repeats = chosen.one
        print(json.dumps(measure(name, float(width), way, int(n), int(repeats))))
        return
    if min(*chosen.sizes, *chosen.grow, chosen.repeats) < 1 or min(chosen.widths, default=1) <= 0:
        parser.error("--sizes, --grow and --repeats must be at least 1, --widths positive")

    about = setting("cpu", repeats=chosen.repeats, system=platform.system())
    print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    for name in chosen.models:
        make, shape = MODELS[name]
        needed = multiplications(make(1), torch.zeros(1, *shape))
        terms = [f"{way} {a:.3g} N + {b:.3g} N²" for way, (a, b) in needed.items()]
        print(f"{name}: multiplications of the {', of '.join(terms)}")
    tables = {
        "ways": [(m, 1, n, list(WAYS)) for m in chosen.models for n in chosen.sizes],
        "examples": [(m, 1, n, ["identity"]) for m in chosen.models for n in chosen.grow],
        "width": [(m, w, 1000, ["identity"]) for m in chosen.models for w in chosen.widths],
    }
    rows = {}
    for about_what, settings in tables.items():
        ways = settings[0][3][1:] if settings else []
        others = "".join(f"{way:>27}{f'{way}/identity':>17}" for way in ways)
        print(f"\n{about_what}; in brackets the floor\n{'model':>5} {'width':>5} {'N':>5}{'identity':>27}{others}")
        rows[about_what] = [compare(m, w, n, chosen.repeats, ways) for m, w, n, ways in settings]
    if chosen.record:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"setting": about, **rows}, indent=1, ensure_ascii=False)
        RECORD.write_text(text + "\n", encoding="utf-8")
        print(f"written: {RECORD}")


if __name__ == "__main__":
    main()
