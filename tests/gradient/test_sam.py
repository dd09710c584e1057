"""SAM's gradient: closed forms, shards, flooding, and a stack that equals single runs."""

from dataclasses import replace

import pytest
import torch
from problems import INF, NORMS, batch_objective, climb, closure_of, flatten
from torch import nn
from torch.func import hessian, jacrev, vmap

from flatmin import Recipe, fit, sam_gradient
from flatmin.book import MLP, two_gaussians
from flatmin.gradient import SAM, GradientPenalty, PlainGradient
from flatmin.layers import Dropout
from flatmin.loops import SAM as SAMOptimizer
from flatmin.loss import Flooding
from flatmin.optimizer import SGD
from flatmin.pipeline import Objective
from flatmin.stack import initial_module


def direction(smooth, stage):
    loss, _, theta, tree = smooth
    at, seen = tree(theta), {"seen": torch.ones(())}
    objective = replace(Objective.of(lambda w: loss(flatten(w))), buffers=seen)
    found, state = stage(objective, at, stage.init(at), t=0)
    assert objective.passes and state == ()  # the step need not pass once more
    value, buffers = objective.first_pass(at)
    assert value == loss(theta) and buffers == seen
    return flatten(found)


def outcome(stage, objective, params):
    """The direction, the loss and the new buffers of a step at ``params``."""
    objective.passes.clear()  # those of an earlier step
    found, _ = stage(objective, params, (), t=0)
    return flatten(found), *objective.first_pass(params)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_is_that_of_the_displaced_point(smooth, p, adaptive):
    _, g, theta, _ = smooth
    t = theta.abs() + 0.02 if adaptive else 1.0
    expected = g(theta + climb(g(theta), 0.3, p, t))
    found = direction(smooth, SAM(0.3, p, adaptive, eta=0.02))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_adaptive_rule_is_the_published_one(smooth):
    """Kwon et al.: ε̂ = ρ T² g / ‖T g‖ with T = |w| + η."""
    _, g, theta, _ = smooth
    t = theta.abs() + 0.01
    expected = g(theta + 0.5 * t**2 * g(theta) / (t * g(theta)).norm())
    torch.testing.assert_close(direction(smooth, SAM(0.5, adaptive=True)), expected)


def test_unnormalized(smooth):
    _, g, theta, _ = smooth
    found = direction(smooth, SAM(0.3, normalized=False))
    torch.testing.assert_close(found, g(theta + 0.3 * g(theta)), rtol=1e-13, atol=0)
    found = direction(smooth, SAM(0.3, normalized=False, adaptive=True))
    t = theta.abs() + 0.01
    torch.testing.assert_close(found, g(theta + 0.3 * t**2 * g(theta)), rtol=1e-13, atol=0)


