"""Sharpness: closed forms, the ball, shards, what rescaling does, and the stack."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import climb, problem, random, rescaled
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus

from flatmin import Data, Recipe, eigenvalues, fit, sharpness
from flatmin.book import MLP, two_gaussians
from flatmin.gradient import SAM
from flatmin.measure import on
from flatmin.optimizer import SGD

cross_entropy = nn.CrossEntropyLoss()  # the mean
logistic = lambda output, y: softplus(-y * output[:, 0])
squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
linear_loss = lambda output, y: output[:, 0] * y
dual = {1: math.inf, 1.5: 3, 2: 2, 4: 4 / 3, math.inf: 1}
norms = pytest.mark.parametrize("p", dual)


def linear(d=4, seed=0):
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(random(1, d, seed=seed))
    return model


# ------------------------------------------------------------------------------------ closed forms


@norms
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_linear_loss_has_the_dual_norm_as_sharpness(p, adaptive, steps):
    model, x, y = linear(), random(20, 4), random(20, seed=1)
    g = (y[:, None] * x).mean(0)
    T = model.weight[0].detach().abs() + 0.1 if adaptive else 1
    how = {"rho": 0.3, "p": p, "adaptive": adaptive, "eta": 0.1, "steps": steps}
    rise = on(model, sharpness, x, y, criterion=linear_loss, **how)
    torch.testing.assert_close(rise, 0.3 * (T * g).norm(dual[p]))


@norms
@pytest.mark.parametrize("steps", [1, 3])
def test_logistic_regression_example_by_example(p, steps):
    """The worst neighbour of one example lowers its margin by ρ‖x‖_q: one step is exact."""
    model, x, y = linear(), random(20, 4), random(20, seed=1).sign()
    margin = y * (x @ model.weight[0].detach())
    worst = softplus(0.7 * x.norm(dual[p], dim=1) - margin)
    rise = on(model, sharpness, x, y, rho=0.7, p=p, m=1, steps=steps, criterion=logistic)
    torch.testing.assert_close(rise, (worst - softplus(-margin)).mean())


def test_sharpness_near_the_minimum_of_linear_regression_is_the_largest_eigenvalue():
    """The ascent turns to the top eigenvector, so the rise is ½ρ²λmax and the tiny slope's."""
    x, y = random(30, 4), random(30, seed=1)
    model = linear()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.mT + 1e-9 * random(1, 4))
    top = torch.linalg.eigvalsh(x.mT @ x / 30)[-1]
    of = partial(on, model, sharpness, x, y, rho=0.5, criterion=squared)
    assert of(steps=1) < 0.5**2 * top / 2 * 0.999
    torch.testing.assert_close(of(steps=60), 0.5**2 * top / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [2, math.inf])
def test_several_steps_find_the_maximum_of_a_parabola(p):
    """Compared with brute force on the circle, or at the corners of the cube."""
    d = 2 if p == 2 else 5
    model, x, y = linear(d), random(30, d), random(30, seed=1)
    if p == 2:
        angle = torch.linspace(0, 2 * math.pi, 20001).double()
        points = torch.stack([angle.cos(), angle.sin()], 1)
    else:
        points = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d))).double()
    w = model.weight[0].detach()
    losses = ((w + 0.8 * points) @ x.mT - y).square().mean(1) / 2
    best = losses.max() - (x @ w - y).square().mean() / 2
    rise = on(model, sharpness, x, y, rho=0.8, p=p, steps=40, criterion=squared)
    torch.testing.assert_close(rise, best, rtol=1e-6, atol=0)


def test_near_a_maximum_the_start_is_the_highest_point():
    """One step of 0.5 goes from 0.1 before the top to 0.4 behind it, where the loss is lower."""
    model, x, y = linear(1), torch.ones(3, 1).double(), random(1).expand(3)
    with torch.no_grad():
        model.weight.fill_(y[0] + 0.1)
    hill = partial(on, model, sharpness, x, y, rho=0.5, criterion=lambda z, y: -2 * squared(z, y))
    assert hill() == 0 and hill(steps=3) >= 0


# ------------------------------------------------------------------------------- SAM and the ball


@norms
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_sams(p, adaptive):
    model, x, y = problem()
    w = {name: v.detach() for name, v in model.named_parameters()}
    stage = SAM(0.2, p, adaptive, eta=0.05)
    f = lambda w: cross_entropy(functional_call(model, w, (x,)), y)
    epsilon = stage.perturbation(w, torch.func.grad(f)(w))
    expected = f({name: w[name] + epsilon[name] for name in w}) - f(w)
    found = on(model, sharpness, x, y, rho=0.2, p=p, adaptive=adaptive, eta=0.05)
    torch.testing.assert_close(found, expected)


