"""Checks of assignment 5: mixup."""

import warnings
from typing import Any

import torch
from scipy.special import beta as beta_function
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...batch import Mixup
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import (
    ERROR,
    LOSS,
    Mistake,
    Trial,
    by_name,
    differentiated,
    experiment,
    question,
    train,
)


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
        k, equal = len(alpha), alpha.mean().expand(len(alpha))
        rivals = {
            "That is the variance of λ; E[λ(1-λ)] = E[λ] - E[λ]² - Var λ.": want / A,
            "E[λ²] is Var λ + E[λ]², not the variance alone.": mean - want / A,
            "That is E[λ](1 - E[λ]), as if λ were its mean.": mean * (1 - mean),
            "That is E[λ²].": mean * (alpha + 1) / (A + 1),
            "That is (5.7), for two equal weights.": alpha / (2 * (2 * alpha + 1)),
            "That is for k equal weights; here each has an α of its own.": [
                (k - 1) * each / (k * (k * each + 1)) for each in (alpha, equal)
            ],
            "That is the mean of λ.": mean,
            "A factor 2 is off.": [want / 2, 2 * want],
            "The variance was subtracted twice.": want - want / A,
            "A number for each weight is wanted, not their sum or mean.": [want.sum(), want.mean()],
        }
        hint = "One weight of a Dirichlet distribution is Beta(α_j, A - α_j), with A the sum."
        trial(part, {"alphas": alpha}, want, rivals, hint)


class _SoftLabels(TorchFunctionMode):
    """Notes whether a tensor holds one of these mixed labels as a row."""

    def __init__(self, soft: Tensor) -> None:
        super().__init__()
        self.soft, self.seen = soft, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for each in (result, *args, *kwargs.values()):  # an argument may be filled in place
            if isinstance(each, Tensor) and each.shape[-1:] == self.soft.shape[-1:]:
                rows = each.detach().double()[..., None, :]
                try:
                    with warnings.catch_warnings(action="ignore"):  # isclose is slow inside vmap
                        self.seen |= bool(torch.isclose(rows, self.soft, atol=1e-6).all(-1).any())
                except RuntimeError:
                    pass  # inside vmap, where no value can be read
        return result


