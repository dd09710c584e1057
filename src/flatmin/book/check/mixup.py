"""Checks of assignment 5: mixup."""

from functools import lru_cache
from typing import Any

import torch
from scipy.special import beta as beta_function
from torch.nn import functional as F

from ...batch import Mixup
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


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
        trial(
            part,
            {"alphas": alpha},
            want=alpha * (A - alpha) / (A * (A + 1)),
            rivals={
                "That is the variance of λ; E[λ(1-λ)] = E[λ] - E[λ]² - Var λ.": alpha
                * (A - alpha)
                / (A**2 * (A + 1)),
                "That is E[λ](1 - E[λ]), as if λ were its mean.": alpha * (A - alpha) / A**2,
                "That is E[λ²].": alpha * (alpha + 1) / (A * (A + 1)),
                "That is (5.7), for two equal weights.": alpha / (2 * (2 * alpha + 1)),
                "That is the mean of λ.": alpha / A,
            },
            hint="One weight of a Dirichlet distribution is Beta(α_j, A - α_j), with A the sum.",
        )


@question
def mixed_loss(trial: Trial) -> None:
    """The loss on mixed labels from two ordinary losses, with one λ per example."""
    z, y = trial.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    partners = torch.arange(6).roll(-1)  # all of other classes
    equal, each = torch.full((6,), 0.3, dtype=torch.float64), trial.rand(6)
    one = F.one_hot(y, 4).double()
    soft = lambda lam: lam[:, None] * one + (1 - lam)[:, None] * one[partners]
    ce = lambda target: F.cross_entropy(z, target)
    for part, lam in (("the same λ for all", equal), ("one λ per example", each)):
        inputs = {"logits": z, "labels": y, "partners": partners, "lam": lam}
        trial(
            part,
            inputs,
            want=ce(soft(lam)),
            rivals={
                "λ and 1 - λ are exchanged: λ is the weight of the example's own label.": ce(
                    soft(1 - lam)
                ),
                "The mean over the batch was taken before the weights came in. With one λ an example "
                "take reduction='none' first.": lam.mean() * ce(y)
                + (1 - lam.mean()) * ce(y[partners]),
                "The partners play no part: this is the loss on the own labels.": ce(y),
                "The logits were permuted with the labels: then it is the same loss twice.": (
                    lam * F.cross_entropy(z, y, reduction="none")
                    + (1 - lam) * F.cross_entropy(z[partners], y[partners], reduction="none")
                ).mean(),
                "One number was wanted, the mean over the batch.": F.cross_entropy(
                    z, soft(lam), reduction="none"
                ),
            },
        )


