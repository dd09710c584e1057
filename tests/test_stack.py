"""The stack: each of its runs equals that of a plain PyTorch loop."""

import copy
import dataclasses
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from flatmin import BatchTransform, Data, Recipe, best_step, fit, flood, stack
from flatmin.batch import Dirac, Gaussian, LabelSmoothing, Mixup
from flatmin.book import claims
from flatmin.gradient import SAM, PlainGradient
from flatmin.layers import Dropout
from flatmin.loss import Flooding
from flatmin.measure import dims, eigenvalues, gradient_norm, on, sharpness, stiffness
from flatmin.optimizer import EMA, SGD, Adam, TwoRates
from flatmin.pipeline import BatchStage, GradientStage, LossStage, OptimizerStage, Step
from flatmin.stack import epoch_order, error, initial_module, stream


def make_data(seed=0, train=23, validation=9, test=17, features=5):
    """Three overlapping classes; with 23 examples, the last batch of 10 has only 3."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(3, features, generator=torch.Generator().manual_seed(99))
    parts = {}
    for name, n in {"train": train, "validation": validation, "test": test}.items():
        y = torch.randint(3, (n,), generator=generator)
        parts[f"x_{name}"] = centers[y] + torch.randn(n, features, generator=generator)
        parts[f"y_{name}"] = y
    clean = {f"y_{name}_clean": parts[f"y_{name}"] for name in ("train", "validation")}
    return Data("blobs", 3, **parts, **clean)


MLP = lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
BATCH_NORM = lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
DROPOUT = lambda: nn.Sequential(
    nn.Linear(5, 7), nn.Tanh(), Dropout(0.4), nn.Linear(7, 6), Dropout(0.2), nn.Linear(6, 3)
)


class Times(nn.Module):
    """A learned number, of shape []."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


SCALAR = lambda: nn.Sequential(nn.Linear(5, 7), Times(), nn.Tanh(), nn.Linear(7, 3))
DATA = make_data()
ON_CPU = {"device": "cpu", "dtype": torch.float64}
COSINE = {"momentum": 0.9, "weight_decay": 0.05, "schedule": "cosine"}
SPLITS = ("train", "validation", "test")


