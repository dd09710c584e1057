"""Stiffness: inner products of gradients, compared with a plain loop, and their statistics."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatmin import Data, Recipe, fit, stiffness
from flatmin.book import MLP, SmallCNN, resnet20
from flatmin.measure import (
    between_classes,
    class_matrix,
    class_stiffness,
    gradient_norm,
    on,
    residual_stiffness,
    within_classes,
)
from flatmin.pipeline import example_losses

NAN = math.nan


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


token_losses = lambda z, y: example_losses(z.transpose(1, 2), y).mean(1)


def loop(model, criterion, x, y):
    """The gradient of each example, in a loop: [n, P]."""
    model = copy.deepcopy(model).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        value = criterion(model(x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(torch.autograd.grad(value, parameters, materialize_grads=True))
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()


def assert_is_gram(result, g1, g2, tolerance):
    """Up to a tolerance relative to the product of the norms, the accuracy of an inner product."""
    norms = g1.norm(dim=1)[:, None] * g2.norm(dim=1)
    assert result.gram.shape == norms.shape
    assert ((result.gram - g1 @ g2.mT).abs() <= tolerance * norms).all()
    assert ((result.cosine - g1 @ g2.mT / norms).abs() <= tolerance).all()
    sure = (g1 @ g2.mT / norms).abs() > tolerance
    assert torch.equal(result.sign[sure], (g1 @ g2.mT).sign().to(result.sign)[sure])


# ---------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A transformer block over tokens; its head shares the embedding, as a module or directly."""

    def __init__(self, head="module"):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.position = nn.Parameter(torch.randn(5, 6))
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.RMSNorm(6)
        self.mlp = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 11, bias=False) if head == "module" else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        h = self.embedding(tokens) + self.position
        q, k, v = self.qkv(self.norm1(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v))
        h = self.norm2(h + self.mlp(h))
        return self.head(h) if self.head is not None else F.linear(h, self.embedding.weight)


class Cube(torch.autograd.Function):
    """An operation with a derivative of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2


class Module(nn.Module):
    """Modules, combined by a function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self._forward(self, x)


odd = lambda: nn.Parameter(torch.rand(4, 4))


def tied_with_other_biases():
    linear = [nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)]
    linear[2].weight = linear[1].weight
    return nn.Sequential(linear[0], nn.Tanh(), linear[1], nn.Tanh(), *linear[2:])


def tied_bias_with_other_weights():
    linear = [nn.Linear(4, 20), nn.Linear(20, 20), nn.Linear(20, 3)]
    linear[1].bias = linear[0].bias
    return nn.Sequential(linear[0], nn.Tanh(), *linear[1:])


def norms():
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Conv1d(4, 4, 1),
        nn.InstanceNorm1d(4, affine=True),
        nn.Conv1d(4, 4, 1),
        nn.BatchNorm1d(4),
        nn.LayerNorm([4, 7]),
        nn.Conv1d(4, 4, 1),
        nn.RMSNorm(7),
        nn.GroupNorm(4, 4, affine=False),
        nn.LayerNorm(7, bias=False),
        nn.Flatten(),
        nn.Linear(28, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    )
    return warmed(model, torch.randn(40, 2, 9))


def warmed(model, x):
    """The model, with weights and statistics of its norms changed from their initial 1 and 0."""
    for p in model.parameters():
        if p.ndim <= 1:
            nn.init.normal_(p, 0.7, 0.3)
    model(3 * x + 1)
    return model


def without_gradient(module, x):
    with torch.no_grad():
        return module(x)


VECTORS = lambda n: torch.randn(n, 4)
IMAGES = lambda n: torch.randn(n, 4, 6, 6)
SIGNALS = lambda n: torch.randn(n, 2, 9)
TOKENS = lambda n: torch.randint(11, (n, 5))
pooled = lambda *layers: nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

