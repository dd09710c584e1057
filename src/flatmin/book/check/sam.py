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
from .grading import ERROR, Mistake, Trial, by_name, experiment, plain_number, question, train


@question
def sharpest_stable(trial: Trial) -> None:
    """The largest curvature at which unnormalized SAM with a given rate does not diverge."""
    for part, eta, rho in (
        ("a rate and a radius", trial.number(0.1, 0.5), trial.number(0.6, 0.9)),
        ("a small radius", trial.number(0.1, 0.5), 1e-3),
        ("a small radius", trial.number(0.1, 0.5), 1e-6),
        ("a tiny radius", trial.number(0.1, 0.5), 1e-14),
        ("no radius: gradient descent", 0.25, 0.0),
    ):
        root = math.sqrt(1 + 8 * rho / eta)
        want, other = 4 / (eta * (1 + root)), (1 + root) / (2 * rho) if rho else math.inf
        from_above = 4 / (eta - rho + math.sqrt((eta - rho) ** 2 + 8 * eta * rho))
        down = math.sqrt(eta**2 - 8 * eta * rho) if eta > 8 * rho else math.nan
        rivals = {
            "For a small ρ it is near 2/η, not equal."
            if rho < 0.01
            else "That is gradient descent's limit, 2/η; SAM's step is longer.": 2 / eta,
            "There w jumps to 0 or beyond but does not grow: it diverges where |factor| > 1, which "
            "is at a factor of -1, not 0.": 2 / (eta * (1 + math.sqrt(1 + 4 * rho / eta))),
            "The climb was taken as ρ w. The gradient is h w, so it is ρ h w.": 2
            / (eta * (1 + rho)),
            "A factor 2 is off: solve η h + η ρ h² = 2.": [2 * want, want / 2],
            "η multiplies the whole gradient: solve η h + η ρ h² = 2, not η h + ρ h² = 2.": 4
            / (eta + math.sqrt(eta**2 + 8 * rho)),
            "That is the other root of η h + η ρ h² = 2; h is the positive one.": [other, -other],
            "That is the limit if the step starts from w + ρ g; SAM steps from w.": from_above,
            "That is the limit for w - ρ g; SAM climbs, to w + ρ g.": [
                1 / rho if rho else math.inf,
                4 / (eta + down),
            ],
            "η and ρ do not add up: solve η h + η ρ h² = 2.": 2 / (eta + rho),
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
    if flat(g).max() == flat(g).abs().max():
        g = [-x for x in g]  # at p = 1 all depends on the sign of the largest |g|
    power = lambda exponent: [x.sign() * x.abs() ** exponent for x in g]
    to_length = lambda v, length: tuple(rho * x / length for x in v)

    for p in (2.0, 3.0, 1.5, math.inf, 1.0):
        want = _perturbation(g, rho, p)
        rivals = {
            "Wanted is a list of tensors of the same shapes, not flat ones.": [
                flat(want),
                tuple(x.flatten() for x in want),
            ],
            "Each tensor was brought to the length ρ by itself: the list is one vector, with "
            "one norm.": tuple(dual_norm_perturbation(x, rho, p) for x in g),
            "The sign of the gradient is lost.": tuple(x.abs() for x in want),
            "That is the way down; the way up has the signs of g.": tuple(-x for x in want),
        }
        if 1 < p < math.inf:
            q = p / (p - 1)
            norm_p, norm_q = flat(g).norm(p), flat(g).norm(q)

            def along(v):
                """This direction, with each of the lengths that one may give it."""
                norms = torch.stack([x.norm(p) for x in v])
                lengths = [norm_p, norm_q, norm_q ** (q / p), norm_p ** (p / q), norms.sum(), 1]
                lengths += [
                    norms.norm(),
                    norms.norm(p) * rho,
                    *(flat(v).norm(r) for r in (2, p, q)),
                ]
                return [to_length(v, length) for length in lengths]

            scaled = [x / flat(power(q - 1)).abs().max() for x in power(q - 1)]
            apart = [x / x.abs().max() for x in power(q - 1)]
            rivals |= {
                "The root is missing: the denominator is (‖g‖_q^q)^(1/p).": to_length(
                    power(q - 1), norm_q**q
                ),
                "It was divided by the square of its norm; the norm itself brings it to the length "
                "ρ.": [to_length(v, flat(v).norm(p) ** 2) for v in (power(q - 1), scaled)],
                "It has the right direction, but not the length ρ in the p-norm: the denominator "
                "is (‖g‖_q^q)^(1/p), with one sum over all tensors.": along(power(q - 1)),
                "The wrong conjugate exponent: |g| is raised to q - 1, with 1/p + 1/q = 1.": along(
                    power(p - 1)
                ),
                "The wrong exponent: |g| is raised to q - 1, not to q.": along(power(q)),
                "Only for p = 2 does ε̂ lie along g.": along(g),
                "Each tensor was divided by its own largest |g|: divide all by the same.": along(
                    apart
                ),
            }
        hints = {
            math.inf: "For p = ∞, q - 1 = 0: every coordinate moves by ρ.",
            1.0: "For p = 1 all of ρ goes to the largest |g|, with its sign.",
        }
        hint = "|g|, not g, is raised to q - 1. Then it gets the sign of g, and the length ρ (6.6)."
        inputs = {"gradients": g, "rho": rho, "p": p}
        trial(f"p = {p:g}", inputs, want, rivals, hints.get(p, hint))

    tied = [x.clone() for x in g]
    top = 2 * float(flat(g).abs().max())
    tied[0][0, 0], tied[0][2, 1], tied[1][2] = top, -top, top
    part, shapes = "p = 1, three of them the largest", {"the first": [3, 2], "the second": [4]}
    with trial.noting(part):
        e = flat(trial.tensors(part, {"gradients": tied, "rho": rho, "p": 1.0}, shapes))
        all_of_it = {"Every one of the largest got all of ρ; together they get ρ.": 3 * rho}
        hint = "The sum of all |ε| should be ρ. (A p near 1 is not p = 1.)"
        trial.compare(e.abs().sum(), rho, all_of_it, hint, rtol=1e-6)
        hint = f"That is ⟨g, ε⟩. {hints[1.0]}"
        trial.compare(flat(tied) @ e, rho * top, hint=hint, rtol=1e-6)

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


_ERRORS = {  # in a step of SAM, and what to do
    "a leaf Variable that requires grad": "The weights are meant to be changed, but no gradient may "
    "follow it: move them inside `with torch.no_grad():`.",
    "element 0 of tensors does not require grad": "Inside `with torch.no_grad():` there is no "
    "gradient: only move the weights there, and call loss() and backward() outside.",
    "by an inplace operation": "The first loss belongs to w: call loss() again at w + ε̂.",
    "'NoneType'": "A .grad is None before backward() and after zero_grad(): keep what you need of "
    "it.",
}


@question
def sam_step(trial: Trial) -> None:
    """One step of SAM with any base optimizer, p = 2."""
    x, y = trial.randn(10, 4), trial.integers(3, 10)
    cross_entropy, weights = nn.functional.cross_entropy, nn.utils.parameters_to_vector

    def make(width):
        return trial.filled(
            lambda: nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        )

    def step(part, model, lr, optimizer=None, hint=""):
        """What the answer returns, and the weights before and after it."""
        before = weights(model.parameters()).detach()
        inputs = {
            "model": model,
            "loss": lambda: cross_entropy(model(x.to(before.dtype)), y),
            "optimizer": optimizer or torch.optim.SGD(model.parameters(), lr),
            "rho": rho,
        }
        shown = f"rho = {rho}, SGD with lr = {lr}"
        shown += ", momentum = 0.9, weight_decay = 0.3" * (optimizer is not None)
        try:
            got = trial.call(part, inputs, changes=("model", "loss", "optimizer"), shown=shown)
        except Mistake as mistake:
            hint = hint or next((do for said, do in _ERRORS.items() if said in str(mistake)), "")
            mistake.lines |= {"hint": hint} if hint else {}
            raise
        return got, before, weights(model.parameters()).detach()

    def loss_of(model):
        """The loss as a function of all weights in one vector, and a function that cuts these."""
        names, shapes = zip(*((name, v.shape) for name, v in model.named_parameters()))
        cut = lambda w: w.split([shape.numel() for shape in shapes])

        def L(w):
            params = {name: v.view(shape) for name, v, shape in zip(names, cut(w), shapes)}
            return cross_entropy(functional_call(model, params, (x,)), y)

        return L, cut

    model = make(5)
    for v in model.parameters():
        v.grad = trial.randn(*v.shape)
    stale = torch.cat([v.grad.flatten() for v in model.parameters()])
    L, cut = loss_of(model)
    slope = grad(L)
    g = slope(weights(model.parameters()).detach())
    rho, lr = round(1.5 * float(g.norm()), 2), 0.1  # longer than g: to clip g is not enough
    to_length = lambda v: rho * v / v.norm()
    got, w, after = step("one step with SGD", model, lr)
    up = w + to_length(g)
    worst = slope(up)
    by = lambda e: w - lr * slope(w + e)  # a step with this perturbation
    each, lengths = torch.cat([to_length(v) for v in cut(g)]), sum(v.norm() for v in cut(g))
    moved, whole = w - lr * g, grad(lambda w: L(w + to_length(slope(w))))(w)
    kept = [stale + worst, g + stale + worst, slope(w + to_length(g + stale))]
    kept += [g + stale + kept[-1]]
    rivals = {
        "The weights were not restored: the step starts from w + ε̂, not from w. (Keep clones: "
        "`w.data` and `state_dict()` are the weights themselves.)": up - lr * worst,
        "That is a plain step of SGD: the gradient at w + ε̂ is what steps. (In a loop `w = w + …` "
        "moves no weight; `w += …` does.)": moved,
        "Both gradients were added up: .grad holds the first when the second is computed. Set it "
        "to zero in between.": w - lr * (g + worst),
        "The perturbation goes downhill.": by(-to_length(g)),
        "The perturbation is not normalized: it should have the length ρ.": [
            by(rho * g),
            by(g / g.norm()),
            by(g),
        ],
        "A root is missing: g is divided by its length, not by the square of it.": by(
            rho * g / g.norm() ** 2
        ),
        "ε̂ is one vector with one norm, the root of the sum of all squares.": [
            by(each),
            by(rho * g / lengths),
        ],
        "Gradients from before the call are in the step: set .grad to zero first.": [
            w - lr * v for v in kept
        ],
        "That descends the rise L(w + ε̂) - L(w) alone; SAM descends L(w + ε̂).": w
        - lr * (worst - g),
        "ε̂ was differentiated too. SAM drops that term of (6.7).": w - lr * whole,
        "One call is one step, with the gradient at w + ε̂: something has stepped twice.": [
            w - 2 * lr * worst,
            moved - lr * slope(moved + to_length(g)),
            w - lr * slope(moved + to_length(g)),
        ],
        "The weights are what they were: nothing has stepped, or the weights were restored after "
        "the step.": w,
    }
    hint = "Gradient at w, climb by ρ g/‖g‖, gradient there, back to w, and optimizer.step()."
    trial.compare(after, w - lr * worst, rivals, hint)
    trial.begin("it returns the loss at w")
    trial.input = ""
    rivals = {
        "That is the loss at w + ε̂; what one logs is the loss at w.": L(up),
        "That is the loss after the step; it should be that before.": L(after),
    }
    trial.compare(got, L(w), rivals, "It is the first loss, before the climb.")

    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.3)
    part = "two steps with momentum and weight decay"
    _, w, _ = step(part, model, lr, optimizer)
    _, _, after = step(part, model, lr, optimizer)

    def steps(momentum, decay, late=False):
        """Both steps."""
        place, velocity = w, 0
        for _ in range(2):
            up = place + to_length(slope(place))
            velocity = momentum * velocity + slope(up) + decay * (up if late else place)
            place = place - lr * velocity
        return place

    rivals = {
        "The momentum is lost between two calls: was the step written by hand, or was the "
        "optimizer made anew?": steps(0, 0.3),
        "This is a step of plain SGD: let the optimizer that was given make it.": steps(0, 0),
        "The optimizer's weight decay is missing.": steps(0.9, 0),
        "The optimizer stepped at w + ε̂, so the weight decay is that of w + ε̂: go back to w "
        "first.": steps(0.9, 0.3, late=True),
    }
    hint = "Nothing but optimizer.step() should move the weights, from w."
    trial.compare(after, steps(0.9, 0.3), rivals, hint)

    model = make(60).float()  # enough weights that subtracting ε̂ fails for some
    _, before, after = step("with a rate of 0 the weights come back bitwise", model, 0.0)
    hint = "The largest change of a weight. (w + ε̂) - ε̂ is not w in floating point: keep a copy."
    trial.compare((after - before).abs().max(), 0.0, hint=hint, atol=0)

    model = make(5)
    for v in model[0].requires_grad_(False).parameters():
        v.grad = trial.randn(*v.shape)
    free = torch.cat([v.requires_grad * torch.ones(v.numel()) for v in model.parameters()])
    slope = grad(loss_of(model)[0])
    hint = "Frozen weights have no gradient: leave those with requires_grad=False out."
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.3)
    _, w, after = step("the first layer is frozen", model, lr, optimizer, hint)
    trial.require(
        torch.equal(after[free == 0], w[free == 0]),
        "A frozen weight moved.",
        hint="An old .grad was left in it, or a zero, to which the optimizer adds weight decay, or it was "
        "unfrozen. "
        "With None it stays: optimizer.zero_grad() sets that.",
    )
    want = w - lr * free * (slope(w + to_length(free * slope(w))) + 0.3 * w)
    trial.compare(after, want, hint=hint)


