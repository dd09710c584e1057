"""The Hessian's spectrum: closed forms, dense Hessians, a spectrum made by hand, other packages."""

import copy
import dataclasses
import math
import warnings

import numpy as np
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Cube, random
from torch import nn
from torch.func import functional_call, vmap

from flatmin import Recipe, eigenvalues, fit, hvp, spectral_density
from flatmin.book import MLP, SmallCNN, two_gaussians
from flatmin.measure import (
    Density,
    HessianDensity,
    HessianEigenvalues,
    HessianOperator,
    HessianTrace,
    hessian_operator,
    lanczos,
    trace,
)
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


def matrix(values, seed=0):
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    basis = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    return (basis * values) @ basis.mT, basis


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


class Odd(nn.Module):
    """A module that torch.func cannot handle: a branch on values, an operation in the old style."""

    def __init__(self, cube):
        super().__init__()
        self.linear, self.cube = nn.Linear(4, 3), cube

    def forward(self, x):
        h = self.linear(x)
        return self.cube(h) if float(h.detach().sum()) < 1e9 else h


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


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_hessian(name, mode):
    model, x, y = problem(*MODELS[name])
    H = dense(model, criterion, x, y)
    operator = hessian_operator(model, criterion, x, y, mode=mode)
    assert operator.size == len(H) and operator.dtype == torch.float64
    v = random(3, len(H))
    close(
        operator(torch.eye(len(H)).double() if mode == "reverse" else v),
        H if mode == "reverse" else v @ H,
    )
    for loss in (criterion, nn.CrossEntropyLoss(reduction="none")):
        operator = hessian_operator(model, loss, x, y, mode=mode, batch_size=5)  # the last has 3
        close(operator(v), v @ H)
        close(operator(v[0]), H @ v[0])


def test_linear_and_logistic_regression_have_closed_forms():
    x = random(30, 4)
    linear = nn.Linear(4, 1, bias=False).double()
    squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    operator = hessian_operator(linear, squared, x, random(30), batch_size=7)
    close(operator(torch.eye(4).double()), x.mT @ x / 30)
    logistic = lambda output, y: nn.functional.softplus(-y * output[:, 0])
    operator = hessian_operator(linear, logistic, x, random(30).sign(), batch_size=7)
    p = torch.sigmoid(x @ linear.weight[0].detach())
    close(operator(torch.eye(4).double()), (x.mT * (p * (1 - p))) @ x / 30)


def test_hvp_of_functions_of_trees():
    """f = |a|⁴ + c·sum(b)·sum(a): products by hand, in both modes and under vmap."""
    a, b = random(3), random(2, 2)
    f = lambda w: w["a"].square().sum() ** 2 + 0.5 * w["b"].sum() * w["a"].sum()
    v = {"a": random(3, seed=1), "b": random(2, 2, seed=2)}
    ones = torch.ones(3).double()
    expected_a = 4 * (a @ a) * v["a"] + 8 * a * (a @ v["a"]) + 0.5 * v["b"].sum() * ones
    for mode in ("reverse", "forward"):
        found = hvp(f, {"a": a, "b": b}, v, mode)
        close(found["a"], expected_a)
        close(found["b"], 0.5 * v["a"].sum() * torch.ones_like(b))
        many = vmap(lambda v, mode=mode: hvp(f, {"a": a, "b": b}, v, mode)["a"])
        close(many({"a": torch.stack([v["a"]] * 2), "b": torch.stack([v["b"]] * 2)})[1], expected_a)


def test_models_that_torch_func_refuses():
    odd, plain = Odd(Cube.apply).double(), Odd(lambda h: h**3).double()
    plain.load_state_dict(odd.state_dict())
    _, x, y = problem()
    v = random(15)
    expected = torch.autograd.functional.hvp(
        lambda w: criterion((x @ w.view(3, 5)[:, :4].mT + w.view(3, 5)[:, 4]) ** 3, y),
        torch.cat([plain.linear.weight, plain.linear.bias[:, None]], 1).detach().flatten(),
        torch.cat([v[:12].view(3, 4), v[12:, None]], 1).flatten(),
    )[1].view(3, 5)
    expected = torch.cat([expected[:, :4].flatten(), expected[:, 4]])
    for batch_size in (23, 6):
        close(hessian_operator(odd, criterion, x, y, batch_size=batch_size)(v), expected)
    with pytest.raises(RuntimeError, match="setup_context"):
        hessian_operator(odd, criterion, x, y, mode="forward")(v)


