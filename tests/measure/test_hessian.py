"""The Hessian's spectrum: closed forms, dense Hessians, a spectrum made by hand, other packages."""

import copy
import dataclasses
import math
from functools import partial

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import INF, random
from torch import nn
from torch.func import functional_call, vmap

from flatmin import Data, Recipe, eigenvalues, fit, hvp, spectral_density
from flatmin.book import MLP, SmallCNN, two_gaussians
from flatmin.measure import Density, hessian_product, lanczos, on, trace
from flatmin.optimizer import SGD

criterion = nn.CrossEntropyLoss()
close = lambda a, b, tol=1e-8: torch.testing.assert_close(
    a, b, rtol=0, atol=tol * max(1, b.abs().max().item())
)


def problem(make=lambda: MLP(4, 6, 3, activation=nn.Tanh), shape=(4,), **more):
    return problems.problem(make, shape, **more)  # a criterion with a Hessian everywhere


def dense(model, loss, x, y):
    """The Hessian, row by row, in the order of the parameters.

    By plain autograd: torch.func.hessian is wrong for layer norm (its vmap of a jvp, torch 2.13).
    """
    model = copy.deepcopy(model).eval()
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.flatten() for p in params.values()])

    def f(flat):
        parts = flat.split([p.numel() for p in params.values()])
        named = {k: part.view_as(p) for part, (k, p) in zip(parts, params.items(), strict=True)}
        return loss(functional_call(model, named, (x,)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(f, flat)


def products(network, params, x, y, vs=None, **options):
    """The instrument Hv for each row of vs; without, H itself."""
    product = hessian_product(network, params, x, y, **options)
    size = sum(w.numel() for w in params.values())
    vs = torch.eye(size, dtype=x.dtype) if vs is None else vs
    return torch.stack([product(v) for v in vs])


def of_matrix(instrument, H, **options):
    """An instrument of the function ½ w·Hw, whose Hessian is H."""
    network = lambda params, x: (params["w"] @ H @ params["w"] / 2).expand(len(x))
    params, one = {"w": H.new_zeros(len(H))}, H.new_zeros(1)
    return instrument(network, params, one, one, criterion=lambda output, y: output, **options)


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    return (basis * values) @ basis.mT


def outliers(size=500):
    """A bulk around 0 and 10 outliers, as for a classifier with 10 classes."""
    bulk = 0.3 * random(size - 10)
    return torch.cat([bulk, torch.linspace(10, 100, 10).double()]).sort().values


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


MODELS = {
    "mlp": (lambda: MLP(4, 6, 3, activation=nn.Tanh), (4,)),
    "batch norm": (lambda: MLP(4, 6, 3, batch_norm=True, dropout=0.5, activation=nn.GELU), (4,)),
    "cnn": (lambda: SmallCNN(1, 3, (2, 3), batch_norm=True), (1, 8, 8)),
    "attention": (Attention, (5, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(8, 3)
        ),
        (2, 4),
    ),
}


# ------------------------------------------------------------------------- Hessian-vector products


@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_hessian(name):
    model, x, y = problem(*MODELS[name])
    H = dense(model, criterion, x, y)
    close(on(model, products, x, y), H)
    v = random(3, len(H))
    for batch_size in (23, 5):  # the last has 3
        close(on(model, products, x, y, vs=v, batch_size=batch_size), v @ H)


def test_linear_and_logistic_regression_have_closed_forms():
    x = random(30, 4)
    linear = nn.Linear(4, 1, bias=False).double()
    squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    found = on(linear, products, x, random(30), criterion=squared, batch_size=7)
    close(found, x.mT @ x / 30)
    logistic = lambda output, y: nn.functional.softplus(-y * output[:, 0])
    found = on(linear, products, x, random(30).sign(), criterion=logistic, batch_size=7)
    p = torch.sigmoid(x @ linear.weight[0].detach())
    close(found, (x.mT * (p * (1 - p))) @ x / 30)


def test_hvp_of_functions_of_trees():
    """f = |a|⁴ + c·sum(b)·sum(a): products by hand, also under vmap."""
    a, b = random(3), random(2, 2)
    f = lambda w: w["a"].square().sum() ** 2 + 0.5 * w["b"].sum() * w["a"].sum()
    v = {"a": random(3, seed=1), "b": random(2, 2, seed=2)}
    ones = torch.ones(3).double()
    expected_a = 4 * (a @ a) * v["a"] + 8 * a * (a @ v["a"]) + 0.5 * v["b"].sum() * ones
    found = hvp(f, {"a": a, "b": b}, v)
    close(found["a"], expected_a)
    close(found["b"], 0.5 * v["a"].sum() * torch.ones_like(b))
    many = vmap(lambda v: hvp(f, {"a": a, "b": b}, v)["a"])
    close(many({"a": torch.stack([v["a"]] * 2), "b": torch.stack([v["b"]] * 2)})[1], expected_a)


def test_tied_and_frozen_weights_and_a_linear_loss():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    tied[2].bias.requires_grad_(False)
    _, x, y = problem()
    found = on(tied, products, x, y)
    assert found.shape == (20, 20)
    close(found, dense(tied, criterion, x, y))
    linear = nn.Linear(4, 1).double()
    for batch_size in (None, 7):
        how = {"criterion": lambda output, y: output[:, 0] * y, "batch_size": batch_size}
        assert (on(linear, products, x, y, **how) == 0).all()


def test_precision():
    model, x, y = problem()
    model, x, v = model.float(), x.float(), random(1, 51)
    exact = v @ dense(copy.deepcopy(model).double(), criterion, x.double(), y)
    close(on(model, products, x, y, vs=v, dtype=torch.float64), exact, 1e-12)
    single = on(model, products, x, y, vs=v.float())
    assert single.dtype == torch.float32
    close(single.double(), exact, 1e-5)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_module_is_left_as_it_was(batch_size):
    model, x, y = problem(lambda: MLP(4, 6, 3, batch_norm=True, dropout=0.5))
    model.train()
    model[2].eval()
    criterion(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    for instrument in (eigenvalues, trace, partial(spectral_density, steps=5, probes=2)):
        found = on(model, instrument, x, y, batch_size=batch_size)
        assert not any(value.requires_grad for value in found)
        with torch.inference_mode():
            again = on(model, instrument, x.clone(), y.clone(), batch_size=batch_size)
        for a, b in zip(found, again, strict=True):
            close(a, b, 1e-12)
    with pytest.raises(ZeroDivisionError):
        on(model, eigenvalues, x, y, criterion=lambda *_: 1 / 0)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(state, torch.get_rng_state())


# ----------------------------------------------------------------------------------------- Lanczos


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 10**6), st.integers(-12, 12))
@settings(max_examples=60)
def test_the_basis_is_orthonormal_and_tridiagonalizes(size, steps, seed, exponent):
    H = matrix(10.0**exponent * random(size, seed=seed))
    found = lanczos(lambda v: v @ H, random(size, seed=seed + 1), steps)
    Q, k, scale = found.basis, min(size, steps), H.abs().max() + 1e-300
    assert found.alpha.shape == found.beta.shape == (k,) and Q.shape == (k, size)
    close(Q @ Q.mT, torch.eye(k).double(), 1e-12)
    T = torch.diag(found.alpha) + torch.diag(found.beta[:-1], 1) + torch.diag(found.beta[:-1], -1)
    assert ((Q @ H @ Q.mT - T).abs() <= 1e-11 * scale * size).all()
    values, vectors, residuals = found.ritz()
    y = vectors.mT @ Q
    true = (y @ H - values[:, None] * y).norm(dim=1)  # the definition of the residual
    assert ((true - residuals).abs() <= 1e-11 * scale * size).all()
    distance = (torch.linalg.eigvalsh(H) - values[:, None]).abs().amin(1)
    assert (distance <= residuals + 1e-11 * scale * size).all()  # the residual bounds the error


def without_reorthogonalization(H, v0, steps):
    """The textbook recurrence."""
    q, before, beta, alphas, betas = v0 / v0.norm(), torch.zeros_like(v0), 0.0, [], []
    for _ in range(steps):
        w = H @ q - beta * before
        alphas.append(w @ q)
        w = w - alphas[-1] * q
        beta = w.norm()
        betas.append(beta)
        q, before = w / beta, q
    T = torch.diag(torch.stack(alphas))
    off = torch.diag(torch.stack(betas[:-1]), 1)
    return torch.linalg.eigvalsh(T + off + off.mT)


def test_ten_outliers_are_found_once_and_to_1e_8():
    values = outliers()
    H = matrix(values)
    v0 = random(500, seed=1)
    ghosts = without_reorthogonalization(H, v0, 120)
    assert (ghosts > 5).sum() > 20  # so the test can detect ghosts
    ritz, _, residuals = lanczos(lambda v: v @ H, v0, 120).ritz()
    assert (ritz > 5).sum() == 10
    close(ritz[-10:], values[-10:])
    assert (residuals[-10:] < 1e-8).all()


def test_after_a_breakdown_lanczos_continues_with_an_orthogonal_vector():
    """Three distinct eigenvalues are exhausted in three steps; then their copies are found."""
    values = torch.tensor([1.0] * 5 + [2.0] * 4 + [7.0] * 3).double()
    H = matrix(values)
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = lanczos(lambda v: (v.double() @ H).to(v.dtype), random(12, seed=5).to(dtype), 12)
        assert found.alpha.isfinite().all() and found.beta.isfinite().all()
        close(found.basis @ found.basis.mT, torch.eye(12, dtype=dtype), tol)
        close(found.ritz()[0], values, tol)
    first = lanczos(lambda v: v @ H, random(12, seed=5), 3)
    assert first.beta[-1] < 1e-12 and (first.ritz()[2] < 1e-12).all()
    zero = lanczos(lambda v: 0 * v, random(6), 6)  # no curvature at all
    assert (zero.alpha == 0).all() and (zero.beta == 0).all() and (zero.ritz()[0] == 0).all()
    eigen = lanczos(lambda v: v @ torch.diag(values), torch.eye(12).double()[0], 4)
    assert eigen.alpha[0] == 1 and eigen.beta[0] == 0  # from an eigenvector
    close(eigen.basis @ eigen.basis.mT, torch.eye(4).double(), 1e-12)


def test_the_last_vectors_of_the_space_are_orthogonal_too():
    """The random one after a breakdown lies almost in the span, in the end."""
    for values in (random(200).sign(), torch.linspace(0, 1e-5, 200).double()):
        values[:5] = 100
        product = lambda v, values=values: v * values.float()
        found = lanczos(product, random(200, seed=1).float(), 200)
        close(found.basis @ found.basis.mT, torch.eye(200), 3e-6)
        close(found.ritz()[0], values.sort().values, 1e-5)


multiplicities = st.lists(
    st.tuples(st.sampled_from([-2.0, 0.0, 1.0, 5.0]), st.integers(1, 4)), min_size=1, max_size=4
)
distances = st.sampled_from([0.0, 1e-14, 1e-9, 1e-6, 1e-3])


@given(multiplicities, distances, st.integers(0, 10**6), st.integers(1, 16), st.booleans())
@settings(max_examples=80)
def test_multiple_and_nearly_multiple_eigenvalues(groups, distance, seed, steps, single):
    """All steps find all copies; fewer never find too many, and the errors hold."""
    dtype = torch.float32 if single else torch.float64
    values = torch.tensor([v for v, times in groups for _ in range(times)]).double()
    values = (values + distance * random(len(values), seed=seed)).sort().values
    H, start = matrix(values, seed), random(len(values), seed=seed + 1).to(dtype)
    product = lambda v: (H @ v.double()).to(dtype)
    rounding = 100 * torch.finfo(dtype).eps * max(1, values.abs().max().item())
    every = lanczos(product, start, len(values)).ritz()[0]
    assert ((every - values).abs() <= rounding).all()
    found, _, residuals = lanczos(product, start, steps).ritz()
    assert ((found[:, None] - values).abs().amin(1) <= residuals + rounding).all()
    k = len(found)  # Cauchy: the i-th Ritz value is not beyond the i-th eigenvalue of either end
    assert (found <= values[-k:] + rounding).all() and (found >= values[:k] - rounding).all()


def test_a_matrix_of_one_number():
    found = lanczos(lambda v: -3 * v, torch.tensor([0.1]), 5)
    assert (found.alpha, found.beta, found.basis) == (-3, 0, 1)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_matrix_of_low_rank(rank):
    values = torch.cat([torch.zeros(20 - rank), torch.arange(1.0, rank + 1)]).double()
    close(lanczos(lambda v: v @ matrix(values), random(20, seed=2), 20).ritz()[0], values, 1e-11)


@pytest.mark.parametrize("small", [1e-1, 1e-3, 1e-5, 0.0])
def test_the_remainder_may_be_mostly_rounding_error(small):
    """In single precision, with five large and many tiny eigenvalues."""
    values = torch.cat([torch.full((5,), 100.0), torch.linspace(0, small, 2995)])
    found = lanczos(lambda v: v * values, random(3000, seed=1).float(), 60)
    close(found.basis @ found.basis.mT, torch.eye(60), 1e-5)
    assert found.beta.max() < 100 and found.ritz()[0].max() < 100.01


def test_a_batch_of_matrices_is_a_loop():
    H = torch.stack([matrix(random(9, seed=s), s) for s in range(3)])
    H[1] = torch.eye(9)  # breaks down at once, unlike the others
    v0 = random(3, 9, seed=9)
    one = [lanczos(lambda v, h=h: v @ h, v, 6) for h, v in zip(H, v0, strict=True)]
    mapped = vmap(lambda h, v: lanczos(lambda v: v @ h, v, 6))(H, v0)
    shared = vmap(lambda h: lanczos(lambda v: v @ h, v0[2], 6))(H)
    for i in range(3):
        for name in ("alpha", "beta", "basis"):
            close(getattr(mapped, name)[i], getattr(one[i], name), 1e-12)
    close(shared.alpha[2], one[2].alpha, 1e-12)


# ------------------------------------------------------------------------------------- eigenvalues


def test_both_ends_by_sign_and_not_by_magnitude():
    values = torch.cat([outliers(300), torch.tensor([-200.0, -150.0]).double()]).sort().values
    H = matrix(values)
    found = of_matrix(eigenvalues, H, top=3, bottom=2, steps=50)
    expected = torch.cat([values[-3:].flip(0), values[:2].flip(0)])
    close(found.value, expected)
    assert ((found.value - expected).abs() <= found.error + 1e-12).all()
    assert of_matrix(eigenvalues, H).value.item() == pytest.approx(100, rel=1e-4)
    bottom = of_matrix(eigenvalues, H, top=0, bottom=1)
    assert bottom.value.item() == pytest.approx(-200, rel=1e-4)


@given(st.integers(0, 10**6), st.integers(3, 60), st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=30)
def test_the_errors_are_bounds(seed, steps, dtype):
    values = random(60, seed=seed).sort().values
    H = matrix(values, seed + 1).to(dtype)
    found = of_matrix(eigenvalues, H, top=2, bottom=1, steps=steps, seed=seed % 1000)
    exact = torch.linalg.eigvalsh(H.double())
    distance = (found.value[:, None] - exact).abs().amin(1)
    rounding = 60 * torch.finfo(torch.float64).eps * exact.abs().max()  # of the reference
    assert (distance <= found.error + rounding).all()


@pytest.mark.parametrize("batch_size", [None, 10])
def test_eigenvalues_of_a_network_are_those_of_its_dense_hessian(batch_size):
    model, x, y = problem()
    exact = torch.linalg.eigvalsh(dense(model, criterion, x, y))
    measure = partial(on, model, eigenvalues, x, y, top=5, bottom=3, steps=51)
    found = measure(batch_size=batch_size)
    close(found.value, torch.cat([exact[-5:].flip(0), exact[:3].flip(0)]))
    again = measure(batch_size=batch_size)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # deterministic
    assert not torch.equal(found.value, measure(batch_size=batch_size, seed=1).value)
    single = on(model.float(), eigenvalues, x.float(), y)
    assert abs(single.value[0] - exact[-1]) <= single.error[0] + 1e-6 * exact[-1]


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, s) for s in (1e-33, 1e-25, 1e20, 1e36)]
    + [(torch.float64, s) for s in (1e-290, 1e-160, 1e150, 1e300)],
)
def test_hessians_of_any_size(dtype, scale):
    """Squares would leave the range of the type; the matrices of a stack differ in size."""
    values = torch.linspace(-1, 5, 40).double()
    H = (matrix(values) * scale).to(dtype)
    tol = 20 * torch.finfo(dtype).eps
    found = of_matrix(eigenvalues, H, top=2, bottom=1, steps=40)
    close(found.value / scale, values[[-1, -2, 0]], tol)
    assert (found.error / scale < 20 * tol).all()
    stack = torch.stack([H, matrix(values).to(dtype), 0 * H])
    start = random(40).to(dtype)
    ritz = vmap(lambda h: lanczos(lambda v: h @ v, start, 40).ritz()[0])(stack)
    close(ritz[0] / scale, values, tol)
    close(ritz[1], values, tol)
    assert (ritz[2] == 0).all()
    of_one = {"steps": 20, "probes": 2}
    density, unit = (of_matrix(spectral_density, h, **of_one) for h in (H, stack[1]))
    close((density.weight * density.node / scale).sum(1), (unit.weight * unit.node).sum(1), tol)
    for sketch in (0, 7):
        estimate, unit = (of_matrix(trace, h, sketch=sketch) for h in (H, stack[1]))
        close(estimate.value / scale, unit.value, tol)
        close(estimate.standard_error / scale, unit.standard_error, tol)


