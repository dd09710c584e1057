"""Models of many kinds: each instrument and ``fit`` is right, or refuses in our words.

Right is what plain PyTorch gives, one network, one batch and one derivative at a time.
"""

import re
import traceback
from functools import cache, cached_property, partial

import pytest
import torch
from kinds import ALL, KINDS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from flatmin._random import normals
from flatmin.data import Data
from flatmin.gradient import SAM, GradientPenalty, PlainGradient
from flatmin.measure import (
    eigenvalues,
    error_under_attack,
    gradient_norm,
    hessian_product,
    loss_slice,
    on,
    sharpness,
    spectral_density,
    stiffness,
    trace,
)
from flatmin.optimizer import SGD
from flatmin.pipeline import Recipe
from flatmin.stack import epoch_order, fit, initial_module

RHO, EPS, LR, SEEDS = 0.3, 0.5, 0.1, [3, 5]
MANY = 300  # Lanczos steps and sketched directions: more than there are weights
STAGES = {
    "fit": PlainGradient(),
    "fit_sam": SAM(RHO),
    "fit_penalty": GradientPenalty(RHO),
}


# --------------------------------------------------------------------------------- plain PyTorch


class Plain:
    """A module of a kind, whose passes in evaluation mode are those of fresh copies."""

    def __init__(self, kind, seed=0):
        self.kind, self.seed = kind, seed
        self.model = self.new()

    def new(self):
        make = self.kind.twin or self.kind.make
        return initial_module(lambda: typed(self.kind, make), self.seed).double()

    def named(self):
        """The parameters of the model itself, not of a twin."""
        model = initial_module(lambda: typed(self.kind, self.kind.make), self.seed)
        return model.named_parameters()

    def copy(self, step=None, state=None):
        """With these weights and buffers, moved by a step."""
        model = self.new()
        model.load_state_dict(self.model.state_dict() if state is None else state)
        if step is not None:
            move(model, step)
        return model.eval()

    def loss(self, model, x, y):
        return self.kind.criterion(model(x.clone()), y).mean()

    def at(self, step, x, y):
        return self.loss(self.copy(step), x, y).detach()

    def gradient(self, x, y, model=None, **graph):
        model = self.copy() if model is None else model
        loss, weights = self.loss(model, x, y), trainable(model)
        g = torch.autograd.grad(loss, weights, allow_unused=True, **graph)
        return joined(g, weights)

    def rise(self, x, y):
        g = self.gradient(x, y)
        return (self.at(RHO * g / g.norm(), x, y) - self.at(0 * g, x, y)).clamp_min(0)

    @cached_property
    def hessian(self):
        """On all examples, at the weights that the model had first."""
        model = self.copy()
        weights = trainable(model)
        with sdpa_kernel(SDPBackend.MATH):
            g = self.gradient(self.kind.x.clone(), self.kind.y.clone(), model, create_graph=True)
            row = partial(torch.autograd.grad, inputs=weights, retain_graph=True, allow_unused=True)
            nothing = [None] * len(weights)  # where the gradient is constant
            rows = [joined(row(g_i) if g_i.requires_grad else nothing, weights) for g_i in g]
        return torch.stack(rows)

    def train(self, x, y, stage, steps=4, batch_size=4):
        """The step of each stage, written out."""
        order = torch.cat([epoch_order(self.seed, epoch, len(x)) for epoch in range(steps)])
        batches = [rows for o in order.split(len(x)) for rows in o.split(batch_size)]
        for rows in batches[:steps]:
            before = {name: v.clone() for name, v in self.model.state_dict().items()}
            self.model.train()
            batch = x[rows], y[rows]
            if stage == "fit_penalty":
                with sdpa_kernel(SDPBackend.MATH):
                    weights = trainable(self.model)
                    loss = self.loss(self.model, *batch)
                    first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
                    penalty = RHO / 2 * joined(first, weights).square().sum()
                    second = torch.autograd.grad(loss + penalty, weights, allow_unused=True)
                    direction = joined(second, weights)
            else:
                direction = self.gradient(*batch, self.model)
            if stage == "fit_sam":
                step = RHO * direction / direction.norm()
                direction = self.gradient(*batch, self.copy(step, before).train())
            move(self.model, -LR * direction)


def typed(kind, make):
    return make() if kind.dtype is None else make().to(kind.dtype)


