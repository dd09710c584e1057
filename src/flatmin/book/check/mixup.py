"""Checks of assignment 5: mixup."""

from typing import Any

import torch
from scipy.special import beta as beta_function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...batch import Mixup
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, differentiated, experiment, question, train


@question
def expected_mixing(trial: Trial) -> None:
    """E[λ(1-λ)] for each weight of a Dirichlet distribution."""
    a, b = trial.number(0.2, 0.9), trial.number(1.1, 3.0)
    for part, alphas in (
        ("two equal weights: mixup", [b, b]),
        ("three equal weights", [a, a, a]),
        ("weights that differ", [a, b, 2.0, 0.5]),
    ):
        alpha = torch.tensor(alphas, dtype=torch.float64)
        A = alpha.sum()
        mean = alpha / A
        want = mean * (A - alpha) / (A + 1)
        rivals = {
            "That is the variance of λ; E[λ(1-λ)] = E[λ] - E[λ]² - Var λ.": want / A,
            "That is E[λ](1 - E[λ]), as if λ were its mean.": mean * (1 - mean),
            "That is E[λ²].": mean * (alpha + 1) / (A + 1),
            "That is (5.7), for two equal weights.": alpha / (2 * (2 * alpha + 1)),
            "That is the mean of λ.": mean,
        }
        hint = "One weight of a Dirichlet distribution is Beta(α_j, A - α_j), with A the sum."
        trial(part, {"alphas": alpha}, want, rivals, hint)


