"""SAM as an optimizer in real training loops."""

import copy
import io
import json
import math
import pickle
import warnings
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from problems import INF, climb, closure_of, flatten, in_two_processes, norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flatmin import SAM, BatchTransform, dual_norm_perturbation
from flatmin.batch import Gaussian, Mixup
from flatmin.layers import Dropout


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(n=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(
        3, (n,), generator=generator
    )


def two_phases(model, optimizer, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    return loss


BASES = {
    "sgd": lambda params, **more: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.01, **more
    ),
    "adam": lambda params, **more: torch.optim.Adam(params, lr=0.01, **more),
    "adamw": lambda params, **more: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, **more),
}


def weights_of(model):
    return [w.detach().clone() for w in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "p, adaptive", [(2, False), (1, False), (3, False), (INF, False), (2, True)]
)
def test_equals_the_plain_algorithm_over_100_steps(base, p, adaptive):
    model, twin = network(), network()
    optimizer = SAM(BASES[base](model.parameters()), 0.2, p, adaptive)
    plain = BASES[base](twin.parameters())
    for step in range(100):
        x, y = batch(seed=step)
        loss = optimizer.step(closure_of(model, optimizer, x, y))
        value = nn.functional.cross_entropy(twin(x), y)
        g = torch.autograd.grad(value, list(twin.parameters()))
        t = flatten(list(twin.parameters())).detach().abs() + 0.01 if adaptive else 1.0
        flat, kept = climb(flatten(g), 0.2, p, t), weights_of(twin)
        with torch.no_grad():
            for w, e in zip(twin.parameters(), flat.split([w.numel() for w in kept]), strict=True):
                w += e.view_as(w)
        plain.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        with torch.no_grad():
            for w, old in zip(twin.parameters(), kept, strict=True):
                w.copy_(old)
        plain.step()
        assert loss.item() == pytest.approx(value.item(), rel=1e-11)
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_closure_and_two_phases_are_the_same_bitwise(base):
    model, twin = network(), network()
    optimizer, other = (SAM(BASES[base](m.parameters()), 0.2) for m in (model, twin))
    for step in range(10):
        x, y = batch(seed=step)
        loss = optimizer.step(closure_of(model, optimizer, x, y))
        assert torch.equal(loss, two_phases(twin, other, x, y))
    assert same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("exponent", [-44, -30, -6, 0, 6, 30])
@pytest.mark.parametrize("p", [1, 1.5, 2, INF])
def test_first_step_moves_by_the_kernel_whatever_the_size_of_the_gradient(exponent, p):
    g = torch.tensor([3.0, -1.0, 2.0]) * 10.0**exponent
    w = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 1))]
    w[0].grad, w[1].grad = g[:2].clone(), g[2:].clone().view(1, 1)
    optimizer = SAM(torch.optim.SGD(w, lr=0.1), rho=0.5, p=p)
    optimizer.first_step()
    moved = flatten([x.detach() for x in w])
    torch.testing.assert_close(moved, dual_norm_perturbation(g, 0.5, p), rtol=1e-6, atol=0)
    assert torch.equal(flatten([x.grad for x in w]), g)


def test_clean_loss_is_returned_even_if_it_is_zero():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)

    def closure():
        optimizer.zero_grad()
        loss = w.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 0.0
    assert torch.allclose(w, torch.full((2,), -0.1))


@pytest.mark.parametrize("args", [(), 3, {"x": 1}, [nn.Linear(1, 1)]])
def test_a_closure_may_be_an_object_with_arguments(args):
    model, twin = network(), network()
    optimizer, other = (SAM(BASES["sgd"](m.parameters()), 0.2) for m in (model, twin))

    class Closure:
        def __init__(self):
            self.args = args

        def __call__(self):
            return closure_of(model, optimizer, *batch())()

    optimizer.step(Closure())
    other.step(partial(lambda run: run(), closure_of(twin, other, *batch())))
    assert same(weights_of(model), weights_of(twin))


def test_step_works_under_no_grad():
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()))
    before = weights_of(model)
    with torch.no_grad():
        optimizer.step(closure_of(model, optimizer, *batch()))
    assert not same(before, weights_of(model))


@pytest.mark.parametrize("zeroing", [None, "to zero"])
def test_a_closure_need_not_zero_the_gradients(zeroing):
    """Nor what was there before: only the gradients of its own two calls count."""
    model, twin = network(), network()
    optimizer, other = (SAM(BASES["adam"](m.parameters()), 0.2) for m in (model, twin))
    kept = []

    def closure():
        if zeroing:
            optimizer.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        kept.append([w.grad for w in model.parameters()])
        return loss

    for step in range(4):
        x, y = batch(seed=step)
        model(x).sum().backward()  # somebody else's
        optimizer.step(closure)
        first = torch.autograd.grad(
            nn.functional.cross_entropy(twin(x), y), list(twin.parameters())
        )
        other.step(closure_of(twin, other, x, y))
        torch.testing.assert_close(kept[2 * step], list(first), rtol=0, atol=0)
    assert same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("zeroing", [True, False])
def test_parameters_of_the_first_pass_only_have_no_gradient_in_the_second(zeroing):
    model = Branches()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5), rho=0.3)
    uses = iter(["a", "a", "ab", "a"])

    def closure():
        if zeroing:
            optimizer.zero_grad(set_to_none=False)
        model.used = next(uses)
        model().backward()

    optimizer.step(closure)
    assert model.b.grad is None
    optimizer.step(closure)
    assert model.b.grad is None and len(optimizer.state) == 1


# Groups


def test_splitting_a_group_changes_nothing():
    model, twin = network(), network()
    (a, b, c, d), whole = model.parameters(), list(twin.parameters())
    groups = [{"params": [a]}, {"params": [b, c], "rho": 0.2, "p": 2.0}, {"params": [d]}]
    split, one = SAM(torch.optim.SGD(groups, lr=0.1), 0.2), SAM(torch.optim.SGD(whole, lr=0.1), 0.2)
    for _ in range(5):
        split.step(closure_of(model, split, *batch()))
        one.step(closure_of(twin, one, *batch()))
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-14, atol=1e-15)


