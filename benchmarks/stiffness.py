"""How much faster are Gram identities than per-example gradients?

    python benchmarks/stiffness.py [--device cuda] [--record]

Cosine stiffness of all pairs of N examples, four ways:

- *identity*: ``flatmin.stiffness``, which never forms the gradient of a linear layer that meets each
  example once, as one vector, and forms the others by ``vmap(grad)``;
- *vmap*: ``torch.func.vmap(grad)``, then one matrix product per parameter, the usual way today;
- *chunks*: the same, 256 examples at a time;
- *loop*: one backward pass per example; the gradients are stacked and multiplied.

For three networks on 28×28 images: the stiffness paper's MLP 784-500-300-100-10; LeNet-5 (with ReLU
and max-pooling), a small CNN whose parameters are mostly in linear layers; and the paper's small
CNN of 16, 32 and 32 channels, whose parameters are nearly all in convolutions of large maps.

*examples* varies N, beyond some N for the identity alone, as the other ways take too long;
*parameters* varies the width of the hidden layers (1 as published) for the identity.  For the
largest N of all ways, the peak memory of each above its start is recorded: on a CPU, by one call in
a process of its own.

The floor counts the least multiplications of the identity (:func:`multiplications`), and "by
arithmetic" is the ratio of another way's multiplications to it.  Pooling, reads and writes come on
top.  The gradients of convolutions are formed: there, symmetry saves half of the product and nothing
else, so that for the last network no ratio by arithmetic can exceed 2.
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

from common import Benchmark, layers, size  # isort: skip  (quiets progress bars)
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from flatmin import stiffness
from flatmin.book import MLP, SmallCNN
from flatmin.measure import on

CASES = {  # network: (N for all ways, N for the identity alone)
    "mlp": ((125, 250, 500), (1000, 2000, 4000)),
    "lenet": ((125, 250, 500), (1000, 2000, 4000)),
    "cnn": ((125, 250, 500), (1000, 2000)),
}
SCALES = (0.5, 1, 2)


def lenet(scale: float = 1) -> nn.Module:
    """LeNet-5 in its modern form, 61,706 parameters (LeCun et al. 1998, Proc. IEEE 86)."""
    a, b, c, d = (round(scale * channels) for channels in (6, 16, 120, 84))
    convolutions = [
        nn.Conv2d(1, a, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(a, b, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(*convolutions, MLP(25 * b, c, d, 10))


MODELS = {
    "mlp": (lambda s: MLP(784, *(round(s * width) for width in (500, 300, 100)), 10), (784,)),
    "lenet": (lenet, (1, 28, 28)),
    "cnn": (lambda s: SmallCNN(1, 10, [round(s * c) for c in (16, 32, 32)]), (1, 28, 28)),
}
criterion = nn.CrossEntropyLoss(reduction="none")


def cosine(gram):
    norm = gram.diagonal().sqrt()
    return gram / norm / norm[:, None]


def identity(model, x, y):
    return on(model, stiffness, x, y, criterion=criterion).cosine


def by_vmap(model, x, y, chunk_size=None):
    params = {name: w.detach() for name, w in model.named_parameters()}
    loss = lambda params, x, y: criterion(functional_call(model, params, (x[None],)), y[None])[0]
    gradients = vmap(grad(loss), (None, 0, 0), chunk_size=chunk_size)(params, x, y)
    return cosine(sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values()))


def by_chunks(model, x, y):
    return by_vmap(model, x, y, chunk_size=256)


def by_loop(model, x, y):
    rows = []
    for example, label in zip(x.split(1), y.split(1), strict=True):
        gradient = torch.autograd.grad(
            criterion(model(example), label).sum(), list(model.parameters())
        )
        rows.append(torch.cat([g.flatten() for g in gradient]))
    rows = torch.stack(rows)
    return cosine(rows @ rows.T)


WAYS = {"identity": identity, "vmap": by_vmap, "chunks": by_chunks, "loop": by_loop}


def multiplications(model, x, n: int) -> dict[str, float]:
    """Multiplications of the identity, and of products of gradients, for n examples.

    A layer with T positions, each with I inputs and O outputs, takes TIO for its output, TIO for
    the δ before it (the first needs none), and TIO for a gradient, if that is formed.  A pair takes
    IO; by the identity, which needs T = 1, I + O.  Half of the pairs are enough, as the matrix is
    symmetric.
    """
    shapes = layers(model, x)
    through = [t * i * o for t, i, o in shapes]
    both = 2 * sum(through) - through[0]
    identity = both + sum(t * i * o for t, i, o in shapes if t > 1)
    pair = sum(i + o if t == 1 else i * o for t, i, o in shapes)
    return {
        "identity": n * identity + n * n * pair / 2,
        "gradients": n * (both + sum(through)) + n * n * sum(i * o for _, i, o in shapes),
    }


def problem(name: str, scale: float, n: int, device: str):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x, y = make(scale), torch.randn(n, *shape), torch.randint(10, (n,))
    return model.to(device), x.to(device), y.to(device)


def compare(bench, name: str, scale: float, n: int, ways) -> tuple[dict, dict, dict]:
    """A row; raises an error if the ways disagree."""
    model, x, y = problem(name, scale, n, bench.device)
    results, sides = {}, {}
    for way in ways:

        def call(way=way):
            results[way] = WAYS[way](model, x, y)

        sides[way] = call
    row = bench.turns(sides, "identity")
    for way in ways[1:]:
        torch.testing.assert_close(results[way], results["identity"], rtol=1e-3, atol=1e-4)
    needs = multiplications(model, x, n)
    for way in ways[1:]:
        row["sides"][way]["expected"] = needs["gradients"] / needs["identity"]
    case = {"network": name, "N": n}
    return case, row, bench.floor(multiplications=needs["identity"])


def peak(way: str, name: str, n: int, device: str) -> float:
    """Peak MiB of a way above the start, in a process that has not run it before."""
    model, x, y = problem(name, 1, n, device)
    WAYS[way](model, x[:4], y[:4])  # load kernels and libraries
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        WAYS[way](model, x, y)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = most_memory()
    WAYS[way](model, x, y)
    return most_memory() - before


def most_memory() -> float:
    """The peak memory of this process so far, in MiB."""
    with contextlib.suppress(OSError):  # on Linux ru_maxrss starts with the parent's
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10
    import resource  # not on Windows

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def memory(way: str, name: str, n: int, device: str) -> float:
    if device == "cuda":
        return peak(way, name, n, device)
    command = [sys.executable, __file__, "--peak", way, name, str(n), device]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def main(arguments=None) -> None:
    bench = Benchmark("stiffness", __doc__, arguments)
    cases = {"lenet": ((20,), (40,))} if bench.quick else CASES
    scales = (0.5,) if bench.quick else SCALES
    part = bench.part("examples", "All pairs of N examples", "identity")
    for name, (for_all, for_identity) in cases.items():
        for n in for_all + for_identity:
            ways = list(WAYS) if n in for_all else ["identity"]
            case, row, floor = compare(bench, name, 1, n, ways)
            if n == for_all[-1]:
                for way, side in list(row["sides"].items())[: 1 if bench.quick else None]:
                    side["peak_mib"] = memory(way, name, n, bench.device)
            part.add(case, row, floor)
    part = bench.part("parameters", "The identity, 500 examples, hidden layers scaled", "identity")
    for name, scale in ((name, scale) for name in cases for scale in scales):
        case, row, floor = compare(bench, name, scale, 20 if bench.quick else 500, ["identity"])
        case = {"network": name, "width": scale, "parameters": size(MODELS[name][0](scale))}
        part.add(case, row, floor)
    bench.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        way, name, n, device = sys.argv[2:]
        print(json.dumps(peak(way, name, int(n), device)))
    else:
        main()
