"""Loss slices: closed forms, a plain loop over copies of the module, and the stack."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem, rescaled
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin import Recipe, fit, loss_slice
from flatmin.book import MLP, SmallCNN, two_gaussians
from flatmin.measure import LossSlice, filter_normalized, random_direction
from flatmin.optimizer import SGD

criterion = nn.CrossEntropyLoss()
line = lambda radius=1.0, points=5: torch.linspace(-radius, radius, points).double()
weights = lambda model: dict(model.named_parameters())


# -------------------------------------------------------------------------------------- directions


@given(st.integers(0, 99), st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_every_filter_is_as_long_as_that_of_the_weights(seed, scale):
    params = weights(SmallCNN(2, 3, (4, 4)).double())
    direction = {name: scale * torch.randn_like(w) for name, w in params.items()}
    d = filter_normalized(direction, params)
    for name, w in params.items():
        if w.ndim < 2:
            assert (d[name] == 0).all()
            continue
        norm = lambda t: t.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norm(d[name]), norm(w))
        cosine = (
            (d[name] * direction[name]).flatten(1).sum(1) / norm(d[name]) / norm(direction[name])
        )
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
    again = filter_normalized(d, params)
    assert all(torch.allclose(again[name], d[name]) for name in params)


def test_a_filter_of_zeros_has_a_zero_direction():
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert (filter_normalized({"w": one}, {"w": zero})["w"] == 0).all()
    assert (filter_normalized({"w": zero}, {"w": one})["w"] == 0).all()


def test_directions_depend_only_on_seed_and_index():
    params = weights(MLP(5, 400, 3, batch_norm=True))
    state = torch.get_rng_state()
    d = [random_direction(params, 3), random_direction(params, 3), random_direction(params, 4)]
    d.append(random_direction(params, 3, 1))
    assert torch.equal(state, torch.get_rng_state())
    flat = [torch.cat([v.flatten() for v in one.values()]) for one in d]
    assert torch.equal(flat[0], flat[1])
    for other in flat[2:]:  # nearly orthogonal: 3,200 numbers
        assert 0 < abs(torch.cosine_similarity(flat[0], other, 0)) < 0.2


# ------------------------------------------------------------------------------------------ slices


def test_a_slice_of_linear_regression_is_a_parabola():
    model, x, _ = problem(lambda: nn.Linear(5, 1))
    y = torch.randn(23, generator=torch.Generator().manual_seed(1)).double()
    d = {name: torch.randn_like(w) for name, w in model.named_parameters()}
    residual = (model(x)[:, 0] - y).detach()
    slope = x @ d["weight"][0] + d["bias"]
    a = line(2.0, 7)
    squared = lambda output, y: (output[:, 0] - y) ** 2
    expected = (residual + a[:, None] * slope).square().mean(1)
    torch.testing.assert_close(loss_slice(model, squared, x, y, [d], [a]), expected)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: MLP(5, 8, 3, batch_norm=True, dropout=0.5), (5,)),
        (lambda: SmallCNN(2, 3, (4, 4), batch_norm=True), (2, 8, 8)),
        (
            lambda: nn.Sequential(
                nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
                nn.Flatten(),
                nn.Linear(12, 3),
            ),
            (3, 4),
        ),
    ],
)
def test_a_slice_of_any_network_equals_a_loop_over_copies(make, shape):
    model, x, y = problem(make, shape)
    d = [random_direction(weights(model), 0, i) for i in range(2)]
    a, b = line(), line(0.5, 4)
    found = loss_slice(model, criterion, x, y, d, [a, b])
    assert found.shape == (5, 4)
    for i in range(5):
        for j in range(4):
            moved = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, w in moved.named_parameters():
                    w += a[i] * d[0][name] + b[j] * d[1][name]
                expected = criterion(moved(x), y)
            torch.testing.assert_close(found[i, j], expected)


@pytest.mark.parametrize("batch_size, chunk_size", [(5, 1), (7, 3), (23, 100)])
def test_batches_and_chunks_change_nothing(batch_size, chunk_size):
    model, x, y = problem()
    d, a = [random_direction(weights(model))], [line()]
    whole = loss_slice(model, criterion, x, y, d, a)
    parts = loss_slice(model, criterion, x, y, d, a, batch_size=batch_size, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    by_example = nn.CrossEntropyLoss(reduction="none")
    parts = loss_slice(model, by_example, x, y, d, a, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_rescaling_the_layers_does_not_change_the_slice():
    """With layers ×20 and ÷20; along raw directions, the slice does change."""
    model, x, y = problem()
    other = rescaled(model)
    a = [line(5.0)]
    slices = [
        loss_slice(m, criterion, x, y, [random_direction(weights(m))], a) for m in (model, other)
    ]
    torch.testing.assert_close(*slices)
    raw = {name: torch.ones_like(w) for name, w in model.named_parameters()}
    slices = [loss_slice(m, criterion, x, y, [raw], a) for m in (model, other)]
    assert (slices[0] - slices[1]).abs().max() > 0.05


def test_double_precision_of_a_single_precision_network():
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True))
    d, a = [random_direction(weights(model))], [line()]
    model, x = model.float(), x.float()
    model.double()  # so that the weights are single-precision numbers
    rounded = loss_slice(model, criterion, x.double(), y, d, a)
    model.float()
    found = loss_slice(model, criterion, x, y, d, a, dtype=torch.float64)
    torch.testing.assert_close(found, rounded, rtol=1e-6, atol=0)
    assert found.dtype == torch.float64 and next(model.parameters()).dtype == torch.float32


def test_the_module_is_left_as_it_was():
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True, dropout=0.5))
    model[2].eval()
    criterion(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    loss_slice(model, criterion, x, y, [random_direction(weights(model))], [line()])
    with pytest.raises(ZeroDivisionError):
        loss_slice(model, lambda *_: 1 / 0, x, y, [random_direction(weights(model))], [line()])
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
    assert torch.equal(random, torch.get_rng_state())


# ----------------------------------------------------------------------------------------- a stack


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_stack_is_the_module(dimensions):
    data = two_gaussians(30, test_size=10)
    x, y = data.split("train")
    make = lambda: MLP(10, 8, 2, batch_norm=True)
    recipe = Recipe(optimizer=SGD(lr=0.1))
    networks = fit(
        make, data, recipe, seeds=2, steps=10, batch_size=10, networks="last", dtype=torch.float64
    ).networks
    instrument = LossSlice(0.8, 5, dimensions, seed=7, examples=21, batch_size=8, chunk_size=2)
    found = networks.measure(instrument, data, "train")
    assert found.shape == (2,) + (5,) * dimensions
    coordinates = [instrument.coordinates] * dimensions
    for i, seed in enumerate(networks.coords["seed"]):
        model = networks.module(seed=seed).double()
        d = [random_direction(weights(model), 7, k) for k in range(dimensions)]
        expected = loss_slice(model, criterion, x[:21].double(), y[:21], d, coordinates)
        torch.testing.assert_close(torch.from_numpy(found.values[i]), expected)
        centre = found.values[i][(2,) * dimensions]
        with torch.no_grad():
            clean = cross_entropy(model.eval()(x[:21].double()), y[:21])
        assert centre == pytest.approx(clean.item(), rel=1e-12)


# ------------------------------------------------------------------------------------------ faults


def test_bad_input_is_named():
    model, x, y = problem()
    d, a = random_direction(weights(model)), line()
    run = lambda directions, coordinates, **more: loss_slice(
        model, criterion, x, y, directions, coordinates, **more
    )
    with pytest.raises(ValueError, match="must be one vector per direction, got 2 for 1"):
        run([d], [a, a])
    with pytest.raises(ValueError, match="must be one vector per direction, got 0 for 0"):
        run([], [])
    with pytest.raises(ValueError, match="coordinates must be tensors of one dimension, got 3"):
        run([d], [3])
    with pytest.raises(ValueError, match="directions must have the names and shapes .* got"):
        run([{"weight": torch.ones(2)}], [a])
    with pytest.raises(ValueError, match="chunk_size must be a whole number >= 1, got 0"):
        run([d], [a], chunk_size=0)
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0.5"):
        run([d], [a], batch_size=0.5)
    with pytest.raises(
        ValueError, match="dtype must be None, torch.float32 or torch.float64, got torch.float16"
    ):
        run([d], [a], dtype=torch.float16)
    with pytest.raises(ValueError, match="x and y must hold the same number of examples"):
        loss_slice(model, criterion, x, y[:3], [d], [a])
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient"):
        loss_slice(nn.ReLU(), criterion, x, y, [d], [a])
    with pytest.raises(ValueError, match="seed must be a whole number >= 0, got -1"):
        random_direction(weights(model), -1)


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("radius", -1, "a number >= 0"),
        ("radius", math.inf, "a number >= 0"),
        ("points", 0, "a whole number >= 1"),
        ("dimensions", 3, "1 or 2"),
        ("seed", 0.5, "a whole number >= 0"),
        ("examples", 0, "a whole number >= 1"),
        ("batch_size", 0, "a whole number >= 1"),
        ("chunk_size", None, "a whole number >= 1"),
    ],
)
def test_the_instrument_names_bad_input(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value!r}"):
        LossSlice(**{name: value})
