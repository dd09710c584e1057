"""Mixup: closed forms, the formulas of other libraries, and all batch transforms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import MIXUPS, TRANSFORMS
from problems import labelled_batch as batch
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from flatmin import BatchTransform, Recipe, fit, mix, mix_losses, soft_targets
from flatmin.batch import Dirac, Gaussian, LabelSmoothing, Mixup, combine, dirichlet_weights
from flatmin.book import MLP, mnist1d
from flatmin.pipeline import Batch

SHAPES = {"features": (7,), "sequence": (3, 11), "image": (3, 6, 5), "video": (2, 3, 4, 4)}
named = lambda value: repr(value) if not isinstance(value, torch.Tensor) else None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labelled(y, other=None):
    """A batch of which only the labels matter."""
    second = None if other is None else Batch(torch.zeros(len(other), 2), other)
    return Batch(torch.zeros(len(y), 2), y, num_classes=4, other=second)


def batch_for(stage, n=6, shape=(7,), dtype=torch.float32):
    """A batch, and a second one if the stage takes one."""
    x, y = batch(n, shape, dtype=dtype)
    second = getattr(stage, "second_stream", False)
    other = Batch(*batch(n, shape, seed=1, dtype=dtype)) if second else None
    return Batch(x, y, num_classes=4, other=other)


def shown(stage, of, seed=0):
    """What the stage makes of a batch."""
    return stage(of, stage.draw(of, generator(seed)))


# ----------------------------------------------------------- the formulas of other libraries


def torchvision_mixup(x, y, num_classes, lam):
    """transforms.v2.MixUp: the partner is the previous example, one λ per batch."""
    one_hot = nn.functional.one_hot(y, num_classes).float()
    before = [len(x) - 1, *range(len(x) - 1)]
    return lam * x + (1.0 - lam) * x[before], lam * one_hot + (1.0 - lam) * one_hot[before]


def timm_mixup(x, y, num_classes, lam, smoothing):
    """timm.data.Mixup: partners in reverse order, λ per batch or per element, smoothing."""
    off, on = smoothing / num_classes, 1.0 - smoothing + smoothing / num_classes
    targets = torch.full((len(y), num_classes), off)
    targets[torch.arange(len(y)), y] = on
    of = lambda v: lam if isinstance(lam, float) else lam.reshape(-1, *[1] * (v.ndim - 1))
    blend = lambda v: v * of(v) + v.flip(0) * (1.0 - of(v))
    return blend(x), blend(targets)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_equals_torchvision_at_its_lambda_and_pairing(shape, n, lam):
    x, y = batch(n, shape)
    roll = torch.arange(n).roll(1)
    expected_x, expected_y = torchvision_mixup(x, y, 4, lam)
    assert torch.equal(mix(x, lam, roll), expected_x)
    assert torch.equal(mix(soft_targets(y, 4), lam, roll), expected_y)
    draw = {"weights": torch.tensor([lam, 1 - lam]).expand(n, 2).T, "partners": roll[None]}
    found = Mixup()(Batch(x, y, num_classes=4), draw)
    torch.testing.assert_close(found.x, expected_x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.y, expected_y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("elementwise", [False, True])
def test_equals_timm_at_its_lambda_and_pairing(n, smoothing, elementwise):
    x, y = batch(n, (3, 4, 4))
    lam = torch.rand(n, generator=generator(1)) if elementwise else 0.3
    flip = torch.arange(n).flip(0)
    expected_x, expected_y = timm_mixup(x, y, 4, lam, smoothing)
    torch.testing.assert_close(mix(x, lam, flip), expected_x, rtol=1e-6, atol=1e-7)
    found_y = mix(soft_targets(y, 4, smoothing), lam, flip)
    torch.testing.assert_close(found_y, expected_y, rtol=1e-6, atol=1e-7)


# --------------------------------------------------------------------------------- the kernel


@given(
    st.integers(1, 8), st.integers(1, 4), st.sampled_from(list(SHAPES.values())), st.integers(0, 99)
)
@settings(max_examples=40)
def test_a_combination_is_the_sum_over_examples(n, k, shape, seed):
    g = generator(seed)
    values = [torch.randn(n, *shape, dtype=torch.float64, generator=g) for _ in range(k)]
    weights = torch.rand(k, n, dtype=torch.float64, generator=g)
    found = combine(weights, values)
    for i in range(n):
        expected = sum(weights[j, i].item() * values[j][i] for j in range(k))
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-12)
    one_each = combine(list(weights[:, 0]), values)
    torch.testing.assert_close(one_each, combine(weights[:, :1].expand(k, n), values))
    torch.testing.assert_close(one_each, combine(weights[:, 0].tolist(), values))


@given(st.floats(0, 1), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=40)
def test_mixing_keeps_the_mean_of_a_batch_and_stays_in_its_hull(lam, n, seed):
    x, y = batch(n, dtype=torch.float64, seed=seed)
    permutation = torch.randperm(n, generator=generator(seed))
    mixed = mix(x, lam, permutation)
    torch.testing.assert_close(mixed.mean(0), x.mean(0))  # a permutation keeps the sum
    assert (mixed <= x.amax(0) + 1e-12).all() and (mixed >= x.amin(0) - 1e-12).all()
    targets = mix(soft_targets(y, 4, dtype=torch.float64), lam, permutation)
    torch.testing.assert_close(targets.sum(1), torch.ones(n, dtype=torch.float64))


def test_half_precision_is_mixed_in_single_and_rounded_once():
    for dtype in (torch.float16, torch.bfloat16):
        x, _ = batch(50, (9,), dtype=dtype)
        lam, pi = torch.rand(50, generator=generator(1)), torch.randperm(50, generator=generator(2))
        mixed = mix(x, lam, pi)
        assert mixed.dtype == dtype
        assert torch.equal(mixed, mix(x.float(), lam, pi).to(dtype))
    x64, _ = batch(5, dtype=torch.float64)
    assert mix(x64, torch.tensor(0.3), torch.arange(5)).dtype == torch.float64


def test_what_is_not_floating_point_is_named():
    x, y = batch(3, (2, 4, 4))
    pixels, pi = (255 * x.abs().clamp(0, 1)).to(torch.uint8), torch.tensor([1, 2, 0])
    for call in (
        lambda: mix(pixels, 0.5, pi),
        lambda: shown(Mixup(), Batch(pixels, y, num_classes=4)),
        lambda: shown(Gaussian(), Batch(pixels, y, num_classes=4)),
        lambda: BatchTransform(Mixup(alpha=0), 4)(pixels, y),
    ):
        with pytest.raises(
            TypeError, match=r"must be floating point, got torch.uint8.*x.float\(\)"
        ):
            call()


def test_partners_from_another_batch():
    (x, _), (other, _) = batch(4), batch(6, seed=1)
    pi = torch.tensor([5, 0, 3, 3])
    torch.testing.assert_close(mix(x, 0.25, pi, other), 0.25 * x + 0.75 * other[pi])


def test_composes_with_grad_and_vmap():
    x, _ = batch(5, dtype=torch.float64)
    pi = torch.tensor([2, 0, 1, 4, 3])
    lams = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    stacked = vmap(mix, in_dims=(None, 0, None))(x, lams, pi)
    for lam, found in zip(lams, stacked, strict=True):
        torch.testing.assert_close(found, mix(x, lam.item(), pi), rtol=1e-14, atol=0)
    gradient = grad(lambda x: mix(x, 0.3, pi)[0].sum())(x)  # manifold mixup goes through here
    expected = torch.zeros_like(x)
    expected[0], expected[2] = 0.3, 0.7
    torch.testing.assert_close(gradient, expected)


def test_manifold_mixup_of_a_linear_encoder_is_mixup_of_its_inputs():
    torch.manual_seed(0)
    encoder, head = nn.Linear(7, 5).double(), nn.Sequential(nn.Tanh(), nn.Linear(5, 4)).double()
    x, _ = batch(6, dtype=torch.float64)
    pi = torch.randperm(6, generator=generator())
    torch.testing.assert_close(head(mix(encoder(x), 0.3, pi)), head(encoder(mix(x, 0.3, pi))))


# ------------------------------------------------------------------------------- soft targets


@given(st.integers(1, 9), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40)
def test_soft_targets_are_smoothed_one_hot(n, classes, smoothing, seed):
    y = torch.randint(classes, (n,), generator=generator(seed))
    one_hot = nn.functional.one_hot(y, classes).double()
    found = soft_targets(y, classes, smoothing, torch.float64)
    torch.testing.assert_close(found, (1 - smoothing) * one_hot + smoothing / classes)
    torch.testing.assert_close(soft_targets(one_hot, classes, smoothing), found)
    torch.testing.assert_close(soft_targets(one_hot.long(), classes, smoothing), found.float())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_that_of_pytorch(smoothing):
    logits, y = torch.randn(8, 5).double(), torch.randint(5, (8,))
    x = torch.zeros(8, 1).double()
    found = LabelSmoothing(smoothing)(Batch(x, y, num_classes=5), {})
    target = found.y
    assert found.x is x and target.dtype == torch.float64
    expected = cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, target, reduction="none"), expected)


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_outside_has_no_target(label):
    assert soft_targets(torch.tensor([1, label]), 4).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]


BAD_TARGETS = [torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 2, 4), torch.zeros(3, 5).long()]


@pytest.mark.parametrize("y", BAD_TARGETS, ids=lambda y: f"{y.dtype}{list(y.shape)}")
def test_bad_targets_are_named(y):
    with pytest.raises(ValueError, match=r"y must be labels.*or probabilities \[n, 4\], got torch"):
        soft_targets(y, 4)


# ------------------------------------------------------------------------- the two-loss form


@given(st.integers(1, 9), st.integers(2, 6), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_two_losses_equal_the_loss_on_soft_targets(n, classes, each, seed):
    g = generator(seed)
    logits = torch.randn(n, classes, generator=g, dtype=torch.float64)
    y, pi = torch.randint(classes, (n,), generator=g), torch.randperm(n, generator=g)
    lam = torch.rand(n if each else (), generator=g, dtype=torch.float64)
    losses = lambda z, target: cross_entropy(z, target, reduction="none")
    target = mix(soft_targets(y, classes, dtype=torch.float64), lam, pi)
    torch.testing.assert_close(mix_losses(losses, logits, y, lam, pi), losses(logits, target))
    if not each:
        found = mix_losses(cross_entropy, logits, y, lam, pi)
        torch.testing.assert_close(found, cross_entropy(logits, target))
    other = torch.randint(classes, (n,), generator=g)
    own, others = (soft_targets(t, classes, dtype=torch.float64) for t in (y, other))
    target = mix(own, lam, pi, others)
    torch.testing.assert_close(
        mix_losses(losses, logits, y, lam, pi, other), losses(logits, target)
    )


def test_where_two_losses_and_soft_targets_differ():
    g = generator(3)
    logits = torch.randn(6, 3, generator=g, dtype=torch.float64)
    y, pi, lam = torch.tensor([0, 1, 2, 0, 1, 0]), torch.tensor([1, 0, 4, 5, 2, 3]), 0.3
    target = mix(soft_targets(y, 3, dtype=torch.float64), lam, pi)
    # class weights: the sums agree, but the means have different divisors
    weight = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
    for reduction in ("sum", "mean"):
        criterion = nn.CrossEntropyLoss(weight, reduction=reduction)
        two, soft = mix_losses(criterion, logits, y, lam, pi), criterion(logits, target)
        assert torch.isclose(two, soft) == (reduction == "sum")
    divisors = lam * weight[y].sum(), (1 - lam) * weight[y[pi]].sum()
    losses = (
        cross_entropy(logits, y, weight, reduction="sum"),
        cross_entropy(logits, y[pi], weight, reduction="sum"),
    )
    by_hand = lam * losses[0] * lam / divisors[0] + (1 - lam) * losses[1] * (1 - lam) / divisors[1]
    torch.testing.assert_close(two, by_hand)
    # ignore_index: the ignored example has loss zero in both, but counts in only one of the means
    y = torch.tensor([0, 1, -100, 0, 1, 0])
    target = mix(soft_targets(y, 3, dtype=torch.float64), lam, pi)
    none = nn.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(mix_losses(none, logits, y, lam, pi), none(logits, target))
    two, soft = mix_losses(cross_entropy, logits, y, lam, pi), cross_entropy(logits, target)
    torch.testing.assert_close(two, soft * 6 / 5)


def test_one_lambda_per_example_needs_one_loss_per_example():
    logits, y, pi = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    with pytest.raises(
        ValueError, match=r"criterion must return one loss per example.*\[\] and \[3\]"
    ):
        mix_losses(cross_entropy, logits, y, torch.rand(3), pi)


# ------------------------------------------------------------------------------ drawing weights


def evenly(n, k=2):
    return ((torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(k - 1, n)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 1.0, 2.0, 8.0, 32.0])
def test_moments_of_lambda(alpha):
    """By the midpoint rule over u, without sampling error."""
    lam, rest = dirichlet_weights(evenly(100_000), alpha)
    assert lam.mean().item() == pytest.approx(0.5, abs=1e-4)
    product = (lam * (1 - lam)).mean().item()
    assert product == pytest.approx(alpha / (2 * (2 * alpha + 1)), rel=1e-4)
    assert (lam.diff() >= 0).all()  # monotone in u
    torch.testing.assert_close(lam + rest, torch.ones_like(lam))
    torch.testing.assert_close(lam.flip(0), rest, rtol=1e-6, atol=1e-6)  # Beta(α, α) is symmetric


def test_the_floor_of_the_loss_is_half_a_nat_at_alpha_one():
    """With distinct, identifiable pairs, the lowest possible loss is the entropy of (λ, 1−λ)."""
    w = dirichlet_weights(evenly(100_000), 1.0)
    assert -(torch.xlogy(w, w).sum(0)).mean().item() == pytest.approx(0.5, abs=1e-6)
    # cross-entropy reaches it at the logits log λ
    logits, y = w.log().T, torch.zeros(len(w.T), dtype=torch.int64)
    losses = lambda z, y: cross_entropy(z, y, reduction="none")
    floor = combine(w, (losses(logits, y), losses(logits, y + 1))).mean()
    assert floor.item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_dirichlet_moments(k, alpha):
    n = 200_000
    w = dirichlet_weights(torch.rand(k - 1, n, generator=generator(k), dtype=torch.float64), alpha)
    assert w.shape == (k, n) and (w >= 0).all()
    torch.testing.assert_close(w.sum(0), torch.ones(n, dtype=torch.float64))
    mean, variance = 1 / k, (k - 1) / (k**2 * (k * alpha + 1))
    covariance = torch.full((k, k), -1 / (k**2 * (k * alpha + 1)), dtype=torch.float64)
    covariance.fill_diagonal_(variance)
    error = 5 * math.sqrt(variance / n)
    assert (w.mean(1) - mean).abs().max() < error
    torch.testing.assert_close(torch.cov(w), covariance, rtol=0, atol=10 * variance / math.sqrt(n))


@pytest.mark.parametrize("k", [2, 3])
def test_alpha_to_zero_is_erm_in_another_order(k):
    """The largest weight tends to 1; at 0 it is the example's own, exactly."""
    u = torch.rand(k - 1, 2000, generator=generator(), dtype=torch.float64)
    rest = [1 - dirichlet_weights(u, alpha).amax(0).mean().item() for alpha in (1, 0.1, 0.01, 1e-3)]
    assert rest == sorted(rest, reverse=True) and rest[-1] < 2e-3
    w = dirichlet_weights(u, 0.0)
    assert (w[0] == 1).all() and (w[1:] == 0).all()


