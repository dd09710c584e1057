"""The experiments with instruments: their records equal direct measurements of the networks."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from flatmin import Data, Recipe, fit
from flatmin.book import MLP, ResNet, experiments
from flatmin.book.experiments import record, sam_spectrum, stiffness_training, vision
from flatmin.gradient import SAM
from flatmin.measure import eigenvalues, spectral_density, trace
from flatmin.optimizer import SGD, Adam

MODULES = {m.__name__.rpartition(".")[2]: m for m in (stiffness_training, sam_spectrum)}
CASES = (1, 2, 2)  # data, networks, labels; then follow moments, rates, seeds, measures, pairs
SHAPES = {
    "stiffness_training": {
        "within": (*CASES, 2, 1, 2, 2, 3),
        "matrix": (*CASES, 2, 1, 2, 2, 3, 10, 10),
    },
    "sam_spectrum": {
        "eigenvalue": (2, 2, 2, 5),
        "density_nodes": (2, 2, 2, 1, 4),
        "trace": (2, 2, 2),
    },
}
MAY_BE_MISSING = {"xi", "by_distance"}  # no crossing; no pair


@pytest.fixture(scope="module", autouse=True)
def _alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLATMIN_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The tiny size of each experiment, on a CPU; ``counted`` is the number of gradients."""
    out, made = tmp_path_factory.mktemp("records"), {}
    for name, module in MODULES.items():
        counted, run_unit = [], module.run_unit

        def counting(unit, settings, work):
            result = run_unit(unit, settings, work)
            counted.append(work.gradients)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_unit", counting)
            made[name] = experiments.run(name, "tiny", out=out, device="cpu")
        made[name].attrs["counted"] = sum(counted)
    return made


def work():
    return experiments.Work(torch.device("cpu"), tqdm(disable=True))


def settings_of(module, **changes):
    settings = module.SETTINGS["tiny"] | changes
    return settings | {"seeds": list(range(settings["seeds"]))}


def pure(model):
    """A module in the form for instruments: ``network(params, x)``, and its parameters."""
    return (lambda p, x: functional_call(model, p, (x,))), {
        name: p.detach() for name, p in model.named_parameters()
    }


# --------------------------------------------------------------------------------- all together


@pytest.mark.parametrize("name", MODULES)
def test_tiny_record(records, name):
    record = records[name]
    experiments.check(record)
    assert record.attrs["data"] == "made-up images"
    for variable, shape in SHAPES[name].items():
        assert record[variable].shape == shape
    for variable, values in record.data_vars.items():
        assert variable in MAY_BE_MISSING or bool(np.isfinite(values).all()), variable
    assert bool((record.train_loss > 0).all())


@pytest.mark.parametrize("name", MODULES)
def test_plot_is_made_from_the_record(records, name):
    with plt.rc_context():
        figure = experiments.plot(name, records[name])
        figure.canvas.draw()
        assert all(ax.lines or ax.images or ax.collections or ax.texts for ax in figure.axes)
        assert all(ax.get_title(loc="left") for ax in figure.axes if ax.get_label() != "<colorbar>")
        plt.close(figure)


@pytest.mark.parametrize("name", MODULES)
def test_cost_is_what_a_run_counts(records, name):
    assert records[name].attrs["counted"] == records[name].attrs["cost"]


# ---------------------------------------------------------------------------------- stiffness


def directions(model, x, y):
    """The gradient of each example, by vmap(grad), of length 1: [n, P]."""
    network, params = pure(model)
    loss = lambda p, x, y: cross_entropy(network(p, x[None]), y[None])
    gradients = vmap(grad(loss), (None, 0, 0))(params, x, y)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    return flat / flat.norm(dim=1, keepdim=True)


def mean_over(values, classes1, classes2, relation, same_set):
    """The mean over cells of the class matrix for which ``relation(a, b)`` holds."""
    cells = []
    for a in np.unique(classes1):
        for b in np.unique(classes2):
            if relation(a, b):
                at = np.outer(classes1 == a, classes2 == b)
                cells.append(values[at & ~np.eye(len(at), dtype=bool) if same_set else at].mean())
    return np.mean(cells)


