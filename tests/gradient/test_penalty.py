"""Gradient penalties: closed forms, orders of error, and every member of the family."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Cube
from torch import nn
from torch.func import grad, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flatmin import Recipe, fit, gradient_norm, gradient_penalty
from flatmin.book import MLP, two_gaussians
from flatmin.gradient import GradientPenalty, PlainGradient
from flatmin.optimizer import SGD, TwoRates
from flatmin.pipeline import Objective
from flatmin.stack import initial_module


def flatten(tree):
    return torch.cat([w.flatten() for w in tree.values()])


def direction(smooth, stage, theta=None):
    loss, _, start, tree = smooth
    at, seen = tree(start if theta is None else theta), {"seen": torch.ones(())}
    objective = replace(Objective.of(lambda w: loss(flatten(w))), buffers=seen)
    found, state = stage(objective, at, stage.init(at), t=0)
    assert objective.passes and state == ()  # the step need not pass once more
    value, buffers = objective.first_pass(at)
    assert value == loss(flatten(at)) and buffers == seen
    return flatten(found)


def order(error, sizes=(1e-2, 5e-3, 2.5e-3)):
    """The slope of log error against log size."""
    errors = [error(s).norm().item() for s in sizes]
    return math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1])


# -------------------------------------------------------------------------------------- the kernel


@pytest.mark.parametrize("squared", [True, False])
def test_exact_form_is_the_gradient_of_the_penalized_loss(smooth, squared):
    loss, g, theta, _ = smooth
    penalized = lambda t: loss(t) + (0.15 * g(t) @ g(t) if squared else 0.3 * g(t).norm())
    expected = grad(penalized)(theta)
    found = direction(smooth, GradientPenalty(0.3, squared=squared))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    dense = hessian(loss)(theta)
    v = g(theta) if squared else g(theta) / g(theta).norm()
    torch.testing.assert_close(found, g(theta) + 0.3 * dense @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("difference, expected", [("forward", 1), ("backward", 1), ("central", 2)])
def test_differences_converge_with_the_documented_order(smooth, squared, difference, expected):
    exact = direction(smooth, GradientPenalty(0.3, squared=squared))
    error = lambda r: (
        exact
        - direction(smooth, GradientPenalty(0.3, squared=squared, difference=difference, radius=r))
    )
    assert order(error) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("difference", [None, "forward", "backward", "central"])
@given(h=st.floats(-5, 5), w=st.floats(-3, 3), penalty=st.floats(0, 2))
def test_all_forms_are_exact_on_a_quadratic(difference, h, w, penalty):
    bowl = Objective.of(lambda params: 0.5 * h * (params["w"] ** 2).sum())
    at = {"w": torch.tensor([w, 1.0]).double()}
    found, _ = GradientPenalty(penalty, difference=difference)(bowl, at, (), t=0)
    torch.testing.assert_close(found["w"], (h + penalty * h * h) * at["w"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("difference", [None, "forward", "backward", "central"])
def test_without_penalty_it_is_the_plain_gradient_bitwise(smooth, squared, difference):
    for radius in {None, 0.1 if difference else None}:
        stage = GradientPenalty(0.0, squared=squared, difference=difference, radius=radius)
        assert torch.equal(direction(smooth, stage), direction(smooth, PlainGradient()))


@pytest.mark.parametrize("difference", [None, "forward", "backward", "central"])
@pytest.mark.parametrize("squared", [True, False])
def test_zero_gradient_stays_zero(squared, difference):
    flat = Objective.of(lambda params: (params["w"] ** 2).sum())
    found, _ = GradientPenalty(0.5, squared, difference)(flat, {"w": torch.zeros(3)}, (), t=0)
    assert torch.equal(found["w"], torch.zeros(3))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_direction_is_a_unit_vector_in_single_precision(scale):
    """For L = s(3a - 4b) + a² + b²: d = g + λ H g/‖g‖ with H = 2."""
    loss = lambda w: scale * (3 * w["a"] - 4 * w["b"]).sum() + (w["a"] ** 2 + w["b"] ** 2).sum()
    at = {"a": torch.zeros(1), "b": torch.zeros(1, 1)}
    g = {"a": torch.tensor([3.0]) * scale, "b": torch.tensor([[-4.0]]) * scale}
    found, _ = GradientPenalty(0.5, squared=False)(Objective.of(loss), at, (), t=0)
    expected = {"a": g["a"] + torch.tensor([0.6]), "b": g["b"] + torch.tensor([[-0.8]])}
    torch.testing.assert_close(found, expected)


# -------------------------------------------------------------------------------------- the family


def test_sam_is_the_gradient_at_the_displaced_point(smooth):
    _, g, theta, _ = smooth
    expected = g(theta + 0.1 * g(theta) / g(theta).norm())
    torch.testing.assert_close(
        direction(smooth, GradientPenalty.sam(0.1)), expected, rtol=1e-13, atol=0
    )
    expected = g(theta + 0.1 * g(theta))
    found = direction(smooth, GradientPenalty.unnormalized_sam(0.1))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_sam_and_its_relatives_descend_the_penalty_to_first_order(smooth):
    loss, g, theta, _ = smooth
    for member, power in [(GradientPenalty.sam, 1), (GradientPenalty.unnormalized_sam, 2)]:
        penalized = lambda t, r: loss(t) + r / power * g(t).norm() ** power
        error = lambda r: direction(smooth, member(r)) - grad(penalized)(theta, r)
        assert order(error) == pytest.approx(2, abs=0.05)


@given(alpha=st.floats(0, 2), radius=st.floats(1e-3, 0.5))
def test_penalized_norm_is_the_papers_mixture(smooth, alpha, radius):
    _, g, theta, _ = smooth
    here, there = g(theta), g(theta + radius * g(theta) / g(theta).norm())
    found = direction(smooth, GradientPenalty.penalized_norm(alpha, radius))
    torch.testing.assert_close(found, (1 - alpha) * here + alpha * there, rtol=1e-9, atol=1e-12)
    if alpha == 1:
        torch.testing.assert_close(found, direction(smooth, GradientPenalty.sam(radius)))


def flow(field, theta, time, steps=40):
    """The solution of θ' = -field(θ) after `time`, by the classical Runge–Kutta method."""
    h = time / steps
    for _ in range(steps):
        k1 = field(theta)
        k2 = field(theta - h / 2 * k1)
        k3 = field(theta - h / 2 * k2)
        k4 = field(theta - h * k3)
        theta = theta - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return theta


