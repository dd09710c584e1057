"""Seven things that the package does not have, each added from outside in at most 30 lines.

Read this first if you want to add a method: `flatmin.pipeline` says what each stage is given.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from flatmin import Data, Recipe, fit
from flatmin.book import MLP, two_gaussians
from flatmin.gradient import SAM, PlainGradient
from flatmin.loss import Flooding
from flatmin.optimizer import SGD, Adam
from flatmin.pipeline import BatchStage, GradientStage, LossStage, OptimizerStage

DATA = two_gaussians(train_size=40, validation_size=0, test_size=60)
NETWORK = lambda: MLP(10, 8, 2, activation=nn.Tanh)
EXACT = dict(dtype=torch.float64, device="cpu", seeds=2, batch_size=10)
dot = lambda a, b: sum((a[name] * b[name]).sum() for name in a)


def plain_loop(step, steps, seed=0):
    """Weights after a loop that a reader would write; `step(model, x, y, rows)` changes them."""
    from flatmin.stack import epoch_order, initial_module

    model = initial_module(NETWORK, seed).double()
    batches = (rows for epoch in range(99) for rows in epoch_order(seed, epoch, 40).split(10))
    for _, rows in zip(range(steps), batches):
        step(model, DATA.x_train[rows].double(), DATA.y_train[rows], rows)
    return torch.cat([w.detach().flatten() for w in model.parameters()])


def weights(runs, run=0):
    return torch.cat([w[run].flatten() for w in runs.networks.params.values()])


# ---------------------------------------------------------------- batch: a variant of CutMix


@dataclass(frozen=True)
class SwapTail(BatchStage):
    """The last entries of every input come from another example, and their share of the label."""

    share: float = 0.3

    def draw(self, batch, generator):
        return {"partners": torch.randperm(len(batch.y), generator=generator)}

    def __call__(self, batch, draw):
        partners, n = draw["partners"], batch.x.shape[1]
        tail = torch.arange(n) >= n * (1 - self.share)
        y = torch.nn.functional.one_hot(batch.y, batch.num_classes).to(batch.x.dtype)
        kept = 1 - tail.to(y.dtype).mean()
        x = torch.where(tail, batch.x[partners], batch.x)
        return batch._replace(x=x, y=kept * y + (1 - kept) * y[partners])


def test_a_batch_stage():
    both = fit(
        NETWORK, DATA, Recipe(batch=SwapTail()), steps=8, grid={"share": [0.0, 0.5]}, **EXACT
    )
    plain = fit(NETWORK, DATA, steps=8, **EXACT)
    np.testing.assert_allclose(both.test_loss.sel(share=0.0), plain.test_loss, rtol=1e-12)
    assert (abs(both.test_loss.sel(share=0.5) - plain.test_loss).isel(step=-1) > 1e-4).all()


# ----------------------------------------------------- loss: AdaFlood, a level for each example


@dataclass(frozen=True)
class AdaFlood(LossStage):
    """Every example has a level of its own (Bae et al., arXiv 2311.02891); ``scale`` times what is given."""

    levels: Any
    scale: float = 1.0

    def __call__(self, losses, rows):
        b = self.scale * self.levels[rows]
        return ((losses - b).abs() + b).mean()


def test_a_loss_stage_knows_which_examples_it_sees():
    levels = torch.linspace(0, 1, 40, dtype=torch.float64)

    def step(model, x, y, rows):
        losses = cross_entropy(model(x), y, reduction="none")
        model.zero_grad()
        ((losses - levels[rows]).abs() + levels[rows]).mean().backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad

    runs = fit(NETWORK, DATA, Recipe(loss=AdaFlood(levels)), steps=12, networks="last", **EXACT)
    torch.testing.assert_close(weights(runs), plain_loop(step, 12), rtol=1e-10, atol=1e-12)
    constant = Recipe(loss=AdaFlood(torch.full((40,), 0.3, dtype=torch.float64)))
    one = fit(NETWORK, DATA, constant, steps=12, grid={"scale": [1.0]}, **EXACT).test_loss
    same = fit(NETWORK, DATA, Recipe(loss=Flooding(0.3, per_example=True)), steps=12, **EXACT)
    np.testing.assert_allclose(one.sel(scale=1.0), same.test_loss, rtol=1e-12)


# ------------------------------------------------------------------ gradient: LookSAM, with state


@dataclass(frozen=True)
class LookSAM(GradientStage):
    """SAM's second gradient every k-th step only (Liu et al., 2022); its trace is kept between."""

    rho: float = 0.05
    alpha: float = 0.7
    k: int = 5

    def init(self, params):
        return {name: torch.zeros_like(w) for name, w in params.items()}

    def __call__(self, objective, w, trace, t):
        g = objective.gradient(w)
        if t % self.k:
            size = self.alpha * (dot(g, g) / dot(trace, trace).clamp_min(1e-30)).sqrt()
            return {name: g[name] + size * trace[name] for name in g}, trace
        s, _ = SAM(self.rho)(objective, w, (), t)
        along = dot(s, g) / dot(g, g)
        return s, {name: s[name] - along * g[name] for name in g}