def test_groups_have_their_own_radius_norm_and_adaptivity():
    generator = torch.Generator().manual_seed(0)
    w = [nn.Parameter(torch.randn(3, generator=generator).double()) for _ in range(6)]
    g = [torch.randn(3, generator=generator).double() for _ in w]
    settings = [
        {"rho": 0.1},
        {"rho": 0.3, "adaptive": True, "eta": 0.2},
        {"p": INF},
        {"p": INF, "rho": 2.0},
        {"rho": 0.0},
        {"p": 1},
    ]
    groups = [{"params": [p]} | s for p, s in zip(w, settings, strict=True)]
    for p, x in zip(w, g, strict=True):
        p.grad = x.clone()
    before = [p.detach().clone() for p in w]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.5)
    optimizer.first_step()
    moved = [p.detach() - b for p, b in zip(w, before, strict=True)]
    t = torch.cat([torch.full((3,), 0.1, dtype=torch.double), 0.3 * (before[1].abs() + 0.2)])
    expected = [
        *climb(torch.cat(g[:2]), 1.0, 2, t).split(3),
        0.5 * g[2].sign(),
        2.0 * g[3].sign(),
        torch.zeros(3).double(),
        climb(g[5], 0.5, 1),
    ]
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-15)
    optimizer.restore()
    assert same([p.detach() for p in w], before)


def test_add_param_group_and_named_parameters():
    model = network()
    optimizer = SAM(torch.optim.SGD(model[0].named_parameters(), lr=0.1), rho=0.2)
    optimizer.add_param_group({"params": list(model[2].named_parameters()), "rho": 0.0})
    assert [g["rho"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1.0})
    assert len(optimizer.param_groups) == 2
    before = weights_of(model)
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.first_step()
    after = weights_of(model)
    assert same(before[2:], after[2:]) and not torch.equal(before[0], after[0])
    optimizer.second_step()
    assert not same(before[2:], weights_of(model)[2:])


# What PyTorch expects of an optimizer


@pytest.mark.parametrize("on", ["sam", "base"])
@pytest.mark.parametrize("closure", [True, False])
def test_schedulers_work_on_either_without_a_warning(on, closure):
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer if on == "sam" else base, 1, gamma=0.5
        )
        for _ in range(3):
            if closure:
                optimizer.step(closure_of(model, optimizer, *batch()))
            else:
                two_phases(model, optimizer, *batch())
            scheduler.step()
    assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1 / 8
    # cycles the momentum, too
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)


def test_state_is_that_of_the_base_and_existing_state_is_kept():
    model = network()
    base = torch.optim.Adam(model.parameters())
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    base.step()
    optimizer = SAM(base)
    assert optimizer.state is base.state and len(base.state) == 4
    assert optimizer.defaults is base.defaults
    two_phases(model, optimizer, *batch())
    assert all(s["step"] == 2 for s in base.state.values())
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in base.state.values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("foreach", [True, False])
def test_resume_is_bitwise(base, foreach):
    """With a checkpoint in a file, made in the middle of a gradient accumulation."""

    def train(model, optimizer, scheduler, steps):
        for step in steps:
            optimizer.step(closure_of(model, optimizer, *batch(seed=step)))
            scheduler.step()

    def make():
        model = network()
        optimizer = SAM(BASES[base](model.parameters(), foreach=foreach), rho=0.2, p=1.5)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    whole = make()
    train(*whole, range(10))
    first = make()
    train(*first, range(5))
    model = first[0]
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()  # half of a batch
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = make()
    second[1].param_groups[0]["rho"] = 9.0  # comes from the checkpoint
    for part, content in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(content)
    train(*second, range(5, 10))
    assert same(weights_of(second[0]), weights_of(whole[0]))
    for a, b in zip(whole[1].state.values(), second[1].state.values(), strict=True):
        assert all(
            torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a if a[k] is not None
        )
    assert second[1].param_groups[0]["rho"] == 0.2 and second[1].param_groups[0]["p"] == 1.5
    train(*first, range(5, 10))  # drops the half of a batch
    assert same(weights_of(first[0]), weights_of(whole[0]))


def test_checkpoints_are_exchanged_with_the_base_optimizer():
    model, twin = network(), network()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.2)
    two_phases(model, optimizer, *batch())
    plain = BASES["sgd"](twin.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    fresh = BASES["sgd"](twin.parameters()).state_dict()
    optimizer.load_state_dict(fresh)
    assert optimizer.param_groups[0]["rho"] == 0.2 and not optimizer.state
    optimizer.base_optimizer.load_state_dict(fresh)
    two_phases(model, optimizer, *batch())
    assert optimizer.param_groups[0]["rho"] == 0.2


def test_perturbed_weights_cannot_be_saved():
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()))
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.first_step()
    for call in (
        optimizer.state_dict,
        lambda: pickle.dumps(optimizer),
        lambda: copy.deepcopy(optimizer),
        lambda: optimizer.load_state_dict({}),
    ):
        with pytest.raises(RuntimeError, match="must wait for second_step"):
            call()
    optimizer.second_step()
    optimizer.state_dict()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_bitwise_and_independently(how):
    model = network()
    optimizer = SAM(BASES["adam"](model.parameters()), 0.3, INF, model=model)
    two_phases(model, optimizer, *batch())
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.model is twin and other.param_groups[0]["params"][0] is twin[0].weight
    before = weights_of(twin)
    two_phases(model, optimizer, *batch())
    assert same(weights_of(twin), before)
    two_phases(twin, other, *batch())
    assert same(weights_of(twin), weights_of(model))
    assert repr(other) == repr(optimizer) and repr(other).startswith("SAM around Adam")
    torch.save(model, io.BytesIO())  # the hook does not save the optimizer
    assert len(pickle.dumps(model)) < len(pickle.dumps(optimizer))


def test_hooks_are_called_once_per_step():
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: calls.append("base"))
    optimizer.register_state_dict_post_hook(lambda _, content: content | {"more": 1})
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda _, content: calls.append(content["more"]))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.step(closure_of(model, optimizer, *batch()))
    two_phases(model, optimizer, *batch())
    assert calls == ["pre", "base", "post"] * 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[6:] == ["save", 1, "loaded"]


def test_zero_grad():
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()))
    model(batch()[0]).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in model.parameters())
    optimizer.zero_grad()
    assert all(w.grad is None for w in model.parameters())


def test_the_default_dtype_does_not_matter():
    model, twin = network(), network()
    optimizer, other = (SAM(BASES["sgd"](m.parameters()), 0.2, 3) for m in (model, twin))
    x, y = batch()
    optimizer.step(closure_of(model, optimizer, x, y))
    torch.set_default_dtype(torch.float64)
    try:
        other.step(closure_of(twin, other, x, y))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(weights_of(model), weights_of(twin))