def plain_loop(
    model,
    data,
    seed,
    *,
    steps,
    batch_size,
    optimizer=None,
    loss=torch.mean,
    cosine=False,
    evaluate_at=(),
    dtype=torch.float64,
    transform=None,
):
    """One run in plain PyTorch: the results at each evaluation, and the module."""
    module = initial_module(model, seed).to(dtype)
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(module.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    x, y = data.x_train.to(dtype), data.y_train
    apply = BatchTransform(transform, 3, seed) if transform else lambda x, y, *other: (x, y)
    records, t, epoch, rows, others = [], 0, 0, [], []

    def evaluate():
        module.eval()
        record = {}
        for split in SPLITS:
            inputs, labels = data.split(split)
            with torch.no_grad():
                logits = module(inputs.to(dtype))
            record[f"{split}_loss"] = cross_entropy(logits, labels).item()
            record[f"{split}_error"] = (logits.argmax(1) != labels).double().mean().item()
        records.append(record)
        module.train()

    while True:
        if t in evaluate_at:
            evaluate()
        if t == steps:
            return records, module.eval()
        if not rows:
            rows, others = [slice(None)], [slice(None)]
            if batch_size is not None:
                rows = list(epoch_order(seed, epoch, len(x)).split(batch_size))
                others = epoch_order(seed, epoch, len(x), "second order").split(batch_size)
            epoch, others = epoch + 1, list(others)
        batch, other = rows.pop(0), others.pop(0)
        second = (x[other], y[other]) if getattr(transform, "second_stream", False) else ()
        inputs, targets = apply(x[batch], y[batch], *second)
        optimizer.zero_grad()
        loss(cross_entropy(module(inputs), targets, reduction="none")).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        t += 1


def assert_same_run(runs, records, module, tolerance, **run):
    for name in records[0]:
        np.testing.assert_allclose(
            runs[name].sel(run), [r[name] for r in records], rtol=tolerance, atol=tolerance
        )
    expected = module.state_dict()
    found = runs.networks.module(**run).state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def assert_bitwise_equal(a, b):
    assert a.data.equals(b.data)
    assert (a.networks is None) == (b.networks is None)
    for part in ("params", "buffers") if a.networks else ():
        first, second = getattr(a.networks, part), getattr(b.networks, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------- every run is the run of a plain loop

sgd = lambda lr, **more: lambda p: torch.optim.SGD(p, lr=lr, **more)
EXPERIMENTS = {
    # name: fit's arguments, a grid, and the plain loop's arguments for a value of the grid
    "plain": (
        {"recipe": Recipe()},
        {"lr": [0.05, 0.2]}, lambda v: {"optimizer": sgd(v)},
    ),
    "momentum, weight decay, cosine": (
        {"recipe": Recipe(optimizer=SGD(0.1, **COSINE))},
        {"weight_decay": [0.0, 0.05]},
        lambda v: {"optimizer": sgd(0.1, momentum=0.9, weight_decay=v), "cosine": True},
    ),
    "Adam": (
        {"recipe": Recipe(optimizer=Adam(0.01, weight_decay=0.1))},
        {"beta1": [0.5, 0.9]},
        lambda v: {"optimizer": lambda p: torch.optim.Adam(p, 0.01, (v, 0.999), weight_decay=0.1)},
    ),
    "flooding": (
        {"recipe": Recipe(loss=Flooding())},
        {"flood_level": [0.5, 1.5]}, lambda v: {"loss": lambda l: flood(l.mean(), v)},
    ),
    "flooding each example": (
        {"recipe": Recipe(loss=Flooding(per_example=True))},
        {"flood_level": [0.5, 1.5]}, lambda v: {"loss": lambda l: flood(l, v).mean()},
    ),
    "full batch": (
        {"batch_size": None},
        {"lr": [0.05, 0.2]}, lambda v: {"optimizer": sgd(v), "batch_size": None},
    ),
    "batch norm": (
        {"model": BATCH_NORM},
        {"lr": [0.05, 0.2]}, lambda v: {"optimizer": sgd(v), "model": BATCH_NORM},
    ),
    "no grid, one batch an epoch": (
        {"batch_size": 23}, {}, lambda v: {"batch_size": 23},
    ),
    "dropout": (
        {"model": DROPOUT},
        {"lr": [0.05, 0.2]}, lambda v: {"optimizer": sgd(v), "model": DROPOUT},
    ),
    "mixup": (
        {"recipe": Recipe(batch=Mixup())},
        {"alpha": [0.2, 1.0]}, lambda v: {"transform": Mixup(v)},
    ),
    "mixup at one alpha": (
        {"recipe": Recipe(batch=Mixup(0.3), optimizer=SGD(0.1, **COSINE))},
        {"lr": [0.05, 0.2]},
        lambda v: {"transform": Mixup(0.3), "cosine": True,
                   "optimizer": sgd(v, momentum=0.9, weight_decay=0.05)},
    ),
    "mixup of three examples": (
        {"recipe": Recipe(batch=Mixup(k=3, per_example=True))},
        {"alpha": [0.0, 1.0]}, lambda v: {"transform": Mixup(v, k=3, per_example=True)},
    ),
    "mixup of different classes, flooded": (
        {"recipe": Recipe(batch=Mixup(partners="different"), loss=Flooding(0.9))},
        {"alpha": [0.2, 1.0]},
        lambda v: {"transform": Mixup(v, partners="different"),
                   "loss": lambda l: flood(l.mean(), 0.9)},
    ),
    "mixup within a class, from a second stream": (
        {"recipe": Recipe(batch=Mixup(partners="same", second_stream=True))},
        {"alpha": [0.2, 1.0]},
        lambda v: {"transform": Mixup(v, partners="same", second_stream=True)},
    ),
    "mixup, full batch": (
        {"recipe": Recipe(batch=Mixup()), "batch_size": None},
        {"alpha": [0.2, 1.0]}, lambda v: {"transform": Mixup(v), "batch_size": None},
    ),
    "mixup with batch norm and dropout": (
        {"model": (both := lambda: nn.Sequential(BATCH_NORM(), Dropout(0.3), nn.Linear(3, 3))),
         "recipe": Recipe(batch=Mixup(second_stream=True))},
        {"alpha": [0.2, 1.0]}, lambda v: {"transform": Mixup(v, second_stream=True), "model": both},
    ),
    "a scalar parameter": (
        {"model": SCALAR}, {"lr": [0.1, 0.2]}, lambda v: {"model": SCALAR, "optimizer": sgd(v)},
    ),
    "noise": (
        {"recipe": Recipe(batch=Gaussian())},
        {"sigma": [0.1, 1.0]}, lambda v: {"transform": Gaussian(v)},
    ),
    "label smoothing": (
        {"recipe": Recipe(batch=LabelSmoothing()), "batch_size": None},
        {"smoothing": [0.0, 0.5]}, lambda v: {"transform": LabelSmoothing(v), "batch_size": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_runs_equal_a_plain_loop(name, per_seed):
    arguments, grid, plain = EXPERIMENTS[name]
    seeds, evaluate_at, steps = [3, 8, 11], [0, 1, 5, 8], 8
    data = [make_data(seed) for seed in seeds] if per_seed else DATA
    runs = fit(
        **{"model": MLP, "data": data, "steps": steps, "batch_size": 10} | arguments,
        grid=grid,
        seeds=seeds,
        evaluate_at=evaluate_at,
        networks="last",
        **ON_CPU,
    )
    for k, seed in enumerate(seeds):
        for run in [{key: v} for key in grid for v in grid[key]] or [{}]:
            records, module = plain_loop(
                **{
                    "model": MLP,
                    "data": data[k] if per_seed else data,
                    "seed": seed,
                    "steps": steps,
                    "batch_size": 10,
                    "evaluate_at": evaluate_at,
                }
                | plain(next(iter(run.values()), None))
            )
            assert_same_run(runs, records, module, 1e-10, seed=seed, **run)
    if grid:  # the grid has an effect
        last = runs.train_loss.isel(step=-1)
        assert (
            abs(last.isel({next(iter(grid)): 0}) - last.isel({next(iter(grid)): 1})) > 1e-6
        ).all()


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_runs_equal_a_plain_loop_in_single_precision(model):
    runs = fit(
        model,
        DATA,
        Recipe(optimizer=SGD(0.1, **COSINE)),
        steps=9,
        batch_size=10,
        seeds=[4, 5],
        evaluate_at=3,
        networks="last",
        device="cpu",
    )
    assert next(iter(runs.networks.params.values())).dtype == torch.float32
    for seed in (4, 5):
        records, module = plain_loop(
            model,
            DATA,
            seed,
            steps=9,
            batch_size=10,
            evaluate_at=[0, 3, 6, 9],
            cosine=True,
            optimizer=sgd(0.1, momentum=0.9, weight_decay=0.05),
            dtype=torch.float32,
        )
        assert_same_run(runs, records, module, 2e-5, seed=seed)


def test_a_network_itself_is_where_every_run_starts():
    model = MLP()
    before = [w.clone() for w in model.parameters()]
    runs = fit(
        model, DATA, steps=4, batch_size=10, seeds=[1, 2], evaluate_at=2, networks="last", **ON_CPU
    )
    assert runs.train_loss.isel(step=0, seed=0) == runs.train_loss.isel(step=0, seed=1)
    for seed in (1, 2):
        records, module = plain_loop(
            model, DATA, seed, steps=4, batch_size=10, evaluate_at=[0, 2, 4]
        )
        assert_same_run(runs, records, module, 1e-10, seed=seed)
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))


class Odd(nn.Module):
    """A frozen layer, tied weights, and a buffer that is not in the state_dict."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 5)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x):
        return self.head(self.outer(self.inner(x).tanh()) * self.scale)


def test_frozen_and_tied_weights_and_non_persistent_buffers():
    runs = fit(
        Odd, DATA, steps=5, batch_size=10, seeds=[0, 1], evaluate_at=1, networks="last", **ON_CPU
    )
    for seed in (0, 1):
        records, module = plain_loop(Odd, DATA, seed, steps=5, batch_size=10, evaluate_at=[0, 5])
        assert_same_run(runs, records, module, 1e-10, seed=seed)
        found = runs.networks.module(seed=seed)
        assert found.inner.weight is found.outer.weight
        assert torch.equal(found.head.weight, initial_module(Odd, seed).head.weight.double())


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize(
    "model, recipe, grid",
    [
        (BATCH_NORM, Recipe(), {"flood_level": [0.0, 0.9]}),
        (DROPOUT, Recipe(batch=Mixup(second_stream=True)), {"alpha": [0.2, 1.0]}),
    ],
    ids=["batch norm", "dropout and mixup"],
)
def test_results_do_not_depend_on_the_chunk(model, recipe, grid, chunk_size, per_seed):
    data = [make_data(seed) for seed in (5, 6)] if per_seed else DATA
    recipe = dataclasses.replace(recipe, optimizer=SGD(momentum=0.5))
    whole, chunked = (
        fit(
            model,
            data,
            recipe,
            steps=5,
            batch_size=10,
            grid={"lr": [0.05, 0.1], **grid},
            seeds=2,
            evaluate_at=5,
            networks="best",
            chunk_size=size,
            **ON_CPU,
        )
        for size in (None, chunk_size)
    )
    xr.testing.assert_allclose(whole.data, chunked.data, rtol=1e-10)
    for part in ("params", "buffers"):
        for name, w in getattr(whole.networks, part).items():
            other = getattr(chunked.networks, part)[name]
            torch.testing.assert_close(w, other, rtol=1e-10, atol=1e-10)


def test_the_evaluation_batch_size_does_not_matter():
    a, b = (
        fit(
            BATCH_NORM,
            DATA,
            steps=3,
            batch_size=10,
            seeds=2,
            evaluate_at=1,
            evaluation_batch_size=size,
            **ON_CPU,
        )
        for size in (4, 1000)
    )
    xr.testing.assert_allclose(a.data, b.data, rtol=1e-12)


# --------------------------------------------------------------------------- the batch stage


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["MLP", "batch norm", "dropout"])
@pytest.mark.parametrize("batch_size", [10, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixup_at_alpha_zero_is_bitwise_erm(model, batch_size, dtype):
    arguments = {
        "steps": 7,
        "batch_size": batch_size,
        "seeds": 2,
        "networks": "last",
        "device": "cpu",
        "dtype": dtype,
    }
    erm = fit(model, DATA, Recipe(), grid={"lr": [0.1, 0.3]}, **arguments)
    for stage in (Dirac(), Mixup(0.0), Mixup(0.0, k=3, partners="same", second_stream=True)):
        other = fit(model, DATA, Recipe(batch=stage), grid={"lr": [0.1, 0.3]}, **arguments)
        assert_bitwise_equal(erm, other)


def test_a_run_with_alpha_zero_is_bitwise_erm_in_a_stack_with_others():
    arguments = {"steps": 7, "batch_size": 10, "seeds": 3, "device": "cpu", "networks": "last"}
    erm = fit(MLP, DATA, Recipe(), grid={"flood_level": [0.0, 0.5]}, **arguments)
    mixed = fit(MLP, DATA, Recipe(batch=Mixup()), grid={"alpha": [0.0, 1.0]}, **arguments)
    assert (
        mixed.test_loss.sel(alpha=0.0).values == erm.test_loss.sel(flood_level=0.0).values
    ).all()
    assert (mixed.test_loss.sel(alpha=1.0, step=7) != mixed.test_loss.sel(alpha=0.0, step=7)).all()
    for name, w in mixed.networks.params.items():
        assert torch.equal(w[:3], erm.networks.params[name][:3])


def test_runs_share_their_draws_unless_they_differ_in_the_batch_stage():
    first = lambda grid: fit(
        MLP,
        DATA,
        Recipe(batch=Mixup(1.0)),
        steps=1,
        batch_size=10,
        seeds=2,
        grid=grid,
        networks="last",
        **ON_CPU,
    ).networks.params["0.weight"]
    a = first({"momentum": [0.0, 0.9]})  # has an effect from the second step on
    assert torch.equal(a[:2], a[2:])
    b = first({"alpha": [1.0, 0.2]})
    torch.testing.assert_close(b[:2], a[:2])
    assert (b[:2] != b[2:]).any()


def test_training_loss_is_that_of_the_original_examples():
    """Of the mixed ones, it would be about half a nat at α = 1, even for a perfect network."""
    runs = fit(
        MLP,
        DATA,
        Recipe(batch=Mixup(1.0)),
        steps=3,
        batch_size=10,
        seeds=1,
        networks="last",
        **ON_CPU,
    )
    loss = runs.networks.measure(lambda f, p, x, y: cross_entropy(f(p, x), y), DATA, "train")
    np.testing.assert_allclose(runs.train_loss.isel(step=-1), loss, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixup_in_half_precision(dtype):
    runs = fit(
        MLP,
        DATA,
        Recipe(batch=Mixup(1.0)),
        steps=5,
        batch_size=10,
        seeds=2,
        device="cpu",
        dtype=dtype,
        grid={"alpha": [0.0, 0.5]},
    )
    assert np.isfinite(runs.test_loss).all() and (runs.diverged_at == -1).all()


def test_dropout_in_the_stack():
    """Seeds differ in their masks, runs of a seed do not, and counters count the steps."""
    runs = fit(
        DROPOUT,
        DATA,
        Recipe(),
        steps=7,
        batch_size=10,
        seeds=2,
        grid={"lr": [0.1, 0.2]},
        networks="last",
        **ON_CPU,
    )
    assert (runs.networks.buffers["2.counter"] == 7).all()
    key = runs.networks.buffers["2.key"]
    assert torch.equal(key[:2], key[2:]) and key[0] != key[1]
    assert (runs.networks.buffers["4.key"] != key).all()
    first = runs.train_loss.isel(step=0)
    assert (first.sel(lr=0.1) == first.sel(lr=0.2)).all()


# ----------------------------------------------------------------------------- random streams


def test_runs_of_one_seed_are_paired():
    runs = fit(
        MLP,
        DATA,
        steps=6,
        batch_size=10,
        grid={"momentum": [0.0, 0.9], "flood_level": [0.0, 1e-9]},
        seeds=3,
        evaluate_at=6,
        **ON_CPU,
    )
    first = runs.train_loss.sel(step=[0, 1])  # momentum has an effect from the second step on
    assert (first == first.isel(momentum=0, flood_level=0)).all()
    np.testing.assert_allclose(  # a level that is never reached: the same run, so the same batches
        runs.train_loss.sel(flood_level=0.0), runs.train_loss.sel(flood_level=1e-9), rtol=1e-12
    )
    assert (
        runs.train_loss.sel(step=6, momentum=0.0) != runs.train_loss.sel(step=6, momentum=0.9)
    ).all()
    assert len(np.unique(runs.train_loss.sel(step=0))) == 3  # the seeds differ


def test_seeds_in_another_form_are_the_same():
    first, *others = (
        fit(MLP, DATA, steps=2, batch_size=10, seeds=seeds, networks="last", **ON_CPU)
        for seeds in ([0, 1], np.arange(2), 2, (0, 1), range(2))
    )
    for other in others:
        assert_bitwise_equal(first, other)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 50))
@settings(max_examples=30)
def test_orders_are_permutations_and_pure(seed, epoch, n):
    order = epoch_order(seed, epoch, n)
    assert sorted(order.tolist()) == list(range(n))
    torch.manual_seed(epoch)
    assert torch.equal(order, epoch_order(seed, epoch, n))


def test_streams_differ():
    named = [("a", 0), ("a", 1), ("b", 0)]
    draws = {torch.rand(1, generator=stream(s, p, i)).item() for s in range(5) for p, i in named}
    assert len(draws) == 15


def test_the_global_random_state_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA reseeded"))
    torch.default_generator.manual_seed(7)
    np.random.seed(7)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    results = []
    for _ in range(2):
        results.append(fit(MLP, DATA, steps=2, batch_size=10, seeds=2, **ON_CPU).train_loss)
        assert torch.equal(torch.get_rng_state(), before)
        torch.default_generator.manual_seed(7)
    assert (np.random.get_state()[1] == before_numpy).all()
    torch.rand(5)  # the global state does not matter either
    results.append(fit(MLP, DATA, steps=2, batch_size=10, seeds=2, **ON_CPU).train_loss)
    assert results[0].equals(results[1])
    assert results[0].equals(results[2])


# ---------------------------------------------------------------------------------- divergence

# a linear network with a squared loss, and learning rates far beyond stability
squares = lambda logits, y: ((logits - (y[:, None] == torch.arange(3)).float()) ** 2).sum(1)
LINEAR = lambda: nn.Linear(5, 3)


def diverging(lr, **more):
    return fit(
        LINEAR,
        DATA,
        Recipe(criterion=squares),
        steps=40,
        batch_size=10,
        grid={"lr": lr},
        seeds=2,
        evaluate_at=40,
        device="cpu",
        **more,
    )


def test_a_diverging_run_is_named_and_does_not_affect_the_others():
    with pytest.warns(UserWarning, match="not finite") as record:
        runs = diverging([0.01, 1e6], networks="last")
    assert record[0].filename == __file__  # the warning points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = diverging([0.01], networks="last")
    healthy = runs.sel(lr=[0.01])
    for name in alone.data_vars:
        np.testing.assert_allclose(healthy[name], alone[name], rtol=1e-5, atol=1e-7)
    assert not healthy.to_array().isnull().any()
    assert (healthy.diverged_at == -1).all()
    for name, w in alone.networks.params.items():
        torch.testing.assert_close(runs.networks.params[name][:2], w, rtol=1e-5, atol=1e-7)

    for seed in (0, 1):
        step = runs.diverged_at.sel(lr=1e6, seed=seed).item()
        assert f"lr=1000000.0, seed={seed} at step {step}" in str(record[0].message)
        # the plain loop diverges at the same step
        module, t, diverged = initial_module(LINEAR, seed), 0, None
        optimizer = torch.optim.SGD(module.parameters(), lr=1e6)
        while diverged is None:
            epoch, position = divmod(t, 3)
            rows = epoch_order(seed, epoch, 23).split(10)[position]
            loss = squares(module(DATA.x_train[rows]), DATA.y_train[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            t += 1
            finite = all(w.isfinite().all() for w in module.parameters())
            diverged = None if loss.isfinite() and finite else t
        assert step == diverged
        for name in ("train_loss", "train_error", "test_loss", "test_error", "validation_error"):
            values = runs[name].sel(lr=1e6, seed=seed)
            assert values.sel(step=slice(step, None)).isnull().all()
            assert not values.sel(step=slice(None, step - 2)).isnull().any()
    assert "lr=0.01" not in str(record[0].message)
    assert str(record[0].message).startswith("the loss of 2 runs")


def test_claims_refuse_after_a_divergence_unless_it_was_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = diverging([1e6], expect_divergence=True)
    assert (runs.diverged_at >= 0).all() and runs.attrs["divergence"] == "expected"
    claims.claim("fine", "the divergence was meant", True)
    with pytest.warns(UserWarning, match="not finite"):
        runs = diverging([1e6])
    assert "divergence" not in runs.attrs
    with pytest.raises(AssertionError, match=r"diverged: lr=1000000.0, seed=0 at step"):
        claims.claim("refused", "whatever", True)


def test_selected_networks_are_those_asked_for():
    grid = {"lr": [0.01, 0.02, 0.05], "momentum": [0.0, 0.5]}
    networks = fit(
        LINEAR,
        DATA,
        Recipe(optimizer=SGD()),
        steps=3,
        batch_size=10,
        seeds=2,
        grid=grid,
        networks="last",
        device="cpu",
    ).networks
    few = networks.select(momentum=0.5, lr=[0.05, 0.01])
    assert few.coords == {"lr": [0.05, 0.01], "momentum": [0.5], "seed": networks.coords["seed"]}
    error = lambda network, params, x, y: cross_entropy(network(params, x), y)
    expected = networks.measure(error, DATA).sel(lr=[0.05, 0.01], momentum=[0.5])
    xr.testing.assert_allclose(few.measure(error, DATA), expected)
    for bad in ({"lr": 0.03}, {"flood_level": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            networks.select(**bad)


def test_the_last_step_may_diverge():
    """If the loss of the last step is finite but not the weights after it, there is no result."""
    for steps in (1, 2):
        schedule = lambda done, n=steps: 1e38 if done > (n - 1.5) / n else 1e-9
        with pytest.warns(UserWarning, match=f"seed=0 at step {steps}"):
            runs = fit(
                LINEAR,
                DATA,
                Recipe(optimizer=SGD(1.0, weight_decay=1e5, schedule=schedule)),
                steps=steps,
                batch_size=10,
                seeds=1,
                evaluate_at=steps,
                device="cpu",
            )
        assert runs.diverged_at.item() == steps
        for name in ("train_loss", "train_error", "test_loss", "test_error"):
            assert runs[name].isnull().values.tolist() == [[False] * steps + [True]]


class BrokenOutsideTraining(nn.Linear):
    """Behaves like batch norm whose running statistics have overflowed."""

    def forward(self, x):
        return super().forward(x) * (1.0 if self.training else torch.nan)


def test_a_network_without_a_loss_has_no_error():
    runs = fit(lambda: BrokenOutsideTraining(5, 3), DATA, steps=2, batch_size=10, seeds=2, **ON_CPU)
    assert (runs.diverged_at == -1).all()
    assert runs.test_loss.isnull().all()
    assert runs.test_error.isnull().all()


def test_large_seeds_are_named_in_full():
    with pytest.warns(UserWarning, match="seed=12345678 at step"):
        fit(
            LINEAR,
            DATA,
            Recipe(criterion=squares, optimizer=SGD(1e9)),
            steps=40,
            batch_size=10,
            seeds=[12345678],
            device="cpu",
        )


# ------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_networks_are_those_of_the_results(model, per_seed):
    data = [make_data(5), make_data(6)] if per_seed else DATA
    grid = {"lr": [0.3, 1.0], "flood_level": [0.0, 0.5]}
    arguments = {"steps": 12, "batch_size": 10, "grid": grid, "seeds": [7, 9], "evaluate_at": 12}
    runs = fit(model, data, networks="last", **arguments, **ON_CPU)
    again = fit(model, data, networks="best", **arguments, **ON_CPU)
    xr.testing.assert_equal(runs.data, again.data)
    chosen = best_step(runs)
    assert (chosen.step < 12).any()  # otherwise "best" would be "last"

    def error(network, params, x, y):
        return (network(params, x).argmax(-1) != y).double().mean()

    for networks, results in ((runs.networks, runs.isel(step=-1)), (again.networks, chosen)):
        assert networks.shape == (2, 2, 2)
        assert networks.coords == grid | {"seed": [7, 9]}
        for split in ("validation", "test"):
            measured = networks.measure(error, data, split)
            assert measured.dims == ("lr", "flood_level", "seed")
            np.testing.assert_allclose(measured, results[f"{split}_error"], rtol=1e-12)
        for lr in grid["lr"]:
            for level in grid["flood_level"]:
                for k, seed in enumerate([7, 9]):
                    run = {"lr": lr, "flood_level": level, "seed": seed}
                    module = networks.module(**run)
                    assert not module.training
                    d = data[k] if per_seed else data
                    wrong = (module(d.x_test.double()).argmax(1) != d.y_test).double().mean()
                    assert wrong.item() == pytest.approx(results.test_error.sel(run).item())


def test_best_by_another_variable_or_an_instrument():
    arguments = {"steps": 6, "batch_size": 10, "seeds": 2, "evaluate_at": 6, "networks": "best"}
    accuracy = lambda network, params, x, y: (network(params, x).argmax(-1) == y).double().mean()
    runs = fit(MLP, DATA, **arguments, select_by="test_loss", **ON_CPU)
    measured = runs.networks.measure(lambda f, p, x, y: cross_entropy(f(p, x), y), DATA, "test")
    np.testing.assert_allclose(measured, runs.test_loss.min("step"), rtol=1e-10)
    runs = fit(MLP, DATA, **arguments, instruments={"right": accuracy}, select_by="right", **ON_CPU)
    np.testing.assert_allclose(
        runs.networks.measure(accuracy, DATA, "train"), runs.right.min("step"), rtol=1e-12
    )


def test_measure_returns_what_the_instrument_returns():
    arguments = {"steps": 1, "seeds": [4, 6], "batch_size": 10, "networks": "last"}
    networks = fit(MLP, DATA, **arguments, **ON_CPU).networks
    logits = networks.measure(lambda f, p, x, y: f(p, x), DATA)
    assert logits.dims == ("seed", "dim_0", "dim_1")
    assert logits.shape == (2, 17, 3)
    for seed in (4, 6):
        expected = networks.module(seed=seed)(DATA.x_test.double()).detach()
        np.testing.assert_allclose(logits.sel(seed=seed), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="name must be one of .* got 'tets'"):
        networks.measure(lambda f, p, x, y: f(p, x), DATA, "tets")
    with pytest.raises(ValueError, match="or one per seed: got 3 for 2 seeds"):
        networks.measure(lambda f, p, x, y: f(p, x), [DATA] * 3)


def test_module_takes_the_coordinates_of_one_run():
    networks = fit(
        MLP,
        DATA,
        steps=1,
        grid={"lr": [1e-10, 0.1]},
        seeds=[100000, 100001],
        batch_size=10,
        networks="last",
        **ON_CPU,
    ).networks
    weights = [
        networks.module(lr=lr, seed=seed)[0].weight
        for lr in (1e-10, 0.1)
        for seed in (100000, 100001)
    ]
    for k, weight in enumerate(
        weights
    ):  # for seeds with a relative difference of 1e-5, and for lr ≈ 0
        assert torch.equal(weight, networks.params["0.weight"][k])
    with pytest.raises(ValueError, match="seed must be one of .*100001.*, got 100002"):
        networks.module(lr=0.1, seed=100002)
    with pytest.raises(ValueError, match=r"a value for each of \['lr', 'seed'\]"):
        networks.module(seed=100000)
    with pytest.raises(ValueError, match=r"a value for each of \['lr', 'seed'\]"):
        networks.module(lr=0.1, seed=100000, rho=0.1)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_networks_after_several_steps_are_those_of_shorter_runs(chunk_size):
    loss = lambda network, params, x, y: cross_entropy(network(params, x), y)
    arguments = {"batch_size": 10, "seeds": [4, 6], "grid": {"lr": [0.1, 0.5]}, **ON_CPU}
    runs = fit(
        BATCH_NORM,
        DATA,
        steps=10,
        evaluate_at=[0, 5, 10],
        networks=[10, 0, 5],
        chunk_size=chunk_size,
        **arguments,
    )
    assert runs.networks.coords == {"lr": [0.1, 0.5], "step": [0, 5, 10], "seed": [4, 6]}
    measured = runs.networks.measure(loss, DATA)
    assert measured.dims == ("lr", "step", "seed")
    xr.testing.assert_allclose(
        measured, runs.test_loss.transpose(*measured.dims).drop_vars("epoch"), rtol=1e-12
    )
    for steps in (5, 10):
        alone = fit(BATCH_NORM, DATA, steps=steps, networks="last", **arguments).networks
        np.testing.assert_allclose(measured.sel(step=steps), alone.measure(loss, DATA), rtol=1e-10)
        for run in ({"lr": lr, "seed": seed} for lr in (0.1, 0.5) for seed in (4, 6)):
            found = runs.networks.module(step=steps, **run).state_dict()
            torch.testing.assert_close(found, alone.module(**run).state_dict(), rtol=1e-10, atol=0)
    start = runs.networks.module(step=0, lr=0.5, seed=6).state_dict()
    expected = initial_module(BATCH_NORM, 6).double().state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in start.items())


def test_runs_are_the_data_with_the_networks():
    arguments = {"steps": 2, "batch_size": 10, "seeds": 2, "grid": {"lr": [0.1, 0.2]}, **ON_CPU}
    runs = fit(MLP, DATA, networks="last", **arguments)
    assert isinstance(runs, stack.Runs) and isinstance(runs.data, xr.Dataset)
    assert runs.test_error.identical(runs.data.test_error)
    assert runs["test_error"].identical(runs.data["test_error"])
    assert runs.sel(lr=0.2).identical(runs.data.sel(lr=0.2))
    assert runs.sizes == runs.data.sizes and runs.attrs is runs.data.attrs
    assert {"data", "networks", "test_error", "sel"} <= {*dir(runs)}
    with pytest.raises(AttributeError, match="accuracy"):
        _ = runs.accuracy
    with pytest.raises(KeyError, match="accuracy"):
        runs["accuracy"]
    loaded = pickle.loads(pickle.dumps(runs))
    assert_bitwise_equal(runs, loaded)
    assert loaded.data.identical(runs.data)
    without = fit(MLP, DATA, **arguments)
    assert without.networks is None
    assert repr(runs) == f"{runs.data!r}\nwith 4 networks"
    assert repr(without).endswith("\nwith no networks")


# ----------------------------------------------------------------------------------- best_step


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, np.nan]), min_size=n, max_size=n).filter(
                lambda scores: scores[0] == scores[0]
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_best_step_is_the_first_minimum(scores):
    steps = [10 * t for t in range(len(scores[0]))]
    runs = xr.Dataset(
        {
            "validation_loss": (("lr", "seed", "step"), [scores]),
            "test_error": (
                ("lr", "seed", "step"),
                np.random.default_rng(0).random((1, *np.shape(scores))),
            ),
            "diverged_at": (("lr", "seed"), np.full((1, len(scores)), -1)),
        },
        {"lr": [0.1], "seed": range(len(scores)), "step": steps},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = best_step(runs, "validation_loss")
    expected = [s.index(min(v for v in s if v == v)) for s in scores]
    assert chosen.step.dims == ("lr", "seed")
    assert chosen.step.values.tolist() == [[steps[k] for k in expected]]
    for seed, k in enumerate(expected):
        assert chosen.test_error.values[0, seed] == runs.test_error.values[0, seed, k]
        assert chosen.validation_loss.values[0, seed] == scores[seed][k]


def test_best_step_of_bad_input():
    runs = fit(MLP, DATA, steps=2, batch_size=10, seeds=2, **ON_CPU)
    for by in ("validation_accuracy", "diverged_at"):
        with pytest.raises(
            ValueError, match=f"by must be one of .*'validation_loss'.*, got '{by}'"
        ):
            best_step(runs, by)


# -------------------------------------------------------------------------------------- labels


def test_labels(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([20.0, 23.5]).__next__)
    monkeypatch.setattr(stack, "time", clock)
    runs = fit(
        MLP,
        DATA,
        Recipe(loss=Flooding(0.25), optimizer=SGD(0.05)),
        steps=7,
        batch_size=10,
        grid={"momentum": [0.0, 0.5], "weight_decay": [0.0]},
        seeds=3,
        evaluate_at=3,
        device="cpu",
        instruments={"norm": lambda f, params, x, y: sum((w**2).sum() for w in params.values())},
    )
    assert set(runs.data_vars) == {f"{s}_{m}" for s in SPLITS for m in ("loss", "error")} | {
        "norm",
        "diverged_at",
    }
    for name in set(runs.data_vars) - {"diverged_at"}:
        assert runs[name].dims == ("momentum", "weight_decay", "seed", "step")
        assert runs[name].dtype == np.float64
    assert runs.diverged_at.dims == ("momentum", "weight_decay", "seed")
    assert runs.momentum.values.tolist() == [0.0, 0.5]
    assert runs.seed.values.tolist() == [0, 1, 2]
    assert runs.step.values.tolist() == [0, 2, 5, 7]  # evenly, rounded to whole steps
    np.testing.assert_allclose(runs.epoch, runs.step / 3)  # three batches per epoch
    assert runs.attrs["data"] == "blobs"
    assert runs.attrs["steps"] == 7
    assert runs.attrs["batch_size"] == 10
    assert runs.attrs["dtype"] == "torch.float32"
    assert runs.attrs["device"] == "cpu"
    assert runs.attrs["torch"] == torch.__version__
    assert runs.attrs["seconds"] == 3.5
    for part in ("flood_level=0.25", "lr=0.05", "PlainGradient", "example_losses"):
        assert part in runs.attrs["recipe"]

    path = tmp_path / "runs.nc"
    runs.to_netcdf(path, engine="scipy")
    with xr.open_dataset(path, engine="scipy") as loaded:
        xr.testing.assert_equal(loaded, runs.data)
        for name, value in runs.attrs.items():
            assert loaded.attrs[name] == value


def test_first_seed_shifts_the_seeds(monkeypatch):
    monkeypatch.setenv("FLATMIN_SEED", "2")
    runs = fit(MLP, DATA, steps=1, batch_size=10, seeds=2, **ON_CPU)
    assert runs.seed.values.tolist() == [2000, 2001]
    assert fit(MLP, DATA, steps=1, seeds=[5], batch_size=10, **ON_CPU).seed.values.tolist() == [5]


def test_splits():
    noisy = dataclasses.replace(DATA, y_train=(DATA.y_train + 1) % 3)
    runs = fit(MLP, noisy, steps=2, batch_size=10, seeds=2, splits=["train_clean"], **ON_CPU)
    clean = fit(MLP, noisy, steps=2, batch_size=10, seeds=2, splits=["train"], **ON_CPU)
    assert set(runs.data_vars) == {"train_clean_loss", "train_clean_error", "diverged_at"}
    assert (runs.train_clean_loss.values != clean.train_loss.values).all()
    _, module = plain_loop(MLP, noisy, 1, steps=2, batch_size=10)
    expected = cross_entropy(module(noisy.x_train.double()), noisy.y_train_clean).item()
    assert runs.train_clean_loss.sel(seed=1, step=2).item() == pytest.approx(expected, rel=1e-10)
    without = make_data(validation=0)
    runs = fit(MLP, without, steps=1, batch_size=10, seeds=1, **ON_CPU)
    assert set(runs.data_vars) == {"train_loss", "train_error", "test_loss", "test_error"} | {
        "diverged_at"
    }


# ---------------------------------------------------------------------------------- instruments


@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_an_instrument_with_gradients(model, per_seed):
    def gradient_norm(network, params, x, y):
        gradient = torch.func.grad(lambda p: cross_entropy(network(p, x), y))(params)
        return sum((g**2).sum() for g in gradient.values()).sqrt()

    data = [make_data(1), make_data(2)] if per_seed else DATA
    runs = fit(
        model,
        data,
        steps=4,
        batch_size=10,
        seeds=2,
        evaluate_at=1,
        networks="last",
        instruments={"gradient_norm": gradient_norm},
        **ON_CPU,
    )
    for seed in (0, 1):
        d = data[seed] if per_seed else data
        module = runs.networks.module(seed=seed)
        cross_entropy(module(d.x_train.double()), d.y_train).backward()
        norm = torch.stack([w.grad.norm() for w in module.parameters()]).norm().item()
        assert runs.gradient_norm.sel(seed=seed, step=4).item() == pytest.approx(norm, rel=1e-10)


def test_instruments_have_named_values_and_dimensions():
    def outputs(network, params, x, y):
        return network(params, x)

    @dims(mean=[], largest=["class"])
    def summary(network, params, x, y, scale=1.0):
        output = scale * network(params, x)
        return {"mean": output.mean(), "largest": output.amax(0)}

    instruments = {"all": outputs, "twice": partial(summary, scale=2.0)}
    runs = fit(
        MLP, DATA, steps=2, batch_size=10, seeds=2, evaluate_at=1, instruments=instruments,
        networks="last", **ON_CPU,
    )  # fmt: skip
    assert runs["all"].dims == ("seed", "step", "all_dim_0", "all_dim_1")
    assert runs["twice_mean"].dims == ("seed", "step")
    assert runs["twice_largest"].dims == ("seed", "step", "class")
    last = {name: runs[f"twice_{name}"].isel(step=-1) for name in ("mean", "largest")}
    found = runs.networks.measure(instruments["twice"], DATA, "train")
    for name, values in last.items():
        np.testing.assert_allclose(values, found[name])
    few = runs.networks.measure(outputs, DATA, "train", examples=3)
    np.testing.assert_allclose(few, runs["all"].isel(step=-1, all_dim_0=slice(3)))


def test_instruments_measure_the_loss_that_is_trained():
    x = torch.linspace(-1, 1, 12).double()[:, None]
    data = Data.of(x, x.sin())
    squared = lambda output, y: ((output - y) ** 2).mean(1)
    other = partial(gradient_norm, criterion=lambda output, y: 3 * squared(output, y))
    runs = fit(
        nn.Linear(1, 1),
        data,
        Recipe(criterion=squared),
        steps=3,
        batch_size=5,
        seeds=2,
        networks="last",
        instruments={"slope": gradient_norm, "three": other},
        **ON_CPU,
    )
    for k, network in enumerate(runs.seed.values):
        module = runs.networks.module(seed=network)
        loss = squared(module(x), x.sin()).mean()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, module.parameters())])
        for found in (runs.slope[k, -1], runs.networks.measure(gradient_norm, data, "train")[k]):
            assert found.item() == pytest.approx(expected.norm().item(), rel=1e-10)
        assert runs.three[k, -1].item() == pytest.approx(3 * expected.norm().item(), rel=1e-10)


def test_an_empty_split_is_not_measured():
    runs = fit(MLP, DATA, steps=1, batch_size=10, seeds=1, networks="last", **ON_CPU)
    with pytest.raises(ValueError, match="split must have examples, got 'validation'"):
        runs.networks.measure(gradient_norm, make_data(validation=0), "validation")


def test_networks_in_half_precision_are_measured_in_single():
    half = fit(MLP, DATA, steps=2, batch_size=10, seeds=2, networks="last", device="cpu",
               dtype=torch.bfloat16, grid={"lr": [0.1, 0.3]})  # fmt: skip
    found = half.networks.measure(sharpness, DATA, "train")
    module = half.networks.module(lr=0.3, seed=half.seed.values[1]).float()
    expected = on(module, sharpness, DATA.x_train.bfloat16().float(), DATA.y_train)
    assert found.values[1, 1] == pytest.approx(expected.item(), rel=1e-4)


def test_a_batch_larger_than_the_training_set_is_all_of_it():
    few, many = (fit(MLP, DATA, steps=3, batch_size=size, seeds=2, **ON_CPU) for size in (23, 100))
    xr.testing.assert_identical(few.data.drop_attrs(), many.data.drop_attrs())


def test_instruments_have_names_of_their_own():
    with pytest.raises(ValueError, match=r"instruments must have names of their own.*test_error"):
        fit(
            MLP,
            DATA,
            steps=1,
            batch_size=10,
            instruments={"test_error": lambda f, p, x, y: x.sum()},
        )


# ------------------------------------------------------------------------------- other stages


@dataclasses.dataclass(frozen=True)
class Twice(GradientStage):
    """A gradient stage with a hyperparameter: the gradient, scaled."""

    scale: float = 2.0

    def __call__(self, objective, params, state, t):
        gradient = objective.gradient(params)
        return {name: self.scale * g for name, g in gradient.items()}, state


def test_the_grid_reaches_every_stage():
    arguments = {"steps": 5, "batch_size": 10, "seeds": 2, **ON_CPU}
    scaled = fit(
        MLP,
        DATA,
        Recipe(gradient=Twice(), optimizer=SGD(0.1)),
        grid={"scale": [1.0, 3.0]},
        **arguments,
    )
    for scale in (1.0, 3.0):
        plain = fit(MLP, DATA, Recipe(optimizer=SGD(0.1 * scale)), **arguments)
        np.testing.assert_allclose(scaled.test_loss.sel(scale=scale), plain.test_loss, rtol=1e-10)


def sam_loop(seed, rho, shards, level):
    """Eight steps of SAM by hand: each shard ascends its raw loss, then descends its flooded one.

    ``shards`` are the sizes of the parts of a batch.
    """
    module = initial_module(MLP, seed).double()
    params = list(module.parameters())
    mean = lambda rows: cross_entropy(module(DATA.x_train[rows].double()), DATA.y_train[rows])
    for t in range(8):
        epoch, k = divmod(t, 3)
        batch = epoch_order(seed, epoch, 23).split(10)[k]
        total = [torch.zeros_like(w) for w in params]
        for rows in batch.split(shards):
            g = torch.autograd.grad(mean(rows), params)
            length = sum((x**2).sum() for x in g).sqrt()
            start = [w.detach().clone() for w in params]
            with torch.no_grad():
                for w, x in zip(params, g, strict=True):
                    w += rho * x / length
            uphill = torch.autograd.grad((mean(rows) - level).abs() + level, params)
            with torch.no_grad():
                for w, old, all_, x in zip(params, start, total, uphill, strict=True):
                    w.copy_(old)
                    all_ += x * len(rows) / len(batch)
        with torch.no_grad():
            for w, x in zip(params, total, strict=True):
                w -= 0.3 * x
    return module.state_dict()


@pytest.mark.parametrize("m, chunk_size", [(None, None), (4, None), (4, 1), (1, None)])
@pytest.mark.parametrize("level", [0.0, 0.9, 3.0])
def test_sam_with_shards_and_flooding_equals_a_loop_by_hand(m, chunk_size, level):
    recipe = Recipe(
        loss=Flooding(level), gradient=SAM(m=m, chunk_size=chunk_size), optimizer=SGD(lr=0.3)
    )
    networks = fit(
        MLP,
        DATA,
        recipe,
        steps=8,
        batch_size=10,
        seeds=[3, 8],
        networks="last",
        grid={"rho": [0.1, 0.4]},
        evaluate_at=1,
        **ON_CPU,
    ).networks
    for run in [{"rho": rho, "seed": seed} for rho in (0.1, 0.4) for seed in (3, 8)]:
        actual = networks.module(**run).state_dict()
        expected = sam_loop(**run, shards=m or 10, level=level)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class ByParts(GradientStage):
    """The raw mean's gradient, from four examples at a time."""

    def __call__(self, objective, params, state, t):
        total = {name: torch.zeros_like(w) for name, w in params.items()}
        for rows in torch.arange(objective.size).split(4):
            gradient, share = objective.gradient(params, rows, raw=True), len(rows) / objective.size
            total = {name: total[name] + share * g for name, g in gradient.items()}
        return total, state


def test_the_objective_has_the_raw_loss_of_rows_and_the_size_of_the_batch():
    arguments = {"steps": 7, "batch_size": 10, "seeds": 2, "networks": "last", **ON_CPU}
    parts = fit(MLP, DATA, Recipe(loss=Flooding(5.0), gradient=ByParts()), **arguments)
    plain = fit(MLP, DATA, Recipe(), **arguments)
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(parts.networks.params, plain.networks.params, **close)


@dataclasses.dataclass(frozen=True)
class PlusNothing(GradientStage):
    """A gradient stage, of an objective to which zero is added."""

    inner: GradientStage

    def __call__(self, objective, params, state, t):
        nothing = lambda w: 0 * sum(x.sum() for x in w.values())
        return self.inner(objective.plus(nothing), params, state, t)


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
@pytest.mark.parametrize("m", [None, 4])
def test_adding_zero_to_the_objective_changes_nothing(m, model):
    a, b = (
        fit(
            model,
            DATA,
            Recipe(loss=Flooding(1.3), gradient=gradient, optimizer=SGD(0.3)),
            steps=7,
            batch_size=10,
            seeds=2,
            grid={"rho": [0.1, 0.4]},
            networks="last",
            device="cpu",
        )
        for gradient in (SAM(m=m), PlusNothing(SAM(m=m)))
    )
    assert_bitwise_equal(a, b)


class OwnGradient(GradientStage):
    """Differentiates by itself, and keeps neither loss nor buffers for the step."""

    def __call__(self, objective, params, state, t):
        return torch.func.grad(objective)(params), state


@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["MLP", "batch norm", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stage_that_differentiates_by_itself_is_bitwise_the_plain_gradient(model, dtype):
    a, b = (
        fit(
            model,
            DATA,
            Recipe(loss=Flooding(0.9), gradient=gradient, optimizer=SGD(0.3)),
            steps=7,
            batch_size=10,
            seeds=2,
            networks="last",
            device="cpu",
            dtype=dtype,
        )
        for gradient in (PlainGradient(), OwnGradient())
    )
    assert_bitwise_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Momentum(GradientStage):
    """SGD's momentum as a gradient stage with a state."""

    momentum: float = 0.9

    def init(self, params):
        return {name: torch.zeros_like(w) for name, w in params.items()}

    def __call__(self, objective, params, state, t):
        gradient = objective.gradient(params)
        state = {name: self.momentum * state[name] + g for name, g in gradient.items()}
        return state, state


def test_the_state_of_a_gradient_stage_is_kept():
    arguments = {"steps": 7, "batch_size": 10, "seeds": 2, **ON_CPU}
    recipe = Recipe(gradient=Momentum())
    ours = fit(MLP, DATA, recipe, grid={"gradient.momentum": [0.5, 0.9]}, **arguments)
    for momentum in (0.5, 0.9):
        sgd_s = fit(MLP, DATA, Recipe(optimizer=SGD(momentum=momentum)), **arguments)
        one = ours.test_loss.sel({"gradient.momentum": momentum})
        np.testing.assert_allclose(one, sgd_s.test_loss, rtol=1e-10)


class Weighted(LossStage):
    """Each training example has its own weight."""

    def __call__(self, losses, rows):
        return (losses * (1.0 + rows)).mean()


@pytest.mark.parametrize("batch_size", [10, None])
@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
def test_the_loss_stage_knows_the_rows_of_the_training_set(per_seed, batch_size):
    sets = [make_data(seed) for seed in (1, 2)] if per_seed else [DATA]
    weighted = [  # the weight comes with the targets
        Data.of(d.x_train, torch.stack([d.y_train.float(), 1.0 + torch.arange(23)], 1))
        for d in sets
    ]
    squared = lambda output, y: (output[:, 0] - y[:, 0]) ** 2
    a, b = (
        fit(
            MLP,
            weighted if per_seed else weighted[0],
            recipe,
            steps=7,
            batch_size=batch_size,
            seeds=2,
            grid={"lr": [1e-3, 1e-2]},
            networks="last",
            **ON_CPU,
        )
        for recipe in (
            Recipe(criterion=squared, loss=Weighted()),
            Recipe(criterion=lambda output, y: squared(output, y) * y[:, 1]),
        )
    )
    torch.testing.assert_close(a.networks.params, b.networks.params, rtol=1e-10, atol=1e-12)


class Averaged(SGD):
    """SGD; the mean of the weights before and after all steps is evaluated and kept."""

    def init(self, params):
        return {"mean": dict(params), "count": torch.ones(())}

    def __call__(self, direction, params, state, t):
        params, _ = super().__call__(direction, params, {}, t)
        count = state["count"] + 1
        mean = {name: m + (params[name] - m) / count for name, m in state["mean"].items()}
        return params, {"mean": mean, "count": count}

    def evaluated(self, params, state):
        return state["mean"]


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_the_optimizer_says_which_weights_are_evaluated(model):
    arguments = {"steps": 7, "batch_size": 10, "seeds": 2, "evaluate_at": [7], **ON_CPU}
    averaged = fit(model, DATA, Recipe(optimizer=Averaged()), networks="last", **arguments)
    plain = fit(model, DATA, Recipe(optimizer=SGD()), networks=range(8), **arguments)
    for name, w in plain.networks.params.items():
        mean = w.unflatten(0, (8, 2)).mean(0)
        torch.testing.assert_close(averaged.networks.params[name], mean, rtol=1e-10, atol=1e-12)
    for seed in (0, 1):
        module = averaged.networks.module(seed=seed)
        for layer in module:  # batch norm's statistics are those of the training set
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
                layer.momentum = 1.0
        module.train()(DATA.x_train.double())
        loss = cross_entropy(module.eval()(DATA.x_test.double()), DATA.y_test).item()
        found = averaged.test_loss.sel(seed=seed, step=7).item()
        assert found == pytest.approx(loss, rel=1e-10)


def test_another_criterion():
    runs = fit(
        LINEAR,
        DATA,
        Recipe(criterion=squares),
        steps=1,
        batch_size=None,
        seeds=1,
        evaluate_at=1,
        **ON_CPU,
    )
    logits = initial_module(LINEAR, 0).double()(DATA.x_test.double())
    expected = squares(logits, DATA.y_test).mean().item()
    assert runs.test_loss.isel(seed=0, step=0).item() == pytest.approx(expected, rel=1e-12)


mean_loss = lambda losses, rows: losses.mean()


def test_hyperparameters():
    recipe = Recipe(loss=Flooding(0.1), gradient=Twice(), optimizer=Adam())
    assert recipe.hyperparameters() == {
        "loss.flood_level": 0.1,
        "gradient.scale": 2.0,
        "optimizer.lr": 1e-3,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
    }
    changed = recipe.with_values({"scale": 5.0, "optimizer.lr": 0.5, "eps": 0.1})
    assert changed == Recipe(loss=Flooding(0.1), gradient=Twice(5.0), optimizer=Adam(0.5, eps=0.1))
    assert recipe.path("scale") == recipe.path("gradient.scale") == "gradient.scale"
    assert Recipe(loss=mean_loss).hyperparameters().keys() == {
        f"optimizer.{name}" for name in ("lr", "momentum", "weight_decay")
    }
    mixed = Recipe(loss=mean_loss, batch=Mixup(0.5, k=3))
    assert mixed.hyperparameters()["batch.alpha"] == 0.5
    assert mixed.with_values({"alpha": 2}).batch == Mixup(2, k=3)


@pytest.mark.parametrize(
    "recipe, path, least",
    [
        (Recipe(batch=Mixup(k=3)), "batch.k", 2),
        (Recipe(gradient=SAM(m=2)), "gradient.m", 1),
        (Recipe(gradient=SAM(chunk_size=2)), "gradient.chunk_size", 1),
        (Recipe(optimizer=TwoRates()), "optimizer.period", 2),
    ],
    ids=["k", "m", "chunk_size", "period"],
)
def test_whole_numbers_are_listed_and_not_swept(recipe, path, least):
    name = path.rpartition(".")[2]
    assert recipe.hyperparameters()[path] in (2, 3)
    assert recipe.with_values({name: 4}).hyperparameters()[path] == 4
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= {least}, got 2.0"):
        fit(MLP, DATA, recipe, steps=1, batch_size=10, seeds=1, grid={path: [2, 3]}, device="cpu")


@dataclasses.dataclass(frozen=True)
class Wrapped(OptimizerStage):
    """An optimizer in another."""

    inner: SGD = SGD(momentum=0.9, schedule="cosine")

    def init(self, params):
        return self.inner.init(params)

    def __call__(self, direction, params, state, t):
        return self.inner(direction, params, state, t)


@pytest.mark.parametrize("name", ["optimizer.inner.lr", "lr"])
def test_the_grid_reaches_a_wrapped_stage(name):
    arguments = {"steps": 7, "batch_size": 10, "seeds": 2, **ON_CPU}
    recipe = Recipe(optimizer=Wrapped())
    assert recipe.path(name) == "optimizer.inner.lr"
    swept = fit(MLP, DATA, recipe, grid={name: [0.05, 0.2]}, **arguments)
    assert swept.test_loss.dims == (name, "seed", "step")
    for lr in (0.05, 0.2):
        single = Recipe(optimizer=SGD(lr, momentum=0.9, schedule="cosine"))
        np.testing.assert_allclose(
            swept.test_loss.sel({name: lr}), fit(MLP, DATA, single, **arguments).test_loss, 1e-10
        )


@dataclasses.dataclass(frozen=True)
class Eps(Twice):
    eps: float = 0.5


def test_an_ambiguous_name_is_an_error_if_it_is_used():
    recipe = Recipe(gradient=Eps(), optimizer=Adam())
    assert {"gradient.eps", "optimizer.eps"} < recipe.hyperparameters().keys()
    arguments = {"steps": 1, "batch_size": 10, "seeds": 1, "device": "cpu"}
    fit(MLP, DATA, recipe, grid={"scale": [1.0], "optimizer.eps": [0.1]}, **arguments)
    with pytest.raises(ValueError, match="gradient.eps or optimizer.eps, got 'eps'"):
        fit(MLP, DATA, recipe, grid={"eps": [0.1]}, **arguments)


MISPLACED = {
    "batch stage as loss": (
        {"loss": Mixup()},
        r"loss must be a loss stage, but Mixup\(.*\) belongs in the batch stage: Recipe\(batch=",
    ),
    "optimizer as gradient": (
        {"gradient": SGD()},
        r"gradient must be a gradient stage, but SGD\(.*\) belongs .*: Recipe\(optimizer=",
    ),
    "loss stage as batch": ({"batch": Flooding()}, r"batch must be .*: Recipe\(loss="),
    "torch's class": (
        {"optimizer": torch.optim.SGD},
        r"optimizer must be .*such as flatmin.optimizer.SGD\(lr=0.1\), got torch.optim.sgd.SGD",
    ),
    "torch's instance": (
        {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)},
        r"optimizer must be .*such as flatmin.optimizer.SGD\(lr=0.1\), got a torch.optim.SGD",
    ),
    "class": (
        {"loss": Flooding},
        r"loss must be an instance, such as Flooding\(\), got flatmin.loss.flooding.Flooding",
    ),
    "number as loss": ({"loss": 0.1}, r"loss must be callable.*LossStage, got 0.1"),
    "function": ({"gradient": torch.neg}, r"gradient must .* method init.*GradientStage, got <"),
    "no optimizer": ({"optimizer": None}, r"optimizer must .*OptimizerStage, got None"),
    "number as criterion": (
        {"criterion": 3},
        r"criterion must be a function of outputs and targets, got 3",
    ),
    "stage as criterion": ({"criterion": Flooding()}, r"criterion must be .*got Flooding\("),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_what_does_not_belong_in_a_stage_is_refused(case):
    stages, message = MISPLACED[case]
    with pytest.raises(TypeError, match=message):
        Recipe(**stages)


# ------------------------------------------------------------------------------ other targets


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_regression_equals_a_plain_loop(dtype, tolerance):
    """Two numbers per example, in double precision; the parts of an evaluation are uneven."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    runs = fit(
        lambda: nn.Linear(5, 2),
        (x, y),
        Recipe(criterion=lambda output, y: (output - y) ** 2),
        steps=7,
        batch_size=10,
        seeds=2,
        evaluate_at=[0, 7],
        metrics={"absolute": lambda output, y: (output - y).abs()},
        networks="last",
        evaluation_batch_size=7,
        device="cpu",
        dtype=dtype,
    )
    assert set(runs.data_vars) == {"train_loss", "train_absolute", "diverged_at"}
    assert next(iter(runs.networks.params.values())).dtype == dtype
    for seed in (0, 1):
        module = initial_module(lambda: nn.Linear(5, 2), seed).to(dtype)
        optimizer, records = torch.optim.SGD(module.parameters(), lr=0.1), []
        for t in range(8):
            if t in (0, 7):
                residual = (module(x.to(dtype)) - y.to(dtype)).detach()
                loss, absolute = (residual**2).mean().item(), residual.abs().mean().item()
                records.append({"train_loss": loss, "train_absolute": absolute})
            if t < 7:
                rows = epoch_order(seed, t // 3, 23).split(10)[t % 3]
                optimizer.zero_grad()
                nn.functional.mse_loss(module(x[rows].to(dtype)), y[rows].to(dtype)).backward()
                optimizer.step()
        assert_same_run(runs, records, module, tolerance, seed=seed)


def test_targets_of_tokens_equal_a_plain_computation():
    """The mean is over all tokens of all examples."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(5, (2, 23, 4), generator=generator)
    runs = fit(
        lambda: nn.Sequential(nn.Embedding(5, 6), nn.Tanh(), nn.Linear(6, 5)),
        Data.of(x, y, test=(x[:9], y[:9]), num_classes=5),
        Recipe(criterion=lambda z, y: cross_entropy(z.movedim(-1, 1), y, reduction="none")),
        steps=7,
        batch_size=10,
        seeds=2,
        evaluate_at=[7],
        networks="last",
        evaluation_batch_size=7,
        **ON_CPU,
    )
    for seed in (0, 1):
        module = runs.networks.module(seed=seed)
        for split, n in {"train": 23, "test": 9}.items():
            logits, classes = module(x[:n]).detach().flatten(0, 1), y[:n].flatten()
            found = runs.sel(seed=seed, step=7)
            loss, wrong = cross_entropy(logits, classes), (logits.argmax(1) != classes).double()
            np.testing.assert_allclose(found[f"{split}_loss"], loss, rtol=1e-12)
            np.testing.assert_allclose(found[f"{split}_error"], wrong.mean(), rtol=1e-12)


# -------------------------------------------------------------------------------- synchronization


class Synchronizations(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.rstrip("2").lstrip("_") in [
            n.lstrip("_") for n in self.NAMES
        ]:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(loss=Flooding(0.5), optimizer=SGD(0.1, **COSINE)),
        Recipe(loss=Flooding(0.5, per_example=True), optimizer=Adam(0.1, weight_decay=0.1)),
        Recipe(batch=Mixup(0.3, partners="different", per_example=True)),
        Recipe(batch=Mixup(0.3, k=3, second_stream=True)),
        Recipe(batch=Gaussian()),
        Recipe(batch=LabelSmoothing()),
    ],
    ids=["SGD", "Adam", "mixup", "Dirichlet", "noise", "smoothing"],
)
@pytest.mark.parametrize("batch_size", [10, None])
def test_a_step_does_not_wait_for_the_device(recipe, batch_size):
    model = lambda: nn.Sequential(BATCH_NORM(), Dropout(0.3))

    def waits(steps, recipe):
        with Synchronizations() as waiting:
            fit(
                model,
                DATA,
                recipe,
                steps=steps,
                batch_size=batch_size,
                seeds=2,
                device="cpu",
                evaluate_at=[0],
                grid={"lr": [0.01, 0.1]},
                expect_divergence=True,
            )
        return waiting.count

    assert waits(13, recipe) == waits(1, recipe)
    # a step that waits is counted
    waiting = lambda done: torch.tensor(1 - done).item()
    spoilt = dataclasses.replace(
        recipe, optimizer=dataclasses.replace(recipe.optimizer, schedule=waiting)
    )
    assert waits(13, spoilt) == waits(1, spoilt) + 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", [MLP, BATCH_NORM, DROPOUT], ids=["MLP", "batch norm", "dropout"])
@pytest.mark.parametrize("batch", [None, Mixup(0.3), Gaussian(0.3)], ids=["ERM", "mixup", "noise"])
def test_cpu_and_cuda_agree(model, batch):
    state = torch.cuda.get_rng_state()
    recipe = Recipe(loss=Flooding(0.3), optimizer=SGD(0.1, **COSINE), batch=batch)
    ours, cuda = (
        fit(
            model,
            DATA,
            recipe,
            steps=12,
            batch_size=10,
            grid={"lr": [0.05, 0.1]},
            seeds=3,
            evaluate_at=4,
            networks="best",
            device=device,
            dtype=torch.float64,
        )
        for device in ("cpu", "cuda")
    )
    xr.testing.assert_allclose(ours.data, cuda.data, rtol=1e-8, atol=1e-10)
    for name, w in ours.networks.params.items():
        assert cuda.networks.params[name].is_cuda
        torch.testing.assert_close(cuda.networks.params[name].cpu(), w, rtol=1e-8, atol=1e-10)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "batch", [None, Mixup(0.3, partners="same"), Gaussian(0.3)], ids=["ERM", "mixup", "noise"]
)
def test_cuda_steps_do_not_synchronize(batch):
    class Strict:
        """A schedule that makes synchronizations raise from the second step on."""

        def __call__(self, done):
            torch.cuda.set_sync_debug_mode("error" if 0 < done < 0.9 else "default")
            return 1.0

    try:
        fit(
            lambda: nn.Sequential(BATCH_NORM(), Dropout(0.3)),
            DATA,
            steps=40,
            batch_size=10,
            recipe=Recipe(loss=Flooding(0.3), optimizer=SGD(schedule=Strict()), batch=batch),
            seeds=3,
            evaluate_at=[0],
            device="cuda",
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------- bad input

BAD = {
    "steps zero": ({"steps": 0}, r"steps must be a whole number >= 1, got 0"),
    "steps fraction": ({"steps": 2.5}, r"steps must be a whole number >= 1, got 2.5"),
    "steps bool": ({"steps": True}, r"steps must be a whole number >= 1, got True"),
    "batch size": ({"batch_size": 0}, r"batch_size must be a whole number >= 1, got 0"),
    "chunk": ({"chunk_size": -1}, r"chunk_size must be a whole number >= 1, got -1"),
    "evaluation batch": ({"evaluation_batch_size": 0}, r"evaluation_batch_size must .*got 0"),
    "empty grid": ({"grid": {"lr": []}}, r"grid\['lr'\] must have at least one value"),
    "unknown name": ({"grid": {"rho": [0.1]}}, r"hyperparameters.*'optimizer.lr'.*got 'rho'"),
    "name of a flag": ({"grid": {"nesterov": [0, 1]}}, r"hyperparameters.*got 'nesterov'"),
    "name of a stage": ({"grid": {"optimizer": [0.1]}}, r"hyperparameters.*got 'optimizer'"),
    "name twice": (
        {"grid": {"lr": [0.1], "optimizer.lr": [0.1]}},
        r"grid names must be of different hyperparameters, got .*'lr': 'optimizer.lr'",
    ),
    "name of a text": (
        {"grid": {"schedule": ["cosine"]}},
        r"grid\['schedule'\] must be numbers, got \['cosine'\]",
    ),
    "grid of one number": ({"grid": {"lr": 0.1}}, r"grid\['lr'\] must be numbers, got 0.1"),
    "grid value": ({"grid": {"lr": [0.1, -1]}}, r"lr must be a number >= 0, got -1"),
    "grid nan": ({"grid": {"flood_level": [float("nan")]}}, r"flood_level must be .*got nan"),
    "seeds zero": ({"seeds": 0}, r"seeds must be a whole number >= 1, got 0"),
    "seeds bool": ({"seeds": True}, r"seeds must be a whole number >= 1, got True"),
    "seeds twice": ({"seeds": [1, 2, 1]}, r"seeds must be .*all different, got \[1, 2, 1\]"),
    "no seeds": ({"seeds": []}, r"seeds must be .*at least one.*got \[\]"),
    "fraction of a seed": ({"seeds": [0.5]}, r"seeds must be whole numbers.*got \[0.5\]"),
    "few data": ({"data": [DATA]}, r"data must be one Data, or one per seed: got 1 for 2 seeds"),
    "no data": ({"data": []}, r"data must be one Data, or one per seed: got 0 for 2 seeds"),
    "shapes": (
        {"data": [DATA, make_data(train=22)]},
        r"data of all seeds must have one shape.*22.*23",
    ),
    "inputs": ({"data": [DATA, make_data(features=4)]}, r"data of all seeds must have one shape"),
    "test shapes": (
        {"data": [DATA, make_data(test=2)]},
        r"one shape and type, got .*\(17, 5\).*\(2, 5\).* for test",
    ),
    "split": ({"splits": ["tets"]}, r"must be one of .*test.*got 'tets'"),
    "empty split": (
        {"data": make_data(validation=0), "splits": ["validation"]},
        r"splits must have examples, got 'validation'",
    ),
    "evaluate late": (
        {"evaluate_at": [0, 5]},
        r"evaluate_at must be steps between 0 and 4, got \[0, 5\]",
    ),
    "evaluate early": ({"evaluate_at": [-1]}, r"evaluate_at must be .*got \[-1\]"),
    "evaluate between": ({"evaluate_at": [0.5]}, r"evaluate_at must be .*got \[0.5\]"),
    "evaluate never": ({"evaluate_at": []}, r"evaluate_at must be .*got \[\]"),
    "evaluate zero": ({"evaluate_at": 0}, r"evaluate_at must be a whole number >= 1, got 0"),
    "networks": (
        {"networks": "x"},
        r"networks must be None, 'last', 'best' or steps between 0 and 4, got 'x'",
    ),
    "networks late": ({"networks": [0, 5]}, r"networks must be .* and 4, got \[0, 5\]"),
    "networks between": ({"networks": [0.5]}, r"networks must be .*got \[0.5\]"),
    "networks never": ({"networks": []}, r"networks must be .*got \[\]"),
    "select_by": (
        {"networks": "best", "select_by": "loss"},
        r"select_by must be one of .*'validation_error'.*got 'loss'",
    ),
    "select without validation": (
        {"networks": "best", "data": make_data(validation=0)},
        r"select_by must be one of .*got 'validation_error'",
    ),
    "dropout": (
        {"model": lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.3))},
        "random numbers must come from flatmin.layers.Dropout .* got others; nn.Dropout, ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fit(
            **{
                "model": MLP,
                "data": DATA,
                "steps": 4,
                "batch_size": 10,
                "seeds": 2,
                "device": "cpu",
            }
            | arguments
        )


def test_data_of_another_type_is_named():
    for data in (DATA.x_train, [DATA.x_train, DATA.y_train], (DATA.x_train, 3), 3):
        with pytest.raises(
            TypeError,
            match=r"data must be one Data, a sequence of one per seed, or tensors \(x, y\)",
        ):
            fit(MLP, data, steps=1, seeds=2)


def test_a_batch_stage_takes_targets_of_any_shape():
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    squares = lambda output, y: ((output - y) ** 2).sum(1)
    settings = dict(steps=3, batch_size=7, seeds=2, device="cpu")
    recipe = Recipe(batch=Gaussian(0.0), criterion=squares)
    model = nn.Linear(3, 2)
    for data in ((x, y), [Data.of(x, y), Data.of(x, y)]):
        noisy = fit(model, data, recipe, **settings)
        plain = fit(model, data, Recipe(criterion=squares), **settings)
        np.testing.assert_array_equal(noisy.train_loss, plain.train_loss)


def test_statistics_of_an_average_do_not_depend_on_how_it_is_evaluated():
    recipe = Recipe(optimizer=EMA(SGD(0.1), 0.5))
    runs = [
        fit(BATCH_NORM, DATA, recipe, steps=4, batch_size=10, seeds=2, evaluation_batch_size=size,
            **ON_CPU)
        for size in (11, 1000)
    ]  # fmt: skip
    np.testing.assert_allclose(runs[0].train_loss, runs[1].train_loss, rtol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"metrics": {"one": lambda z, y: z.sum()}},
            r"metrics\['one'\] must return one number or more",
        ),
        (
            {"recipe": Recipe(criterion=nn.CrossEntropyLoss())},
            r"criterion must return one loss per example .*, shape \(2,\), got \(\)",
        ),
        (
            {"recipe": Recipe(criterion=lambda z, y: (z[:, :1] - y) ** 2)},
            r"criterion must return one loss per example .*, got \(2, 2\)",
        ),
        (
            {"instruments": {"train": lambda f, p, x, y: {"loss": x.sum()}}},
            "instruments must return values with names of their own, got 'train_loss'",
        ),
        (
            {
                "instruments": {"a": lambda f, p, x, y: {"b": x}},
                "networks": "best",
                "select_by": "a_c",
            },
            r"select_by must be a variable with one number per run and step, got 'a_c' among",
        ),
        ({"metrics": {"loss": error}}, "metrics must have names of their own, got 'loss'"),
        ({"networks": 3.5}, "networks must be None, 'last', 'best' or steps"),
    ],
)
def test_what_would_be_silently_wrong_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(MLP, DATA, steps=5, batch_size=10, seeds=2, device="cpu", **arguments)