def test_alpha_to_infinity_gives_means():
    w = dirichlet_weights(torch.rand(2, 1000, generator=generator(), dtype=torch.float64), 1e7)
    assert (w - 1 / 3).abs().max() < 1e-3


# ---------------------------------------------------------------------------------- partners


@pytest.mark.parametrize("n", [1, 2, 7])
def test_any_partner_is_a_permutation(n):
    _, y = batch(n)
    draw = Mixup(k=3).draw(labelled(y), generator())
    assert draw["partners"].shape == (2, n) and draw["weights"].shape == (3, n)
    assert all(sorted(row.tolist()) == list(range(n)) for row in draw["partners"])
    other = torch.zeros(50, dtype=torch.int64)
    many = Mixup(second_stream=True).draw(labelled(y, other), generator())
    assert 0 <= many["partners"].min() and many["partners"].max() < 50


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=1, max_size=12)),
    st.sampled_from(["same", "different"]),
    st.booleans(),
    st.integers(0, 9),
)
@settings(max_examples=80)
def test_partners_have_the_requested_class(labels, others, which, one_hot, seed):
    y = torch.tensor(labels)
    pool = y if others is None else torch.tensor(others)
    as_given = (lambda y: soft_targets(y, 4)) if one_hot else (lambda y: y)
    of = labelled(as_given(y), None if others is None else as_given(pool))
    draw = Mixup(1.0, k=3, partners=which).draw(of, generator(seed))
    for i, label in enumerate(labels):
        allowed = {j for j, of in enumerate(pool.tolist()) if (of == label) == (which == "same")}
        if allowed:
            assert set(draw["partners"][:, i].tolist()) <= allowed
        else:
            assert draw["weights"][:, i].tolist() == [1, 0, 0]
    assert (draw["partners"] >= 0).all() and (draw["partners"] < len(pool)).all()


