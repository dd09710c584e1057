"""Right answers to the experiments, written differently: each must earn its question's points."""

import math
import statistics
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch.func import grad

import flatmin
from flatmin import Recipe, fit
from flatmin.batch import Mixup
from flatmin.book import MLP, mean_interval, mnist1d
from flatmin.gradient import SAM
from flatmin.loss import Flooding
from flatmin.measure import class_stiffness, eigenvalues
from flatmin.optimizer import SGD

# ---------------------------------------------------------------------------- ways to a verdict


def by_mean_interval(differences):
    interval = mean_interval(differences)
    return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"


def by_hand(differences):
    values = [float(d) for d in differences]
    half = 2.776 * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    if abs(mean) <= half:
        return "Undecided"
    return "Lower" if mean < 0 else "Higher"


def by_a_test(differences):
    """The interval excludes zero where the paired test is significant; NaN if all are equal."""
    values = np.asarray(differences)
    if (values == values[0]).all():
        return "undecided" if values[0] == 0 else "lower" if values[0] < 0 else "higher"
    if stats.ttest_1samp(values, 0).pvalue >= 0.05:
        return "undecided"
    return "lower" if values.mean() < 0 else "higher"


def by_scipy(differences):
    values = torch.as_tensor(np.asarray(differences))
    error = values.std() / len(values) ** 0.5
    low, high = (float(values.mean() + stats.t.ppf(q, 4) * error) for q in (0.025, 0.975))
    return ["undecided", "higher", "lower"][(low > 0) - (high < 0)]


# --------------------------------------------------------------------------------- memorization


def memorization__seed_by_seed(seeds):
    found = {"training error": [], "test error": []}
    for seed in seeds:
        errors = []
        for noise in (0.9, 0.0):
            data = mnist1d(train_size=200, label_noise=noise, seed=seed)
            runs = fit(
                lambda: MLP(40, 64, 10),
                data,
                Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
                steps=50,
                seeds=[seed],
                dtype=torch.float64,
            )
            errors.append((float(runs.train_error[0, -1]), float(runs.test_error[0, -1])))
        (train_random, test_random), (train_true, test_true) = errors
        found["training error"].append(train_random - train_true)
        found["test error"].append(test_random - test_true)
    return {name: (values, by_hand(values)) for name, values in found.items()}


def memorization__numpy(seeds):
    def errors(noise):
        data = [mnist1d(train_size=200, label_noise=noise, seed=seed) for seed in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        model = lambda: MLP(40, 64, 10)
        runs = flatmin.fit(model, data, recipe, steps=50, seeds=seeds, dtype=torch.float64)
        last = runs.sel(step=50)
        return np.stack([last.train_error.values, last.test_error.values])

    train, test = errors(0.9) - errors(0.0)
    return {"training error": [train, by_a_test(train)], "test error": [test, by_a_test(test)]}


# ------------------------------------------------------------------------------- flooding_effect


def flooding_effect__two_recipes(seeds):
    data = [mnist1d(train_size=200, seed=seed) for seed in seeds]

    def end(**stages):
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9), **stages)
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            recipe,
            steps=400,
            seeds=seeds,
            evaluate_at=[400],
            dtype=torch.float64,
        )
        return runs.squeeze("step", drop=True)

    change = end(loss=Flooding(0.3)) - end()
    return {
        f"test {name}": (change[f"test_{name}"].values, by_scipy(change[f"test_{name}"]))
        for name in ("loss", "error")
    }