MODELS = {
    # name: the model, its inputs
    "MLP": (lambda: MLP(4, 8, 6, 3), VECTORS),
    "MLP without bias": (lambda: MLP(4, 8, 3, bias=False), VECTORS),
    "MLP, batch norm": (lambda: warmed(MLP(4, 8, 3, batch_norm=True), VECTORS(40)), VECTORS),
    "CNN": (lambda: SmallCNN(4, 3, (3, 5)), IMAGES),
    "ResNet": (lambda: warmed(resnet20(3, 4, batch_norm=False), IMAGES(9)), IMAGES),
    "ResNet, batch norm": (lambda: warmed(resnet20(3, 4), IMAGES(9)), IMAGES),
    "transposed and circular convolutions": (
        lambda: pooled(
            nn.ConvTranspose2d(4, 6, 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 4, 2, padding=1, padding_mode="circular", groups=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, 2),
        ),
        IMAGES,
    ),
    "norms": (norms, SIGNALS),
    "norms with numbers of their own": (
        lambda: Module(
            lambda m, x: m.fc(m.scale * x * m.number + m.shift),
            fc=nn.Linear(4, 3),
            scale=nn.Parameter(torch.rand(4)),
            shift=nn.Parameter(torch.rand(1, 4)),
            number=nn.Parameter(torch.tensor(1.5)),
        ),
        VECTORS,
    ),
    "block, tied by module": (Block, TOKENS),
    "block, tied by function": (lambda: Block("function"), TOKENS),
    "embedding": (
        lambda: Module(
            lambda m, x: m.fc(m.e(x).mean(1)),
            e=nn.Embedding(50, 4, padding_idx=-40),
            fc=nn.Linear(4, 3),
        ),
        TOKENS,
    ),
    "sequence": (
        lambda: Module(
            lambda m, x: m.b(torch.tanh(m.a(x.flatten(2)))).mean(1),
            a=nn.Linear(36, 40),
            b=nn.Linear(40, 3),
        ),
        IMAGES,
    ),
    "called twice": (
        lambda: Module(
            lambda m, x: m.fc(torch.tanh(m.a(torch.tanh(m.a(x))))),
            a=nn.Linear(4, 4),
            fc=nn.Linear(4, 3),
        ),
        VECTORS,
    ),
    "tied weight, other biases": (tied_with_other_biases, VECTORS),
    "tied bias, other weights": (tied_bias_with_other_weights, VECTORS),
    "a layer's weight is a scale too": (
        lambda: Module(
            lambda m, x: m.fc(torch.tanh(m.a(x)) + (x[:, None] * m.a.weight).tanh().sum(2)),
            a=nn.Linear(4, 4),
            fc=nn.Linear(4, 3),
        ),
        VECTORS,
    ),
    "a layer's weight is in a list too": (
        lambda: Module(
            lambda m, x: m.fc(m.a(x).tanh()) + torch.cat([m.a.weight, m.a.weight]).sum() * x[:, :3],
            a=nn.Linear(4, 4),
            fc=nn.Linear(4, 3),
        ),
        VECTORS,
    ),
    "a layer's weight is in an operation of one's own too": (
        lambda: Module(
            lambda m, x: m.fc(torch.tanh(m.a(x))) + Cube.apply(m.a.weight).sum() * x[:, :3],
            a=nn.Linear(4, 4),
            fc=nn.Linear(4, 3),
        ),
        VECTORS,
    ),
    "two time steps first": (
        lambda: Module(lambda m, x: m.a(torch.stack([x, x**2])).tanh().sum(0), a=nn.Linear(4, 3)),
        VECTORS,
    ),
    "time first, flattened": (
        lambda: Module(
            lambda m, x: (
                m.fc(m.b(m.a(x.flatten(2).permute(2, 0, 1)).relu().flatten(0, 1)))
                .unflatten(0, (36, -1))
                .mean(0)
            ),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 4),
            fc=nn.Linear(4, 3),
        ),
        IMAGES,
    ),
    "an odd parameter": (
        lambda: Module(
            lambda m, x: m.fc(x @ torch.matrix_exp(m.odd)), fc=nn.Linear(4, 3), odd=odd()
        ),
        VECTORS,
    ),
    "attention": (
        lambda: Module(
            lambda m, x: m.fc(m.layer(x.flatten(2).mT).mean(1)),
            layer=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            fc=nn.Linear(4, 3),
        ),
        IMAGES,
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
        VECTORS,
    ),
    "computed but not used": (
        lambda: Module(
            lambda m, x: (m.c(x), without_gradient(m.a, x) + m.b(x))[1],
            a=nn.Linear(4, 3),
            b=nn.Linear(4, 3),
            c=nn.Linear(4, 3),
        ),
        VECTORS,
    ),
    "unused and frozen": (
        lambda: Module(
            lambda m, x: m.b(torch.tanh(m.a(x))),
            a=nn.Linear(4, 5).requires_grad_(False),
            b=nn.Linear(5, 3),
            c=nn.Linear(2, 2),
        ),
        VECTORS,
    ),
    "frozen weight, frozen bias": (
        lambda: Module(
            lambda m, x: m.b(torch.tanh(m.a(x))),
            a=nn.Linear(4, 5),
            b=nn.Linear(5, 3),
        ),
        VECTORS,
    ),
}