def test_distributed_checkpoints_are_those_of_the_base_optimizer():
    """PyTorch makes a fresh optimizer's state by a step() without a closure."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, twin = network(), network()
    optimizer, other = (SAM(BASES["adamw"](m.parameters()), 0.2) for m in (model, twin))
    optimizer.param_groups[0]["rho"] = 0.4
    two_phases(model, optimizer, *batch())
    content = state_dict.get_optimizer_state_dict(model, optimizer.base_optimizer)
    state_dict.set_model_state_dict(twin, model.state_dict())
    state_dict.set_optimizer_state_dict(twin, other.base_optimizer, copy.deepcopy(content))
    assert other.param_groups[0]["rho"] == 0.4
    for step in range(3):
        for pair in ((model, optimizer), (twin, other)):
            two_phases(*pair, *batch(seed=step))
    assert same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("given", ["sam", "base"])
def test_distributed_checkpoints_resume_bitwise(base, given):
    """Into a fresh SAM; from a fresh one, too, whose weights and buffers stay as they are."""
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    of = lambda optimizer: optimizer if given == "sam" else optimizer.base_optimizer
    model, twin = network(), network(seed=1)
    optimizer, other = (SAM(BASES[base](m.parameters()), 0.2, model=m) for m in (model, twin))
    before = weights_of(model)
    state_dict.get_optimizer_state_dict(model, of(optimizer))
    assert same(weights_of(model), before) and optimizer.param_groups[0]["lr"] > 0
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, *batch(seed=step)))
    saved = copy.deepcopy(state_dict.get_state_dict(model, of(optimizer)))
    state_dict.set_state_dict(twin, of(other), model_state_dict=saved[0], optim_state_dict=saved[1])
    for step in range(3, 6):
        for m, o in ((model, optimizer), (twin, other)):
            o.step(closure_of(m, o, *batch(seed=step)))
    assert same(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("lr, gradient", [(0.0, 1.0), (0.1, 0.0), (0.0, None)])
def test_a_forgotten_closure_is_an_error(lr, gradient):
    """Also while the learning rate is zero, as at the start of a warm-up."""
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.AdamW([w], lr=lr))
    w.grad = None if gradient is None else torch.full((2,), gradient)
    with pytest.raises(RuntimeError, match=r"step\(\) must get a closure"):
        optimizer.step()
    assert not optimizer.state


def test_compiled_step_is_the_same():
    model, twin = network(), network()
    optimizer, other = (SAM(BASES["sgd"](m.parameters()), 0.2) for m in (model, twin))
    compiled = torch.compile(
        lambda: optimizer.step(closure_of(model, optimizer, *batch())), backend="eager"
    )
    for _ in range(3):
        compiled()
        other.step(closure_of(twin, other, *batch()))
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-14, atol=1e-15)
    torch._dynamo.reset()


EAGER = [("eager", given, phases) for given in ("original", "compiled", None) for phases in (1, 2)]


@pytest.mark.parametrize(("backend", "given", "phases"), [*EAGER, ("aot_eager", "compiled", 1)])
def test_a_compiled_model_makes_the_same_steps(backend, given, phases):
    """With batch statistics and dropout, which repeat only if SAM sees the model that is called."""
    torch.manual_seed(0)
    model = Noisy().double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    models = {"original": model, "compiled": compiled, None: None}
    if phases == 2 and given is None:
        model.drop.p = twin.drop.p = 0.0  # without model=, two phases do not repeat it
    optimizer = SAM(BASES["sgd"](model.parameters()), 0.2, model=models[given])
    other = SAM(BASES["sgd"](twin.parameters()), 0.2, model=None if given is None else twin)
    for m, o in ((compiled, optimizer), (twin, other)):
        torch.manual_seed(1)
        for step in range(3):
            x, y = batch(seed=step)
            if phases == 2:
                two_phases(m, o, x, y)
            else:
                o.step(closure_of(m, o, x, y))
    torch._dynamo.reset()
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked
    assert model.norm.num_batches_tracked == (6 if given is None else 3)
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-12, atol=1e-13)


def test_phases_out_of_order_are_named():
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()))
    before = weights_of(model)
    for call in (optimizer.second_step, optimizer.step):
        with pytest.raises(
            RuntimeError, match=r"step\(\) must get a closure, or come after first_step"
        ):
            call()
    for value in ([], model(batch()[0]).sum()):
        with pytest.raises(TypeError, match=r"closure must be a function .*, got (\[\]|tensor)"):
            optimizer.step(value)
    model(batch()[0]).sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step.. was called twice"):
        optimizer.first_step()
    optimizer.restore()
    assert same(weights_of(model), before)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\) must not come after first_step\(\)"):
        optimizer.step(lambda: 0.0)
    optimizer.restore()
    optimizer.step(lambda: 0.0)
    assert same(weights_of(model), before)


def test_bad_base_optimizers_are_named():
    w = [nn.Parameter(torch.ones(2))]
    good = torch.optim.SGD(w, lr=0.1)
    for bad in (torch.optim.SGD, w, SAM(good)):
        with pytest.raises(TypeError, match="base_optimizer must be an instance of an optimizer"):
            SAM(bad)
    with pytest.raises(
        TypeError, match=r"an optimizer that has its own settings.*\['lr', 'momentum'\]"
    ):
        SAM(w, torch.optim.SGD, lr=0.1, momentum=0.9)  # as in other packages

    class WithRho(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.defaults["rho"] = 0.9

    with pytest.raises(
        ValueError, match=r"must have no hyperparameter named like SAM's, got \['rho'\]"
    ):
        SAM(WithRho(w))
    with pytest.raises(ValueError, match="model must be the DistributedDataParallel module"):
        SAM(good, per_rank=True)
    with pytest.raises(TypeError, match="must step without a closure, got LBFGS"):
        SAM(torch.optim.LBFGS(w))
    with pytest.raises(ValueError, match="maximize must be False in all groups"):
        SAM(torch.optim.SGD([{"params": w, "maximize": True}], lr=0.1))
    with pytest.raises(ValueError, match=r"got \['rho'\] in Adadelta; use another optimizer"):
        SAM(torch.optim.Adadelta(w))
    for model in ([network()], torch.jit.script(network())):
        with pytest.raises(TypeError, match="model must be None or a Module that is not scripted"):
            SAM(good, model=model)
    for group in ({}, {"adaptive": 0.01}):  # eta in the place of adaptive
        with pytest.raises(ValueError, match="adaptive must be True or False, got 0.01"):
            SAM(torch.optim.SGD([{"params": w} | group], lr=0.1), 0.1, 2.0, 0.01)
    base = torch.optim.SGD(w, lr=0.1)
    with pytest.raises(ValueError, match="adaptive must be True or False"):
        SAM(base, adaptive=0.01)
    assert "adaptive" not in base.param_groups[0]  # the next attempt starts anew
    other = {"params": [nn.Parameter(torch.ones(2))], "maximize": True}
    with pytest.raises(ValueError, match="maximize must be False in all groups"):
        SAM(torch.optim.SGD(w, lr=0.1)).add_param_group(other)


# Faults


class Branches(nn.Module):
    """A model of which only the parts in ``used`` have a gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor([1.0, 2.0]).double()) for _ in range(3))
        self.used = "ab"

    def forward(self):
        return sum((getattr(self, name) ** 2).sum() for name in self.used)


