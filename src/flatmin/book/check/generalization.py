"""Checks of assignment 1: the gap."""

import math
from typing import Any

import torch
from scipy.stats import t as student_t

from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import ERROR, Trial, by_name, experiment, names_used, plain_number, question, train


@question
def lucky(trial: Trial) -> None:
    """The chance that the best of M coin-flipping networks makes no error on n examples."""
    few = int(trial.integers(10)) + 5
    for part, n, M in (
        ("a few networks, a few examples", 4, few),
        ("more networks than ways to label", 3, 3 * few),
        ("thirty-five examples, three hundred networks", 35, 300 + few),
        ("sixty examples, a million networks", 60, 10**6 + few),
    ):
        chance, half = 2.0**-n, torch.tensor(0.5)
        one_of = lambda M, chance: -math.expm1(M * math.log1p(-chance))
        want = one_of(M, chance)
        rivals = {
            "That is the chance of one network; M of them are tried.": chance,
            "1 - 2**-n keeps few of the digits of 2**-n, or none: double precision has sixteen. "
            "math.log1p and math.expm1 were made for this.": [
                1 - (1 - chance) ** M,
                1 - math.exp(M * math.log1p(-chance)),
            ],
            "That is how many such networks are expected, which can exceed 1. Two of them can be "
            "lucky at once.": [M * chance, min(1, M * chance)],
            "That is the chance that exactly one is right. There can be more.": (
                M * chance * (1 - chance) ** (M - 1)
            ),
            "That is the chance that there is none.": (1 - chance) ** M,
            "Here each example may be right in another network. One network has to be right on all "
            "of them.": (1 - 0.5**M) ** n,
            "That is a limit, for many networks with a small chance each.": -math.expm1(
                -M * chance
            ),
            "That is the chance that all M networks are right. One is enough.": chance**M,
            "That is the chance that at least one network is wrong. At least one has to be right.": (
                1 - chance**M
            ),
            "With two classes a coin is right with chance 1/2, and all n coins with 2**-n.": [
                one_of(M, 2 * chance),
                one_of(M, chance / 2),
            ],
            "The sign is turned around: math.expm1(x) is exp(x) - 1.": -want,
            "These are percent; a number between 0 and 1 is wanted.": 100 * want,
            "n and M are exchanged.": one_of(n, 2.0**-M),
            "That is single precision, which has seven digits: torch.float64 has sixteen.": [
                1 - (1 - half**n) ** M,
                -torch.expm1(M * torch.log1p(-(half**n))),
            ],
        }
        hint = "What is the chance that all M networks make at least one error?"
        inputs = {"n": n, "M": M}
        trial(part, inputs, want, rivals, hint, through=plain_number, rtol=1e-9, atol=0)


@question
def margins(trial: Trial) -> None:
    """How far the right class is ahead of the best wrong one, example by example."""
    for part, n, k in (("five examples, three classes", 5, 3), ("two classes", 4, 2)):
        z, y = trial.randn(n, k), trial.integers(k, n)
        y[0], y[1] = z[0].argmax(), z[1].argmin()  # one is right, one is wrong
        z[0, y[0]] += 50  # no number that is subtracted there does in place of -inf
        z[2] -= 50  # all logits are negative
        own, chances = y[:, None], z.softmax(1)
        right = z.gather(1, own)[:, 0]
        wrong = z.scatter(1, own, -torch.inf).amax(1)
        want, top = right - wrong, z.topk(2).values
        likely = chances.gather(1, own) - chances.scatter(1, own, 0).amax(1, keepdim=True)
        rivals = {
            "The right class took part in the maximum, so no margin came out positive. Only the "
            "wrong classes compete.": right - z.amax(1),
            "The sign is turned around: a rightly classified example has a positive margin.": -want,
            "These are margins between the two largest logits, whatever the label.": (
                -top.diff()[:, 0]
            ),
            "The second largest logit was subtracted everywhere. Where the network is wrong, the "
            "largest of the others is the largest of all.": right - top[:, 1],
            "The right class's logit was set to 0, which is the largest where all the others are "
            "negative. Use -inf.": right - z.scatter(1, own, 0).amax(1),
            "The right class's logit was made small, but not the smallest everywhere. Use -inf.": [
                right - z.scatter(1, own, -10).amax(1),
                right - z.scatter_add(1, own, torch.full_like(z, -10)).amax(1),
            ],
            "0 times infinity is NaN. Write -inf in one place of each row, such as by scatter or "
            "torch.where.": torch.nan * want,
            "The mean of the others was subtracted, not the largest of them.": (
                right - (z.sum(1) - right) / (k - 1)
            ),
            "A wrongly classified example has a negative margin; here its sign is lost.": [
                want.abs(),
                want.clamp(min=0),
            ],
            "These are margins of probabilities; those of logits are wanted.": likely[:, 0],
            "This is one number for the batch; one number an example is wanted.": [
                want.mean(),
                want.sum(),
                want.min(),
            ],
            "There is an axis too many.": want[:, None],
            "A tensor [n, 1] and one [n] are broadcast to [n, n]. Give both one shape first.": [
                right[:, None] - wrong,
                right - wrong[:, None],
            ],
            "logits[:, labels] takes all the labels' columns in every row. To take one a row, index "
            "the rows as well: logits[torch.arange(n), labels].": [
                z[:, y] - wrong,
                z[:, y] - wrong[:, None],
            ],
        }
        hint = "For each example: its own class's logit, minus the largest of the others."
        # a difference of single-precision numbers of size 50 is off by some 4e-6
        trial(part, {"logits": z, "labels": y}, want, rivals, hint, atol=1e-5)


