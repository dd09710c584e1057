"""Checks of assignment 6: SAM."""

import math
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad

from ...gradient import SAM, dual_norm_perturbation
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, experiment, plain_number, question, train


@question
def sharpest_stable(trial: Trial) -> None:
    """The largest curvature at which unnormalized SAM with a given rate does not diverge."""
    for part, eta, rho in (
        ("a rate and a radius", trial.number(0.1, 0.5), trial.number(0.1, 0.9)),
        ("a small radius", trial.number(0.1, 0.5), 1e-14),
        ("no radius: gradient descent", 0.25, 0.0),
    ):
        want, ascent = 4 / (eta * (1 + math.sqrt(1 + 8 * rho / eta))), 2 / (eta * (1 + rho))
        rivals = {
            "That is gradient descent's limit, 2/η; SAM's step is longer.": 2 / eta,
            "There w jumps to 0 or beyond but does not grow: it diverges where |factor| > 1, which "
            "is at a factor of -1, not 0.": 2 / (eta * (1 + math.sqrt(1 + 4 * rho / eta))),
            "That is the limit for ascent in place of descent of the penalty.": ascent,
        }
        hint = "One step multiplies w by 1 - η h (1 + ρ h). Solve |factor| = 1 for h; if ρ is "
        hint += "tiny, a difference of two nearly equal roots loses its digits."
        inputs = {"eta": eta, "rho": rho}
        trial(part, inputs, want, rivals, hint, through=plain_number, rtol=1e-6)


def _perturbation(gradients, rho, p):
    """The package's ε̂ of several tensors, which count as one vector."""
    flat = torch.cat([g.flatten() for g in gradients])
    parts = dual_norm_perturbation(flat, rho, p).split([g.numel() for g in gradients])
    return tuple(part.view(g.shape) for part, g in zip(parts, gradients, strict=True))


@question
def climb(trial: Trial) -> None:
    """ε̂ for a list of tensors and any p."""
    g = [trial.randn(3, 2), trial.randn(4)]
    g[1] *= 3
    rho = trial.number(0.1, 0.9)
    flat = lambda tensors: torch.cat([x.flatten() for x in tensors])
    power = lambda exponent: [x.sign() * x.abs() ** exponent for x in g]
    to_length = lambda v, length: tuple(rho * x / length for x in v)

    for p in (2.0, 3.0, 1.5, math.inf, 1.0):
        want = _perturbation(g, rho, p)
        rivals = {}
        if 1 < p < math.inf:
            q = p / (p - 1)
            raised = lambda exponent: to_length(power(exponent), flat(power(exponent)).norm(p))
            rivals = {
                "Each tensor was brought to the length ρ by itself: the list is one vector, with "
                "one norm.": tuple(dual_norm_perturbation(x, rho, p) for x in g),
                "The wrong conjugate exponent: |g| is raised to q - 1, with 1/p + 1/q = 1.": raised(
                    p - 1
                ),
                "The wrong exponent: |g| is raised to q - 1, not to q.": raised(q),
                "The sign of the gradient is lost.": tuple(x.abs() for x in want),
                "It has the right direction, but not the length ρ in the p-norm: the denominator "
                "is (‖g‖_q^q)^(1/p).": to_length(power(q - 1), flat(g).norm(q)),
                "Only for p = 2 does ε̂ lie along g.": raised(1.0) if p != 2 else [],
            }
        hints = {
            math.inf: "For p = ∞, q - 1 = 0: every coordinate moves by ρ.",
            1.0: "For p = 1 all of ρ goes to the largest |g|, with its sign.",
        }
        inputs = {"gradients": g, "rho": rho, "p": p}
        trial(f"p = {p:g}", inputs, want, rivals, hints.get(p, ""))

    small = [1e-6 * x.float() for x in g]
    inputs = {"gradients": small, "rho": rho, "p": 1.1}
    want = _perturbation(small, rho, 1.1)
    hint = "|g|^10 underflows to 0 there. The scale of g cancels: divide by the largest |g| first."
    part = "p = 1.1, gradients of 1e-6 in single precision"
    trial(part, inputs, want, hint=hint, rtol=1e-3, atol=1e-6)
    zero = [torch.zeros_like(x) for x in g]
    hint = "Where there is no slope there is no way up: ε̂ = 0, not 0/0."
    inputs = {"gradients": zero, "rho": rho, "p": 2.0}
    trial("a gradient of zero", inputs, tuple(zero), hint=hint)
    for p in (1.0, 1.1, math.inf):  # anything in the ball will do
        trial("a gradient of zero", {**inputs, "p": p}, tuple(zero), hint=hint, atol=1.01 * rho)


