"""Convolutions as products of matrices, beside PyTorch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from flatmin import training
from flatmin._convolution import MatrixConvolutions, convolve
from flatmin.models import ResNet, SmallCNN
from flatmin.optimizers import SGD
from flatmin.sam import SAMGradient
from flatmin.training import Recipe, fit

pairs = lambda low, high: st.integers(low, high) | st.tuples(*[st.integers(low, high)] * 2)


@settings(deadline=None, max_examples=100)
@given(
    kernel=pairs(1, 3), stride=pairs(1, 3), padding=pairs(0, 2), dilation=pairs(1, 2),
    bias=st.booleans(), size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
)  # fmt: skip
def test_it_is_the_convolution(kernel, stride, padding, dilation, bias, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with MatrixConvolutions():
        y = conv(x)
    torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
        (nn.Conv2d(3, 6, 3, padding="same"), (2, 3, 7, 7)),
        (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 7, 7)),
        (nn.Conv2d(3, 6, 3), (3, 7, 7)),  # no batch
    ],
)
def test_what_is_no_such_product_is_left_as_it_is(conv, shape):
    x = torch.randn(shape)
    with MatrixConvolutions():
        y = conv(x)
    torch.testing.assert_close(y, conv(x))


def test_a_kernel_that_does_not_fit_is_refused_as_usual():
    conv, x = nn.Conv2d(1, 1, 5), torch.zeros(2, 1, 3, 3)
    with pytest.raises(RuntimeError) as usual:
        conv(x)
    with pytest.raises(RuntimeError) as ours:
        convolve(x, conv.weight, conv.bias)
    assert str(ours.value) == str(usual.value)


@pytest.mark.filterwarnings("error:There is a performance drop")
def test_gradients_of_a_stack():
    torch.manual_seed(0)
    networks = [ResNet(8, 3, 2, width=4, batch_norm=False).double() for _ in range(3)]
    for network in networks:
        for scale in (w for w in network.parameters() if w.ndim == 0):
            nn.init.ones_(scale)  # or no gradient would reach the branches
    params, buffers = stack_module_state(networks)
    params = {name: w.detach() for name, w in params.items()}
    x, y = torch.randn(3, 5, 2, 8, 8, dtype=torch.float64), torch.randint(3, (3, 5))

    def loss(params, buffers, x, y):
        logits = functional_call(networks[0], (params, buffers), (x,))
        return nn.functional.cross_entropy(logits, y)

    usual = vmap(grad(loss))(params, buffers, x, y)
    with MatrixConvolutions():
        found = vmap(grad(loss))(params, buffers, x, y)
    torch.testing.assert_close(found, usual)


@pytest.fixture
def images(tmp_path):
    from flatmin.experiments import vision

    return vision.load("synthetic", 48, 16)


def sharp_runs(data, device):
    return fit(
        lambda: SmallCNN(3, 10, (4, 4)), data,
        Recipe(gradient=SAMGradient(m=4), optimizer=SGD(0.05)), steps=6, batch_size=16,
        seeds=2, grid={"rho": [0.0, 0.1]}, evaluate_at=[0, 6], dtype=torch.float64, device=device,
    )  # fmt: skip


def test_a_stack_ends_where_it_does_with_the_usual_ones(images, monkeypatch):
    usual, calls = sharp_runs(images, "cpu"), []

    class Counted(MatrixConvolutions):
        def __enter__(self):
            calls.append(1)
            return super().__enter__()

    monkeypatch.setattr(training, "nullcontext", Counted)  # in place of the CPU's
    found = sharp_runs(images, "cpu")
    assert len(calls) >= 6
    torch.testing.assert_close(
        torch.tensor(found.train_loss.values), torch.tensor(usual.train_loss.values)
    )
    assert found.train_loss.max() > 0.1


@pytest.mark.gpu
def test_the_same_runs_on_a_gpu(images, monkeypatch):
    entered = []
    real = training.MatrixConvolutions
    monkeypatch.setattr(training, "MatrixConvolutions", lambda: entered.append(1) or real())
    gpu, cpu = sharp_runs(images, "cuda"), sharp_runs(images, "cpu")
    assert entered
    torch.testing.assert_close(
        torch.tensor(gpu.train_loss.values), torch.tensor(cpu.train_loss.values)
    )
