"""Flooding in your own loop: the loss module, and gradients that are accumulated."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flatmin import FloodingLoss, flood, flood_gradients_
from flatmin.loss import Flooding

losses = st.floats(0, 50)
levels = st.floats(0, 5)
tensor = lambda values: torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------ the loss module


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 2.5])
def test_loss_module_is_the_kernel(level):
    logits, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    each = nn.functional.cross_entropy(logits, y, reduction="none")
    mean = FloodingLoss(nn.CrossEntropyLoss(), level)(logits, y)
    per_example = FloodingLoss(nn.CrossEntropyLoss(reduction="none"), level)(logits, y)
    torch.testing.assert_close(mean, flood(each.mean(), level), rtol=1e-14, atol=0)
    torch.testing.assert_close(per_example, flood(each, level).mean(), rtol=0, atol=0)
    torch.testing.assert_close(mean, Flooding(level)(each), rtol=1e-14, atol=0)
    torch.testing.assert_close(per_example, Flooding(level, per_example=True)(each))


def test_loss_module_in_a_training_step_ascends_below_the_level():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    raw = nn.CrossEntropyLoss()
    FloodingLoss(raw, flood_level=10.0)(model(x), y).backward()
    raw(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, -q.grad, rtol=0, atol=0)
    before = raw(model(x), y).item()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert raw(model(x), y).item() > before


def test_repr_of_the_loss_module_shows_its_level():
    assert "flood_level=0.25" in repr(FloodingLoss(nn.MSELoss(), 0.25))


def test_a_tensor_level_moves_with_the_module_and_is_not_saved():
    criterion = FloodingLoss(nn.CrossEntropyLoss(), torch.tensor(0.25))
    assert criterion.state_dict() == {} and list(criterion.parameters()) == []
    assert "flood_level=0.25" in repr(criterion)
    model = nn.Sequential(criterion).double()
    assert criterion.flood_level.dtype == torch.float64
    assert copy.deepcopy(criterion).flood_level == 0.25
    model.to("meta")
    assert criterion.flood_level.is_meta and "flood_level=" in repr(criterion)
    logits, y = torch.empty(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    assert criterion(logits, y).is_meta
    number = FloodingLoss(nn.MSELoss(), 0.25).double()
    assert type(number.flood_level) is float


def test_a_level_that_is_learned_stays_a_parameter():
    level = nn.Parameter(tensor(1.0))
    criterion = FloodingLoss(nn.MSELoss(), level)
    assert [p is level for p in criterion.parameters()] == [True]
    criterion(tensor([0.1]), tensor([0.0])).backward()
    assert level.grad == 2  # of 2b - loss, below the level


# ------------------------------------------------------------------------- accumulated gradients


def accumulate(sizes, level, flood_each=False):
    """The gradients of a small network after microbatches, and the batch's mean raw loss."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(sum(sizes), 4).double(), torch.randint(3, (sum(sizes),))
    total = 0.0
    for part, target in zip(x.split(sizes), y.split(sizes), strict=True):
        loss = nn.functional.cross_entropy(model(part), target, reduction="sum") / len(x)
        if flood_each:
            mean = loss * len(x) / len(part)
            (flood(mean, level) * len(part) / len(x)).backward()
        else:
            loss.backward()
        total = total + loss.detach()
    return list(model.parameters()), total


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.5, 3.0]))
def test_microbatches_give_the_whole_batchs_flooded_gradient(sizes, level):
    parameters, total = accumulate(sizes, level)
    flood_gradients_(parameters, total, level)
    whole, _ = accumulate([sum(sizes)], level, flood_each=True)
    for p, q in zip(parameters, whole, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_flooding_every_microbatch_is_another_objective():
    w = tensor(1.0).requires_grad_()
    microbatches = tensor([0.1, 0.5])  # mean 0.3: above the level; the first alone: below
    for x in microbatches:
        (flood(w * x, 0.2) / 2).backward()
    per_microbatch = w.grad.item()
    w.grad = None
    for x in microbatches:
        (w * x / 2).backward()
    flood_gradients_([w], tensor(0.3), 0.2)
    assert per_microbatch == pytest.approx(0.2)  # (-0.1 + 0.5) / 2
    assert w.grad.item() == pytest.approx(0.3)


@pytest.mark.parametrize("loss, sign", [(0.3, 1), (0.1, -1), (0.2, 0)])
@pytest.mark.parametrize("level", [0.2, tensor(0.2)], ids=["number", "tensor"])
def test_gradients_get_the_sign_in_place(loss, sign, level):
    with_grad, without = nn.Parameter(tensor([1.0, 2.0])), nn.Parameter(tensor([3.0]))
    with_grad.grad = stored = tensor([0.5, -4.0])
    flood_gradients_(iter([with_grad, without]), tensor(loss), level)
    assert with_grad.grad is stored
    assert (stored == sign * tensor([0.5, -4.0])).all()
    assert without.grad is None


@pytest.mark.parametrize("loss", [math.nan, tensor(math.nan)], ids=["number", "tensor"])
def test_gradients_of_a_loss_that_is_nan_are_nan(loss):
    w = nn.Parameter(tensor([1.0, 2.0]))
    w.grad = tensor([0.5, 0.0])
    flood_gradients_([w], loss, 0.2)
    assert w.grad.isnan().all()


def test_an_infinite_loss_is_above_the_level():
    w = nn.Parameter(tensor([1.0, 2.0]))
    w.grad = tensor([0.5, -4.0])
    flood_gradients_([w], math.inf, 0.2)
    assert w.grad.tolist() == [0.5, -4.0]


def test_a_parameter_alone_or_named_twice_gets_the_sign_once():
    """As clip_grad_norm_ takes one; with tied weights, two parts of a model name the same."""
    w, v = nn.Parameter(tensor([1.0])), nn.Parameter(tensor([1.0]))
    for parameters in (w, [w, v, w]):
        w.grad, v.grad = tensor([0.5]), tensor([2.0])
        flood_gradients_(parameters, 0.1, 0.2)
        assert w.grad.item() == -0.5
    assert v.grad.item() == -2


def test_scale_of_a_grad_scaler_commutes():
    scale = 2.0**16
    plain, _ = accumulate([2, 3], 3.0)
    scaled, total = accumulate([2, 3], 3.0)
    for p in scaled:
        p.grad *= scale
    flood_gradients_(scaled, total, 3.0)  # the unscaled loss decides
    flood_gradients_(plain, total, 3.0)
    for p, q in zip(scaled, plain, strict=True):
        torch.testing.assert_close(p.grad / scale, q.grad, rtol=0, atol=0)


def test_half_precision_gradients_with_a_single_precision_loss():
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    w.grad = torch.ones(2, dtype=torch.bfloat16)
    flood_gradients_([w], torch.tensor(0.1), 0.2)
    assert w.grad.dtype == torch.bfloat16
    assert w.grad.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    "loss, level", [(tensor([0.1, 0.3]), 0.2), (tensor(0.1), tensor([0.2, 0.0]))]
)
def test_accumulated_gradients_need_one_loss_and_one_level(loss, level):
    w = nn.Parameter(torch.ones(3, 2))
    w.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"loss must be one number.*flood_level too.*\(2,\)"):
        flood_gradients_([w], loss, level)
    assert (w.grad == 1).all()
