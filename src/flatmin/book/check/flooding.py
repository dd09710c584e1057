"""Checks of assignment 2: flooding."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import ERROR, LOSS, Trial, by_name, experiment, plain_number, question, train


@question
def fraction_up(trial: Trial) -> None:
    """The fraction of steps up of a walk on a bowl, with one rate down and another up."""
    a, b = trial.number(0.1, 0.3), trial.number(0.35, 0.6)
    walk = lambda down, up: -math.log(1 - down) / (math.log(1 + up) - math.log(1 - down))
    for part, down, up in (
        ("larger steps up", a, b),
        ("larger steps down", b, a),
        ("equal rates", a, a),
    ):
        one_rate = [walk(down, down), walk(up, up), walk((down + up) / 2, (down + up) / 2)]
        fall, rise = -math.log(1 - down), math.log(1 + up)
        short = "That is first order: it holds for short steps only."
        if up == down:
            short = "One half holds for short steps only: (1 - down) (1 + up) is less than 1."
        rivals = {
            short: [down / (down + up), 0.5],
            "That is (2.3), with one rate for both directions.": one_rate,
            "That is the fraction of steps down.": 1 - walk(down, up),
            "The two rates are exchanged.": walk(up, down),
            "The two rates are exchanged, and this is first order: it holds for short steps only.": (
                up / (down + up)
            ),
            "That is a ratio of steps up and steps down. What is their fraction of all steps?": [
                fall / rise,
                rise / fall,
            ],
            "A sign is wrong: log(1 - down) is negative.": [
                fall / (fall - rise),
                fall / (rise - fall),
                -walk(down, up),
            ],
        }
        hint = "A step down multiplies w by 1 - down, a step up by 1 + up. In the long run the "
        hint += "logarithm of |w| neither grows nor falls."
        inputs = {"down": down, "up": up}
        trial(part, inputs, walk(down, up), rivals, hint, through=plain_number)


def _slope(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a flooded loss; None if it is no tensor, or was worked out in NumPy."""

    def slope(losses: Tensor, *rest: Any) -> Tensor | None:
        try:
            value = answer(losses, *rest)
        except RuntimeError as error:
            if "numpy()" in str(error):
                return None
            raise
        if not isinstance(value, Tensor):
            return None
        if not value.requires_grad:
            return torch.zeros_like(losses)
        (found,) = torch.autograd.grad(value.sum(), losses, allow_unused=True)
        return torch.zeros_like(losses) if found is None else found

    return slope


@question
def flooded(trial: Trial) -> None:
    """The flooded loss of a batch, of its mean or example by example."""
    losses, b = trial.rand(6), trial.number(0.4, 0.6)
    losses[:3] = 0.1 * losses[:3]  # losses on both sides of the level
    losses[3:] += 0.7
    low = 0.5 * b * losses / losses.mean()
    fold = lambda loss: (loss - b).abs() + b
    for part, x, each in (
        ("the mean above the level", 3 * losses, False),
        ("the mean below the level", low, False),
        ("example by example", losses, True),
        ("the batch again", losses, False),
    ):
        by_mean, by_example = fold(x.mean()), fold(x).mean()
        want, other = (by_example, by_mean) if each else (by_mean, by_example)
        clamped = (x if each else x.mean()).clamp(min=b).mean()
        kind = "per example means fold, then average" if each else "the mean is taken, then folded"
        rivals = {
            f"The order of mean and fold is the other kind's. Here {kind}.": other,
            "That is the raw loss: below the level it has to be mirrored.": x.mean(),
            "That is a clamp: below the level it is constant, so nothing climbs.": clamped,
            "Below the level the loss is mirrored at the level, not at 0: 2b - L, not -L.": (
                torch.where(x > b, x, -x).mean() if each else -x.mean()
            ),
            "The + b is missing: above the level the flooded loss is the loss.": want - b,
            "b is subtracted after the fold; it has to be added.": want - 2 * b,
            "The fold is the wrong way round: above the level the flooded loss is the loss, below "
            "it the mirror image 2b - L.": 2 * b - want,
            "The losses' sum was taken, not their mean.": [fold(x).sum(), fold(x.sum())],
            "One number was wanted, the mean over the examples.": fold(x),
        }
        inputs = {"losses": x, "flood_level": b, "per_example": each}
        hint = "The fold of a loss L is |L - b| + b."
        trial(part, inputs, want, rivals, hint, through=plain_number)
    for part, x, each in (
        ("its gradient, the mean below the level", low, False),
        ("its gradient, example by example", losses, True),
    ):
        inputs = {"losses": x.clone().requires_grad_(), "flood_level": b, "per_example": each}
        got, raw = trial.call(part, inputs, through=_slope), torch.ones_like(x) / len(x)
        sign = (x if each else x.mean()).sub(b).sign()
        rivals = {
            "The value is right, but it has no gradient, so nothing can be trained with it: was "
            "it detached, or made a number, on the way?": 0 * raw,
            "The value is right, but below the level its gradient does not turn around.": raw,
        }
        if got is not None:
            trial.compare(got, sign * raw, rivals, "The value is right, its gradient is not.")


