"""Mixup in your own loop: a transform and a collate function."""

import warnings

import pytest
import torch
from problems import TRANSFORMS
from problems import labelled_batch as batch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from flatmin import BatchTransform, mix, soft_targets
from flatmin.batch import Gaussian, Mixup
from flatmin.pipeline import Batch
from flatmin.stack import stream

named = lambda value: repr(value) if not isinstance(value, torch.Tensor) else None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Toy(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return torch.full((3,), float(i)), i % 4


def test_the_transform_draws_what_fit_draws():
    x, y = batch(6)
    for stage in TRANSFORMS:
        transform = BatchTransform(stage, 4, seed=7)
        other = batch(6, seed=1) if getattr(stage, "second_stream", False) else ()
        for t in range(3):
            of = Batch(x, y, num_classes=4, other=Batch(*other) if other else None)
            expected = stage(of, stage.draw(of, stream(7, "batch", t)))
            found = transform(x, y, *other)
            assert torch.equal(found[0], expected.x) and torch.equal(found[1], expected.y)
        resumed = BatchTransform(stage, 4, seed=7)
        resumed.count = transform.count
        for a, b in zip(resumed(x, y, *other), transform(x, y, *other), strict=True):
            assert torch.equal(a, b)


def test_transform_and_collate_function_agree():
    after = BatchTransform(Mixup(0.5), 4, seed=3)
    within = BatchTransform(Mixup(0.5), 4, seed=3)
    loader = DataLoader(Toy(), batch_size=4)  # the last batch has 3
    collating = DataLoader(Toy(), batch_size=4, collate_fn=within.collate)
    for (x, y), (x2, y2) in zip(loader, collating, strict=True):
        shown, target = after(x, y)
        assert torch.equal(shown, x2) and torch.equal(target, y2)
        assert x2.shape == x.shape and y2.shape == (len(x), 4)
    lambda_form = lambda samples: after(*default_collate(samples))  # as with torchvision's
    for x, y in DataLoader(Toy(), batch_size=4, collate_fn=lambda_form):
        assert y.shape == (len(x), 4)
        cross_entropy(torch.randn(len(x), 4), y)


def test_a_batch_of_one():
    x, y = batch(1, (3, 4))
    shown, target = BatchTransform(Mixup(1.0), 4)(x, y)
    torch.testing.assert_close(shown, x)
    torch.testing.assert_close(target, soft_targets(y, 4))


def test_two_loaders():
    data = TensorDataset(torch.randn(10, 3), torch.arange(10) % 4)
    transform = BatchTransform(Mixup(1.0, second_stream=True), 4)
    second = DataLoader(data, 5, shuffle=True, generator=generator(4))
    for batch_, other in zip(DataLoader(data, 5), second, strict=True):
        draw = transform.transform.draw(
            Batch(*batch_, other=Batch(*other)), stream(0, "batch", transform.count)
        )
        x, y = transform(*batch_, *other)
        torch.testing.assert_close(
            x, mix(batch_[0], draw["weights"][0], draw["partners"][0], other[0])
        )


def test_workers_and_epochs_draw_differently_and_reproducibly():
    """Each worker gets a copy of the transform; with the same seed, all would draw the same."""

    def noise_of_two_epochs():
        transform = BatchTransform(Gaussian(1.0), 4, seed=1)
        loader = DataLoader(
            Toy(), batch_size=3, num_workers=2, collate_fn=transform.collate, generator=generator(9)
        )
        return [x[0] - 3 * b for _ in range(2) for b, (x, _) in enumerate(loader)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about forks of threaded processes
        first, second = noise_of_two_epochs(), noise_of_two_epochs()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first) == 8 == len({round(noise[0].item(), 4) for noise in first})


def test_samples_that_are_not_pairs_are_named():
    with pytest.raises(TypeError, match=r"samples must be pairs \(x, y\), got dict"):
        BatchTransform(Mixup(), 4).collate([{"x": torch.ones(2), "y": 0}])
    with pytest.raises(TypeError, match="other must be the inputs and the labels"):
        x, y = batch(2)
        BatchTransform(Mixup(), 4)(x, y, x)


def test_a_missing_second_batch_is_named():
    transform = BatchTransform(Mixup(second_stream=True), 4)
    with pytest.raises(TypeError, match="other must be a second batch if second_stream is True"):
        transform(*batch(2))
    with pytest.raises(TypeError, match="other must be a second batch"):
        transform.collate([(torch.ones(2), 0)])
    assert transform.count == 0


def test_autocast_and_a_training_step():
    """Half-precision inputs, soft targets in single precision, PyTorch's own loss."""
    torch.manual_seed(0)
    model, criterion = nn.Linear(7, 4), nn.CrossEntropyLoss()
    x, y = batch(6)
    shown, target = BatchTransform(Mixup(1.0), 4)(x.bfloat16(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(shown), target)
    loss.backward()
    assert loss.isfinite() and model.weight.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", TRANSFORMS, ids=named)
def test_a_batch_on_the_gpu_is_the_same(stage):
    x, y = batch(6)
    other = batch(6, seed=1) if getattr(stage, "second_stream", False) else ()
    cpu = BatchTransform(stage, 4)(x, y, *other)
    gpu = BatchTransform(stage, 4)(*(v.cuda() for v in (x, y, *other)))
    for a, b in zip(cpu, gpu, strict=True):
        assert b.is_cuda
        torch.testing.assert_close(a, b.cpu())
