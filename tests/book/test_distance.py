"""Stiffness by the distance of the inputs: the critical length."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flatmin.book import critical_length, input_distance
from flatmin.stack import stream

NAN = math.nan
seeds = st.integers(0, 10**6)


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


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
def test_distance_at_the_ends_of_single_precision(scale):
    x = scale * torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert input_distance(x).tolist() == [[0, 1, 2], [1, 0, 1], [2, 1, 0]]


def test_distance_of_images_as_bytes():
    pixels = torch.randint(256, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    expected = input_distance(pixels.double())
    torch.testing.assert_close(
        input_distance(pixels.to(torch.uint8)).double(), expected, atol=1e-6, rtol=0
    )


def test_distance_of_other_types():
    """|-128| is -128 in int8, whose sums are too; half precision has three digits."""
    x = torch.tensor([[-128, -128], [1, 1], [-128, 0]])
    cosines = torch.tensor([[1, -1, 0.5**0.5], [-1, 1, -(0.5**0.5)], [0.5**0.5, -(0.5**0.5), 1]])
    for dtype in (torch.int8, torch.int64, torch.float16, torch.bfloat16):
        found = input_distance(x.to(dtype))
        torch.testing.assert_close(found, 1 - cosines, rtol=0, atol=1e-6)
    half = 1 - 0.5**0.5
    masks = input_distance(torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(masks, torch.tensor([[0, half], [half, 0]]), rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="x must be real, got torch.complex64"):
        input_distance(torch.ones(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "classes, message",
    [
        ((torch.zeros(4, 1),), r"classes1 must be of shape \[n\], got \[4, 1\]"),
        ((torch.zeros(4), torch.tensor(1)), r"classes2 must be of shape \[n\], got \[\]"),
        ((torch.zeros(3),), r"values must have shape \(3, 3\), got \(4, 4\)"),
    ],
)
def test_classes_of_other_shapes_are_named(classes, message):
    with pytest.raises(ValueError, match=message):
        critical_length(torch.rand(4, 4), torch.rand(4, 4), *classes)
    with pytest.raises(ValueError, match=r"x must be of shape \[n, ...\], got \[3\]"):
        input_distance(torch.rand(3))


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
