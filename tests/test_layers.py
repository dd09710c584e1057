"""Dropout whose randomness is a function of its buffers."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils.checkpoint import checkpoint

from flatmin.book import MLP
from flatmin.layers import Dropout, _random_bits

batch_norms = pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])


def masks(p, layers, passes, shape=(100, 200)):
    """Which units are kept, [layers, passes, *shape], for layers made one after another."""
    torch.manual_seed(0)
    x = torch.ones(shape)
    return torch.stack(
        [
            torch.stack([layer(x) != 0 for _ in range(passes)])
            for layer in [Dropout(p) for _ in range(layers)]
        ]
    )


def hashed(key, counter, position):
    """The dropout hash in Python's unbounded integers, cut to 64 and 32 bits by hand."""
    word = (key + counter * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    word ^= word >> 31
    bits = position ^ word >> 32
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
    bits = (bits ^ bits >> 15 ^ word % 2**32) * 0x846CA68B % 2**32
    bits ^= bits >> 16
    return bits - 2**32 * (bits >= 2**31)


@pytest.mark.parametrize("key", [0, 1, 2**40 + 12345, 2**62 - 1])
@pytest.mark.parametrize("counter", [0, 1, 10**9])
def test_the_dropout_hash_does_not_change(key, counter):
    """So that a run resumed with another version drops the same units."""
    found = _random_bits(torch.tensor(key), torch.tensor(counter), 50).tolist()
    assert found == [hashed(key, counter, position) for position in range(50)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_keeps_independently_with_probability_one_minus_p(p):
    """Within five standard errors of independent draws; the key and so the result is fixed."""
    kept = masks(p, layers=4, passes=25).double()
    z = (kept - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0 and variance 1, if independent
    n = kept[0, 0].numel()
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5)
    each_pass = z.flatten(2).mean(2) * n**0.5
    assert each_pass.abs().max() < 5
    assert each_pass.square().mean().item() == pytest.approx(1, abs=5 * (2 / 100) ** 0.5)

    def correlation(a, b):
        product = a * b
        return (product.mean() * product.numel() ** 0.5).abs().item()

    for lag in (1, 2, 7, 64):
        assert correlation(z[..., lag:], z[..., :-lag]) < 5, f"units {lag} apart"
        assert correlation(z[..., lag:, :], z[..., :-lag, :]) < 5, f"examples {lag} apart"
    for lag in (1, 2, 8):
        assert correlation(z[:, lag:], z[:, :-lag]) < 5, f"passes {lag} apart"
    for a in range(4):
        for b in range(a):
            assert correlation(z[a], z[b]) < 5, "two layers"


def test_dropout_with_neighbouring_keys_and_counters_is_independent():
    """Keys and counters that differ in few bits, which a weak hash would correlate."""
    kept = []
    for key in (0, 1, 2, 3, 4, 2**32, 2**61):
        layer = Dropout(0.5)
        layer.key.fill_(key)
        kept += [layer(torch.ones(20_000)) != 0 for _ in range(4)]
    z = 2 * torch.stack(kept).double() - 1
    correlations = (z @ z.T / 20_000 - torch.eye(len(z))).abs() * 20_000**0.5
    assert correlations.max() < 5


def test_dropout_is_unbiased_and_scales_gradients_as_outputs():
    torch.manual_seed(1)
    layer, x = Dropout(0.3).double(), torch.randn(50, 40).double().requires_grad_()
    y = layer(x)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.7)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (~dropped).double() / 0.7)
    mean = torch.stack([layer(torch.ones(1000)) for _ in range(400)]).mean()
    assert mean.item() == pytest.approx(1, abs=5 * (0.3 / 0.7 / 400_000) ** 0.5)


def test_dropout_is_the_identity_in_eval_mode_and_at_zero():
    x = torch.randn(3, 4)
    layer = Dropout(0.5).eval()
    assert layer(x) is x and layer.counter == 0
    assert Dropout(0.0)(x) is x


