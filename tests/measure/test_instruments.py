"""What holds of every instrument: its signature, its criterion, its dimensions, and the stack."""

import copy
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


@pytest.mark.parametrize("make", [lambda m: m.half(), lambda m: m], ids=["half", "single"])
def test_all_tensors_get_the_precision_of_the_computation(make):
    model = make(MLP(4, 3, 2))
    x = torch.randn(5, 4).to(next(model.parameters()).dtype)
    y, soft = torch.arange(5) % 2, torch.rand(5, 2).to(x).softmax(1)
    exact = copy.deepcopy(model).double()
    expected = on(exact, stiffness, x.double(), y, x2=2 * x.double(), y2=soft.double())
    found = on(model, stiffness, x, y, x2=2 * x, y2=soft, dtype=torch.float64)
    torch.testing.assert_close(found.gram, expected.gram)
    torch.testing.assert_close(
        on(model, stiffness, x, y, x2=2 * x, y2=soft).gram.double(),
        expected.gram,
        rtol=1e-4,
        atol=1e-5,
    )


def test_what_is_no_model_instrument_or_option_is_named():
    model, x, y = MLP(4, 3, 2), torch.randn(6, 4), torch.arange(6) % 2
    for arguments, options, message in [
        ((lambda x: x, sharpness), {}, "model must be a torch.nn.Module, got function"),
        ((model, "sharpness"), {}, "instrument must be a function, got str"),
        ((model, sharpness), {"radius": 0.1}, "instrument sharpness must take.*'radius'"),
        ((model, measure.hvp), {}, "instrument hvp must take.*too many positional arguments"),
        ((model, measure.fgsm), {"eps": 0.1}, "instrument fgsm must take.*'eps'"),
        ((model, sharpness), {"criterion": None}, "criterion must be a function, got None"),
        ((model, sharpness), {"criterion": "ce"}, "criterion must be a function, got 'ce'"),
    ]:
        with pytest.raises(TypeError, match=message):
            on(*arguments, x, y, **options)


@each
def test_outputs_and_targets_without_a_cross_entropy_are_named(instrument):
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    for model, wrong, message in [
        (MLP(4, 3, 1), 0 * y, r"logits must be .* at least 2 classes, got \(2, 1\)"),
        (MLP(4, 3, 2), y.int(), r"targets must be classes, torch.int64 .*got torch.int32"),
        (MLP(4, 3, 2), y[:, None], r"targets must be classes, .*\(2,\), got .* shape \(2, 1\)"),
        (MLP(4, 3, 2), y.bool(), "targets must be classes, .* got torch.bool"),
        (MLP(4, 3, 2), y.float(), "targets must be probabilities of each class"),
    ]:
        with pytest.raises(ValueError, match=message):
            on(model, instrument, x, wrong)