@dataclasses.dataclass(frozen=True)
class Half(BatchStage):
    """Every second example, with or without saying which these are."""

    rows: bool

    def __call__(self, batch, draw):
        half = batch._replace(x=batch.x[::2], y=batch.y[::2])
        return half._replace(rows=batch.rows[::2]) if self.rows else half


def test_a_batch_stage_that_changes_the_number_of_examples_says_which_are_left():
    settings = dict(steps=2, batch_size=10, seeds=2, device="cpu")
    assert np.isfinite(fit(MLP, DATA, Recipe(batch=Half(rows=True)), **settings).train_loss).all()
    with pytest.raises(ValueError, match="batch.rows must say for each of the 5 examples"):
        fit(MLP, DATA, Recipe(batch=Half(rows=False)), **settings)


def test_a_step_can_be_copied():
    for t in (copy.deepcopy(Step(3, of=12)), pickle.loads(pickle.dumps(Step(3, of=12)))):
        assert (t, t.of, t.done) == (3, 12, 0.25)


def test_labels_and_outputs_that_disagree():
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        fit(lambda: nn.Linear(5, 2), DATA, steps=1, batch_size=10, seeds=2, device="cpu")


def test_dropout_with_p_zero_is_not_a_random_layer():
    model = lambda: nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0))
    fit(model, DATA, steps=1, batch_size=10, seeds=1, device="cpu")


