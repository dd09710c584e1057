"""What an instrument returns beyond one number has named dimensions."""

import pytest

from flatmin import fit
from flatmin.book import MLP, two_gaussians
from flatmin.measure import (
    Attack,
    AverageSharpness,
    HessianDensity,
    HessianEigenvalues,
    HessianTrace,
    LossSlice,
    Sharpness,
)

INSTRUMENTS = [
    (Attack(0.1, steps=1), ()),
    (Sharpness(), ()),
    (AverageSharpness(directions=2), ()),
    (AverageSharpness(directions=2, standard_error=True), ("part",)),
    (HessianEigenvalues(steps=3), ()),
    (HessianEigenvalues(steps=3, errors=True), ("part",)),
    (HessianEigenvalues(2, 1, steps=4), ("eigenvalue",)),
    (HessianEigenvalues(2, 1, steps=4, errors=True), ("part", "eigenvalue")),
    (HessianTrace(probes=2, sketch=1), ()),
    (HessianTrace(probes=2, sketch=1, standard_error=True), ("part",)),
    (HessianDensity(steps=3, probes=2), ("part", "probe", "node")),
    (LossSlice(points=3), ("coordinate",)),
    (LossSlice(points=3, dimensions=2), ("coordinate_1", "coordinate_2")),
]


@pytest.fixture(scope="module")
def networks():
    data = two_gaussians(train_size=20, test_size=20)
    runs = fit(
        lambda: MLP(10, 4, 2), data, steps=2, batch_size=10, seeds=2, networks="last", device="cpu"
    )
    return runs.networks, data


@pytest.mark.parametrize("instrument, dims", INSTRUMENTS, ids=lambda value: repr(value)[:60])
def test_dimensions_are_named(instrument, dims, networks):
    stack, data = networks
    assert stack.measure(instrument, data, "train").dims == ("seed", *dims)
