"""What an instrument returns beyond one number has named dimensions."""

from functools import partial

import pytest

from flatmin import fit
from flatmin.book import MLP, two_gaussians
from flatmin.measure import (
    class_stiffness,
    eigenvalues,
    error_under_attack,
    loss_slice,
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
    (partial(eigenvalues, steps=3), {"value": ("eigenvalue",), "error": ("eigenvalue",)}),
    (partial(trace, probes=2, sketch=1), {"value": (), "standard_error": ()}),
    (
        partial(spectral_density, steps=3, probes=2),
        {"node": ("probe", "point"), "weight": ("probe", "point")},
    ),
    (partial(loss_slice, points=3), ("coordinate",)),
]


@pytest.fixture(scope="module")
def networks():
    data = two_gaussians(train_size=20, test_size=20)
    runs = fit(
        lambda: MLP(10, 4, 2), data, steps=2, batch_size=10, seeds=2, networks="last", device="cpu"
    )
    return runs.networks, data


@pytest.mark.parametrize(
    "instrument, dims", INSTRUMENTS, ids=[getattr(f, "func", f).__name__ for f, _ in INSTRUMENTS]
)
def test_dimensions_are_named(instrument, dims, networks):
    stack, data = networks
    found = stack.measure(instrument, data, "train")
    if isinstance(dims, dict):
        assert {name: value.dims for name, value in found.items()} == {
            name: ("seed", *of_value) for name, of_value in dims.items()
        }
    else:
        assert found.dims == ("seed", *dims)
