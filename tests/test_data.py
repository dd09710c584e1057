"""Data: splits, devices, and parts that do not fit together."""

from dataclasses import replace

import pytest
import torch

from flatmin import Data
from flatmin.book import (
    digits,
    mnist1d,
    sinusoid,
    spiral,
    two_gaussians,
)

SETS = {f.__name__: f for f in (two_gaussians, sinusoid, spiral, digits, mnist1d)}
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS.keys())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one: Data, other: Data, *fields: str) -> bool:
    names = fields or [f for f in one.__dataclass_fields__ if f[1:2] == "_"]
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_data_gives_its_splits_and_moves():
    data = sinusoid(label_noise=0.1)
    assert data.split("train") == (data.x_train, data.y_train)
    assert data.split("train_clean") == (data.x_train, data.y_train_clean)
    assert data.split("validation") == (data.x_validation, data.y_validation)
    assert data.split("validation_clean") == (data.x_validation, data.y_validation_clean)
    assert data.split("test") == (data.x_test, data.y_test)
    with pytest.raises(ValueError, match="name must be one of train, .* got 'dev'"):
        data.split("dev")
    moved = data.to("cpu")
    assert same(data, moved) and moved.name == "sinusoid" and moved.num_classes == 2
    with pytest.raises(AttributeError):
        data.name = "other"


@pytest.mark.gpu
def test_data_moves_to_the_gpu_whole():
    data = sinusoid().to("cuda")
    assert all(tensor.is_cuda for tensor in vars(data).values() if isinstance(tensor, torch.Tensor))
    assert same(data.to("cpu"), sinusoid())


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("x_train", [[1.0]], TypeError, "x_train must be a tensor, got list"),
        ("x_train", torch.zeros(5, 2), ValueError, r"y_train must be int64 of shape \[5\]"),
        ("x_test", torch.zeros(8, 3), ValueError, r"x_test must have inputs of shape \[2\]"),
        ("x_test", torch.zeros(8), ValueError, "x_test must be floating point of shape"),
        ("x_test", torch.zeros(8, 2).long(), ValueError, "x_test must be floating point"),
        ("y_test", torch.zeros(7).long(), ValueError, "y_test must be int64 of shape"),
        ("y_test", torch.zeros(8), ValueError, "y_test must be int64"),
        ("y_test", torch.full((8,), 2), ValueError, r"y_test must be in 0 … 1 .* got 2 … 2"),
        ("y_train", torch.full((10,), -1), ValueError, "y_train must be in"),
        ("y_train_clean", torch.zeros(9).long(), ValueError, "y_train_clean must be int64"),
        ("y_validation", torch.zeros(1).long(), ValueError, "y_validation must be int64"),
        ("num_classes", 1, ValueError, "num_classes must be a whole number >= 2, got 1"),
    ],
)
def test_data_that_does_not_fit_together_is_named(field, value, error, message):
    data = sinusoid(train_size=10, validation_size=0, test_size=8)
    with pytest.raises(error, match=message):
        replace(data, **{field: value})