@pytest.mark.parametrize("which", ["same", "different"])
def test_partners_are_drawn_evenly(which):
    y = torch.tensor([0, 1, 0, 2, 1, 0])
    draws = 6000
    counts = torch.zeros(6, 6, dtype=torch.float64)
    g = generator(1)
    for _ in range(draws):
        partner = Mixup(partners=which).draw(labelled(y), g)["partners"][0]
        counts[torch.arange(6), partner] += 1
    allowed = (y[:, None] == y) == (which == "same")
    expected = draws * allowed / allowed.sum(1, keepdim=True)
    assert (counts[~allowed] == 0).all()
    assert (counts - expected).abs().max() < 5 * math.sqrt(draws / 4)


def test_same_class_mixing_keeps_labels_and_different_never_does():
    for which in ("same", "different"):
        stage = Mixup(1.0, partners=which, per_example=True)
        of = batch_for(stage, 40)
        target = shown(stage, of).y
        if which == "same":
            torch.testing.assert_close(target, soft_targets(of.y, 4))
        else:
            assert ((target > 0).sum(1) == 2).all()


def test_lambda_by_batch_and_by_example():
    of = labelled(batch(50)[1])
    weights = Mixup(1.0).draw(of, generator())["weights"]
    assert (weights == weights[:, :1]).all()
    each = Mixup(1.0, per_example=True).draw(of, generator())["weights"]
    assert len(each[0].unique()) == 50