def test_a_matrix_that_is_not_symmetric_is_refused():
    symmetric, skew = matrix(random(100)).float(), random(100, 100, seed=1).float()
    skew = skew - skew.mT
    skew = skew / torch.linalg.matrix_norm(skew, 2) * torch.linalg.matrix_norm(symmetric, 2)
    start = random(100, seed=2).float()
    iterate = lambda H, steps=30: lanczos(lambda v: H @ v, start, steps)
    message = r"matvec must be the product with a symmetric matrix, got one whose .* by \d+%"
    for H in (symmetric + 0.1 * skew, skew, symmetric.triu(), torch.eye(100).roll(1, 0)):
        with pytest.raises(ValueError, match=message):
            iterate(H)
    with pytest.raises(ValueError, match=message):
        iterate(symmetric.triu(), steps=2)
    assert iterate(symmetric).dropped < 1e-5
    assert iterate(symmetric + 0.001 * skew).dropped > 1e-3  # below 1 %: in the residuals
    stack = torch.stack([symmetric, symmetric + 0.1 * skew])
    ritz = vmap(lambda H: iterate(H).ritz()[0])(stack)
    close(ritz[0], iterate(symmetric).ritz()[0], 1e-5)
    assert ritz[1].isnan().all()


@pytest.mark.parametrize("factor", [1, 100, 10_000])
def test_networks_with_saturated_outputs_have_eigenvalues_in_single_precision(factor):
    """Their products are mostly rounding, so not symmetric; the errors say so."""
    model, x, _ = problem(lambda: MLP(4, 6, 3))
    with torch.no_grad():
        model[-1].weight *= factor
    for y in (model(x).argmax(1), (model(x).argmax(1) + 1) % 3):
        exact = torch.linalg.eigvalsh(dense(model, criterion, x, y))
        single = copy.deepcopy(model).float()
        found = on(single, eigenvalues, x.float(), y, top=2, bottom=1, steps=51)
        assert found.value.isfinite().all()
        rounding = 1e-5 * torch.linalg.matrix_norm(dense_factor(model, x), 2) ** 2
        distance = (found.value[:, None] - exact).abs().amin(1)
        assert (distance <= found.error + rounding).all()


