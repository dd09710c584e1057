"""Attacks: closed forms on linear models, the ball, and the stack."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from flatmin import Data, Recipe, fgsm, fit, pgd
from flatmin.book import MLP
from flatmin.measure import error_under_attack, on
from flatmin.optimizer import SGD
from flatmin.pipeline import example_losses

norms = pytest.mark.parametrize("p", [2, math.inf], ids=["l2", "linf"])
radii = st.one_of(st.just(0.0), st.floats(1e-9, 3))  # smaller ones underflow when squared
norm = lambda delta, p: torch.linalg.vector_norm(delta.flatten(1), p, dim=1)


def problem(n=6, shape=(5,), classes=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (n,), generator=generator)
    torch.manual_seed(seed)
    return MLP(math.prod(shape), 16, classes, activation=nn.Tanh).to(dtype), x, y


# --------------------------------------------------------------------------- directions and balls


def one_step(g, eps, p, **options):
    """The change of an example by one step uphill on a linear loss with this gradient."""
    inner = lambda z, g: (z * g).flatten(1).sum(1)
    return fgsm(lambda x: x, torch.zeros_like(g), g, eps, p=p, criterion=inner, **options)


@norms
@given(st.integers(1, 5), st.integers(1, 6), st.floats(-150, 150), st.integers(0, 99))
@settings(max_examples=30)
def test_a_step_reaches_the_dual_norm(p, n, d, exponent, seed):
    g = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = one_step(g * 10.0**exponent, 1.0, p)  # of any scale; squares would over- or underflow
    assert torch.allclose(norm(step, p), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close((g * step).sum(1), norm(g, 2 if p == 2 else 1))


@norms
def test_a_zero_gradient_has_no_direction(p):
    g = torch.tensor([[0.0, 0.0], [1e-30, 0.0]])
    assert one_step(g, 1.0, p).tolist() == [[0, 0], [1, 0]]


@norms
@given(radii, st.integers(0, 99))
@settings(max_examples=30)
def test_a_step_out_of_the_ball_comes_back_to_the_closest_point(p, eps, seed):
    """The step is three times as long as the radius."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(8, 2, 3, generator=generator).double()
    inner = lambda z, y: (z * g).flatten(1).sum(1)
    x = torch.randn(8, 2, 3, generator=generator).double()
    moved = pgd(lambda x: x, x, g, eps, steps=1, step_size=3 * eps, p=p, criterion=inner)
    edge = one_step(g, eps, p)  # for both norms the point closest to three times itself
    torch.testing.assert_close(moved - x, edge)


# --------------------------------------------------------------------------------- the attacks


@pytest.mark.parametrize("p", [1, 1.5, 2, math.inf])
@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_margin_of_a_linear_model_shrinks_by_the_dual_norm(p, attack):
    """Two classes, logits ±(wx + b): the worst loss in the ball has a closed form."""
    w, b, eps = torch.tensor([1.0, -2.0, 0.5]).double(), 0.3, 0.7
    model = lambda x: torch.stack([x @ w + b, -(x @ w) - b], 1)
    _, x, _ = problem(20, (3,))
    y = torch.randint(2, (20,), generator=torch.Generator().manual_seed(1))
    moved = attack(model, x, y, eps, p=p)
    sign = 1.0 - 2.0 * y
    dual = w.norm(p=math.inf if p == 1 else 1 / (1 - 1 / p))
    margin = 2 * sign * (x @ w + b) - 2 * eps * dual
    expected = torch.nn.functional.softplus(-margin)
    torch.testing.assert_close(cross_entropy(model(moved), y, reduction="none"), expected)
    assert (norm(moved - x, p) <= eps * (1 + 1e-9)).all()


def test_fgsm_is_one_signed_step():
    model, x, y = problem()
    gradient = torch.autograd.grad(cross_entropy(model(z := x.clone().requires_grad_()), y), z)[0]
    torch.testing.assert_close(
        fgsm(model, x, y, 0.1), x + 0.1 * gradient.sign(), rtol=0, atol=1e-15
    )
    unit = gradient / gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(fgsm(model, x, y, 0.1, p=2), x + 0.1 * unit)


def test_pgd_is_the_chapters_loop():
    """Bitwise: ten signed steps of a fifth of the radius, by hand."""
    model, x, y = problem(dtype=torch.float32)
    r, steps = 0.1, 10
    uphill = grad(lambda x: cross_entropy(model(x), y, reduction="sum"))
    moved = x
    for _ in range(steps):
        moved = moved + 2 * r / steps * uphill(moved).sign()
        moved = x + (moved - x).clamp(-r, r)
    assert torch.equal(pgd(model, x, y, r, steps=steps), moved)