def test_implicit_gradient_regularization(smooth):
    """One step of gradient descent lies on the flow of L + ε/4 ‖g‖², up to O(ε³)."""
    _, g, theta, _ = smooth
    sizes = (0.2, 0.1, 0.05)
    plain = lambda lr: theta - lr * g(theta) - flow(g, theta, lr)
    assert order(plain, sizes) == pytest.approx(2, abs=0.1)
    modified = lambda lr: (
        theta
        - lr * g(theta)
        - flow(lambda t: direction(smooth, GradientPenalty(lr / 2), t), theta, lr)
    )
    assert order(modified, sizes) == pytest.approx(3, abs=0.1)


def test_two_rates_descend_their_effective_objective(smooth):
    """A pair of steps is one step of rate ε₁ - ε₂ on L + ε₁ε₂/(2(ε₁-ε₂)) ‖g‖², up to O(ε³)."""
    _, g, theta, tree = smooth

    def error(lr):
        stage, at = TwoRates(lr=lr, ascent_lr=0.6 * lr), theta
        for t in range(2):
            at = flatten(stage(tree(g(at)), tree(at), (), t)[0])
        effective = direction(smooth, GradientPenalty(0.6 * lr**2 / (lr - 0.6 * lr)))
        return at - (theta - 0.4 * lr * effective)

    assert order(error, (0.2, 0.1, 0.05)) == pytest.approx(3, abs=0.1)


# --------------------------------------------------------------------------------- the other forms


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_in_your_own_loop_equals_the_kernel(smooth, squared):
    loss, _, theta, _ = smooth
    w = theta.clone().requires_grad_()
    value = loss(w)
    (value + gradient_penalty(value, [w], 0.3, squared)).backward()
    torch.testing.assert_close(w.grad, direction(smooth, GradientPenalty(0.3, squared)))


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty_is_computed_in_single_precision(squared):
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = gradient_penalty((w**2).sum() / 2, [w], 0.3, squared)
    exact = 0.15 * w.double().square().sum() if squared else 0.3 * w.double().norm()
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(exact.item(), rel=1e-5)
    half = (1e3 * torch.ones(100)).half().requires_grad_()  # whose squares overflow
    assert gradient_penalty(half.sum() * 60, [half], 0.3, squared).isfinite()