def test_numbers_from_numpy_and_torch_are_accepted():
    runs = fit(
        MLP,
        DATA,
        steps=np.int64(4),
        batch_size=np.int64(10),
        seeds=np.int64(2),
        device="cpu",
        grid={"lr": torch.tensor([0.5, 0.25]), "momentum": np.array([0.5], dtype=np.float32)},
        evaluate_at=np.linspace(0, 4, 3),
    )
    assert runs.step.values.tolist() == [0, 2, 4]
    assert runs.lr.values.tolist() == [0.5, 0.25]


# ------------------------------------------------------------------------------------ progress


def test_one_progress_bar_counts_every_step(monkeypatch, capfd):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.done = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n=1):
            self.done += n

    monkeypatch.setattr(stack, "tqdm", Bar)
    experiment = {"steps": 8, "batch_size": 10, "seeds": 4, "chunk_size": 2, **ON_CPU}
    fit(MLP, DATA, **experiment)
    assert [(bar.done, bar.total) for bar in bars] == [(32, 32)]
    assert capfd.readouterr().out == ""


def test_progress_is_told_every_gradient_and_changes_nothing():
    experiment = {"steps": 8, "batch_size": 10, "seeds": 3, "chunk_size": 2, **ON_CPU}
    counted = []
    stops = lambda n: counted.append(n) or True  # what it returns is ignored
    assert_bitwise_equal(fit(MLP, DATA, **experiment), fit(MLP, DATA, progress=stops, **experiment))
    assert counted == [20] * 8 + [10] * 8  # two runs at once, then one


