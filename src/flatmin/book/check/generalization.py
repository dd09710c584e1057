"""Checks of assignment 1: the gap."""

import math
from typing import Any

import torch
from scipy.stats import t as student_t

from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, experiment, plain_number, question, train


@question
def lucky(trial: Trial) -> None:
    """The chance that the best of M coin-flipping networks makes no error on n examples."""
    few = int(trial.integers(20)) + 5
    for part, n, M in (
        ("a few networks, a few examples", 4, few),
        ("more networks than ways to label", 3, 40 * few),
        ("sixty examples, a million networks", 60, 10**6 + few),
    ):
        chance = 2.0**-n
        want = -math.expm1(M * math.log1p(-chance))
        rivals = {
            "That is the chance of one network; M of them are tried.": chance,
            "That is how many such networks are expected, which can exceed 1.": M * chance,
            "That is the chance that there is none.": (1 - chance) ** M,
            "In double precision 1 - 2**-60 is 1, and all is lost. math.log1p and math.expm1 were "
            "made for this.": 1 - (1 - chance) ** M,
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
        right = z.gather(1, y[:, None])[:, 0]
        wrong = z.scatter(1, y[:, None], -torch.inf).amax(1)
        want, top = right - wrong, -z.topk(2).values.diff()[:, 0]
        rivals = {
            "The right class took part in the maximum, so no margin came out positive. Only the "
            "wrong classes compete.": right - z.amax(1),
            "The sign is turned around: a rightly classified example has a positive margin.": -want,
            "These are margins between the two largest logits, whatever the label.": top,
            "This is the mean; one number an example is wanted.": want.mean(),
        }
        hint = "For each example: its own class's logit, minus the largest of the others."
        # a difference of single-precision numbers of size 1 is off by some 1e-7
        trial(part, {"logits": z, "labels": y}, want, rivals, hint, atol=1e-6)


@question
def paired_interval(trial: Trial) -> None:
    """Mean and half width of the 95 % interval of a paired difference."""
    names = getattr(getattr(trial.answer, "__code__", None), "co_names", ())
    trial.require("mean_interval" not in names, "The question asks for it without mean_interval.")
    for part, n in (("five pairs", 5), ("twelve pairs", 12)):
        common = 3 * trial.randn(n)
        a, b = common + 0.5 * trial.randn(n), common + 0.5 * trial.randn(n) + 1
        d, t = a - b, student_t.ppf
        mean, error, biased = d.mean(), d.std() / n**0.5, d.std(correction=0) / n**0.5
        unpaired = ((a.var() + b.var()) / n).sqrt()
        q, one_sided = t(0.975, n - 1), t(0.95, n - 1) * error
        rivals = {
            "1.96 is for a known standard deviation. With an estimated one, and so few pairs, "
            "Student's t is needed (1.12).": (mean, 1.959964 * error),
            "The variance was divided by n, not by n - 1 (1.11).": (mean, q * biased),
            "This is the spread of single differences, not the uncertainty of their mean: a root "
            "of n is missing.": (mean, q * d.std()),
            "The t distribution has n - 1 degrees of freedom, not n.": (mean, t(0.975, n) * error),
            "That leaves 10 % outside: two-sided 95 % needs the quantile 0.975.": (mean, one_sided),
            "The intervals of the two means were put together as if nothing were shared. "
            "Runs that share a seed are pairs: take the differences first.": [
                (mean, t(0.975, 2 * n - 2) * unpaired),
                (mean, q * unpaired),
            ],
            "The differences are a - b.": (-mean, q * error),
        }
        trial(part, {"a": a, "b": b}, (mean, q * error), rivals, rtol=1e-4, atol=1e-6)


@question
def stopped_early(trial: Trial) -> None:
    """Each run's test error at the step at which its own validation loss is lowest."""
    validation, test = trial.rand(4, 9), trial.rand(4, 9)
    rows = torch.arange(4)
    validation[rows, torch.tensor([2, 5, 7, 3])] -= 1  # each run's minimum is at another step
    want, at_one = test[rows, validation.argmin(1)], test[:, validation.mean(0).argmin()]
    rivals = {
        "The test set chose the step. Choose by validation, report the test.": test.amin(1),
        "All runs were stopped at one step, that of the mean curve. Each run has its own.": at_one,
        "This is the lowest validation loss, not the test error there.": validation.amin(1),
        "This is the error at the last step.": test[:, -1],
        "The step of the highest validation loss was taken.": test[rows, validation.argmax(1)],
        "This is the mean over the runs; one number a run is wanted.": want.mean(),
    }
    inputs = {"validation_loss": validation, "test_error": test}
    trial("four runs, nine evaluations", inputs, want, rivals)


@experiment("random labels minus true labels", "training error", "test error")
def memorization(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How random labels change the training error and the test error."""

    def end(noise):
        data = [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        return train(seeds, data, recipe, 200, width=64).isel(step=0)

    change = end(0.9) - end(0.0)
    return change.train_error.values, change.test_error.values
