"""SAM in Lightning and Accelerate, as the page *Using SAM in your loop* writes it.

Each block of the page makes the steps of a plain loop.  The packages are the extra ``frameworks``.
"""

import logging
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from flatmin import SAM

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "book" / "using_sam.md").read_text(encoding="utf-8")
START, *BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
AUTOMATIC, MANUAL, FLOAT16, ACCELERATE, ACCELERATE_FLOAT16 = BLOCKS[-5:]


@pytest.fixture
def lightning(monkeypatch, tmp_path):
    """Without its progress, which it prints, and its files, which it writes here."""
    module = pytest.importorskip("lightning", reason="needs pip install flatmin[frameworks]")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate", reason="needs pip install flatmin[frameworks]")
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    module.state.GradientState._reset_state()


def run(*codes):
    """The page's first block and others; returns their names."""
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"step\(closure\)")
        for code in (START, *codes):
            exec(compile(code, "using_sam.md", "exec"), names)
    return names


def plain(epochs=1, dtype=None, scaler=None):
    """The same steps of SAM without a framework: the weights, and the loss at w of each step."""
    names = run()
    model, losses = names["model"], []
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    for x, y in (batch for _ in range(epochs) for batch in names["loader"]):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss.detach()

        losses.append(optimizer.step(closure, scaler))
        if scaler is not None:
            scaler.update()
    assert optimizer.skipped == 0
    return model, losses


def same(a, b):
    """Weights and buffers, bitwise."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def fit(lightning, module, loader, epochs=1, **settings):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **({"enable_checkpointing": False} | settings),
    )
    trainer.fit(module, loader)
    return trainer


def classes(*codes):
    """The names that the page's blocks define, without training."""
    return run(*(re.sub(r"^L\.Trainer.*\n", "", code, flags=re.MULTILINE) for code in codes))


def scaler_on_a_cpu(lightning):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    return {"plugins": [plugin]}


def test_the_page_names_the_versions_that_it_was_tried_with():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", text, re.M))
    assert (
        f"with PyTorch {pins['torch']}, Lightning {pins['lightning']} "
        f"and Accelerate {pins['accelerate']},"
    ) in PAGE


# Lightning


def test_lightning_automatic_as_on_the_page(lightning):
    model, _ = plain()
    assert same(run(AUTOMATIC)["model"], model)


def test_lightning_manual_as_on_the_page(lightning):
    model, _ = plain(epochs=2)
    assert same(run(AUTOMATIC, MANUAL)["model"], model)


class Losses:
    """A mixin that keeps what training_step logs."""

    def log(self, name, value, **settings):
        self.__dict__.setdefault("logged", []).append(value.detach().clone())
        super().log(name, value, **settings)


def test_the_manual_form_logs_the_loss_at_the_weights(lightning):
    names = classes(AUTOMATIC, MANUAL)
    module = type("Kept", (Losses, names["Manual"]), {})()
    trainer = fit(lightning, module, names["loader"])
    model, losses = plain()
    assert same(names["model"], model) and trainer.global_step == len(losses)
    assert [value.item() for value in module.logged] == [loss.item() for loss in losses]


def test_the_automatic_form_logs_twice(lightning):
    names = classes(AUTOMATIC)

    def training_step(self, batch, batch_idx):
        loss = names["Automatic"].training_step(self, batch, batch_idx)
        self.log("loss", loss)
        return loss

    kind = type("Kept", (Losses, names["Automatic"]), {"training_step": training_step})
    module = kind()
    fit(lightning, module, names["loader"])
    model, losses = plain()
    at_w, at_worst = module.logged[::2], module.logged[1::2]
    assert same(names["model"], model)
    assert [value.item() for value in at_w] == [loss.item() for loss in losses]
    assert sum(at_worst) > sum(at_w)


@pytest.mark.parametrize("form", ["Automatic", "Manual"])
def test_bf16_mixed(lightning, form):
    names = classes(AUTOMATIC, MANUAL)
    fit(lightning, names[form](), names["loader"], precision="bf16-mixed")
    assert same(names["model"], plain(dtype=torch.bfloat16)[0])


