"""What holds of every instrument: its signature, its criterion, its dimensions, and the stack."""

import inspect
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from flatmin import fit, measure
from flatmin.book import MLP, two_gaussians
from flatmin.measure import (
    class_stiffness,
    eigenvalues,
    error_under_attack,
    gradient_norm,
    loss_slice,
    on,
    sharpness,
    spectral_density,
    stiffness,
    trace,
)

INSTRUMENTS = [
    (
        partial(class_stiffness, num_classes=2),
        {"matrix": ("class_1", "class_2"), "within": (), "between": ()},
    ),
    (stiffness, {"gram": ("example", "other"), "cosine": ("example", "other")}),
    (partial(error_under_attack, eps=0.1, steps=1), ()),
    (sharpness, ()),
    (gradient_norm, ()),
    (partial(eigenvalues, steps=3), {"value": ("eigenvalue",), "error": ("eigenvalue",)}),
    (partial(trace, probes=2, sketch=1), {"value": (), "standard_error": ()}),
    (
        partial(spectral_density, steps=3, probes=2),
        {"node": ("probe", "point"), "weight": ("probe", "point")},
    ),
    (partial(loss_slice, points=3), ("coordinate",)),
]


FUNCTIONS = [getattr(instrument, "func", instrument) for instrument, _ in INSTRUMENTS]
each = pytest.mark.parametrize(
    "instrument", [f for f, _ in INSTRUMENTS], ids=[f.__name__ for f in FUNCTIONS]
)


def test_all_instruments_are_here_and_take_the_same_arguments():
    found = []
    for name in measure.__all__:
        function = getattr(measure, name)
        names = list(inspect.signature(function).parameters) if callable(function) else []
        if names[:1] != ["network"]:
            continue
        found.append(function)
        assert names[:4] == ["network", "params", "x", "y"]
        options = list(inspect.signature(function).parameters.values())[4:]
        assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
        last = names[names.index("criterion") :]
        assert last in (["criterion", "batch_size"], ["criterion", "batch_size", "chunk_size"])
    assert {*found} - {measure.hessian_product} == {*FUNCTIONS}


@each
@pytest.mark.parametrize("wrong", [cross_entropy, lambda z, y: z, lambda z, y: 0.5])
def test_a_criterion_that_is_not_one_loss_per_example_is_refused(instrument, wrong):
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    with pytest.raises(ValueError, match="criterion must return one loss per example"):
        on(MLP(4, 3, 2), instrument, x, y, criterion=wrong)


@each
def test_a_stack_and_batches_give_what_a_module_gives(instrument):
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 2
    models = [MLP(4, 3, 2).double() for _ in range(2)]
    alone = [tree_leaves(on(model, instrument, x, y)) for model in models]
    batches = [tree_leaves(on(model, instrument, x, y, batch_size=4)) for model in models]
    stacked, _ = torch.func.stack_module_state(models)
    network = lambda params, x: torch.func.functional_call(models[0], params, (x,))
    with torch.no_grad():
        of = torch.func.vmap(lambda params: instrument(network, params, x, y))
        together = tree_leaves(of({name: w.detach() for name, w in stacked.items()}))
    for one, two, both in zip(zip(*alone), zip(*batches), together, strict=True):
        torch.testing.assert_close(both, torch.stack(one), equal_nan=True)
        torch.testing.assert_close(torch.stack(two), torch.stack(one), equal_nan=True)


@pytest.fixture(scope="module")
def networks():
    data = two_gaussians(train_size=20, test_size=20)
    runs = fit(
        lambda: MLP(10, 4, 2), data, steps=2, batch_size=10, seeds=2, networks="last", device="cpu"
    )
    return runs.networks, data


@pytest.mark.parametrize("instrument, dims", INSTRUMENTS, ids=[f.__name__ for f in FUNCTIONS])
def test_dimensions_are_named(instrument, dims, networks):
    stack, data = networks
    found = stack.measure(instrument, data, "train")
    if isinstance(dims, dict):
        assert {name: value.dims for name, value in found.items()} == {
            name: ("seed", *of_value) for name, of_value in dims.items()
        }
    else:
        assert found.dims == ("seed", *dims)