def test_penalty_ignores_parameters_that_the_loss_does_not_use():
    w, unused, frozen = (torch.tensor(2.0, requires_grad=r) for r in (True, True, False))
    penalty = gradient_penalty(w**2 * frozen, [w, unused, frozen], 0.5)
    penalty.backward()
    assert penalty == 0.25 * 64 and unused.grad is None and w.grad == 0.25 * 2 * 8 * 4
    at_rest = torch.zeros(3, requires_grad=True)
    gradient_penalty((at_rest**2).sum(), [at_rest], 1.0, squared=False).backward()
    assert torch.equal(at_rest.grad, torch.zeros(3))


def test_a_parameter_alone_or_tied_counts_once():
    w = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for parameters in (w, [w], [w, w], iter([w, w])):
        assert gradient_penalty((w**2).sum(), parameters, 1.0) == 0.5 * 4 * 14
    torch.manual_seed(0)
    rows, tied = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    tied.weight = rows.weight
    loss = tied(rows(torch.arange(5))).square().mean()
    (g,) = torch.autograd.grad(loss, rows.weight, retain_graph=True)
    found = gradient_penalty(loss, [*rows.parameters(), *tied.parameters()], 0.3)
    torch.testing.assert_close(found, 0.15 * g.square().sum())


def test_sparse_gradients_of_embeddings_count():
    torch.manual_seed(0)
    dense = nn.Embedding(4, 2)
    sparse = nn.Embedding.from_pretrained(dense.weight.detach().clone(), freeze=False, sparse=True)
    penalties = []
    for rows in (dense, sparse):
        loss = (rows(torch.tensor([1, 2, 2])) ** 3).sum()
        penalties.append(gradient_penalty(loss, rows.parameters(), 0.3))
        (loss + penalties[-1]).backward()
    torch.testing.assert_close(penalties[1], penalties[0])
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize(
    "stage",
    [
        GradientPenalty(),
        GradientPenalty.sam(0.1),
        GradientPenalty(0.1, difference="central"),
        GradientPenalty(0.1, squared=False),
    ],
)
def test_stack_equals_single_runs(stage):
    data = two_gaussians(train_size=40, test_size=50)
    net = lambda: MLP(10, 8, 2, batch_norm=True)
    settings = dict(
        steps=12, batch_size=20, evaluate_at=[12], networks="last", dtype=torch.double, device="cpu"
    )
    recipe = Recipe(gradient=stage, optimizer=SGD(lr=0.2, momentum=0.5))
    grid = {"penalty": [0.0, 0.05, 0.2]}
    runs = fit(net, data, recipe, grid=grid, seeds=2, **settings)
    for penalty in grid["penalty"]:
        alone = fit(net, data, recipe.with_values({"penalty": penalty}), seeds=2, **settings)
        for part in ("params", "buffers"):
            torch.testing.assert_close(
                getattr(runs.networks.select(penalty=penalty), part),
                getattr(alone.networks, part),
                rtol=1e-9,
                atol=1e-12,
            )
    assert runs.train_loss.sel(penalty=0).values != pytest.approx(
        runs.train_loss.sel(penalty=0.2).values
    )


def test_stack_equals_a_plain_loop():
    data = two_gaussians(train_size=40, test_size=50)
    net = lambda: MLP(10, 8, 2, activation=nn.Tanh)
    recipe = Recipe(gradient=GradientPenalty(0.3), optimizer=SGD(lr=0.2))
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
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(data.x_train.double()), data.y_train)
        (loss + gradient_penalty(loss, module.parameters(), 0.3)).backward()
        optimizer.step()
    torch.testing.assert_close(
        dict(networks.module(seed=4).named_parameters()),
        dict(module.named_parameters()),
        rtol=1e-9,
        atol=1e-12,
    )


def test_gradient_norm_is_an_instrument():
    data = two_gaussians(train_size=40, test_size=50)
    networks = fit(
        lambda: MLP(10, 8, 2),
        data,
        steps=3,
        batch_size=None,
        seeds=[0, 1],
        evaluate_at=[3],
        networks="last",
        dtype=torch.double,
        device="cpu",
    ).networks
    found = networks.measure(gradient_norm, data, "train")
    for seed in (0, 1):
        module = networks.module(seed=seed)
        loss = nn.functional.cross_entropy(module(data.x_train.double()), data.y_train)
        grads = torch.autograd.grad(loss, module.parameters())
        expected = torch.cat([g.flatten() for g in grads]).norm()
        assert found.sel(seed=seed).item() == pytest.approx(expected.item(), rel=1e-12)


def test_composes_with_jacrev(smooth):
    """The direction can be differentiated again, as needed to analyse the dynamics."""
    loss, g, theta, _ = smooth
    objective = Objective.of(lambda params: loss(params["w"]))
    stage = lambda w: GradientPenalty(0.1)(objective, {"w": w}, (), t=0)[0]["w"]
    jacobian = jacrev(stage)(theta)
    torch.testing.assert_close(
        jacobian, jacobian.T, rtol=1e-9, atol=1e-10
    )  # the direction is a gradient


