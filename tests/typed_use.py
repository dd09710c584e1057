"""A program of a user, for mypy alone: right calls have right types, and wrong calls are errors.

An error that mypy no longer finds leaves an ignored line without one, which is an error too.
"""

from functools import partial
from typing import assert_type

import matplotlib.pyplot as plt
import torch
import xarray as xr
from matplotlib.lines import Line2D
from torch import Tensor, nn

import flatmin
from flatmin import (
    SAM,
    BatchTransform,
    FloodingLoss,
    Networks,
    Recipe,
    Runs,
    best_step,
    fit,
    flood,
    gradient,
)
from flatmin.batch import Mixup
from flatmin.book import MLP, mean_interval, pm, two_gaussians
from flatmin.book.plotting import band
from flatmin.loss import Flooding
from flatmin.measure import error_under_attack, sharpness
from flatmin.optimizer import SGD


def curvature(
    network: flatmin.stack.Network, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    return flatmin.gradient_norm(network, params, x, y)


data = two_gaussians(label_noise=0.1)
recipe = Recipe(
    batch=Mixup(0.2),
    loss=Flooding(0.1),
    gradient=gradient.SAM(rho=0.1),
    optimizer=SGD(lr=0.1),
)
runs = fit(
    lambda: MLP(10, 8, 2),
    data,
    recipe,
    steps=10,
    grid={"flood_level": [0, 0.1]},
    instruments={"curvature": curvature, "sharpness": partial(sharpness, rho=0.1)},
)
assert_type(runs, Runs)
assert_type(runs.data, xr.Dataset)
runs = fit(MLP(10, 2), (data.x_train, data.y_train), steps=3, networks="last", seeds=[1, 2])
assert_type(runs.networks, Networks | None)
networks = runs.networks
assert networks is not None
networks.measure(partial(error_under_attack, eps=0.1), data)
assert_type(networks.module(seed=1), nn.Module)
assert_type(mean_interval(runs.test_loss), xr.Dataset)
assert_type(mean_interval(runs), xr.Dataset)
assert_type(pm(runs.test_loss), str)
assert_type(best_step(runs), xr.Dataset)
assert_type(band(plt.gca(), runs.test_loss), Line2D)

model = nn.Linear(10, 2)
optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
criterion = FloodingLoss(nn.CrossEntropyLoss(), 0.1)
x, y = BatchTransform(Mixup(0.2), num_classes=2)(data.x_train, data.y_train)
assert_type(x, Tensor)
assert_type(flood(torch.zeros(3), 0.1), Tensor)


def closure() -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    return loss


optimizer.step(closure)
optimizer.first_step(zero_grad=True)
optimizer.second_step()

fit(MLP(10, 2), data, steps=3, networks="first")  # type: ignore[arg-type]
fit(MLP(10, 2), data, steps="3")  # type: ignore[arg-type]
flood(torch.zeros(3), "high")  # type: ignore[arg-type]
