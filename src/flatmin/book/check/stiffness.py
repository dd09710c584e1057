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
        want, p2, small = cos(r1, r2), answer @ answer, (1 - p) / (K - 1)  # p2: Σ p_k²
        miscounted = [(x - 2 * small) / (x - 2 * small + 1) for x in (p2 + small**2, p2 - small**2)]
        length_with_p = [(p2 - 2 * x) / (p2 - 2 * p + 1) for x in (small, p)]
        rivals = {
            "That is (4.7), for equal probabilities.": -1 / (K - 1),
            "That is the inner product; the cosine divides by the lengths.": r1 @ r2,
            "Divided by the length of one residual only. The product of both is ‖r‖², without a "
            "root: they are equally long.": r1 @ r2 / r1.norm(),
            "Divided by ‖r‖² for each of the two; a length is its root.": want / (r1 @ r1),
            "Divided by Σ p_k², the lengths of the probabilities; those of the residuals are "
            "wanted.": (r1 @ r2) / p2,
            "In Σ p_k² there are K - 1 small probabilities.": miscounted,
            "‖p - e_y‖² is Σ p_k² - 2 p_y + 1, and here p_y is the small probability, not "
            "p.": length_with_p,
            "The sign is wrong: both residuals are p - e_y.": -want,
            "That is the distance, 1 - cos; the cosine is wanted.": 1 - want,
            "The small probabilities count, too, unless p → 1.": [0.5, p**2 / (p**2 + 1)],
            "One of the two classes is the network's answer; here both are others.": cos(right, r1),
            "That is the cosine of the probabilities, or of one residual with itself. A residual "
            "is p - e_y, and the two classes differ.": 1.0,
        }
        hint = "Write both residuals down. Their product needs Σ p_k² and twice one small "
        hint += "probability."
        inputs = {"K": K, "p": p}
        trial(part, inputs, want, rivals, hint, through=plain_number, atol=SINGLE)


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
        A, D = (torch.einsum("itx,jsx->itjs", u, u) for u in (a, d))  # all pairs of positions
        every = (A + 1) * D
        equal = lambda u: u.diagonal(dim1=1, dim2=3).sum(-1)
        vectors = lambda u, v, one=1: (u @ u.T + one) * (v @ v.T)  # (4.6)
        sums_first = [vectors(a.sum(1), c), vectors(a.sum(1), c, T**2)]
        sums_first += [vectors(a.mean(1), c), vectors(a.mean(1), d.mean(1))]
        norms = want.diagonal().sqrt()
        rivals = {
            "The bias is missing: it is one more input, which is always 1.": W @ W.T,
            "Only equal positions were paired, for the weights or for the bias. The gradient is a "
            "sum over positions, so every position of one example meets every position of the "
            "other.": [equal(every), equal(A * D) + c @ c.T, W @ W.T + equal(D)],
            "The sums or means over positions were taken before the products: a product of sums is "
            "not a sum of products.": sums_first,
            "The deltas are missing: each pair of positions counts by the product of its deltas, "
            "too.": [(A + 1).sum((1, 3)), A.sum((1, 3))],
            "The positions were strung together to one long input. There is one W for all "
            "positions, not one for each.": vectors(a.flatten(1), d.flatten(1)),
            "Only one position was looked at.": [vectors(a[:, t], d[:, t]) for t in (0, -1)],
            "These are the pairs of positions; a pair of examples has the sum over "
            "its own.": every.reshape(n * T, n * T),
            "Flattened, the positions of one example follow each other: that is "
            ".view(n, T, n, T).": every.reshape(T, n, T, n).sum((0, 2)),
            "Each example met only itself; all pairs of examples are wanted.": norms**2,
            "The 1 of the bias was added once, not to every pair of positions.": W @ W.T + 1,
            "The bias has the input 1, so 1 is added to the products of the inputs, not to those "
            "of the deltas.": [(u * (D + 1)).sum((1, 3)) for u in (A, A + 1)],
            "This is the mean over the positions; the loss's gradient is their sum.": [
                want / T**power for power in (1, 2)
            ],
            "Divided by the number of examples; each gradient is of one example's loss.": [
                want / n**power for power in (1, 2)
            ],
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
    i, j = (y == 0).nonzero()[:2, 0]
    values[i, j] = values[j, i] = 0
    for part, K in (("three classes", 3), ("a class that is missing", 4)):
        one = torch.nn.functional.one_hot(y, K).double()
        size = one.sum(0)
        pairs = size[:, None] * size
        total = one.T @ values @ one
        different = one.T @ (values - values.diagonal().diag()) @ one
        want = different / (pairs - size.diag())
        same, equal = torch.eye(K, dtype=torch.bool), y[:, None] == y
        off = ~torch.eye(9, dtype=torch.bool)
        before = torch.ones_like(values).triu(1)
        ordered = (one.T @ (before * values) @ one) / (one.T @ before @ one)
        mean, d, no_mean = values[off].mean(), want.diagonal(), torch.nan * want
        two_means = torch.where(same, values[equal & off].mean(), values[~equal].mean())
        rows = [values[y == k].mean() for k in range(K)]
        rivals = {
            "The diagonal was left in: there an example is paired with itself, and (4.3) leaves "
            "such pairs out.": [total / pairs, total / (pairs - size.diag())],
            "The diagonal was taken out of the sum, but is still counted in the number of "
            "pairs.": different / pairs,
            "Every 0 was left out. A value may be 0 for two different examples, too; leave out the "
            "diagonal by its place.": different / (one.T @ (off & (values != 0)).double() @ one),
            "Ones were taken out of the sum, not what is on the diagonal of `values`.": (
                total - size.diag()
            )
            / (pairs - size.diag()),
            "These are sums; divide by the number of pairs.": [different, total],
            "Divided by the number of all pairs; each pair of classes has a number of its own.": [
                different / number for number in (9 * 9, 9 * 8)
            ],
            "Divided by the number of examples of one class, not by that of pairs, n_a n_b.": [
                u / v for u in (different, total) for v in (size, size[:, None])
            ],
            "n_a (n_a - 1) is the number of pairs within a class; between two classes it is "
            "n_a n_b.": [different / (pairs - v) for v in (size, size[:, None])],
            "(i, j) and (j, i) are two pairs: take both in the sum and in their number, or one in "
            "both.": [2 * want, want / 2, want + d.diag(), want - d.diag() / 2],
            "Only pairs with i < j were taken; in another class i may come after j.": ordered,
            "Half of the matrix is missing; the mean of classes b and a is that of a and b.": [
                want.triu(),
                torch.where(same.cumsum(1) > 0, want, no_mean),
            ],
            "Each pair of classes has a mean of its own. Here all have the same, or one within and "
            "one between classes.": [two_means, mean, mean.expand(K, K)],
            "Pairs of different classes have a mean, too: [num_classes, num_classes] numbers are "
            "wanted.": [d, d.diag(), torch.where(same, want, no_mean), torch.stack(rows)],
            "Pairs within a class have a mean, too: only i = j is left out. A mean over a NaN is "
            "NaN.": [torch.where(same, x, want) for x in (no_mean, 0.0)],
            "Where there is no pair there is no mean: NaN, not 0.": want.nan_to_num(0.0),
        }
        hint = "Each of the num_classes classes has a row and a column: NaN if it has no example."
        inputs = {"values": values, "classes": y, "num_classes": K}
        trial(part, inputs, want, rivals, hint if K > 3 else "", atol=SINGLE)
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
    want, rows = unit @ unit.T, torch.nn.functional.normalize(gram, dim=1)
    rivals = {
        "Divided by the squared lengths: the diagonal of the Gram matrix holds ‖g‖², its root is "
        "needed.": gram / norms[:, None] ** 2 / norms**2,
        "The root was taken twice: the diagonal holds ‖g‖², its root is the length.": want
        * torch.outer(norms, norms).sqrt(),
        "Divided by one of the two lengths only.": [gram / norms[:, None], gram / norms],
        "Divided by one squared length: a cosine is symmetric.": [
            gram / size**2 for size in (norms[:, None], norms)
        ],
        "All were divided by one number; each pair has two lengths of its own.": [
            gram / size for size in (gram.abs().max(), gram.norm(), gram.trace())
        ],
        "The rows of `gram` are not the gradients, and their lengths not the gradients' lengths: "
        "‖g_i‖² is on the diagonal.": [rows, rows.T, rows @ rows.T, rows / gram.norm(dim=1)],
        "The sign was lost: a cosine may be negative.": [want**2, want.abs()],
        "These are the signs; the cosines are wanted.": gram.sign(),
        "The diagonal belongs to it: a gradient's cosine with itself is 1.": want
        - torch.eye(5, dtype=torch.float64),
    }
    hint = "The cosine is g_i · g_j / (‖g_i‖ ‖g_j‖), and ‖g_i‖² is on the diagonal."
    trial("five gradients", {"gram": gram}, want, rivals, hint, atol=SINGLE)
    g[1] = unit[1] = 0
    hint = "A step on an example without a gradient changes nothing: its cosines are 0, on the "
    hint += "diagonal too. Divide by something that is not zero."
    part = "an example whose gradient is zero"
    trial(part, {"gram": g @ g.T}, unit @ unit.T, hint=hint, atol=SINGLE)
    tiny = 1e-9 * trial.randn(4, 3)
    unit = tiny / tiny.norm(dim=1, keepdim=True)
    hint = "Small is not zero: a constant added to the denominator, or a lower bound on it, "
    hint += "changes these cosines."
    part = "gradients of length 1e-9"
    trial(part, {"gram": tiny @ tiny.T}, unit @ unit.T, hint=hint, atol=SINGLE)


@experiment("random labels minus true labels", before_training=1e-4, after_training=1e-4)
def stiffness_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    """How random labels change the stiffness within classes, before and after training."""

    def measured(noise):
        return train(
            seeds,
            [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds],
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            100,
            evaluate_at=[0, 100],
            instruments={"stiffness": partial(class_stiffness, num_classes=10)},
        ).data

    change = measured(0.9) - measured(0.0)
    return {
        f"{when} training{which}": change[f"stiffness_{name}"].sel(step=step).values
        for name, which in (("within", ""), ("between", ", between classes"))
        for step, when in ((0, "before"), (100, "after"))
    }
