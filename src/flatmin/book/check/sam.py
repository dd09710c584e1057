"""Checks of assignment 6: SAM."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad

from ...gradient import SAM, dual_norm_perturbation
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


@question
def sharpest_stable(trial: Trial) -> None:
    """The largest curvature at which unnormalized SAM with a given rate does not diverge."""
    for part, eta, rho in (
        ("a rate and a radius", trial.number(0.1, 0.5), trial.number(0.1, 0.9)),
        ("a small radius", trial.number(0.1, 0.5), 1e-14),
        ("no radius: gradient descent", 0.25, 0.0),
    ):
        want = 4 / (eta * (1 + math.sqrt(1 + 8 * rho / eta)))
        trial(
            part,
            {"eta": eta, "rho": rho},
            want=want,
            rtol=1e-6,
            rivals={
                "That is gradient descent's limit, 2/η; SAM's step is longer.": 2 / eta,
                "There w jumps to 0 or beyond but does not grow: it diverges where |factor| > 1, which "
                "is at a factor of -1, not 0.": 2 / (eta * (1 + math.sqrt(1 + 4 * rho / eta))),
                "That is the limit for ascent in place of descent of the penalty.": 2
                / (eta * (1 + rho)),
            },
            hint="One step multiplies w by 1 - η h (1 + ρ h). Solve |factor| = 1 for h; if ρ is "
            "tiny, a difference of two nearly equal roots loses its digits.",
        )


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

    def scaled(q_minus_1, p, gradients=g):  # |g|^(q-1), scaled to length rho
        v = [x.sign() * x.abs() ** q_minus_1 for x in gradients]
        length = torch.linalg.vector_norm(torch.cat([x.flatten() for x in v]), p)
        return tuple(rho * x / length for x in v)

    for p in (2.0, 3.0, 1.5, math.inf, 1.0):
        want = _perturbation(g, rho, p)
        rivals = {}
        if 1 < p < math.inf:
            each = tuple(dual_norm_perturbation(x, rho, p) for x in g)
            q = p / (p - 1)
            norm = torch.linalg.vector_norm(torch.cat([x.flatten() for x in g]), q)
            raw = tuple(x.sign() * x.abs() ** (q - 1) for x in g)
            rivals = {
                "Each tensor was brought to the length ρ by itself: the list is one vector, with "
                "one norm.": each,
                "The wrong conjugate exponent: |g| is raised to q - 1, with 1/p + 1/q = 1.": scaled(
                    p - 1, p
                ),
                "The wrong exponent: |g| is raised to q - 1, not to q.": scaled(q, p),
                "The sign of the gradient is lost.": tuple(x.abs() for x in want),
                "It has the right direction, but not the length ρ in the p-norm: the denominator "
                "is (‖g‖_q^q)^(1/p).": tuple(rho * x / norm for x in raw),
                "Only for p = 2 does ε̂ lie along g.": scaled(1.0, p),
            }
            rivals = {k: v for k, v in rivals.items() if p != 2 or "Only" not in k}
        hints = {
            math.inf: "For p = ∞, q - 1 = 0: every coordinate moves by ρ.",
            1.0: "For p = 1 all of ρ goes to the largest |g|, with its sign.",
        }
        inputs = {"gradients": g, "rho": rho, "p": p}
        trial(f"p = {p:g}", inputs, want=want, rivals=rivals, hint=hints.get(p, ""))
    small = [1e-6 * x.float() for x in g]
    trial(
        "p = 1.1, gradients of 1e-6 in single precision",
        {"gradients": small, "rho": rho, "p": 1.1},
        want=_perturbation(small, rho, 1.1),
        rtol=1e-3,
        atol=1e-6,
        hint="|g|^10 underflows to 0 there. The scale of g cancels: divide by the largest |g| "
        "first.",
    )
    zero = [torch.zeros_like(x) for x in g]
    trial(
        "a gradient of zero",
        {"gradients": zero, "rho": rho, "p": 2.0},
        want=tuple(zero),
        hint="Where there is no slope there is no way up: ε̂ = 0, not 0/0.",
    )


@question
def sam_step(trial: Trial) -> None:
    """One step of SAM with any base optimizer, p = 2."""
    x, y = trial.randn(10, 4), trial.integers(3, 10)
    rho = trial.number(0.2, 0.5)

    def make(width):
        return trial.filled(
            lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        )

    def problem(part, model, optimizer, dtype=torch.float64):
        loss = lambda: nn.functional.cross_entropy(model(x.to(dtype)), y)
        inputs = {"model": model, "loss": loss, "optimizer": optimizer, "rho": rho}
        return trial.call(part, inputs, changes=("model", "loss", "optimizer"))

    model, lr = make(5), 0.1
    w = {name: v.detach().clone() for name, v in model.named_parameters()}
    L = lambda w: nn.functional.cross_entropy(functional_call(model, w, (x,)), y)
    flat = lambda tree: torch.cat([v.flatten() for v in tree.values()])
    plus = lambda a, t, b: {name: a[name] + t * b[name] for name in a}
    g = grad(L)(w)
    up = plus(w, rho / flat(g).norm(), g)
    worst = grad(L)(up)
    stale = {name: trial.randn(*v.shape) for name, v in w.items()}
    for name, v in model.named_parameters():
        v.grad = stale[name].clone()
    got = problem("one step with SGD", model, torch.optim.SGD(model.parameters(), lr))
    after = flat({name: v.detach() for name, v in model.named_parameters()})
    stepped = lambda point, d: flat(plus(point, -lr, d))
    trial.compare(
        after,
        stepped(w, worst),
        rivals={
            "The weights were not restored: the step starts from w + ε̂, it should start from w.": stepped(
                up, worst
            ),
            "That is a plain step of SGD: the gradient at w + ε̂ is what steps.": stepped(w, g),
            "Both gradients were added up: .grad holds the first when the second is computed. Set it "
            "to zero in between.": stepped(w, plus(g, 1, worst)),
            "The perturbation goes downhill.": stepped(
                w, grad(L)(plus(w, -rho / flat(g).norm(), g))
            ),
            "The perturbation is not normalized: it should have the length ρ.": stepped(
                w, grad(L)(plus(w, rho, g))
            ),
            "Gradients from before the call are in the step: set .grad to zero first.": stepped(
                w, plus(worst, 1, plus(g, 1, stale))
            ),
            "The weights were restored, but nothing has stepped.": flat(w),
        },
        input=f"rho = {rho}, SGD with lr = {lr}",
        hint="Were gradients from before the call still in .grad? Is ε̂ one vector with one norm?",
    )
    trial.begin("it returns the loss at w")
    mistake = "That is the loss at w + ε̂; what one logs is the loss at w."
    trial.compare(got, L(w), rivals={mistake: L(up)})

    model = make(60).float()  # enough weights that subtracting ε̂ fails for some
    before = flat({name: v.detach().clone() for name, v in model.named_parameters()})
    problem(
        "with a rate of 0 the weights come back bitwise",
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        torch.float32,
    )
    after = flat({name: v.detach() for name, v in model.named_parameters()})
    trial.require(
        torch.equal(before, after),
        "In single precision the weights are not what they were.",
        got=f"largest difference {float((before - after).abs().max()):.1e}",
        wanted="0",
        hint="(w + ε̂) - ε̂ is not w in floating point: keep a copy of w.",
    )


@question
def adaptive_climb(trial: Trial) -> None:
    """ε̂ of adaptive SAM for p = 2."""
    w, g = trial.randn(6), trial.randn(6)
    rho = trial.number(0.1, 0.9)
    T = w.abs()
    length = (T * g).norm()
    inputs = {"w": w, "gradient": g, "rho": rho}
    trial(
        "six weights",
        inputs,
        want=rho * T**2 * g / length,
        rivals={
            "That is plain SAM's: the ball does not stretch with the weights.": rho * g / g.norm(),
            "T is there once; ε̂ = T ε̂_plain(T g) has it twice, once inside and once outside.": rho
            * T
            * g
            / length,
            "T is squared in the numerator, as it should be, but the length is that of T² g.": rho
            * T**2
            * g
            / (T**2 * g).norm(),
            "The length is that of g; it should be that of T g.": rho * T**2 * g / g.norm(),
            "T is |w|, not w: the signs of w have come in.": rho * w * g.abs() * T / length,
        },
    )
    c = torch.tensor([7.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    inputs = {"w": c * w, "gradient": g / c, "rho": rho}
    trial(
        "the same function, one weight times 7, its gradient divided by 7",
        inputs,
        want=c * rho * T**2 * g / length,
    )


@lru_cache
def _sam_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    data = [mnist1d(train_size=300, label_noise=0.3, seed=s) for s in seeds]
    sgd = SGD(lr=0.1, momentum=0.9, schedule="cosine")

    def end(steps, **stages):
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            Recipe(optimizer=sgd, **stages),
            steps=steps,
            seeds=list(seeds),
            evaluate_at=[steps],
            dtype=torch.float64,
        )
        return runs.isel(step=0, drop=True)

    change = end(150, gradient=SAM(rho=0.5)) - end(300)
    return {"training error": change.train_error.values, "test error": change.test_error.values}


@question(seconds=120)
def sam_effect(trial: Trial) -> None:
    """How SAM changes training and test error, at an equal number of gradients."""
    trial.experiment(
        _sam_effect,
        atol=0.01,
        rivals={
            "The difference is the wrong way round: SAM minus SGD.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