def test_pgd_with_p_2_is_a_plain_loop():
    """Example by example, with the definitions of the direction and of the projection."""
    model, x, y = problem()
    moved = pgd(model, x, y, 0.5, steps=7, step_size=0.2, p=2)
    for i in range(len(x)):
        loss = lambda z, i=i: cross_entropy(model(z[None]), y[i : i + 1])
        delta = torch.zeros_like(x[i])
        for _ in range(7):
            g = grad(loss)(x[i] + delta)
            delta = delta + 0.2 * g / g.norm()
            if delta.norm() > 0.5:
                delta = 0.5 * delta / delta.norm()
        torch.testing.assert_close(moved[i], x[i] + delta)
    assert (norm(moved - x, 2) > 0.49).any()  # so the ball was reached


@norms
def test_more_steps_do_more_damage(p):
    model, x, y = problem(60)
    losses = lambda moved: cross_entropy(model(moved), y, reduction="none")
    none, one = losses(x), losses(fgsm(model, x, y, 1.0, p=p))
    many = losses(pgd(model, x, y, 1.0, steps=40, p=p))
    assert none.mean() < one.mean() < many.mean()


@norms
@given(radii, st.integers(1, 5), st.integers(0, 20))
@settings(max_examples=20)
def test_within_the_ball(p, eps, steps, seed):
    model, x, y = problem(seed=seed)
    moved = pgd(model, x, y, eps, steps=steps, p=p)
    assert (norm(moved - x, p) <= eps * (1 + 1e-9) + 1e-12).all()
    if eps == 0:
        assert torch.equal(moved, x)


@norms
def test_examples_are_attacked_one_by_one(p):
    model, x, y = problem(5, (2, 3))
    together = pgd(model, x, y, 0.5, p=p)
    alone = torch.cat([pgd(model, x[i : i + 1], y[i : i + 1], 0.5, p=p) for i in range(5)])
    torch.testing.assert_close(together, alone)


def test_targeted_by_another_criterion():
    model, x, _ = problem()
    target = torch.zeros(6, dtype=torch.int64)
    towards = lambda z, y: -cross_entropy(z, y, reduction="none")
    moved = pgd(model, x, target, 1.0, criterion=towards)
    assert cross_entropy(model(moved), target) < cross_entropy(model(x), target)


def test_a_transferred_attack_uses_the_sources_gradient():
    source, x, y = problem(200)
    target = problem(200, seed=1)[0]
    moved = fgsm(source, x, y, 0.5)
    loss = lambda x: cross_entropy(target(x), y)
    assert loss(moved) <= loss(fgsm(target, x, y, 0.5))
    found = on(target, error_under_attack, x, y, eps=0.5, steps=1, step_size=0.5, source=source)
    assert found == (target(moved).argmax(1) != y).double().mean()


# ------------------------------------------------------------------------------- side effects


class Brittle(nn.Module):
    """A model with parts in different modes, buffers and gradients; it can raise an error."""

    def __init__(self):
        super().__init__()
        self.frozen_norm, self.norm = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.drop, self.head = nn.Dropout(0.9), nn.Linear(5, 3)
        self.frozen_norm.eval()
        self.fails = False

    def forward(self, x):
        assert not self.norm.training and not self.drop.training
        if self.fails:
            raise RuntimeError("no more")
        return self.head(self.drop(self.norm(self.frozen_norm(x))))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    torch.manual_seed(0)
    model, (_, x, y) = Brittle(), problem(dtype=torch.float32)
    for w in model.parameters():
        w.grad = torch.randn_like(w)
    x.requires_grad_()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    grads, x_before = [w.grad.clone() for w in model.parameters()], x.detach().clone()
    model.fails = fails
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            pgd(model, x, y, 0.1)
    else:
        moved = pgd(model, x, y, 0.1)
        assert not moved.requires_grad and moved.grad_fn is None
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(w.grad, g) for w, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(x, x_before) and x.grad is None and x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@norms
def test_inputs_keep_their_dtype(dtype, p):
    model, x, y = problem(dtype=dtype)
    moved = pgd(model, x, y, 0.5, p=p)
    assert moved.dtype == dtype and moved.isfinite().all() and not torch.equal(moved, x)


# ------------------------------------------------------------------------------------ the stack


def trained(**more):
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, n in {"train": 40, "validation": 0, "test": 60}.items():
        y = torch.randint(3, (n,), generator=generator)
        parts[f"y_{name}"] = y
        parts[f"x_{name}"] = torch.randn(n, 5, generator=generator) + 1.5 * y[:, None] - 1.5
    clean = {f"y_{name}_clean": parts[f"y_{name}"] for name in ("train", "validation")}
    data = Data("shifted", 3, **parts, **clean)
    return data, fit(
        lambda: MLP(5, 12, 3, batch_norm=True),
        data,
        Recipe(optimizer=SGD(0.1)),
        steps=20,
        batch_size=10,
        grid={"lr": [0.05, 0.2]},
        seeds=2,
        networks="last",
        device="cpu",
        dtype=torch.float64,
        **more,
    )


