"""Checks of assignment 3: flooding is a gradient penalty."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...loss import Flooding
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import ERROR, Trial, by_name, differentiated, experiment, question, train


def _smooth(trial, size=5):
    """A smooth loss, a vector, the loss's gradient and its Hessian there."""
    A, B, c = trial.randn(5, 5), trial.randn(5, size), trial.randn(5)

    def L(theta):
        return 0.5 * ((A @ torch.tanh(B @ theta / size**0.5) - c) ** 2).mean()

    theta = trial.randn(size)
    return L, theta, grad(L)(theta), hessian(L)(theta)


class _Counted(TorchDispatchMode):
    """An answer, and how many numbers the tensors have that it makes, also inside of vmap."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer, self.numbers = answer, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def __call__(self, L: Any, theta: Tensor, eps: float) -> Any:
        """With a theta that does not require grad; with one that does, if autograd asks for it."""
        with self:
            try:
                return self.answer(L, theta, eps)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                return self.answer(L, theta.requires_grad_(), eps)


@question
def effective_objective(trial: Trial) -> None:
    """The rate and the penalty of a sequence of steps with any rates."""
    # with three decimals, so that they do not sum to 1/4 or 1/2, where mistakes coincide
    a = round(trial.number(0.3, 0.5) + 0.003, 3)
    b, c = trial.number(0.05, 0.2), trial.number(0.05, 0.2)
    for part, rates in (
        ("one step down, one up", [a, -b]),
        ("one step up, one down", [-b, a]),
        ("two steps down", [a, b]),
        ("four steps", [a, -b, a, -c]),
    ):
        total, squares, lengths = sum(rates), sum(r * r for r in rates), sum(map(abs, rates))
        pairs = 0.5 * (total**2 - squares)
        weight = -pairs / (2 * total)
        neighbours = sum(r * s for r, s in zip(rates, rates[1:]))
        rivals = {
            "The weight has the wrong sign: θ - A g + B Hg is a step of rate A on a penalty with "
            "the sign of -B.": (total, -weight),
            "The gradient of ‖g‖² is 2 Hg (3.4), or a pair was counted twice (the sum is over "
            "j < k): a factor 2 is off in the weight.": [(total, 2 * weight), (total, weight / 2)],
            "The weight has to be divided by the rate: it is multiplied by it in the step.": [
                (total, -pairs / 2),
                (total, -pairs / 2 * total),
            ],
            "That is the factor of Hg. It comes from a step of rate A on c ‖g‖², which is -2 A c Hg.": [
                (total, pairs),
                (total, -pairs),
            ],
            "A step was paired with itself: the sum is over j < k.": [
                (total, -(pairs + squares) / (2 * total)),
                (total, -total / 4),
                (total, -total / 2),
            ],
            "All pairs j < k count, not only the first or those of neighbours.": [
                (total, -neighbours / (2 * total)),
                (total, -rates[0] * rates[1] / (2 * total)),
            ],
            "The rates have signs, minus for a step up. They are all taken positive here.": [
                (lengths, -0.5 * (lengths**2 - squares) / (2 * lengths)),
                (lengths, -pairs / (2 * lengths)),
                (lengths, weight),
            ],
            "The rate is the sum of the rates, not their mean.": [
                (total / len(rates), weight),
                (total / len(rates), weight * len(rates)),
            ],
            "A step down has a positive rate.": [(-total, weight), (-total, -weight)],
            "The rate comes first, then the weight.": (weight, total),
        }
        hint = "Expand with (3.8), then read off L + weight · ‖g‖², descended with the rate."
        trial(part, {"rates": rates}, (total, weight), rivals, hint)


@question
def remainder(trial: Trial) -> None:
    """What a step down and a step up leave after subtracting the penalty's step."""
    for part, n, eps in (
        ("a long step", 5, 0.4),
        ("a short step", 5, 0.05),
        ("a long theta", 500, 0.4),
    ):
        L, theta, g, H = _smooth(trial, n)
        slope, down = grad(L), theta - eps * g
        up, first_up = down + eps * slope(down), theta + eps * g
        minus = lambda step: up - (theta - step)
        left = lambda factor: minus(factor * eps**2 * H @ g)
        H_down, g_down = hessian(L)(down), slope(down)
        rivals = {
            "A factor 2 is off: the pair steps by -ε² Hg, which is -ε²/2 ∇‖g‖².": left(0.5),
            "A factor 2 is off: ∇‖g‖² = 2Hg, and the rate of its step is ε²/2.": left(2),
            "The penalty's step was added, not taken away.": left(-1),
            "The sign is turned around: θ'' comes first.": -left(1),
            "θ was not subtracted.": [up, up + eps**2 * H @ g],
            "H and g belong to θ, where the step down begins. Here one was taken at θ'.": [
                minus(eps**2 * H_down @ g),
                minus(eps**2 * H @ g_down),
                minus(eps**2 * H_down @ g_down),
            ],
            "The factor of Hg is ε².": [minus(eps * H @ g), minus(H @ g)],
            "jvp of grad(L) returns the pair (g, Hg): this has g in place of Hg.": minus(
                eps**2 * g
            ),
            "jvp of L is the number ‖g‖². Hg is jvp of grad(L).": minus(eps**2 * g @ g),
            "Hg is half the gradient of ‖g‖², the sum of the squared entries, not of their mean or "
            "of the root.": [left(1 / n), left(2 / n), left(1 / g.norm())],
            "The step down comes first, then the step up.": (
                first_up - eps * slope(first_up) - (theta - eps**2 * H @ g)
            ),
            "The second step goes up.": down - eps * g_down - (theta - eps**2 * H @ g),
            "The step up used the gradient of the old place: then the steps cancel, and nothing "
            "is left over.": eps**2 * H @ g,
            "This is what the two steps leave over (3.3), before the penalty's step is taken "
            "away.": left(0),
        }
        hint = "θ'' by (3.1) and (3.2), minus θ - ε² H g; Hg by jvp or by differentiating ‖g‖²/2."
        counted, inputs = _Counted(trial.answer), {"L": L, "theta": theta, "eps": eps}
        through = lambda _: counted
        trial(part, inputs, left(1), rivals, hint, through=through, rtol=1e-4, atol=1e-10)
    # an answer without H makes a seventh of that, one with H at least eight times as much
    trial.require(
        counted.numbers < n * n,
        "The question asks for it without forming H.",
        seen=f"tensors of {counted.numbers} numbers in all, and H has {n} × {n}",
        hint="jvp of grad(L) in the direction g gives Hg.",
    )