def test_sam_is_a_member_of_the_family_of_gradient_penalties(smooth):
    torch.testing.assert_close(
        direction(smooth, SAM(0.1)),
        direction(smooth, GradientPenalty.sam(0.1)),
        rtol=1e-13,
        atol=0,
    )
    torch.testing.assert_close(
        direction(smooth, SAM(0.1, normalized=False)),
        direction(smooth, GradientPenalty.unnormalized_sam(0.1)),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("p", [1, 1.2, 1.5, 2, INF])
@pytest.mark.parametrize("adaptive", [False, True])
def test_exact_form_keeps_the_derivative_of_the_perturbation(smooth, p, adaptive):
    """(I + dε̂/dw)ᵀ ∇L(w + ε̂), with the Jacobian of the formula."""
    _, g, theta, _ = smooth
    t = (lambda w: w.abs() + 0.01) if adaptive else (lambda w: 1.0)
    move = lambda w: climb(g(w), 0.3, p, t(w))
    jacobian, there = jacrev(move)(theta), g(theta + move(theta))
    found = direction(smooth, SAM(0.3, p, adaptive, exact=True))
    torch.testing.assert_close(found, there + jacobian.T @ there, rtol=1e-8, atol=1e-11)
    dropped = direction(smooth, SAM(0.3, p, adaptive))
    assert torch.allclose(found, dropped, rtol=1e-6) == (p in (1, INF) and not adaptive)


@pytest.mark.parametrize("p", [1, 2])
def test_unnormalized_exact_form(smooth, p):
    loss, g, theta, _ = smooth
    there = g(theta + 0.3 * g(theta))
    found = direction(smooth, SAM(0.3, p, normalized=False, exact=True))
    torch.testing.assert_close(
        found, there + 0.3 * hessian(loss)(theta) @ there, rtol=1e-9, atol=1e-12
    )


def test_without_radius_it_is_the_plain_gradient_bitwise(smooth):
    for p in (1, 1.5, 2, INF):
        assert torch.equal(direction(smooth, SAM(0.0, p)), direction(smooth, PlainGradient()))


def test_function_composes(smooth):
    loss, g, theta, tree = smooth
    of = lambda rho: flatten(sam_gradient(lambda p: loss(flatten(p)), tree(theta), rho))
    rho = torch.tensor([0.0, 0.1, 0.4]).double()
    for row, r in zip(vmap(of)(rho), rho, strict=True):
        torch.testing.assert_close(row, direction(smooth, SAM(r.item())), rtol=1e-12, atol=1e-15)
    # d/dρ at 0 is H g/‖g‖: SAM descends L + ρ‖g‖ to first order
    slope = jacrev(of)(torch.tensor(1e-9).double())
    torch.testing.assert_close(
        slope, hessian(loss)(theta) @ g(theta) / g(theta).norm(), rtol=1e-6, atol=1e-9
    )


def problem(n=10, **settings):
    torch.manual_seed(1)
    net = MLP(4, 6, 3, activation=nn.Tanh, **settings).double()
    x, y = torch.randn(n, 4).double(), torch.randint(3, (n,))
    params = {name: w.detach() for name, w in net.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in net.named_buffers()}
    return net, x, y, params, buffers


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 10])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_shards_have_their_own_perturbations_and_are_averaged(m, chunk_size):
    net, x, y, params, _ = problem()
    stage = SAM(0.3, m=m, chunk_size=chunk_size)
    found, loss, _ = outcome(stage, batch_objective(net, x, y), params)
    expected, mean = torch.zeros_like(found), 0.0
    for part, target in zip(x.split(m), y.split(m), strict=True):
        of_shard, value, _ = outcome(SAM(0.3), batch_objective(net, part, target), params)
        expected += of_shard * len(part) / len(x)
        mean += value * len(part) / len(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss, mean, rtol=1e-12, atol=0)


def test_shards_as_large_as_the_batch_are_plain_sam():
    net, x, y, params, _ = problem()
    objective = batch_objective(net, x, y)
    plain = outcome(SAM(0.3), objective, params)[0]
    for m in (10, 99):
        assert torch.equal(outcome(SAM(0.3, m=m), objective, params)[0], plain)


def test_a_function_of_the_weights_is_one_shard(smooth):
    assert torch.equal(direction(smooth, SAM(0.3, m=2)), direction(smooth, SAM(0.3)))


def test_batch_statistics_of_shards_are_averaged_whatever_the_chunk():
    net, x, y, params, buffers = problem(batch_norm=True)
    net.train()
    objective = batch_objective(net, x, y, buffers)
    results = [outcome(SAM(0.3, m=4, chunk_size=c), objective, params) for c in (None, 1)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    shards = [objective.value(params, rows)[1] for rows in torch.arange(10).split(4)]
    for name, b in results[0][2].items():
        if b.is_floating_point():
            mean = sum(s[name] * n / 10 for s, n in zip(shards, (4, 4, 2), strict=True))
            torch.testing.assert_close(b, mean, rtol=1e-12, atol=0)
        else:
            assert b == 1
    assert all(torch.equal(b, dict(net.named_buffers())[name]) for name, b in buffers.items())


@pytest.mark.parametrize("m", [None, 5])
def test_flooding_floods_the_perturbed_loss_and_perturbs_along_the_raw_one(m):
    net, x, y, params, _ = problem()
    raw = batch_objective(net, x, y)
    value = raw(params).item()
    sharp = SAM(0.3, m=m)
    plain = outcome(sharp, raw, params)[0]
    # For a level between L(w) and L(w + ε̂): descend.  (Each shard is flooded separately.)
    for level, sign in [(0.0, 1), (5.0, -1)] + [(value + 0.01, 1)] * (m is None):
        flooded = batch_objective(net, x, y, loss=Flooding(level))
        found, loss, _ = outcome(sharp, flooded, params)
        torch.testing.assert_close(found, sign * plain, rtol=1e-13, atol=0)
        assert loss.item() == pytest.approx(value, rel=1e-14)


def test_both_passes_drop_the_same_units_and_the_first_sets_the_buffers():
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Linear(4, 50), Dropout(0.5), nn.BatchNorm1d(50), nn.Linear(50, 3))
        .double()
        .train()
    )
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    params = {name: w.detach() for name, w in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    objective = batch_objective(net, x, y, buffers)
    found, loss, new = outcome(SAM(1e-9), objective, params)
    plain, same, expected = outcome(PlainGradient(), objective, params)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-7)
    assert loss == same
    assert all(torch.equal(new[name], expected[name]) for name in new)


