"""Weight averages: closed forms, torch's own averaging as an oracle, batch norm, sweeps."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from flatmin import Recipe, fit
from flatmin.book import MLP, two_gaussians
from flatmin.optimizer import EMA, SGD, SWA
from flatmin.pipeline import Step
from flatmin.stack import epoch_order, initial_module

DATA = two_gaussians(train_size=60, validation_size=0, test_size=40)
NETWORK = lambda: MLP(10, 8, 2, activation=nn.Tanh, batch_norm=True)
EXACT = dict(dtype=torch.float64, device="cpu", seeds=[3], batch_size=20, networks="last")


def torchs(averaged, steps, starts=0, every=1):
    """The average of torch.optim.swa_utils over a plain loop, with its batch statistics."""
    model = initial_module(NETWORK, 3).double()
    average = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    rows = (part for epoch in range(99) for part in epoch_order(3, epoch, 60).split(20))
    for t, part in zip(range(steps), rows):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(DATA.x_train[part].double()), DATA.y_train[part]
        ).backward()
        optimizer.step()
        if t >= starts and (t + 1) % every == 0:
            average.update_parameters(model)
    update_bn([DATA.x_train.double()], average)
    return average.module


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_ema_is_torchs(decay):
    def averaged(model):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        ema.update_parameters(model)  # its first update copies; ours starts at the initial weights
        return ema

    runs = fit(NETWORK, DATA, Recipe(optimizer=EMA(SGD(0.2), decay)), steps=14, **EXACT)
    ours, theirs = runs.networks.module(seed=3).double(), torchs(averaged, 14)
    for name, w in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), w.detach(), rtol=1e-10, atol=1e-12)
    for name, b in theirs.named_buffers():
        if "running" in name:  # of one pass over all 60 examples
            torch.testing.assert_close(ours.get_buffer(name), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start, every", [(0.5, 1), (0.25, 3), (0.0, 1)])
def test_swa_is_torchs(start, every):
    steps = 16
    recipe = Recipe(optimizer=SWA(SGD(0.2), start, every))
    runs = fit(NETWORK, DATA, recipe, steps=steps, **EXACT)
    theirs = torchs(AveragedModel, steps, starts=start * steps, every=every)
    ours = runs.networks.module(seed=3).double()
    for name, w in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), w.detach(), rtol=1e-10, atol=1e-12)


def test_training_goes_on_with_the_weights_themselves():
    """The average changes what is evaluated, and nothing of the way."""
    w, g = {"w": torch.tensor(1.0)}, {"w": torch.tensor(0.5)}
    for optimizer in (EMA(SGD(0.1)), SWA(SGD(0.1), start=0.0)):
        now, state = optimizer(g, w, optimizer.init(w), Step(0, of=4))
        plain, _ = SGD(0.1)(g, w, (), 0)
        assert torch.equal(now["w"], plain["w"])


def test_before_its_start_swa_is_the_weights():
    swa = fit(
        NETWORK, DATA, Recipe(optimizer=SWA(SGD(0.2), 0.9)), steps=10, evaluate_at=[5], **EXACT
    )
    plain = fit(NETWORK, DATA, Recipe(optimizer=SGD(0.2)), steps=10, evaluate_at=[5], **EXACT)
    assert (
        abs(float(swa.train_loss[0, 0]) - float(plain.train_loss[0, 0])) < 0.2
    )  # other statistics
    no_norm = lambda: MLP(10, 8, 2)
    swa = fit(
        no_norm, DATA, Recipe(optimizer=SWA(SGD(0.2), 0.9)), steps=10, evaluate_at=[5], **EXACT
    )
    plain = fit(no_norm, DATA, Recipe(optimizer=SGD(0.2)), steps=10, evaluate_at=[5], **EXACT)
    assert float(swa.train_loss[0, 0]) == float(plain.train_loss[0, 0])


def test_sweeps_are_single_runs():
    grid = {"lr": [0.1, 0.3], "decay": [0.5, 0.9]}
    swept = fit(NETWORK, DATA, Recipe(optimizer=EMA(SGD())), steps=7, grid=grid, **EXACT)
    alone = fit(NETWORK, DATA, Recipe(optimizer=EMA(SGD(0.3), 0.9)), steps=7, **EXACT)
    one = swept.test_loss.sel(lr=0.3, decay=0.9).values
    torch.testing.assert_close(torch.tensor(one), torch.tensor(alone.test_loss.values))
    grid = {"start": [0.0, 0.5]}
    swept = fit(NETWORK, DATA, Recipe(optimizer=SWA(SGD())), steps=8, grid=grid, **EXACT)
    alone = fit(NETWORK, DATA, Recipe(optimizer=SWA(SGD(), 0.5)), steps=8, **EXACT)
    one = swept.test_loss.sel(start=0.5).values
    torch.testing.assert_close(torch.tensor(one), torch.tensor(alone.test_loss.values))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMA(SGD(), 1.0), r"decay must be a number in \[0, 1\), got 1.0"),
        (lambda: SWA(SGD(), -0.1), r"start must be a number in \[0, 1\), got -0.1"),
        (lambda: SWA(SGD(), every=0), "every must be a whole number >= 1, got 0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_swa_counts_beyond_what_half_precision_holds():
    swa, w = SWA(SGD(lr=0.0), start=0.0), {"w": torch.tensor(1.0, dtype=torch.bfloat16)}
    state = swa.init(w)
    for t in range(1000):
        w = {"w": torch.tensor(float(t % 2), dtype=torch.bfloat16)}
        w, state = swa({"w": torch.zeros((), dtype=torch.bfloat16)}, w, state, Step(t, of=1000))
    assert state[2] == 1000
