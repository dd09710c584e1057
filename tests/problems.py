"""Small problems that several test files pose: a classifier with data, its twin, an odd operation."""

import copy

import torch

from flatmin.models import MLP


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(make=lambda: MLP(5, 8, 3), shape=(5,), n=23, seed=0):
    """A model in float64, n inputs, and their classes, three of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().double()
        for buffer in model.buffers():
            if buffer.is_floating_point():  # running statistics that are not 0 and 1
                buffer.uniform_(0.5, 1.5)
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    return model, random(n, *shape, seed=seed), y


def rescaled(model):
    """The same function: one layer of an MLP × 20, the next ÷ 20 (Dinh et al., 2017)."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (other[1].weight, other[1].bias):
            tensor *= 20
        other[3].weight /= 20
    return other


class Cube(torch.autograd.Function):
    """An operation of the old style, which torch.func refuses; twice differentiable."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient * ctx.saved_tensors[0] ** 2