@pytest.mark.parametrize(
    "stage, grid",
    [
        (SAM(), {"rho": [0.0, 0.1, 0.5]}),
        (SAM(rho=0.2), {"p": [1.0, 2.0, INF]}),
        (SAM(rho=0.2, adaptive=True), {"eta": [0.01, 0.1]}),
        (SAM(exact=True), {"rho": [0.1, 0.3]}),
    ],
)
def test_stack_equals_single_runs(stage, grid):
    data = two_gaussians(train_size=40, test_size=50)
    net = lambda: MLP(10, 8, 2, batch_norm=True)
    arguments = dict(
        steps=8,
        batch_size=20,
        evaluate_at=[8],
        networks="last",
        dtype=torch.double,
        device="cpu",
        seeds=2,
    )
    recipe = Recipe(gradient=stage, optimizer=SGD(lr=0.2, momentum=0.5))
    networks = fit(net, data, recipe, grid=grid, **arguments).networks
    ((name, values),) = grid.items()
    for value in values:
        one = fit(net, data, recipe.with_values({name: value}), **arguments).networks
        for part in ("params", "buffers"):
            torch.testing.assert_close(
                getattr(networks.select(**{name: value}), part),
                getattr(one, part),
                rtol=1e-9,
                atol=1e-12,
            )


@pytest.mark.parametrize("p, adaptive", [(2, False), (1.5, False), (INF, False), (2, True)])
def test_stack_equals_the_optimizer_in_a_loop(p, adaptive):
    """The gradient stage and the optimizer make the same steps."""
    data = two_gaussians(train_size=40, test_size=50)
    net = lambda: MLP(10, 8, 2, activation=nn.Tanh, batch_norm=True)
    recipe = Recipe(gradient=SAM(0.3, p, adaptive), optimizer=SGD(lr=0.2, momentum=0.9))
    networks = fit(
        net,
        data,
        recipe,
        steps=10,
        batch_size=None,
        seeds=[4],
        evaluate_at=[10],
        networks="last",
        dtype=torch.double,
        device="cpu",
    ).networks
    module = initial_module(net, 4).double()
    base = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9)
    optimizer = SAMOptimizer(base, 0.3, p, adaptive, model=module)
    x, y = data.x_train.double(), data.y_train
    for _ in range(10):
        optimizer.step(closure_of(module, optimizer, x, y))
    stacked = networks.module(seed=4).state_dict()
    torch.testing.assert_close(stacked, module.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(eta=-1), "eta must be a number >= 0, got -1"),
        (dict(m=0), "m must be a whole number >= 1, got 0"),
        (dict(chunk_size=1.5), "chunk_size must be a whole number"),
        (
            dict(exact=True, p=3),
            r"p must be one number in \[1, 2\], or inf, if exact is True .*got 3",
        ),
        (dict(exact=True, p=torch.tensor(2.0)), "p must be one number"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SAM(**arguments)


@pytest.mark.parametrize("params", [torch.ones(2), [torch.ones(2)], {}, {"n": torch.tensor(3)}])
def test_what_is_no_dict_of_weights_is_named(params):
    with pytest.raises(TypeError, match="params must be a dict of floating point tensors"):
        sam_gradient(lambda params: torch.ones(()), params)
