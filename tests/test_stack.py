"""The stack: each of its runs equals that of a plain PyTorch loop."""

import contextlib
import dataclasses
import warnings
from typing import Optional

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
from flatmin.gradient import SAM
from flatmin.layers import Dropout
from flatmin.loss import Flooding
from flatmin.optimizer import SGD, Adam
from flatmin.pipeline import plain_gradient
from flatmin.stack import epoch_order, initial_module, stream


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Remove the influence of the environment and of other tests' claims."""
    for name in ("FLATMIN_SEED", "FLATMIN_CLAIMS_LOG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(claims, "_texts", {})


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


def assert_same_run(dataset, networks, records, module, tolerance, **run):
    for name in records[0]:
        np.testing.assert_allclose(
            dataset[name].sel(run), [r[name] for r in records], rtol=tolerance, atol=tolerance
        )
    expected = module.state_dict()
    found = networks.module(**run).state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


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
        {"recipe": Recipe(Flooding(0.9), batch=Mixup(partners="different"))},
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
    dataset, networks = fit(
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
            assert_same_run(dataset, networks, records, module, 1e-10, seed=seed, **run)
    if grid:  # the grid has an effect
        last = dataset.train_loss.isel(step=-1)
        assert (
            abs(last.isel({next(iter(grid)): 0}) - last.isel({next(iter(grid)): 1})) > 1e-6
        ).all()


@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_runs_equal_a_plain_loop_in_single_precision(model):
    dataset, networks = fit(
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
    assert next(iter(networks.params.values())).dtype == torch.float32
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
        assert_same_run(dataset, networks, records, module, 2e-5, seed=seed)


def test_a_network_itself_is_where_every_run_starts():
    model = MLP()
    before = [w.clone() for w in model.parameters()]
    dataset, networks = fit(
        model, DATA, steps=4, batch_size=10, seeds=[1, 2], evaluate_at=2, networks="last", **ON_CPU
    )
    assert dataset.train_loss.isel(step=0, seed=0) == dataset.train_loss.isel(step=0, seed=1)
    for seed in (1, 2):
        records, module = plain_loop(
            model, DATA, seed, steps=4, batch_size=10, evaluate_at=[0, 2, 4]
        )
        assert_same_run(dataset, networks, records, module, 1e-10, seed=seed)
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
    dataset, networks = fit(
        Odd, DATA, steps=5, batch_size=10, seeds=[0, 1], evaluate_at=1, networks="last", **ON_CPU
    )
    for seed in (0, 1):
        records, module = plain_loop(Odd, DATA, seed, steps=5, batch_size=10, evaluate_at=[0, 5])
        assert_same_run(dataset, networks, records, module, 1e-10, seed=seed)
        found = networks.module(seed=seed)
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
    xr.testing.assert_allclose(whole[0], chunked[0], rtol=1e-10)
    for part in ("params", "buffers"):
        for name, w in getattr(whole[1], part).items():
            torch.testing.assert_close(w, getattr(chunked[1], part)[name], rtol=1e-10, atol=1e-10)


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
    xr.testing.assert_allclose(a, b, rtol=1e-12)


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
    erm, erm_networks = fit(MLP, DATA, Recipe(), grid={"flood_level": [0.0, 0.5]}, **arguments)
    mixed, networks = fit(MLP, DATA, Recipe(batch=Mixup()), grid={"alpha": [0.0, 1.0]}, **arguments)
    assert (
        mixed.test_loss.sel(alpha=0.0).values == erm.test_loss.sel(flood_level=0.0).values
    ).all()
    assert (mixed.test_loss.sel(alpha=1.0, step=7) != mixed.test_loss.sel(alpha=0.0, step=7)).all()
    for name, w in networks.params.items():
        assert torch.equal(w[:3], erm_networks.params[name][:3])


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
    )[1].params["0.weight"]
    a = first({"momentum": [0.0, 0.9]})  # has an effect from the second step on
    assert torch.equal(a[:2], a[2:])
    b = first({"alpha": [1.0, 0.2]})
    torch.testing.assert_close(b[:2], a[:2])
    assert (b[:2] != b[2:]).any()


def test_training_loss_is_that_of_the_original_examples():
    """Of the mixed ones, it would be about half a nat at α = 1, even for a perfect network."""
    runs, networks = fit(
        MLP,
        DATA,
        Recipe(batch=Mixup(1.0)),
        steps=3,
        batch_size=10,
        seeds=1,
        networks="last",
        **ON_CPU,
    )
    loss = networks.measure(lambda f, p, x, y: cross_entropy(f(p, x), y), DATA, "train")
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
    runs, networks = fit(
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
    assert (networks.buffers["2.counter"] == 7).all()
    key = networks.buffers["2.key"]
    assert torch.equal(key[:2], key[2:]) and key[0] != key[1]
    assert (networks.buffers["4.key"] != key).all()
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


# --------------------------------------------------------------------------------- checkpoints


class Interrupts:
    """A cosine schedule that raises KeyboardInterrupt at its n-th call."""

    def __init__(self, at):
        self.left = at

    def __call__(self, done):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return 0.5 + 0.5 * np.cos(np.pi * done)


def experiment(schedule, checkpoint=None, *, model=MLP, networks="last", batch=None, **more):
    """Two chunks of two runs, of eight steps each."""
    recipe = Recipe(optimizer=SGD(0.1, momentum=0.9, schedule=schedule), batch=batch)
    more = {"grid": {"flood_level": [0.0, 1.0]}, "seeds": [0, 5], "device": "cpu"} | more
    return fit(
        model,
        DATA,
        recipe,
        steps=8,
        batch_size=10,
        evaluate_at=[0, 3, 6, 8],
        networks=networks,
        chunk_size=more.pop("chunk_size", 2),
        checkpoint=checkpoint,
        checkpoint_every=more.pop("every", 2),
        **more,
    )


def assert_bitwise_equal(a, b):
    a, b = (a, b) if isinstance(a, tuple) else ((a,), (b,))
    assert a[0].equals(b[0])
    if a[1:]:
        for part in ("params", "buffers"):
            first, second = getattr(a[1], part), getattr(b[1], part)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("every", [1, 3, 8, 100])
@pytest.mark.parametrize(
    "model, networks",
    [(MLP, None), (BATCH_NORM, "last"), (BATCH_NORM, "best")],
    ids=["MLP", "batch norm, last", "batch norm, best"],
)
def test_interrupted_anywhere_and_resumed_is_bitwise_the_same(model, networks, every, tmp_path):
    whole = experiment(Interrupts(10**6), model=model, networks=networks)
    for step in (0, 3, 7, 8, 10, 15):  # the second chunk begins at 8
        path = tmp_path / f"{step}.pt"
        with pytest.raises(KeyboardInterrupt):
            experiment(Interrupts(step), path, model=model, networks=networks, every=every)
        rest = Interrupts(10**6)
        resumed = experiment(rest, path, model=model, networks=networks, every=every)
        assert_bitwise_equal(whole, resumed)
        saved = step // 8 * 8 + step % 8 // every * every  # finished steps are not repeated
        assert 10**6 - rest.left == 16 - saved


@pytest.mark.parametrize("every", [1, 3])
def test_dropout_and_mixup_resume_bitwise(every, tmp_path):
    arguments = {
        "model": DROPOUT,
        "batch": Mixup(second_stream=True),
        "every": every,
        "grid": {"alpha": [0.2, 1.0]},
    }
    whole = experiment(Interrupts(10**6), **arguments)
    for step in (0, 4, 7, 13):
        with pytest.raises(KeyboardInterrupt):
            experiment(Interrupts(step), tmp_path / f"{step}.pt", **arguments)
        resumed = experiment(Interrupts(10**6), tmp_path / f"{step}.pt", **arguments)
        assert_bitwise_equal(whole, resumed)


@given(st.lists(st.integers(0, 5), max_size=4))
@settings(max_examples=8)
def test_interrupted_several_times(tmp_path_factory, interruptions):
    path = tmp_path_factory.mktemp("checkpoint") / "new folder" / "c.pt"
    for calls in interruptions:
        try:
            experiment(Interrupts(calls), path, model=BATCH_NORM, networks="best")
        except KeyboardInterrupt:
            continue
    resumed = experiment(Interrupts(10**6), path, model=BATCH_NORM, networks="best")
    whole = experiment(Interrupts(10**6), model=BATCH_NORM, networks="best")
    assert_bitwise_equal(whole, resumed)


def test_killed_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    whole = experiment(Interrupts(10**6))
    with pytest.raises(KeyboardInterrupt):
        experiment(Interrupts(5), path)
    old = path.read_bytes()
    save = torch.save

    def dies(content, name):
        save(content, name)
        with open(name, "r+b") as file:
            file.truncate(100)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        experiment(Interrupts(10**6), path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    assert_bitwise_equal(whole, experiment(Interrupts(10**6), path))


OTHERS = {
    "seeds": {"seeds": [0, 6]},
    "grid": {"grid": {"flood_level": [0.0, 1.5]}},
    "another name": {"grid": {"weight_decay": [0.0, 1.0]}},
    "networks": {"networks": "best"},
    "dtype": {"dtype": torch.float64},
    "weights": {"model": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))},
    "activation": {"model": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_experiment_is_an_error_and_left_alone(other, tmp_path):
    path = tmp_path / "c.pt"
    experiment("cosine", path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="checkpoint must come from the same experiment") as raised:
        experiment("cosine", path, **OTHERS[other])
    message = str(raised.value)
    assert str(path) in message
    lines = [line for line in message.splitlines() if line.startswith("{")]
    assert len(lines) == 2 and lines[0] != lines[1]  # both are named
    assert path.read_bytes() == old


def test_a_checkpoint_of_other_data_recipe_or_steps_is_an_error(tmp_path):
    path = tmp_path / "c.pt"
    arguments = {
        "model": MLP,
        "data": DATA,
        "recipe": Recipe(),
        "steps": 2,
        "batch_size": 10,
        "seeds": 2,
        "device": "cpu",
        "checkpoint": path,
    }
    fit(**arguments)
    for other in (
        {"data": make_data(1)},
        {"data": [DATA, make_data(1)]},
        {"recipe": Recipe(Flooding(0.1))},
        {"recipe": Recipe(optimizer=Adam())},
        {"recipe": Recipe(optimizer=SGD(schedule="cosine"))},
        {"steps": 3},
        {"batch_size": 11},
        {"evaluate_at": 1},
        {"recipe": Recipe(batch=Mixup())},
        {"recipe": Recipe(batch=Dirac())},
    ):
        with pytest.raises(ValueError, match="checkpoint must come from the same experiment"):
            fit(**arguments | other)
    fit(**arguments)


def test_a_file_that_is_no_checkpoint_is_an_error_and_left_alone(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(MLP().state_dict(), path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="checkpoint must come from the same experiment"):
        experiment("cosine", path)
    assert path.read_bytes() == old


def test_a_finished_checkpoint_returns_without_training(tmp_path):
    whole = experiment(Interrupts(10**6), tmp_path / "c.pt", networks="best")
    assert_bitwise_equal(whole, experiment(Interrupts(0), tmp_path / "c.pt", networks="best"))


def test_seeds_in_another_form_are_the_same_experiment(tmp_path):
    whole = experiment("cosine", tmp_path / "c.pt", seeds=[0, 1])
    for seeds in (np.arange(2), 2, (0, 1), range(2)):
        assert_bitwise_equal(whole, experiment("cosine", tmp_path / "c.pt", seeds=seeds))


@pytest.mark.parametrize(
    "step, chunk_size, left",
    [
        (3, 1, 32),
        (3, 3, 16),
        (3, 4, 8),
        (8, 1, 16),
        (8, 4, 8),
        (11, 1, 16),
        (16, 1, 0),
        (11, 4, 6),  # the remaining two runs are one chunk, as before: it continues at step 2
    ],
)
def test_another_chunk_size_keeps_the_chunks_that_are_finished(step, chunk_size, left, tmp_path):
    whole = experiment(Interrupts(10**6))
    with contextlib.suppress(KeyboardInterrupt):
        experiment(Interrupts(step), tmp_path / "c.pt")  # two runs at once
    rest = Interrupts(10**6)
    resumed = experiment(rest, tmp_path / "c.pt", chunk_size=chunk_size)
    xr.testing.assert_allclose(whole[0], resumed[0], rtol=1e-5)
    assert 10**6 - rest.left == left


@pytest.mark.parametrize("every", [2, 100])
def test_progress_can_stop_a_run_and_no_step_is_done_twice(every, tmp_path):
    whole, counted, steps = experiment(Interrupts(10**6)), [], 0
    for stop in (0, 1, 6, 8, 9, 13):  # after this many of 8 + 8 steps
        calls = Interrupts(10**6)
        with pytest.raises(KeyboardInterrupt):
            experiment(
                calls,
                tmp_path / "c.pt",
                every=every,
                progress=lambda n, calls=calls: steps + 10**6 - calls.left >= stop,
            )
        steps += 10**6 - calls.left
        assert steps == stop
    rest = Interrupts(10**6)
    resumed = experiment(rest, tmp_path / "c.pt", every=every, progress=counted.append)
    assert_bitwise_equal(whole, resumed)
    assert steps + 10**6 - rest.left == 16
    assert sum(counted) == 4 * 8 * 10  # runs × steps × examples, including those done before


def test_checkpoint_of_half_precision(tmp_path):
    results = [
        fit(
            MLP,
            DATA,
            steps=2,
            batch_size=10,
            seeds=2,
            device="cpu",
            dtype=torch.bfloat16,
            checkpoint=tmp_path / "c.pt",
        )
        for _ in range(2)
    ]
    assert_bitwise_equal(*results)


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
        runs, networks = diverging([0.01, 1e6], networks="last")
    assert record[0].filename == __file__  # the warning points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone, alone_networks = diverging([0.01], networks="last")
    healthy = runs.sel(lr=[0.01])
    for name in alone.data_vars:
        np.testing.assert_allclose(healthy[name], alone[name], rtol=1e-5, atol=1e-7)
    assert not healthy.to_array().isnull().any()
    assert (healthy.diverged_at == -1).all()
    for name, w in alone_networks.params.items():
        torch.testing.assert_close(networks.params[name][:2], w, rtol=1e-5, atol=1e-7)

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
    _, networks = fit(
        LINEAR,
        DATA,
        Recipe(optimizer=SGD()),
        steps=3,
        batch_size=10,
        seeds=2,
        grid=grid,
        networks="last",
        device="cpu",
    )
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
    runs, last = fit(model, data, networks="last", **arguments, **ON_CPU)
    runs_again, best = fit(model, data, networks="best", **arguments, **ON_CPU)
    xr.testing.assert_equal(runs, runs_again)
    chosen = best_step(runs)
    assert (chosen.step < 12).any()  # otherwise "best" would be "last"

    def error(network, params, x, y):
        return (network(params, x).argmax(-1) != y).double().mean()

    for networks, results in ((last, runs.isel(step=-1)), (best, chosen)):
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
    runs, networks = fit(MLP, DATA, **arguments, select_by="test_loss", **ON_CPU)
    measured = networks.measure(lambda f, p, x, y: cross_entropy(f(p, x), y), DATA, "test")
    np.testing.assert_allclose(measured, runs.test_loss.min("step"), rtol=1e-10)
    runs, networks = fit(
        MLP, DATA, **arguments, instruments={"right": accuracy}, select_by="right", **ON_CPU
    )
    np.testing.assert_allclose(
        networks.measure(accuracy, DATA, "train"), runs.right.min("step"), rtol=1e-12
    )


def test_measure_returns_what_the_instrument_returns():
    _, networks = fit(MLP, DATA, steps=1, seeds=[4, 6], batch_size=10, networks="last", **ON_CPU)
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
    _, networks = fit(
        MLP,
        DATA,
        steps=1,
        grid={"lr": [1e-10, 0.1]},
        seeds=[100000, 100001],
        batch_size=10,
        networks="last",
        **ON_CPU,
    )
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


# ----------------------------------------------------------------------------------- best_step


def naive_best(scores, patience):
    best, step, waited = float("inf"), 0, 0
    for t, score in enumerate(scores):
        waited += 1
        if score < best:
            best, step, waited = score, t, 0
        if patience is not None and waited >= patience:
            break
    return step


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, np.nan]), min_size=n, max_size=n).filter(
                lambda scores: scores[0] == scores[0]
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_best_step_is_early_stopping(scores, patience):
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
        chosen = best_step(runs, "validation_loss", patience)
    expected = [naive_best(s, patience) for s in scores]
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
    for patience in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"patience must be .* 1, got {patience}"):
            best_step(runs, patience=patience)


# -------------------------------------------------------------------------------------- labels


def test_labels(tmp_path):
    runs = fit(
        MLP,
        DATA,
        Recipe(Flooding(0.25), optimizer=SGD(0.05)),
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
    assert runs.attrs["seconds"] > 0
    for part in ("flood_level=0.25", "lr=0.05", "plain_gradient", "example_losses"):
        assert part in runs.attrs["recipe"]

    path = tmp_path / "runs.nc"
    runs.to_netcdf(path, engine="scipy")
    with xr.open_dataset(path, engine="scipy") as loaded:
        xr.testing.assert_equal(loaded, runs)
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
    assert "validation_loss" not in fit(MLP, without, steps=1, batch_size=10, seeds=1, **ON_CPU)


# ---------------------------------------------------------------------------------- instruments


@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize("model", [MLP, BATCH_NORM], ids=["MLP", "batch norm"])
def test_an_instrument_with_gradients(model, per_seed):
    def gradient_norm(network, params, x, y):
        gradient = torch.func.grad(lambda p: cross_entropy(network(p, x), y))(params)
        return sum((g**2).sum() for g in gradient.values()).sqrt()

    data = [make_data(1), make_data(2)] if per_seed else DATA
    runs, networks = fit(
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
        module = networks.module(seed=seed)
        cross_entropy(module(d.x_train.double()), d.y_train).backward()
        norm = torch.stack([w.grad.norm() for w in module.parameters()]).norm().item()
        assert runs.gradient_norm.sel(seed=seed, step=4).item() == pytest.approx(norm, rel=1e-10)


def test_an_instrument_returns_one_number_under_its_own_name():
    with pytest.raises(
        ValueError, match=r"instruments must return one number, but 'all' .* \(23, 3\)"
    ):
        fit(MLP, DATA, steps=1, batch_size=10, instruments={"all": lambda f, p, x, y: f(p, x)})
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
class Twice:
    """A gradient stage with a hyperparameter: the gradient, scaled."""

    scale: float = 2.0

    def __call__(self, objective, params, buffers):
        gradient, loss, buffers = plain_gradient(objective, params, buffers)
        return {name: self.scale * g for name, g in gradient.items()}, loss, buffers


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
    recipe = Recipe(Flooding(level), SAM(m=m, chunk_size=chunk_size), SGD(lr=0.3))
    _, networks = fit(
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
    )
    for run in [{"rho": rho, "seed": seed} for rho in (0.1, 0.4) for seed in (3, 8)]:
        actual = networks.module(**run).state_dict()
        expected = sam_loop(**run, shards=m or 10, level=level)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def gradient_by_parts(objective, params, buffers):
    """The raw mean's gradient, from four examples at a time."""
    total = None
    for rows in torch.arange(objective.examples).split(4):
        gradient, loss, buffers = plain_gradient(
            lambda params, buffers, rows=rows: objective.raw(params, buffers, rows), params, buffers
        )
        share = {name: g * len(rows) / objective.examples for name, g in gradient.items()}
        total = {name: total[name] + g for name, g in share.items()} if total else share
    return total, loss, buffers


def test_the_objective_has_the_raw_loss_of_rows_and_the_size_of_the_batch():
    arguments = {"steps": 7, "batch_size": 10, "seeds": 2, "networks": "last", **ON_CPU}
    _, parts = fit(MLP, DATA, Recipe(Flooding(5.0), gradient_by_parts), **arguments)
    _, plain = fit(MLP, DATA, Recipe(), **arguments)
    torch.testing.assert_close(parts.params, plain.params, rtol=1e-12, atol=1e-14)


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


def test_hyperparameters():
    recipe = Recipe(Flooding(0.1), Twice(), Adam())
    assert recipe.hyperparameters() == {
        "flood_level": ("loss", 0.1),
        "scale": ("gradient", 2.0),
        "lr": ("optimizer", 1e-3),
        "beta1": ("optimizer", 0.9),
        "beta2": ("optimizer", 0.999),
        "eps": ("optimizer", 1e-8),
        "weight_decay": ("optimizer", 0.0),
    }
    changed = recipe.with_values({"scale": 5.0, "lr": 0.5, "eps": 0.1})
    assert changed == Recipe(Flooding(0.1), Twice(5.0), Adam(0.5, eps=0.1))
    assert Recipe(loss=torch.mean).hyperparameters().keys() == {"lr", "momentum", "weight_decay"}
    mixed = Recipe(loss=torch.mean, batch=Mixup(0.5, k=3))
    assert mixed.hyperparameters()["alpha"] == ("batch", 0.5)
    assert "k" not in mixed.hyperparameters()  # it sets shapes
    assert mixed.with_values({"alpha": 2}).batch == Mixup(2, k=3)


def test_fields_declared_as_integers_set_shapes():
    declared = {
        "a": int,
        "b": "int",
        "c": int | None,
        "d": "int | None",
        "e": Optional[int],  # noqa: UP045
        "f": "Optional[int]",
        "g": "typing.Union[int, None]",
    }
    numbers = {"x": float, "y": "float | None", "z": "Annotated[int, 'printed']", "q": int | float}
    fields = [(name, of, dataclasses.field(default=1)) for name, of in (declared | numbers).items()]
    stage = dataclasses.make_dataclass("Stage", fields, frozen=True)()
    assert Recipe(loss=torch.mean, gradient=stage, optimizer=None).hyperparameters() == {
        name: ("gradient", 1) for name in numbers
    }
    assert {"m", "chunk_size"}.isdisjoint(Recipe(gradient=SAM(m=2, chunk_size=1)).hyperparameters())


@dataclasses.dataclass(frozen=True)
class Eps(Twice):
    eps: float = 0.5


def test_a_name_in_two_stages_is_an_error_if_it_is_used():
    recipe = Recipe(gradient=Eps(), optimizer=Adam())
    assert "eps" not in recipe.hyperparameters()
    fit(MLP, DATA, recipe, steps=1, batch_size=10, seeds=1, grid={"scale": [1.0]}, device="cpu")
    with pytest.raises(ValueError, match="'eps' is in gradient and optimizer"):
        fit(MLP, DATA, recipe, steps=1, batch_size=10, seeds=1, grid={"eps": [0.1]}, device="cpu")


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
        Recipe(Flooding(0.5), optimizer=SGD(0.1, **COSINE)),
        Recipe(Flooding(0.5, per_example=True), optimizer=Adam(0.1, weight_decay=0.1)),
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
def test_cpu_and_cuda_agree(model, batch, tmp_path):
    state = torch.cuda.get_rng_state()
    recipe = Recipe(Flooding(0.3), optimizer=SGD(0.1, **COSINE), batch=batch)
    results = [
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
            checkpoint=tmp_path / device,
        )
        for device in ("cpu", "cuda")
    ]
    xr.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-8, atol=1e-10)
    for name, w in results[0][1].params.items():
        assert results[1][1].params[name].is_cuda
        torch.testing.assert_close(results[1][1].params[name].cpu(), w, rtol=1e-8, atol=1e-10)
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
            recipe=Recipe(Flooding(0.3), optimizer=SGD(schedule=Strict()), batch=batch),
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
    "large batch": ({"batch_size": 24}, r"batch_size must be at most the 23 .*got 24"),
    "chunk": ({"chunk_size": -1}, r"chunk_size must be a whole number >= 1, got -1"),
    "evaluation batch": ({"evaluation_batch_size": 0}, r"evaluation_batch_size must .*got 0"),
    "checkpoint_every": ({"checkpoint_every": 0}, r"checkpoint_every must .*got 0"),
    "empty grid": ({"grid": {"lr": []}}, r"grid\['lr'\] must have at least one value"),
    "unknown name": ({"grid": {"rho": [0.1]}}, r"hyperparameters.*'flood_level', 'lr'.*got 'rho'"),
    "name of a flag": ({"grid": {"nesterov": [0, 1]}}, r"hyperparameters.*got 'nesterov'"),
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
        r"one shape, got \[\(2, 5\), \(17, 5\)\] for test",
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
    "networks": ({"networks": "x"}, r"networks must be None, 'last' or 'best', got 'x'"),
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
        r"model must have no random layer but flatmin.layers.Dropout, got Dropout\(p=0.3, .*at '1'",
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
    for data in (DATA.x_train, (DATA.x_train, DATA.y_train), 3):
        with pytest.raises(TypeError, match="data must be one Data, or a sequence of one per seed"):
            fit(MLP, data, steps=1, seeds=2)


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


def test_one_progress_bar_counts_every_step(monkeypatch, tmp_path, capfd):
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
    with pytest.raises(KeyboardInterrupt):
        experiment(Interrupts(13), tmp_path / "c.pt")
    experiment(Interrupts(10**6), tmp_path / "c.pt")  # from step 12 of 16
    experiment(Interrupts(0), tmp_path / "c.pt")  # is already finished
    # 8 steps of 4 runs, two at once
    assert [(bar.done, bar.total) for bar in bars] == [(26, 32), (32, 32), (32, 32)]
    assert capfd.readouterr().out == ""
