"""Checks of assignment 4: stiffness."""

from functools import lru_cache, partial
from typing import Any

import torch

from ...measure import class_stiffness
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


@question
def one_answer_cosine(trial: Trial) -> None:
    """The cosine of the residuals of two classes where the network answers with a third."""
    for part, K, p in (
        ("three classes", 3, trial.number(0.5, 0.9)),
        ("ten classes", 10, trial.number(0.3, 0.9)),
        ("ten classes, equal probabilities", 10, 0.1),
        ("certain of its answer", 10, 1.0),
    ):
        answer = torch.full((K,), (1 - p) / (K - 1), dtype=torch.float64)
        answer[0] = p
        r1, r2 = answer.clone(), answer.clone()
        r1[1] -= 1
        r2[2] -= 1
        cos = lambda a, b: a @ b / (a.norm() * b.norm())
        right = answer.clone()
        right[0] -= 1
        trial(
            part,
            {"K": K, "p": p},
            want=cos(r1, r2),
            rtol=1e-8,
            rivals={
                "That is (4.7), for equal probabilities.": -1 / (K - 1),
                "That is the inner product; the cosine divides by the lengths.": r1 @ r2,
                "One of the two classes is the network's answer; here both are others.": cos(
                    right, r1
                ),
                "That is the cosine of the probabilities with each other; a residual is p - e_y.": 1.0,
            },
            hint="Write both residuals down. Their product needs Σ p_k² and twice one small "
            "probability.",
        )


@question
def sequence_gram(trial: Trial) -> None:
    """The Gram matrix of the gradients of a linear layer that sees T positions."""
    for part, n, T, I, O in (
        ("one position", 4, 1, 3, 2),
        ("five positions", 3, 5, 3, 2),
        ("a single example", 1, 3, 2, 4),
    ):
        a, d = trial.randn(n, T, I), trial.randn(n, T, O)
        W, c = torch.einsum("nto,nti->noi", d, a).flatten(1), d.sum(1)
        all_pairs = torch.einsum("isx,jtx->isjt", a, a), torch.einsum("isx,jtx->isjt", d, d)
        equal_positions = torch.einsum("itx,jtx->ijt", a, a), torch.einsum("itx,jtx->ijt", d, d)
        want = W @ W.T + c @ c.T
        trial(
            part,
            {"inputs": a, "deltas": d},
            want=want,
            rtol=1e-8,
            rivals={
                "The bias is missing: it is one more input, which is always 1.": W @ W.T,
                "Only equal positions were paired. The gradient is a sum over positions, so every "
                "position of one example meets every position of the other.": (
                    (equal_positions[0] + 1) * equal_positions[1]
                ).sum(-1),
                "The sums over positions were taken before the products: a product of sums is not a "
                "sum of products.": (a.sum(1) @ a.sum(1).T + 1) * (c @ c.T),
                "The 1 of the bias was added once, not to every pair of positions.": (
                    all_pairs[0] * all_pairs[1]
                ).sum((1, 3))
                + 1,
                "This is the mean over the positions; the loss's gradient is their sum.": want
                / T**2,
                "These are cosines; raw inner products are wanted.": want
                / (want.diagonal()[:, None] * want.diagonal()).sqrt(),
            },
        )


@question
def class_means(trial: Trial) -> None:
    """Class by class, the mean over pairs of different examples."""
    n, K = 9, 4
    values = trial.randn(n, n)
    values = values + values.T
    y = torch.tensor([0, 0, 0, 1, 1, 2, 1, 0, 2])  # class 3 is missing
    y = y[torch.randperm(n, generator=trial.generator)]
    one = torch.nn.functional.one_hot(y, K).double()
    size = one.sum(0)
    off_diagonal = values - values.diagonal().diag()
    total, pairs = one.T @ values @ one, size[:, None] * size
    want = one.T @ off_diagonal @ one / (pairs - size.diag())
    for part, v, c, wanted, kept in (
        ("three classes", values, y, want[:3, :3], slice(3)),
        ("a class that is missing", values, y, want, slice(4)),
    ):
        inputs = {"values": v, "classes": c, "num_classes": len(wanted)}
        trial(
            part,
            inputs,
            want=wanted,
            rivals={
                "The diagonal was left in: there an example is paired with itself, and stiffness is 1 "
                "whatever the network (4.3).": (total / pairs)[kept, kept],
                "The diagonal was taken out of the sum, but is still counted in the number of pairs.": (
                    one.T @ off_diagonal @ one / pairs
                )[kept, kept],
                "These are sums; divide by the number of pairs.": (one.T @ off_diagonal @ one)[
                    kept, kept
                ],
                "Where there is no pair there is no mean: NaN, not 0.": want.nan_to_num(0.0)[
                    kept, kept
                ],
            },
        )
    lonely = torch.tensor([0, 1, 1])
    small = trial.randn(3, 3)
    small = small + small.T
    mean = (small[0, 1] + small[0, 2]) / 2
    wanted = torch.stack([torch.stack([mean * torch.nan, mean]), torch.stack([mean, small[1, 2]])])
    trial(
        "a class of one example",
        {"values": small, "classes": lonely, "num_classes": 2},
        want=wanted,
        hint="A single example has no partner in its class: NaN on the diagonal.",
    )


@question
def cosines(trial: Trial) -> None:
    """Cosine stiffness from raw inner products."""
    g = trial.randn(5, 3)
    unit = g / g.norm(dim=1, keepdim=True)
    norms = g.norm(dim=1)
    trial(
        "five gradients",
        {"gram": g @ g.T},
        want=unit @ unit.T,
        rivals={
            "Divided by the squared lengths: the diagonal of the Gram matrix holds ‖g‖², its root is "
            "needed.": (g @ g.T) / (norms[:, None] * norms) ** 2,
            "Divided by one of the two lengths only.": (g @ g.T) / norms[:, None],
            "Divided by one of the two squared lengths: a cosine is symmetric.": (g @ g.T)
            / norms[:, None] ** 2,
            "Divided by the largest product.": (g @ g.T) / (g @ g.T).abs().max(),
        },
    )
    g[1] = 0
    unit[1] = 0
    trial(
        "an example whose gradient is zero",
        {"gram": g @ g.T},
        want=unit @ unit.T,
        hint="A step "
        "on an example without a gradient changes nothing: its cosines are 0, on the diagonal "
        "too. Divide by something that is not zero.",
    )
    tiny = 1e-8 * trial.randn(4, 3)
    unit = tiny / tiny.norm(dim=1, keepdim=True)
    trial(
        "gradients of length 1e-8",
        {"gram": tiny @ tiny.T},
        want=unit @ unit.T,
        hint="Small is not zero: a constant added to the denominator changes these cosines.",
    )


@lru_cache
def _stiffness_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    def within(noise):
        data = [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds]
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            steps=100,
            seeds=list(seeds),
            evaluate_at=[0, 100],
            dtype=torch.float64,
            instruments={"stiffness": partial(class_stiffness, num_classes=10)},
        )
        return runs.stiffness_within

    change = within(0.9) - within(0.0)
    steps = {"before training": 0, "after training": 100}
    return {name: change.sel(step=step).values for name, step in steps.items()}


@question(seconds=120)
def stiffness_effect(trial: Trial) -> None:
    """How random labels change the stiffness within classes, before and after training."""
    trial.experiment(
        _stiffness_effect,
        atol=5e-3,
        rivals={
            "The difference is the wrong way round: random labels minus true labels.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
