"""CutMix: torchvision's formula, areas and labels, one box for a batch, sequences, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatmin import fit
from flatmin.batch import CutMix
from flatmin.book import MLP, mnist1d
from flatmin.pipeline import Batch, Recipe


def batch(n=6, shape=(3, 12, 9), classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator)
    return Batch(x, torch.randint(classes, (n,), generator=generator), num_classes=classes)


def torchvision_cutmix(x, y, lam, center):
    """Its `v2.CutMix`, with λ and the center given: partners are the batch rolled by one."""
    height, width = x.shape[-2:]
    row, column = center
    r = 0.5 * math.sqrt(1.0 - lam)
    down, across = int(r * height), int(r * width)
    top, bottom = max(row - down, 0), min(row + down, height)
    left, right = max(column - across, 0), min(column + across, width)
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x.roll(1, 0)[..., top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, lam * y + (1 - lam) * y.roll(1, 0)


@given(st.floats(0, 1), st.integers(0, 11), st.integers(0, 8))
def test_equals_torchvision_at_its_lambda_box_and_pairing(lam, row, column):
    shown = batch()
    mask = CutMix().box(0.5 * math.sqrt(1 - lam), [(row + 0.5) / 12, (column + 0.5) / 9], (12, 9))
    partners = torch.arange(6).roll(1)
    mixed = CutMix()(shown, {"mask": mask, "partners": partners})
    one_hot = torch.nn.functional.one_hot(shown.y, 4).float()
    x, y = torchvision_cutmix(shown.x, one_hot, lam, (row, column))
    assert torch.equal(mixed.x, x)
    torch.testing.assert_close(mixed.y, y)


@pytest.mark.parametrize(
    "shape, dimensions", [((3, 12, 9), 2), ((40,), 1), ((2, 40), 1), ((2, 5, 6, 7), 3)]
)
def test_labels_are_shared_by_area(shape, dimensions):
    shown = batch(n=9, shape=shape)
    for seed in range(20):
        transform = CutMix(dimensions=dimensions)
        draw = transform.draw(shown, torch.Generator().manual_seed(seed))
        mixed = transform(shown, draw)
        own = (mixed.x == shown.x).flatten(1).float().mean(1)
        partner = (mixed.x == shown.x[draw["partners"]]).flatten(1).float().mean(1)
        torch.testing.assert_close(mixed.y.sum(1), torch.ones(9))
        other = shown.y != shown.y[draw["partners"]]
        share = mixed.y.gather(1, shown.y[:, None])[:, 0]
        torch.testing.assert_close(share[other], own[other])
        assert (own + partner >= 1 - 1e-6).all()


def test_the_share_that_is_kept_without_clipping_is_beta():
    """In the middle of a large image nothing is cut off: the area is 1 - λ, uniform for α = 1."""
    u = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    areas = [
        CutMix().box(0.5 * math.sqrt(1 - lam), [0.5, 0.5], (400, 400)).double().mean()
        for lam in u.tolist()
    ]
    torch.testing.assert_close(torch.stack(areas), 1 - u, rtol=0, atol=0.01)


def test_alpha_zero_is_erm_and_a_grid_is_each_of_its_values():
    data = mnist1d(train_size=60)
    settings = dict(steps=6, batch_size=20, seeds=2, device="cpu", dtype=torch.float64)
    network = lambda: MLP(40, 10, 10)
    both = fit(
        network, data, Recipe(batch=CutMix(dimensions=1)), grid={"alpha": [0.0, 1.0]}, **settings
    )
    plain = fit(network, data, **settings)
    one = fit(network, data, Recipe(batch=CutMix(1.0, dimensions=1)), **settings)
    for alpha, alone in ((0.0, plain), (1.0, one)):
        torch.testing.assert_close(
            torch.tensor(both.train_loss.sel(alpha=alpha).values),
            torch.tensor(alone.train_loss.values),
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CutMix(-1.0), "alpha must be a number >= 0, got -1.0"),
        (lambda: CutMix(dimensions=0), "dimensions must be a whole number >= 1, got 0"),
        (lambda: CutMix().draw(batch(shape=(40,)), torch.Generator()), "2 others for dimensions=2"),
        (lambda: CutMix()(batch()._replace(num_classes=None), {"mask": torch.ones(12, 9) > 0,
                                                              "partners": torch.arange(6)}),
         "batch.num_classes must be set"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
