"""Flooding: the closed form, its gradient, and every shell equal to the kernel."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

from flatmin import FloodingLoss, flood, flood_gradients_
from flatmin.loss import Flooding

losses = st.floats(0, 50)
levels = st.floats(0, 5)
tensor = lambda values: torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------ the kernel


@given(losses, levels)
def test_closed_form(loss, level):
    flooded = flood(tensor(loss), level).item()
    assert flooded == abs(loss - level) + level
    assert flooded >= level
    if loss >= level:
        assert flooded == pytest.approx(loss, rel=1e-15, abs=1e-15)


@given(st.floats(0, 50, width=32), st.floats(0, 5))
def test_never_below_the_level_in_single_precision(loss, level):
    flooded = flood(torch.tensor(loss), level)
    assert flooded.dtype == torch.float32
    assert flooded >= torch.tensor(level)


@given(st.lists(losses, min_size=1))
def test_level_zero_is_the_loss(values):
    assert torch.equal(flood(tensor(values), 0), tensor(values))


@pytest.mark.parametrize("loss, sign", [(0.7, 1), (0.3, 1), (0.1, -1), (0.0, -1), (0.2, 0)])
def test_gradient_is_that_of_the_loss_with_the_sign_of_its_distance_to_the_level(loss, sign):
    w = tensor([1.5, -2.0]).requires_grad_()
    raw = lambda w: (w**2).sum() * loss / 6.25  # has the value `loss` at w
    value = raw(w) if sign else raw(w) * 0 + 0.2 + (w - w.detach()).sum()  # exactly at the level
    (raw_gradient,) = torch.autograd.grad(value, w, retain_graph=True)
    (gradient,) = torch.autograd.grad(flood(value, 0.2), w)
    torch.testing.assert_close(gradient, sign * raw_gradient, rtol=0, atol=0)


def test_elementwise_and_broadcast_with_a_tensor_of_levels():
    loss, level = torch.rand(4, 3).double(), torch.rand(3).double()
    flooded = flood(loss, level)
    assert flooded.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            assert flooded[i, j] == flood(loss[i, j], level[j].item())
    assert flood(tensor(0.1), level).shape == (3,)


def test_composes_with_vmap_and_grad():
    level = tensor([0.0, 0.2, 0.5])
    w = tensor([0.3, 0.1, 0.2])
    objective = lambda w, level: flood(w**2, level)
    gradients = vmap(grad(objective))(w, level)
    torch.testing.assert_close(gradients, torch.sign(w**2 - level) * 2 * w, rtol=0, atol=0)
    assert vmap(flood, in_dims=(0, None))(w, 0.2).shape == (3,)


@given(st.lists(losses, min_size=1, max_size=20), levels)
def test_flooding_examples_is_at_least_flooding_their_mean(values, level):  # Jensen
    each = Flooding(level, per_example=True)(tensor(values))
    batch = Flooding(level)(tensor(values), torch.arange(len(values)))  # whichever they are
    assert each >= batch - 1e-12 * (1 + batch.abs())
    if min(values) >= level or max(values) <= level:  # one side of the level: equality
        torch.testing.assert_close(each, batch, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "level, error",
    [
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (np.float32(-1), ValueError),
        ("0.1", ValueError),
        (True, ValueError),
        (None, ValueError),
        ([0.1], ValueError),
    ],
)
def test_bad_level_is_named_and_leaves_gradients_unchanged(level, error):
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.tensor([1.0, -2.0])
    for call in (
        lambda: flood(torch.tensor(0.3), level),
        lambda: FloodingLoss(nn.MSELoss(), level),
        lambda: Flooding(level),
        lambda: flood_gradients_([w], torch.tensor(0.3), level),
    ):
        with pytest.raises(error, match="flood_level must be .*, got ") as raised:
            call()
        assert repr(level) in str(raised.value)
    assert w.grad.tolist() == [1.0, -2.0]