def dense_factor(model, x):
    """The Jacobian of the outputs by the weights."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = torch.func.jacrev(lambda w: functional_call(model, w, (x,)).flatten())(params)
    return torch.cat([j.flatten(1) for j in jacobian.values()], 1)


def test_a_wrong_second_derivative_shows_in_the_errors():
    """PyTorch's of weight_norm: its products are not those of a symmetric matrix."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    model, x, y = problem(lambda: nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)))
    params = {name: p.detach() for name, p in model.named_parameters()}
    network = lambda params, x: functional_call(model, params, (x,))  # `on` takes another kernel
    H = products(network, params, x, y)
    if (H - H.mT).abs().max() < 1e-6:
        pytest.skip("this PyTorch has the right derivative")
    found = eigenvalues(network, params, x, y)
    assert found.error > 0.1 * found.value


# ------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("sketch", [0, 10])
def test_the_trace_is_unbiased_and_the_standard_error_holds(sketch):
    H = matrix(outliers(200))
    runs = [of_matrix(trace, H, probes=20, sketch=sketch, seed=s) for s in range(100)]
    misses = torch.stack([run.value for run in runs]) - H.trace()
    errors = torch.stack([run.standard_error for run in runs])
    assert 0.75 < misses.std() / errors.square().mean().sqrt() < 1.3
    assert abs(misses.mean()) < 4 * misses.std() / 10