@pytest.mark.parametrize(
    "options",
    [{"eps": 0.3}, {"eps": 0.3, "steps": 1, "step_size": 0.3}, {"eps": 0.8, "p": 2}],
    ids=["pgd", "fgsm", "l2"],
)
def test_an_attack_is_an_instrument(options):
    attack = partial(error_under_attack, **options)
    data, runs = trained(instruments={"attacked": attack})
    networks = runs.networks
    for split in ("train", "test"):
        found = networks.measure(attack, data, split)
        assert found.dims == ("lr", "seed")
        x, y = data.split(split)
        for lr in networks.coords["lr"]:
            for seed in networks.coords["seed"]:
                module = networks.module(lr=lr, seed=seed)
                moved = pgd(module, x.double(), y, **options)
                wrong = (module(moved).argmax(1) != y).double().mean().item()
                assert found.sel(lr=lr, seed=seed).item() == pytest.approx(wrong, abs=1e-12)
        if split == "train":
            np.testing.assert_allclose(runs.attacked.isel(step=-1), found, rtol=1e-12)
    assert (found >= runs.test_error.isel(step=-1)).all()
    assert (found > runs.test_error.isel(step=-1)).any()


def test_a_transferred_attack_on_the_stack_is_weaker_than_its_own():
    data, runs = trained()
    networks = runs.networks
    source = networks.module(lr=0.2, seed=networks.coords["seed"][0]).train()
    attack = partial(error_under_attack, eps=0.5)
    white = networks.measure(attack, data)
    black = networks.measure(partial(attack, source=source), data)
    assert source.training
    assert black.sel(lr=0.2).values[0] == white.sel(lr=0.2).values[0]  # attacked by itself
    assert black.mean() <= white.mean()
    assert black.mean() > runs.test_error.isel(step=-1).mean()


def test_the_size_may_differ_between_runs():
    model, x, y = problem()
    eps = torch.tensor([0.0, 0.1, 0.5]).double()
    for p in (2, math.inf):
        stacked = vmap(lambda e, p=p: pgd(model, x, y, e, p=p))(eps)
        for e, moved in zip(eps, stacked, strict=True):
            torch.testing.assert_close(moved, pgd(model, x, y, e.item(), p=p))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_every_example_may_have_its_own_size(p):
    model, x, y = problem(6, (2, 3))
    eps = torch.linspace(0, 0.5, 6).double()
    together = pgd(model, x, y, eps, p=p)
    alone = [pgd(model, x[i : i + 1], y[i : i + 1], eps[i].item(), p=p) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_error_of_a_broken_network_is_not_a_number():
    model, x, y = problem()
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    for p in (2, math.inf):
        assert on(model, error_under_attack, x, y, eps=0.1, p=p).isnan()


@pytest.mark.parametrize("batch_size", [None, 1, 4, 6])
def test_every_example_may_have_its_own_size_in_batches(batch_size):
    model, x, y = problem(6)
    eps, step_size = torch.linspace(0, 0.5, 6).double(), torch.linspace(0.2, 0.1, 6).double()
    wrong = []
    for i in range(6):
        how = {"eps": eps[i].item(), "step_size": step_size[i].item(), "steps": 3}
        wrong.append(model(pgd(model, x[i : i + 1], y[i : i + 1], **how)).argmax(1) != y[i])
    how = {"eps": eps, "step_size": step_size, "steps": 3, "batch_size": batch_size}
    found = on(model, error_under_attack, x, y, **how)
    assert found == torch.cat(wrong).double().mean()
    with pytest.raises(ValueError, match=r"one per example, shape \(6,\), got shape \(3,\)"):
        on(model, error_under_attack, x, y, eps=torch.ones(3), batch_size=3)


def test_the_error_of_classes_per_position():
    """Logits [n, T, K], classes [n, T]."""
    model, x, y = nn.Linear(5, 3).double(), problem(4, (7, 5))[1], torch.arange(28).view(4, 7) % 3
    tokens = lambda z, y: cross_entropy(z.movedim(-1, 1), y, reduction="none")
    found = on(model, error_under_attack, x, y, eps=0.1, criterion=tokens)
    moved = pgd(model, x, y, 0.1, criterion=tokens)
    assert found == (model(moved).argmax(-1) != y).double().mean()


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_other_outputs_and_targets_have_no_error():
    """One logit has its largest at 0, and [n, 1] and [n] make n² comparisons."""
    _, x, y = problem(6)
    one = lambda z, y: binary_cross_entropy_with_logits(z.flatten(), y.double(), reduction="none")
    each = lambda z, y: cross_entropy(z, y[:, 0], reduction="none")
    squared = lambda z, y: (z[:, 0] - y) ** 2
    images, masks = torch.randn(4, 5, 3, 3).double(), torch.arange(36).view(4, 3, 3) % 3
    cases = [
        (nn.Linear(5, 1), x, y % 2, one),
        (nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), x, y % 2, one),
        (nn.Linear(5, 3), x, y[:, None], each),
        (nn.Linear(5, 3), x, one_hot(y, 3).double(), example_losses),
        (nn.Linear(5, 3), x[:3], one_hot(y[:3], 3).double(), example_losses),
        (nn.Linear(5, 1), x, x[:, 0], squared),
        (nn.Conv2d(5, 3, 1), images, masks, example_losses),  # logits [4, 3, 3, 3]
        (nn.Conv2d(5, 4, 1), images, masks, example_losses),
        (Pair(5, 3), x, y, lambda z, y: example_losses(z[0], y)),
    ]
    for model, x, y, criterion in cases:
        with pytest.raises(ValueError, match="network must return K > 1 logits for each of the"):
            on(model.double(), error_under_attack, x, y, eps=0.1, criterion=criterion)


