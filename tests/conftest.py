"""What all tests share: one thread per process, reproducible Hypothesis runs, the GPU mark."""

import os

# before torch is imported, because the tests run in several processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.func import functional_call, grad

collect_ignore = ["typed_use.py"]  # mypy's

settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("here", deadline=None)  # the first call of a torch kernel is slow
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="module")
def smooth():
    """A smooth loss in float64: L(θ) for flat θ, its gradient, θ, and the way back to a dict."""
    from flatmin.book import MLP

    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = MLP(4, 5, 3, activation=nn.Tanh).double()
        x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    params = {name: w.detach() for name, w in net.named_parameters()}
    theta = torch.cat([w.flatten() for w in params.values()])

    def tree(flat):
        parts = flat.split([w.numel() for w in params.values()])
        return {
            name: part.view_as(w) for part, (name, w) in zip(parts, params.items(), strict=True)
        }

    loss = lambda flat: nn.functional.cross_entropy(functional_call(net, tree(flat), (x,)), y)
    return loss, grad(loss), theta, tree
