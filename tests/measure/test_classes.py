"""Statistics of stiffness by class."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.measure import between_classes, class_matrix, within_classes

NAN = math.nan
seeds = st.integers(0, 10**6)


@settings(max_examples=60)
@given(seeds, st.integers(1, 8), st.integers(0, 8), st.integers(1, 4))
def test_class_matrix_is_the_double_loop(seed, n1, n2, k):
    generator = torch.Generator().manual_seed(seed)
    same = n2 == 0
    n2 = n2 or n1
    values = torch.randn(n1, n2, generator=generator).double()
    values[torch.rand(n1, n2, generator=generator) < 0.05] = NAN
    one, two = (torch.randint(k, (n,), generator=generator) for n in (n1, n2))
    two = one if same else two
    expected = torch.empty(k, k).double()
    for a, b in itertools.product(range(k), range(k)):
        chosen = [
            values[i, j].item()
            for i, j in itertools.product(range(n1), range(n2))
            if one[i] == a and two[j] == b and not (same and i == j)
        ]
        expected[a, b] = sum(chosen) / len(chosen) if chosen else NAN
    before = values.clone()
    found = class_matrix(values, one, None if same else two, num_classes=k)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(values, before, rtol=0, atol=0, equal_nan=True)
    diagonal, rest = expected.diagonal(), expected[~torch.eye(k, dtype=torch.bool)]
    for name, chosen in ((within_classes, diagonal), (between_classes, rest)):
        torch.testing.assert_close(name(found), chosen.mean(), equal_nan=True)


def test_only_missing_and_single_classes_are_nan():
    y = torch.tensor([0, 0, 2])  # no class 1, one example of class 2
    matrix = class_matrix(torch.ones(3, 3), y, num_classes=3)
    expected = [[1.0, NAN, 1.0], [NAN, NAN, NAN], [1.0, NAN, NAN]]
    torch.testing.assert_close(matrix, torch.tensor(expected), equal_nan=True)
    assert within_classes(matrix).isnan() and between_classes(matrix).isnan()
    other = class_matrix(torch.ones(3, 1), y, torch.tensor([2]), num_classes=3)
    torch.testing.assert_close(
        other, torch.tensor([[NAN, NAN, 1], [NAN] * 3, [NAN, NAN, 1]]), equal_nan=True
    )


def test_super_classes_are_the_class_matrix_of_the_class_matrix():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator).double()
    groups = torch.tensor([0, 1, 0, 1, 1])
    found = class_matrix(matrix, groups, num_classes=2)
    assert found[0, 0] == pytest.approx(((matrix[0, 2] + matrix[2, 0]) / 2).item())
    pairs = [(i, j) for i in (1, 3, 4) for j in (1, 3, 4) if i != j]
    assert found[1, 1] == pytest.approx(np.mean([matrix[p].item() for p in pairs]))
    across = [matrix[i, j].item() for i in (0, 2) for j in (1, 3, 4)]
    assert found[0, 1] == pytest.approx(np.mean(across))


@pytest.mark.parametrize(
    "shape, num_classes, match",
    [
        ((3, 2), 2, r"one row and one column per example, \(3, 3\), got shape \(3, 2\)"),
        ((3,), 2, r"got shape \(3,\)"),
        ((3, 3), 0, "num_classes must be a whole number >= 1, got 0"),
    ],
)
def test_class_matrix_names_what_is_wrong(shape, num_classes, match):
    with pytest.raises(ValueError, match=match):
        class_matrix(torch.ones(shape), torch.zeros(3), num_classes=num_classes)


@pytest.mark.parametrize("special", [math.inf, -math.inf, NAN])
def test_a_value_that_is_not_finite_stays_in_its_cell(special):
    y = torch.tensor([0, 0, 1, 1])
    values = torch.ones(4, 4)
    values[0, 2] = special
    expected = torch.tensor([[1.0, special], [1.0, 1.0]])
    found = class_matrix(values, y, num_classes=2)
    torch.testing.assert_close(found, expected, equal_nan=True)
    values[1, 2] = -special
    assert class_matrix(values, y, num_classes=2)[0, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_many_pairs(dtype):
    """300 examples make 89,700 pairs; half precision ends at 65,504."""
    values = torch.full((300, 300), 0.5, dtype=dtype)
    assert class_matrix(values, torch.zeros(300).long(), num_classes=1).tolist() == [[0.5]]
    signs = torch.ones(4, 4, dtype=torch.int64)
    assert class_matrix(signs, torch.tensor([0, 0, 1, 1]), num_classes=2).tolist() == [[1, 1]] * 2


@pytest.mark.parametrize(
    "classes",
    [
        torch.tensor([0, 1, 2]),
        torch.tensor([0, -1, 1]),
        torch.tensor([[0], [1], [1]]),
        torch.tensor([True, False, True]),
        torch.tensor([0.7, 1.0, 1.0]),
    ],
)
def test_classes_out_of_range_are_named(classes):
    for classes1, classes2, name in (
        (classes, None, "classes1"),
        (torch.tensor([0, 1, 1]), classes, "classes2"),
    ):
        message = rf"{name} must be whole numbers in \[0, 2\), of shape \[n\], got tensor"
        with pytest.raises(ValueError, match=message):
            class_matrix(torch.ones(3, 3), classes1, classes2, num_classes=2)
