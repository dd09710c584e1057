"""Checks of assignment 4: stiffness."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...measure import class_stiffness
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, experiment, plain_number, question, train

# Where results are cosines, or of size 1, single precision is off by some 1e-7 of that size, not
# of each result's own, which may be close to 0.
SINGLE = 1e-6


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
        right, r1, r2 = answer - torch.eye(K, dtype=torch.float64)[:3]
        cos = lambda a, b: a @ b / (a.norm() * b.norm())
        rivals = {
            "That is (4.7), for equal probabilities.": -1 / (K - 1),
            "That is the inner product; the cosine divides by the lengths.": r1 @ r2,
            "One of the two classes is the network's answer; here both are others.": cos(right, r1),
            "That is the cosine of the probabilities; a residual is p - e_y.": 1.0,
        }
        hint = "Write both residuals down. Their product needs Σ p_k² and twice one small "
        hint += "probability."
        inputs = {"K": K, "p": p}
        trial(part, inputs, cos(r1, r2), rivals, hint, through=plain_number, atol=SINGLE)


class _Largest(TorchFunctionMode):
    """The size of the largest tensor that a function makes; what einsum does inside is its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.size = function, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.size = max(self.size, each.numel())
        return result

    def __call__(self, *given: Any) -> Any:
        with self:
            return self.function(*given)


@question
def sequence_gram(trial: Trial) -> None:
    """The Gram matrix of the gradients of a linear layer that sees T positions."""
    for part, n, T, I, O in (
        ("one position", 4, 1, 3, 2),
        ("five positions", 3, 5, 3, 2),
        ("a single example", 1, 3, 2, 4),
        ("a wide layer, without forming gradients", 2, 2, 30, 40),
    ):
        a, d = trial.randn(n, T, I), trial.randn(n, T, O)
        W, c = torch.einsum("nto,nti->noi", d, a).flatten(1), d.sum(1)
        want = W @ W.T + c @ c.T
        pairs = lambda u: torch.einsum("itx,jtx->ijt", u, u)
        equal_positions = ((pairs(a) + 1) * pairs(d)).sum(-1)
        norms = want.diagonal().sqrt()
        rivals = {
            "The bias is missing: it is one more input, which is always 1.": W @ W.T,
            "Only equal positions were paired. The gradient is a sum over positions, so every "
            "position of one example meets every position of the other.": equal_positions,
            "The sums over positions were taken before the products: a product of sums is not a "
            "sum of products.": (a.sum(1) @ a.sum(1).T + 1) * (c @ c.T),
            "The 1 of the bias was added once, not to every pair of positions.": W @ W.T + 1,
            "This is the mean over the positions; the loss's gradient is their sum.": want / T**2,
            "These are cosines; raw inner products are wanted.": want / norms[:, None] / norms,
        }
        watched, inputs = _Largest(trial.answer), {"inputs": a, "deltas": d}
        atol = SINGLE * want.abs().max().item()
        trial(part, inputs, want, rivals, through=lambda _: watched, atol=atol)
        # only where the pairs of positions, products not yet summed, are less than one gradient
        trial.require(
            watched.size < I * O or n * n * T * T * max(I, O) >= I * O,
            f"It formed gradients: a tensor of {watched.size} numbers was made, and the gradient "
            f"of one example has {I} × {O}, without the bias.",
            hint="An inner product of outer products is a product of inner products.",
        )


@question
def class_means(trial: Trial) -> None:
    """Class by class, the mean over pairs of different examples."""
    values = trial.randn(9, 9)
    values = values + values.T
    y = torch.tensor([0, 0, 0, 1, 1, 2, 1, 0, 2])  # class 3 is missing
    y = y[torch.randperm(9, generator=trial.generator)]
    for part, K in (("three classes", 3), ("a class that is missing", 4)):
        one = torch.nn.functional.one_hot(y, K).double()
        size = one.sum(0)
        pairs = size[:, None] * size
        total = one.T @ values @ one
        different = one.T @ (values - values.diagonal().diag()) @ one
        want = different / (pairs - size.diag())
        rivals = {
            "The diagonal was left in: there an example is paired with itself, and stiffness is 1 "
            "whatever the network (4.3).": total / pairs,
            "The diagonal was taken out of the sum, but is still counted in the number of "
            "pairs.": different / pairs,
            "These are sums; divide by the number of pairs.": different,
            "Where there is no pair there is no mean: NaN, not 0.": want.nan_to_num(0.0),
        }
        trial(part, {"values": values, "classes": y, "num_classes": K}, want, rivals, atol=SINGLE)
    small = trial.randn(3, 3)
    small = small + small.T
    mean = small[0, 1:].mean()
    want = torch.stack([mean * torch.nan, mean, mean, small[1, 2]]).view(2, 2)
    inputs = {"values": small, "classes": torch.tensor([0, 1, 1]), "num_classes": 2}
    hint = "A single example has no partner in its class: NaN on the diagonal."
    trial("a class of one example", inputs, want, hint=hint, atol=SINGLE)


@question
def cosines(trial: Trial) -> None:
    """Cosine stiffness from raw inner products."""
    g = trial.randn(5, 3)
    gram, norms = g @ g.T, g.norm(dim=1)
    unit = g / norms[:, None]
    rivals = {
        "Divided by the squared lengths: the diagonal of the Gram matrix holds ‖g‖², its root is "
        "needed.": gram / norms[:, None] ** 2 / norms**2,
        "Divided by one of the two lengths only.": gram / norms[:, None],
        "Divided by one squared length: a cosine is symmetric.": gram / norms[:, None] ** 2,
        "Divided by the largest product.": gram / gram.abs().max(),
    }
    trial("five gradients", {"gram": gram}, unit @ unit.T, rivals, atol=SINGLE)
    g[1] = unit[1] = 0
    hint = "A step on an example without a gradient changes nothing: its cosines are 0, on the "
    hint += "diagonal too. Divide by something that is not zero."
    part = "an example whose gradient is zero"
    trial(part, {"gram": g @ g.T}, unit @ unit.T, hint=hint, atol=SINGLE)
    tiny = 1e-8 * trial.randn(4, 3)
    unit = tiny / tiny.norm(dim=1, keepdim=True)
    hint = "Small is not zero: a constant added to the denominator changes these cosines."
    part = "gradients of length 1e-8"
    trial(part, {"gram": tiny @ tiny.T}, unit @ unit.T, hint=hint, atol=SINGLE)


@experiment("random labels minus true labels", "before training", "after training", atol=5e-3)
def stiffness_effect(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How random labels change the stiffness within classes, before and after training."""

    def within(noise):
        return train(
            seeds,
            [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds],
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            100,
            evaluate_at=[0, 100],
            instruments={"stiffness": partial(class_stiffness, num_classes=10)},
        ).stiffness_within

    before, after = (within(0.9) - within(0.0)).transpose("step", "seed").values
    return before, after