@pytest.mark.parametrize(
    "first, second", [("ab", "bc"), ("ab", "c"), ("a", "abc"), ("", "a"), ("ab", "")]
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_without_gradient_in_either_pass(first, second, set_to_none):
    model = Branches()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)
    before, passes = weights_of(model), iter([first, second])

    def closure():
        optimizer.zero_grad(set_to_none)
        model.used = next(passes)
        if model.used:
            model().backward()

    optimizer.step(closure)
    moved = climb(2 * torch.cat([before[0]] * len(first)), 0.3, 2).split(2) if first else ()
    moved = dict(zip(first, moved, strict=True))
    for name, w, old in zip("abc", model.parameters(), before, strict=True):
        g = 2 * (old + moved.get(name, 0)) if name in second else 0 * old
        torch.testing.assert_close(w.detach(), old - 0.1 * g, rtol=1e-14, atol=0)
        if name not in second:
            assert torch.equal(w, old)


@pytest.mark.parametrize("decay", [0.0, 0.25])
@pytest.mark.parametrize("p, adaptive", [(2, False), (1, False), (INF, True)])
def test_a_zero_gradient_leaves_the_step_to_the_base(decay, p, adaptive):
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    old = w.detach().clone()
    optimizer = SAM(torch.optim.SGD([w], lr=0.5, weight_decay=decay), 0.1, p, adaptive)
    optimizer.step(lambda: (w * 0).sum().backward())
    assert torch.equal(w, old * (1 - 0.5 * decay)) and optimizer.skipped == 0


@pytest.mark.parametrize("bad", [INF, -INF, math.nan])
@pytest.mark.parametrize("broken_pass", [0, 1])
@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_broken_gradients_skip_the_step_bitwise(bad, broken_pass, closure, base):
    model = network()
    optimizer = SAM(BASES[base](model.parameters()), rho=0.2)
    two_phases(model, optimizer, *batch())
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    calls = []

    def backward():
        model.zero_grad()
        nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        if len(calls) == broken_pass:
            model[2].weight.grad[1, 2] = bad
        calls.append(1)
        return 0.5

    with pytest.warns(UserWarning, match="so the step is skipped"):
        if closure:
            assert optimizer.step(backward) == 0.5
        else:
            backward()
            optimizer.first_step(zero_grad=True)
            backward()
            optimizer.second_step()
    assert same(weights_of(model), before) and optimizer.skipped == 1
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)
    if closure:
        assert len(calls) == 1 + broken_pass  # a second pass would be useless
    optimizer.zero_grad()
    two_phases(model, optimizer, *batch())
    assert not same(weights_of(model), before) and optimizer.skipped == 1


def test_large_finite_gradients_are_not_treated_as_infinite():
    w = nn.Parameter(torch.zeros(4))
    optimizer = SAM(torch.optim.SGD([w], lr=1e-38), rho=0.5)
    optimizer.step(lambda: setattr(w, "grad", torch.full((4,), 1e38)))
    assert torch.allclose(w, torch.full((4,), -1.0)) and optimizer.skipped == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("p", [2, 3])
def test_an_exception_in_the_second_pass_leaves_everything_as_it_was(error, p):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    x, y = batch()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.5, p=p, model=model
    )
    good = closure_of(model, optimizer, x.float(), y)
    optimizer.step(good)
    before, after_first = weights_of(model), []

    def closure():
        if after_first:
            assert not same(weights_of(model), before)
            model(x.float())
            raise error("in the second pass")
        good()
        after_first.extend([torch.get_rng_state(), [b.clone() for b in model.buffers()]])

    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match="in the second pass"):
        optimizer.step(closure)
    assert same(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), after_first[0])
    assert same(list(model.buffers()), after_first[1])
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    optimizer.step(good)
    assert not same(weights_of(model), before)


def test_an_error_in_the_perturbation_leaves_the_weights_as_they_were(monkeypatch):
    model = network()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.5, p=3)
    before = weights_of(model)
    model(batch()[0]).sum().backward()
    add = torch._foreach_add_

    def fail(weights, *args, **kwargs):
        add(weights, *args, **kwargs)
        raise MemoryError("half way")

    monkeypatch.setattr(torch, "_foreach_add_", fail)
    with pytest.raises(MemoryError):
        optimizer.first_step()
    monkeypatch.undo()
    assert same(weights_of(model), before)
    optimizer.first_step()
    optimizer.second_step()