def test_tied_and_frozen_weights_and_a_linear_loss():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    tied[2].bias.requires_grad_(False)
    _, x, y = problem()
    operator = hessian_operator(tied, criterion, x, y)
    assert operator.size == 20 and list(operator.shapes) == ["0.weight", "0.bias"]
    close(operator(torch.eye(20).double()), dense(tied, criterion, x, y))
    linear = nn.Linear(4, 1).double()
    for mode in ("reverse", "forward"):
        zero = hessian_operator(linear, lambda output, y: output[:, 0] * y, x, y, mode=mode)
        assert (zero(random(5)) == 0).all()


def test_precision():
    model, x, y = problem()
    model, v = model.float(), random(operator_size := sum(p.numel() for p in model.parameters()))
    exact = dense(copy.deepcopy(model).double(), criterion, x.float().double(), y) @ v
    found = hessian_operator(model, criterion, x.float(), y, dtype=torch.float64)(v)
    close(found, exact, 1e-12)
    single = hessian_operator(model, criterion, x.float(), y)
    assert single.dtype == torch.float32 and single.size == operator_size
    close(single(v.float()).double(), exact, 1e-5)
    half = hessian_operator(copy.deepcopy(model).bfloat16(), criterion, x.bfloat16(), y)
    assert half.dtype == torch.float32
    close(half(v.float()).double(), exact, 0.1)


@pytest.mark.parametrize("batch_size", [7, 23])
def test_the_module_is_left_as_it_was(batch_size):
    model, x, y = problem(lambda: MLP(4, 6, 3, batch_norm=True, dropout=0.5))
    model.train()
    model[2].eval()
    criterion(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        operator = hessian_operator(model, criterion, x, y, batch_size=batch_size)
        first = operator(torch.ones(operator.size).double())
    assert not first.requires_grad
    (
        eigenvalues(operator),
        trace(operator, max_probes=20, tol=10),
        spectral_density(operator, steps=5),
    )
    with pytest.raises(ZeroDivisionError):
        hessian_operator(model, lambda *_: 1 / 0, x, y)(torch.ones(operator.size).double())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(
        torch.equal(p.grad, g) and not p.grad.requires_grad
        for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():  # the operator still uses the old weights
        for t in [*model.parameters(), *model.buffers()]:
            t.zero_()
    assert torch.equal(operator(torch.ones(operator.size).double()), first)


# ----------------------------------------------------------------------------------------- Lanczos


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 10**6), st.integers(-12, 12))
@settings(max_examples=60)
def test_the_basis_is_orthonormal_and_tridiagonalizes(size, steps, seed, exponent):
    H, _ = matrix(10.0**exponent * random(size, seed=seed))
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
    H, _ = matrix(values)
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
    H, _ = matrix(values)
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


@pytest.mark.parametrize("small", [1e-1, 1e-3, 1e-5, 0.0])
def test_the_remainder_may_be_mostly_rounding_error(small):
    """In single precision, with five large and many tiny eigenvalues."""
    values = torch.cat([torch.full((5,), 100.0), torch.linspace(0, small, 2995)])
    found = lanczos(lambda v: v * values, random(3000, seed=1).float(), 60)
    close(found.basis @ found.basis.mT, torch.eye(60), 1e-5)
    assert found.beta.max() < 100 and found.ritz()[0].max() < 100.01


def test_a_batch_of_matrices_is_a_loop():
    H = torch.stack([matrix(random(9, seed=s), s)[0] for s in range(3)])
    H[1] = torch.eye(9)  # breaks down at once, unlike the others
    v0 = random(3, 9, seed=9)
    one = [lanczos(lambda v, h=h: v @ h, v, 6) for h, v in zip(H, v0, strict=True)]
    together = lanczos(lambda v: (H @ v[..., None])[..., 0], v0, 6)
    mapped = vmap(lambda h, v: lanczos(lambda v: v @ h, v, 6))(H, v0)
    shared = vmap(lambda h: lanczos(lambda v: v @ h, v0[2], 6))(H)
    for i in range(3):
        for name in ("alpha", "beta", "basis"):
            close(getattr(together, name)[i], getattr(one[i], name), 1e-12)
            close(getattr(mapped, name)[i], getattr(one[i], name), 1e-12)
    close(shared.alpha[2], one[2].alpha, 1e-12)


# ------------------------------------------------------------------------------------- eigenvalues


