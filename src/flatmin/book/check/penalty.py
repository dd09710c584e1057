"""Checks of assignment 3: flooding is a gradient penalty."""

from typing import Any

import torch
from torch.func import grad, hessian, jvp

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, differentiated, experiment, question, train


def _smooth(trial, size=5):
    """A smooth loss of a vector, its gradient and its Hessian there."""
    A, B, c = trial.randn(size, size), trial.randn(size, size), trial.randn(size)

    def L(theta):
        return 0.5 * ((A @ torch.tanh(B @ theta / size**0.5) - c) ** 2).mean()

    theta = trial.randn(size)
    # of the kind that torch.autograd needs; torch.func takes any
    return L, theta.clone().requires_grad_(), grad(L)(theta), hessian(L)(theta)


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
        total, squares, lengths = sum(rates), sum(r * r for r in rates), sum(map(abs, rates))
        pairs = 0.5 * (total**2 - squares)
        weight = -pairs / (2 * total)
        undivided, itself = (total, -pairs / 2), (total, -(pairs + squares) / (2 * total))
        unsigned = lengths, -0.5 * (lengths**2 - squares) / (2 * lengths)
        rivals = {
            "The weight has the wrong sign: θ - A g + B Hg is a step of rate A on a penalty with "
            "the sign of -B.": (total, -weight),
            "The gradient of ‖g‖² is 2 Hg (3.4), or a pair was counted twice (the sum is over "
            "j < k): a factor 2 is off in the weight.": (total, 2 * weight),
            "The weight has to be divided by the rate: it is multiplied by it in the step.": undivided,
            "A step was paired with itself: the sum is over j < k.": itself,
            "The rates have signs, minus for a step up. They are all taken positive here.": unsigned,
        }
        hint = "Expand with (3.8), then read off L + weight · ‖g‖², descended with the rate."
        trial(part, {"rates": rates}, (total, weight), rivals, hint)


@question
def remainder(trial: Trial) -> None:
    """What a step down and a step up leave after subtracting the penalty's step."""
    L, theta, g, H = _smooth(trial)
    for part, eps in (("a long step", 0.4), ("a short step", 0.05)):
        down = theta - eps * g
        up = down + eps * grad(L)(down)
        left = lambda factor: up - (theta - factor * eps**2 * H @ g)
        rivals = {
            "A factor 2 is off: the pair steps by -ε² Hg, which is -ε²/2 ∇‖g‖².": left(0.5),
            "A factor 2 is off: ∇‖g‖² = 2Hg, and the rate of its step is ε²/2.": left(2),
            "The penalty's step was added, not taken away.": left(-1),
            "The step up used the gradient of the old place: then the steps cancel, and nothing "
            "is left over.": eps**2 * H @ g,
            "This is what the two steps leave over (3.3), before the penalty's step is taken "
            "away.": left(0),
        }
        hint = "θ'' by (3.1) and (3.2), minus θ - ε² H g; Hg by jvp or by differentiating ‖g‖²/2."
        inputs = {"L": L, "theta": theta, "eps": eps}
        trial(part, inputs, left(1), rivals, hint, rtol=1e-4, atol=1e-10)


@question
def two_rate_loss(trial: Trial) -> None:
    """The objective that a step down and a smaller step up descend, and its gradient."""
    L, theta, g, H = _smooth(trial)
    e1, e2 = trial.number(0.4, 0.6), trial.number(0.1, 0.3)
    c, square = e1 * e2 / (2 * (e1 - e2)), g @ g
    inputs = {"L": L, "theta": theta, "eps1": e1, "eps2": e2}
    rivals = {
        "A factor 2 is missing in the weight (3.11): ∇‖g‖² = 2Hg.": L(theta) + 2 * c * square,
        "The length is not squared.": L(theta) + c * g.norm(),
        "The penalty is subtracted.": L(theta) - c * square,
        "The weight is not divided by the rate ε₁ - ε₂.": L(theta) + e1 * e2 / 2 * square,
    }
    trial("the value", inputs, L(theta) + c * square, rivals)
    rivals = {
        "The penalty has no gradient: was it detached, or made a number, on the way?": g,
        "Nothing here can be differentiated: was the loss detached, or made a number?": 0 * g,
    }
    through = lambda answer: (
        lambda *given: differentiated(answer, "theta")(**dict(zip(inputs, given)))
    )
    trial("its gradient", inputs, g + 2 * c * H @ g, rivals, through=through)


@question
def difference_penalty(trial: Trial) -> None:
    """The penalized gradient from two gradients, without a Hessian."""
    L, theta, g, _ = _smooth(trial)
    lam, r, calls, slope = trial.number(0.2, 0.5), 0.01, [], grad(L)

    def gradient(point):
        calls.append(point)
        return slope(point)

    at = lambda length: g + lam / r * (slope(theta + length * g) - g)
    want = at(r)
    rivals = {
        "The difference was multiplied by λ, but not divided by the radius.": g + r * (want - g),
        "This looks downhill; (3.13) displaces to θ + r g.": 2 * g - at(-r),
        "The second gradient is taken at θ + λ g; the displacement is r g.": at(lam),
        "The displacement is r g; here it has length r (that is SAM's).": at(r / g.norm()),
        "Only the penalty's gradient came back; the loss has one too.": want - g,
        "That is g + 2λ Hg: the penalty is λ/2 ‖g‖².": 2 * want - g,
    }
    inputs = {"gradient": gradient, "theta": theta, "penalty": lam, "radius": r}
    trial("a short radius", inputs, want, rivals, rtol=1e-6)
    count = len(calls)
    trial.require(count == 2, f"The gradient was computed {count} times; twice is enough.")
    trial("no penalty at all", {**inputs, "penalty": 0.0}, g)
    exact = g + lam * jvp(slope, (theta,), (g,))[1]
    trial("close to the exact form", {**inputs, "radius": 1e-5}, exact, rtol=1e-3, atol=1e-3)


def _slope(network, params, x, y):
    loss = lambda params: torch.nn.functional.cross_entropy(network(params, x), y)
    return sum((part**2).sum() for part in grad(loss)(params).values())


@experiment("late minus early", "squared gradient", "test error", atol=5e-3)
def level_walk(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How a flooded walk along the level changes ‖g‖² and the test error."""
    early, late = list(range(100, 200, 10)), list(range(510, 610, 10))
    runs = train(
        seeds,
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        600,
        width=16,
        activation=torch.nn.Tanh,
        batch_size=None,
        evaluate_at=early + late,
        instruments={"slope": _slope},
    )
    change = runs.sel(step=late).mean("step") - runs.sel(step=early).mean("step")
    return change.slope.values, change.test_error.values
