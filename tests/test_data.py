"""Data: splits, devices, and parts that do not fit together."""

from dataclasses import replace

import pytest
import torch

from flatmin import Data
from flatmin.book import (
    sinusoid,
)


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
        ("x_train", torch.zeros(5, 2), ValueError, "y_train must have one row for each of the 5"),
        ("x_test", torch.zeros(8, 3), ValueError, r"x_test must have inputs of shape \[2\]"),
        ("x_test", torch.zeros(8), ValueError, r"x_test must have .* like x_train, got \[\]"),
        ("x_test", torch.zeros(8, 2).long(), ValueError, "x_test must have .*got .*torch.int64"),
        ("x_test", torch.tensor(1.0), ValueError, r"x_test must be of shape \[n, ...\]"),
        (
            "y_test",
            torch.zeros(7).long(),
            ValueError,
            "y_test must have one row for .* 8 of x_test",
        ),
        (
            "y_test",
            torch.zeros(8),
            ValueError,
            "y_test must have targets .*torch.int64 like y_train",
        ),
        ("y_test", torch.zeros(8, 1).long(), ValueError, r"y_test must have targets .*got \[1\]"),
        ("y_test", torch.full((8,), 2), ValueError, r"y_test must be in 0 … 1 .* got 2 … 2"),
        ("y_train", torch.full((10,), -1), ValueError, "y_train must be in"),
        (
            "y_train_clean",
            torch.zeros(9).long(),
            ValueError,
            r"y_train_clean must .*got shape \[9\]",
        ),
        ("y_validation", torch.zeros(1).long(), ValueError, r"y_validation must .*got shape \[1\]"),
        ("num_classes", 1, ValueError, "num_classes must be a whole number >= 2, got 1"),
    ],
)
def test_data_that_does_not_fit_together_is_named(field, value, error, message):
    data = sinusoid(train_size=10, validation_size=0, test_size=8)
    with pytest.raises(error, match=message):
        replace(data, **{field: value})


# --------------------------------------------------------------------------- data of your own

X, Y = torch.randn(6, 2, generator=seeded()), torch.tensor([0, 3, 1, 1, 0, 2])


def test_data_of_your_own():
    data = Data.of(X, Y, validation=(X[:2], Y[:2]), test=(X[2:5], Y[2:5]), name="mine")
    assert repr(data) == "Data('mine', 4 classes, inputs [2], 6 train, 2 validation, 3 test)"
    for split, rows in {"train": slice(None), "validation": slice(2), "test": slice(2, 5)}.items():
        x, y = data.split(split)
        assert torch.equal(x, X[rows]) and torch.equal(y, Y[rows])
        if split != "test":
            x, y = data.split(f"{split}_clean")
            assert torch.equal(x, X[rows]) and torch.equal(y, Y[rows])
    alone = Data.of(X, Y)
    assert alone.name == "data"
    for split in ("validation", "test"):
        assert [tuple(t.shape) for t in alone.split(split)] == [(0, 2), (0,)]


@pytest.mark.parametrize(
    ("y", "given", "num_classes"),
    [
        (Y, {}, 4),
        (Y, {"test": (X[:1], torch.tensor([6]))}, 7),
        (Y, {"num_classes": 10}, 10),
        (torch.zeros(6).long(), {}, 2),
        (Y.float(), {}, None),
        (Y.int(), {}, None),
        (torch.zeros(6, 3), {}, None),
        (Y[:, None].expand(6, 5), {}, None),
        (Y[:, None].expand(6, 5), {"num_classes": 4}, 4),
    ],
)
def test_classes_are_found_where_targets_are_int64(y, given, num_classes):
    assert Data.of(X, y, **given).num_classes == num_classes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, Y[:4]), ValueError, r"y_train must have one row for each of the 6 .*got shape \[4\]"),
        ((X, -Y), ValueError, r"y_train must be in 0 … 1 \(num_classes = 2\), got -3 … 0"),
        ((X, Y, (X[:, :1], Y)), ValueError, r"x_validation must .*like x_train, got \[1\]"),
        ((X, Y.float(), (X, Y)), ValueError, "y_validation must have targets .*got .*torch.int64"),
        (
            (X, Y, None, (X, Y[:1])),
            ValueError,
            "y_test must have one row for each of the 6 of x_test",
        ),
        ((X.numpy(), Y), TypeError, "x and y must be two tensors"),
    ],
)
def test_data_of_your_own_that_does_not_fit_together_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Data.of(*arguments)


@pytest.mark.parametrize(
    ("y", "num_classes", "message"),
    [
        (Y, 3, r"y_train must be in 0 … 2 \(num_classes = 3\), got 0 … 3"),
        (Y.float(), 4, "y_train must be int64 where num_classes is 4, got torch.float32"),
        (Y, 1, "num_classes must be a whole number >= 2, got 1"),
    ],
)
def test_the_number_of_classes_must_fit(y, num_classes, message):
    with pytest.raises(ValueError, match=message):
        Data.of(X, y, num_classes=num_classes)