@question
def mixed_loss(trial: Trial) -> None:
    """The loss on mixed labels from two ordinary losses, with one λ per example."""
    n, K = 6, 7
    z, y = trial.randn(n, K), torch.tensor([2, 0, 6, 1, 5, 3])
    partners = torch.arange(n).roll(-1)
    equal, each = torch.full((n,), 0.3, dtype=torch.float64), 0.1 + 0.8 * trial.rand(n)
    loss = lambda logits, labels: F.cross_entropy(logits, labels, reduction="none")
    nll = lambda values, labels: F.nll_loss(values, labels, reduction="none")
    own, theirs = loss(z, y), loss(z, y[partners])
    one = F.one_hot(y, K).double()
    for part, lam in (("the same λ for all", equal), ("one λ per example", each)):
        rest = 1 - lam
        weighted = lambda a, b, own=own, theirs=theirs: a * own + b * theirs
        losses, one_by_one = weighted(lam, rest), (own.mean(), theirs.mean())
        both = lambda f, values: weighted(lam, rest, f(values, y), f(values, y[partners]))
        z_mixed = weighted(lam[:, None], rest[:, None], z, z[partners])
        each_loss = {
            "λ and 1 - λ are exchanged, or max(λ, 1-λ) was taken: λ is the weight of the example's "
            "own label.": [weighted(rest, lam)],
            "The means over the batch were taken before the weights came in, or every λ met every "
            "loss. With one λ an example take reduction='none' first.": [
                weighted(lam, rest, *one_by_one)
            ],
            "The partners play no part: this is the loss on the own labels. Or the logits were "
            "permuted with the labels: then it is the same loss twice.": [
                own,
                weighted(lam, rest, own, own[partners]),
            ],
            "Each example has only one label here, its partner's or that of the larger weight; "
            "both count.": [theirs, torch.where(lam > 0.5, own, theirs)],
            "The logits were permuted in place of the labels, or the permutation was inverted.": [
                weighted(lam, rest, own, loss(z[partners], y))
            ],
            "The logits were mixed; they are those of the mixed inputs already.": [
                both(loss, z_mixed),
                loss(z_mixed, y),
            ],
            "The partners were taken for labels; theirs are labels[partners].": [
                weighted(lam, rest, own, loss(z, partners))
            ],
            "λ comes in twice; the weights are λ and 1 - λ, no squares.": [
                weighted(lam**2, other) for other in (rest**2, 1 - lam**2)
            ],
            "λ plays no part, or it cancels: divide by n, not by the sum of λ.": [
                weighted(1, 1),
                weighted(0.5, 0.5),
            ],
            "One λ was taken for all examples; each has its own.": [weighted(lam[0], rest[0])],
            "λ is that of the mixture: the partner's label has 1 - λ, not 1 - lam[partners].": [
                weighted(lam, rest[partners])
            ],
            "The weight of the partner's label is 1 - λ.": [
                weighted(lam, other) for other in (0, 1, lam, -rest)
            ],
            "cross_entropy takes logits, nll_loss takes their log_softmax over the classes.": [
                both(loss, z.softmax(1)),
                *(both(nll, values) for values in (z, z.softmax(1), z.log_softmax(0))),
            ],
            "The sign is wrong: a cross-entropy is minus a logarithm.": [-losses],
        }
        rivals: dict[str, Any] = {
            mistake: [wrong.mean() for wrong in each] for mistake, each in each_loss.items()
        }
        rivals["One number was wanted, the mean over the batch."] = [
            losses,
            losses.sum(),
            weighted(lam, rest, *one_by_one),
        ]
        hint = "By (5.6) the loss is λ times one ordinary loss plus 1 - λ times another."
        inputs = {"logits": z, "labels": y, "partners": partners, "lam": lam}
        with _SoftLabels(weighted(lam[:, None], rest[:, None], one, one[partners])) as labels:
            got = trial.call(part, inputs)
        trial.compare(got, losses.mean(), rivals, hint)
        trial.require(not labels.seen, "A soft label was made; none is needed.", hint=hint)
    if isinstance(got, Tensor):  # a number or an array is right, and has no gradient
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

    def draw(number, part, generator=None, k=k, K=K):
        inputs = {"x": eye, "labels": y, "num_classes": K, "alpha": alpha, "k": k}
        inputs["generator"] = generator or torch.Generator().manual_seed(number)
        shapes = {"the mixed inputs": [n, n], "the mixed labels": [n, K]}
        changes = ("generator",)
        try:
            return trial.tensors(part, inputs, shapes, changes=changes)
        except Mistake as mistake:
            if "of shape [" in str(mistake):
                hint = (
                    "The inputs come first, then the labels. F.one_hot(labels, num_classes) has a "
                )
                mistake.lines["hint"] = (
                    hint + "column for every class, also for one without examples."
                )
            raise

    weights, targets = draw(trial.seed, "inputs and labels, mixed with one and the same weights")
    trial.input = "x was the unit matrix, so row i of the mixed x holds the weights of mixture i"
    hint = "A partner gives its input as well as its label: both are permuted in the same way."
    moved = not torch.allclose(weights, eye, atol=1e-5)
    trial.require(moved, "The inputs came back as they were.", hint=hint)
    trial.require((weights > -1e-6).all(), "The weights of a mixture should not be negative.")
    hint = "The k weights of a mixture sum to 1, and are the same for all features: draw from a "
    hint += "Dirichlet distribution, or divide by the sum of the k. They stay with their mixture, "
    hint += "and are not permuted with the partners."
    trial.compare(weights.sum(1), one.sum(1), hint=hint)
    hint = "The mixed labels do not sum to 1. λ was drawn for each class on its own, or comes in "
    hint += "twice? A label is mixed with the weights of its example's mixture."
    trial.compare(targets.sum(1), one.sum(1), hint=hint)
    rivals = {
        "The labels are the examples' own; they are mixed with those of the partners, like the "
        "inputs.": one,
        "A mixture has one label here, that of its largest weight; a mixed label has all.": [
            one[weights.argmax(1)],
            F.one_hot((weights @ one).argmax(1), K),
        ],
    }
    hint = "The labels were not mixed with the weights of the inputs. λ drawn anew for the labels "
    hint += "(or for every class) belongs to another mixture, and so does a permutation."
    trial.compare(targets, weights @ one, rivals, hint, atol=1e-5)
    trial.begin("one vector of weights per example")
    trial.require(
        len(weights.sort(1).values.round(decimals=6).unique(dim=0)) > n / 2,
        "All mixtures of a batch have the same weights.",
        hint="Draw k weights for every example: [n, k].",
    )
    again = draw(trial.seed, "the same generator, the same mixtures")
    hint = "The same generator should give the same mixtures. Pass it on to everything that draws "
    hint += "random numbers, and draw from nothing else."
    trial.compare(again, (weights, targets), hint=hint, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(trial.seed)
    part = "one generator for two batches, other mixtures"
    first, second = (draw(0, part, generator)[0].sort(1).values for _ in range(2))
    trial.require(
        ((first - second).abs() > 1e-6).any(1).double().mean() > 0.5,
        "A second batch got the weights of the first.",
        hint="Draw from the generator, so that it goes on: its seed alone is always the same.",
    )

    part = "k partners, one of them the example itself"
    many = torch.stack([draw(9_000 + 97 * trial.seed + i, part)[0] for i in range(60)])
    trial.input = f"60 draws for {n} examples, alpha = {alpha}, k = {k}"
    used = (many > 1e-15).sum(-1)
    most, hint = int(used.max()), "The example itself is one of the k."
    trial.require(most <= k, f"Up to {most} examples went into one mixture; k is {k}.", hint=hint)
    trial.require(
        used.double().mean() > k - 0.7,
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

    trial.begin("the distribution of the weights")
    # Each partner is the example itself, or another partner, with probability 1/n.  The margins
    # below are five standard errors of 60 n mixtures, or more.
    square, product = ((alpha + c) / (k * (k * alpha + 1)) for c in (1, 0))  # E w², E w w'
    squares = (1 + (k - 1) / n) * square
    squares += ((k - 1) * 2 / n + (k - 1) * (k - 2) / n**2) * product  # E of the own weight's
    mean, mixing = float(own.mean()), float((own * (1 - own)).mean())
    want = (1 + (k - 1) / n) / k
    hint = "An example's own weight is 1/k on average. Were the weights sorted, or the examples "
    hint += "mixed two by two?"
    trial.compare(mean, want, hint=hint, atol=0.05)
    want -= squares
    hint = "The weights are not Dirichlet(α, …, α): E[λ(1-λ)] is off. Gamma(α) variables divided "
    hint += "by their sum are Dirichlet; uniform ones are not. Is α used at all?"
    trial.compare(mixing, want, hint=hint, rtol=0, atol=0.017)
    together, want = (many**2).sum(-1).mean(), k * square + k * (k - 1) / n * product
    hint = "An example's own weight is right; the weights of its partners, all together, are not. "
    hint += "The sum of the squares of the weights is off, so they are not Dirichlet(α, …, α)."
    trial.compare(together, want, hint=hint, rtol=0, atol=0.027)

    for k in (4, 2, 1):
        weights, targets = draw(trial.seed, "other numbers of examples: k = 4, 2 and 1", k=k)
        used = (weights > 1e-15).sum(1)
        right = torch.allclose(weights.sum(1), one.sum(1)) and int(used.max()) <= k
        right &= torch.allclose(targets, weights @ one, atol=1e-5)
        trial.require(
            right and used.double().mean() > k - 1,
            f"With k = {k} the mixtures are wrong: each should hold k examples, with weights that "
            "sum to 1.",
            got=f"{int(used.min())} to {int(used.max())} examples in a mixture",
            hint="Is 3, or another number, written into the code? k is an argument.",
        )
    draw(trial.seed, "a class without examples", K=K + 1)


@question
def shrunk(trial: Trial) -> None:
    """The data on which mixup is empirical risk minimization, up to a perturbation of mean zero."""
    y = torch.tensor([0, 1, 2, 3, 0, 0, 1, 0])  # the classes are not equally frequent
    x, one = trial.randn(8, 3) + 2, F.one_hot(y, 4).double()
    toward = lambda point, c, v: point + c * (v - point)
    shrink = lambda c, v: toward(v.mean(0), c, v)
    both = lambda c: (shrink(c, x), shrink(c, one))
    others = lambda v: (v.sum(0) - v) / 7
    class_mean = (one.T @ x / one.sum(0)[:, None])[y]
    # not α = 1, where other formulas are right by chance
    below, above = trial.number(0.2, 0.7), trial.number(1.5, 3.0)
    for part, alpha in (("an α below 1", below), ("an α above 1", above)):
        B = beta_function(alpha, alpha)
        excess, mixing = 4**-alpha / (alpha * B), alpha / (2 * (2 * alpha + 1))
        theta = 0.5 + excess
        right_x, right_y = both(theta)
        to = lambda point: tuple(toward(point(v), theta, v) for v in (x, one))
        rivals = {
            "The mean of λ is 1/2 for every α; it is the heavier weight, max(λ, 1-λ), whose mean "
            "is needed (5.9).": both(0.5),
            "Shrunk towards zero; the mixtures lie around the mean of the data.": [
                (theta * x, theta * one),
                (theta * x, right_y),
                (right_x, theta * one),
            ],
            "The mean is that of all rows, for each column on its own: v.mean(0).": [
                to(lambda v: v.mean()),
                to(lambda v: v.mean(1, keepdim=True)),
            ],
            "The partner may be any example of any class: the mean is that of all rows.": [
                to(others),
                *((toward(class_mean, theta, x), v) for v in (right_y, one)),
            ],
            "The labels shrink towards their own mean, which is 1/K only if the classes are equally "
            "frequent.": (right_x, toward(1 / 4, theta, one)),
            "Only the inputs or only the labels were shrunk; mixup mixes both.": [
                (right_x, one),
                (x, right_y),
            ],
            "The mean was subtracted, and not added back.": (
                theta * (x - x.mean(0)),
                theta * (one - one.mean(0)),
            ),
            "The weight of the data is 1 - ϑ here, it should be ϑ.": both(1 - theta),
            "That is ϑ for α = 1.": both(0.75),
            "That is E[λ(1-λ)] (5.7), or 1 minus it; ϑ is the mean of the heavier weight (5.9).": [
                both(c) for c in (mixing, 1 - mixing)
            ],
            "In ϑ, the 1/2 is missing.": both(excess),
            "In ϑ, 4 has the exponent -α.": [
                both(0.5 + power / (alpha * B)) for power in (4**alpha, 2**-alpha)
            ],
            "In ϑ, α and B(α, α) are both below the line: mind the brackets.": [
                both(0.5 + 4**-alpha * factor) for factor in (B / alpha, alpha / B, 1 / B)
            ],
        }
        hint = "Every row moves towards the mean of all rows, by the factor of (5.9). Nothing is "
        hint += "drawn at random."
        trial(part, {"x": x, "targets": one, "alpha": alpha}, both(theta), rivals, hint, atol=1e-6)


@experiment("mixup minus none", test_loss=LOSS, test_error=ERROR)
def mixup_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    """How mixup changes the test loss and the test error, under label noise."""
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    end = train(seeds, data, recipe, 300, grid={"alpha": [0.0, 1.0]}).isel(step=0)
    return by_name(end.sel(alpha=1.0) - end.sel(alpha=0.0))
