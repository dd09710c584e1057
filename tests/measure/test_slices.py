"""Loss slices: closed forms, a plain loop over copies of the module, and the stack."""

import copy
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem, random, rescaled
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin import Recipe, fit, loss_slice
from flatmin.book import MLP, SmallCNN, two_gaussians
from flatmin.measure import on
from flatmin.optimizer import SGD

weights = lambda model: {name: w.detach() for name, w in model.named_parameters()}
squared = lambda output, y: (output[:, 0] - y) ** 2


# ------------------------------------------------------------------------------------------ slices


@given(st.integers(0, 99), st.floats(0.1, 3), st.integers(2, 9))
@settings(max_examples=20)
def test_a_slice_of_linear_regression_is_a_parabola(seed, radius, points):
    """L(w + a d) = L(w) + a s + a² c, with c between its smallest and its largest possible value.

    The direction is as long as w, so c is at most ‖w‖² times the largest eigenvalue of XᵀX/n.
    """
    model, x, y = nn.Linear(5, 1, bias=False).double(), random(23, 5), random(23, seed=1)
    how = {"radius": radius, "points": points, "seed": seed, "criterion": squared}
    found = on(model, loss_slice, x, y, **how)
    assert found.shape == (points,)
    a = torch.linspace(-radius, radius, points).double()
    terms = torch.stack([a**0, a, a**2], 1)
    solution = torch.linalg.lstsq(terms, found[:, None]).solution
    torch.testing.assert_close(terms @ solution, found[:, None])
    if points > 2:
        w = model.weight[0].detach()
        eigenvalues = torch.linalg.eigvalsh(x.mT @ x / 23)
        torch.testing.assert_close(solution[0, 0], (x @ w - y).square().mean())
        low, high = eigenvalues[0] * (w @ w), eigenvalues[-1] * (w @ w)
        assert low * (1 - 1e-6) <= solution[2, 0] <= high * (1 + 1e-6)


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
    """Along the direction that a linear criterion reveals: L is then a d, for every output."""
    model, x, y = problem(make, shape)
    d = direction_of(weights(model))
    found = on(model, loss_slice, x, y, radius=0.5, points=5)
    for a, value in zip(torch.linspace(-0.5, 0.5, 5), found, strict=True):
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for name, w in moved.named_parameters():
                w += a * d[name]
            torch.testing.assert_close(value, cross_entropy(moved(x), y))


def direction_of(params, seed=0):
    """The direction of a slice, from what a network sees at the point a = 1."""
    seen = []
    network = lambda w, x: seen.append(w) or x
    one = next(iter(params.values())).new_zeros(1)
    how = {"radius": 1.0, "points": 3, "seed": seed, "chunk_size": 1}
    loss_slice(network, params, one, one, criterion=lambda output, y: output, **how)
    return {name: seen[2][name] - w for name, w in params.items()}


def test_directions_depend_only_on_the_seed_and_are_filter_normalized():
    params = weights(MLP(5, 400, 3, batch_norm=True).double())
    state = torch.get_rng_state()
    d = [direction_of(params, 3), direction_of(params, 3), direction_of(params, 4)]
    assert torch.equal(state, torch.get_rng_state())
    for name, w in params.items():
        length = lambda t: t.flatten(1).norm(dim=1)
        if w.ndim < 2:
            assert not d[0][name].any()
            continue
        torch.testing.assert_close(length(d[0][name]), length(w))
    flat = [torch.cat([v.flatten() for v in one.values()]) for one in d]
    assert torch.equal(flat[0], flat[1])
    assert 0 < abs(torch.cosine_similarity(flat[0], flat[2], 0)) < 0.2  # 3,200 numbers


@pytest.mark.parametrize("batch_size, chunk_size", [(5, 1), (7, 3), (23, 100)])
def test_batches_and_chunks_change_nothing(batch_size, chunk_size):
    model, x, y = problem()
    whole = on(model, loss_slice, x, y)
    parts = on(model, loss_slice, x, y, batch_size=batch_size, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


def test_a_filter_of_zeros_does_not_move():
    params = weights(MLP(5, 8, 3).double())
    params["1.weight"][2] = 0
    d = direction_of(params)["1.weight"]
    assert (d[2] == 0).all() and d[3].any()


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e22, 1e30])
def test_filters_near_the_ends_of_single_precision(size):
    """Squares of their weights are 0 or infinite; the slice is that of weights near 1."""
    model, x, y = problem(lambda: nn.Linear(5, 3, bias=False))
    model, x = model.float(), x.float()
    expected = on(model, loss_slice, x, y, points=5)
    model.weight.data *= size
    scaled = on(nn.Sequential(model, Times(1 / size)), loss_slice, x, y, points=5)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_rescaling_the_layers_does_not_change_the_slice():
    model, x, y = problem()
    slices = [on(m, loss_slice, x, y, radius=5.0, points=5) for m in (model, rescaled(model))]
    torch.testing.assert_close(*slices)


def test_double_precision_of_a_single_precision_network():
    model, x, y = problem(lambda: MLP(5, 8, 3, batch_norm=True))
    model, x = model.float(), x.float()
    found = on(model, loss_slice, x, y, dtype=torch.float64)
    expected = on(copy.deepcopy(model).double(), loss_slice, x.double(), y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert on(model, loss_slice, x, y).dtype == torch.float32


# ----------------------------------------------------------------------------------------- a stack


def test_the_stack_is_the_module():
    data = two_gaussians(30, test_size=10)
    x, y = data.split("train")
    make = lambda: MLP(10, 8, 2, batch_norm=True)
    recipe = Recipe(optimizer=SGD(lr=0.1))
    networks = fit(
        make, data, recipe, seeds=2, steps=10, batch_size=10, networks="last", dtype=torch.float64
    ).networks
    line = partial(loss_slice, radius=0.8, points=5, seed=7, batch_size=8, chunk_size=2)
    found = networks.measure(line, data, "train", examples=21)
    assert found.dims == ("seed", "coordinate")
    for seed in networks.coords["seed"]:
        model = networks.module(seed=seed).double()
        expected = on(model, line, x[:21].double(), y[:21])
        values = torch.from_numpy(found.sel(seed=seed).values)
        torch.testing.assert_close(values, expected)
        with torch.no_grad():
            clean = cross_entropy(model.eval()(x[:21].double()), y[:21])
        assert values[2].item() == pytest.approx(clean.item(), rel=1e-12)


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("radius", -1, "a number >= 0"),
        ("radius", math.inf, "a number >= 0"),
        ("points", 1, "a whole number >= 2"),
        ("seed", 0.5, "a whole number >= 0"),
        ("batch_size", 0, "a whole number >= 1"),
        ("chunk_size", None, "a whole number >= 1"),
    ],
)
def test_bad_input_is_named(name, value, allowed):
    model, x, y = problem()
    with pytest.raises(ValueError, match=f"{name} must be {allowed}, got {value!r}"):
        on(model, loss_slice, x, y, **{name: value})