@pytest.mark.parametrize("p, adaptive", [(2, False), (1.5, True)])
def test_storage_is_never_rebound(p, adaptive):
    flat = torch.randn(50)
    w = [nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[20:])]  # a flattened buffer
    optimizer = SAM(torch.optim.SGD(w, lr=0.1, momentum=0.9), 0.3, p, adaptive)
    where = [x.data_ptr() for x in w]
    for _ in range(3):
        sum((x**2).sum() for x in w).backward()
        optimizer.first_step(zero_grad=True)
        assert [x.data_ptr() for x in w] == where
        sum((x**2).sum() for x in w).backward()
        optimizer.second_step(zero_grad=True)
        assert [x.data_ptr() for x in w] == where
    assert torch.equal(flat, torch.cat([x.detach().flatten() for x in w]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thousand_steps_without_drift(dtype):
    w = nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype))
    old = w.detach().clone()
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.7)
    for step in range(1000):
        w.grad = torch.randn(100, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.first_step()
        optimizer.second_step()
    assert torch.equal(w, old)


class Allocations(TorchDispatchMode):
    """Counts the bytes of new memory that operations allocate."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = lambda tree: [
            x for x in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(x)
        ]
        result = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in leaves((args, kwargs))}
        new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in leaves(result)}
        self.bytes += sum(n for where, n in new.items() if where not in known)
        return result


def test_memory_is_one_copy_of_the_weights():
    model = nn.Sequential(*[nn.Linear(50, 50) for _ in range(4)])
    size = sum(w.numel() * w.element_size() for w in model.parameters())
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    for copies in (1, 0):
        model(torch.ones(2, 50)).sum().backward()
        with Allocations() as made:
            optimizer.first_step(zero_grad=True)
        model(torch.ones(2, 50)).sum().backward()
        with Allocations() as made_later:
            optimizer.restore()
        optimizer.zero_grad()
        assert copies * size <= made.bytes < copies * size + 300 and made_later.bytes == 0


@pytest.mark.parametrize("p, adaptive", [(2, False), (INF, False), (2, True)])
def test_gradients_of_the_first_pass_are_freed(p, adaptive):
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.1, p, adaptive)
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    grads = [weakref.ref(w.grad) for w in model.parameters()]
    optimizer.first_step(zero_grad=True)
    assert [g() for g in grads] == [None] * 4
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.second_step()


# Mixed precision


def overflowing(model, x, y, scaler):
    loss = nn.functional.cross_entropy(model(x).float(), y)
    scaler.scale(loss).backward()
    return loss


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_scaled_gradients_make_the_same_steps(closure, base):
    model, twin = network().float(), network().float()
    optimizer, plain = (SAM(BASES[base](m.parameters()), rho=0.2) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for step in range(8):
        x, y = batch(seed=step)
        x = x.float()
        run = lambda: (optimizer.zero_grad(), overflowing(model, x, y, scaler))[1]
        if closure:
            loss = optimizer.step(run, scaler)
        else:
            loss = run()
            optimizer.first_step(zero_grad=True)
            run()
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(loss, plain.step(closure_of(twin, plain, x, y)))
    assert scaler.get_scale() == 2.0**14
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("broken_pass", [0, 1])
@pytest.mark.parametrize("unscale", [True, False])
def test_scaler_skips_in_either_pass_and_lowers_the_scale(closure, broken_pass, unscale):
    model = network().float()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = batch()
    before, calls = weights_of(model), []

    def run():
        optimizer.zero_grad()
        loss = overflowing(model, x.float(), y, scaler)
        # In a step in two phases, an overflow at the weights occurs in both passes.
        if len(calls) == broken_pass or (not closure and broken_pass == 0):
            model[0].weight.grad[0, 0] = INF
        calls.append(1)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scaler shows the overflow by its scale
        if closure:
            optimizer.step(run, scaler)
        else:
            run()
            optimizer.first_step(zero_grad=True)
            run()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 32.0 and optimizer.skipped == 1
    assert same(weights_of(model), before) and not optimizer.state
    broken_pass = 99
    optimizer.step(run, scaler)
    scaler.update()
    assert not same(weights_of(model), before)


def test_float16_autocast_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # overflows at first
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        return loss

    losses = []
    for _ in range(40):
        losses.append(optimizer.step(closure, scaler).item())
        scaler.update()
    assert 0 < optimizer.skipped < 30 and losses[-1] < 0.8 * losses[0]


def test_clipping_of_unscaled_gradients_and_in_two_phases():
    model, twin = network().float(), network().float()
    x, y = batch()
    x = x.float()
    optimizer, other = (
        SAM(torch.optim.SGD(m.parameters(), lr=1.0), rho=0.2) for m in (model, twin)
    )
    scaler, second = (torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2))

    def clip(m):
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01)

    optimizer.base_optimizer.register_step_pre_hook(lambda *_: clip(model))
    before = flatten(weights_of(model))
    optimizer.step(lambda: (optimizer.zero_grad(), overflowing(model, x, y, scaler))[1], scaler)
    overflowing(twin, x, y, second)
    other.first_step(zero_grad=True)
    overflowing(twin, x, y, second)
    second.unscale_(other)
    clip(twin)
    second.step(other)
    for m in (model, twin):
        assert (flatten(weights_of(m)) - before).norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizers_hook_clips_unscaled_gradients(base):
    x, y = batch()
    weights = []
    for fused in (True, False):
        model = network().float()
        inner = base(model.parameters(), lr=0.1, fused=fused)
        norms = []
        inner.register_step_pre_hook(
            lambda *_, model=model, norms=norms: norms.append(
                nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
            )
        )
        optimizer, scaler = SAM(inner, rho=0.2), torch.amp.GradScaler("cpu", init_scale=256.0)
        for _ in range(5):
            optimizer.step(lambda m=model, s=scaler: overflowing(m, x.float(), y, s), scaler)
            scaler.update()
        assert len(norms) == 5 and max(norms) < 2.0  # not 256 times as large
        weights.append(weights_of(model))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_unscaling_in_the_closure_is_refused_by_the_scaler():
    model = network().float()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = weights_of(model)

    def closure():
        overflowing(model, batch()[0].float(), batch()[1], scaler)
        scaler.unscale_(optimizer.base_optimizer)

    with pytest.raises(RuntimeError, match="unscale_.. has already been called"):
        optimizer.step(closure, scaler)
    assert same(weights_of(model), before)


def test_clipping_in_the_closure_does_not_change_the_perturbation():
    model, twin = network(), network()
    optimizer, plain = (
        SAM(torch.optim.SGD(m.parameters(), lr=1.0), rho=0.2) for m in (model, twin)
    )
    before = flatten(weights_of(model))
    inner = closure_of(model, optimizer, *batch())
    optimizer.step(lambda: (inner(), torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))[0])
    plain.step(closure_of(twin, plain, *batch()))
    step, whole = (flatten(weights_of(m)) - before for m in (model, twin))
    torch.testing.assert_close(step, 0.01 * whole / whole.norm(), rtol=1e-4, atol=0)


def test_scaler_goes_into_step():
    model = network().float()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"optimizer.step\(closure, scaler\)"):
        scaler.step(optimizer, lambda: 0.0)
    scaler = torch.amp.GradScaler("cpu")
    overflowing(model, batch()[0].float(), batch()[1], scaler)
    with pytest.raises(RuntimeError, match=r"16-mixed does, needs the two-phase form"):
        scaler.step(optimizer)
    with pytest.raises(AssertionError, match="_scale is None"):
        torch.amp.GradScaler("cpu").step(optimizer, lambda: 0.0)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    x, y = batch()
    run = lambda: (optimizer.zero_grad(), overflowing(model, x.float(), y, disabled))[1]
    before = weights_of(model)
    optimizer.step(run, disabled)
    run()
    optimizer.first_step(zero_grad=True)
    run()
    disabled.step(optimizer)
    assert not same(weights_of(model), before)


@pytest.mark.parametrize("phases", [1, 2])
def test_autocast_may_surround_both_passes(phases):
    """Its cache of the weights in bfloat16 must not outlive them."""

    def train(surround):
        model = network().float()
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5)
        for step in range(3):
            x, y = batch(seed=step)
            x = x.float()
            autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)

            def run(x=x, y=y):
                with nullcontext() if surround else autocast():
                    loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()

            with autocast() if surround else nullcontext():
                if phases == 1:
                    optimizer.step(run)
                else:
                    run()
                    optimizer.first_step(zero_grad=True)
                    run()
                    optimizer.second_step(zero_grad=True)
        return weights_of(model)

    assert same(train(True), train(False))


def test_bfloat16_weights():
    model = network().bfloat16()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5), rho=0.2, p=1.5)
    x, y = batch()
    losses = [
        optimizer.step(closure_of(model, optimizer, x.bfloat16(), y)).item() for _ in range(20)
    ]
    assert losses[-1] < losses[0] and all(w.dtype == torch.bfloat16 for w in model.parameters())


# Accumulation


def test_microbatches_in_the_closure_are_the_whole_batch():
    model, twin = network(), network()
    optimizer, whole = (SAM(BASES["sgd"](m.parameters()), 0.3) for m in (model, twin))
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for part, target in zip(x.split(4), y.split(4), strict=True):
            loss = nn.functional.cross_entropy(model(part), target, reduction="sum") / len(x)
            loss.backward()
            total += loss.item()
        return total

    for _ in range(5):
        assert optimizer.step(closure) == pytest.approx(
            whole.step(closure_of(twin, whole, x, y)).item()
        )
    torch.testing.assert_close(weights_of(model), weights_of(twin), rtol=1e-12, atol=1e-14)


def steps_of(loop, first=lambda model, optimizer: None, make=network, **settings):
    """Three steps of a loop, after something else before the first."""
    model = make()
    optimizer = SAM(BASES["sgd"](model.parameters()), 0.2, **settings)
    first(model, optimizer)
    for step in range(3):
        loop(model, optimizer, closure_of(model, optimizer, *batch(seed=step)))
    return weights_of(model)


def test_gradients_from_before_the_step_are_dropped():
    """As in the README of the best-known package: backward(), then step(closure)."""

    def as_elsewhere(model, optimizer, closure):
        closure()
        optimizer.step(closure)

    found = steps_of(as_elsewhere)
    assert same(found, steps_of(lambda model, optimizer, closure: optimizer.step(closure)))


# Batch statistics and random numbers


class Noisy(nn.Module):
    """Batch norm, dropout and noise; records what it drew."""

    def __init__(self, dropout=nn.Dropout):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 20), nn.BatchNorm1d(20), dropout(0.5)
        self.out, self.seen = nn.Linear(20, 3), []

    def forward(self, x):
        noise = torch.randn(())
        self.seen.append(noise.item())
        dropped = self.drop(torch.ones(20))
        self.seen.append(dropped.tolist())
        return self.out(self.drop(self.norm(self.linear(x))) * dropped) + 0.1 * noise


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_batch_statistics_are_updated_once_and_randomness_repeats(closure, microbatches, dropout):
    torch.manual_seed(0)
    model = Noisy(dropout)
    twin = copy.deepcopy(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    x, y = batch()
    parts = x.float().chunk(microbatches)
    start = torch.get_rng_state()
    expected = []
    for _ in range(3):  # as in plain training
        for part in parts:
            twin(part)
        expected.append([b.clone() for b in twin.buffers()])
    after = torch.rand(3)
    torch.set_rng_state(start)

    def run():
        optimizer.zero_grad()
        for part in parts:
            nn.functional.cross_entropy(model(part), y[: len(part)]).backward()

    for step in range(3):
        model.seen.clear()
        if closure:
            optimizer.step(run)
        else:
            run()
            optimizer.first_step()
            run()
            optimizer.second_step()
        half = len(model.seen) // 2
        assert model.seen[:half] == model.seen[half:] and half == 2 * microbatches
        assert same(list(model.buffers()), expected[step])
    assert torch.equal(torch.rand(3), after)


def test_random_numbers_after_the_step_are_those_after_one_pass():
    model = Noisy()
    for use_model in (True, False):
        optimizer = SAM(
            torch.optim.SGD(model.parameters(), lr=0.0), model=model if use_model else None
        )
        torch.manual_seed(5)
        model(batch()[0].float())
        expected = torch.rand(3)
        torch.manual_seed(5)
        optimizer.step(closure_of(model, optimizer, batch()[0].float(), batch()[1]))
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("closure", [True, False])
def test_a_second_pass_that_draws_more_changes_nothing_later(closure):
    model = Noisy()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x, y = batch()
    passes = iter([0, 5])

    def run():
        loss = closure_of(model, optimizer, x.float(), y)()
        torch.rand(next(passes))
        return loss

    torch.manual_seed(5)
    model(x.float())
    expected = torch.rand(3)
    optimizer.zero_grad()
    torch.manual_seed(5)
    if closure:
        optimizer.step(run)
    else:
        run()
        optimizer.first_step()
        run()
        optimizer.second_step()
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_drawn_between_steps_do_no_harm():
    """In two phases, with noise on the data before each step and other passes in between."""
    model = Noisy()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = batch()
    for _ in range(3):
        model.eval()(x.float())
        model.train()(x.float())  # discarded by zero_grad()
        optimizer.zero_grad()
        noised = x.float() + torch.randn(x.shape)
        model.seen.clear()
        two_phases(model, optimizer, noised, y)
        assert model.seen[:2] == model.seen[2:]


@pytest.mark.parametrize("when", ["before", "between the passes"])
@pytest.mark.parametrize("what", ["metrics", "update_bn"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_passes_without_gradients_do_not_count(when, what, microbatches):
    """In two phases, in training mode, without SAM's zero_grad() before the first pass."""
    torch.manual_seed(0)
    model = Noisy()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = batch(12)
    parts = list(zip(x.float().chunk(microbatches), y.chunk(microbatches), strict=True))

    def another(at):
        if at == when and what == "metrics":
            with torch.no_grad():
                model(x.float())
        elif at == when:
            torch.optim.swa_utils.update_bn([x.float()], model)

    for _ in range(3):
        another("before")
        torch.randn(7)  # as augmentation does
        seen = []
        for finish in (optimizer.first_step, optimizer.second_step):
            model.seen.clear()
            for part, labels in parts:
                nn.functional.cross_entropy(model(part), labels).backward()
            seen.append(list(model.seen))
            statistics = [b.clone() for b in model.buffers()]
            finish(zero_grad=True)
            if len(seen) == 1:
                of_first = statistics
                another("between the passes")
        assert seen[0] == seen[1] and len(seen[0]) == 2 * microbatches
        assert same(list(model.buffers()), of_first)


# What comes before a step in two phases: nothing of it belongs to the step.


def nothing(model, optimizer, loss):
    pass


def skipped(model, optimizer, loss):
    loss()


def skipped_and_zeroed(model, optimizer, loss):
    loss().backward()
    loss()
    optimizer.zero_grad()


def failed(model, optimizer, loss):
    with pytest.raises(RuntimeError, match="implicitly created only for scalar"):
        loss().expand(2).backward()


def plain_step(model, optimizer, loss):
    loss().backward()
    optimizer.base_optimizer.step()


def plain_step_and_zeroed(model, optimizer, loss):
    loss().backward()
    optimizer.base_optimizer.step()
    model.zero_grad()


def of_a_generator(model, optimizer, loss):
    """Of a discriminator, whose weights are frozen meanwhile."""
    model.requires_grad_(False)
    loss().backward()
    model.requires_grad_(True)


def of_a_generator_and_zeroed(model, optimizer, loss):
    loss().backward()
    model.zero_grad()


def zeroed_after_forward(model, optimizer, loss):
    """In the passes, too."""
    loss().backward()


BEFORE = [
    nothing,
    skipped,
    skipped_and_zeroed,
    failed,
    plain_step,
    plain_step_and_zeroed,
    of_a_generator,
    of_a_generator_and_zeroed,
    zeroed_after_forward,
]


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("views", [1, 2])
def test_the_second_pass_repeats_that_of_the_gradient(before, views, dropout):
    """Also if the model is called twice before one backward()."""
    torch.manual_seed(0)
    model = Noisy(dropout)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = batch()
    x = x.float().requires_grad_()
    view = lambda: nn.functional.cross_entropy(model(x), y)
    for _ in range(3):
        before(model, optimizer, view)
        optimizer.base_optimizer.zero_grad()
        seen, statistics = [], []
        for finish in (optimizer.first_step, optimizer.second_step):
            model.seen.clear()
            loss = sum(view() for _ in range(views))
            if before is zeroed_after_forward:
                optimizer.zero_grad()
            loss.backward()
            seen.append(list(model.seen))
            statistics.append([b.clone() for b in model.buffers()])
            finish(zero_grad=before is not zeroed_after_forward)
        assert seen[0] == seen[1] and len(seen[0]) == 2 * views
        assert same(list(model.buffers()), statistics[0])


def test_the_first_of_several_backward_passes_is_repeated():
    """Another pass, whose loss is only looked at, lies between."""
    model = Noisy()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = batch()
    seen = []
    for finish in (optimizer.first_step, optimizer.second_step):
        model.seen.clear()
        for part, labels in zip(x.float().split(5), y.split(5), strict=True):
            nn.functional.cross_entropy(model(part), labels).backward()
            model(part).sum().item()
        seen.append(list(model.seen))
        finish(zero_grad=True)
    assert seen[0] == seen[1] and len(seen[0]) == 8


def test_a_model_in_evaluation_mode_may_have_a_part_in_training_mode():
    model = Noisy().eval()
    model.drop.train()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    two_phases(model, optimizer, batch()[0].float(), batch()[1])
    assert model.seen[:2] == model.seen[2:]


@pytest.mark.parametrize("phases", [1, 2])
def test_a_model_may_be_checkpointed_as_a_whole(phases):
    """The backward pass calls it again, with the random numbers of the forward pass."""

    def train(call):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 3)).double()
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
        for step in range(3):
            x, y = batch(seed=step)
            if phases == 1:
                optimizer.step(closure_of(lambda x: call(model, x), optimizer, x, y))
            else:
                two_phases(lambda x: call(model, x), optimizer, x, y)
        return weights_of(model)

    recomputed = train(partial(checkpoint, use_reentrant=False))
    torch.testing.assert_close(recomputed, train(lambda model, x: model(x)), rtol=1e-12, atol=0)