@question
def adaptive_climb(trial: Trial) -> None:
    """ε̂ of adaptive SAM for p = 2."""
    w, g = trial.randn(6), trial.randn(6)
    signs = torch.tensor([1.0, -1.0]).double()
    w[:2], g[1:3] = signs * w[:2].abs(), signs * g[1:3].abs()  # there are both in both
    rho = trial.number(0.1, 0.9)
    T = w.abs()
    of = lambda scale: rho * T**2 * g / (scale * g).norm()
    want = of(T)
    inverted = (
        T**-2 / (g / T).norm(),
        1 / (T * (g / T).norm()),
        1 / (T * g.norm()),
        1 / (g / T).norm(),
    )
    rivals = {
        "That is plain SAM's: the ball does not stretch with the weights.": rho * g / g.norm(),
        "T is there once; ε̂ = T ε̂_plain(T g) has it twice, once inside and once outside.": [
            want / T,
            rho * T * g / g.norm(),
        ],
        "T is squared in the numerator, as it should be, but the length is that of T² g.": of(T**2),
        "The length is that of g; it should be that of T g.": of(1),
        "T is |w|, not w: the signs of w have come in.": [want * w.sign(), want / w],
        "T is inverted: in this ball a large weight may move farther than a small one.": [
            rho * g * scale for scale in inverted
        ],
        "T is one number here; it is |w| entry by entry.": [
            rho * size * g / g.norm() for size in (w.norm(), T.mean(), T.max())
        ],
        "The power of T is wrong: the ball is Σ ε²/w² ≤ ρ².": [
            rho * T * g / (T * g**2).sum().sqrt(),
            rho * T**4 * g / (T**2 * g).norm(),
        ],
        "The root is missing: one divides by ‖T g‖, not by its square.": want / (T * g).norm(),
        "Nothing was divided by ‖T g‖.": want * (T * g).norm(),
        "The sign of the gradient is lost.": [want.abs(), want.abs() * w.sign()],
        "That is the way down.": -want,
        "That is the best step if ‖T⁻¹ε‖_∞ ≤ ρ; here it is the 2-norm.": rho * T * g.sign(),
    }
    hint = "With ε = T u the ball of u is plain, and ⟨g, ε⟩ = ⟨T g, u⟩."
    trial("six weights", {"w": w, "gradient": g, "rho": rho}, want, rivals, hint)
    c = torch.tensor([7.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    part = "the same function, one weight times 7, its gradient divided by 7"
    trial(part, {"w": c * w, "gradient": g / c, "rho": rho}, c * want)


@experiment("SAM minus SGD", training_error=0.0034, test_error=ERROR)
def sam_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    """How SAM changes training and test error, at an equal number of gradients."""
    data = [mnist1d(train_size=300, label_noise=0.3, seed=s) for s in seeds]
    sgd = SGD(lr=0.1, momentum=0.9, schedule="cosine")

    def end(steps, **stages):
        recipe = Recipe(optimizer=sgd, **stages)
        return train(seeds, data, recipe, steps).isel(step=0, drop=True)

    return by_name(end(150, gradient=SAM(rho=0.5)) - end(300))