@question
def paired_interval(trial: Trial) -> None:
    """Mean and half width of the 95 % interval of a paired difference."""
    used = "mean_interval" in names_used(trial.answer)
    trial.require(not used, "The question asks for it without mean_interval.")
    for part, n in (("five pairs", 5), ("twelve pairs", 12)):
        common = 3 * trial.randn(n)
        a, b = common + 0.5 * trial.randn(n), common + 0.5 * trial.randn(n) + 1
        d, t = a - b, student_t.ppf
        mean, error, biased = d.mean(), d.std() / n**0.5, d.std(correction=0) / n**0.5
        q, unpaired = t(0.975, n - 1), ((a.var() + b.var()) / n).sqrt()
        half = q * error
        rivals = {
            "1.96 is for a known standard deviation. With an estimated one, and so few pairs, "
            "Student's t is needed (1.12).": [
                (mean, 1.959964 * error),
                (mean, 1.959964 * biased),
                (mean, 2 * error),
            ],
            "This is the standard error. The half width is t times as large (1.12).": (mean, error),
            "The variance was divided by n, not by n - 1 (1.11).": (mean, q * biased),
            "The standard deviation has its n - 1 already (1.11). The error of the mean is s / √n, "
            "with n itself.": (mean, q * d.std() / (n - 1) ** 0.5),
            "This is the spread of single differences, not the uncertainty of their mean: a root "
            "of n is missing.": (mean, q * d.std()),
            "A root is missing: the standard error is s / √n, the root of the variance over n.": [
                (mean, q * d.std() / n),
                (mean, q * d.var() / n),
                (mean, q * d.var() / n**0.5),
            ],
            "The t distribution has n - 1 degrees of freedom, where n is the number of pairs.": [
                (mean, t(0.975, n) * error),
                (mean, t(0.975, n - 2) * error),
                (mean, t(0.975, 2 * n - 2) * error),
            ],
            "That leaves 10 % outside: two-sided 95 % needs the quantile 0.975.": (
                (mean, t(0.95, n - 1) * error)
            ),
            "The quantile 0.025 is negative. A width is positive: 0.975.": (mean, -half),
            "This is the full width; half of it is wanted.": (mean, 2 * half),
            "t s / √n is the half width already, and was halved once more.": (mean, half / 2),
            "An end of the interval came back. What is wanted is its mean and its half width.": [
                (mean - half, mean + half),
                (mean, mean + half),
                (mean, (mean - half, mean + half)),
                (mean, mean - half, mean + half),
            ],
            "The mean comes first, then the half width.": (half, mean),
            "The intervals of the two means were put together as if nothing were shared. "
            "Runs that share a seed are pairs: take the differences first.": [
                (mean, t(0.975, 2 * n - 2) * unpaired),
                (mean, q * unpaired),
                (mean, q * (a.std() + b.std()) / n**0.5),
                (mean, q * (a.std() - b.std()) / n**0.5),
            ],
            "The differences are a - b.": (-mean, half),
        }
        hint = "(1.11) and (1.12) for the differences a - b: their mean, and t s / √n."
        trial(part, {"a": a, "b": b}, (mean, half), rivals, hint, rtol=1e-4, atol=1e-6)


@question
def stopped_early(trial: Trial) -> None:
    """Each run's test error at the step at which its own validation loss is lowest."""
    validation, test = trial.rand(8, 7), trial.rand(8, 7)
    rows = torch.arange(8)
    lowest = torch.tensor([2, 5, 4, 3, 1, 0, 5, 1])
    validation[rows, lowest] = 0.9 * validation.amin(1)
    validation[:, 6] = validation[:, :6].mean(1)  # no extremum at the end
    step, rise = validation.argmin(1), (validation.diff(dim=1) > 0).int().argmax(1)
    want, at_run = test[rows, step], test.gather(0, validation.argmin(0, keepdim=True))[0]
    rivals = {
        "The test set chose the step. Choose by validation, report the test.": test.amin(1),
        "All runs were stopped at one step. Each run has its own.": [
            test[:, validation.mean(0).argmin()],
            test[:, validation.argmin() % 7],
        ],
        "This is the lowest validation loss, not the test error there.": validation.amin(1),
        "The two are exchanged: this is the validation loss where the test error is lowest.": (
            validation[rows, test.argmin(1)]
        ),
        "This is the step; the test error there is wanted.": step,
        "This is the error at the last step.": test[:, -1],
        "The step of the highest validation loss was taken.": test[rows, validation.argmax(1)],
        "This stops where the validation loss rises for the first time. It can fall again: take "
        "the step of its minimum.": [test[rows, rise], test[rows, rise + 1]],
        "The minimum was taken over the runs. Each run is a row, and has a minimum of its own.": (
            at_run
        ),
        "This is one number for all runs; one number a run is wanted.": [
            want.mean(),
            want.min(),
            test.flatten()[validation.argmin()],
        ],
        "There is an axis too many.": want[:, None],
        "A list of steps took whole rows or columns. To take one entry a row, index both: "
        "test_error[torch.arange(runs), step].": [test[step], test[:, step]],
    }
    inputs = {"validation_loss": validation, "test_error": test}
    hint = "In each row: the step of the lowest validation loss, and the test error at this step."
    trial("eight runs, seven evaluations", inputs, want, rivals, hint)


@experiment("random labels minus true labels", training_error=0.0051, test_error=ERROR)
def memorization(seeds: tuple[int, ...]) -> dict[str, Any]:
    """How random labels change the training error and the test error."""

    def end(noise):
        data = [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        return train(seeds, data, recipe, 50, width=64).isel(step=0)

    return by_name(end(0.9) - end(0.0))