def test_a_sketch_removes_the_outliers():
    H = matrix(outliers(200))
    plain, sketched = (of_matrix(trace, H, sketch=s, probes=40) for s in (0, 15))
    assert sketched.standard_error < plain.standard_error / 5


def test_a_full_sketch_is_the_trace():
    H = matrix(random(8))
    found = of_matrix(trace, H, sketch=20)
    assert found.value.item() == pytest.approx(H.trace().item(), abs=1e-12)
    assert found.standard_error < 1e-12
    assert of_matrix(trace, H, sketch=2, seed=3) == of_matrix(trace, H, sketch=2, seed=3)
    assert of_matrix(trace, H, sketch=2, seed=3) != of_matrix(trace, H, sketch=2, seed=4)


# ----------------------------------------------------------------------------------------- density


@given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40)
def test_weights_sum_to_one_and_moments_are_exact(size, steps, probes, seed):
    """Of a diagonal matrix: every vector of signs has v·Hᵐv = the mean of λᵐ, exact for m < 2k."""
    values = random(size, seed=seed)
    how = {"steps": steps, "probes": probes, "seed": seed % 100}
    density = of_matrix(spectral_density, torch.diag(values), **how)
    k = min(steps, size)
    assert density.node.shape == density.weight.shape == (probes, k)
    assert (density.weight >= 0).all()
    close(density.weight.sum(1), torch.ones(probes).double(), 1e-12)
    for m in range(min(2 * k, 8)):
        moments = (density.weight * density.node**m).sum(1)
        close(moments, (values**m).mean().expand(probes), 1e-9)


