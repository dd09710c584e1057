"""Sharpness: closed forms, the ball, shards, what rescaling does, and the stack."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem, random, rescaled
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import softplus

from flatmin import Recipe, average_sharpness, eigenvalues, fit, sharpness
from flatmin.book import MLP, two_gaussians
from flatmin.gradient import SAM
from flatmin.measure import AverageSharpness, Sharpness, hessian_operator
from flatmin.measure.flatness import _Neighbourhood, _sharpness
from flatmin.optimizer import SGD

criterion = nn.CrossEntropyLoss()
logistic = lambda output, y: softplus(-y * output[:, 0])
squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
dual = {1: math.inf, 1.5: 3, 2: 2, 4: 4 / 3, math.inf: 1}
norms = pytest.mark.parametrize("p", dual)


def linear(d=4, seed=0):
    model = nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(random(1, d, seed=seed))
    return model


def tree(model):
    return {name: p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------ closed forms


@norms
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("more", [{}, {"steps": 4, "restarts": 3}])
def test_a_linear_loss_has_the_dual_norm_as_sharpness(p, adaptive, more):
    model, x, y = linear(), random(20, 4), random(20, seed=1)
    g = (y[:, None] * x).mean(0)
    T = model.weight[0].detach().abs() + 0.1 if adaptive else 1
    rise = sharpness(
        model,
        lambda output, y: output[:, 0] * y,
        x,
        y,
        0.3,
        p=p,
        adaptive=adaptive,
        eta=0.1,
        **more,
    )
    torch.testing.assert_close(rise, 0.3 * (T * g).norm(dual[p]))


@norms
def test_logistic_regression_example_by_example(p):
    """The worst neighbour of one example lowers its margin by ρ‖x‖_q: one step is exact."""
    model, x, y = linear(), random(20, 4), random(20, seed=1).sign()
    margin = y * (x @ model.weight[0].detach())
    worst = softplus(0.7 * x.norm(dual[p], dim=1) - margin)
    for more in ({}, {"steps": 3, "restarts": 2}):
        rise = sharpness(model, logistic, x, y, 0.7, p=p, m=1, **more)
        torch.testing.assert_close(rise, (worst - softplus(-margin)).mean())


def test_sharpness_at_the_minimum_of_linear_regression_is_the_largest_eigenvalue():
    """The gradient there is zero, so only random starts reach ½ρ²λmax."""
    x, y = random(30, 4), random(30, seed=1)
    model = linear()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.mT)
    top = torch.linalg.eigvalsh(x.mT @ x / 30)[-1]
    assert sharpness(model, squared, x, y, 0.5).item() < 0.5**2 * top / 2 * 1.001
    rise = sharpness(model, squared, x, y, 0.5, steps=60, restarts=4)
    torch.testing.assert_close(rise, 0.5**2 * top / 2, rtol=1e-6, atol=0)


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
    rise = sharpness(model, squared, x, y, 0.8, p=p, steps=40, restarts=6)
    torch.testing.assert_close(rise, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_of_a_parabola_is_the_trace(adaptive):
    model, x, y = linear(6), random(30, 6), random(30, seed=1)
    T = model.weight[0].detach().abs() + 0.2 if adaptive else torch.ones(6).double()
    exact = 0.4**2 / 12 * (T**2 * (x**2).mean(0)).sum()
    found = average_sharpness(model, squared, x, y, 0.4, adaptive=adaptive, eta=0.2, directions=400)
    assert abs(found.mean - exact) < 4 * found.standard_error
    assert found.standard_error < 0.05 * exact
    flat = average_sharpness(model, lambda output, y: output[:, 0] * y, x, y, 0.4)
    assert abs(flat.mean) < 1e-14 and flat.standard_error < 1e-14  # the slope averages out


def test_near_a_maximum_one_step_lowers_the_loss_and_a_search_does_not():
    model, x, y = linear(1), torch.ones(3, 1).double(), random(1).expand(3)
    with torch.no_grad():
        model.weight.fill_(y[0] + 0.1)
    hill = lambda output, y: (
        -((output[:, 0] - y) ** 2)
    )  # one step goes from 0.1 before the top to 0.4 behind it
    assert sharpness(model, hill, x, y, 0.5).item() == pytest.approx(0.1**2 - 0.4**2)
    assert sharpness(model, hill, x, y, 0.5, restarts=3) == 0


# ------------------------------------------------------------------------------- SAM and the ball


@norms
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_sams(p, adaptive):
    model, x, y = problem()
    w, stage = tree(model), SAM(0.2, p, adaptive, eta=0.05)
    f = lambda w: criterion(functional_call(model, w, (x,)), y)
    epsilon = stage.perturbation(w, torch.func.grad(f)(w))
    expected = f({name: w[name] + epsilon[name] for name in w}) - f(w)
    found = sharpness(model, criterion, x, y, 0.2, p=p, adaptive=adaptive, eta=0.05)
    torch.testing.assert_close(found, expected)


@given(
    st.sampled_from(list(dual)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.floats(0, 2),
    st.integers(0, 10**6),
)
@settings(max_examples=40)
def test_neighbours_are_in_the_ball_and_the_highest_counts(p, steps, restarts, rho, seed):
    """For a bumpy function of two tensors, of which every visited point is recorded."""
    a = random(3, seed=seed)
    f = lambda w: torch.sin(3 * w["a"] @ a) + torch.cos(2 * w["b"].sum()) + w["b"].square().sum()
    w, seen = {"a": random(3, seed=seed + 1), "b": random(2, 2, seed=seed + 2)}, []
    ball = _Neighbourhood(rho, p, False, 0.0)
    flat = lambda w: torch.cat([x.flatten() for x in w.values()])

    def slope(u):
        seen.append(ball.at(w, u))
        g, value = torch.func.grad_and_value(f)(seen[-1])
        return g, value

    starts = [
        ball.on_the_edge({"a": random(3, seed=seed + i), "b": random(2, 2, seed=i)})
        for i in range(restarts - 1)
    ]
    found = _sharpness(lambda v: (seen.append(v), f(v))[1], slope, w, ball, steps, starts)
    assert len(seen) == 1 + restarts * steps
    for v in seen:
        assert torch.linalg.vector_norm(flat(v) - flat(w), p) <= rho * (1 + 1e-9) + 1e-12
    if (steps, restarts) == (1, 1):
        highest = f(seen[-1])
    else:
        highest = torch.stack([f(v) for v in seen]).max()
        assert found >= 0
    torch.testing.assert_close(found, highest - f(w))


def test_more_search_is_not_less():
    model, x, y = problem()
    rises = [
        sharpness(model, criterion, x, y, 0.5, steps=steps, restarts=restarts)
        for steps, restarts in [(1, 1), (5, 1), (5, 3), (5, 5)]
    ]
    assert rises == sorted(rises) and rises[0] < rises[1]
    again = sharpness(model, criterion, x, y, 0.5, steps=5, restarts=5)
    assert again == rises[-1]
    assert sharpness(model, criterion, x, y, 0, steps=3, restarts=2) == 0
    assert sharpness(model, criterion, x, y, 0) == 0


# -------------------------------------------------------------------------------------- m-sharpness


@pytest.mark.parametrize("more", [{}, {"steps": 3, "restarts": 2, "p": 4}, {"adaptive": True}])
def test_shards(more):
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True))
    run = lambda x, y, **other: sharpness(model, criterion, x, y, 0.3, **more, **other)
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
    rises = [
        sharpness(model, lambda output, y: output[:, 0] * y, x, y, p=p, m=m).item()
        for m in (1, 2, 4, 8, 16)
    ]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rises))


# ---------------------------------------------------------------------------------------- rescaling


def test_rescaling_changes_sharpness_but_not_adaptive_sharpness():
    """One layer × 20, the next ÷ 20: the network computes the same (Dinh et al., 2017)."""
    model, x, y = problem()
    other = rescaled(model)
    torch.testing.assert_close(model(x), other(x))
    measure = lambda f, **more: [f(m, criterion, x, y, 0.1, **more) for m in (model, other)]
    top = [eigenvalues(hessian_operator(m, criterion, x, y)).values[0] for m in (model, other)]
    assert top[1] > 10 * top[0]
    for p in (2, math.inf):
        plain = measure(sharpness, p=p, m=5)
        assert plain[1] > 2 * plain[0]
        for more in ({}, {"steps": 3, "restarts": 2}):
            torch.testing.assert_close(*measure(sharpness, p=p, m=5, adaptive=True, eta=0, **more))
    averages = [found.mean for found in measure(average_sharpness)]
    assert averages[1] > 2 * averages[0]
    adaptive = [found.mean for found in measure(average_sharpness, adaptive=True, eta=0)]
    torch.testing.assert_close(*adaptive)


# ----------------------------------------------------------------------------------------- a stack


@pytest.mark.parametrize(
    "instrument",
    [
        Sharpness(0.3, examples=21),
        Sharpness(0.3, p=math.inf, adaptive=True, m=4, chunk_size=2, examples=21),
        Sharpness(0.3, steps=3, restarts=3, m=8, seed=5, batch_size=3, examples=21),
        AverageSharpness(0.3, directions=4, standard_error=True, examples=21, batch_size=5),
        AverageSharpness(0.3, adaptive=True, directions=4, seed=3, examples=21),
    ],
)
def test_the_stack_is_the_module(instrument):
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
    found = networks.measure(instrument, data, "train").values
    names = ["rho", "adaptive", "eta", "seed", "batch_size"]
    if worst := isinstance(instrument, Sharpness):
        names += ["p", "steps", "restarts", "m"]
    else:
        names += ["directions"]
    settings = {name: getattr(instrument, name) for name in names}
    for i, seed in enumerate(networks.coords["seed"]):
        model = networks.module(seed=seed).double()
        run = sharpness if worst else average_sharpness
        expected = run(model, criterion, x[:21].double(), y[:21], **settings)
        if not worst and not instrument.standard_error:
            expected = expected.mean
        torch.testing.assert_close(torch.from_numpy(found[i : i + 1])[0], torch.as_tensor(expected))


def test_while_training():
    data = two_gaussians(30, test_size=10)
    instruments = {"one": Sharpness(m=1), "all": Sharpness(steps=2), "mean": AverageSharpness()}
    runs = fit(
        lambda: MLP(10, 5, 2), data, seeds=2, steps=4, batch_size=10, instruments=instruments
    )
    assert (runs.one > runs["all"]).all() and bool(runs["mean"].notnull().all())


def test_attention_in_a_stack():
    make = lambda: nn.Sequential(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(8, 3)
    )
    models = [problem(make, (2, 4), seed=seed)[0].eval() for seed in range(2)]
    _, x, y = problem(make, (2, 4))
    params, _ = torch.func.stack_module_state(models)
    network = lambda params, x: functional_call(models[0], params, (x,))
    found = vmap(lambda w: Sharpness(m=5)(network, w, x, y))(params)
    for value, model in zip(found, models, strict=True):
        torch.testing.assert_close(value, sharpness(model, criterion, x, y, m=5))


# --------------------------------------------------------------------------------- side effects


def test_the_module_is_left_as_it_was():
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True, dropout=0.5))
    model[2].eval()
    criterion(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = sharpness(model, criterion, x, y, m=5, steps=2, restarts=2)
    assert not found.requires_grad
    average_sharpness(model, criterion, x, y)
    with pytest.raises(ZeroDivisionError):
        sharpness(model, lambda *_: 1 / 0, x, y)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_precision():
    model, x, y = problem()
    model, x = model.float(), x.float()
    exact = sharpness(copy.deepcopy(model).double(), criterion, x.double(), y, 1e-4, m=5)
    found = sharpness(model, criterion, x, y, 1e-4, m=5, dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    assert sharpness(model, criterion, x, y, 0.1).dtype == torch.float32


def test_bad_input_is_named():
    model, x, y = problem()
    faults = {
        "rho": (-0.1, "a number >= 0"),
        "p": (0.5, r"a number in \[1, inf\]"),
        "eta": (math.nan, "a number >= 0"),
        "steps": (0, "a whole number >= 1"),
        "restarts": (0, "a whole number >= 1"),
        "m": (0, "a whole number >= 1"),
        "seed": (-1, "a whole number >= 0"),
        "batch_size": (0, "a whole number >= 1"),
        "chunk_size": (2.5, "a whole number >= 1"),
    }
    for name, (value, allowed) in faults.items():
        with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value}"):
            sharpness(model, criterion, x, y, **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value}"):
            Sharpness(**{name: value})
    with pytest.raises(ValueError, match="examples must be a whole number >= 1, got 0"):
        Sharpness(examples=0)
    with pytest.raises(ValueError, match="directions must be a whole number >= 2, got 1"):
        average_sharpness(model, criterion, x, y, directions=1)
    with pytest.raises(ValueError, match="rho must be a number >= 0, got -1"):
        AverageSharpness(-1)
    with pytest.raises(ValueError, match="x and y must hold the same number of examples"):
        sharpness(model, criterion, x, y[:4])
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        sharpness(nn.ReLU(), criterion, x, y)
    with pytest.raises(ValueError, match="dtype must be None, .* got torch.bfloat16"):
        average_sharpness(model, criterion, x, y, dtype=torch.bfloat16)