def test_stiffness_is_that_of_the_networks_that_fit_keeps(records):
    settings = settings_of(stiffness_training)
    unit = {"data": "synthetic", "network": "CNN", "labels": "random"}
    data = stiffness_training._data(unit, settings)
    kept = fit(
        lambda: stiffness_training.network("CNN", data),
        data,
        Recipe(optimizer=Adam()),
        steps=2,
        batch_size=32,
        grid={"lr": [1e-3]},
        seeds=settings["seeds"],
        networks="last",
        device="cpu",
    ).networks
    model = kept.module(lr=1e-3, seed=1)
    found = records["stiffness_training"].sel(**unit, lr=1e-3, seed=1, step=2)
    probes = {s: [t[:50] for t in data.split(s)] for s in ("train", "validation")}
    unit_gradients = {s: directions(model, *examples) for s, examples in probes.items()}
    relations = {"within": lambda a, b: a == b, "between": lambda a, b: a != b}
    for pairs in stiffness_training.PAIRS:
        one, two = pairs.split("-")
        cosine = (unit_gradients[one] @ unit_gradients[two].mT).numpy()
        classes = probes[one][1].numpy(), probes[two][1].numpy()
        for name, relation in relations.items():
            for measure, values in (("cosine", cosine), ("sign", np.sign(cosine))):
                ours = mean_over(values, *classes, relation, one == two)
                theirs = float(found[name].sel(pairs=pairs, measure=measure))
                # a sign may differ where the cosine is only rounding error
                np.testing.assert_allclose(theirs, ours, atol=2e-3 if measure == "sign" else 2e-5)


def test_distance_bins():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, 2, 2, generator=generator)
    y = torch.arange(400) % 10
    data = Data("made up", 10, x[:200], y[:200], x[200:], y[200:], x[:1], y[:1], y[:200], y[200:])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP(4, 3, 10)
    found = stiffness_training.Probes(data, 150, torch.device("cpu"))(model)
    found = found.sel(measure="cosine", pairs="train-validation")
    u = x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)
    one, two = slice(0, 150), slice(200, 350)
    values = (directions(model, x[one], y[one]) @ directions(model, x[two], y[two]).mT).numpy()
    same = (y[one, None] == y[two]).numpy()
    distance = (1 - u[one] @ u[two].mT).numpy()
    for k, middle in enumerate(found.distance.values):
        at = same & (abs(distance - middle) < 0.05 - 1e-6)
        assert at.any()
        np.testing.assert_allclose(float(found.by_distance[k]), values[at].mean(), atol=2e-4)


def test_inputs_and_random_labels():
    settings = settings_of(stiffness_training, train_size=200, probes=100)
    unit = {"data": "synthetic", "network": "MLP", "labels": "random"}
    random, true = (
        stiffness_training._data(unit | {"labels": w}, settings) for w in ("random", "true")
    )
    for x in (random.x_train, random.x_validation, random.x_test):
        torch.testing.assert_close(x.flatten(1).norm(dim=1), torch.full((len(x),), 3072**0.5))
    assert torch.equal(random.x_train, true.x_train)
    assert int((random.y_train != true.y_train).sum()) == 180
    assert int((random.y_validation != true.y_validation).sum()) == 90


def test_the_residual_network_can_be_stacked():
    data = vision.load("synthetic", 4)
    data = dataclasses.replace(data, x_test=data.x_test[:2], y_test=data.y_test[:2])
    model = stiffness_training.network("ResNet-20", data)
    assert any(p.ndim == 0 for p in model.parameters())
    runs = fit(model, data, steps=1, batch_size=4, seeds=2, evaluate_at=1, device="cpu")
    assert bool(np.isfinite(runs.train_loss).all())


# ----------------------------------------------------------------------------------- spectrum