class InPlace(nn.Sequential):
    def forward(self, x):
        x -= 0.5
        return super().forward(x)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(gradient=SAM(0.1))], ids=["plain", "SAM"])
def test_a_model_that_changes_its_input_in_place_is_refused(recipe, batch_size):
    data = make_data()
    before = [data.x_train.clone(), data.x_test.clone()]
    make = lambda: InPlace(nn.Linear(5, 3))
    for steps in ([0], [1]):
        with pytest.raises(ValueError, match="model must not change its input in place"):
            fit(make, data, recipe, steps=1, batch_size=batch_size, seeds=2, evaluate_at=steps,
                device="cpu")  # fmt: skip
    runs = fit(lambda: nn.Sequential(nn.Linear(5, 3)), data, recipe, steps=1, batch_size=batch_size,
               seeds=2, networks="last", device="cpu")  # fmt: skip
    changing = dataclasses.replace(runs.networks, template=make())
    for instrument in (sharpness, partial(sharpness, m=4), gradient_norm, stiffness, eigenvalues):
        with pytest.raises((ValueError, RuntimeError), match="in place|in-place"):
            on(make(), instrument, data.x_train, data.y_train)
        with pytest.raises((ValueError, RuntimeError), match="in place|in-place"):
            changing.measure(instrument, data, "train")
    assert torch.equal(data.x_train, before[0]) and torch.equal(data.x_test, before[1])


class Attribute(nn.Linear):
    def __init__(self, random):
        super().__init__(5, 3)
        self.shift = torch.rand(5) if random else torch.ones(5)

    def forward(self, x):
        return super().forward(x + self.shift)


def test_a_tensor_that_is_no_buffer_must_be_the_same_for_all_seeds():
    arguments = {"steps": 1, "batch_size": 10, "seeds": 2, "device": "cpu"}
    fit(lambda: Attribute(random=False), DATA, **arguments)
    with pytest.raises(
        ValueError, match="in parameters and buffers, .* got networks of seeds 0 and 1"
    ):
        fit(lambda: Attribute(random=True), DATA, **arguments)


def test_a_compiled_model_is_measured_as_the_model_itself():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    compiled = torch.compile(model, backend="eager")
    for instrument in (sharpness, partial(eigenvalues, steps=5)):
        found, expected = (on(m, instrument, DATA.x_train, DATA.y_train) for m in (compiled, model))
        np.testing.assert_array_equal(
            torch.as_tensor(found[0] if isinstance(found, tuple) else found),
            torch.as_tensor(expected[0] if isinstance(expected, tuple) else expected),
        )
