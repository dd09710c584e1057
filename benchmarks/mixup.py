"""What does mixup cost, on a batch and in training?

    python benchmarks/mixup.py [--device cuda] [--record]

*batch* mixes one batch of images and computes the loss of fixed logits on the result, with its
gradient, as a training step does before and after the network:

- *flatmin*: ``BatchTransform(Mixup())``, and cross-entropy on soft targets;
- *idiom*: what the papers' code has, λ x + (1-λ) x[π], and two losses;
- *timm*: its ``Mixup``, which works in place and mixes a batch with itself, read backwards; and
  cross-entropy on soft targets.  Only this module of timm is loaded, which needs no other package:
  ``pip install --no-deps timm`` is enough.  Skipped if it is not installed.

*examples* draws one λ per example, for which the idiom needs a column of λ.
*runs* compares the stack with mixup in the batch stage and a loop over runs with the idiom, and
both without mixup: in the set-up of ``benchmarks/stack.py``, per step and run.

The floor of a batch: to read and write it once.
"""

import importlib.util
from pathlib import Path

from common import Benchmark, gradient_multiplications, size  # isort: skip  (quiets progress bars)
import numpy as np
import torch
from stack import BATCH, LOOPED, SIZES, STEPS, make_data, plain_loss, time_loop, time_stack
from torch.nn.functional import cross_entropy

from flatmin import BatchTransform
from flatmin.batch import Mixup
from flatmin.book import MLP

ALPHA = 1.0
CLASSES = 10
BATCHES = (32, 128, 512, 2048)
RUNS = (1, 10, 100)


def flatmin(x, y, z, per_example=False, transform=None):
    transform = transform or BatchTransform(Mixup(ALPHA, per_example=per_example), CLASSES)

    def call():
        mixed, target = transform(x, y)
        return mixed, torch.autograd.grad(cross_entropy(z, target), z)

    return call


def idiom(x, y, z, per_example=False):
    def call():
        if per_example:
            lam = np.random.beta(ALPHA, ALPHA, len(x)).astype(np.float32)
            lam = torch.from_numpy(lam).to(x.device)
            column = lam.view(-1, *[1] * (x.ndim - 1))
        else:
            lam = column = np.random.beta(ALPHA, ALPHA)
        order = torch.randperm(len(x)).to(x.device)
        mixed = column * x + (1 - column) * x[order]
        reduction = "none" if per_example else "mean"
        own, others = (cross_entropy(z, labels, reduction=reduction) for labels in (y, y[order]))
        return mixed, torch.autograd.grad((lam * own + (1 - lam) * others).mean(), z)

    return call


def timm(x, y, z, per_example=False):
    mode = "elem" if per_example else "batch"
    own = x.clone()  # it works in place
    mixup = timm_mixup()(ALPHA, label_smoothing=0.0, num_classes=CLASSES, mode=mode)
    return flatmin(own, y, z, transform=mixup)


def timm_mixup():
    """The class of timm's file data/mixup.py, without the package around it."""
    origin = importlib.util.find_spec("timm").origin
    path = Path(origin).parent / "data" / "mixup.py"
    specification = importlib.util.spec_from_file_location("timm_mixup", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Mixup


def mixed_loss(module, x, y):
    """The idiom, as a loss for the loop over runs."""
    lam, order = np.random.beta(ALPHA, ALPHA), torch.randperm(len(x)).to(x.device)
    logits = module(lam * x + (1 - lam) * x[order])
    return lam * cross_entropy(logits, y) + (1 - lam) * cross_entropy(logits, y[order])


def batches(bench, per_example: bool, sizes) -> None:
    lam = "one λ per example" if per_example else "one λ"
    name = "examples" if per_example else "batch"
    title = f"A batch of 3×32×32, {lam}: mixed, with loss and gradient"
    part = bench.part(name, title, "flatmin")
    sides = {"flatmin": flatmin, "idiom": idiom, "timm": timm}
    if "timm" not in bench.setting:
        del sides["timm"]
    for n in sizes:
        torch.manual_seed(0)
        x, y = torch.randn(n, 3, 32, 32, device=bench.device), torch.randint(CLASSES, (n,))
        y, z = y.to(bench.device), torch.randn(n, CLASSES, device=bench.device, requires_grad=True)
        calls = {side: make(x, y, z, per_example) for side, make in sides.items()}
        row = bench.turns(calls, "flatmin")
        part.add({"examples": n}, row, bench.floor(bytes=2 * 4 * x.numel()))


def training(bench, runs: int, data, steps: int) -> tuple[dict, dict]:
    model, few, device = lambda: MLP(*SIZES), min(runs, LOOPED), bench.device
    stack = lambda **stages: time_stack(model, data, runs, steps, BATCH, device, **stages) / runs
    loop = lambda objective: time_loop(model, data, few, steps, BATCH, device, objective=objective)
    calls = {
        "stack": lambda: stack(batch=Mixup(ALPHA)),
        "stack without": stack,
        "lean loop": lambda: loop(mixed_loss) / few,
        "loop without": lambda: loop(plain_loss) / few,
    }
    row = bench.turns(calls, "stack", times=lambda function: function() / steps)
    floor = bench.floor(
        multiplications=BATCH * gradient_multiplications(model(), torch.zeros(1, SIZES[0])),
        bytes=8 * 4 * size(model()) + 2 * 4 * BATCH * SIZES[0],
        footprint=3 * 4 * size(model()) * runs,
    )
    return row, floor


def main(arguments=None) -> None:
    bench = Benchmark("mixup", __doc__, arguments, peers=["timm"])
    for per_example in (False, True):
        batches(bench, per_example, BATCHES[:1] if bench.quick else BATCHES)
    data, title = make_data().to(bench.device), "MLP 40-100-100-10, batch 100: per step and run"
    part = bench.part("runs", title, "stack")
    for runs in (2,) if bench.quick else RUNS:
        part.add({"runs": runs}, *training(bench, runs, data, 3 if bench.quick else STEPS))
    bench.finish()


if __name__ == "__main__":
    main()