def test_the_share_of_outliers_and_of_the_bulk():
    values = outliers()
    density = of_matrix(spectral_density, matrix(values), steps=60, probes=30)
    outer = density.node > 5
    assert (outer.sum(1) == 10).all()  # no ghosts
    share = (density.weight * outer).sum(1)
    error = share.std() / math.sqrt(30)
    assert abs(share.mean() - 10 / 500) < 4 * error and error < 0.1 * share.mean()
    at = torch.linspace(-3, 105, 4000).double()
    exact = Density(values[None], torch.full((1, 500), 1 / 500).double())
    curve = density.smooth(at, 0.3)
    assert torch.trapezoid(curve, at).item() == pytest.approx(1, abs=1e-6)
    assert torch.trapezoid((curve - exact.smooth(at, 0.3)).abs(), at) < 0.05


def test_seeds():
    H = matrix(random(50))
    nodes = lambda seed: of_matrix(spectral_density, H, steps=9, seed=seed).node
    assert torch.equal(nodes(0), nodes(0)) and not torch.equal(nodes(0), nodes(1))


# ----------------------------------------------------------------------------------------- a stack


@pytest.fixture(scope="module")
def stack():
    data = two_gaussians(30, test_size=10)
    make = lambda: MLP(10, 5, 2, batch_norm=True, activation=nn.Tanh)
    networks = fit(
        make,
        data,
        Recipe(optimizer=SGD(lr=0.1)),
        seeds=3,
        steps=10,
        batch_size=10,
        networks="last",
        dtype=torch.float64,
    ).networks
    return networks, data


