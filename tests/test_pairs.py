"""The statistics of stiffness: by class, and by the distance of the inputs."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.measure import (
    between_classes,
    class_matrix,
    critical_length,
    input_distance,
    within_classes,
)
from flatmin.stack import stream

NAN = math.nan
seeds = st.integers(0, 10**6)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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


# --------------------------------------------------------------------------------------- distance


@given(seeds, st.floats(0.01, 100))
def test_distance_is_one_minus_the_cosine(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, 3, generator=generator).double()
    expected = 1 - F.cosine_similarity(x.flatten(1)[:, None], x.flatten(1), dim=-1)
    found = input_distance(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(input_distance(scale * x), expected)
    assert (found >= 0).all() and found.diagonal().abs().max() < 1e-12
    assert input_distance(torch.cat([x, 0 * x[:1]]))[5].isnan().all()


def arc(n=40, largest=2.0):
    angle = torch.linspace(0, largest, n).double()
    return input_distance(torch.stack([angle.cos(), angle.sin()], 1))


@pytest.mark.parametrize("xi", [0.2, 0.5, 1.1])
def test_critical_length_of_a_line_with_two_classes(xi):
    d = arc()
    y = torch.arange(40) % 2
    values = torch.where(
        y[:, None] == y, 0.8 * (1 - d / xi), NAN
    )  # NaN between classes, which are not used
    values.diagonal().fill_(1e9)  # the pair of an example with itself is not used either
    found = critical_length(values, d, y, resamples=50)
    assert found.xi == pytest.approx(xi, rel=1e-9)
    assert found.slope == pytest.approx(-0.8 / xi, rel=1e-9)
    assert found.intercept == pytest.approx(0.8, rel=1e-9)
    assert found.crossing == 1
    assert found.low == pytest.approx(xi, rel=1e-6) and found.high == pytest.approx(xi, rel=1e-6)


def test_critical_length_of_two_sets_is_that_of_polyfit():
    generator = torch.Generator().manual_seed(1)
    y1, y2 = torch.arange(30) % 3, torch.arange(20) % 3
    d = input_distance(torch.rand(50, 3, generator=generator))[:30, 30:]
    values = 0.3 - 2 * d + 0.2 * torch.randn(30, 20, generator=generator)
    found = critical_length(values, d, y1, y2)
    pairs = y1[:, None] == y2
    slope, intercept = np.polyfit(d[pairs].double(), values[pairs].double(), 1)
    assert found.slope == pytest.approx(slope) and found.intercept == pytest.approx(intercept)
    assert found.xi == pytest.approx(-intercept / slope)
    assert found.low < found.xi < found.high
    assert found == critical_length(values, d, y1, y2)  # the same resamples


@pytest.mark.parametrize("same", [True, False])
def test_bootstrap_is_the_fit_to_all_pairs_of_drawn_examples(same):
    generator = torch.Generator().manual_seed(5)
    d = input_distance(torch.rand(21, 3, generator=generator)).double()
    d = d[:12, :12] if same else d[:12, 12:]
    y1, y2 = (torch.arange(n) % 2 for n in d.shape)
    values = 0.2 - d + 0.01 * torch.randn(d.shape, generator=generator)
    found = critical_length(values, d, y1, None if same else y2, resamples=15)
    rows, columns = (
        torch.randint(n, (15, n), generator=stream(0, f"bootstrap of {what}"))
        for n, what in zip(d.shape, ("rows", "columns"), strict=True)
    )
    lengths = []
    for one, two in zip(rows.tolist(), (rows if same else columns).tolist(), strict=True):
        pairs = [(i, j) for i in one for j in two if y1[i] == y2[j] and not (same and i == j)]
        slope, intercept = np.polyfit(*([m[p].item() for p in pairs] for m in (d, values)), 1)
        lengths.append(-intercept / slope)
    assert found.crossing == 1
    assert found.low == pytest.approx(np.quantile(lengths, 0.025))
    assert found.high == pytest.approx(np.quantile(lengths, 0.975))


def test_bootstrap_is_of_examples():
    """An effect of examples, not of pairs, is known from n examples to 1/√n, not to 1/n."""
    generator = torch.Generator().manual_seed(0)
    effect, d = 0.3 * torch.randn(60, generator=generator).double(), arc(60)
    values = 0.5 - d + effect[:, None] + effect
    found = critical_length(values, d, torch.zeros(60))
    pairs = ~torch.eye(60, dtype=torch.bool)
    residual = (values - found.intercept - found.slope * d)[pairs]
    if_pairs_were_independent = 2 * 1.96 * residual.std() / math.sqrt(60 * 59) / abs(found.slope)
    assert found.high - found.low > 3 * if_pairs_were_independent


@pytest.mark.parametrize("intercept, slope", [(1.0, -0.1), (-0.5, -1.0), (-0.5, 1.0), (0.5, 0.0)])
def test_no_length_where_the_line_does_not_fall_to_zero_within_the_data(intercept, slope):
    d = arc()
    found = critical_length(intercept + slope * d, d, torch.zeros(40), resamples=20)
    assert math.isnan(found.xi) and math.isnan(found.low) and math.isnan(found.high)
    assert found.crossing == 0
    assert found.intercept == pytest.approx(intercept)
    assert found.slope == pytest.approx(slope, abs=1e-12)


def test_no_interval_where_too_few_resamples_cross():
    generator = torch.Generator().manual_seed(0)
    d = arc(12, 1.0)
    values = float(d.max()) * 0.98 - d + 0.3 * torch.randn(12, 12, generator=generator)
    found = critical_length(values, d, torch.zeros(12), resamples=300)
    assert 0 < found.crossing < 0.95
    assert math.isnan(found.low) and math.isnan(found.high)


def test_no_length_without_pairs_or_with_one_distance_or_a_nan():
    for values, d, y in (
        (torch.ones(3, 3), torch.ones(3, 3), torch.arange(3)),  # no pair within a class
        (torch.ones(3, 3), torch.ones(3, 3), torch.zeros(3)),  # one distance
        (torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1)),
        (torch.full((40, 40), NAN), arc(), torch.zeros(40)),
    ):
        assert math.isnan(critical_length(values, d, y, resamples=5).xi)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"values": torch.ones(2, 3)}, r"values must have shape \(3, 3\), got \(2, 3\)"),
        ({"distance": torch.ones(3)}, r"distance must have shape \(3, 3\), got \(3,\)"),
        ({"resamples": 0}, "resamples must be a whole number >= 1, got 0"),
    ],
)
def test_critical_length_names_what_is_wrong(change, match):
    ones = torch.ones(3, 3)
    arguments = {"values": ones, "distance": ones, "classes1": torch.zeros(3)}
    with pytest.raises(ValueError, match=match):
        critical_length(**(arguments | change))