def flooding_effect__diff(seeds):
    data = [mnist1d(train_size=200, seed=seed) for seed in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    runs = fit(
        lambda: MLP(40, 32, 10),
        data,
        recipe,
        steps=400,
        seeds=seeds,
        grid={"flood_level": [0.0, 0.3]},
        dtype=torch.float64,
    )
    pairs = runs.isel(step=-1).diff("flood_level").squeeze("flood_level")
    loss, error = (torch.from_numpy(pairs[name].values) for name in ("test_loss", "test_error"))
    return {"test loss": (loss, by_hand(loss)), "test error": (error, by_hand(error))}


# ------------------------------------------------------------------------------------ level_walk


def level_walk__autograd(seeds):
    early, late = range(100, 200, 10), range(510, 601, 10)

    def squared_gradient(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return torch.cat([g.flatten() for g in slopes.values()]).square().sum()

    runs = fit(
        partial(MLP, 40, 16, 10, activation=torch.nn.Tanh),
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=seeds,
        evaluate_at=[*early, *late],
        dtype=torch.float64,
        instruments={"g2": squared_gradient},
    )
    slope, error = runs.g2.values, runs.test_error.values  # [seed, step]
    change = lambda v: v[:, 10:].mean(1) - v[:, :10].mean(1)
    return {
        "squared gradient": (change(slope), by_scipy(change(slope))),
        "test error": (change(error), by_scipy(change(error))),
    }


def level_walk__every_tenth_step(seeds):
    def squares(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return {"of_gradient": sum(torch.vdot(g.flatten(), g.flatten()) for g in slopes.values())}

    model = lambda: MLP(40, 16, 10, activation=torch.nn.Tanh)
    recipe = Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0))
    found = {"squared gradient": [], "test error": []}
    for seed in seeds:
        runs = fit(
            model,
            mnist1d(train_size=100),
            recipe,
            steps=600,
            batch_size=None,
            seeds=[seed],
            evaluate_at=60,
            dtype=torch.float64,
            instruments={"square": squares},
        ).isel(seed=0)
        for name, v in (
            ("squared gradient", runs.square_of_gradient),
            ("test error", runs.test_error),
        ):
            late, early = v.sel(step=slice(510, 600)), v.sel(step=slice(100, 190))
            found[name].append(float(late.mean() - early.mean()))
    return {name: (values, by_hand(values)) for name, values in found.items()}


# ------------------------------------------------------------------------------ stiffness_effect


def stiffness_effect__two_steps(seeds):
    instrument = partial(class_stiffness, num_classes=10)
    values = []
    for noise in (0.0, 0.9):
        data = [mnist1d(train_size=200, label_noise=noise, seed=seed) for seed in seeds]
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            steps=100,
            seeds=seeds,
            evaluate_at=1,
            dtype=torch.float64,
            instruments={"s": instrument},
        )
        values.append(torch.from_numpy(runs["s_within"].values))
    true, random = values
    before, after = (random - true).unbind(1)
    return {
        "before training": (before, by_scipy(before)),
        "after training": (after, by_scipy(after)),
    }


def stiffness_effect__measured_at_the_end(seeds):
    def measured(noise, steps):
        data = [mnist1d(train_size=200, label_noise=noise, seed=seed) for seed in seeds]
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            steps=100,
            seeds=seeds,
            dtype=torch.float64,
            networks=[steps],
        )
        networks = runs.networks.select(step=steps)
        found = networks.measure(partial(class_stiffness, num_classes=10), data, "train")
        return found.within.squeeze()

    result = {}
    for name, steps in (("before training", 0), ("after training", 100)):
        change = measured(0.9, steps) - measured(0.0, steps)
        result[name] = change, by_mean_interval(change)
    return result


# ---------------------------------------------------------------------------------- mixup_effect


def mixup_effect__two_recipes(seeds):
    sgd = SGD(lr=0.1, momentum=0.9, schedule="cosine")

    def last(recipe):
        return fit(
            lambda: MLP(40, 32, 10),
            [mnist1d(train_size=300, label_noise=0.4, seed=seed) for seed in seeds],
            recipe,
            steps=300,
            seeds=seeds,
            dtype=torch.float64,
        ).isel(step=-1)

    mixed, plain = last(Recipe(batch=Mixup(alpha=1.0), optimizer=sgd)), last(Recipe(optimizer=sgd))
    loss, error = mixed.test_loss - plain.test_loss, mixed.test_error - plain.test_error
    return {
        "test loss": (loss.values.tolist(), by_hand(loss)),
        "test error": (error.values.tolist(), by_hand(error)),
    }