class Meddling(nn.Module):
    """Counts its passes and shifts its input, both in place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3).double()
        self.register_buffer("passes", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        self.passes.add_(1)
        return self.head(x.sub_(0.5)) / self.passes


def test_every_pass_sees_the_same_inputs_and_buffers():
    model, (_, x, y) = Meddling(), problem()
    same = lambda z: model.head(z - 0.5) / 2
    before = x.clone()
    torch.testing.assert_close(pgd(model, x, y, 0.3), pgd(same, x, y, 0.3))
    assert model.passes == 1 and torch.equal(x, before)


def test_modules_around_a_module():
    _, x, y = problem(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    expected = pgd(lambda x: model(x), x, y, 0.1)
    for wrapped in (model, torch.jit.script(model), nn.DataParallel(model)):
        torch.testing.assert_close(pgd(wrapped, x, y, 0.1), expected)


class Detached(nn.Linear):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_a_model_without_gradient_cannot_be_attacked():
    x, y = torch.randn(4, 5), torch.arange(4) % 3
    hard = lambda x: one_hot(x.argmax(1), 5).float()
    frozen = nn.Linear(5, 3)
    for model in (Detached(5, 3), hard, lambda x: frozen(x.detach())):
        with pytest.raises(ValueError, match="must be differentiable by x, got no gradient"):
            fgsm(model, x, y, 0.1)
    with pytest.raises(ValueError, match="must be differentiable by x, got no gradient"):
        on(frozen, error_under_attack, x, y, eps=0.1, source=Detached(5, 3))
    frozen.requires_grad_(False)
    assert (fgsm(frozen, x, y, 0.1) != x).all()


# ------------------------------------------------------------------------------------ bad input

BAD = {
    "eps": ({"eps": -0.1}, ValueError, r"eps must be a number >= 0, got -0.1"),
    "eps inf": ({"eps": math.inf}, ValueError, r"eps must be .*got inf"),
    "eps text": ({"eps": "1"}, ValueError, r"eps must be .*got '1'"),
    "p": ({"p": 0.5}, ValueError, r"p must be a number in \[1, inf\], got 0.5"),
    "one eps per batch": (
        {"eps": torch.ones(2)},
        ValueError,
        r"eps must be one number or one per example, shape \(6,\), got shape \(2,\)",
    ),
    "steps": ({"steps": 0}, ValueError, r"steps must be a whole number >= 1, got 0"),
    "step size": (
        {"step_size": -1},
        ValueError,
        r"step_size must be a number >= 0, got -1",
    ),
    "integers": (
        {"x": torch.zeros(6, 5, dtype=torch.uint8)},
        TypeError,
        r"x must be floating point, got torch.uint8",
    ),
    "a list": ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    "more labels": ({"x": torch.ones(3, 5)}, ValueError, "x and y must hold the same number of"),
    "one number": ({"x": torch.tensor(1.0)}, ValueError, "x and y must hold the same number of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    more, error, message = BAD[case]
    model, x, y = problem()
    with pytest.raises(error, match=message):
        pgd(**{"model": model, "x": x, "y": y, "eps": 0.1} | more)
    if "x" not in more:
        with pytest.raises(error, match=message):
            on(model, error_under_attack, x, y, **{"eps": 0.1} | more)
