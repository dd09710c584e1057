"""Checks of assignment 1: the gap."""

import math
from functools import lru_cache
from typing import Any

import torch
from scipy.stats import t as student_t

from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Trial, question


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
        trial(
            part,
            {"n": n, "M": M},
            want=want,
            rtol=1e-9,
            atol=0,
            rivals={
                "That is the chance of one network; M of them are tried.": chance,
                "That is how many such networks are expected, which is more than the chance that there "
                "is one, and can exceed 1.": M * chance,
                "That is the chance that there is none.": (1 - chance) ** M,
                "In double precision 1 - 2**-60 is 1, and all is lost. math.log1p and math.expm1 were "
                "made for this.": 1 - (1 - chance) ** M,
            },
            hint="What is the chance that all M networks make at least one error?",
        )


@question
def margins(trial: Trial) -> None:
    """How far the right class is ahead of the best wrong one, example by example."""
    for part, n, k in (("five examples, three classes", 5, 3), ("two classes", 4, 2)):
        z, y = trial.randn(n, k), trial.integers(k, n)
        y[0], y[1] = z[0].argmax(), z[1].argmin()  # one is right, one is wrong
        right = z.gather(1, y[:, None])[:, 0]
        wrong = z.scatter(1, y[:, None], -torch.inf).amax(1)
        trial(
            part,
            {"logits": z, "labels": y},
            want=right - wrong,
            rivals={
                "The right class took part in the maximum, so no margin came out positive. Only the "
                "wrong classes compete.": right - z.amax(1),
                "The sign is turned around: a rightly classified example has a positive margin.": wrong
                - right,
                "These are margins between the two largest logits; the label plays no part in them.": z.topk(
                    2
                ).values
                @ torch.tensor([1.0, -1.0]).double(),
                "This is the mean; one number an example is wanted.": (right - wrong).mean(),
            },
            hint="For each example: its own class's logit, minus the largest of the others.",
        )


@question
def paired_interval(trial: Trial) -> None:
    """Mean and half width of the 95 % interval of a paired difference."""
    for part, n in (("five pairs", 5), ("twelve pairs", 12)):
        common = 3 * trial.randn(n)
        a, b = common + 0.5 * trial.randn(n), common + 0.5 * trial.randn(n) + 1
        d, q = a - b, student_t.ppf(0.975, n - 1)
        s, mean = d.std(), d.mean()
        unpaired = student_t.ppf(0.975, 2 * n - 2) * ((a.var() + b.var()) / n).sqrt()
        unpaired_n = student_t.ppf(0.975, n - 1) * ((a.var() + b.var()) / n).sqrt()
        together = "The intervals of the two means were put together as if nothing were shared. "
        together += "Runs that share a seed are pairs: take the differences first."
        trial(
            part,
            {"a": a, "b": b},
            want=(mean, q * s / n**0.5),
            rivals={
                "1.96 is for a known standard deviation. With an estimated one, and so few pairs, "
                "Student's t is needed (1.12).": (mean, 1.959964 * s / n**0.5),
                "The variance was divided by n, not by n - 1 (1.11).": (
                    mean,
                    q * d.std(correction=0) / n**0.5,
                ),
                "This is the spread of single differences, not the uncertainty of their mean: a root "
                "of n is missing.": (mean, q * s),
                "The t distribution has n - 1 degrees of freedom, not n.": (
                    mean,
                    student_t.ppf(0.975, n) * s / n**0.5,
                ),
                "That leaves 10 % outside: two-sided 95 % needs the quantile 0.975.": (
                    mean,
                    student_t.ppf(0.95, n - 1) * s / n**0.5,
                ),
                together: [(mean, unpaired), (mean, unpaired_n)],
                "The differences are a - b.": (-mean, q * s / n**0.5),
            },
            rtol=1e-4,
        )


@question
def stopped_early(trial: Trial) -> None:
    """Each run's test error at the step at which its own validation loss is lowest."""
    validation, test = trial.rand(4, 9), trial.rand(4, 9)
    validation[torch.arange(4), torch.tensor([2, 5, 7, 3])] -= (
        1  # every run has its minimum at another step
    )
    rows = torch.arange(4)
    trial(
        "four runs, nine evaluations",
        {"validation_loss": validation, "test_error": test},
        want=test[rows, validation.argmin(1)],
        rivals={
            "The test set chose the step. It must not: choose by validation, report the test.": test.amin(
                1
            ),
            "All runs were stopped at one step, that of the mean curve. Each run has its own.": test[
                :, validation.mean(0).argmin()
            ],
            "This is the lowest validation loss; the test error at that step is wanted.": validation.amin(
                1
            ),
            "This is the error at the last step.": test[:, -1],
            "The step of the highest validation loss was taken.": test[rows, validation.argmax(1)],
            "This is the mean over the runs; one number a run is wanted.": test[
                rows, validation.argmin(1)
            ].mean(),
        },
    )


@lru_cache
def _memorization(seeds: tuple[int, ...]) -> dict[str, Any]:
    def end(noise):
        data = [mnist1d(train_size=200, label_noise=noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        return fit(
            lambda: MLP(40, 64, 10),
            data,
            recipe,
            steps=200,
            seeds=list(seeds),
            evaluate_at=[200],
            dtype=torch.float64,
        ).isel(step=0)

    true, random = end(0.0), end(0.9)
    return {
        key: (random - true)[key.replace("training", "train").replace(" ", "_")].values
        for key in ("training error", "test error")
    }


@question(seconds=120)
def memorization(trial: Trial) -> None:
    """How random labels change the training error and the test error."""
    trial.experiment(
        _memorization,
        atol=0.01,
        rivals={
            "The difference is the wrong way round: random labels minus true labels.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