def mixup_effect__dataframe(seeds):
    data = [mnist1d(train_size=300, label_noise=0.4, seed=seed) for seed in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    runs = fit(
        lambda: MLP(40, 32, 10),
        data,
        recipe,
        steps=300,
        seeds=seeds,
        grid={"alpha": [1.0, 0.0]},
        evaluate_at=[300],
        dtype=torch.float64,
    )
    frame = runs.data[["test_loss", "test_error"]].to_dataframe().droplevel("step")
    change = frame.loc[1.0] - frame.loc[0.0]
    return {
        "test loss": (change.test_loss.to_numpy(), by_a_test(change.test_loss.to_numpy())),
        "test error": (change.test_error.to_numpy(), by_a_test(change.test_error.to_numpy())),
    }


# ------------------------------------------------------------------------------------ sam_effect


def sam_effect__seed_by_seed(seeds):
    sgd, found = SGD(lr=0.1, momentum=0.9, schedule="cosine"), []
    for seed in seeds:
        data = mnist1d(train_size=300, label_noise=0.3, seed=seed)
        pair = []
        for recipe, steps in (
            (Recipe(optimizer=sgd), 300),
            (Recipe(gradient=SAM(rho=0.5), optimizer=sgd), 150),
        ):
            model = lambda: MLP(40, 32, 10)
            runs = fit(model, [data], recipe, steps=steps, seeds=[seed], dtype=torch.float64).isel(
                step=-1, seed=0
            )
            pair.append([float(runs.train_error), float(runs.test_error)])
        found.append(np.subtract(pair[1], pair[0]))
    train, test = np.array(found).T
    return {"training error": (train, by_scipy(train)), "test error": (test, by_scipy(test))}


def sam_effect__by_the_radius(seeds):
    """A radius of zero is plain SGD."""
    data = [mnist1d(train_size=300, label_noise=0.3, seed=seed) for seed in seeds]

    def errors(rho, steps):
        runs = fit(
            lambda: MLP(40, 32, 10),
            data,
            Recipe(gradient=SAM(rho=rho), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine")),
            steps=steps,
            seeds=seeds,
            evaluate_at=[0, steps],
            dtype=torch.float64,
        )
        return runs.train_error.values[:, -1], runs.test_error.values[:, -1]

    pairs = zip(("training error", "test error"), errors(0.5, 150), errors(0.0, 300))
    return {name: (sam - sgd, by_a_test(sam - sgd)) for name, sam, sgd in pairs}


# ------------------------------------------------------------------------------ sharpness_effect


def sharpness_effect__instrument(seeds):
    data = [mnist1d(train_size=200, seed=seed) for seed in seeds]
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        data,
        Recipe(optimizer=SGD()),
        steps=600,
        seeds=seeds,
        grid={"lr": [0.05, 0.3]},
        evaluate_at=[600],
        dtype=torch.float64,
        instruments={"largest": eigenvalues},
    ).isel(step=0)
    large, small = runs.sel(lr=0.3), runs.sel(lr=0.05)
    value = (large.largest_value - small.largest_value).squeeze().values
    error = (large.test_error - small.test_error).values
    return {
        "largest eigenvalue": (value, by_a_test(value)),
        "test error": (error, by_a_test(error)),
    }


def sharpness_effect__two_calls(seeds):
    data = [mnist1d(train_size=200, seed=seed) for seed in seeds]

    def end(lr):
        runs = fit(
            lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
            data,
            Recipe(optimizer=SGD(lr=lr)),
            steps=600,
            seeds=seeds,
            dtype=torch.float64,
            networks="last",
        )
        measured = runs.networks.measure(eigenvalues, data, "train")
        return measured.value.isel(eigenvalue=0), runs.test_error.isel(step=-1)

    changes = [large - small for large, small in zip(end(0.3), end(0.05))]
    names = ("largest eigenvalue", "test error")
    return {name: (d, by_mean_interval(d)) for name, d in zip(names, changes)}
