"""What would go wrong in silence in `fit` and `Networks` is right, or an error."""

import dataclasses
import itertools
import random
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from flatmin import Data, Recipe, fit
from flatmin.batch import Mixup
from flatmin.gradient import PlainGradient
from flatmin.loss import Flooding
from flatmin.measure import gradient_norm, loss_slice, on, sharpness
from flatmin.optimizer import EMA, SGD
from flatmin.pipeline import BatchStage, LossStage, OptimizerStage

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2] * 4)
DATA = Data.of(X, Y)
HOW = {"steps": 3, "batch_size": 4, "seeds": [3, 5], "evaluate_at": 1}
HOW |= {"device": "cpu", "dtype": torch.float64}


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def losses(output, y):
    return cross_entropy(output, y, reduction="none")


class Net(nn.Module):
    """Linear layers, and a function of itself and x; ``parts()`` are attributes."""

    def __init__(self, function, parts=dict):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self._function = function
        for name, part in parts().items():
            setattr(self, name, part)

    def forward(self, x):
        return self._function(self, x)


# ------------------------------------------------------------------------------------- models


@dataclasses.dataclass
class Settings:
    scale: float


def hooked():
    model, shift = make(), torch.randn(3)
    model.register_forward_hook(lambda module, args, output: output + shift)
    return model


BETWEEN_SEEDS = {
    "private": lambda: Net(
        lambda m, x: m.a(x * m._mask), lambda: {"_mask": (torch.rand(4) > 0.5).double()}
    ),
    "function": lambda: Net(
        lambda m, x: m.f(m.a(x)),
        lambda: {"f": [torch.tanh, torch.relu, torch.sin][int(torch.randint(3, ()))]},
    ),
    "settings": lambda: Net(
        lambda m, x: m.a(x) * m.s.scale, lambda: {"s": Settings(float(torch.rand(())))}
    ),
    "hook": hooked,
}


@pytest.mark.parametrize("kind", BETWEEN_SEEDS)
def test_networks_that_differ_in_more_than_weights_are_refused(kind):
    with pytest.raises(ValueError, match="keep what differs between seeds .*got networks of seeds"):
        fit(BETWEEN_SEEDS[kind], DATA, **(HOW | {"seeds": [3, 5, 6, 7]}))


def test_networks_of_other_shapes_are_refused():
    widths = itertools.count(5)

    def growing():
        width = next(widths)
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))

    with pytest.raises(ValueError, match="same parameters and buffers for all seeds"):
        fit(growing, DATA, **HOW)


def filled(holder):
    def forward(m, x):
        if "r" not in m.c:
            m.c["r"] = m.a.weight.detach().abs().amax(0)
        return m.a(x / m.c["r"])

    return Net(forward, lambda: {"c": holder()})


def empty_buffer():
    def forward(m, x):
        if m.r is None:
            m.r = m.a.weight.detach().abs().amax(0)
        return m.a(x / m.r)

    model = Net(forward)
    model.register_buffer("r", None)
    return model


@pytest.mark.parametrize(
    "model",
    [lambda: filled(dict), lambda: filled(partial(defaultdict, list)), empty_buffer],
    ids=["dictionary", "defaultdict", "buffer"],
)
def test_a_cache_is_refused_in_training_and_emptied_after_an_instrument(model):
    with pytest.raises(ValueError, match="buffers that are tensors from the start.* got .*'[cr]'"):
        fit(model, DATA, **HOW)
    module = model().double()
    names = [*module.state_dict()]
    on(module, gradient_norm, X, Y)
    assert [*module.state_dict()] == names
    assert not module.c if hasattr(module, "c") else module.r is None


def test_a_module_that_a_factory_returns_stays_as_it_is():
    net = make().eval()
    before = {name: w.clone() for name, w in net.state_dict().items()}
    runs = fit(lambda: net, DATA, networks="last", **HOW)
    assert not net.training and net[0].weight.dtype == torch.float32
    assert all(torch.equal(w, before[name]) for name, w in net.state_dict().items())
    measured = runs.networks.measure(gradient_norm, DATA, "train")
    net.append(nn.Softplus())
    np.testing.assert_array_equal(runs.networks.measure(gradient_norm, DATA, "train"), measured)


def test_runs_start_from_the_same_weights_however_they_are_chunked():
    generator = torch.Generator().manual_seed(0)

    def own():  # not from PyTorch's global generator
        model = make()
        nn.init.normal_(model[0].weight, generator=generator)
        return model

    runs = fit(own, DATA, grid={"lr": [0.1, 1.0]}, chunk_size=2, **HOW)
    first = runs.train_loss.isel(step=0)
    np.testing.assert_array_equal(first.isel(lr=0), first.isel(lr=1))


def test_random_numbers_of_any_generator_are_refused():
    own = torch.Generator().manual_seed(0)
    draws = {
        "Python's": lambda: random.random(),
        "NumPy's": lambda: np.random.standard_normal(),
        "own": lambda: torch.randn((), generator=own).item(),
    }
    for draw in draws.values():
        model = lambda draw=draw: Net(lambda m, x: m.a(x) * (1 + draw() * m.training))
        for chunk_size in (None, 1):
            with pytest.raises(ValueError, match="something random|random numbers must come from"):
                fit(model, DATA, chunk_size=chunk_size, **HOW)