def test_a_gradient_stage_has_state_and_knows_the_step():
    always = dict(steps=11, grid={"rho": [0.05, 0.2]}, networks="last", **EXACT)
    look = fit(NETWORK, DATA, Recipe(gradient=LookSAM(k=1)), **always)
    sam = fit(NETWORK, DATA, Recipe(gradient=SAM()), **always)
    torch.testing.assert_close(weights(look, 3), weights(sam, 3), rtol=1e-10, atol=1e-13)
    rarely = fit(NETWORK, DATA, Recipe(gradient=LookSAM(k=5)), **always)
    assert not torch.allclose(weights(rarely, 3), weights(sam, 3), rtol=1e-4)


@dataclass(frozen=True)
class WithDecay(GradientStage):
    """Another stage, of the loss plus weight decay: wrapping an objective loses nothing."""

    inner: Any = field(default_factory=SAM)
    decay: float = 0.0

    def __call__(self, objective, w, state, t):
        penalty = lambda w: self.decay / 2 * dot(w, w)
        return self.inner(objective.plus(penalty), w, state, t)


def test_a_wrapped_objective_keeps_its_raw_loss():
    settings = dict(steps=20, grid={"flood_level": [0.5]}, networks="last", **EXACT)
    plain = fit(NETWORK, DATA, Recipe(loss=Flooding(), gradient=SAM(0.3)), **settings)
    wrapped = fit(NETWORK, DATA, Recipe(loss=Flooding(), gradient=WithDecay(SAM(0.3))), **settings)
    torch.testing.assert_close(weights(wrapped), weights(plain), rtol=1e-10, atol=1e-13)
    settings["grid"] = {"gradient.decay": [0.1]}
    inside = fit(NETWORK, DATA, Recipe(gradient=WithDecay(PlainGradient())), **settings)
    outside = fit(
        NETWORK, DATA, Recipe(optimizer=SGD(weight_decay=0.1)), **settings | {"grid": None}
    )
    torch.testing.assert_close(weights(inside), weights(outside), rtol=1e-10, atol=1e-13)


# --------------------------------------------------- optimizer: an average, with an inner rate swept


@dataclass(frozen=True)
class Average(OptimizerStage):
    """Trains with one set of weights, and shows the exponential average of all of them."""

    inner: Any = field(default_factory=SGD)
    decay: float = 0.9

    def init(self, params):
        return self.inner.init(params), dict(params)

    def __call__(self, direction, w, state, t):
        w, inner = self.inner(direction, w, state[0], t)
        mean = {k: self.decay * a + (1 - self.decay) * w[k] for k, a in state[1].items()}
        return w, (inner, mean)

    def evaluated(self, w, state):
        return state[1]