@question
def two_rate_loss(trial: Trial) -> None:
    """The objective that a step down and a smaller step up descend, and its gradient."""
    L, theta, g, H = _smooth(trial)
    # with three decimals, so that e1 - e2 is not 1/5 or 1/4, where mistakes coincide
    e1, e2 = round(trial.number(0.4, 0.6) + 0.003, 3), trial.number(0.1, 0.3)
    c, square = e1 * e2 / (2 * (e1 - e2)), g @ g
    inputs = {"L": L, "theta": theta.clone().requires_grad_(), "eps1": e1, "eps2": e2}
    value, down = L(theta), theta - e1 * g
    g_down, exact = grad(L)(down), g + 2 * c * H @ g
    rivals = {
        "A factor 2 is off in the weight (3.11): ∇‖g‖² = 2Hg.": [
            value + 2 * c * square,
            value + c / 2 * square,
        ],
        "The length is not squared.": value + c * g.norm(),
        "‖g‖² is one number, the sum of the squared entries.": [
            value + c * (g * g).mean(),
            value + c * g * g,
        ],
        "The penalty is subtracted.": value - c * square,
        "The weight is not divided by the rate ε₁ - ε₂.": [
            value + e1 * e2 / 2 * square,
            value + e1 * e2 * square,
            value + e1 * e2 / 2 * (e1 - e2) * square,
        ],
        "The step up has the rate -ε₂, so the rates' sum is ε₁ - ε₂.": (
            value + e1 * e2 / (2 * (e1 + e2)) * square
        ),
        "The objective was multiplied by the rate ε₁ - ε₂.": (e1 - e2) * (value + c * square),
        "The loss and its gradient are taken at θ, where the step down begins.": [
            value + c * g_down @ g_down,
            L(down) + c * square,
            L(down) + c * g_down @ g_down,
        ],
        "Only the penalty came back; the objective has the loss in it too.": c * square,
        "That is the objective's gradient. The objective itself is wanted, one number.": exact,
        "This is where the two steps lead, or the loss there. The objective that they descend is "
        "wanted, at θ.": [down + e2 * g_down, L(down + e2 * g_down)],
    }
    hint = "(3.11): the loss plus a weight times ‖g‖², both at θ."
    trial("the value", inputs, value + c * square, rivals, hint)
    rivals = {
        "The penalty has no gradient: was it detached, or made a number, on the way?": g,
        "The loss has no gradient: was it detached, or made a number, on the way?": exact - g,
        "Nothing here can be differentiated: was the loss detached, or made a number?": 0 * g,
    }

    def through(answer):
        def gradient(*given):
            try:
                return differentiated(answer, "theta")(**dict(zip(inputs, given)))
            except RuntimeError as error:
                if "a second time" not in str(error):
                    raise
                raise RuntimeError(
                    "there is no graph any more to differentiate. create_graph=True keeps it when "
                    "a gradient is taken, as torch.func.grad does."
                ) from error

        return gradient

    # finite differences of L are right answers too
    trial("its gradient", inputs, exact, rivals, through=through, rtol=1e-4, atol=1e-6)