def test_dropout_continues_where_a_saved_layer_stopped():
    torch.manual_seed(0)
    layer, other, x = Dropout(0.5), Dropout(0.5), torch.ones(200)
    before = [layer(x) for _ in range(3)]
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    for _ in range(2):
        again = layer(x)
        assert torch.equal(again, other(x))
        assert not any(torch.equal(again, b) for b in before)
    assert layer.counter == 5


def test_dropout_neither_reads_nor_changes_the_random_state_in_a_pass():
    layers = [Dropout(0.5) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = layers[0](torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(4)
    assert torch.equal(layers[1](torch.ones(100)), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (2, 3, 4, 5)])
def test_dropout_keeps_shape_and_dtype(shape, dtype):
    x = torch.ones(shape, dtype=dtype)
    y = Dropout(0.5)(x)
    assert y.shape == x.shape and y.dtype == dtype
    assert (x == 1).all()


def test_dropout_drops_what_is_not_finite():
    x = torch.full((1000,), torch.nan)
    y = Dropout(0.5)(x)
    assert 400 < (y == 0).sum() < 600 and (y.isnan() | (y == 0)).all()


def test_stacked_dropout_is_each_single_one():
    torch.manual_seed(0)
    modules = [MLP(12, 9, 7, 3, batch_norm=True, dropout=0.4) for _ in range(3)]
    x = torch.randn(3, 5, 12)
    parameters, buffers = stack_module_state(modules)
    template = copy.deepcopy(modules[0])

    def forward(parameters, buffers, x):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(template, (parameters, buffers), (x,)), buffers

    for step in range(2):
        outputs, buffers = torch.vmap(forward)(parameters, buffers, x)
        for run, module in enumerate(modules):
            torch.testing.assert_close(outputs[run], module(x[run]))
            for name, buffer in module.named_buffers():
                torch.testing.assert_close(buffers[name][run], buffer)
        assert (buffers["4.counter"] == step + 1).all()


@batch_norms
def test_dropout_in_an_mlp_does_not_change_the_initial_weights_and_buffers(batch_norm):
    make = lambda **more: (torch.manual_seed(4), MLP(6, 5, 4, 3, batch_norm=batch_norm, **more))[1]
    plain, zero, dropping = make(), make(dropout=0.0), make(dropout=0.3)
    assert plain.state_dict().keys() == zero.state_dict().keys()
    for others in (zero, dropping):
        pairs = zip(plain.parameters(), others.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    kinds = [type(layer) for layer in dropping]
    hidden = [nn.Linear, *[nn.BatchNorm1d] * batch_norm, nn.ReLU, Dropout]
    assert kinds == [nn.Flatten, *hidden, *hidden, nn.Linear]
    x = torch.randn(8, 6)
    assert not torch.equal(dropping(x), dropping(x))
    torch.testing.assert_close(make(dropout=0.3).eval()(x), make().eval()(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_drops_the_same_units_on_a_gpu():
    layer = Dropout(0.3)
    gpu = copy.deepcopy(layer).cuda()
    x = torch.randn(64, 100)
    for _ in range(3):
        torch.testing.assert_close(gpu(x.cuda()).cpu(), layer(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_would_drop_other_units_and_is_refused(reentrant):
    block, x = nn.Sequential(nn.Linear(3, 8), Dropout(0.5)), torch.ones(2, 3, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="must not be called in a backward pass"):
        y.sum().backward()
    checkpoint(block.eval(), x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None


def test_a_probability_that_the_hash_cannot_resolve_is_refused():
    for p in (1 - 2**-33, 1 - 1e-12):
        with pytest.raises(ValueError, match=r"p must be at most 1 - 2\*\*-32, got 0.99"):
            Dropout(p)
    assert not Dropout(1 - 2**-32)(torch.ones(1000)).any()
