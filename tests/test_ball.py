"""The perturbation: the laws of the dual norm, closed forms, any size of gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import INF, NORMS, dual, norm, random
from torch import nn
from torch.func import grad, jvp, vmap

from flatmin import dual_norm_perturbation, gradient, loops
from flatmin._ball import project

norms = st.one_of(st.sampled_from(NORMS), st.floats(1, 60))
coordinates = st.one_of(st.just(0.0), st.floats(-9, 9).filter(lambda x: abs(x) > 1e-9))
vectors = st.lists(coordinates, min_size=1, max_size=12).map(lambda v: torch.tensor(v).double())


@given(g=vectors, p=norms, rho=st.floats(1e-3, 10), scale=st.integers(-250, 250))
def test_perturbation_has_length_rho_and_attains_hoelders_bound(g, p, rho, scale):
    epsilon = dual_norm_perturbation(g * 10.0**scale, rho, p)
    if not g.any():
        assert not epsilon.any()
        return
    assert norm(epsilon, p).item() == pytest.approx(rho, rel=1e-12)
    assert (g @ epsilon).item() == pytest.approx(rho * norm(g, dual(p)).item(), rel=1e-12)


@given(g=vectors, p=norms, data=st.data())
def test_no_other_point_of_the_ball_is_higher(g, p, data):
    values = data.draw(st.lists(st.floats(-1, 1), min_size=len(g), max_size=len(g)))
    other = torch.tensor(values).double()
    other = 0.5 * other / norm(other, p).clamp_min(1e-30)
    epsilon = dual_norm_perturbation(g, 0.5, p)
    assert g @ other <= g @ epsilon + 1e-12 * g.abs().sum()


def test_closed_forms():
    g = torch.tensor([3.0, 0.0, -4.0]).double()
    at = lambda p: dual_norm_perturbation(g, 0.5, p).tolist()
    assert at(2) == pytest.approx([0.3, 0, -0.4], rel=1e-15)
    assert at(1) == [0, 0, -0.5]
    assert at(INF) == [0.5, 0, -0.5]
    # p = 3: q - 1 = 1/2, so ε̂ ∝ sign(g) √|g|
    root = torch.tensor([math.sqrt(3), 0, -2], dtype=torch.double)
    assert at(3) == pytest.approx((0.5 * root / norm(root, 3)).tolist(), rel=1e-14)


def test_equally_large_coordinates_share_at_p_1():
    epsilon = dual_norm_perturbation(torch.tensor([2.0, -2.0, 1.0, 2.0]), 0.75, 1)
    assert epsilon.tolist() == [0.25, -0.25, 0, 0.25]


@pytest.mark.parametrize("p", NORMS)
def test_all_entries_count_as_one_vector_and_are_not_changed(p):
    g = torch.randn(24, generator=torch.Generator().manual_seed(0)).double()
    before, flat = g.clone(), dual_norm_perturbation(g, 0.1, p)
    for shape in ((2, 12), (4, 3, 2), (1, 24)):
        found = dual_norm_perturbation(g.view(shape), 0.1, p)
        assert found.shape == shape and torch.equal(found.flatten(), flat)
    assert dual_norm_perturbation(g[0], 0.1, p).item() == pytest.approx(0.1 * g[0].sign().item())
    assert torch.equal(g, before)


@pytest.mark.parametrize("p", NORMS)
def test_a_zero_gradient_gives_no_perturbation_and_a_broken_one_only_nan(p):
    assert torch.equal(dual_norm_perturbation(torch.zeros(3, 2), 0.1, p), torch.zeros(3, 2))
    for bad in (INF, -INF, math.nan):
        found = dual_norm_perturbation(torch.tensor([1.0, bad, 0.0]), 0.1, p)
        assert found.isnan().all()


@pytest.mark.parametrize(
    "dtype, scales",
    [
        (torch.float32, [1e-42, 1e-30, 1e-6, 1e30]),
        (torch.float16, [6e-8, 1e-6, 1e-3, 1e3, 6e4]),
        (torch.bfloat16, [1e-38, 1e-6, 1e30]),
    ],
)
@pytest.mark.parametrize("p", NORMS)
def test_any_size_of_gradient_gives_the_same_perturbation(dtype, scales, p):
    base = torch.tensor([1.0, -1.0, 0.0, 1.0]).double()
    expected = dual_norm_perturbation(base, 0.05, p)
    for scale in scales:
        found = dual_norm_perturbation((base * scale).to(dtype), 0.05, p)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def by_logarithms(g, rho, p):
    """ε̂ from its formula, in logarithms, so that no power leaves the range."""
    log, q = g.double().abs().log(), dual(p)
    if p == 1:
        return rho * g.double().sign() * (g.abs() == g.abs().max())  # one entry is the largest
    size = (q - 1) * log - (q * log).logsumexp(0) / p
    return g.sign() * (math.log(rho) + size).exp()


@pytest.mark.parametrize("p", [1, 1.03, 1.5, 2, 3, 7, 50, INF])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 2e-5), (torch.bfloat16, 8e-3)])
def test_one_gradient_over_60_orders_of_magnitude(dtype, rtol, p):
    """Each entry of ε̂ that the type can represent has its value; the others are 0."""
    sizes = torch.logspace(-30, 30, 121, dtype=torch.float64)
    g = (sizes * (-1) ** torch.arange(121)).to(dtype)
    w = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (60, 61)]
    w[0].grad, w[1].grad = g.split([60, 61])
    loops.SAM(torch.optim.SGD(w, lr=0.1), rho=0.5, p=p).first_step()
    in_loop = torch.cat([x.detach() for x in w])
    in_stack = vmap(lambda g, p: dual_norm_perturbation(g, 0.5, p))
    single = torch.tensor([p], dtype=torch.float32)  # not quite p
    for epsilon, norm_taken in (
        (dual_norm_perturbation(g, 0.5, p), p),
        (in_loop, p),
        (in_stack(g[None], single)[0], single.item()),
    ):
        expected = by_logarithms(g, 0.5, norm_taken)
        assert epsilon.dtype == dtype and expected.abs().max() > 0.01
        torch.testing.assert_close(epsilon.double(), expected, rtol=rtol, atol=2e-38)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("p", NORMS)
def test_whole_gradients_near_the_ends_of_single_precision(p, size):
    g = random(50)
    single = (g * size).float()
    expected = dual_norm_perturbation(single.double(), 0.1, p)
    w = nn.Parameter(torch.zeros(50))
    w.grad = single.clone()
    loops.SAM(torch.optim.SGD([w], lr=0.1), rho=0.1, p=p).first_step()
    in_recipe = gradient.SAM(rho=0.1, p=p).perturbation({"w": w.detach()}, {"w": single})["w"]
    for epsilon in (w.detach(), in_recipe):
        torch.testing.assert_close(epsilon.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_the_length_of_a_long_vector(p):
    """On a CPU, one sum after the other is wrong by 1e-3 at this length (p = 3)."""
    g = random(3_000_000).float()
    exact = dual_norm_perturbation(g.double(), 1.0, p)
    epsilon = dual_norm_perturbation(g, 1.0, p).double()
    assert torch.linalg.vector_norm(epsilon, p).item() == pytest.approx(1, abs=3e-6)
    assert (epsilon @ exact / (exact @ exact)).item() == pytest.approx(1, abs=3e-6)
    stacked = vmap(lambda g: dual_norm_perturbation(g, 1.0, p))(g.view(2, -1))
    for found, part in zip(stacked, g.view(2, -1), strict=True):
        torch.testing.assert_close(found, dual_norm_perturbation(part, 1.0, p), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [1.5, 2])
def test_the_derivative_at_a_long_vector_with_many_zeros(p):
    """ε̂ does not depend on the size of g, so its derivative along g is 0; across, by ratios."""
    g = torch.cat([torch.zeros(40_000).double(), random(10_000)])
    v = random(50_000, seed=1)
    _, along = jvp(lambda g: dual_norm_perturbation(g, 0.5, p), (g,), (g,))
    assert along.abs().max() < 1e-15
    slope = grad(lambda g: dual_norm_perturbation(g, 0.5, p) @ v)(g)
    assert slope.isfinite().all()
    h, u = 1e-6 * g.abs().max(), torch.cat([g[:40_000], random(10_000, seed=2)])
    high, low = (dual_norm_perturbation(g + s * h * u, 0.5, p) @ v for s in (1, -1))
    assert (slope @ u).item() == pytest.approx(((high - low) / (2 * h)).item(), rel=1e-5)


def test_naive_powers_would_fail_where_the_kernel_does_not():
    g, q = torch.tensor([1e-6, -2e-6]), dual(1.1)
    naive = 0.05 * g.sign() * g.abs() ** (q - 1) / (g.abs() ** q).sum() ** (1 / 1.1)
    assert not naive.isfinite().all()
    found = dual_norm_perturbation(g, 0.05, 1.1)
    exact = dual_norm_perturbation(g.double(), 0.05, 1.1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_half_precision_sums_many_coordinates():
    g = torch.full((200_000,), 1e-3, dtype=torch.float16)
    epsilon = dual_norm_perturbation(g, 1000.0, 1)
    assert epsilon.float().sum().item() == pytest.approx(1000, rel=1e-2)
    epsilon = dual_norm_perturbation(g, 1000.0, 2)
    assert epsilon.float().norm().item() == pytest.approx(1000, rel=1e-3)


def test_every_run_of_a_stack_has_its_own_radius_and_norm():
    g = torch.randn(7, 2, 3).double()
    rho, p = torch.linspace(0, 1, 7).double(), torch.tensor(NORMS).double()
    found = vmap(dual_norm_perturbation)(g, rho, p)
    for i in range(7):
        alone = dual_norm_perturbation(g[i], rho[i].item(), p[i].item())
        torch.testing.assert_close(found[i], alone, rtol=1e-12, atol=1e-15)


@given(g=vectors, p=norms, data=st.data())
def test_scaled_ball(g, p, data):
    """T ε̂(T g) is the step in the ball ‖T⁻¹ε‖_p <= ρ, as the docstring says."""
    values = data.draw(st.lists(st.floats(0.01, 10), min_size=len(g), max_size=len(g)))
    t = torch.tensor(values).double()
    epsilon = t * dual_norm_perturbation(t * g, 0.3, p)
    if g.any():
        assert norm(epsilon / t, p).item() == pytest.approx(0.3, rel=1e-12)
        assert (g @ epsilon).item() == pytest.approx(0.3 * norm(t * g, dual(p)).item(), rel=1e-12)


def test_empty_and_other_gradients():
    assert dual_norm_perturbation(torch.zeros(0, 3), 0.1).shape == (0, 3)
    for g in ([3.0, -4.0], np.array([3.0, -4.0]), {"w": torch.ones(2)}):
        with pytest.raises(TypeError, match=f"g must be a tensor, got {type(g).__name__}"):
            dual_norm_perturbation(g, 0.1)
    with pytest.raises(TypeError, match="g must be floating point, got torch.complex64"):
        dual_norm_perturbation(torch.ones(2, dtype=torch.complex64), 0.1)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="g must be floating point, got torch.int64"):
        dual_norm_perturbation(torch.tensor([3, -4]), 0.1)
    with pytest.raises(TypeError, match="g must be dense, got the layout torch.sparse_coo"):
        dual_norm_perturbation(torch.eye(2).to_sparse(), 0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(rho=-0.1), "rho must be a number >= 0, got -0.1"),
        (dict(rho=math.nan), "rho"),
        (dict(rho=INF), "rho"),
        (dict(rho="x"), "rho"),
        (dict(p=0.5), r"p must be a number in \[1, inf\], got 0.5"),
        (dict(p=math.nan), "p must"),
        (dict(p=True), "p must"),
        (dict(p=None), "p must"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    w = nn.Parameter(torch.ones(2))
    base = torch.optim.SGD([w], lr=0.1)
    for call in (
        lambda **a: dual_norm_perturbation(torch.ones(2), **({"rho": 0.1} | a)),
        lambda **a: gradient.SAM(**a),
        lambda **a: loops.SAM(base, **a),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    assert "rho" not in base.param_groups[0]


@pytest.mark.parametrize("size", [1e-250, 1.0, 1e250])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, INF])
def test_a_projection_is_in_the_ball_and_leaves_what_is_inside(p, size):
    u = size * random(7)
    of_one = norm(random(7), p).item()
    inside, outside = 2 * size * of_one, size * of_one / 3
    assert torch.equal(project(u, inside, p), u)
    found = project(u, outside, p)
    if p == INF:
        assert torch.equal(found, u.clamp(-outside, outside))
    else:
        torch.testing.assert_close(found / size, u / size / 3, rtol=1e-12, atol=0)
    assert torch.equal(project(0 * u, 0.1, p), 0 * u)