def test_draws_for_other_alphas_are_paired():
    of = labelled(batch(30)[1])
    draws = [Mixup(a, per_example=True).draw(of, generator(7)) for a in (0.2, 1.0, 5.0)]
    for draw in draws[1:]:
        assert torch.equal(draw["partners"], draws[0]["partners"])
        assert torch.equal(draw["weights"][0].argsort(), draws[0]["weights"][0].argsort())
        assert not torch.equal(draw["weights"], draws[0]["weights"])


# --------------------------------------------------------------------------- batch transforms


@pytest.mark.parametrize("stage", TRANSFORMS, ids=named)
@pytest.mark.parametrize("n", [1, 5, 6])
@pytest.mark.parametrize("shape", [SHAPES["features"], SHAPES["image"]], ids=["features", "image"])
def test_every_transform_takes_every_batch_and_does_not_change_its_inputs(stage, n, shape):
    of = batch_for(stage, n, shape)
    inputs = [of.x, of.y, *(of.other or ())[:2]]
    before = [v.clone() for v in inputs]
    draw = stage.draw(of, generator(3))
    drawn = {name: v.clone() for name, v in draw.items()}
    found = stage(of, draw)
    assert found.x.shape == of.x.shape and found.x.dtype == of.x.dtype
    again = shown(stage, of, seed=3)
    assert torch.equal(found.x, again.x) and torch.equal(found.y, again.y)  # reproducible
    assert all(torch.equal(v, b) for v, b in zip(inputs, before, strict=True))
    assert all(torch.equal(v, drawn[name]) for name, v in draw.items())
    only_shape = stage.draw(of._replace(x=of.x.to("meta")), generator(3))  # as in fit
    assert all(torch.equal(v, only_shape[name]) for name, v in draw.items())
    if found.y is not of.y:
        torch.testing.assert_close(found.y.sum(1), torch.ones(n))
        hot = lambda of: of and of._replace(y=soft_targets(of.y, 4))
        same = stage(hot(of)._replace(other=hot(of.other)), draw)
        assert torch.equal(same.x, found.x) and torch.equal(same.y, found.y)