@question
def difference_penalty(trial: Trial) -> None:
    """The penalized gradient from two gradients, without a Hessian."""
    L, theta, g, H = _smooth(trial)
    lam, r, calls, slope = trial.number(0.2, 0.45), 0.05, [], grad(L)

    def gradient(point):
        calls.append(point)
        return slope(point)

    at = lambda length: g + lam / r * (slope(theta + length * g) - g)
    want, downhill, there = at(r), at(-r), slope(theta + r * g)
    exact, unit = g + lam * H @ g, at(r / g.norm())
    rivals = {
        "The difference was multiplied by λ, but not divided by the radius.": [
            g + r * (want - g),
            g + r**2 * (want - g),
        ],
        "This looks downhill; (3.13) displaces to θ + r g.": [downhill, 2 * g - downhill],
        "This looks both ways, with a third gradient; (3.13) needs two.": (
            g + (want - downhill) / 2
        ),
        "The penalty's gradient has the wrong sign: it is the gradient uphill minus the one at θ.": (
            2 * g - want
        ),
        "The second gradient is taken at θ + λ g; the displacement is r g.": [
            at(lam),
            slope(theta + lam * g),
            g + r / lam * (slope(theta + lam * g) - g),
        ],
        "The second gradient is taken at θ + g; the displacement is r g.": [
            at(1),
            g + r * (at(1) - g),
        ],
        "The radius was added to every entry; the displacement is r g.": (
            g + lam / r * (slope(theta + r) - g)
        ),
        "The displacement is r g; here it has length r (that is SAM's).": [
            unit,
            g + g.norm() * (unit - g),
        ],
        "Only the penalty's gradient came back; the loss has one too.": [
            want - g,
            (want - g) / lam,
        ],
        "This is the gradient uphill, at θ + r g. The difference of the two gradients is wanted.": [
            there,
            g + lam * there,
            g + lam / r * there,
        ],
        "λ is missing.": g + (want - g) / lam,
        "A factor 2 is off: the gradient of λ/2 ‖g‖² is λ Hg.": [2 * want - g, (want + g) / 2],
        "This is the exact form, without a difference. Use two gradients, and no derivative of one.": (
            exact
        ),
    }
    hint = "(3.13): the gradient at θ, and λ/r times the difference of two gradients."
    inputs = {"gradient": gradient, "theta": theta, "penalty": lam, "radius": r}
    trial("a short radius", inputs, want, rivals, hint, rtol=1e-6)
    count = len(calls)
    trial.require(count == 2, f"The gradient was computed {count} times; twice is enough.")
    trial("no penalty at all", {**inputs, "penalty": 0.0}, g)
    trial("close to the exact form", {**inputs, "radius": 1e-5}, exact, rtol=1e-3, atol=1e-3)


def _slope(network, params, x, y):
    loss = lambda params: torch.nn.functional.cross_entropy(network(params, x), y)
    return sum((part**2).sum() for part in grad(loss)(params).values())


@experiment(
    "late minus early", squared_gradient=1e-5, test_error=ERROR / 10
)  # means over ten steps
def level_walk(seeds: tuple[int, ...]) -> dict[str, Any]:
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
    change = lambda v: v.sel(step=late).mean("step") - v.sel(step=early).mean("step")
    square = change(runs.slope).values
    return by_name(change(runs)) | {
        "squared gradient": square,
        "norm of the gradient, not squared": change(runs.slope**0.5).values,
        "squared gradient of the summed loss, not of its mean": 100**2 * square,
    }