@question
def sam_step(trial: Trial) -> None:
    """One step of SAM with any base optimizer, p = 2."""
    x, y = trial.randn(10, 4), trial.integers(3, 10)
    rho, lr = trial.number(0.2, 0.5), 0.1
    cross_entropy = nn.functional.cross_entropy

    def make(width):
        return trial.filled(
            lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        )

    def step(part, model, lr, optimizer=None):
        """What the answer returns, and the weights before and after it."""
        weights = nn.utils.parameters_to_vector
        before = weights(model.parameters()).detach()
        inputs = {
            "model": model,
            "loss": lambda: cross_entropy(model(x.to(before.dtype)), y),
            "optimizer": optimizer or torch.optim.SGD(model.parameters(), lr),
            "rho": rho,
        }
        shown = f"rho = {rho}, SGD with lr = {lr}"
        shown += ", momentum = 0.9, weight_decay = 0.3" * (optimizer is not None)
        got = trial.call(part, inputs, changes=("model", "loss", "optimizer"), shown=shown)
        return got, before, weights(model.parameters()).detach()

    model = make(5)
    for v in model.parameters():
        v.grad = trial.randn(*v.shape)
    stale = torch.cat([v.grad.flatten() for v in model.parameters()])
    names, shapes = zip(*((name, v.shape) for name, v in model.named_parameters()))

    def L(w):
        pieces = w.split([shape.numel() for shape in shapes])
        params = {name: v.view(shape) for name, v, shape in zip(names, pieces, shapes)}
        return cross_entropy(functional_call(model, params, (x,)), y)

    got, w, after = step("one step with SGD", model, lr)
    slope = grad(L)
    g = slope(w)
    up = w + rho * g / g.norm()
    worst = slope(up)
    unnormalized, kept = w - lr * slope(w + rho * g), w - lr * (g + stale + worst)
    rivals = {
        "The weights were not restored: the step starts from w + ε̂, not from w.": up - lr * worst,
        "That is a plain step of SGD: the gradient at w + ε̂ is what steps.": w - lr * g,
        "Both gradients were added up: .grad holds the first when the second is computed. Set it "
        "to zero in between.": w - lr * (g + worst),
        "The perturbation goes downhill.": w - lr * slope(2 * w - up),
        "The perturbation is not normalized: it should have the length ρ.": unnormalized,
        "Gradients from before the call are in the step: set .grad to zero first.": kept,
        "The weights were restored, but nothing has stepped.": w,
    }
    hint = "Were gradients from before the call still in .grad? Is ε̂ one vector with one norm?"
    trial.compare(after, w - lr * worst, rivals, hint)
    trial.begin("it returns the loss at w")
    trial.input = ""
    trial.compare(got, L(w), {"That is the loss at w + ε̂; what one logs is the loss at w.": L(up)})

    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.3)
    part = "two steps with momentum and weight decay"
    _, w, _ = step(part, model, lr, optimizer)
    _, _, after = step(part, model, lr, optimizer)

    def steps(momentum, decay):
        """Both steps."""
        place, velocity = w, 0
        for _ in range(2):
            g = slope(place)
            velocity = momentum * velocity + slope(place + rho * g / g.norm()) + decay * place
            place = place - lr * velocity
        return place

    rivals = {
        "The momentum is lost between two calls: was the optimizer made anew?": steps(0, 0.3),
        "This is a step of plain SGD: let the optimizer that was given make it.": steps(0, 0),
        "The optimizer's weight decay is missing.": steps(0.9, 0),
    }
    hint = "Nothing but optimizer.step() should move the weights, from w."
    trial.compare(after, steps(0.9, 0.3), rivals, hint)

    model = make(60).float()  # enough weights that subtracting ε̂ fails for some
    _, before, after = step("with a rate of 0 the weights come back bitwise", model, 0.0)
    hint = "The largest change of a weight. (w + ε̂) - ε̂ is not w in floating point: keep a copy."
    trial.compare((after - before).abs().max(), 0.0, hint=hint, atol=0)


@question
def adaptive_climb(trial: Trial) -> None:
    """ε̂ of adaptive SAM for p = 2."""
    w, g = trial.randn(6), trial.randn(6)
    rho = trial.number(0.1, 0.9)
    T = w.abs()
    of = lambda scale: rho * T**2 * g / (scale * g).norm()
    want = of(T)
    rivals = {
        "That is plain SAM's: the ball does not stretch with the weights.": rho * g / g.norm(),
        "T is there once; ε̂ = T ε̂_plain(T g) has it twice, once inside and once outside.": want / T,
        "T is squared in the numerator, as it should be, but the length is that of T² g.": of(T**2),
        "The length is that of g; it should be that of T g.": of(1),
        "T is |w|, not w: the signs of w have come in.": want * w.sign() * g.sign(),
    }
    trial("six weights", {"w": w, "gradient": g, "rho": rho}, want, rivals)
    c = torch.tensor([7.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    part = "the same function, one weight times 7, its gradient divided by 7"
    trial(part, {"w": c * w, "gradient": g / c, "rho": rho}, c * want)


@experiment("SAM minus SGD", "training error", "test error")
def sam_effect(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How SAM changes training and test error, at an equal number of gradients."""
    data = [mnist1d(train_size=300, label_noise=0.3, seed=s) for s in seeds]
    sgd = SGD(lr=0.1, momentum=0.9, schedule="cosine")

    def end(steps, **stages):
        recipe = Recipe(optimizer=sgd, **stages)
        return train(seeds, data, recipe, steps).isel(step=0, drop=True)

    change = end(150, gradient=SAM(rho=0.5)) - end(300)
    return change.train_error.values, change.test_error.values