@pytest.mark.parametrize("stage", MIXUPS, ids=named)
def test_labels_are_smoothed_before_or_after_mixing(stage):
    of = batch_for(stage, 6, (3,))
    draw = stage.draw(of, generator(3))
    mixed, both = stage(of, draw), replace(stage, smoothing=0.3)(of, draw)
    assert torch.equal(both.x, mixed.x)
    torch.testing.assert_close(both.y, soft_targets(mixed.y, 4, 0.3))
    alone = replace(stage, alpha=0.0, smoothing=0.3)(of, draw)
    smoothed = LabelSmoothing(0.3)(of, {})
    assert torch.equal(alone.x, smoothed.x) and torch.equal(alone.y, smoothed.y)


def test_a_grid_over_alpha_and_smoothing_equals_single_settings():
    data = mnist1d(train_size=60)
    settings = dict(steps=3, batch_size=20, dtype=torch.float64, seeds=2, device="cpu")
    network = lambda: MLP(40, 6, 10)
    grid = {"alpha": [0.0, 1.0], "smoothing": [0.0, 0.2]}
    runs = fit(network, data, Recipe(batch=Mixup()), grid=grid, **settings)
    for alpha in grid["alpha"]:
        for smoothing in grid["smoothing"]:
            one = fit(network, data, Recipe(batch=Mixup(alpha, smoothing=smoothing)), **settings)
            found = runs.sel(alpha=alpha, smoothing=smoothing)
            # at alpha = 0, a batch is summed in another order
            np.testing.assert_allclose(found.train_loss, one.train_loss, rtol=1e-10)
    assert len(set(runs.train_loss.isel(step=-1, seed=0).values.ravel())) == 4


