"""Label noise: SAM versus mixup and bootstrapping (Foret et al. 2021, section 3.3).

A ResNet-32 is trained on CIFAR-10 with 20 to 80 % wrong labels: by SGD, by SGD for twice the epochs
(a step of SAM costs two), with mixup, and by SAM.  *Bootstrapping* is the paper's: the trained
network predicts pseudo-labels for all training images, and a second one is trained on them from
scratch.

ρ, the strengths of mixup, the network, its 200 epochs and the batch size of 256 are the paper's.
It does not state the learning rate and weight decay of its ResNet-32: ours are those of its
WRN-28-10, with a cosine schedule.  Weight decay is outside SAM's maximum here (inside in the
authors' code, which also clips gradients).  A wrong label is one of the other nine classes.
"""

import dataclasses

import xarray as xr

from ...batch import Mixup
from ...gradient import SAM
from ...optimizer import SGD
from ...pipeline import Recipe
from ..models import ResNet
from ..plotting import COLORS
from .mixup_corrupt import panels, units
from .vision import TINY, data_source, load, passes, predict, train

SOURCE = "Foret et al. 2021, section 3.3 and table 4"

_FULL = {
    "data": "cifar10",
    "train_size": 50_000,
    "width": 16,
    "stages": [5, 5, 5],
    "label_noise": [0.2, 0.4, 0.6, 0.8],
    "lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 256,
    "epochs": 200,
    "augment": True,
    "evaluations": 50,
    "seeds": 5,
    "recipes": {
        "SGD": [{}],
        "SGD, twice the epochs": [{"epochs": 2}],
        "mixup": [{"alpha": alpha} for alpha in (1, 8, 16, 32)],
        "SAM": [{"rho": 0.1}],
    },
    "rho_at": {"0.8": 0.05},  # another radius for some noise levels
    "bootstrap": ["SGD", "mixup", "SAM"],
}
_ONE_EACH = _FULL["recipes"] | {"mixup": [{"alpha": 8}]}
SETTINGS = {
    "tiny": _FULL | TINY | {"stages": [1], "label_noise": [0.4], "recipes": _ONE_EACH},
    # Recorded in 219 s on an H100 shared by eight to sixteen processes; one process needs about
    # three times as long.  Without augmentation, so that the few epochs are enough to memorize
    # wrong labels.
    "reduced": _FULL
    | {
        "train_size": 10_000,
        "width": 32,
        "stages": [3, 3, 3],
        "label_noise": [0.4, 0.8],
        "epochs": 32,
        "augment": False,
        "evaluations": 10,
        "recipes": _ONE_EACH,
        "seeds": 3,
    },
    "paper": _FULL,
}

# Test accuracy in per cent: table 4.
PAPER = {
    "SGD": {0.2: 84.8, 0.4: 68.8, 0.6: 48.2, 0.8: 26.2},
    "mixup": {0.2: 93.0, 0.4: 90.0, 0.6: 83.8, 0.8: 70.2},
    "bootstrap + mixup": {0.2: 93.3, 0.4: 92.0, 0.6: 87.6, 0.8: 72.0},
    "SAM": {0.2: 95.1, 0.4: 93.4, 0.6: 90.5, 0.8: 77.9},
    "bootstrap + SAM": {0.2: 95.4, 0.4: 94.2, 0.6: 91.8, 0.8: 79.9},
}


def cost(settings: dict) -> float:
    total = 0
    for unit in units(settings):
        recipe, epochs = _recipe(unit, settings)
        runs = 1 + (unit["recipe"] in settings["bootstrap"])
        total += runs * passes(recipe) * epochs * settings["train_size"]
    return float(total)


def run_unit(unit: dict, settings: dict, work) -> xr.Dataset:
    """Train on the given labels and, if the method is bootstrapped, on the predicted ones.

    Returns
    -------
    Dataset
        Dimensions ``labels`` ("given", "predicted") and ``evaluation``, as the epochs differ.
        ``wrong_labels`` is the share of wrong labels.
    """
    data = load(settings["data"], settings["train_size"], 0, unit["label_noise"], unit["seed"])
    recipe, epochs = _recipe(unit, settings)

    def train_on(data):
        model, result = train(
            lambda: ResNet(width=settings["width"], stages=settings["stages"]),
            data,
            recipe,
            work,
            epochs=epochs,
            batch_size=settings["batch_size"],
            seed=unit["seed"],
            augment=settings["augment"],
            evaluate_at=settings["evaluations"],
        )
        return model, _by_evaluation(result, data)

    model, given = train_on(data)
    runs = {"given": given}
    if unit["recipe"] in settings["bootstrap"]:
        relabeled = dataclasses.replace(data, y_train=predict(model, data, work))
        _, runs["predicted"] = train_on(relabeled)
    result = xr.concat(list(runs.values()), "labels").assign_coords(labels=list(runs))
    result.attrs = {"data": data_source(settings["data"])}
    return result


def _recipe(unit: dict, settings: dict) -> tuple[Recipe, int]:
    """The recipe and the number of epochs of a unit."""
    strength = settings["recipes"][unit["recipe"]][unit["variant"]]
    recipe = Recipe(
        optimizer=SGD(
            settings["lr"], momentum=0.9, schedule="cosine", weight_decay=settings["weight_decay"]
        )
    )
    if "alpha" in strength:
        recipe = dataclasses.replace(recipe, batch=Mixup(strength["alpha"]))
    if "rho" in strength:
        rho = settings["rho_at"].get(str(unit["label_noise"]), strength["rho"])
        recipe = dataclasses.replace(recipe, gradient=SAM(rho))
    return recipe, settings["epochs"] * strength.get("epochs", 1)


def _by_evaluation(result: xr.Dataset, data) -> xr.Dataset:
    """A result along ``evaluation`` instead of ``epoch``, with its share of wrong labels."""
    wrong = float((data.y_train != data.y_train_clean).double().mean())
    result = result.assign_coords(evaluation=("epoch", range(result.sizes["epoch"])))
    result = result.swap_dims(epoch="evaluation").reset_coords("epoch")
    return result.assign(epoch=result.epoch.astype(float), wrong_labels=wrong)


def plot(record: xr.Dataset):
    """Test error at the last epoch (filled) and at the best (open), with 95 % intervals.

    Diamonds are the paper's numbers, for its full size.  The best epoch, and of several strengths
    the best, are chosen on the test images.
    """
    colors = {"SGD": "ERM", "SGD, twice the epochs": "ERM", "mixup": "mixup", "SAM": "SAM"}

    def rows(noise: float) -> dict:
        found = {}
        for recipe in record.recipe.values:
            errors = 100 * record.test_error.sel(recipe=recipe, label_noise=noise)
            best = errors.sel(labels="given").min("evaluation").mean("seed", skipna=False)
            errors = errors.isel(variant=best.fillna(float("inf")).argmin("variant").item())
            for labels, prefix in (("given", ""), ("predicted", "bootstrap + ")):
                run = errors.sel(labels=labels)
                if run.notnull().any():
                    name = f"{prefix}{recipe}"
                    paper = [100 - a for a in [PAPER.get(name, {}).get(noise)] if a is not None]
                    found[name] = run, COLORS[colors[recipe]], paper
        return found

    return panels(record, rows, "● last epoch, ○ best epoch; ◆ the paper", (2.2, 3.0, 3.6))
