"""Checks of assignment 2: flooding."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


@question
def fraction_up(trial: Trial) -> None:
    """The fraction of steps up of a walk on a bowl, with one rate down and another up."""
    a, b = trial.number(0.1, 0.3), trial.number(0.35, 0.6)
    walk = lambda down, up: -math.log(1 - down) / (math.log(1 + up) - math.log(1 - down))
    for part, down, up in (
        ("equal rates", a, a),
        ("larger steps up", a, b),
        ("larger steps down", b, a),
    ):
        trial(
            part,
            {"down": down, "up": up},
            want=walk(down, up),
            rivals={
                "That is first order: it holds for short steps only.": down / (down + up),
                "That is (2.3), with one rate for both directions.": [
                    walk(down, down),
                    walk(up, up),
                ],
                "That is the fraction of steps down.": 1 - walk(down, up),
                "The two rates are exchanged.": walk(up, down),
            },
            hint="A step down multiplies w by 1 - down, a step up by 1 + up. In the long run the "
            "logarithm of |w| neither grows nor falls.",
        )


@question
def flooded(trial: Trial) -> None:
    """The flooded loss of a batch, of its mean or example by example."""
    losses, b = trial.rand(6), trial.number(0.4, 0.6)
    losses[:3] = 0.1 * losses[:3]  # losses on both sides of the level
    losses[3:] += 0.7
    by_mean = (losses.mean() - b).abs() + b
    by_example = ((losses - b).abs() + b).mean()
    low = 0.5 * b * losses / losses.mean()
    for part, x, each, want, other in (
        ("the mean above the level", 3 * losses, False, (3 * losses).mean(), None),
        ("the mean below the level", low, False, 2 * b - low.mean(), None),
        ("example by example", losses, True, by_example, by_mean),
        ("the batch again", losses, False, by_mean, by_example),
    ):
        flat = x if each else x.mean()
        inputs = {"losses": x, "flood_level": b, "per_example": each}
        trial(
            part,
            inputs,
            want=want,
            rivals={
                "The order of mean and fold is the other kind's: per example means fold, then average.": []
                if other is None
                else other,
                "That is the raw loss: below the level it has to be mirrored.": x.mean(),
                "That is a clamp: below the level it is constant, so nothing climbs.": flat.clamp(
                    min=b
                ).mean(),
                "The + b is missing: above the level the flooded loss is the loss.": (flat - b)
                .abs()
                .mean(),
                "One number was wanted, the mean over the examples.": (x - b).abs() + b,
            },
        )


@question
def accumulate(trial: Trial) -> None:
    """The gradient of the flooded mean loss of a batch that comes in microbatches."""
    x, y = trial.randn(12, 4), trial.integers(3, 12)
    loss = nn.functional.cross_entropy
    flat = lambda parts: torch.cat([p.flatten() for p in parts])
    times = lambda s, parts: s * flat(parts)
    for part, sizes, below in (
        ("one microbatch, above the level", [12], False),
        ("three of one size, above the level", [4, 4, 4], False),
        ("three of one size, below the level", [4, 4, 4], True),
        ("unequal sizes, below the level", [7, 4, 1], True),
    ):
        model = trial.filled(lambda: nn.Linear(4, 3))
        parts = list(zip(x.split(sizes), y.split(sizes)))
        weights = list(model.parameters())
        gradient = lambda value, weights=weights: torch.autograd.grad(value, weights)
        single = torch.stack([loss(model(a), c) for a, c in parts]).detach()
        mean = loss(model(x), y).item()
        # a level with microbatches on both sides, if there are several
        b = mean + (1 if below else -1) * 0.3 * max(float((single - mean).abs().max()), 0.1)
        sign = -1 if below else 1
        g = gradient(loss(model(x), y))
        each = gradient(sum(len(c) * ((loss(model(a), c) - b).abs() + b) for a, c in parts) / 12)
        unweighted = gradient(sum(loss(model(a), c) for a, c in parts) / len(parts))
        total = gradient(sum(loss(model(a), c) for a, c in parts))
        stale = [trial.randn(*w.shape) for w in weights]
        for w, old in zip(weights, stale):
            w.grad = old.clone()
        batch_sizes: list[int] = []
        before = [w.detach().clone() for w in weights]

        def counted(z, target, batch_sizes=batch_sizes):
            batch_sizes.append(len(target))
            return loss(z, target)

        inputs = {"model": model, "loss": counted, "microbatches": parts, "flood_level": b}
        trial.call(part, inputs, changes=("model", "loss"))
        shown = f"microbatches of {sizes} examples, flood_level = {b:.4f}, "
        shown += f"the batch's mean loss = {mean:.4f}"
        trial.require(
            all(torch.equal(w, v) for w, v in zip(weights, before)),
            "The weights themselves have changed; only their .grad should.",
            input=shown,
        )
        trial.require(
            all(w.grad is not None for w in weights),
            "No .grad is there: was backward called?",
            input=shown,
        )
        trial.require(
            max(batch_sizes, default=0) <= max(sizes),
            "The microbatches were put together into "
            "one batch, which is what does not fit into memory.",
            input=shown,
        )
        trial.compare(
            flat([w.grad for w in weights]),
            times(sign, g),
            rivals={
                "Every microbatch was flooded by itself. One sign for all of them, decided by the mean "
                "of the whole batch, is what is wanted.": flat(each),
                "The sign of the flood is lost: below the level the gradient turns around.": times(
                    1, g
                ),
                "The gradients that were in .grad before are still in the sum.": [
                    times(sign, g) + flat(stale),
                    sign * (flat(g) + flat(stale)),
                ],
                "All microbatches weigh the same here, but they differ in size.": [
                    times(1, unweighted),
                    times(-1, unweighted),
                ],
                "This is the gradient of the sum of the microbatches' losses, not of the batch's mean.": times(
                    sign, total
                ),
            },
            input=shown,
        )


@question
def flooded_step(trial: Trial) -> None:
    """A step of gradient descent with flooding and with weight decay."""
    w, g = trial.randn(3), trial.randn(3)
    b, lr, decay = trial.number(0.2, 0.4), 0.1, 0.5
    for part, loss, sign in (("above the level", b + 0.5, 1), ("below the level", b / 2, -1)):
        inputs = {
            "w": w,
            "gradient": g,
            "loss": loss,
            "flood_level": b,
            "lr": lr,
            "weight_decay": decay,
        }
        trial(
            part,
            inputs,
            want=w - lr * (sign * g + decay * w),
            rivals={
                "The weight decay was turned around together with the loss: below the level the "
                "weights grow. It is not flooded.": w - lr * sign * (g + decay * w),
                "The step goes down although the loss is below the level.": w
                - lr * (g + decay * w),
                "This climbs above the level and descends below it.": w
                - lr * (-sign * g + decay * w),
                "The weight decay is missing.": w - lr * sign * g,
            },
        )


@lru_cache
def _flooding_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    end = fit(
        lambda: MLP(40, 32, 10),
        data,
        recipe,
        steps=400,
        seeds=list(seeds),
        grid={"flood_level": [0.0, 0.3]},
        evaluate_at=[400],
        dtype=torch.float64,
    )
    change = (end.sel(flood_level=0.3) - end.sel(flood_level=0.0)).isel(step=0)
    return {"test loss": change.test_loss.values, "test error": change.test_error.values}


@question(seconds=120)
def flooding_effect(trial: Trial) -> None:
    """How flooding changes the test loss and the test error."""
    trial.experiment(
        _flooding_effect,
        atol=0.01,
        rivals={
            "The difference is the wrong way round: flooded minus not flooded.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