def test_16_mixed_in_two_phases_as_on_the_page(lightning):
    names = classes(AUTOMATIC, MANUAL, FLOAT16)
    trainer = fit(lightning, names["Float16"](), names["loader"], **scaler_on_a_cpu(lightning))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, losses = plain(dtype=torch.float16, scaler=scaler)
    assert same(names["model"], model) and trainer.global_step == len(losses)
    assert trainer.callback_metrics["loss"].item() == losses[-1].item()


@pytest.mark.parametrize("form", ["Automatic", "Manual"])
def test_16_mixed_refuses_a_closure(lightning, form):
    names = classes(AUTOMATIC, MANUAL)
    before = {name: w.clone() for name, w in names["model"].named_parameters()}
    with pytest.raises(RuntimeError, match="Lightning's 16-mixed does, needs the two-phase form"):
        fit(lightning, names[form](), names["loader"], **scaler_on_a_cpu(lightning))
    assert all(torch.equal(w, before[name]) for name, w in names["model"].named_parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_phases_are_refused_in_other_precisions(lightning, precision):
    """Lightning's step() passes a closure that does nothing: there would be no gradient."""
    names = classes(AUTOMATIC, MANUAL, FLOAT16)
    with pytest.raises(RuntimeError, match=r"step\(closure\) must not come after first_step\(\)"):
        fit(lightning, names["Float16"](), names["loader"], precision=precision)


@pytest.mark.parametrize("given", ["module", "network", None])
@pytest.mark.parametrize("scheduled", [False, True])
def test_accumulate_grad_batches_is_refused(lightning, given, scheduled):
    names = classes(AUTOMATIC)

    def configure_optimizers(self):
        models = {"module": self, "network": self.model, None: None}
        return SAM(torch.optim.SGD(self.parameters(), lr=0.1), rho=0.05, model=models[given])

    parts = {"accumulate_grad_batches": 2}
    if scheduled:
        accumulation = lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 2})
        parts = {"callbacks": [accumulation]}
    kind = type("Kind", (names["Automatic"],), {"configure_optimizers": configure_optimizers})
    before = {name: w.clone() for name, w in names["model"].named_parameters()}
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1, got 2"):
        fit(lightning, kind(), names["loader"], **parts)
    assert all(torch.equal(w, before[name]) for name, w in names["model"].named_parameters())


