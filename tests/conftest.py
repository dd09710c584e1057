"""What all tests share: nothing of the shell that runs them, Hypothesis' settings, the GPU mark."""

import os

# before torch is imported; the programs that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn
from torch.func import functional_call, grad

collect_ignore = ["typed_use.py"]  # mypy's

BY_CHANCE = "FLATMIN_SEED FLATMIN_CLAIMS_LOG RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MPLBACKEND"
for name in BY_CHANCE.split():
    os.environ.pop(name, None)
matplotlib.use("agg")  # needs no display
matplotlib.rcdefaults()  # forgets a matplotlibrc

# no deadline, no complaint that examples are drawn slowly: a busy machine does it slowly
any_time = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("here", **any_time)
settings.register_profile("ci", **any_time, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


class Seeded:
    """Starts each test, examples in docstrings too, with the same global random numbers."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        torch.manual_seed(0)


def pytest_configure(config):
    config.pluginmanager.register(Seeded())  # a hook of this file would not reach src/


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