# ------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(penalty=-0.1), "penalty must be a number >= 0, got -0.1"),
        (dict(penalty=math.nan), "penalty"),
        (dict(penalty=math.inf), "penalty"),
        (dict(penalty="much"), "penalty"),
        (dict(difference="sideways"), "difference must be one of .* got 'sideways'"),
        (dict(difference="forward", radius=0), "radius must be > 0, got 0"),
        (dict(difference="forward", radius=-1.0), "radius"),
        (dict(radius=0.1), "radius is for a difference"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientPenalty(**arguments)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="alpha"):
        GradientPenalty.penalized_norm(-1, 0.1)
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \(2,\)"):
        gradient_penalty(w * 2, [w], 0.1)
    with pytest.raises(ValueError, match="penalty"):
        gradient_penalty(w.sum(), [w], -0.1)
    with pytest.raises(ValueError, match="parameters"):
        gradient_penalty(w.sum(), [], 0.1)
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="parameters must include one .* the loss depends on"):
        gradient_penalty(w.sum(), model.parameters(), 0.1)
    named = dict(model.named_parameters())
    for bad in (model, named, named.items(), model.named_parameters(), 0.1):
        with pytest.raises(TypeError, match=r"parameters must be real tensors, such as model\."):
            gradient_penalty(model(w).sum(), bad, 0.1)
    z = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="parameters must be real tensors, .*, got torch.complex64"):
        gradient_penalty(z.abs().sum(), [z], 0.1)
    with pytest.raises(TypeError, match="loss must be a tensor, got float"):
        gradient_penalty(1.0, [w], 0.1)
    with pytest.raises(ValueError, match="loss must have a graph, got one that is detached"):
        gradient_penalty(w.sum().detach(), [w], 0.1)
    assert w.grad is None


def test_kernels_without_a_right_second_derivative_are_refused_in_a_loop():
    x = torch.randn(2, 3, 4)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    compiled = torch.compile(nn.Linear(4, 4), backend="aot_eager")
    attention = lambda q: nn.functional.scaled_dot_product_attention(q, q, q)
    bag, rows = nn.EmbeddingBag(5, 4), torch.tensor([[0, 1], [2, 3]])

    class Once(Cube):
        backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))

    bias = layer.bias
    losses = {
        "CheckpointFunction.*use_reentrant=False": lambda: checkpoint(
            torch.exp, bias * x, use_reentrant=True
        ),
        "EmbeddingBag.*use Embedding": lambda: bag(rows),
        r"Cdist.*norm\(dim=-1\)": lambda: torch.cdist(bias * x, x + 1),
        r"Pdist.*norm\(dim=-1\)": lambda: nn.functional.pdist(bias * x[0]),
        "Once.*remove its once_differentiable": lambda: Once.apply(bias),
        r"WeightNorm.*write the weight as g \* v / v.norm": lambda: layer(x),
        "ScaledDotProduct.*SDPBackend.MATH": lambda: attention(layer.bias * x[:, None]),
        "CompiledFunction.*model._orig_mod": lambda: compiled(x),
    }
    for message, output in losses.items():
        with pytest.raises(ValueError, match=f"loss must be twice differentiable, got .*{message}"):
            weights = [*layer.parameters(), *compiled.parameters(), *bag.parameters()]
            gradient_penalty(output().square().mean(), weights, 0.1)


def test_the_ways_out_are_right():
    """Weight norm by its formula, plain attention and the original of a compiled model."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    v, g = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (4, 1)))

    def loss(v, g):
        h = x @ (g * v / v.norm(dim=1, keepdim=True)).mT
        with sdpa_kernel(SDPBackend.MATH):
            return nn.functional.scaled_dot_product_attention(h, h, h).square().mean()

    def penalized(v, g):
        return gradient_penalty(loss(v, g), [v, g], 0.3)

    weights = v.requires_grad_(), g.requires_grad_()
    assert torch.autograd.gradcheck(penalized, weights)


def test_a_tiny_gradient_has_a_length():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    penalty = gradient_penalty((1e-25 * w).square().sum() * 1e25 / 2, [w], 1.0, squared=False)
    penalty.backward()
    torch.testing.assert_close(penalty.detach() * 1e25, torch.tensor(5.0))
    torch.testing.assert_close(w.grad * 1e25, torch.tensor([0.6, 0.8]))
