"""One image network on a device: the loop is fit's and a plain one's, and each experiment runs."""

import dataclasses
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from flatmin import BatchTransform, Data, Recipe, fit, pipeline
from flatmin.batch import Mixup
from flatmin.book import MLP, ResNet, SmallCNN, experiments, plotting
from flatmin.book.experiments import double_descent, mixup_corrupt, sam_label_noise, vision
from flatmin.gradient import SAM, GradientPenalty, PlainGradient
from flatmin.loops import SAM as SAMOptimizer
from flatmin.loss import Flooding
from flatmin.optimizer import EMA, SGD, Adam, TwoRates
from flatmin.stack import epoch_order, initial_module

EXPERIMENTS = {
    "double_descent": double_descent,
    "mixup_corrupt": mixup_corrupt,
    "sam_label_noise": sam_label_noise,
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("FLATMIN_DATA", raising=False)


def work_on(device):
    return experiments.Work(torch.device(device), tqdm(disable=True))


@pytest.fixture
def work():
    return work_on("cpu")


def noise_images(train=23, validation=6, test=11, side=8, noise=0.3):
    """Float images, three classes, some wrong labels; 23 is not divisible by 10."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, n in {"train": train, "validation": validation, "test": test}.items():
        y = torch.randint(3, (n,), generator=generator)
        x = torch.randn(n, 3, side, side, generator=generator, dtype=torch.float64)
        parts[f"x_{name}"] = x + y[:, None, None, None]
        parts[f"y_{name}"] = y
    for name in ("train", "validation"):
        y = parts[f"y_{name}"]
        parts[f"y_{name}_clean"] = y
        wrong = torch.rand(len(y), generator=generator) < noise
        parts[f"y_{name}"] = torch.where(wrong, (y + 1) % 3, y)
    return Data("images", 3, **parts)


def standardized(data):
    """Each channel by mean and standard deviation of the training images."""
    std, mean = torch.std_mean(data.x_train, (0, 2, 3), keepdim=True)
    names = ("x_train", "x_validation", "x_test")
    return dataclasses.replace(data, **{name: (getattr(data, name) - mean) / std for name in names})


DATA = noise_images()
CNN = lambda: SmallCNN(3, 3, widths=(4, 5), batch_norm=True)
PLAIN_CNN = lambda: SmallCNN(3, 3, widths=(4, 5))


# -------------------------------------------------------------------- images and what changes them


@pytest.mark.parametrize("as_bytes", [True, False])
def test_augmentation_is_pad_crop_and_flip_image_by_image(as_bytes):
    data = vision.load("synthetic", train_size=40) if as_bytes else noise_images(train=40)
    shown = vision.Images(data, "cpu", torch.float64, augment=True)
    change = vision.augmentation(seed=3, epoch=2, n=40)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    x = data.x_train.double()
    std, mean = (v.double() for v in torch.std_mean(data.x_train, (0, 2, 3), keepdim=True))
    side = x.shape[-1]
    assert shown.pixels["train"].dtype == (torch.uint8 if as_bytes else torch.float64)
    found = shown.batch("train", rows, change)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, row, (down, right, mirrored) in zip(found, rows, change.tolist()):
        padded = torch.zeros(3, side + 8, side + 8, dtype=torch.float64)
        padded[:, 4:-4, 4:-4] = x[row]
        expected = padded[:, down : down + side, right : right + side]
        if mirrored:
            expected = expected.flip(-1)
        torch.testing.assert_close(image, ((expected - mean) / std)[0], rtol=1e-6, atol=1e-6)
    plain = shown.batch("train", rows)
    torch.testing.assert_close(plain, (x[rows] - mean) / std, rtol=1e-6, atol=1e-6)
    assert shown.pixels["test"].shape[1] == side  # without a margin


def test_each_epoch_and_seed_has_its_own_changes_and_all_of_them_occur():
    change = vision.augmentation(0, 0, 2000)
    assert [sorted(set(column.tolist())) for column in change.T] == [[*range(9)]] * 2 + [[0, 1]]
    assert torch.equal(change, vision.augmentation(0, 0, 2000))
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(change, vision.augmentation(seed, epoch, 2000))


# -------------------------------------------------------------------------------- the training loop

RECIPES = {
    "sgd": (CNN, Recipe(optimizer=SGD(0.1))),
    "nesterov, decay, cosine": (
        CNN,
        Recipe(optimizer=SGD(0.1, 0.9, 0.01, nesterov=True, schedule="cosine")),
    ),
    "adam, steps": (
        CNN,
        Recipe(optimizer=Adam(0.01, weight_decay=0.1, schedule=vision.step_decay(0.5))),
    ),
    "flooding": (CNN, Recipe(loss=Flooding(0.9), optimizer=SGD(0.1))),
    "flooding an example": (CNN, Recipe(loss=Flooding(0.9, per_example=True), optimizer=SGD(0.1))),
    "mixup": (CNN, Recipe(batch=Mixup(0.7), optimizer=SGD(0.1))),
    "mixup, three": (CNN, Recipe(batch=Mixup(0.7, k=3, per_example=True), optimizer=SGD(0.1))),
    "sam": (CNN, Recipe(gradient=SAM(0.3), optimizer=SGD(0.1, 0.9, 0.01))),
    "asam, p": (
        CNN,
        Recipe(gradient=SAM(0.3, p=3.0, adaptive=True), optimizer=SGD(0.1)),
    ),
    "sam, flooding, mixup": (
        CNN,
        Recipe(Mixup(1.0), loss=Flooding(1.0), gradient=SAM(0.3), optimizer=SGD(0.1)),
    ),
    "m-sam": (PLAIN_CNN, Recipe(loss=Flooding(1.0), gradient=SAM(0.3, m=4), optimizer=SGD(0.1))),
    "m-sam, batch norm": (CNN, Recipe(gradient=SAM(0.3, m=5), optimizer=SGD(0.1))),
    "exact sam": (CNN, Recipe(gradient=SAM(0.3, exact=True), optimizer=SGD(0.1))),
    "penalty": (CNN, Recipe(gradient=GradientPenalty(0.1), optimizer=SGD(0.1))),
    "two rates": (CNN, Recipe(optimizer=TwoRates(0.1, 0.05))),
    "average, batch norm": (CNN, Recipe(optimizer=EMA(SGD(0.1), decay=0.8))),
    "mlp": (lambda: MLP(192, 6, 3), Recipe(optimizer=SGD(0.1))),
    "resnet": (lambda: ResNet((1, 1), 3, width=2), Recipe(optimizer=SGD(0.1, 0.9))),
    "dropout": (
        lambda: mixup_corrupt.PreActResNet(3, width=2, stages=(1, 1), dropout=0.3),
        Recipe(gradient=SAM(0.1), optimizer=SGD(0.1)),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_same_as_fit(name, work):
    model, recipe = RECIPES[name]
    network, found = vision.train(
        model,
        DATA,
        recipe,
        work,
        epochs=4,
        batch_size=10,
        seed=5,
        evaluate_at=[0, 2, 4],
        dtype=torch.float64,
    )
    splits = ["train", "train_clean", "validation", "validation_clean", "test"]
    expected = fit(
        model,
        standardized(DATA),
        recipe,
        steps=12,
        batch_size=10,
        seeds=[5],
        evaluate_at=[0, 6, 12],
        splits=splits,
        networks="last",
        device="cpu",
        dtype=torch.float64,
    )
    assert found.epoch.values.tolist() == [0, 2, 4]
    assert {*found.data_vars} == {f"{s}_{m}" for s in splits for m in ("loss", "error")}
    for key in found:
        np.testing.assert_allclose(found[key], expected[key].sel(seed=5), rtol=1e-9, atol=1e-9)
    for key, weight in expected.networks.module(seed=5).state_dict().items():
        if "average" not in name or weight.is_floating_point():  # a counter of batches
            torch.testing.assert_close(network.state_dict()[key], weight, rtol=1e-9, atol=1e-9)
    assert work.gradients == 4 * 23 * vision.passes(recipe)


@pytest.mark.parametrize("what", ["SGD", "mixup", "SAM"])
def test_same_as_a_plain_loop(what, work):
    recipe = {
        "SGD": Recipe(loss=Flooding(0.8), optimizer=SGD(0.1, 0.9, 0.01)),
        "mixup": Recipe(batch=Mixup(2.0), optimizer=SGD(0.1, 0.9, 0.01)),
        "SAM": Recipe(gradient=SAM(0.2), optimizer=SGD(0.1, 0.9, 0.01)),
    }[what]
    network, _ = vision.train(
        CNN, DATA, recipe, work, epochs=3, batch_size=10, seed=1, dtype=torch.float64
    )
    plain = initial_module(CNN, 1).double()
    x, y = standardized(DATA).x_train, DATA.y_train
    sgd = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=0.01)
    sam, mixed = SAMOptimizer(sgd, 0.2, model=plain), BatchTransform(Mixup(2.0), 3, seed=1)
    for epoch in range(3):
        for rows in epoch_order(1, epoch, 23).split(10):
            if what == "mixup":
                images, targets = mixed(x[rows], y[rows])
            else:
                images, targets = x[rows], one_hot(y[rows], 3).double()
            loss = cross_entropy(plain(images), targets)
            if what == "SAM":
                loss.backward()
                sam.first_step(zero_grad=True)
                cross_entropy(plain(images), targets).backward()
                sam.second_step(zero_grad=True)
                continue
            sgd.zero_grad()
            ((loss - 0.8).abs() + 0.8 if what == "SGD" else loss).backward()
            sgd.step()
    for key, weight in plain.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], weight, rtol=1e-9, atol=1e-9)


def test_measure_gets_the_model_in_evaluation_mode_and_training_continues(work):
    modes = []
    network, _ = vision.train(
        CNN,
        DATA,
        Recipe(),
        work,
        epochs=2,
        batch_size=10,
        evaluate_at=[0, 1],
        measure=lambda epoch, model: modes.append((epoch, model.training)) or {},
    )
    assert modes == [(0, False), (1, False)] and not network.training
    assert int(network[1].num_batches_tracked) == 6


@pytest.mark.parametrize("gradient", [PlainGradient(), SAM()], ids=["plain", "SAM"])
def test_a_step_does_not_wait_for_the_device(gradient):
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in (
                "_local_scalar_dense",
                "nonzero",
                "is_nonzero",
                "masked_select",
                "equal",
            )
            return func(*args, **(kwargs or {}))

    data = vision.load("synthetic", train_size=32)
    recipe = Recipe(Mixup(1.0), loss=Flooding(0.5), gradient=gradient, optimizer=SGD(0.1, 0.9))
    model = initial_module(lambda: mixup_corrupt.PreActResNet(width=2, stages=(1,), dropout=0.5), 0)
    params = {name: w.detach() for name, w in model.named_parameters()}
    state = pipeline.State.init(recipe, params, dict(model.named_buffers()))
    batches = vision._batches(vision.Images(data, "cpu", augment=True), recipe, 0, 0, 8)
    first = next(batches)  # this draws the epoch's random numbers, on the CPU
    with Waits():
        for batch, draw in (first, *batches):
            state, _ = pipeline.step(model, recipe, state, batch, draw, pipeline.Step(0, of=4))


def test_bfloat16_is_used_only_between_images_and_logits():
    model, x = initial_module(CNN, 0).eval(), DATA.x_train.float()
    low, high = vision.Bfloat16(model)(x), model(x)
    assert low.dtype == torch.float32 and not torch.equal(low, high)
    assert torch.equal(low, low.bfloat16().float())
    torch.testing.assert_close(low, high, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("model", [PLAIN_CNN, CNN], ids=["no norm", "batch norm"])
@pytest.mark.parametrize("gradient", [PlainGradient(), SAM(0.05)], ids=["plain", "SAM"])
def test_a_step_in_bfloat16_is_that_of_autograd(gradient, model):
    network = vision.Bfloat16(initial_module(model, 0))
    x, y = DATA.x_train.float(), DATA.y_train
    params = {name: w.detach().clone() for name, w in network.named_parameters()}
    recipe = Recipe(gradient=gradient, optimizer=SGD(0.1))
    state, _ = pipeline.step(
        network,
        recipe,
        pipeline.State.init(recipe, params, dict(network.named_buffers())),
        pipeline.Batch(x, y),
        {},
        pipeline.Step(0, of=1),
    )
    sgd = torch.optim.SGD(network.parameters(), 0.1)
    cross_entropy(network(x), y).backward()
    if gradient != PlainGradient():
        sam = SAMOptimizer(sgd, 0.05, model=network)
        sam.first_step(zero_grad=True)
        cross_entropy(network(x), y).backward()
        sam.second_step()
    else:
        sgd.step()
    for name, w in network.named_parameters():
        assert w.dtype == state.params[name].dtype == torch.float32
        change, expected = state.params[name] - params[name], w.detach() - params[name]
        assert expected.norm() > 0 and (change - expected).norm() < 0.02 * expected.norm()


# ------------------------------------------------------------------------------ recorded results


class Knows(nn.Module):
    """Takes the brightest of the first ten pixels as the class, with probability p."""

    def __init__(self, p=0.9):
        super().__init__()
        self.high = nn.Parameter(torch.tensor(math.log(p * 9 / (1 - p))))

    def forward(self, x):
        return self.high * one_hot(x[:, 0, 0, :10].argmax(1), 10)


@pytest.mark.parametrize("size", [7, 1000])
def test_results_on_wrong_and_true_labels_are_separate(size, work):
    data = vision.load("synthetic", 100, 40, label_noise=0.3)
    x = {
        f"x_{split}": torch.zeros_like(data.split(split)[0])
        for split in ("train", "validation", "test")
    }
    for split in ("train", "validation", "test"):
        true = data.split(split if split == "test" else f"{split}_clean")[1]
        x[f"x_{split}"][:, 0, 0, :10] = one_hot(true, 10).float()
    data = dataclasses.replace(data, **x)
    recipe = Recipe(optimizer=SGD(0.0))
    _, found = vision.train(
        Knows,
        data,
        recipe,
        work,
        epochs=1,
        batch_size=50,
        evaluate_at=[1],
        evaluation_batch_size=size,
    )
    right, wrong = -math.log(0.9), -math.log(0.1 / 9)
    for split in ("train", "validation"):
        assert found[f"{split}_error"].item() == pytest.approx(0.3)
        assert found[f"{split}_loss"].item() == pytest.approx(0.7 * right + 0.3 * wrong, rel=1e-5)
    for name in ("train_clean", "validation_clean", "test"):
        assert found[f"{name}_error"].item() == 0
        assert found[f"{name}_loss"].item() == pytest.approx(right, rel=1e-5)
    _, few = vision.train(Knows, data, recipe, work, epochs=1, evaluate_at=[1], train_examples=10)
    first = (data.y_train != data.y_train_clean)[:10].double().mean()
    assert few.train_error.item() == pytest.approx(first.item())


def test_a_loss_that_is_not_finite_gives_no_result(work):
    data = dataclasses.replace(DATA, x_test=DATA.x_test * math.nan)
    _, found = vision.train(CNN, data, Recipe(), work, epochs=1, evaluate_at=[0])
    assert found.test_loss.isnull().all() and found.test_error.isnull().all()
    assert found.train_error.notnull().all()


def test_bootstrapping_retrains_on_the_labels_that_the_network_predicts(work):
    todo = experiments.plan("sam_label_noise", "tiny")
    unit = {"recipe": "SAM", "variant": 0, "label_noise": 0.4, "seed": 0}
    found = sam_label_noise.run_unit(unit, todo.settings, work)
    given, predicted = found.sel(labels="given"), found.sel(labels="predicted")
    assert given.wrong_labels.item() == pytest.approx(26 / 64)  # round(0.4 · 64) of 64
    assert predicted.wrong_labels.item() == pytest.approx(given.train_clean_error[-1].item())
    for name in ("train_clean_error", "test_loss"):  # starting from the same weights
        assert given[name][0] == predicted[name][0]
    assert work.gradients == 4 * 128


def test_predict_is_the_largest_logit_of_each_unaugmented_image(work):
    data = vision.load("synthetic", train_size=30)
    model = initial_module(lambda: SmallCNN(3, 10, batch_norm=True), 0)
    expected = model.eval()(standardized(data).x_train).argmax(1)
    assert torch.equal(vision.predict(model, data, work, evaluation_batch_size=7), expected)


def test_dropout_does_not_change_the_initial_weights():
    one, other = (
        initial_module(lambda p=p: mixup_corrupt.PreActResNet(width=4, dropout=p), 0)
        for p in (0.0, 0.5)
    )
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters()))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one.eval()(x), other.eval()(x))
    assert not torch.equal(one.train()(x), other.train()(x))


@pytest.mark.parametrize(
    "more, message",
    [
        ({"recipe": Recipe(batch=Mixup(second_stream=True))}, "recipe.batch"),
        ({"evaluate_at": [0, 3]}, "evaluate_at must be epochs between 0 and 2"),
        ({"evaluate_at": []}, "evaluate_at must be epochs between 0 and 2"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        (
            {
                "data": dataclasses.replace(
                    DATA,
                    **{
                        name: getattr(DATA, name).flatten(1)
                        for name in ("x_train", "x_validation", "x_test")
                    },
                )
            },
            "data must have images",
        ),
    ],
)
def test_impossible_settings_are_refused(more, message, work):
    arguments = {"model": CNN, "data": DATA, "recipe": Recipe(), "epochs": 2} | more
    with pytest.raises(ValueError, match=message):
        vision.train(work=work, **arguments)


# ----------------------------------------------------------------------------------- the data


def test_load_reads_once_and_draws_like_the_data_sets():
    data = vision.load("synthetic", 100, 50, 0.2, seed=3)
    x, y = data.split("train_clean")
    made, labels = ((vision.synthetic().x_train * 255).round().byte(), vision.synthetic().y_train)
    lookup = {image.numpy().tobytes(): int(y) for image, y in zip(made, labels)}
    assert [lookup[i.numpy().tobytes()] for i in (x * 255).round().to(torch.uint8)] == y.tolist()
    assert (data.y_train != data.y_train_clean).sum() == 20 and len(data.y_validation) == 50
    assert torch.equal(x, vision.load("synthetic", 100, 50, 0.8, seed=3).x_train)
    with pytest.raises(ValueError, match="data must be one of"):
        vision.load("imagenet")


def test_only_downloads_have_the_name_of_the_set_alone(tmp_path, monkeypatch):
    assert vision.data_source("cifar10") == "CIFAR-10"
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    assert vision.data_source("cifar10") == "a copy of CIFAR-10"
    assert vision.data_source("synthetic") == "made-up images"
    (tmp_path / "cifar-10-batches-py").mkdir()
    note = tmp_path / "cifar-10-batches-py" / "PROVENANCE"
    note.write_text("JPEG copy of CIFAR-10\nfrom …\n", encoding="utf-8")
    assert vision.data_source("cifar10") == "JPEG copy of CIFAR-10"


# ------------------------------------------------------------------------------- the experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tiny_experiment_runs_and_is_drawn(name, tmp_path, monkeypatch):
    counted = []
    progress = experiments.Work.progress
    monkeypatch.setattr(
        experiments.Work, "progress", lambda self, n: counted.append(n) or progress(self, n)
    )
    record = experiments.run(name, "tiny", out=tmp_path, device="cpu")
    experiments.check(record)
    assert record.attrs["data"] == "made-up images"
    assert record.attrs["cost"] == sum(counted)
    for values in (record.test_error, record.train_clean_loss):
        if name == "sam_label_noise":  # only this recipe is not bootstrapped
            twice = values.sel(recipe="SGD, twice the epochs", labels="predicted")
            assert twice.isnull().all()
            values = values.sel(labels="given")
        assert values.notnull().all()
    figure = experiments.plot(name, record)
    assert all(ax.get_xlabel() and (ax.lines or ax.containers) for ax in figure.axes)
    plt.close(figure)


@pytest.fixture(autouse=True)
def _own_style():
    with plt.rc_context():
        plotting.use_style()
        yield


def test_the_best_of_several_strengths_is_drawn():
    names = list(mixup_corrupt.SETTINGS["paper"]["recipes"])
    errors = np.full((4, 3, 2, 2, 3), np.nan)  # recipe, variant, label_noise, seed, epoch
    errors[0, 0] = 0.5  # ERM has one strength
    for k in (1, 2, 3):
        errors[k] = np.array([[[[0.4]]], [[[0.2]]], [[[0.3]]]]) + [0.1, 0.0, 0.05]
        errors[k, 2, 1] -= 0.25  # at the second noise, the last is better
    dims = ("recipe", "variant", "label_noise", "seed", "epoch")
    coords = {"recipe": names, "label_noise": [0.2, 0.5], "variant": range(3), "seed": [0, 1]}
    record = xr.Dataset({"test_error": (dims, errors)}, coords)
    chosen = mixup_corrupt.best_variant(record)
    assert chosen.variant.values.tolist() == [[0, 0], [1, 2], [1, 2], [1, 2]]
    figure = mixup_corrupt.plot(record)
    drawn = [line.get_xdata()[0] for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([50, 50] + 3 * [10, 5])  # last and best
    plt.close(figure)


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("gradient", ["plain", "SAM"])
def test_a_gpu_takes_the_same_fifty_steps(gradient):
    data = vision.load("synthetic", train_size=500, label_noise=0.2)
    recipe = Recipe(optimizer=SGD(0.02, 0.9, schedule="cosine"), batch=Mixup(1.0))
    if gradient == "SAM":
        recipe = dataclasses.replace(recipe, gradient=SAM(0.05))
    exact = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        runs = [
            vision.train(
                lambda: SmallCNN(3, 10),
                data,
                recipe,
                work_on(device),
                epochs=10,
                batch_size=100,
                augment=True,
                evaluate_at=10,
                bf16=False,
            )
            for device in ("cpu", "cuda")
        ]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = exact
    (one, expected), (other, found) = runs
    for split in ("train", "train_clean", "test"):
        np.testing.assert_allclose(found[f"{split}_loss"], expected[f"{split}_loss"], rtol=1e-3)
    for weight, same in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(same.cpu(), weight, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_tiny_experiment_runs_on_a_gpu(name, tmp_path):
    record = experiments.run(name, "tiny", out=tmp_path, device="cuda")
    assert record.attrs["device"] == torch.cuda.get_device_name()
    assert np.isfinite(
        record.test_loss.sel(labels="given") if "labels" in record.dims else record.test_loss
    ).all()