def test_a_module_that_was_trained_with_accumulation_may_go_into_a_plain_loop(lightning):
    names = classes(AUTOMATIC)
    kind = type(
        "Plain",
        (names["Automatic"],),
        {"configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.1)},
    )
    module = kind()
    fit(lightning, module, names["loader"], accumulate_grad_batches=2)
    optimizer = SAM(torch.optim.SGD(module.parameters(), lr=0.1), model=module)
    before = [w.clone() for w in module.parameters()]

    def closure(module, x, y):
        nn.functional.cross_entropy(module.model(x), y).backward()

    for x, y in names["loader"]:
        optimizer.step(partial(closure, module, x, y))
    assert not any(map(torch.equal, module.parameters(), before))


def test_lightning_clips_and_resumes_bitwise(lightning, tmp_path):
    """Clipping in both passes; the second epoch from a checkpoint of the first."""
    settings = {"gradient_clip_val": 0.5, "enable_checkpointing": True}
    models, saved = [], tmp_path / "saved.ckpt"
    for epochs, checkpoint in ((2, None), (1, None), (2, saved)):
        names = classes(AUTOMATIC)
        names["model"][3].p = 0.0  # Lightning does not save the random state
        trainer = fit(lightning, names["Automatic"](), names["loader"], 0, **settings)
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(names["Automatic"](), names["loader"], ckpt_path=checkpoint)
        if epochs == 1:
            trainer.save_checkpoint(saved)
        models.append(names["model"])
    assert same(models[0], models[2]) and not same(models[0], models[1])


# Accelerate


def test_accelerate_as_on_the_page(accelerate):
    names = run(ACCELERATE)
    model, losses = plain()
    assert same(names["model"], model)
    assert names["losses"][0].item() == losses[-1].item() and len(names["losses"]) == 2


def test_sam_around_a_prepared_optimizer(accelerate):
    code = ACCELERATE.replace("optimizer = SAM(base, rho=0.05, model=model)\n", "").replace(
        "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
        "model, base, loader = accelerator.prepare(model, base, loader)\n"
        "optimizer = SAM(base, rho=0.05, model=model)",
    )
    assert code.index("prepare") < code.index("SAM(")
    assert same(run(code)["model"], plain()[0])


def with_a_scaler_on_a_cpu(code):
    """Accelerate's fp16 on a CPU would be bfloat16, so its parts are put together here."""
    assert code.count('Accelerator(mixed_precision="fp16")  # needs a GPU\n') == 1
    return code.replace(
        'Accelerator(mixed_precision="fp16")  # needs a GPU\n',
        "Accelerator(cpu=True)\n"
        'accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True\n'
        'accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)\n',
    )


def test_accelerate_with_float16_as_on_the_page(accelerate):
    names = run(with_a_scaler_on_a_cpu(ACCELERATE_FLOAT16))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, _ = plain(dtype=torch.float16, scaler=scaler)
    assert same(names["model"], model)


def test_accelerate_with_float16_refuses_a_closure(accelerate):
    setup, _ = with_a_scaler_on_a_cpu(ACCELERATE_FLOAT16).split("\nfor ")
    _, loop = ACCELERATE.split("accelerator.prepare(model, optimizer, loader)\n")
    names = run(setup)
    before = [w.clone() for w in names["model"].parameters()]
    with pytest.raises((RuntimeError, AssertionError), match=r"_scale is None|closure, scaler"):
        exec(loop, names)
    assert all(map(torch.equal, names["model"].parameters(), before))


def test_accelerate_microbatches_in_the_closure(accelerate):
    """Its backward() divides by gradient_accumulation_steps, as the closure needs."""
    names = run(
        ACCELERATE.replace("cpu=True", "cpu=True, gradient_accumulation_steps=2").split(
            "\ndef accelerated"
        )[0]
    )
    model, optimizer, accelerator = names["model"].eval(), names["optimizer"], names["accelerator"]
    twin = run()["model"].eval()
    other = SAM(torch.optim.SGD(twin.parameters(), lr=0.1), rho=0.05, model=twin)
    loss = nn.functional.cross_entropy
    for x, y in names["loader"]:

        def closure(parts=((x[:16], y[:16]), (x[16:], y[16:]))):
            optimizer.zero_grad()
            for part, labels in parts:
                accelerator.backward(loss(model(part), labels))

        def whole(x=x, y=y):
            other.zero_grad()
            loss(twin(x), y).backward()

        optimizer.step(closure)
        other.step(whole)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-6


def test_inside_of_accumulate_the_first_microbatch_is_left_out(accelerate):
    """Which the page warns of: Accelerate does not call SAM for it."""
    names = run(
        ACCELERATE.replace("cpu=True", "cpu=True, gradient_accumulation_steps=2")
        .replace("losses = []\n", "losses = []\n    with accelerator.accumulate(model):\n")
        .replace("    optimizer.step(acc", "        optimizer.step(acc")
        .replace("losses = []", "losses = []; all_losses.append(losses)")
        .replace("for x, y in", "all_losses = []\nfor x, y in")
    )
    assert [len(losses) for losses in names["all_losses"]] == [0, 2] * 4


def test_accelerate_refuses_two_phases_inside_of_accumulate(accelerate):
    code = ACCELERATE_FLOAT16.replace(
        'mixed_precision="fp16"', "cpu=True, gradient_accumulation_steps=2"
    )
    setup, loop = code.split("\nfor x, y in loader:\n")
    names = run(setup)
    loop = loop.replace("    ", "        ")
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called twice"):
        exec(f"for x, y in loader:\n    with accelerator.accumulate(model):\n{loop}", names)


def test_accelerate_saves_and_resumes_bitwise(accelerate, tmp_path):
    models = []
    for resumed in (False, True):
        setup, loop = ACCELERATE.split("\n\ndef accelerated")
        names = run(setup)
        loop = "def accelerated" + loop
        if resumed:
            names["accelerator"].load_state(tmp_path / "saved")
        else:
            exec(loop, names)
            names["accelerator"].save_state(tmp_path / "saved")
        exec(loop, names)
        models.append(names["model"])
    assert same(*models)