class Stateful(nn.Module):
    """A running mean that is kept in one of many ways."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind, self.seen = nn.Linear(4, 3), kind, []
        start = torch.zeros(3)
        if kind == "expanded":
            self.register_buffer("unused", torch.zeros(1, 3).expand(2, 3))
        if kind == "of inference mode":
            with torch.inference_mode():
                self.register_buffer("unused", torch.zeros(3))
        self.register_buffer("mean", {"none": None, "resized": torch.zeros(0)}.get(kind, start))

    def forward(self, x):
        h = self.linear(x)
        self.seen.append(None if self.mean is None else self.mean.clone())
        old = torch.zeros(3) if self.mean is None or not len(self.mean) else self.mean
        new = 0.9 * old + 0.1 * h.detach().mean(0)
        if self.kind in ("rebound", "none"):
            self.mean = new
        elif self.kind == "resized":
            self.mean.resize_(3).copy_(new)
        else:
            self.mean.copy_(new)
        return h - new


KINDS = ["in place", "rebound", "none", "resized", "expanded", "of inference mode"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phases", [1, 2])
def test_buffers_of_any_kind_count_each_batch_once(kind, phases):
    torch.manual_seed(0)
    model = Stateful(kind)
    x, y = batch()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    for _ in range(3):
        twin = copy.deepcopy(model)
        twin(x.float())
        model.seen.clear()
        if phases == 1:
            optimizer.step(closure_of(model, optimizer, x.float(), y))
        else:
            two_phases(model, optimizer, x.float(), y)
        first, second = model.seen
        assert (first is second is None) or torch.equal(first, second)
        assert torch.equal(model.mean, twin.mean)


@pytest.mark.parametrize("phases", [1, 2])
def test_lazy_layers_are_made_in_the_first_pass(phases):
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    x, y = batch()
    if phases == 1:
        optimizer.step(closure_of(model, optimizer, x.float(), y))
    else:
        two_phases(model, optimizer, x.float(), y)
    assert model[1].num_batches_tracked == 1 and model[1].running_mean.any()


@pytest.mark.parametrize("earlier", [False, True])
def test_weights_of_another_optimizer_get_the_gradient_of_the_second_pass(earlier):
    """SAM holds the body, plain SGD the head; one closure."""
    model, twin = network(), network()
    x, y = batch()
    loss = lambda m: nn.functional.cross_entropy(m(x), y)
    optimizer = SAM(torch.optim.SGD(model[0].parameters(), lr=0.1), rho=0.5, model=model)
    body, head = list(twin[0].parameters()), list(twin[2].parameters())
    epsilon = climb(flatten(torch.autograd.grad(loss(twin), body)), 0.5, 2)
    with torch.no_grad():
        for w, e in zip(body, epsilon.split([w.numel() for w in body]), strict=True):
            w += e.view_as(w)
    expected = torch.autograd.grad(loss(twin), head)
    if earlier:  # which accumulates
        loss(model).backward()
        kept = [w.grad.clone() for w in model[2].parameters()]
        expected = [a + b for a, b in zip(kept, expected, strict=True)]
    optimizer.step(closure_of(model, optimizer, x, y))
    found = [w.grad for w in model[2].parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)

    def fail():
        loss(model).backward()
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fail)
    torch.testing.assert_close([w.grad for w in model[2].parameters()], list(expected))


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
def test_only_a_dropout_with_buffers_needs_the_model(dropout):
    for given in (True, False):
        model = Noisy(dropout)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model if given else None)
        x, y = batch()
        optimizer.step(closure_of(model, optimizer, x.float(), y))
        assert (model.seen[:2] == model.seen[2:]) == (given or dropout is nn.Dropout)


@pytest.mark.parametrize("transform", [Mixup(), Gaussian(0.5)])
def test_a_batch_is_transformed_before_the_step(transform):
    """A BatchTransform has a generator of its own, which a closure would draw from twice."""
    model, seen = network(), []
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mix, count = BatchTransform(transform, 3), 0
    for x, y in (batch(seed=step) for step in range(3)):
        x, y = mix(x, y)
        optimizer.step(closure_of(model, optimizer, x, y))
        count += 1
        assert mix.count == count and len(seen) == 2 * count
        assert torch.equal(*seen[-2:]) and torch.equal(seen[-1], x)

    def closure():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((mixed := mix(*batch()))[0]), mixed[1]).backward()

    optimizer.step(closure)
    assert mix.count == count + 2 and not torch.equal(*seen[-2:])


def test_a_model_outlives_its_optimizer():
    model = Noisy()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SAM(base, model=model)
    del optimizer
    model(batch()[0].float())
    hooks = model._forward_pre_hooks, model._forward_hooks, base._optimizer_step_post_hooks
    assert not any(hooks)


# A base optimizer that has been wrapped before


def test_new_settings_replace_those_of_an_earlier_sam():
    """As when a cell of a notebook is run again."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}]
    base = torch.optim.SGD(groups, lr=0.1)
    earlier = SAM(base, rho=0.05)
    base.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.3})
    earlier.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer = SAM(base, rho=0.5, adaptive=True)
    assert [g["rho"] for g in base.param_groups] == [0.5, 0.0, 0.3, 0.5]
    assert all(g["adaptive"] for g in base.param_groups)
    base.load_state_dict(optimizer.state_dict())
    assert SAM(base).param_groups[0]["rho"] == 0.05
    assert [g["rho"] for g in base.param_groups] == [0.05, 0.0, 0.3, 0.05]