INSTRUMENTS = {
    "eigenvalues": partial(eigenvalues, top=3, bottom=2, steps=40),
    "trace": partial(trace, probes=200),
    "Hutchinson": partial(trace, probes=8, sketch=0, batch_size=10),
    "density": partial(spectral_density, steps=7, probes=3, seed=4),
}


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_the_stack_is_the_module(name, stack):
    networks, data = stack
    x, y = data.split("train")
    found = networks.measure(INSTRUMENTS[name], data, "train", examples=25)
    for seed in networks.coords["seed"]:
        model = networks.module(seed=seed).double()
        expected = on(model, INSTRUMENTS[name], x.double()[:25], y[:25])
        for field, value in expected._asdict().items():
            close(torch.from_numpy(found[field].sel(seed=seed).values), value)


def test_a_stack_against_dense_hessians(stack):
    networks, data = stack
    x, y = data.split("train")
    measure = lambda name: networks.measure(INSTRUMENTS[name], data, "train")
    top, sums = measure("eigenvalues"), measure("trace")
    full = networks.measure(partial(trace, probes=2, sketch=999), data, "train").value
    for seed in networks.coords["seed"]:
        H = dense(networks.module(seed=seed).double(), criterion, x.double(), y)
        exact, one = torch.linalg.eigvalsh(H), sums.sel(seed=seed)
        expected = torch.cat([exact[-3:].flip(0), exact[:2].flip(0)])
        close(torch.from_numpy(top.value.sel(seed=seed).values), expected)
        assert (top.error.sel(seed=seed) < 1e-6).all()
        assert abs(one.value - H.trace().item()) < 4 * one.standard_error
        assert 0 < one.standard_error < 0.1 * H.trace().item()
        assert full.sel(seed=seed).item() == pytest.approx(H.trace().item())