@given(
    st.sampled_from(list(dual)),
    st.booleans(),
    st.integers(2, 6),
    st.floats(0, 2),
    st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_several_steps_are_a_plain_loop_in_the_ball(p, adaptive, steps, rho, seed):
    """For a bumpy function of two tensors; the highest of all visited points counts."""
    a, w = random(3, seed=seed), random(7, seed=seed + 1)
    T = w.abs() + 0.1 if adaptive else torch.ones(7).double()
    bumps = lambda w: torch.sin(3 * w[:3] @ a) + torch.cos(2 * w[3:].sum()) + w[3:].square().sum()
    slope = lambda u: T * torch.func.grad(bumps)(w + T * u)
    visited, u = [], torch.zeros(7).double()
    for _ in range(steps):
        visited.append(u)
        u = u + climb(slope(u), rho, p)
        if p == math.inf:
            u = u.clamp(-rho, rho)
        elif torch.linalg.vector_norm(u, p) > rho:
            u = u * rho / torch.linalg.vector_norm(u, p)
    highest = torch.stack([bumps(w + T * u) for u in [*visited, u]]).max()

    one = torch.zeros(1).double()
    network = lambda params, x: bumps(torch.cat([params["a"], params["b"].flatten()])).expand(1)
    params = {"a": w[:3], "b": w[3:].view(2, 2)}
    how = {"rho": rho, "p": p, "adaptive": adaptive, "eta": 0.1, "steps": steps}
    found = sharpness(network, params, one, one, criterion=lambda output, y: output, **how)
    assert found >= 0
    torch.testing.assert_close(found, highest - bumps(w))


def test_more_search_is_not_less():
    model, x, y = problem()
    of = partial(on, model, sharpness, x, y)
    rises = [of(rho=0.5, steps=steps) for steps in (1, 2, 5, 10)]
    assert rises == sorted(rises) and rises[0] < rises[1]
    assert of(rho=0.5, steps=10) == rises[-1]
    assert of(rho=0, steps=3) == 0 and of(rho=0) == 0


# -------------------------------------------------------------------------------------- m-sharpness


@pytest.mark.parametrize("more", [{}, {"steps": 3, "p": 4}, {"adaptive": True}])
def test_shards(more):
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True))
    run = lambda x, y, **other: on(model, sharpness, x, y, rho=0.3, **more, **other)
    plain = run(x, y)
    for m in (23, 24, 1000):
        torch.testing.assert_close(run(x, y, m=m), plain)
    one = torch.stack([run(x[i : i + 1], y[i : i + 1]) for i in range(23)])
    torch.testing.assert_close(run(x, y, m=1), one.mean())
    five = [run(x[i : i + 5], y[i : i + 5]) * len(x[i : i + 5]) for i in range(0, 23, 5)]
    torch.testing.assert_close(run(x, y, m=5), sum(five) / 23)  # the last shard has 3
    for batch_size, chunk_size in [(2, 1), (3, 2), (1000, 100)]:
        sizes = {"batch_size": batch_size, "chunk_size": chunk_size}
        torch.testing.assert_close(run(x, y, m=5, **sizes), sum(five) / 23)
        torch.testing.assert_close(run(x, y, **sizes), plain)


@given(st.integers(0, 10**6), st.sampled_from(list(dual)))
@settings(max_examples=20)
def test_smaller_shards_are_sharper_where_the_loss_is_linear(seed, p):
    """The mean of norms is at least the norm of the mean."""
    model, x, y = linear(), random(16, 4, seed=seed), random(16, seed=seed + 1)
    of = partial(on, model, sharpness, x, y, p=p, criterion=linear_loss)
    rises = [of(m=m).item() for m in (1, 2, 4, 8, 16)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rises))


# ---------------------------------------------------------------------------------------- rescaling


def test_rescaling_changes_sharpness_but_not_adaptive_sharpness():
    """One layer × 20, the next ÷ 20: the network computes the same (Dinh et al., 2017)."""
    model, x, y = problem()
    other = rescaled(model)
    torch.testing.assert_close(model(x), other(x))
    measure = lambda f, **more: [on(m, f, x, y, **more) for m in (model, other)]
    top = [found.value[0] for found in measure(eigenvalues)]
    assert top[1] > 10 * top[0]
    for p in (2, math.inf):
        plain = measure(sharpness, rho=0.1, p=p, m=5)
        assert plain[1] > 2 * plain[0]
        for steps in (1, 3):
            how = {"rho": 0.1, "p": p, "m": 5, "adaptive": True, "eta": 0, "steps": steps}
            torch.testing.assert_close(*measure(sharpness, **how))