def test_an_optimizer_says_which_weights_are_evaluated():
    settings = dict(steps=9, networks="last", **EXACT)
    mean = fit(NETWORK, DATA, Recipe(optimizer=Average(decay=0.0)), **settings)
    plain = fit(NETWORK, DATA, Recipe(optimizer=SGD()), **settings)
    assert torch.equal(weights(mean), weights(plain))
    grid = {"optimizer.inner.lr": [0.05, 0.2], "decay": [0.5, 0.9]}
    swept = fit(NETWORK, DATA, Recipe(optimizer=Average()), grid=grid, **settings)
    alone = fit(NETWORK, DATA, Recipe(optimizer=Average(SGD(0.2), 0.9)), **settings)
    one = swept.test_loss.sel({"optimizer.inner.lr": 0.2, "decay": 0.9})
    np.testing.assert_allclose(one, alone.test_loss, rtol=1e-12)


# ------------------------------------------------------------------------------- other tasks


def test_regression():
    x = torch.linspace(-2, 2, 40)[:, None]
    squares = lambda output, y: ((output - y) ** 2).flatten(1).sum(1) / 2
    sine = Data.of(x, x.sin(), test=(x, x.sin()))
    curve = lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    recipe = Recipe(criterion=squares, optimizer=Adam(0.02))
    distance = lambda output, y: (output - y).abs()
    runs = fit(curve, sine, recipe, steps=300, metrics={"distance": distance}, **EXACT)
    assert {*runs.data_vars} == {
        *(f"{split}_{name}" for split in ("train", "test") for name in ("loss", "distance")),
        "diverged_at",
    }
    assert (runs.test_distance.isel(step=-1) < 0.1 * runs.test_distance.isel(step=0)).all()


class Transformer(nn.Module):
    """A causal language model of one block, over 7 tokens."""

    def __init__(self, width=16):
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, width), nn.Embedding(12, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 7)

    def forward(self, x):
        t = x.shape[-1]
        causal = torch.full((t, t), -torch.inf, dtype=self.head.weight.dtype).triu(1)
        return self.head(self.block(self.tokens(x) + self.places.weight[:t], src_mask=causal))


def test_a_transformer_language_model_under_sam():
    start = torch.randint(7, (60, 1), generator=torch.Generator().manual_seed(0))
    text = (start + 2 * torch.arange(9)) % 7  # count in twos: the next token is known
    tokens = lambda logits, y: cross_entropy(logits.movedim(-1, 1), y, reduction="none")
    wrong = {"error": lambda logits, y: logits.argmax(-1) != y}
    data = Data.of(text[:40, :-1], text[:40, 1:], test=(text[40:, :-1], text[40:, 1:]))
    recipe = Recipe(criterion=tokens, gradient=SAM(), optimizer=Adam(0.01))
    runs = fit(Transformer, data, recipe, steps=60, grid={"rho": [0.0, 0.05]}, metrics=wrong,
               networks="last", evaluate_at=3, **EXACT)  # fmt: skip
    assert (runs.test_error.isel(step=-1) < 0.1).all() and (runs.test_error <= 1).all()
    model = runs.networks.module(rho=0.05, seed=1)
    loss = tokens(model(data.x_test), data.y_test).mean()
    np.testing.assert_allclose(runs.test_loss.sel(rho=0.05, seed=1)[-1], loss.item(), rtol=1e-10)


# ------------------------------------------------------------------------------- an instrument


class FisherTrace:
    """The mean squared length of an example's gradient, for each of the first weights."""

    dims = ("weight",)

    def __call__(self, network, params, x, y):
        loss = lambda w, x, y: cross_entropy(network(w, x[None]), y[None])
        each = torch.func.vmap(grad(loss), (None, 0, 0))(params, x, y)
        return torch.cat([(g**2).mean(0).flatten() for g in each.values()])[:5]


def test_an_instrument_names_its_dimensions():
    runs = fit(NETWORK, DATA, steps=5, networks="last", **EXACT)
    found = runs.networks.measure(FisherTrace(), DATA, "train")
    assert found.dims == ("seed", "weight")
    model = runs.networks.module(seed=1).double()
    w = dict(model.named_parameters())
    total = 0
    for x, y in zip(DATA.x_train.double(), DATA.y_train, strict=True):
        loss = lambda w: cross_entropy(functional_call(model, w, (x[None],)), y[None])
        total = total + torch.cat([g.flatten() for g in grad(loss)(w).values()])[:5] ** 2 / 40
    np.testing.assert_allclose(found.sel(seed=1), total.detach(), rtol=1e-9)