def test_settings_of_a_checkpoint_are_kept():
    model, twin = network(), network()
    saved = SAM(BASES["sgd"](model.parameters()), rho=0.5, adaptive=True).state_dict()
    base = BASES["sgd"](twin.parameters())
    base.load_state_dict(saved)
    group = SAM(base, rho=0.05).param_groups[0]
    assert group["rho"] == 0.5 and group["adaptive"]


# Kinds of tensors


def test_complex_gradients_are_refused_before_anything_changes():
    w = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(TypeError, match="must be dense and real, got one .* torch.complex64"):
        optimizer.step(lambda: w.abs().sum().backward())
    assert torch.equal(w, torch.ones_like(w))


@pytest.mark.parametrize("sparse_pass", [0, 1])
def test_sparse_gradients_are_refused_before_anything_changes(sparse_pass):
    model = nn.Embedding(5, 3)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    before, calls = weights_of(model), []

    def closure():
        optimizer.zero_grad()
        model.sparse = len(calls) == sparse_pass
        calls.append(1)
        model(torch.tensor([1, 2])).sum().backward()

    with pytest.raises(
        TypeError, match="gradients must be dense and real, got one with layout torch.sparse_coo"
    ):
        optimizer.step(closure)
    assert same(weights_of(model), before)


def test_mixed_types_and_memory_formats():
    torch.manual_seed(0)
    w = [
        nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3).double()),
        nn.Parameter(torch.randn(4).bfloat16()),
        nn.Parameter(torch.randn(5, 2).t()),
        nn.Parameter(torch.empty(0)),
    ]
    for p in (2, 1.5):
        optimizer = SAM(torch.optim.SGD(w, lr=0.1), rho=0.5, p=p)
        before, strides = [x.detach().clone() for x in w], [x.stride() for x in w]
        for x in w:
            x.grad = torch.randn_like(x)
        optimizer.first_step()
        moved = flatten([x.detach().double() - b.double() for x, b in zip(w, before, strict=True)])
        assert norm(moved, p).item() == pytest.approx(0.5, rel=2e-2)  # bfloat16 rounds
        optimizer.restore()
        assert same([x.detach() for x in w], before) and [x.stride() for x in w] == strides