def trainable(model):
    return [w for w in model.parameters() if w.requires_grad]


def joined(parts, weights):
    dense = lambda g: g.to_dense() if g.is_sparse else g
    pairs = zip(parts, weights, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else dense(g)).flatten() for g, w in pairs])


@torch.no_grad()
def move(model, step):
    weights = trainable(model)
    for w, part in zip(weights, step.split([w.numel() for w in weights]), strict=True):
        w += part.view_as(w)


# -------------------------------------------------------------- each operation, by us and plainly


def vectors(size):
    """Few, but random: a product with a wrong matrix is wrong."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, size, generator=generator, dtype=torch.float64)


def products(network, params, x, y, criterion):
    product = hessian_product(network, params, x, y, criterion=criterion, batch_size=4)
    return torch.stack([product(v) for v in vectors(sum(w.numel() for w in params.values()))])


OURS = {
    "gradient_norm": lambda on, loop: on(gradient_norm, batch_size=4),
    "sharpness": lambda on, loop: on(sharpness, rho=RHO),
    "sharpness_of_shards": lambda on, loop: on(sharpness, rho=RHO, m=2, **loop("chunk_size")),
    "stiffness": lambda on, loop: on(stiffness, **loop("batch_size")).gram,
    "hessian": lambda on, loop: on(products),
    "eigenvalues": lambda on, loop: on(eigenvalues, top=2, bottom=1, steps=MANY).value,
    "trace": lambda on, loop: on(trace, sketch=MANY).value,
    "density": lambda on, loop: on(spectral_density, steps=MANY, probes=1),
    "slice": lambda on, loop: on(loss_slice, points=3, **loop("chunk_size")),
    "attack": lambda on, loop: on(error_under_attack, eps=EPS, steps=1, step_size=EPS),
}


def rise_of_shards(plain, x, y):
    return sum(plain.rise(*shard) for shard in zip(x.split(2), y.split(2))) / 3


def gram(plain, x, y):
    G = torch.stack([plain.gradient(*one) for one in zip(x.split(1), y.split(1))])
    return G @ G.T


def spectrum(plain, x, y):
    return torch.linalg.eigvalsh(plain.hessian)


def on_a_line(plain, x, y):
    """At -1, 0 and 1 times a direction whose filters are as long as those of the weights."""
    params = {k: w.detach().double() for k, w in plain.named() if w.requires_grad}
    direction = normals(params, 0, "direction")
    for name, w in params.items():
        for filter, its in zip(direction[name], w) if w.ndim > 1 else ():
            filter *= its.norm() / filter.norm()
        if w.ndim < 2:
            direction[name] = torch.zeros_like(w)
    d = torch.cat([v.flatten() for v in direction.values()])
    return torch.stack([plain.at(a * d, x, y) for a in (-1, 0, 1)])


def error_after_a_step(plain, x, y):
    x = x.clone().requires_grad_()
    losses = plain.kind.criterion(plain.copy()(x.clone()), y)
    (g,) = torch.autograd.grad(losses.sum(), x)
    return (plain.copy()(x + EPS * g.sign()).argmax(-1) != y).double().mean()


PLAINLY = {
    "gradient_norm": lambda plain, x, y: plain.gradient(x, y).norm(),
    "sharpness": Plain.rise,
    "sharpness_of_shards": rise_of_shards,
    "stiffness": gram,
    "hessian": lambda plain, x, y: vectors(len(plain.hessian)) @ plain.hessian,
    "eigenvalues": lambda plain, x, y: spectrum(plain, x, y)[[-1, -2, 0]],
    "trace": lambda plain, x, y: plain.hessian.trace(),
    "density": spectrum,
    "slice": on_a_line,
    "attack": error_after_a_step,
}


def measured(kind, name, loop):
    """What the instrument finds in a module, which stays as it is."""
    model = initial_module(lambda: typed(kind, kind.make), 0)
    x, y = kind.x.clone(), kind.y.clone()
    weights = [w for w in [*model.parameters(), *model.buffers()] if not is_lazy(w)]
    copies = [w.detach().clone() for w in weights]
    attributes = [dict(vars(module)) for module in model.modules()]
    half = kind.dtype in (torch.float16, torch.bfloat16)
    how = {"criterion": kind.criterion, "dtype": torch.float64 if half else None}
    one = lambda option: {option: 1} if loop else {}
    try:
        return OURS[name](partial(on, model, x=x, y=y, **how), one)
    finally:
        assert torch.equal(x, kind.x) and torch.equal(y, kind.y)
        assert all(w.grad is None for w in model.parameters())
        assert all(map(torch.equal, copies, weights))
        for module, before in zip(model.modules(), attributes, strict=True):
            assert vars(module).keys() == before.keys()
            assert all(vars(module)[key] is value for key, value in before.items())


def no_instrument(network, params, x, y):
    return torch.zeros((), dtype=torch.float64)


def trained(kind, name, loop):
    """Weights after four steps, and losses and sharpness before and after, of two seeds."""
    x, y = kind.x.clone(), kind.y.clone()
    instrument = partial(sharpness, rho=RHO)
    if kind.expected("sharpness") == "refused":
        instrument = no_instrument
    try:
        runs = fit(
            lambda: typed(kind, kind.make),
            Data.of(x, y),
            Recipe(criterion=kind.criterion, gradient=STAGES[name], optimizer=SGD(lr=LR)),
            steps=4,
            batch_size=4,
            seeds=SEEDS,
            evaluate_at=1,
            metrics={},
            instruments={"rise": instrument},
            networks="last",
            chunk_size=1 if loop else None,
            device="cpu",
            dtype=torch.float64,
        )
    finally:
        assert torch.equal(x, kind.x) and torch.equal(y, kind.y)
    weights = [w.reshape(len(SEEDS), -1) for w in runs.networks.params.values()]
    values = [torch.from_numpy(runs[v].values) for v in ("train_loss", "rise")]
    return torch.cat([*weights, *values], 1)


def trained_plainly(kind, name, x, y):
    rows = []
    for seed in SEEDS:
        plain = Plain(kind, seed)
        measurable = kind.expected("sharpness") != "refused"
        rise = plain.rise if measurable else lambda x, y: torch.zeros((), dtype=torch.float64)
        values = lambda: [[plain.at(None, x, y)], [rise(x, y)]]
        before = values()
        plain.train(x, y, name)
        after = [one + other for one, other in zip(before, values(), strict=True)]
        weights = torch.cat([w.detach().flatten() for w in trainable(plain.model)])
        rows.append(torch.cat([weights, *map(torch.stack, after)]))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------ tests


def outcome(kind, plain, name, loop=False):
    """ "right", or the message of a refusal."""
    try:
        found = trained(kind, name, loop) if name in STAGES else measured(kind, name, loop)
    except (ValueError, TypeError) as error:
        raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "flatmin" in raised_by and " must " in str(error), error
        return str(error)
    x, y = kind.x.clone(), kind.y.clone()
    if name in STAGES:
        expected = trained_plainly(kind, name, x, y)
    else:
        expected = PLAINLY[name](plain(), x, y)
    if name == "density":  # the nodes are eigenvalues
        node, weight = found
        found = node[weight > 1e-6]
        expected = expected[(found[:, None] - expected).abs().argmin(1)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    return "right"


@pytest.mark.parametrize("name", KINDS)
def test_right_or_refused(name):
    kind = KINDS[name]
    plain = cache(lambda: Plain(kind))
    for operation in dict.fromkeys(ALL.split()):
        expected, found = kind.expected(operation), outcome(kind, plain, operation)
        if expected == "right":
            assert found == "right", operation
        else:
            on_tokens = (
                operation == "attack" and expected == "lacking" and kind.x.dtype == torch.int64
            )
            message = "x must be floating point" if on_tokens else kind.message
            assert re.search(message, found), (operation, found)
        if expected == "loop":
            assert re.search("(chunk|batch)_size=1", found), operation
            assert outcome(kind, plain, operation, loop=True) == "right", operation


def test_most_of_what_pytorch_can_do_is_right():
    cells = [kind.expected(operation) for kind in KINDS.values() for operation in set(ALL.split())]
    possible = [cell for cell in cells if cell != "lacking"]
    assert len(KINDS) >= 60 and possible.count("refused") <= len(possible) / 4


def test_the_models_are_small():
    for kind in KINDS.values():
        if kind is not KINDS["lazy"]:
            assert sum(w.numel() for w in kind.make().parameters()) <= 200