def make(name, n1=5, n2=3):
    """The model, a criterion, and two sets of examples, in double precision."""
    torch.manual_seed(sum(map(ord, name)))
    build, inputs = MODELS[name]
    model = build()
    if name == "frozen weight, frozen bias":
        model.a.weight.requires_grad_(False)
        model.b.bias.requires_grad_(False)
    x1, x2 = inputs(n1), inputs(n2)
    if name.startswith("block"):
        y1, y2, criterion = x1.roll(1, 1), x2.roll(1, 1), token_losses
    else:
        y1, y2, criterion = torch.randint(3, (n1,)), torch.randint(3, (n2,)), example_losses
    return model.double(), criterion, *(real(t, torch.float64) for t in (x1, y1, x2, y2))


def real(t, dtype):
    return t.to(dtype) if t.is_floating_point() else t


def of(model, criterion, x, y, x2=None, y2=None, **options):
    return on(model, stiffness, x, y, x2=x2, y2=y2, criterion=criterion, **options)


# ------------------------------------------------------------------- equal to the loop of autograd


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_loop(name):
    model, criterion, x1, y1, x2, y2 = make(name)
    g1, g2 = loop(model, criterion, x1, y1), loop(model, criterion, x2, y2)
    assert_is_gram(of(model, criterion, x1, y1), g1, g1, 1e-10)
    assert_is_gram(of(model, criterion, x1, y1, x2, y2), g1, g2, 1e-10)
    assert_is_gram(of(model, criterion, x1, y1, batch_size=2), g1, g1, 1e-10)
    model, x1, x2 = model.float(), real(x1, torch.float32), real(x2, torch.float32)
    g1, g2 = loop(model, criterion, x1, y1), loop(model, criterion, x2, y2)
    assert_is_gram(of(model, criterion, x1, y1), g1, g1, 1e-5)
    assert_is_gram(of(model, criterion, x1, y1, x2, y2), g1, g2, 1e-5)


@pytest.mark.parametrize("n1, n2", [(1, 1), (1, 4), (2, 1), (5, 4)])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_chunks_change_nothing(n1, n2, batch_size):
    model, criterion, x1, y1, x2, y2 = make("CNN", n1, n2)
    g1, g2 = loop(model, criterion, x1, y1), loop(model, criterion, x2, y2)
    both = of(model, criterion, x1, y1, x2, y2, batch_size=batch_size)
    assert_is_gram(both, g1, g2, 1e-10)
    alone = of(model, criterion, x1, y1, batch_size=batch_size)
    assert_is_gram(alone, g1, g1, 1e-10)
    assert torch.equal(alone.gram, alone.gram.mT)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes():
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_gradients_of_examples_are_never_formed_for_a_linear_layer():
    model, x, y = MLP(200, 300, 3), torch.randn(20, 200), torch.randint(3, (20,))
    with Largest() as largest:
        on(model, stiffness, x, y)
    assert largest.numel <= 200 * 300  # a weight, which is copied


def test_memory_follows_the_chunk():
    model = SmallCNN(1, 3, (4, 8))
    x, y = torch.randn(24, 1, 16, 16), torch.randint(3, (24,))
    sizes = []
    for batch_size in (2, 24, None):
        with Largest() as largest:
            on(model, stiffness, x, y, batch_size=batch_size)
        sizes.append(largest.numel)
    assert sizes[0] < min(sizes[1:]) / 3


def test_model_in_half_precision_gives_single_precision():
    model, x, y = MLP(30, 40, 3), torch.randn(6, 30), torch.randint(3, (6,))
    exact = on(model, stiffness, x, y)
    half = on(model.bfloat16(), stiffness, x.bfloat16(), y)
    assert half.gram.dtype == half.cosine.dtype == torch.float32
    torch.testing.assert_close(half.cosine, exact.cosine, rtol=0, atol=0.05)


def test_the_output_may_have_any_form():
    model, criterion, x, y, *_ = make("MLP")
    expected = of(model, criterion, x, y)
    for form, get in (
        (lambda z: {"logits": z, "tokens": 3}, lambda out: out["logits"]),
        (lambda z: (z, 2 * z), lambda out: out[0]),
    ):
        wrapped = Module(lambda m, x, form=form: form(m.inner(x)), inner=model)
        found = of(wrapped, lambda out, y, get=get: criterion(get(out), y), x, y)
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-12, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["MLP", "CNN", "block, tied by module", "norms"])
def test_equal_on_the_gpu(name):
    model, criterion, *tensors = make(name)
    g1, g2 = loop(model, criterion, *tensors[:2]), loop(model, criterion, *tensors[2:])
    result = of(model.cuda(), criterion, *(t.cuda() for t in tensors))
    assert result.gram.is_cuda
    assert_is_gram(type(result)(*(t.cpu() for t in result)), g1, g2, 1e-10)