def test_both_ends_by_sign_and_not_by_magnitude():
    values = torch.cat([outliers(300), torch.tensor([-200.0, -150.0]).double()]).sort().values
    H, basis = matrix(values)
    found = eigenvalues(H, top=3, bottom=2, tol=1e-10)
    expected = torch.cat([values[-3:].flip(0), values[:2].flip(0)])
    close(found.values, expected)
    assert ((found.values - expected).abs() <= found.errors + 1e-12).all()
    cosine = (found.vectors * basis.mT[[-1, -2, -3, 1, 0]]).sum(1).abs()
    close(cosine, torch.ones(5).double())
    assert eigenvalues(H).values.item() == pytest.approx(100, rel=1e-4)
    assert eigenvalues(H, 0, 1).values.item() == pytest.approx(-200, rel=1e-4)


@given(st.integers(0, 10**6), st.sampled_from([1e-1, 1e-3, 1e-6]))
@settings(max_examples=30)
def test_the_errors_are_bounds_within_the_tolerance(seed, tol):
    values = random(60, seed=seed).sort().values
    found = eigenvalues(matrix(values, seed + 1)[0], 2, 1, tol=tol, seed=seed % 1000)
    distance = (found.values[:, None] - values).abs().amin(1)
    assert (distance <= found.errors).all()
    assert (found.errors <= tol * values.abs().max() * 1.01).all()


def test_eigenvalues_of_a_network_are_those_of_its_dense_hessian():
    model, x, y = problem()
    exact = torch.linalg.eigvalsh(dense(model, criterion, x, y))
    operator = hessian_operator(model, criterion, x, y, batch_size=10)
    found = eigenvalues(operator, 5, 3, tol=1e-9)
    close(found.values, torch.cat([exact[-5:].flip(0), exact[:3].flip(0)]))
    v = found.vectors[0]
    direction = operator.unflatten(v)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: d.shape for name, d in direction.items()} == shapes
    close(torch.cat([d.flatten() for d in direction.values()]), v, 0)
    again = eigenvalues(operator, 5, 3, tol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))  # deterministic
    assert not torch.equal(found.vectors, eigenvalues(operator, 5, 3, tol=1e-9, seed=1).vectors)
    single = eigenvalues(hessian_operator(model.float(), criterion, x.float(), y), tol=1e-5)
    assert single.values.dtype == torch.float32
    assert abs(single.values[0].double() - exact[-1]) <= single.errors[0] + 1e-6 * exact[-1]


def test_starting_at_the_gradient_saves_steps_and_misses_nothing():
    """Linear regression with a gradient along one eigenvector or another, or equal to 0."""
    X = torch.diag(torch.arange(1, 41).double()).sqrt() * 40**0.5  # H = diag(1, ..., 40)
    model = nn.Linear(40, 1, bias=False, dtype=torch.float64)
    squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    products = {}
    for i in (None, 10, 39):
        y = model(X)[:, 0].detach().clone()
        if i is not None:
            y[i] += 1
        hessian = hessian_operator(model, squared, X, y)
        direction = torch.zeros(40).double() if i is None else -(X[i] * 1.0) / 40
        assert torch.allclose(hessian.gradient, direction)
        calls = []
        counted = dataclasses.replace(
            hessian, products=lambda v: calls.append(1) or hessian.products(v)
        )
        # the error is at most residual² over the gap, which is 1
        assert abs(eigenvalues(counted, tol=1e-4).values.item() - 40) < 2e-5
        products[i] = len(calls)
    assert products[39] < products[None]
    two_batches = hessian_operator(model, squared, X, y, batch_size=20)
    assert two_batches.gradient is None and abs(eigenvalues(two_batches).values.item() - 40) < 2e-3


def test_a_limit_of_steps_is_reported():
    H, _ = matrix(torch.linspace(0, 1, 300).double())
    with pytest.warns(UserWarning, match="after 5 steps the errors of the eigenvalues are up to"):
        found = eigenvalues(H, tol=1e-6, max_steps=5)
    assert abs(found.values[0] - 1) <= found.errors[0] and found.errors[0] > 1e-6


# ------------------------------------------------------------------------------------------- trace


def test_the_standard_error_and_the_stopping_rule_hold():
    H, _ = matrix(outliers(200))
    exact = H.trace().item()
    for sketch, tol in ((0, 0.2), (10, 0.01)):
        runs = [trace(H, tol=tol, sketch=sketch, max_probes=2000, seed=s) for s in range(100)]
        misses = np.array([run.value for run in runs]) - exact
        within = np.abs(misses) <= tol * exact
        assert within.mean() >= 0.88  # nominally 95 %; below 0.88 with probability 1/200
        errors = np.array([run.standard_error for run in runs])
        assert 0.75 < misses.std() / np.sqrt((errors**2).mean()) < 1.3
        assert abs(misses.mean()) < 4 * misses.std() / 10  # unbiased