@pytest.mark.parametrize("stage", MIXUPS, ids=named)
def test_mixup_is_the_sum_over_partners(stage):
    of = batch_for(stage, 9, dtype=torch.float64)
    (x, y), (x_pool, y_pool) = of[:2], (of.other or of)[:2]
    draw = stage.draw(of, generator())
    found = stage(of, draw)
    assert found.y.dtype == torch.float64
    for i in range(9):
        w, rows = draw["weights"][:, i].tolist(), draw["partners"][:, i].tolist()
        expected_x, expected_y = w[0] * x[i], w[0] * soft_targets(y, 4).double()[i]
        for weight, j in zip(w[1:], rows, strict=True):
            expected_x = expected_x + weight * x_pool[j]
            expected_y = expected_y + weight * soft_targets(y_pool, 4).double()[j]
        torch.testing.assert_close(found.x[i], expected_x)
        torch.testing.assert_close(found.y[i], expected_y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_keep_their_dtype_and_targets_have_at_least_single_precision(dtype):
    for stage in (Mixup(1.0), LabelSmoothing(0.1), Gaussian(0.1)):
        found = shown(stage, batch_for(stage, 5, dtype=dtype))
        assert found.x.dtype == dtype
        if found.y.is_floating_point():
            assert found.y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_transforms_of_strength_zero_return_the_example():
    of = batch_for(Dirac())
    for stage in (Dirac(), Gaussian(0.0), Mixup(0.0), Mixup(0.0, k=3), LabelSmoothing(0.0)):
        found = shown(stage, of)
        assert torch.equal(found.x, of.x)
        target = found.y if found.y.ndim == 2 else soft_targets(found.y, 4)
        assert torch.equal(target, soft_targets(of.y, 4))
    broken = torch.full_like(of.x, torch.nan).index_fill(0, torch.tensor(0), 1.0)
    found = shown(Mixup(0.0), of._replace(x=broken))
    assert (found.x[0] == 1).all()  # not affected by a partner that is not finite
    stacked = Mixup(torch.tensor(0.0))  # in a stack, only the draw shows that alpha is 0
    assert torch.equal(stacked(of, Mixup(0.0).draw(of, generator())).x, of.x)


def test_where_labels_become_soft_the_number_of_classes_is_needed():
    of = batch_for(Dirac())._replace(num_classes=None)
    for stage in (Mixup(), Mixup(0.0), LabelSmoothing()):
        with pytest.raises(ValueError, match="batch.num_classes must be set .* got None"):
            shown(stage, of)
    for stage in (Dirac(), Gaussian()):
        assert shown(stage, of).y is of.y


def test_gaussian_moments():
    x, y = torch.full((400, 500), 2.0), torch.zeros(400, dtype=torch.int64)
    found = shown(Gaussian(0.5), Batch(x, y))
    assert found.y is y
    assert found.x.mean().item() == pytest.approx(2.0, abs=5 * 0.5 / 447)
    assert found.x.std().item() == pytest.approx(0.5, rel=0.01)


def test_transforms_do_not_touch_the_global_random_state():
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for stage in TRANSFORMS:
        of = batch_for(stage)
        stage.draw(of, generator())
        second = of.other[:2] if of.other else ()
        BatchTransform(stage, 4)(of.x, of.y, *second)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mixup(-0.1), r"alpha must be a number >= 0, got -0.1"),
        (lambda: Mixup(math.inf), r"alpha must be .*got inf"),
        (lambda: Mixup(math.nan), r"alpha must be .*got nan"),
        (lambda: Mixup(True), r"alpha must be .*got True"),
        (lambda: Mixup(k=1), r"k must be a whole number >= 2, got 1"),
        (lambda: Mixup(k=2.0), r"k must be a whole number >= 2, got 2.0"),
        (
            lambda: Mixup(partners="other"),
            r"partners must be 'any', 'same' or 'different', got 'other'",
        ),
        (lambda: Gaussian(-1), r"sigma must be a number >= 0, got -1"),
        (lambda: Mixup(smoothing=-0.5), r"smoothing must be a number in \[0, 1\], got -0.5"),
        (lambda: LabelSmoothing(1.1), r"smoothing must be a number in \[0, 1\], got 1.1"),
        (lambda: soft_targets(torch.tensor([0]), 2, -0.1), r"smoothing must be .*got -0.1"),
        (
            lambda: mix(torch.ones(2, 1), 1.5, torch.arange(2)),
            r"lam must be a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: mix(torch.ones(2, 1), 0.5, torch.arange(3)),
            r"permutation must be int64 of shape \[2\]",
        ),
        (
            lambda: mix(torch.ones(2, 1), 0.5, torch.tensor([True, False])),
            r"permutation must be int64",
        ),
        (
            lambda: mix(torch.ones(3, 2), torch.rand(2), torch.arange(3)),
            r"weights must be one number, or",
        ),
        (
            lambda: mix_losses(
                cross_entropy, torch.ones(2, 2), torch.tensor([0, 1]), 2, torch.arange(2)
            ),
            r"lam must be a number in \[0, 1\], got 2",
        ),
        (lambda: BatchTransform(Mixup(), 0), r"num_classes must be a whole number >= 1, got 0"),
        (lambda: BatchTransform(Mixup(), 3, seed=-1), r"seed must be a whole number >= 0, got -1"),
        (
            lambda: BatchTransform(Mixup(), 3)(torch.ones(2, 1), torch.tensor([0, 3])),
            r"y must be in 0 … 2, got 0 … 3",
        ),
        (
            lambda: BatchTransform(Mixup(), 3)(torch.ones(2, 1), torch.tensor([0, -100])),
            r"y must be in 0 … 2, got -100 … 0; for an ignore_index",
        ),
        (
            lambda: BatchTransform(Mixup(), 3)(torch.ones(2, 1), torch.tensor([0])),
            r"y must have one row for each row of x, got shapes \[1\] and \[2, 1\]",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