class _SoftLabels(TorchFunctionMode):
    """Notes whether a cross-entropy is given labels of more than one class."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            target = kwargs.get("target", args[1] if len(args) > 1 else None)
            if isinstance(target, torch.Tensor) and target.is_floating_point() and target.ndim == 2:
                self.seen |= bool(((target != 0).sum(1) > 1).any())
        return func(*args, **kwargs)


@question
def mixed_loss(trial: Trial) -> None:
    """The loss on mixed labels from two ordinary losses, with one λ per example."""
    z, y = trial.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    partners = torch.arange(6).roll(-1)  # all of other classes
    equal, each = torch.full((6,), 0.3, dtype=torch.float64), trial.rand(6)
    loss = lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")
    own, theirs = loss(z, y), loss(z, y[partners])
    for part, lam in (("the same λ for all", equal), ("one λ per example", each)):
        losses = lam * own + (1 - lam) * theirs
        exchanged = (own + theirs - losses).mean()
        mean_first = lam.mean() * own.mean() + (1 - lam.mean()) * theirs.mean()
        permuted = lam * own + (1 - lam) * loss(z[partners], y[partners])
        rivals = {
            "λ and 1 - λ are exchanged: λ is the weight of the example's own label.": exchanged,
            "The mean over the batch was taken before the weights came in. With one λ an example "
            "take reduction='none' first.": mean_first,
            "The partners play no part: this is the loss on the own labels.": own.mean(),
            "The logits were permuted with the labels: then it is the same loss "
            "twice.": permuted.mean(),
            "One number was wanted, the mean over the batch.": losses,
        }
        inputs = {"logits": z, "labels": y, "partners": partners, "lam": lam}
        with _SoftLabels() as labels:
            got = trial.call(part, inputs)
        trial.compare(got, losses.mean(), rivals)
        hint = "By (5.6) the loss is λ times one ordinary loss plus 1 - λ times another."
        trial.require(not labels.seen, "A soft label was made; none is needed.", hint=hint)
    if isinstance(got, torch.Tensor):  # a number or an array is right, and has no gradient
        z = z.clone().requires_grad_()
        slope = lambda losses: torch.autograd.grad(losses.mean(), z, retain_graph=True)[0]
        own, theirs = lam * loss(z, y), (1 - lam) * loss(z, y[partners])
        want, hint = slope(own + theirs), "Was a part of the loss detached on the way?"
        rivals = {
            "The partners' loss has no gradient: was it detached on the way?": slope(own),
            "The own loss has no gradient: was it detached on the way?": slope(theirs),
        }
        through = lambda answer: (
            lambda *given: differentiated(answer, "logits")(**dict(zip(inputs, given)))
        )
        inputs = {**inputs, "logits": z}
        trial("its gradient", inputs, want, rivals, hint, through=through, atol=1e-6)


@question
def dirichlet_mixup(trial: Trial) -> None:
    """Mix k examples with Dirichlet weights, one vector of weights per example."""
    n, k, K = 24, 3, 4
    eye = torch.eye(n, dtype=torch.float64)  # row i of the result holds the weights of mixture i
    y = torch.arange(n) % K
    alpha = trial.number(0.2, 0.5)
    one = F.one_hot(y, K).double()

    def draw(number, part, generator=None):
        inputs = {"x": eye, "labels": y, "num_classes": K, "alpha": alpha, "k": k}
        inputs["generator"] = generator or torch.Generator().manual_seed(number)
        shapes = {"the mixed inputs": [n, n], "the mixed labels": [n, K]}
        changes = ("generator",)
        return trial.tensors(part, inputs, shapes, changes=changes)

    weights, targets = draw(trial.seed, "inputs and labels, mixed with one and the same weights")
    trial.input = "x was the unit matrix, so row i of the mixed x holds the weights of mixture i"
    trial.require((weights > -1e-6).all(), "The weights of a mixture should not be negative.")
    hint = "Weights sum to 1: draw from a Dirichlet distribution, or divide by the sum."
    trial.compare(weights.sum(1), one.sum(1)[0].expand(n), hint=hint)
    hint = "The mixed labels do not sum to 1. λ was drawn for each class on its own? A label is "
    hint += "mixed with the weights of its example's mixture."
    trial.compare(targets.sum(1), one.sum(1)[0].expand(n), hint=hint)
    hint = "The labels were not mixed with the weights of the inputs. λ drawn anew for the labels "
    hint += "(or for every class) belongs to another mixture."
    trial.compare(targets, weights @ one, hint=hint, atol=1e-5)
    again = draw(trial.seed, "the same generator, the same mixtures")
    hint = "The same generator should give the same mixtures. Pass it on to everything that draws "
    hint += "random numbers, and draw from nothing else."
    trial.compare(again, (weights, targets), hint=hint, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(trial.seed)
    part = "one generator for two batches, other mixtures"
    first, second = (draw(0, part, generator)[0].diagonal() for _ in range(2))
    trial.require(
        ((first - second).abs() > 1e-6).double().mean() > 0.5,
        "A second batch got the weights of the first.",
        hint="Draw from the generator, so that it goes on: its seed alone is always the same.",
    )

    part = "k partners, one of them the example itself"
    many = torch.stack([draw(9_000 + 97 * trial.seed + i, part)[0] for i in range(60)])
    trial.input = f"60 draws for {n} examples, alpha = {alpha}, k = {k}"
    used = (many > 1e-9).sum(-1)
    most = int(used.max())
    trial.require(most <= k, f"Up to {most} examples went into one mixture; k is {k}.")
    trial.require(
        used.double().mean() > k - 0.5,
        f"Fewer than k = {k} examples go into most mixtures.",
        hint="Each of the k - 1 partners needs a permutation of its own.",
    )
    own = many.diagonal(dim1=1, dim2=2)  # [draw, example]
    trial.require((own > 0).double().mean() > 0.95, "The example itself is missing in its mixture.")
    most = int((many > 1e-9).sum(1).max())
    hint = "A permutation has every example once; indices drawn one by one do not."
    trial.require(most <= k, f"An example went into {most} mixtures; k is {k}.", hint=hint)
    often = (many > 1e-9).double().mean(0) * (1 - eye)
    trial.require(
        often.max() < 0.5,
        "An example has the same partner in most of the draws.",
        hint="Draw the permutations from the generator, too, anew in every call.",
    )

    trial.begin("one vector of weights per example")
    distinct = sum(len(draws.round(decimals=6).unique()) for draws in own) / len(own)
    trial.require(
        distinct > n / 2,
        "All mixtures of a batch have the same weights.",
        hint="Draw k weights for every example: [n, k].",
    )

    trial.begin("the distribution of the weights")
    # Each partner is the example itself, or another partner, with probability 1/n.  The margins
    # below are five standard errors of 60 n mixtures, or more.
    square, product = ((alpha + c) / (k * (k * alpha + 1)) for c in (1, 0))  # E w², E w w'
    squares = (1 + (k - 1) / n) * square
    squares += ((k - 1) * 2 / n + (k - 1) * (k - 2) / n**2) * product  # E of the own weight's
    mean, mixing = float(own.mean()), float((own * (1 - own)).mean())
    want = (1 + (k - 1) / n) / k
    trial.compare(mean, want, hint="An example's own weight is 1/k on average.", atol=0.05)
    want -= squares
    hint = "The weights are not Dirichlet(α, …, α): E[λ(1-λ)] is off. Gamma(α) variables divided "
    hint += "by their sum are Dirichlet; uniform ones are not. Is α used at all?"
    trial.compare(mixing, want, hint=hint, rtol=0, atol=0.017)
    together, want = (many**2).sum(-1).mean(), k * square + k * (k - 1) / n * product
    hint = "An example's own weight is right; the weights of its partners, all together, are not. "
    hint += "The sum of the squares of the weights is off, so they are not Dirichlet(α, …, α)."
    trial.compare(together, want, hint=hint, rtol=0, atol=0.027)


@question
def shrunk(trial: Trial) -> None:
    """The data on which mixup is empirical risk minimization, up to a perturbation of mean zero."""
    x, one = trial.randn(8, 3) + 2, F.one_hot(torch.arange(8) % 4, 4).double()
    shrink = lambda c, v: v.mean(0) + c * (v - v.mean(0))
    both = lambda c: (shrink(c, x), shrink(c, one))
    # not α = 1, where other formulas are right by chance
    below, above = trial.number(0.2, 0.7), trial.number(1.5, 3.0)
    for part, alpha in (("an α below 1", below), ("an α above 1", above)):
        theta = 0.5 + 4**-alpha / (alpha * beta_function(alpha, alpha))
        to_zero = theta * x, theta * one
        rivals = {
            "The mean of λ is 1/2 for every α; it is the heavier weight, max(λ, 1-λ), whose mean "
            "is needed (5.9).": both(0.5),
            "Shrunk towards zero; the mixtures lie around the mean of the data.": to_zero,
            "The labels were left as they are; they shrink with the inputs.": (both(theta)[0], one),
            "The weight of the data is 1 - ϑ here, it should be ϑ.": both(1 - theta),
            "That is ϑ for α = 1.": both(0.75),
        }
        trial(part, {"x": x, "targets": one, "alpha": alpha}, both(theta), rivals, atol=1e-6)


@experiment("mixup minus none", "test loss", "test error")
def mixup_effect(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How mixup changes the test loss and the test error, under label noise."""
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    end = train(seeds, data, recipe, 300, grid={"alpha": [0.0, 1.0]}).isel(step=0)
    change = end.sel(alpha=1.0) - end.sel(alpha=0.0)
    return change.test_loss.values, change.test_error.values
