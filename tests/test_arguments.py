"""Arrays, lists and numbers where tensors are meant: an error that says so, no wrong number."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin import (
    BatchTransform,
    Data,
    FloodingLoss,
    flood,
    flood_gradients_,
    mix,
    mix_losses,
    soft_targets,
)
from flatmin.batch import CutMix, Dirac, Gaussian, LabelSmoothing, Mixup, combine, dirichlet_weights
from flatmin.book import critical_length, input_distance, sinusoid
from flatmin.book.datasets import flip_labels
from flatmin.loss import Flooding
from flatmin.pipeline import Batch

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
PI, D = torch.tensor([1, 0, 3, 2]), torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
each = nn.CrossEntropyLoss(reduction="none")
generator = lambda: torch.Generator().manual_seed(0)


def with_gradient():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    return w


def stage_call(stage, x, y):
    batch = Batch(x, y, num_classes=3)
    return stage(batch, stage.draw(batch, generator()))


# For each argument that is a tensor: its name, a good value, a call with a value in its place.
CALLS = {
    "flood": ("loss", X, lambda v: flood(v, 0.1)),
    "FloodingLoss": ("loss", X, lambda v: FloodingLoss(lambda: v, 0.1)()),
    "Flooding": ("losses", X[0], lambda v: Flooding(0.1)(v)),
    "iFlood": ("losses", X[0], lambda v: Flooding(0.1, per_example=True)(v)),
    "soft_targets": ("y", Y, lambda v: soft_targets(v, 3)),
    "mix": ("values", X, lambda v: mix(v, 0.3, PI)),
    "mix permutation": ("permutation", PI, lambda v: mix(X, 0.3, v)),
    "mix other": ("other", X, lambda v: mix(X, 0.3, PI, v) if v is not None else v),
    "mix_losses logits": ("logits", X, lambda v: mix_losses(each, v, Y, 0.3, PI)),
    "mix_losses y": ("y", Y, lambda v: mix_losses(each, X, v, 0.3, PI)),
    "mix_losses permutation": ("permutation", PI, lambda v: mix_losses(each, X, Y, 0.3, v)),
    "mix_losses y_other": ("y_other", Y, lambda v: mix_losses(each, X, Y, 0.3, PI, v)),
    "combine values": ("values", X, lambda v: combine([0.5, 0.5], [X, v])),
    "combine weights": ("weights", torch.ones(4), lambda v: combine([0.5, v], [X, X])),
    "dirichlet_weights": ("u", D.double(), lambda v: dirichlet_weights(v, 1.0)),
    "Mixup x": ("x", X, lambda v: stage_call(Mixup(), v, Y)),
    "Mixup y": (r"batch\.y", Y, lambda v: stage_call(Mixup(), X, v)),
    "Gaussian x": (r"batch\.x", X, lambda v: stage_call(Gaussian(), v, Y)),
    "LabelSmoothing x": ("x", X, lambda v: stage_call(LabelSmoothing(), v, Y)),
    "LabelSmoothing y": ("y", Y, lambda v: stage_call(LabelSmoothing(), X, v)),
    "CutMix x": (r"batch\.x", X, lambda v: stage_call(CutMix(dimensions=1), v, Y)),
    "CutMix y": ("y", Y, lambda v: stage_call(CutMix(dimensions=1), X, v)),
    "BatchTransform x": ("x", X, lambda v: BatchTransform(Dirac(), 3)(v, Y)),
    "BatchTransform y": ("y", Y, lambda v: BatchTransform(Gaussian(), 3)(X, v)),
    "BatchTransform x2": ("x2", X, lambda v: BatchTransform(Mixup(), 3)(X, Y, v, Y)),
    "BatchTransform y2": ("y2", Y, lambda v: BatchTransform(Mixup(), 3)(X, Y, X, v)),
    "Data.of x": ("x and y", X, lambda v: Data.of(v, Y)),
    "Data.of y": ("x and y", Y, lambda v: Data.of(X, v)),
    "Data.of test": ("test", Y, lambda v: Data.of(X, Y, test=(X, v))),
    "Data": ("y_train_clean", Y, lambda v: Data("d", 3, X, Y, X, Y, X, Y, v, Y)),
    "input_distance": ("x", X, lambda v: input_distance(v)),
    "critical_length values": ("values", D, lambda v: critical_length(v, D, Y, resamples=9)),
    "critical_length distance": ("distance", D, lambda v: critical_length(D, v, Y, resamples=9)),
    "critical_length classes1": ("classes1", Y, lambda v: critical_length(D, D, v, resamples=9)),
    "critical_length classes2": ("classes2", Y, lambda v: critical_length(D, D, Y, v, resamples=9)),
    "flip_labels": ("y", Y, lambda v: flip_labels(v, 3, 0.5, generator())),
}
OPTIONAL = {"mix other", "mix_losses y_other", "critical_length classes2"}


@pytest.mark.parametrize("wrong", ["array", "list", "None", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_is_named(name, wrong):
    argument, good, call = CALLS[name]
    call(good)
    if wrong == "None" and name in OPTIONAL:
        return
    value = {"array": good.numpy(), "list": good.tolist(), "None": None, "text": "abcd"}[wrong]
    kind = {"array": "ndarray", "list": "list", "None": "NoneType", "text": "str"}[wrong]
    with pytest.raises(
        TypeError, match=rf"^{argument} must be (a|two) tensors?.*\b{kind}"
    ) as raised:
        call(value)
    hint = "torch.as_tensor" in str(raised.value)
    assert hint == (wrong in ("array", "list") or name.startswith("Data.of"))


@pytest.mark.parametrize("name", ["flood", "FloodingLoss", "Flooding", "iFlood"])
def test_a_number_is_no_loss(name):
    for number in (0.3, np.float32(0.3)):
        with pytest.raises(TypeError, match=r"must be a tensor, got float.*; torch.as_tensor\("):
            CALLS[name][2](number)


@pytest.mark.parametrize(
    "parameters",
    [[np.ones(2)], None, nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)), {"w": 1}, [1.0]],
    ids=["array", "None", "module", "container", "dictionary", "number"],
)
def test_gradients_of_what_is_no_parameter(parameters):
    w = with_gradient()
    mixed = [w, *parameters] if isinstance(parameters, list) else parameters
    with pytest.raises(TypeError, match="parameters must be tensors, such as model.parameters"):
        flood_gradients_(mixed, torch.tensor(0.05), 0.1)
    assert w.grad.tolist() == [1, 1]


@pytest.mark.parametrize("loss", [np.array(0.05), [0.05], None, "0.05"])
def test_an_accumulated_loss_is_a_number_or_a_tensor(loss):
    w = with_gradient()
    with pytest.raises(TypeError, match="loss must be a tensor, got"):
        flood_gradients_([w], loss, 0.1)
    assert w.grad.tolist() == [1, 1]
    flood_gradients_([w], np.float64(0.05), 0.1)
    assert w.grad.tolist() == [-1, -1]


def test_a_loss_module_needs_a_function():
    with pytest.raises(TypeError, match="loss must be a function, such as nn.MSELoss.*, got 3"):
        FloodingLoss(3, 0.1)


@pytest.mark.parametrize("transform", [None, Mixup, nn.Linear(1, 1), "mixup", lambda x, y: (x, y)])
def test_a_transform_is_a_batch_stage(transform):
    with pytest.raises(TypeError, match=r"transform must be a batch stage, such as Mixup\(0.2\)"):
        BatchTransform(transform, 3)


def test_values_of_other_shapes_do_not_broadcast():
    for call in (
        lambda: mix(X, 0.3, PI, X[:, :1]),
        lambda: combine([0.5, 0.5], [X[:, 0], X[:, :1]]),
        lambda: BatchTransform(Mixup(), 3)(X, Y, X[:, :1], Y),
    ):
        with pytest.raises(ValueError, match=r"values must be alike in shape, got \[\[4"):
            call()
    z, y, squares = torch.randn(4, 1), torch.randn(4), lambda z, y: (z - y) ** 2
    with pytest.raises(ValueError, match=r"criterion must return one loss per example.*\(4, 4\)"):
        mix_losses(squares, z, y, 0.3, PI)
    same = mix_losses(squares, z, y[:, None], 0.3, PI)
    torch.testing.assert_close(
        same, 0.3 * (z - y[:, None]) ** 2 + 0.7 * (z - y[PI, None]) ** 2, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("weights, values", [([0.5], [X, X]), ([0.5, 0.5], [X]), ([], [])])
def test_as_many_weights_as_values(weights, values):
    with pytest.raises(ValueError, match="weights must be as many as values, and at least one"):
        combine(weights, values)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), None, "1"])
def test_the_parameter_of_a_distribution(alpha):
    with pytest.raises(ValueError, match="alpha must be a number >= 0, got"):
        dirichlet_weights(D.double(), alpha)
    if isinstance(alpha, float):  # tensors are not inspected, but NaN is not taken for 0
        assert dirichlet_weights(D.double(), torch.tensor(alpha)).isnan().all()


@pytest.mark.parametrize("u", [torch.tensor(0.3), torch.ones(1, 2, dtype=torch.int64)])
def test_uniform_numbers_are_floating_point(u):
    with pytest.raises(ValueError, match=r"u must be floating point, \[k-1, ...\], got torch"):
        dirichlet_weights(u, 1.0)


STAGES = [
    Mixup(),
    Mixup(partners="same"),
    Mixup(partners="different"),
    LabelSmoothing(),
    CutMix(1.0, 1),
]


@pytest.mark.parametrize("stage", STAGES, ids=repr)
def test_kinds_of_labels(stage):
    """Whole numbers and one-hot labels of any type mean the same; everything else is named."""
    expected = BatchTransform(stage, 3)(X, Y)
    one_hot = torch.eye(3)[Y]
    for y in (
        Y.int(),
        Y.to(torch.uint8),
        one_hot,
        one_hot.double(),
        one_hot.long(),
        one_hot.bool(),
    ):
        x, target = BatchTransform(stage, 3)(X, y)
        assert torch.equal(x, expected[0]) and torch.equal(target, expected[1])
    two = Y.clamp(max=1)
    assert torch.equal(
        BatchTransform(stage, 2)(X, two.bool())[1], BatchTransform(stage, 2)(X, two)[1]
    )
    for y in (Y.float(), Y[:, None], Y[:, None].float(), torch.eye(5)[Y], Y[:, None].expand(4, 5)):
        transform = BatchTransform(stage, 3)
        with pytest.raises(ValueError, match=r"y must be labels, .*probabilities \[n, 3\], got"):
            transform(X, y)
        assert transform.count == 0  # the next batch draws as if nothing had been
    for y in (Y + 1, Y - 100):
        with pytest.raises(ValueError, match=r"y must be in 0 … 2, got"):
            BatchTransform(stage, 3)(X, y)
    with pytest.raises(ValueError, match=r"y must have one row for each row of x, got .*\[\]"):
        BatchTransform(stage, 3)(X, torch.tensor(1))
    for n in (0, 1):
        x, target = BatchTransform(stage, 3)(X[:n], Y[:n])
        assert x.shape == (n, 3) and target.shape == (n, 3)


def test_a_second_batch_is_checked_and_never_ignored():
    transform = BatchTransform(Mixup(), 3)
    with pytest.raises(ValueError, match=r"y2 must have one row for each row of x2, got"):
        transform(X, Y, X[:2], Y)
    with pytest.raises(ValueError, match=r"y2 must be in 0 … 2, got 1 … 3"):
        transform(X, Y, X, Y + 1)
    for stage in (Gaussian(), LabelSmoothing(), CutMix(dimensions=1), Dirac()):
        with pytest.raises(TypeError, match="other must not be given: .* takes one batch"):
            BatchTransform(stage, 3)(X, Y, X, Y)


def test_a_loss_that_is_nan_stays_nan():
    """Also where the flooded loss averages, or counts the example below the level."""
    model = nn.Linear(3, 3)
    x = X.clone()
    x[0, 0] = torch.nan
    for stage in (Flooding(0.1), Flooding(9.0), Flooding(0.1, per_example=True)):
        loss = stage(cross_entropy(model(x), Y, reduction="none"))
        model.zero_grad()
        loss.backward()
        assert loss.isnan() and model.weight.grad.isnan().any()
    assert mix(X, torch.tensor(torch.nan), PI).isnan().all()
    assert mix_losses(each, X, Y, torch.tensor(torch.nan), PI).isnan().all()


@pytest.mark.parametrize(
    "y, generator, error, message",
    [
        (Y.float(), generator(), ValueError, r"y must be labels, int64 \[n\], got torch.float32"),
        (Y[:, None], generator(), ValueError, r"y must be labels, int64 \[n\], got .*\[4, 1\]"),
        (Y.to(torch.uint8), generator(), ValueError, r"y must be labels, int64 .*uint8"),
        (Y + 1, generator(), ValueError, "y must be in 0 … 2, got 1 … 3"),
        (Y, None, TypeError, "generator must be a torch.Generator, got None"),
    ],
)
def test_labels_to_flip(y, generator, error, message):
    with pytest.raises(error, match=message):
        flip_labels(y, 3, 0.5, generator)


def test_noise_that_is_added_in_place_is_noise():
    x, y = X.clone(), Y.clone()
    data = Data.of(x, y, validation=(x, y.clone()))
    data.y_train[0] = 2
    data.y_validation[1] = 0
    assert data.y_train_clean.tolist() == data.y_validation_clean.tolist() == Y.tolist()
    assert "4 train (1 noisy)" in repr(data)
    first = sinusoid(train_size=5, test_size=5)
    first.x_train.zero_()
    assert sinusoid(train_size=5, test_size=5).x_train.abs().sum() > 0