# -------------------------------------------------------------------------- many networks at once


@pytest.mark.parametrize("name", ["MLP", "CNN", "block, tied by module", "norms", "weight norm"])
def test_the_stack_is_the_module(name):
    model, criterion, x1, y1, x2, y2 = make(name)
    model.eval()
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    network = lambda params, x: functional_call(model, (params, buffers), (x,))
    scales = (1.0, 0.9)
    stacked = {k: torch.stack([scale * p for scale in scales]) for k, p in params.items()}

    def all_of(params):
        alone = stiffness(network, params, x1, y1, criterion=criterion)
        return alone, stiffness(network, params, x1, y1, x2=x2, y2=y2, criterion=criterion)

    alone, both = vmap(all_of)(stacked)
    for run in range(len(scales)):
        with torch.no_grad():
            for k, p in model.named_parameters():
                p.copy_(stacked[k][run])
        for found, expected in (
            (alone, of(model, criterion, x1, y1)),
            (both, of(model, criterion, x1, y1, x2, y2)),
        ):
            for part, value in expected._asdict().items():
                torch.testing.assert_close(getattr(found, part)[run], value, rtol=1e-9, atol=1e-12)


def blobs(n=30, per_seed=0):
    generator = torch.Generator().manual_seed(per_seed)
    y = torch.arange(n) % 3
    x = 2 * F.one_hot(y, 5).float() + torch.randn(n, 5, generator=generator)
    parts = {
        f"{part}_{split}": t
        for split in ("train", "validation", "test")
        for part, t in (("x", x), ("y", y))
    }
    return Data("blobs", 3, **parts, y_train_clean=y, y_validation_clean=y)


@pytest.mark.parametrize("per_seed", [False, True], ids=["one data set", "one per seed"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_instrument_of_fit_and_networks(batch_norm, per_seed):
    data = [blobs(per_seed=1), blobs(per_seed=2)] if per_seed else blobs()
    runs = fit(
        lambda: MLP(5, 6, 3, batch_norm=batch_norm),
        data,
        Recipe(),
        steps=5,
        batch_size=10,
        grid={"lr": [0.05, 0.2]},
        seeds=2,
        evaluate_at=1,
        networks="last",
        device="cpu",
        dtype=torch.float64,
        instruments={"cosine": partial(class_stiffness, num_classes=3)},
    )
    networks = runs.networks
    sign = partial(class_stiffness, num_classes=3, kind="sign")
    signs = networks.measure(sign, data, "train", examples=12)
    assert signs.matrix.dims == ("lr", "seed", "class_1", "class_2")
    pairs = networks.measure(stiffness, data, "train", examples=12)
    assert pairs.gram.dims == pairs.cosine.dims == ("lr", "seed", "example", "other")
    for lr, seed in itertools.product([0.05, 0.2], runs.seed.values):
        split = data[list(runs.seed.values).index(seed)] if per_seed else data
        x, y = split.x_train.double(), split.y_train
        model, where = networks.module(lr=lr, seed=seed), {"lr": lr, "seed": seed}
        first = on(model, stiffness, x[:12], y[:12])
        np.testing.assert_allclose(pairs.cosine.sel(where), first.cosine, rtol=1e-9, atol=1e-12)
        matrix = class_matrix(first.sign, y[:12], num_classes=3)
        np.testing.assert_allclose(signs.matrix.sel(where), matrix, rtol=1e-12)
        between = signs.between.sel(where).item()
        assert between == pytest.approx(between_classes(matrix).item(), rel=1e-9)
        found = runs.sel(where | {"step": 5})
        matrix = class_matrix(on(model, stiffness, x, y).cosine, y, num_classes=3)
        np.testing.assert_allclose(found.cosine_matrix, matrix, rtol=1e-9)
        within = within_classes(matrix).item()
        assert found.cosine_within.item() == pytest.approx(within, rel=1e-9)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"num_classes": 0}, "num_classes must be a whole number >= 1, got 0"),
        ({"num_classes": 3, "kind": "cos"}, "kind must be 'cosine' or 'sign', got 'cos'"),
    ],
)
def test_instrument_names_what_is_wrong(arguments, match):
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match=match):
        on(nn.Linear(4, 3), class_stiffness, x, y, **arguments)