def test_hooks_on_parameters_and_cached_parametrizations_are_refused():
    model = make().double()
    model[0].weight.register_hook(lambda g: 0 * g)
    for call in (lambda: on(model, gradient_norm, X, Y), lambda: fit(model, DATA, **HOW)):
        with pytest.raises(ValueError, match="parameters without gradient hooks.*'0.weight'"):
            call()
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match="parametrize.cached"):
        on(make().double(), gradient_norm, X, Y)


def test_what_has_no_gradient_is_refused():
    step = Recipe(criterion=lambda output, y: (output.argmax(-1) != y).double())
    frozen = lambda: Net(lambda m, x: m.a(x).detach())
    wrong = lambda output, y: (output.argmax(-1) != y).double()  # of which a slice makes sense
    assert on(make().double(), loss_slice, X, Y, points=3, criterion=wrong)[1] <= 1
    for call in (
        lambda: fit(make, DATA, step, **HOW),
        lambda: fit(frozen, DATA, **HOW),
        lambda: on(frozen().double(), sharpness, X, Y),
    ):
        with pytest.raises(ValueError, match="got no gradient"):
            call()


# ------------------------------------------------------------------------------- criteria, metrics


def test_the_default_metric_takes_logits_only():
    binary = Recipe(
        criterion=lambda o, y: binary_cross_entropy_with_logits(
            o.flatten(), y.to(o.dtype), reduction="none"
        )
    )
    two = Data.of(X, Y.clamp(max=1))
    for model in (lambda: nn.Linear(4, 1), lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))):
        with pytest.raises(ValueError, match=r"metrics=\{\} or your own.*\(\d+,( 1)?\)"):
            fit(model, two, binary, **HOW)
    right = {"error": lambda o, y: (o.flatten() > 0).long() != y}
    runs = fit(lambda: nn.Linear(4, 1), two, binary, metrics=right, networks="last", **HOW)
    output = runs.networks.module(seed=3)(X).flatten()
    assert runs.train_error.sel(seed=3)[-1] == ((output > 0).long() != two.y_train).double().mean()


class Stateful:
    n = 0

    def __call__(self, output, y):
        self.n += 1
        return losses(output, y) / self.n


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(()))

    def forward(self, output, y):
        return losses(output / self.t, y)


@dataclasses.dataclass(frozen=True)
class Focal:
    gamma: float = 0.0

    def __call__(self, output, y):
        loss = losses(output, y)
        return (1 - torch.exp(-loss)) ** self.gamma * loss


def test_criteria_with_a_state_or_swept_numbers_are_refused():
    with pytest.raises(ValueError, match="got two different results"):
        fit(make, DATA, Recipe(criterion=Stateful()), **HOW)
    with pytest.raises(ValueError, match="criterion must have no parameters"):
        Recipe(criterion=Temperature())
    with pytest.raises(ValueError, match="grid names must be hyperparameters"):
        fit(make, DATA, Recipe(criterion=Focal()), grid={"gamma": [0.0, 5.0]}, **HOW)


def test_a_metric_cannot_change_what_others_see():
    plain = {"b": lambda o, y: (o.argmax(-1) != y).double(), "c": lambda o, y: o[:, 0]}
    spoils = {"a": lambda o, y: o.neg_()[:, 0] + y.zero_()} | plain
    expected, found = (fit(make, DATA, metrics=m, **HOW) for m in (plain, spoils))
    for name in ("train_b", "train_c", "train_loss"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_tokens_are_flooded_by_example():
    """The loss of an example is the mean over its tokens."""
    found = Flooding(0.5, per_example=True)(torch.tensor([[0.0, 1.0], [0.2, 0.2]]))
    torch.testing.assert_close(found, torch.tensor((0.5 + 0.8) / 2))


def test_soft_targets_of_another_number_of_classes_are_named():
    five = lambda: nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"probabilities of each class, \(.*5\), .*num_classes"):
        fit(five, DATA, Recipe(batch=Mixup()), **HOW)


# ------------------------------------------------------------------------ instruments and stages


