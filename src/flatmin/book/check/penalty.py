"""Checks of assignment 3: flooding is a gradient penalty."""

from functools import lru_cache
from typing import Any

import torch
from torch.func import grad, hessian, jvp

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


def _smooth(trial, size=5):
    """A smooth loss of a vector, its gradient and its Hessian there."""
    A, B, c = trial.randn(size, size), trial.randn(size, size), trial.randn(size)

    def L(theta):
        return 0.5 * ((A @ torch.tanh(B @ theta / size**0.5) - c) ** 2).mean()

    theta = trial.randn(size)
    return L, theta, grad(L)(theta), hessian(L)(theta)


@question
def effective_objective(trial: Trial) -> None:
    """The rate and the penalty of a sequence of steps with any rates."""
    a, b, c = trial.number(0.3, 0.5), trial.number(0.05, 0.2), trial.number(0.05, 0.2)
    for part, rates in (
        ("one step down, one up", [a, -b]),
        ("one step up, one down", [-b, a]),
        ("two steps down", [a, b]),
        ("four steps", [a, -b, a, -c]),
    ):
        total, squares = sum(rates), sum(r * r for r in rates)
        pairs = 0.5 * (total**2 - squares)
        trial(
            part,
            {"rates": rates},
            want=(total, -pairs / (2 * total)),
            rivals={
                "The weight has the wrong sign: θ - A g + B Hg is a step of rate A on a penalty with "
                "the sign of -B.": (total, pairs / (2 * total)),
                "The gradient of ‖g‖² is 2 Hg (3.4); a factor 2 is off in the weight.": (
                    total,
                    -pairs / total,
                ),
                "The weight has to be divided by the rate: it is multiplied by it in the step.": (
                    total,
                    -pairs / 2,
                ),
                "A step was paired with itself: the sum is over j < k.": (
                    total,
                    -(pairs + squares) / (2 * total),
                ),
                "Every pair was counted twice: the sum is over j < k.": (total, -pairs / total),
                "The rates have signs, minus for a step up. They are all taken positive here.": (
                    sum(map(abs, rates)),
                    -0.5 * (sum(map(abs, rates)) ** 2 - squares) / (2 * sum(map(abs, rates))),
                ),
            },
            hint="Expand with (3.8), then read off L + weight · ‖g‖², descended with the rate.",
        )


@question
def remainder(trial: Trial) -> None:
    """What a step down and a step up leave after subtracting the penalty's step."""
    L, theta, g, H = _smooth(trial)
    for part, eps in (("a long step", 0.4), ("a short step", 0.05)):
        down = theta - eps * g
        up = down + eps * grad(L)(down)
        exact = up - (theta - eps**2 * H @ g)
        inputs = {"L": L, "theta": theta, "eps": eps}
        trial(
            part,
            inputs,
            want=exact,
            rtol=1e-4,
            atol=1e-10,
            rivals={
                "A factor 2 is off: the pair steps by -ε² Hg, which is -ε²/2 ∇‖g‖².": up
                - (theta - 0.5 * eps**2 * H @ g),
                "A factor 2 is off: ∇‖g‖² = 2Hg, and the rate of its step is ε²/2.": up
                - (theta - 2 * eps**2 * H @ g),
                "The penalty's step was added, not taken away.": up - (theta + eps**2 * H @ g),
                "The step up used the gradient of the old place: then the steps cancel, and nothing "
                "is left over.": eps**2 * H @ g,
                "This is what the two steps leave over (3.3), before the penalty's step is taken "
                "away.": up - theta,
            },
            hint="θ'' by (3.1) and (3.2), minus θ - ε² H g; Hg by jvp or by differentiating "
            "‖g‖²/2.",
        )


