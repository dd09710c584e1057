"""What several test files share: problems, an unusual operation, SAM's formula, two processes."""

import contextlib
import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

from flatmin.batch import Dirac, Gaussian, LabelSmoothing, Mixup
from flatmin.book import MLP
from flatmin.pipeline import Objective


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(make=lambda: MLP(5, 8, 3), shape=(5,), n=23, seed=0):
    """A model in float64, n inputs, and their classes (three)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        for buffer in model.buffers():
            if buffer.is_floating_point():  # running statistics that are not 0 and 1
                buffer.uniform_(0.5, 1.5)
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return model, random(n, *shape, seed=seed), y


def rescaled(model):
    """The same function: one layer of an MLP × 20, the next ÷ 20 (Dinh et al., 2017)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other[1].weight, other[1].bias):
            tensor *= 20
        other[3].weight /= 20
    return other


class Cube(torch.autograd.Function):
    """An operation in the old style, which torch.func refuses; twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


INF = math.inf
NORMS = [1, 1.1, 1.5, 2, 3, 10, INF]


def flatten(tensors):
    return torch.cat(
        [t.flatten() for t in (tensors.values() if isinstance(tensors, dict) else tensors)]
    )


def norm(v, p):
    """‖v‖_p by its definition, after scaling the numbers to at most 1."""
    largest = v.abs().max()
    if largest == 0 or p == INF:
        return largest
    return largest * (v / largest).abs().pow(p).sum() ** (1 / p)


def dual(p):
    return INF if p == 1 else 1.0 if p == INF else p / (p - 1)


def climb(g, rho, p, t=1.0):
    """ε̂ from its formula, for flat vectors."""
    s, q = t * g, dual(p)
    if p == 1:
        raw = s.sign() * (s.abs() == s.abs().max())
    else:
        raw = s.sign() * s.abs() ** (q - 1)
    return rho * t * raw / norm(raw, p)


def batch_objective(net, x, y, buffers=None, loss=lambda losses, rows: losses.mean()):
    """An objective like the stack's: with the raw loss, the batch's size, and rows."""

    def evaluate(params, buffers, rows, raw):
        buffers = {name: b.clone() for name, b in buffers.items()}
        logits = functional_call(net, (params, buffers), (x[rows],))
        each = nn.functional.cross_entropy(logits, y[rows], reduction="none")
        return each.mean() if raw else loss(each, None), buffers

    return Objective(evaluate, len(x), buffers or {})


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def in_two_processes(script, folder):
    """Run ``python SCRIPT FOLDER RANK`` for both ranks; they meet over gloo."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of PyTorch has no gloo")
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(script), str(folder), str(rank)]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
            with log.open("w", encoding="utf-8") as file:
                processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                )
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=600)  # stops only what hangs
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = "\n".join(log.read_text(encoding="utf-8", errors="replace")[-2000:] for log in logs)
    assert [process.returncode for process in processes] == [0, 0], printed


MIXUPS = [
    Mixup(0.4),
    Mixup(1.0, per_example=True),
    Mixup(0.3, k=3),
    Mixup(1.0, k=4, per_example=True),
    Mixup(1.0, partners="same"),
    Mixup(1.0, partners="different", k=3),
    Mixup(0.5, second_stream=True),
    Mixup(0.5, partners="same", second_stream=True, per_example=True),
]
TRANSFORMS = [Dirac(), Gaussian(0.3), LabelSmoothing(0.2), *MIXUPS]


def labelled_batch(n=6, shape=(7,), classes=4, seed=0, dtype=torch.float32):
    """Inputs and labels, for what transforms a batch."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator).to(dtype)
    return x, torch.randint(classes, (n,), generator=generator)