def test_weights_may_change_their_type_between_steps():
    model = network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = batch()
    optimizer.step(closure_of(model, optimizer, x, y))
    model.float()
    optimizer.step(closure_of(model, optimizer, x.float(), y))
    assert all(w.dtype == torch.float32 for w in model.parameters())


@pytest.mark.gpu
def test_on_a_gpu_with_float16_and_dropout():
    torch.manual_seed(0)
    model = Noisy().cuda()
    optimizer = SAM(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    x, y = (t.cuda() for t in batch())
    where = [w.data_ptr() for w in model.parameters()]
    for _ in range(60):
        model.seen.clear()

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = nn.functional.cross_entropy(
                    model.out(model.drop(model.linear(x.float()))), y
                )
            model.seen.append(model.drop(torch.ones(20, device="cuda")).tolist())
            scaler.scale(loss).backward()
            return loss

        optimizer.step(closure, scaler)
        scaler.update()
        assert len(model.seen) == 1 or model.seen[0] == model.seen[1]
    assert 0 < optimizer.skipped < 50
    assert [w.data_ptr() for w in model.parameters()] == where
    assert all(w.isfinite().all() for w in model.parameters())


# ---------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    in_two_processes(Path(__file__).with_name("sam_distributed.py"), folder)
    files = [folder / f"results{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize(
    "check",
    [
        "ddp_global",
        "ddp_per_rank",
        "ddp_in_two_phases",
        "ddp_closure_that_does_not_zero",
        "ddp_skips_together",
        "ddp_scalers_agree",
        "ddp_static_graph",
        "ddp_compiled",
        "dtensor_placements",
        "fsdp_norm",
        "fsdp_any_p",
        "fsdp_skips_together",
        "fsdp_checkpoints",
        "fsdp1_is_refused",
    ],
)
def test_two_processes_equal_one(distributed, check):
    for results in distributed:
        if str(results[check]).startswith("not run"):
            pytest.skip(results[check])
        assert isinstance(results[check], float), results[check]
        assert results[check] <= 1e-12


def test_per_rank_and_global_perturbations_differ(distributed):
    assert all(results["ddp_global_is_not_per_rank"] > 1e-3 for results in distributed)


@pytest.mark.parametrize("view", [lambda o: o, lambda o: o.squeeze(-1), lambda o: o[:, 0]])
@pytest.mark.parametrize("zero_first", [True, False])
def test_an_output_that_is_changed_in_place_is_noticed(view, zero_first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 1))

        def forward(self, x):
            return view(self.layers(x))

    model, x, masks = Model(), torch.randn(8, 6), []
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    model.layers[1].register_forward_hook(lambda module, args, output: masks.append(output != 0))
    for end in (optimizer.first_step, optimizer.second_step):
        output = model(x)
        output -= 0.3
        loss = output.sigmoid_().square().mean()
        if not zero_first:
            optimizer.zero_grad()
        loss.backward()
        end(zero_grad=zero_first)
    assert torch.equal(*masks)