def test_composes_with_grad():
    """The derivative of one cosine along a direction, against a central difference."""
    model, criterion, x, y, *_ = make("MLP, batch norm")
    model.eval()
    params = {k: p.detach() for k, p in model.named_parameters()}
    network = lambda params, x: functional_call(model, params, (x,))
    cosine = lambda params: stiffness(network, params, x, y, criterion=criterion).cosine[0, 1]
    gradient = torch.func.grad(cosine)(params)
    along = {k: torch.randn_like(p) for k, p in params.items()}
    ahead, behind = ({k: p + h * along[k] for k, p in params.items()} for h in (1e-6, -1e-6))
    difference = (cosine(ahead) - cosine(behind)) / 2e-6
    product = sum((gradient[k] * along[k]).sum() for k in params)
    assert product.item() == pytest.approx(difference.item(), rel=1e-5)


def test_gradient_norm_is_the_length_of_the_mean_gradient():
    model, _, x, y, *_ = make("MLP")
    squares = lambda z, y: (z - F.one_hot(y, 3)).square().sum(1)
    for criterion in (example_losses, squares):
        expected = loop(model, criterion, x, y).mean(0).norm()
        found = on(model, gradient_norm, x, y, criterion=criterion)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------ its meaning


def test_a_small_step_on_one_example_changes_the_others_loss_by_minus_the_inner_product():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    gram = on(model, stiffness, x, y).gram
    before = example_losses(model(x), y).detach()
    errors = []
    for step in (1e-3, 5e-4):
        change = torch.empty_like(gram)
        for i in range(len(x)):
            moved = copy.deepcopy(model)
            value = example_losses(moved(x[i : i + 1]), y[i : i + 1]).sum()
            gradients = torch.autograd.grad(value, [*moved.parameters()])
            with torch.no_grad():
                for p, g in zip(moved.parameters(), gradients, strict=True):
                    p -= step * g
                change[i] = example_losses(moved(x), y) - before
        errors.append((change + step * gram).abs())
        torch.testing.assert_close(change, -step * gram, rtol=0, atol=20 * step**2)
    order = (errors[0] / errors[1]).log2()  # an error of second order is quartered
    assert (order.median() - 2).abs() < 0.01
    assert ((order - 2).abs() < 0.1).float().mean() > 0.9


# ------------------------------------------------------------------------------------------- laws

seeds = st.integers(0, 10**6)


@settings(max_examples=25)
@given(seeds, st.integers(1, 9))
def test_gram_is_symmetric_and_positive_semidefinite_and_cosines_are_cosines(seed, n):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    s = on(model, stiffness, torch.randn(n, 3).double(), torch.randint(3, (n,)))
    assert torch.equal(s.gram, s.gram.mT)
    assert torch.linalg.eigvalsh(s.gram).min() >= -1e-12 * s.gram.diagonal().max()
    assert (s.cosine.abs() <= 1).all()
    torch.testing.assert_close(s.cosine.diagonal(), torch.ones(n).double())
    assert torch.equal(s.sign, s.gram.sign())


@settings(max_examples=25)
@given(seeds, st.lists(st.integers(-60, 60), min_size=6, max_size=6))
def test_scale_of_an_examples_loss_changes_neither_sign_nor_cosine(seed, exponents):
    torch.manual_seed(seed)
    model = MLP(3, 4, 3)
    x, y = torch.randn(6, 3), torch.randint(3, (6,))
    scale = torch.tensor(exponents).float().exp2()
    plain = on(model, stiffness, x, y)
    scaled_losses = lambda z, y: example_losses(z, y[:, 0].long()) * y[:, 1]
    scaled = of(model, scaled_losses, x, torch.stack([y, scale], 1))
    assert torch.equal(scaled.cosine, plain.cosine)
    assert torch.equal(scaled.sign, plain.sign)