# ----------------------------------------------------------------------------------------- a stack


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.3},
        {"rho": 0.3, "p": math.inf, "adaptive": True, "m": 4, "chunk_size": 2},
        {"rho": 0.3, "steps": 3, "m": 8, "batch_size": 3},
    ],
)
def test_the_stack_is_the_module(options):
    data = two_gaussians(30, test_size=10)
    make = lambda: MLP(10, 8, 2, batch_norm=True)
    networks = fit(
        make,
        data,
        Recipe(optimizer=SGD(lr=0.1)),
        seeds=2,
        steps=10,
        batch_size=10,
        networks="last",
        dtype=torch.float64,
    ).networks
    x, y = data.split("train")
    found = networks.measure(partial(sharpness, **options), data, "train", examples=21)
    for seed in networks.coords["seed"]:
        model = networks.module(seed=seed).double()
        expected = on(model, sharpness, x[:21].double(), y[:21], **options)
        assert found.sel(seed=seed).item() == pytest.approx(expected.item(), rel=1e-9)


def test_while_training():
    data = two_gaussians(30, test_size=10)
    instruments = {"one": partial(sharpness, m=1), "all": sharpness}
    runs = fit(
        lambda: MLP(10, 5, 2), data, seeds=2, steps=4, batch_size=10, instruments=instruments
    )
    assert (runs.one > runs["all"]).all()


def test_attention_in_a_stack():
    make = lambda: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Flatten(), nn.Linear(8, 3)
    )
    _, x, y = problem(make, (2, 4))
    data = Data.of(x, y)
    how = {"steps": 2, "seeds": 2, "batch_size": None, "dtype": torch.float64}
    networks = fit(make, data, networks="last", **how).networks
    found = networks.measure(partial(sharpness, m=5), data, "train")
    for seed in networks.coords["seed"]:
        expected = on(networks.module(seed=seed), sharpness, x, y, m=5)
        assert found.sel(seed=seed).item() == pytest.approx(expected.item(), rel=1e-9)


# --------------------------------------------------------------------------------- side effects


def test_the_module_is_left_as_it_was():
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True, dropout=0.5))
    model[2].eval()
    cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = on(model, sharpness, x, y, m=5, steps=2)
    assert not found.requires_grad
    with pytest.raises(ZeroDivisionError):
        on(model, sharpness, x, y, criterion=lambda *_: 1 / 0)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_precision():
    model, x, y = problem()
    model, x = model.float(), x.float()
    exact = on(copy.deepcopy(model).double(), sharpness, x.double(), y, rho=1e-4, m=5)
    found = on(model, sharpness, x, y, rho=1e-4, m=5, dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    assert on(model, sharpness, x, y, rho=0.1).dtype == torch.float32


BAD = {
    "rho": (-0.1, "a number >= 0"),
    "p": (0.5, r"a number in \[1, inf\]"),
    "eta": (math.nan, "a number >= 0"),
    "steps": (0, "a whole number >= 1"),
    "m": (0, "a whole number >= 1"),
    "batch_size": (0, "a whole number >= 1"),
    "chunk_size": (2.5, "a whole number >= 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    model, x, y = problem()
    value, allowed = BAD[name]
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value}"):
        on(model, sharpness, x, y, **{name: value})


@pytest.mark.parametrize("p", [1.5, 2, math.inf])
@pytest.mark.parametrize("rho", [1e-250, 1e250])
def test_a_radius_whose_square_is_out_of_range(p, rho):
    """Of a linear loss: ρ times the dual norm of its gradient, in any number of steps."""
    model, x, y = linear(), random(1, 4, seed=1), torch.ones(1).double()
    found = on(model, sharpness, x, y, rho=rho, p=p, steps=3, criterion=linear_loss)
    expected = rho * torch.linalg.vector_norm(x, dual[p])
    loss = linear_loss(model(x), y).abs().item()  # of which the rise is a difference
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14 * loss)


@pytest.mark.parametrize("name", ["rho", "eta", "p"])
def test_one_number_for_all_weights(name):
    model, x, y = problem()
    value = torch.full((sum(w.numel() for w in model.parameters()),), 2.0).double()
    with pytest.raises(
        ValueError, match=rf"{name} must be one number, got shape \({len(value)},\)"
    ):
        on(model, sharpness, x, y, **{name: value})