def test_while_training(stack):
    _, data = stack
    instruments = {"lambda": partial(eigenvalues, steps=5), "trace": partial(trace, probes=4)}
    runs = fit(
        lambda: MLP(10, 5, 2), data, seeds=2, steps=10, batch_size=10, instruments=instruments
    )
    assert runs.lambda_value.dims == (*runs.trace_value.dims, "eigenvalue")
    assert np.isfinite(runs.lambda_value.values).all()
    assert np.isfinite(runs.trace_standard_error.values).all()


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_a_broken_run_is_nan_and_does_not_affect_the_others(name, stack):
    networks, data = stack
    params = {name: w.clone() for name, w in networks.params.items()}
    next(iter(params.values()))[1] = math.nan
    broken = dataclasses.replace(networks, params=params)
    whole, found = (n.measure(INSTRUMENTS[name], data, "train") for n in (networks, broken))
    for field in whole:
        if field != "weight":
            assert np.isnan(found[field].values[1]).all()
        np.testing.assert_allclose(found[field][[0, 2]], whole[field][[0, 2]], rtol=1e-9)


def test_attention_in_a_stack():
    x, y = problem(Attention, (5, 4))[1:]
    data = Data.of(x, y)
    how = {"steps": 2, "seeds": 2, "batch_size": None, "dtype": torch.float64}
    runs = fit(Attention, data, networks="last", **how)
    found = runs.networks.measure(partial(eigenvalues, steps=60), data, "train").value
    for seed in found.seed.values:
        exact = torch.linalg.eigvalsh(dense(runs.networks.module(seed=seed), criterion, x, y))
        close(torch.from_numpy(found.sel(seed=seed).values), exact[-1:])


# -------------------------------------------------------------------------------- other packages


@pytest.mark.filterwarnings("ignore:Using backward")
def test_agrees_with_pyhessian():
    peer = pytest.importorskip("pyhessian", reason="pyhessian is not installed (the bench extra)")
    model, x, y = problem(lambda: MLP(4, 16, 16, 3, activation=nn.Tanh), n=60)
    theirs = peer.hessian(copy.deepcopy(model), criterion, data=(x, y), cuda=False)
    torch.manual_seed(0)
    values, _ = theirs.eigenvalues(maxIter=1000, tol=1e-9, top_n=2)
    ours = on(model, eigenvalues, x, y, top=2, steps=50)
    assert ours.value.tolist() == pytest.approx(values, rel=1e-4)
    samples = theirs.trace(maxIter=100, tol=0)
    ours = on(model, trace, x, y, sketch=30, probes=20)
    error = math.hypot(np.std(samples) / math.sqrt(len(samples)), ours.standard_error)
    assert abs(np.mean(samples) - ours.value) < 4 * error


def test_agrees_with_curvlinops():
    peer = pytest.importorskip("curvlinops", reason="curvlinops is not installed (the bench extra)")
    model, x, y = problem(lambda: MLP(4, 16, 16, 3, activation=nn.Tanh), n=60)
    model.eval()
    batches = list(zip(x.split(25), y.split(25), strict=True))
    theirs = peer.HessianLinearOperator(model, criterion, list(model.parameters()), batches)
    v = random(3, theirs.shape[0])
    ours = on(model, products, x, y, vs=v, batch_size=13)
    close(ours, (theirs @ v.mT).detach().mT)