def test_spectrum_is_that_of_the_instruments(records):
    settings = settings_of(sam_spectrum)
    data, method = vision.load("synthetic", 48), settings["methods"]["SAM"]
    recipe = Recipe(gradient=SAM(0.05), optimizer=SGD(0.05, 0.9, 5e-4, schedule="cosine"))
    make = lambda: ResNet(width=4, batch_norm=False, stages=[1])
    model, _ = vision.train(
        make,
        data,
        recipe,
        work(),
        epochs=2,
        seed=1,
        batch_size=method["batch_size"],
        evaluate_at=[2],
    )
    mean, std = (f(data.x_train, dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    x, y, (network, params) = ((data.x_train - mean) / std)[:16], data.y_train[:16], pure(model)
    found = records["sam_spectrum"].sel({"method": "SAM", "seed": 1, "epoch": 2})
    of = lambda instrument, **how: instrument(network, params, x, y, **how)
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)
    close(found.eigenvalue, of(eigenvalues, top=5, steps=8).value.detach())
    close(found.trace, of(trace, probes=2, sketch=10).value.detach())
    nodes, weights = (part.detach() for part in of(spectral_density, steps=4, probes=1))
    close(found.density_nodes, nodes)
    close(found.density_weights, weights)


def test_at_loss_is_exact_for_powers_of_the_loss():
    epoch = np.array([0, 1, 3, 10])
    loss = xr.DataArray(2.0 * np.exp(-np.outer([0.1, 0.3], epoch)), dims=("seed", "epoch"))
    power = xr.DataArray([0.5, -2.0], dims="power")
    levels = [1.9, 1.0, 0.9, 0.2]
    found = np.exp(sam_spectrum.at_loss(np.log(7 * loss**power), loss, levels, "epoch"))
    expected = 7 * xr.DataArray(levels, dims="level") ** power * xr.ones_like(loss.isel(epoch=0))
    expected = expected.where(xr.DataArray(levels, dims="level") >= loss.min("epoch"))
    xr.testing.assert_allclose(found.drop_vars("level"), expected.transpose(*found.dims))
    assert found.isnull().sum() == 2  # the slower seed never reaches the last level


def test_at_loss_takes_the_first_time():
    loss = xr.DataArray([1.0, 0.5, 2.0, 0.25, np.nan], dims="step")
    values = xr.DataArray([0.0, 1.0, 5.0, 9.0, 9.0], dims="step")
    np.testing.assert_array_equal(
        sam_spectrum.at_loss(values, loss, [3.0, 1.0, 0.5, 0.1], "step"),
        [np.nan, 0.0, 1.0, np.nan],
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_runs_reach_the_common_levels(dtype):
    falling = np.random.default_rng(0).random((3, 4)).astype(dtype).cumprod(1)
    loss = xr.DataArray(falling, dims=("seed", "step"))
    levels = sam_spectrum.common_levels(loss, "step")
    assert len(levels) == 6
    assert sam_spectrum.at_loss(loss, loss, levels, "step").notnull().all()


def test_a_network_that_diverged_is_nan():
    model = ResNet(width=4, batch_norm=False, stages=[1])
    with torch.no_grad():
        model.head[1].bias.fill_(torch.nan)
    values = sam_spectrum.spectrum(
        model, torch.ones(2, 3, 8, 8), torch.tensor([0, 1]), settings_of(sam_spectrum), 2
    )
    found = xr.Dataset(values)
    assert bool(found[["eigenvalue", "trace", "density_nodes"]].isnull().all().to_array().all())


def test_lines_cross_zero_where_the_critical_length_is():
    found = record("stiffness_training")  # tiny runs have no critical length
    far = stiffness_training.crossing(found)
    inside = found.xi.notnull()
    assert inside.any()
    xr.testing.assert_allclose(far.where(inside), found.xi, rtol=1e-5)


# ---------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODULES)
def test_tiny_record_on_a_gpu(records, name, tmp_path):
    record = experiments.run(name, "tiny", out=tmp_path, device="cuda")
    for variable, values in record.data_vars.items():
        assert values.shape == records[name][variable].shape
        assert variable in MAY_BE_MISSING or bool(np.isfinite(values).all()), variable
    start = (
        {"step": 0} if "step" in record.dims else {"epoch": 0} if "epoch" in record.dims else None
    )
    if start:  # the same initial weights and images
        xr.testing.assert_allclose(
            record.train_loss.isel(start), records[name].train_loss.isel(start), rtol=2e-2
        )
