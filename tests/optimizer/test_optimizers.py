"""The optimizer stage: torch.optim's rules, step for step, and stacked hyperparameters."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from flatmin import Recipe, fit
from flatmin.book import MLP, two_gaussians
from flatmin.optimizer import SGD, Adam, TwoRates, lr_factor
from flatmin.pipeline import Step


def objective(params):
    """An uneven function, so that momentum and second moments matter."""
    return (params["a"] ** 4).sum() + (params["b"].sin() * params["a"].sum()).sum()


def start():
    generator = torch.Generator().manual_seed(3)
    return {
        "a": torch.randn(3, generator=generator, dtype=torch.float64),
        "b": torch.randn(2, 2, generator=generator, dtype=torch.float64),
    }


def ours(optimizer, steps=60):
    params = start()
    state = optimizer.init(params)
    for t in range(steps):
        params, state = optimizer(grad(objective)(params), params, state, Step(t, of=steps))
    return params


def torchs(make, steps=60, cosine=False):
    params = {name: nn.Parameter(w) for name, w in start().items()}
    optimizer = make(params.values())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    for _ in range(steps):
        optimizer.zero_grad()
        objective(params).backward()
        optimizer.step()
        if schedule:
            schedule.step()
    return {name: w.detach() for name, w in params.items()}


def assert_same(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.05},
        {"momentum": 0.7, "weight_decay": 0.05},
        {"momentum": 0.7, "weight_decay": 0.05, "nesterov": True},
    ],
    ids=str,
)
def test_sgd_is_torchs(settings):
    assert_same(
        ours(SGD(lr=0.02, **settings)),
        torchs(lambda p: torch.optim.SGD(p, lr=0.02, **settings)),
    )


@pytest.mark.parametrize("weight_decay", [0, 0.05])
def test_adam_is_torchs(weight_decay):
    assert_same(
        ours(Adam(lr=0.03, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=weight_decay)),
        torchs(lambda p: torch.optim.Adam(p, 0.03, (0.8, 0.95), 1e-6, weight_decay)),
    )


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_cosine_schedule_is_torchs(steps):
    assert_same(
        ours(SGD(lr=0.02, momentum=0.9, schedule="cosine"), steps),
        torchs(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9), steps, cosine=True),
    )
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for t in range(steps):
        factor = lr_factor("cosine", Step(t, of=steps))
        assert factor == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_schedules():
    assert [lr_factor("constant", Step(t, of=10)) for t in (0, 3, 10)] == [1, 1, 1]
    assert lr_factor("cosine", Step(10, of=10)) == 0
    assert lr_factor(lambda done: torch.tensor(1 - done), Step(1, of=4)) == 0.75
    slow = ours(SGD(lr=0.02, schedule=lambda done: 0.5))
    assert_same(slow, ours(SGD(lr=0.01)))


@pytest.mark.parametrize("make", [SGD, Adam, TwoRates])
def test_a_schedule_needs_to_know_how_much_is_done(make):
    w = {"w": torch.ones(2)}
    call = lambda t, **settings: make(**settings)(w, w, make().init(w), t)[0]
    assert torch.equal(call(3)["w"], call(Step(3, of=9))["w"])
    with pytest.raises(TypeError, match=r"t must be a Step\(t, of=steps\) for .*'cosine', got 3"):
        call(3, schedule="cosine")


@pytest.mark.parametrize(
    "optimizer, values",
    [
        (
            SGD(momentum=0.5, nesterov=True),
            {
                "lr": [0.01, 0.02, 0.03],
                "momentum": [0.0, 0.5, 0.9],
                "weight_decay": [0.0, 0.1, 0.01],
            },
        ),
        (SGD(), {"momentum": [0.0, 0.5, 0.9]}),  # momentum is set only by the grid
        (
            Adam(),
            {
                "lr": [0.01, 0.02, 0.03],
                "beta1": [0.0, 0.8, 0.9],
                "beta2": [0.9, 0.99, 0.999],
                "eps": [1e-8, 1e-3, 1.0],
                "weight_decay": [0.0, 0.1, 0.01],
            },
        ),
    ],
    ids=["SGD", "momentum", "Adam"],
)
def test_values_per_run_equal_separate_runs(optimizer, values):
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    params = {name: w.expand(3, *w.shape) for name, w in start().items()}
    state = dataclasses.replace(optimizer, **tensors).init(params)

    def step(params, state, hyper, t):
        one = dataclasses.replace(optimizer, **hyper)
        return one(grad(objective)(params), params, state, t)

    for t in range(20):
        params, state = vmap(lambda p, s, h: step(p, s, h, t))(params, state, tensors)  # noqa: B023
    for run in range(3):
        single = dataclasses.replace(optimizer, **{name: v[run] for name, v in values.items()})
        assert_same({name: w[run] for name, w in params.items()}, ours(single, 20))


def test_a_step_changes_nothing_in_place():
    for optimizer in (SGD(momentum=0.9), Adam()):
        params = start()
        state = optimizer.init(params)
        gradient = grad(objective)(params)
        before = [w.clone() for w in (*params.values(), *gradient.values())]
        optimizer(gradient, params, state, 0)
        after = [*params.values(), *gradient.values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert all(not w.any() for part in state.values() for w in part.values())


@pytest.mark.parametrize(
    "make, name, value",
    [
        (SGD, "lr", -0.1),
        (SGD, "lr", math.nan),
        (SGD, "lr", math.inf),
        (SGD, "lr", "0.1"),
        (SGD, "lr", None),
        (SGD, "lr", True),
        (SGD, "momentum", 1.0),
        (SGD, "momentum", -0.5),
        (SGD, "weight_decay", -1e-4),
        (Adam, "lr", -1),
        (Adam, "beta1", 1),
        (Adam, "beta2", 1.5),
        (Adam, "eps", -1e-8),
        (Adam, "weight_decay", math.nan),
        (SGD, "schedule", "cosin"),
        (Adam, "schedule", None),
        (SGD, "schedule", ["cosine"]),
        (SGD, "schedule", 0.5),
    ],
)
def test_bad_values_are_named(make, name, value):
    with pytest.raises(ValueError, match=f"{name} must be ") as raised:
        make(**{name: value})
    assert f"got {value!r}" in str(raised.value)


def test_numpy_numbers_are_accepted():
    assert SGD(lr=np.float32(0.5), momentum=np.float64(0.5)).lr == 0.5


# --------------------------------------------------------------------------------------- two rates


@given(st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(2, 5), st.floats(0, 0.1))
def test_two_rates_is_torchs_sgd_with_a_rate_that_changes_sign(down, up, period, weight_decay):
    stage = TwoRates(down, up, period, weight_decay, schedule=lambda done: 0.5)
    w = {"w": torch.tensor([1.0, -2.0]).double()}
    theirs = torch.nn.Parameter(w["w"].clone())
    optimizer = torch.optim.SGD([theirs], lr=down)
    for t in range(2 * period):
        g = torch.sin(theirs.detach())
        w, state = stage({"w": torch.sin(w["w"])}, w, (), Step(t, of=2 * period))
        ascent = t % period == period - 1
        theirs.grad = (
            -(g + weight_decay * theirs.detach()) if ascent else g + weight_decay * theirs.detach()
        )
        optimizer.param_groups[0]["lr"] = 0.5 * (up if ascent else down)
        optimizer.step()
        assert state == ()
    torch.testing.assert_close(w["w"], theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("period", [2, 3])
def test_two_rates_in_the_stack(period):
    data = two_gaussians(train_size=40, test_size=50)
    settings = dict(
        steps=10, batch_size=None, seeds=[0, 1], evaluate_at=[9, 10], dtype=torch.double
    )
    grid, net = {"ascent_lr": [0.0, 0.1]}, lambda: MLP(10, 8, 2)
    runs = fit(net, data, Recipe(optimizer=TwoRates(0.2, period=period)), grid=grid, **settings)
    for ascent_lr in grid["ascent_lr"]:
        alone = fit(net, data, Recipe(optimizer=TwoRates(0.2, ascent_lr, period)), **settings)
        np.testing.assert_allclose(
            runs.train_loss.sel(ascent_lr=ascent_lr), alone.train_loss, rtol=1e-9
        )
    tenth = runs.train_loss.diff("step").sel(ascent_lr=0.1)
    assert (tenth > 0).all() if period == 2 else (tenth < 0).all()


@pytest.mark.parametrize(
    "name, value",
    [("lr", -1), ("ascent_lr", float("nan")), ("period", 1), ("period", 2.5), ("weight_decay", -1)],
)
def test_two_rates_names_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        TwoRates(**{name: value})