@question(seconds=30)
def dirichlet_mixup(trial: Trial) -> None:
    """Mix k examples with Dirichlet weights, one vector of weights per example."""
    n, k, K = 24, 3, 4
    eye = torch.eye(n, dtype=torch.float64)  # row i of the result holds the weights of mixture i
    y = torch.arange(n) % K
    alpha = trial.number(0.2, 0.5)
    one = F.one_hot(y, K).double()

    def draw(number, part, alpha=alpha):
        inputs = {
            "x": eye,
            "labels": y,
            "num_classes": K,
            "alpha": alpha,
            "k": k,
            "generator": torch.Generator().manual_seed(number),
        }
        return trial.call(part, inputs, changes=("generator",))

    got = draw(trial.seed, "inputs and labels, mixed with one and the same weights")
    trial.require(
        isinstance(got, (tuple, list)) and len(got) == 2,
        "Two tensors should have come back: the mixed inputs and the mixed labels.",
    )
    for value, shape in zip(got, ([n, n], [n, K])):
        trial.require(
            isinstance(value, torch.Tensor) and list(value.shape) == shape,
            f"A tensor of shape {shape} should be among what came back.",
        )
    weights, targets = got[0].double(), got[1].double()
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)
    shown = "x was the unit matrix, so row i of the mixed x holds the weights of mixture i"
    trial.require(
        (weights > -1e-6).all() and close(weights.sum(1), torch.ones(n).double()),
        "The weights of a mixture should not be negative, and sum to 1.",
        input=shown,
        got=f"sums {weights.sum(1)[:4].tolist()} …",
        hint="Draw from a Dirichlet distribution, or divide by the sum.",
    )
    sums = targets.sum(1)
    trial.require(
        close(sums, torch.ones(n).double()),
        "The mixed labels do not sum to 1.",
        input=shown,
        got=f"sums {sums[:4].tolist()} …",
        hint="λ was drawn for each class on its own? A label is mixed with the weights "
        "of its example's mixture.",
    )
    wanted = weights @ one
    trial.require(
        close(targets, wanted),
        "The labels were not mixed with the weights of the inputs.",
        input=shown,
        got=f"label 0: {targets[0].tolist()}",
        wanted=f"label 0: {wanted[0].tolist()}",
        hint="The same weights and the same partners, for inputs and labels. λ drawn "
        "anew for the labels (or for every class) belongs to another "
        "mixture.",
    )
    again = draw(trial.seed, "the same generator, the same mixtures")
    trial.require(
        torch.equal(again[0], got[0]) and torch.equal(again[1], got[1]),
        "The same generator should give the same mixtures.",
        hint="Pass the generator on to everything that draws random numbers, and draw "
        "from nothing else.",
    )

    part = "k partners, one of them the example itself"
    many = torch.stack([draw(9_000 + 97 * trial.seed + i, part)[0].double() for i in range(60)])
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
    trial.begin("one vector of weights per example")
    distinct = sum(len(draws.round(decimals=6).unique()) for draws in own) / len(own)
    trial.require(
        distinct > n / 2,
        "All mixtures of a batch have the same weights.",
        hint="Draw k weights for every example: [n, k].",
    )
    trial.begin("the distribution of the weights")
    # a partner is the example itself with probability 2/n: within the margins below
    mean, mixing = float(own.mean()), float((own * (1 - own)).mean())
    A = k * alpha
    want = alpha * (A - alpha) / (A * (A + 1))
    trial.require(
        abs(mean - 1 / k) < 0.06,
        "The example's own weight should be 1/k on average.",
        got=f"{mean:.3f} over 1,440 mixtures",
        wanted=f"about {1 / k:.3f}",
    )
    trial.require(
        abs(mixing - want) < 0.022,
        "The weights are not Dirichlet(α, …, α): E[λ(1-λ)] is off.",
        got=f"{mixing:.3f} over 1,440 mixtures",
        wanted=f"about {want:.3f} for α = {alpha}",
        hint="Gamma(α) variables divided by their sum are Dirichlet; uniform ones are "
        "not. Is α used at all?",
    )


@question
def shrunk(trial: Trial) -> None:
    """The data on which mixup is empirical risk minimization, up to a perturbation of mean zero."""
    x, one = trial.randn(8, 3) + 2, F.one_hot(torch.arange(8) % 4, 4).double()
    shrink = lambda c, v: v.mean(0) + c * (v - v.mean(0))
    both = lambda c: (shrink(c, x), shrink(c, one))
    for part, alpha in (("α = 1", 1.0), ("another α", trial.number(0.2, 0.7))):
        theta = 0.5 + 4**-alpha / (alpha * beta_function(alpha, alpha))
        trial(
            part,
            {"x": x, "targets": one, "alpha": alpha},
            want=both(theta),
            rivals={
                "The mean of λ is 1/2 for every α; it is the heavier weight, max(λ, 1-λ), whose mean "
                "is needed (5.9).": both(0.5),
                "Shrunk towards zero; the mixtures lie around the mean of the data.": (
                    theta * x,
                    theta * one,
                ),
                "The labels were left as they are; they shrink with the inputs.": (
                    shrink(theta, x),
                    one,
                ),
                "The weight of the data is 1 - ϑ here, it should be ϑ.": both(1 - theta),
                "That is ϑ for α = 1.": both(0.75),
            },
        )


@lru_cache
def _mixup_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    end = fit(
        lambda: MLP(40, 32, 10),
        data,
        recipe,
        steps=300,
        seeds=list(seeds),
        grid={"alpha": [0.0, 1.0]},
        evaluate_at=[300],
        dtype=torch.float64,
    )
    end = end.isel(step=0)
    change = end.sel(alpha=1.0) - end.sel(alpha=0.0)
    return {"test loss": change.test_loss.values, "test error": change.test_error.values}


@question(seconds=120)
def mixup_effect(trial: Trial) -> None:
    """How mixup changes the test loss and the test error, under label noise."""
    trial.experiment(
        _mixup_effect,
        atol=0.01,
        rivals={
            "The difference is the wrong way round: mixup minus none.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