def test_fitted_examples_still_have_a_direction():
    """With gradients of 1e-25, whose products are zero in single precision."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 2])
    losses = lambda z, y: example_losses(z + 57 * torch.eye(3)[y], y)
    s = of(model, losses, x, y)
    assert (s.gram == 0).all()
    # (in single precision, 1 - p is 0 for the right class, here as in any autograd loop)
    g = loop(model, losses, x, y)
    assert 0 < g.norm(dim=1).min() < g.norm(dim=1).max() < 1e-23
    torch.testing.assert_close(s.cosine.double(), F.cosine_similarity(g[:, None], g, -1, 0))


# ------------------------------------------------------------------- zeros, NaN, single examples


def test_a_zero_gradient_has_sign_and_cosine_zero():
    model = MLP(4, 5, 3)
    some = lambda z, y: example_losses(z, y.long().abs()) * (y >= 0)
    s = of(model, some, torch.randn(3, 4), torch.tensor([0, -1, 2]))
    for value in (s.gram, s.cosine, s.sign):
        assert (value[1] == 0).all() and (value[:, 1] == 0).all()
        assert value[0, 0] > 0 and value[2, 2] > 0
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    for loss in (lambda z, y: 0 * y.float(), example_losses):
        s = stiffness(lambda params, x: x, {"unused": torch.ones(2)}, x, y, criterion=loss)
        assert s.gram.shape == (2, 2) and (s.gram == 0).all() and (s.cosine == 0).all()


@pytest.mark.parametrize("name", ["MLP", "CNN", "an odd parameter", "norms"])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_nan_stays_with_its_example(name, bad):
    model, criterion, x1, y1, x2, y2 = make(name)
    x2[1] = bad
    s, clean = of(model, criterion, x1, y1, x2, y2), of(model, criterion, x1, y1)
    for value in (s.gram, s.cosine, s.sign):
        assert value.isnan().all(0).tolist() == [False, True, False]
        assert value.isnan().any(0).tolist() == [False, True, False]
    x1 = torch.cat([x1, x2[1:2]])
    s = of(model, criterion, x1, torch.cat([y1, y2[1:2]]))
    torch.testing.assert_close(s.cosine[:5, :5], clean.cosine, rtol=1e-9, atol=1e-9)
    assert s.cosine[5].isnan().all() and s.cosine[:, 5].isnan().all()


def test_sequences_of_one_example_each():
    model, criterion, x1, y1, x2, y2 = make("MLP", 1, 1)
    s = of(model, criterion, x1, y1)
    assert s.gram.shape == (1, 1)
    assert s.cosine.item() == pytest.approx(1)
    assert class_matrix(s.cosine, y1, num_classes=3).isnan().all()
    assert of(model, criterion, x1, y1, x2, y2).gram.shape == (1, 1)


# ------------------------------------------------------------------------------------- side effects


def test_evaluation_mode_is_used_and_modes_are_restored():
    model, criterion, x, y, *_ = make("MLP, batch norm")
    model.insert(1, nn.Dropout(0.5))
    model.eval()
    expected = of(model, criterion, x, y)
    model.train()
    model[3].eval()  # one frozen norm
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    assert torch.equal(of(model, criterion, x, y).gram, expected.gram)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for k, t in model.state_dict().items():
        assert torch.equal(t, state[k])


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_of_the_model_changes_even_if_the_loss_fails(failing):
    model, criterion, x, y, *_ = make("an odd parameter")
    model.train()
    parameters = dict(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    model.odd.grad = None
    grads = {k: p.grad for k, p in parameters.items()}
    before = {k: (p.data_ptr(), p.clone()) for k, p in parameters.items()}
    hook = model.register_forward_hook(lambda *_: None)
    hooks = dict(model._forward_hooks)
    times = itertools.count()

    def sometimes(z, y):
        if failing and next(times) > 1:
            raise RuntimeError("from the loss")
        return criterion(z, y)

    if failing:
        with pytest.raises(RuntimeError, match="from the loss"):
            of(model, sometimes, x, y, batch_size=2)
    else:
        of(model, sometimes, x, y, batch_size=2)
    assert all(m.training for m in model.modules())
    assert dict(model._forward_hooks) == hooks
    for k, p in model.named_parameters():
        assert p is parameters[k] and p.requires_grad and p.grad is grads[k]
        assert p.data_ptr() == before[k][0] and torch.equal(p, before[k][1])
        assert p.grad is None or (p.grad == 7).all()
    hook.remove()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_with_gradients_disabled(context):
    model, criterion, x, y, *_ = make("CNN")
    expected = of(model, criterion, x, y)
    with context():
        assert torch.equal(of(model, criterion, x, y).gram, expected.gram)


# ----------------------------------------------------------------------------------------- errors


def test_batch_norm_with_batch_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))
    x, y = torch.randn(6, 4), torch.randint(5, (6,))
    with pytest.raises(ValueError, match="depend on the other examples.*track_running_stats=True"):
        on(model, stiffness, x, y)
    training = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).train()
    network = lambda params, x: functional_call(training, params, (x,))
    with pytest.raises(ValueError, match="statistics of the batch"):
        stiffness(network, dict(training.named_parameters()), x, y)


def test_what_vmap_cannot_run_needs_a_loop():
    x, y = torch.randn(2, 3, 4).double(), torch.tensor([0, 1])
    recurrent = Module(lambda m, x: m.lstm(x)[0][:, -1], lstm=nn.LSTM(4, 3, batch_first=True))
    branch = Module(lambda m, x: m.a(x[:, 0] * (1 if x.sum() > 0 else 1.0)), a=nn.Linear(4, 3))
    for model in (recurrent.double(), branch.double()):
        with pytest.raises(
            ValueError, match="must run under .*vmap.*; batch_size=1 differentiates"
        ):
            on(model, stiffness, x, y)
        assert on(model, stiffness, x, y, batch_size=1).gram.shape == (2, 2)


def test_errors_name_argument_and_value():
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    network = lambda params, x: functional_call(model, params, (x,))
    params = {name: p.detach() for name, p in model.named_parameters()}
    calls = {
        r"x and y must hold the same number.*\(6, 4\) and \(5,\)": (x, y[:5], {}),
        r"x2 and y2 must hold the same number.*\(0, 4\)": (x, y, {"x2": x[:0], "y2": y[:0]}),
        "x2 and y2 must be given both or neither": (x, y, {"x2": x}),
    }
    for match, (x1, y1, second) in calls.items():
        with pytest.raises(ValueError, match=match):
            stiffness(network, params, x1, y1, **second)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        stiffness(network, params, [1.0], y)
    for bad in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number >= 1, got {bad}"):
            stiffness(network, params, x, y, batch_size=bad)
    for bad, got in ((nn.CrossEntropyLoss(), r"\(\)"), (lambda z, y: None, "NoneType")):
        with pytest.raises(ValueError, match=f"criterion must return one loss .*, got {got}"):
            stiffness(network, params, x, y, criterion=bad)


# ------------------------------------------------------------------------------ the residual alone


def test_baseline_is_the_stiffness_of_the_last_layers_bias():
    model, _, x, y, *_ = make("MLP")
    model.requires_grad_(False)[-1].bias.requires_grad_(True)
    logits = model(x).detach()
    found = residual_stiffness(logits, y)
    for value, expected in zip(found, on(model, stiffness, x, y), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    residual = logits.softmax(1) - F.one_hot(y, 3)
    soft = residual_stiffness(logits, F.one_hot(y, 3).double())
    assert_is_gram(soft, residual, residual, 1e-12)


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_baseline_at_equal_probabilities(k):
    y = torch.arange(2 * k) % k
    s = residual_stiffness(torch.full((2 * k, k), 0.7).double(), y)
    matrix = class_matrix(s.cosine, y, num_classes=k)
    expected = torch.full((k, k), -1 / (k - 1)).double().fill_diagonal_(1)
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(s.gram.diagonal(), torch.full((2 * k,), 1 - 1 / k).double())


def test_class_means_of_cosines_are_products_of_class_means_of_directions():
    model, criterion, x, *_ = make("MLP", 12)
    y = torch.arange(12) % 3
    matrix = class_matrix(of(model, criterion, x, y).cosine, y, num_classes=3)
    g = loop(model, criterion, x, y)
    sums = F.one_hot(y, 3).double().mT @ (g / g.norm(dim=1, keepdim=True))
    products = sums @ sums.mT
    counts = torch.full((3, 3), 16.0).double()
    products.diagonal().sub_(4)  # the pairs of an example with itself
    counts.diagonal().sub_(4)
    torch.testing.assert_close(matrix, products / counts, rtol=1e-10, atol=1e-12)


class Plain(nn.Module):
    """A function of the module and x, with parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)

    def forward(self, x):
        return self.function(self, x)