def test_an_instrument_cannot_change_the_training():
    def perturbed(network, params, x, y):
        for w in params.values():
            w.add_(0.5)
        x += 1
        y.zero_()
        return network(params, x).mean()

    plain = fit(make, DATA, **HOW)
    runs = fit(make, DATA, instruments={"m": perturbed}, networks="last", **HOW)
    np.testing.assert_array_equal(runs.train_loss, plain.train_loss)
    first, again = (runs.networks.measure(perturbed, DATA, "train") for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_instruments_with_colliding_dimensions_or_wrong_results_are_refused_before_training():
    seen = []

    def of_size(n, names=None):
        def instrument(network, params, x, y):
            return network(params, x)[0, 0] * torch.ones(n, dtype=x.dtype)

        if names:
            instrument.dims = names
        return instrument

    wrong = {
        "named like a seed": {"a": of_size(2, ("seed",))},
        "sizes differ": {"a": of_size(2, ("part",)), "b": of_size(3, ("part",))},
        "no tensor": {"a": lambda network, params, x, y: 1.0},
        "a taken name": {"lr": of_size(1)},
    }
    for instruments in wrong.values():
        with pytest.raises((ValueError, TypeError), match="instruments? must"):
            fit(
                make, DATA, instruments=instruments, grid={"lr": [0.1]}, progress=seen.append, **HOW
            )
    assert seen == []
    runs = fit(make, DATA, instruments={"a": of_size(2), "b": of_size(3)}, **HOW)
    assert runs.a.dims[-1] != runs.b.dims[-1]


class InPlace(OptimizerStage):
    def __call__(self, grads, params, state, t):
        for name, w in params.items():
            w.sub_(0.1 * grads[name])
        return params, state


class Forgetful(OptimizerStage):
    def __call__(self, grads, params, state, t):
        return {name: w for name, w in params.items() if name != "0.weight"}, state


class Broadcasting(PlainGradient):
    def __call__(self, objective, params, state, t):
        gradient, state = super().__call__(objective, params, state, t)
        return {name: g.mean(0, keepdim=True) for name, g in gradient.items()}, state


class Careless(BatchStage):
    def draw(self, batch, generator):
        return {"noise": torch.randn(batch.x.shape)}

    def __call__(self, batch, draw):
        return batch._replace(x=batch.x + draw["noise"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(optimizer=InPlace()), "optimizer must not change its weights in place"),
        (Recipe(optimizer=EMA(InPlace())), "optimizer must not change its weights in place"),
        (Recipe(optimizer=Forgetful()), r"optimizer must return .* \['0.weight'\]"),
        (Recipe(gradient=Broadcasting()), r"gradient must return .*'0.weight'"),
        (Recipe(batch=Careless()), "random numbers must come from"),
    ],
    ids=["in place", "in place, averaged", "a name is missing", "broadcasts", "draws"],
)
def test_stages_that_break_their_contract_are_named(recipe, message):
    with pytest.raises(ValueError, match=message):
        fit(make, DATA, recipe, **HOW)


# ----------------------------------------------------------------------------------- what comes out


def test_seeds_that_are_close_are_told_apart():
    seeds = [1_700_000_000, 1_700_000_001]
    runs = fit(make, DATA, networks="last", **(HOW | {"seeds": seeds}))
    one, other = (runs.networks.module(seed=seed)[0].weight for seed in seeds)
    assert not torch.equal(one, other)
    every = runs.networks.select(seed=seeds)
    assert torch.equal(every.params["0.weight"], runs.networks.params["0.weight"])
    with pytest.raises(ValueError, match=r"module\(\) takes one value of seed"):
        runs.networks.module(seed=seeds)


def test_what_is_no_recipe_type_or_mapping_is_named():
    calls = {
        "recipe must be a Recipe": {"recipe": SGD(0.1)},
        "dtype must be floating point": {"dtype": torch.int64},
        "instruments must be functions by name": {"instruments": [gradient_norm]},
        "metrics must be functions by name": {"metrics": {"a": 3}},
        "model must be or make a torch.nn.Module": {"model": lambda: 3},
    }
    for message, wrong in calls.items():
        with pytest.raises((ValueError, TypeError), match=message):
            fit(**({"model": make, "data": DATA} | HOW | wrong))
    runs = fit(make, DATA, networks=np.array([1, 2]), **HOW)
    assert runs.networks.shape == (2, 2)


def test_a_part_that_only_some_seeds_have_is_refused():
    data = [DATA, Data.of(X, Y, validation=(X, Y))]
    with pytest.raises(ValueError, match="one shape and type, .* for validation"):
        fit(make, data, **HOW)


def test_a_loss_stage_sees_a_whole_batch():
    class WorstThree(LossStage):
        def __call__(self, values, rows):
            return values.topk(3).values.mean()

    runs = fit(make, DATA, Recipe(loss=WorstThree()), **HOW)
    assert (runs.train_loss[:, -1] < runs.train_loss[:, 0]).all()


def test_a_loss_stage_without_a_gradient_is_refused():
    class Detached(LossStage):
        def __call__(self, values, rows):
            return values.mean().detach()

    with pytest.raises(ValueError, match="no gradient"):
        fit(make, DATA, Recipe(loss=Detached()), **HOW)


def test_networks_that_vmap_cannot_run_are_measured_one_by_one():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.r = nn.LSTM(1, 3, batch_first=True)

        def forward(self, x):
            return self.r(x[..., None])[0][:, -1]

    networks = fit(Recurrent, DATA, networks="last", chunk_size=1, **HOW).networks
    line = partial(loss_slice, points=3, chunk_size=1)
    with pytest.raises(ValueError, match=r"type LSTM does not .*; measure one.*networks.select"):
        networks.measure(line, DATA, "train")
    for seed in HOW["seeds"]:
        one = networks.select(seed=seed).measure(line, DATA, "train")
        alone = on(networks.module(seed=seed), line, X, Y)
        np.testing.assert_allclose(one[0], alone, rtol=1e-12)