def test_a_sketch_removes_the_outliers():
    H, _ = matrix(outliers(200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, sketched = (trace(H, tol=0, sketch=s, max_probes=40) for s in (0, 15))
    assert plain.probes == sketched.probes == 40
    assert sketched.standard_error < plain.standard_error / 5


def test_a_full_sketch_is_the_trace():
    H, _ = matrix(random(8))
    found = trace(H, sketch=20)
    assert found.value == pytest.approx(H.trace().item(), abs=1e-12)
    assert (found.standard_error, found.probes) == (0, 0)
    assert trace(H, seed=3, tol=0.5, sketch=2) == trace(H, seed=3, tol=0.5, sketch=2)


def test_a_limit_of_probes_is_reported():
    H, _ = matrix(random(100))
    with pytest.warns(UserWarning, match="after 10 probes the trace is .* give more probes"):
        assert trace(H, tol=1e-3, max_probes=10).probes == 10


# ----------------------------------------------------------------------------------------- density


@given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40)
def test_weights_sum_to_one_and_moments_are_exact(size, steps, probes, seed):
    values = random(size, seed=seed)
    H, _ = matrix(values, seed + 1)
    density = spectral_density(H, steps=steps, probes=probes, seed=seed % 100)
    k = min(steps, size)
    assert density.nodes.shape == density.weights.shape == (probes, k)
    assert (density.weights >= 0).all()
    close(density.weights.sum(1), torch.ones(probes).double(), 1e-12)
    # v·Hᵐv is exact for m < 2k; for all probes, compare with the same vectors' quadratic forms
    v = lanczos_starts(size, probes, seed % 100)
    power = torch.eye(size).double()
    for m in range(min(2 * k, 8)):
        exact = ((v @ power) * v).sum(1)
        close((density.weights * density.nodes**m).sum(1), exact, 1e-9)
        power = power @ H


def lanczos_starts(size, probes, seed):
    """The start vectors of spectral_density, recorded by an operator."""
    seen = []
    operator = HessianOperator(lambda vs: seen.append(vs.clone()) or vs, size, torch.float64)
    spectral_density(operator, steps=1, probes=probes, seed=seed)
    return torch.cat(seen)


def test_the_share_of_outliers_and_of_the_bulk():
    values = outliers()
    density = spectral_density(matrix(values)[0], steps=60, probes=30)
    outer = density.nodes > 5
    assert (outer.sum(1) == 10).all()  # no ghosts
    share = (density.weights * outer).sum(1)
    error = share.std() / math.sqrt(30)
    assert abs(share.mean() - 10 / 500) < 4 * error and error < 0.1 * share.mean()
    at = torch.linspace(-3, 105, 4000).double()
    curve, exact = (
        density.smooth(at, 0.3),
        Density(values[None], torch.full((1, 500), 1 / 500).double()),
    )
    assert torch.trapezoid(curve, at).item() == pytest.approx(1, abs=1e-6)
    difference = (curve - exact.smooth(at, 0.3)).abs()
    assert torch.trapezoid(difference, at) < 0.05


def test_memory_and_seeds():
    H, _ = matrix(random(50))
    together, one = spectral_density(H, steps=9), spectral_density(H, steps=9, memory=1)
    close(together.nodes, one.nodes, 1e-10)
    close(together.weights, one.weights, 1e-10)
    again = spectral_density(H, steps=9)
    assert torch.equal(together.nodes, again.nodes)
    assert not torch.equal(together.nodes, spectral_density(H, steps=9, seed=1).nodes)


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


def modules(stack):
    networks, data = stack
    x, y = data.split("train")
    for i, seed in enumerate(networks.coords["seed"]):
        model = networks.module(seed=seed).double()
        yield i, hessian_operator(model, criterion, x.double()[:25], y[:25], batch_size=10)


def test_eigenvalues_of_a_stack(stack):
    networks, data = stack
    both = networks.measure(HessianEigenvalues(3, 2, 40, True, examples=25), data, "train").values
    top = networks.measure(HessianEigenvalues(examples=25, steps=40), data, "train").values
    assert both.shape == (3, 2, 5) and top.shape == (3,)
    for i, operator in modules(stack):
        exact = torch.linalg.eigvalsh(operator(torch.eye(operator.size).double()))
        expected = torch.cat([exact[-3:].flip(0), exact[:2].flip(0)])
        close(torch.from_numpy(both[i, 0]), expected)
        assert (both[i, 1] < 1e-6).all()
        assert top[i] == pytest.approx(exact[-1].item())


def test_density_of_a_stack(stack):
    networks, data = stack
    found = networks.measure(HessianDensity(7, 3, examples=25, seed=4), data, "train").values
    assert found.shape == (3, 2, 3, 7)
    for i, operator in modules(stack):
        expected = spectral_density(operator, steps=7, probes=3, seed=4)
        density = Density(*torch.from_numpy(found[i]))
        close(density.nodes, expected.nodes)
        close(density.weights, expected.weights)


def test_trace_of_a_stack(stack):
    networks, data = stack
    instrument = HessianTrace(200, standard_error=True, examples=25)
    found = networks.measure(instrument, data, "train").values
    alone = networks.measure(HessianTrace(200, examples=25), data, "train").values
    plain = networks.measure(HessianTrace(8, 0, examples=25), data, "train").values
    full = networks.measure(HessianTrace(2, sketch=999, examples=25), data, "train").values
    assert found.shape == (3, 2) and (alone == found[:, 0]).all()
    for i, operator in modules(stack):
        exact = operator(torch.eye(operator.size).double()).trace().item()
        assert abs(found[i, 0] - exact) < 4 * found[i, 1] and 0 < found[i, 1] < 0.1 * exact
        assert full[i] == pytest.approx(exact)
        samples = trace(operator, sketch=0, tol=1e9, max_probes=8)
        assert plain[i] == pytest.approx(samples.value)


def test_while_training(stack):
    _, data = stack
    instruments = {"lambda_max": HessianEigenvalues(steps=5), "trace": HessianTrace(4, 2)}
    runs = fit(
        lambda: MLP(10, 5, 2), data, seeds=2, steps=10, batch_size=10, instruments=instruments
    )
    assert runs.lambda_max.shape == runs.trace.shape and np.isfinite(runs.lambda_max.values).all()


def test_a_broken_run_is_nan_and_does_not_affect_the_others(stack):
    networks, data = stack
    params = {name: w.clone() for name, w in networks.params.items()}
    next(iter(params.values()))[1] = math.nan
    broken = dataclasses.replace(networks, params=params)
    instruments = [HessianEigenvalues(2, steps=9), HessianTrace(4, 2), HessianDensity(5, 2)]
    for instrument in instruments:
        whole, found = (n.measure(instrument, data, "train").values for n in (networks, broken))
        assert np.isnan(found[1].ravel()[0])
        np.testing.assert_allclose(found[[0, 2]], whole[[0, 2]], rtol=1e-9)


def test_in_inference_mode():
    model, x, y = problem()
    v = random(51)
    expected = {b: hessian_operator(model, criterion, x, y, batch_size=b)(v) for b in (23, 7)}
    with torch.inference_mode():
        for batch_size, product in expected.items():
            operator = hessian_operator(
                model, criterion, x.clone(), y.clone(), batch_size=batch_size
            )
            close(operator(v.clone()), product)


def test_attention_in_a_stack():
    model, x, y = problem(Attention, (5, 4))
    other = problem(Attention, (5, 4), seed=1)[0]
    params, _ = torch.func.stack_module_state([model, other])
    network = lambda params, x: functional_call(model, params, (x,))
    found = vmap(lambda params: HessianEigenvalues(steps=60)(network, params, x, y))(params)
    for value, module in zip(found, (model, other), strict=True):
        close(value, torch.linalg.eigvalsh(dense(module, criterion, x, y))[-1])


# -------------------------------------------------------------------------------- other packages


@pytest.mark.filterwarnings("ignore:Using backward")
def test_agrees_with_pyhessian():
    peer = pytest.importorskip("pyhessian", reason="pyhessian is not installed (the bench extra)")
    model, x, y = problem(lambda: MLP(4, 16, 16, 3, activation=nn.Tanh), n=60)
    operator = hessian_operator(model, criterion, x, y)
    theirs = peer.hessian(copy.deepcopy(model), criterion, data=(x, y), cuda=False)
    torch.manual_seed(0)
    values, _ = theirs.eigenvalues(maxIter=1000, tol=1e-9, top_n=2)
    ours = eigenvalues(operator, 2, tol=1e-6).values
    assert ours.tolist() == pytest.approx(values, rel=1e-4)
    samples = theirs.trace(maxIter=100, tol=0)
    ours = trace(operator, sketch=30, tol=0.15)
    error = math.hypot(np.std(samples) / math.sqrt(len(samples)), ours.standard_error)
    assert abs(np.mean(samples) - ours.value) < 4 * error


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_agrees_with_curvlinops():
    peer = pytest.importorskip("curvlinops", reason="curvlinops is not installed (the bench extra)")
    model, x, y = problem(lambda: MLP(4, 16, 16, 3, activation=nn.Tanh), n=60)
    model.eval()
    batches = list(zip(x.split(25), y.split(25), strict=True))
    theirs = peer.HessianLinearOperator(model, criterion, list(model.parameters()), batches)
    ours = hessian_operator(model, criterion, x, y, batch_size=13)
    v = random(3, ours.size)
    close(ours(v), (theirs @ v.mT).detach().mT)


# ------------------------------------------------------------------------------------------ faults


def test_bad_input_is_named():
    model, x, y = problem()
    make = lambda **more: hessian_operator(model, criterion, x, y, **more)
    H = torch.eye(5)
    faults = [
        (lambda: make(mode="both"), "mode must be one of .'reverse', 'forward'., got 'both'"),
        (lambda: hvp(lambda w: w**2, torch.ones(()), torch.ones(()), "x"), "mode must be one of"),
        (lambda: make(batch_size=0), "batch_size must be a whole number >= 1, got 0"),
        (lambda: make(dtype=torch.int64), "dtype must be None, .* got torch.int64"),
        (lambda: make()(torch.ones(3)), r"v must have shape \[..., 51\], got \(3,\)"),
        (lambda: hessian_operator(model, criterion, x, y[:2]), "same number of examples"),
        (lambda: hessian_operator(nn.Tanh(), criterion, x, y), "model must have a parameter"),
        (
            lambda: lanczos(lambda v: v, torch.ones(3), 0),
            "steps must be a whole number >= 1, got 0",
        ),
        (lambda: eigenvalues(H, 0), r"top \+ bottom must be at least 1, got 0"),
        (
            lambda: eigenvalues(H, 4, 2),
            r"top \+ bottom must be at most 5, the number of parameters, got 6",
        ),
        (lambda: eigenvalues(H, -1), "top must be a whole number >= 0, got -1"),
        (lambda: eigenvalues(H, tol=math.nan), "tol must be a number >= 0, got nan"),
        (
            lambda: eigenvalues(H, 3, max_steps=2),
            r"max_steps must be at least top \+ bottom = 3, got 2",
        ),
        (lambda: eigenvalues(H, seed=-1), "seed must be a whole number >= 0, got -1"),
        (lambda: eigenvalues(H * math.nan), "hessian must have finite products, got NaN"),
        (lambda: eigenvalues(torch.ones(2, 3)), r"a matrix \[P, P\], got shape \(2, 3\)"),
        (lambda: trace(H, tol=-1), "tol must be a number >= 0, got -1"),
        (lambda: trace(H, sketch=-1), "sketch must be a whole number >= 0, got -1"),
        (lambda: trace(H, max_probes=1), "max_probes must be a whole number >= 2, got 1"),
        (lambda: spectral_density(H, steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda: spectral_density(H, probes=0.5), "probes must be a whole number >= 1, got 0.5"),
        (lambda: spectral_density(H, memory=0), "memory must be a number >= 1, got 0"),
        (lambda: spectral_density(H).smooth(torch.ones(2), 0), "sigma must be > 0, got 0"),
        (lambda: HessianEigenvalues(0), r"top \+ bottom must be at least 1, got 0"),
        (
            lambda: HessianEigenvalues(5, steps=4),
            r"steps must be at least top \+ bottom = 5, got 4",
        ),
        (lambda: HessianEigenvalues(examples=0), "examples must be a whole number >= 1, got 0"),
        (lambda: HessianTrace(1), "probes must be a whole number >= 2, got 1"),
        (lambda: HessianTrace(sketch=None), "sketch must be a whole number >= 0, got None"),
        (lambda: HessianDensity(probes=0), "probes must be a whole number >= 1, got 0"),
        (lambda: HessianDensity(seed=1.5), "seed must be a whole number >= 0, got 1.5"),
    ]
    for call, message in faults:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="hessian must be a HessianOperator or a tensor, got 'H'"):
        trace("H")
    with pytest.raises(TypeError, match="loss must return a tensor, got float"):
        hessian_operator(model, lambda output, y: 0.5, x, y)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        hessian_operator(model, criterion, [1], y)