W = torch.linspace(-1, 1, 12).view(3, 4)
linear = nn.Linear
energy = lambda m, x: torch.func.grad(lambda z: m.b(m.a(z).tanh()).sum())(x)[:, :3]
tangent = lambda m, x: torch.func.jvp(lambda z: m.a(z).tanh(), (x,), (torch.ones_like(x),))[1]
UNUSUAL = {
    "one bias for all": (lambda m, x: F.linear(x, m.w, m.b), {"w": W, "b": torch.ones(1)}),
    "a number as bias": (lambda m, x: F.linear(x, m.w, m.b), {"w": W, "b": torch.tensor(0.5)}),
    "one unit": (lambda m, x: F.linear(x, m.w[0])[:, None] * m.v, {"w": W, "v": torch.ones(3)}),
    "a vector": (lambda m, x: F.linear(x, m.w)[:, None] * m.v, {"w": W[0], "v": torch.ones(3)}),
    "energy": (energy, {"a": linear(4, 5), "b": linear(5, 1)}),
    "used in and outside": (
        lambda m, x: m.a(x) + energy(m, x),
        {"a": linear(4, 3), "b": linear(3, 1)},
    ),
    "tangent": (tangent, {"a": linear(4, 3)}),
    "mapped": (lambda m, x: torch.func.vmap(m.a)(x), {"a": linear(4, 3)}),
    "mapped weight": (
        lambda m, x: F.linear(x, m.w) + torch.func.vmap(lambda r: r.pow(2).sum())(m.w),
        {"w": W},
    ),
    "derivative by the weight": (
        lambda m, x: F.linear(x, m.w) + torch.func.grad(lambda w: (w**3).sum())(m.w).sum(1),
        {"w": W},
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_layers_equal_the_loop(name):
    function, parts = UNUSUAL[name]
    model, x, y = Plain(function, **parts).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    g = loop(model, example_losses, x, y)
    assert_is_gram(on(model, stiffness, x, y), g, g, 1e-12)


def test_two_sets_may_use_the_weights_differently():
    """A layer that one set meets once has no gradient of the form δaᵀ in the other."""
    pooled = Plain(lambda m, x: m.a(x).tanh().mean(1), a=nn.Linear(4, 3)).double()
    either = Plain(
        lambda m, x: m.b(m.a(x).tanh() if x.sum() > 0 else m.a(m.a(x)).tanh()),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 3),
    ).double()
    skipping = Plain(
        lambda m, x: m.b(m.a(x) if x.sum() > 0 else x), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    one, two = torch.rand(1, 4).double(), -torch.rand(1, 4).double()
    tokens = torch.randn(5, 1, 4).double(), torch.randn(6, 3, 4).double()
    for model, x, x2 in [(pooled, *tokens), (either, one, two), (skipping, one, two)]:
        y, y2 = torch.arange(len(x)) % 3, torch.arange(len(x2)) % 3
        g, g2 = loop(model, example_losses, x, y), loop(model, example_losses, x2, y2)
        assert_is_gram(on(model, stiffness, x, y, x2=x2, y2=y2), g, g2, 1e-12)
        assert_is_gram(on(model, stiffness, x2, y2, x2=x, y2=y), g2, g, 1e-12)


def test_an_example_that_uses_the_weights_differently_is_refused():
    """A last chunk of one example runs without vmap, where its branch would go unseen."""
    counted = []

    def network(params, x):
        counted.append(0)
        return F.linear(x, params["w"]) * (F.linear(x, params["w"]) if len(counted) == 3 else 1)

    params, y = {"w": torch.randn(3, 4)}, torch.arange(3)
    with pytest.raises(ValueError, match="in the same way for every example.*batch_size=1"):
        stiffness(network, params, torch.randn(3, 4), y, batch_size=2)


def test_one_tensor_under_two_names():
    w, x, y = torch.randn(3, 4).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    both = lambda p, x: F.linear(x, p["a"]) + 2 * F.linear(x, p["b"])
    found = stiffness(both, {"a": w, "b": w}, x, y)
    residual = (3 * x @ w.mT).softmax(1) - F.one_hot(y, 3)
    torch.testing.assert_close(found.gram, 5 * (residual @ residual.mT) * (x @ x.mT))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-20, 1e18, 1e20, 1e30])