@question
def accumulate(trial: Trial) -> None:
    """The gradient of the flooded mean loss of a batch that comes in microbatches."""
    x, y = trial.randn(12, 4), trial.integers(3, 12)
    loss = nn.functional.cross_entropy
    given_twice = "An example went through the model more than once. The sign is known only at "
    given_twice += "the end, but it can be applied to the gradient as well."
    all_kept = "The microbatches' graphs are all kept until the end, and take as much memory as "
    all_kept += "the whole batch. Call backward for each microbatch before the next one comes."
    flat = lambda parts: torch.cat([p.flatten() for p in parts])
    for part, sizes, sign, turned in (
        (
            "one microbatch, above the level",
            [12],
            1,
            "The sign is turned around: below the level the gradient climbs, above it descends.",
        ),
        (
            "three of one size, above the level",
            [4, 4, 4],
            1,
            "The gradient was turned around, but the mean over the whole batch is above the level. "
            "This mean decides, not the loss of one microbatch or a share of it.",
        ),
        (
            "three of one size, below the level",
            [4, 4, 4],
            -1,
            "The sign of the flood is lost: where the mean over the whole batch is below the level, "
            "the gradient turns around.",
        ),
        (
            "unequal sizes, below the level",
            [7, 4, 1],
            -1,
            "The gradient is right, but not its sign, which the mean over all examples decides. In "
            "the mean of the microbatches' losses a small one has too much weight.",
        ),
    ):
        model = trial.filled(lambda: nn.Linear(4, 3))
        weights = list(model.parameters())
        # the first microbatch, or the last, is on the other side of the level than the batch
        order = loss(model(x), y, reduction="none").argsort(descending=sizes != [7, 4, 1])
        x, y = x[order], y[order]
        parts = list(zip(x.split(sizes), y.split(sizes)))
        single = torch.stack([loss(model(a), c) for a, c in parts])
        mean, share = loss(model(x), y), torch.tensor(sizes, dtype=torch.float64) / 12
        b = ((1 - 0.03 * sign) * mean).item()
        if sizes == [7, 4, 1]:  # between the examples' mean and the microbatches' mean
            b = (0.5 * (mean + single.mean())).item()
        gradient = lambda value: flat(torch.autograd.grad(value, weights, retain_graph=True))
        g, total = gradient(mean), gradient(single.sum())
        folded, seen = (single - b).abs(), (share * single).cumsum(0)
        running = [
            gradient(((s - b).sign() * share * single).sum())
            for s in (seen, seen / share.cumsum(0))
        ]

        stale = [trial.randn(*w.shape) for w in weights]
        for w, old in zip(weights, stale):
            w.grad = old.clone()
        before = [w.detach().clone() for w in weights]
        batch_sizes: list[int] = []
        kept_before: list[int] = []  # how many passes' inputs are still there, at each pass
        passed: list[weakref.ref[Tensor]] = []

        def watch(_, args):
            batch_sizes.append(args[0].numel() // 4)
            kept_before.append(sum(ref() is not None for ref in passed))
            copy = args[0].clone()  # in nobody's hands but the graph's
            passed.append(weakref.ref(copy))
            return (copy, *args[1:])

        model.register_forward_pre_hook(watch)
        inputs = {"model": model, "loss": loss, "microbatches": parts, "flood_level": b}
        shown = f"microbatches of {sizes} examples, flood_level = {b:.4f}, "
        shown += f"the batch's mean loss = {mean:.4f}"
        trial.call(part, inputs, changes=("model", "loss"), shown=shown)
        trial.require(
            all(torch.equal(w, v) for w, v in zip(weights, before)),
            "The weights themselves have changed; only their .grad should.",
        )
        trial.require(
            all(w.grad is not None for w in weights),
            "No .grad is there: was backward called, or .grad emptied at the end?",
        )
        trial.require(
            max(batch_sizes, default=0) <= max(sizes),
            "The microbatches were put together into one batch, which does not fit into memory.",
        )
        trial.require(sum(batch_sizes) <= sum(sizes), given_twice)
        # the one before may still be there: its variable lives until it is assigned again
        trial.require(max(kept_before, default=0) <= 1, all_kept)
        kept = [sign * g + flat(stale), sign * (g + flat(stale))]
        equal = total / len(parts)
        rivals = {
            turned: -sign * g,
            "The sign was decided before all microbatches had been seen. Accumulate the gradient of "
            "the raw loss, and turn it around at the end.": running,
            "Every microbatch was flooded by itself. One sign for all of them, decided by the mean "
            "of the whole batch, is what is wanted.": [
                gradient((share * folded).sum()),
                gradient(folded.mean()),
                gradient(folded.sum()),
                gradient((share * single - b).abs().sum()),
            ],
            "The gradients that were in .grad before are still in the sum.": kept,
            "In .grad there is what was there before, and nothing else.": flat(stale),
            "Only the last microbatch's gradient is left: was .grad emptied in the loop?": [
                sign * share[-1] * gradient(single[-1]),
                sign * gradient(single[-1]),
            ],
            "Below the level the gradient does not vanish, it turns around.": 0 * g,
            "All microbatches weigh the same here, but they differ in size.": (
                [equal, -equal] if len(set(sizes)) > 1 else []
            ),
            "This is the gradient of the sum of the microbatches' losses, not of the batch's "
            "mean.": [sign * total, -sign * total],
            "This is the gradient of the sum over the examples, not of their mean.": [
                sign * 12 * g,
                -sign * 12 * g,
            ],
        }
        hint = "Each microbatch counts by its share of the examples. One sign holds for all."
        trial.compare(flat([w.grad for w in weights]), sign * g, rivals, hint, atol=1e-6)


@question
def flooded_step(trial: Trial) -> None:
    """A step of gradient descent with flooding and with weight decay."""
    w, g = trial.randn(3), trial.randn(3)
    w /= w.norm().clamp(max=1)  # so long that loss + λ/2 ‖w‖² is above the level
    b, lr, decay = trial.number(0.2, 0.4), 0.1, 0.5
    for part, loss, sign in (("above the level", b + 0.5, 1), ("below the level", b / 2, -1)):
        inputs = {"w": w, "gradient": g, "loss": loss, "flood_level": b, "lr": lr}
        step = lambda gradient, pull: w - lr * (gradient + pull * w)
        rivals = {
            "The weight decay was turned around together with the loss: below the level the "
            "weights grow. It is not flooded.": step(sign * g, sign * decay),
            "The step goes down although the loss is below the level. The raw loss is compared with "
            "the level, without the weight decay's term.": step(g, decay),
            "This climbs above the level and descends below it.": step(-sign * g, decay),
            "The sign of the whole step is turned around.": step(-sign * g, -decay),
            f"The weight decay is missing{' below the level' * (sign < 0)}.": step(sign * g, 0),
            "The weight decay has the wrong sign: the weights grow.": step(sign * g, -decay),
            "The weight decay acts twice, as 2λw.": step(sign * g, 2 * decay),
            "The weight decay is not multiplied by the learning rate.": step(sign * g, decay / lr),
            "The weight decay was multiplied by the learning rate twice.": (
                step(sign * g, lr * decay)
            ),
            "The weight decay acts on the weights before the step, not after it.": (
                (1 - lr * decay) * step(sign * g, 0)
            ),
            "Below the level the gradient does not vanish, it turns around.": [step(0, decay), w],
            "This is the change of the weights; the new weights are wanted.": [
                step(sign * g, decay) - w,
                w - step(sign * g, decay),
                sign * g + decay * w,
            ],
        }
        inputs["weight_decay"] = decay
        # a difference of single-precision numbers of size 1 is off by some 1e-7
        hint = "The step is lr times a sum: the gradient, with its sign, and λw."
        trial(part, inputs, step(sign * g, decay), rivals, hint, atol=1e-6)


@experiment("flooded minus not flooded", test_loss=LOSS, test_error=ERROR)
def flooding_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    """How flooding changes the test loss and the test error."""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    end = train(seeds, data, recipe, 400, grid={"flood_level": [0.0, 0.3]}).isel(step=0)
    return by_name(end.sel(flood_level=0.3) - end.sel(flood_level=0.0))