@question
def two_rate_loss(trial: Trial) -> None:
    """The objective that a step down and a smaller step up descend, and its gradient."""
    L, theta, g, H = _smooth(trial)
    e1, e2 = trial.number(0.4, 0.6), trial.number(0.1, 0.3)
    c = e1 * e2 / (2 * (e1 - e2))
    inputs = {"L": L, "theta": theta, "eps1": e1, "eps2": e2}
    trial(
        "the value",
        inputs,
        want=L(theta) + c * g @ g,
        rivals={
            "A factor 2 is missing in the weight (3.11): ∇‖g‖² = 2Hg.": L(theta) + 2 * c * g @ g,
            "The length is not squared.": L(theta) + c * g.norm(),
            "The penalty is subtracted.": L(theta) - c * g @ g,
            "The weight is that of equal rates, ε²/2, not divided by the rate ε₁ - ε₂.": L(theta)
            + e1 * e2 / 2 * g @ g,
        },
    )
    through = lambda answer: lambda L, theta, *e: grad(lambda t: answer(L, t, *e))(theta)
    want = g + 2 * c * H @ g
    trial(
        "its gradient by torch.func.grad",
        inputs,
        want=want,
        through=through,
        rivals={
            "The penalty has no gradient: was it detached, or made a number, on the way?": g,
        },
    )


@question
def difference_penalty(trial: Trial) -> None:
    """The penalized gradient from two gradients, without a Hessian."""
    L, theta, g, _ = _smooth(trial)
    lam, r, calls = trial.number(0.2, 0.5), 0.01, []

    def gradient(point):
        calls.append(point)
        return grad(L)(point)

    slope = grad(L)
    uphill, downhill = slope(theta + r * g), slope(theta - r * g)
    inputs = {"gradient": gradient, "theta": theta, "penalty": lam, "radius": r}
    trial(
        "a short radius",
        inputs,
        want=g + lam / r * (uphill - g),
        rivals={
            "The difference was multiplied by λ, but not divided by the radius.": g
            + lam * (uphill - g),
            "This looks downhill; (3.13) displaces to θ + r g.": g + lam / r * (g - downhill),
            "The second gradient is taken at θ + λ g; the displacement is r g.": g
            + lam / r * (slope(theta + lam * g) - g),
            "The displacement is r g, of length r ‖g‖; here it has length r (that is SAM's).": g
            + lam / r * (slope(theta + r * g / g.norm()) - g),
            "Only the penalty's gradient came back; the loss has one too.": lam / r * (uphill - g),
            "That is g + 2λ Hg: the penalty is λ/2 ‖g‖².": g + 2 * lam / r * (uphill - g),
        },
        rtol=1e-6,
    )
    count = len(calls)
    trial.require(count == 2, f"The gradient was computed {count} times; twice is enough.")
    calls.clear()
    trial("no penalty at all", {**inputs, "penalty": 0.0}, want=g)
    exact = jvp(slope, (theta,), (g,))[1]
    trial(
        "close to the exact form",
        {**inputs, "radius": 1e-5},
        want=g + lam * exact,
        rtol=1e-3,
        atol=1e-3,
    )


def _slope(network, params, x, y):
    loss = lambda params: torch.nn.functional.cross_entropy(network(params, x), y)
    return sum((part**2).sum() for part in grad(loss)(params).values())


@lru_cache
def _level_walk(seeds: tuple[int, ...]) -> dict[str, Any]:
    early, late = list(range(100, 200, 10)), list(range(510, 610, 10))
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=list(seeds),
        evaluate_at=early + late,
        instruments={"slope": _slope},
        dtype=torch.float64,
    )
    change = runs.sel(step=late).mean("step") - runs.sel(step=early).mean("step")
    return {"squared gradient": change.slope.values, "test error": change.test_error.values}


@question(seconds=120)
def level_walk(trial: Trial) -> None:
    """How a flooded walk along the level changes ‖g‖² and the test error."""
    trial.experiment(
        _level_walk,
        atol=5e-3,
        rivals={
            "The difference is the wrong way round: late minus early.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