def test_inputs_of_any_size(size, bias):
    """Squares of them leave the range of single precision."""
    model, x = nn.Sequential(nn.Linear(4, 3, bias=bias)), size * torch.randn(6, 4)
    model[0].weight.data /= size
    y = torch.arange(6) % 3
    exact = on(model, stiffness, x, y, dtype=torch.float64)
    found = on(model, stiffness, x, y)
    torch.testing.assert_close(found.cosine.double(), exact.cosine, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.sign.double(), exact.sign)


def test_layers_of_very_different_sizes():
    """Of features of 1e-25 at one layer, and 1 at the next."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].weight.data *= 1e20
    x, y = 1e-25 * torch.randn(6, 4), torch.arange(6) % 3
    g = loop(copy.deepcopy(model).double(), example_losses, x.double(), y)
    assert_is_gram(on(model, stiffness, x, y), g, g, 1e-6)


def test_baseline_names_what_is_wrong():
    for logits in (torch.ones(3, 3, dtype=torch.long), torch.zeros(2, 3, 4)):
        with pytest.raises(
            ValueError, match=r"logits must be floating point numbers \[n, K\], got"
        ):
            residual_stiffness(logits, torch.zeros(len(logits)).long())
    with pytest.raises(ValueError, match="at least one"):
        residual_stiffness(torch.zeros(0, 3), torch.zeros(0).long())