# ------------------------------------------------------------------------------------------ faults

BAD = [
    (eigenvalues, {"top": 0}, r"top \+ bottom must be from 1 to 5, .* got 0"),
    (eigenvalues, {"top": 4, "bottom": 2}, r"from 1 to 5, the number of parameters, got 6"),
    (eigenvalues, {"top": -1}, "top must be a whole number >= 0, got -1"),
    (eigenvalues, {"top": 3, "steps": 2}, r"steps must be at least top \+ bottom = 3, got 2"),
    (eigenvalues, {"seed": -1}, "seed must be a whole number >= 0, got -1"),
    (eigenvalues, {"batch_size": 0}, "batch_size must be a whole number >= 1, got 0"),
    (trace, {"probes": 1}, "probes must be a whole number >= 2, got 1"),
    (trace, {"sketch": -1}, "sketch must be a whole number >= 0, got -1"),
    (trace, {"sketch": None}, "sketch must be a whole number >= 0, got None"),
    (spectral_density, {"steps": 0}, "steps must be a whole number >= 1, got 0"),
    (spectral_density, {"probes": 0.5}, "probes must be a whole number >= 1, got 0.5"),
    (spectral_density, {"seed": 1.5}, "seed must be a whole number >= 0, got 1.5"),
]


@pytest.mark.parametrize("instrument, options, message", BAD)
def test_bad_input_is_named(instrument, options, message):
    with pytest.raises(ValueError, match=message):
        of_matrix(instrument, torch.eye(5), **options)


@pytest.mark.parametrize("instrument", [eigenvalues, trace, spectral_density])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_products_that_are_not_finite_give_nan(instrument, bad):
    H = torch.eye(5)
    H[1, 3] = H[3, 1] = bad
    assert of_matrix(instrument, H)[0].isnan().all()


def test_other_structures_are_refused():
    f = lambda w: w["a"].sum() ** 3
    params = {"a": torch.ones(2)}
    for v in ([1.0, 1.0], np.ones(2), torch.ones(2), {"b": torch.ones(2)}, {"a": torch.ones(3)}):
        message = r"v must have the structure of params, \{'a': \(2,\)\}, got "
        with pytest.raises(ValueError, match=message):
            hvp(f, params, v)
    model, x, y = problem()
    for batch_size in (None, 7):
        product = on(model, hessian_product, x, y, batch_size=batch_size)
        for v, got in (
            ([1.0] * 51, "list"),
            (np.ones(51), "ndarray"),
            (torch.ones(50), r"torch.float32 of shape \(50,\)"),
            (torch.ones(51, dtype=torch.int64), "torch.int64"),
        ):
            with pytest.raises(
                ValueError, match="v must be a vector of 51 real numbers, got " + got
            ):
                product(v)


def test_other_bad_input_of_lanczos_is_named():
    for q, message in (
        ([1.0, 2.0], "q must be a vector of real numbers, got list"),
        (
            torch.ones(2, 2),
            r"q must be a vector of real numbers, got torch.float32 of shape \(2, 2\)",
        ),
        (torch.zeros(3), "q must not be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            lanczos(lambda v: v, q, 2)
    with pytest.raises(
        ValueError, match=r"matvec must be a vector of 3 real numbers, got .*\(2,\)"
    ):
        lanczos(lambda v: v[:2], torch.ones(3), 2)
    zero = vmap(lambda q: lanczos(lambda v: 2 * v, q, 2).alpha)(
        torch.eye(3) * torch.tensor([1, 0, 1])
    )
    close(zero[[0, 2]], torch.full((2, 2), 2.0), 1e-6)
    assert zero[1].isnan().all()


def test_a_density_on_a_grid_of_any_shape():
    density = of_matrix(spectral_density, torch.diag(torch.arange(5.0)))
    at = torch.linspace(-1, 5, 12)
    grid = density.smooth(at.view(3, 4), 0.3)
    torch.testing.assert_close(grid, density.smooth(at, 0.3).view(3, 4))


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got 0"):
        lanczos(lambda v: v, torch.ones(3), 0)
    with pytest.raises(ValueError, match="sigma must be > 0, got 0"):
        of_matrix(spectral_density, torch.eye(5)).smooth(torch.ones(2), 0)
