"""benchmarks/: each script runs, compares equal computations, and reports what it records."""

import functools
import importlib
import inspect
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flatmin import fit
from flatmin.book import MLP
from flatmin.measure import hessian
from flatmin.stack import initial_module

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="this distribution has no benchmarks/")
TOPICS = ("stack", "sam", "m_sam", "stiffness", "spectrum", "mixup")
NAMES = (*TOPICS, "common", "report", "run_all")


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Scripts import each other by name, as when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """Whenever a script looks at the clock, a second has passed."""
    seconds = itertools.count()
    for name in ("common", "run_all"):
        clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
        monkeypatch.setattr(script(name), "time", clock)


def script(name):
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------- all of them


def check(record, printed):
    """The required entries of every record, and what must have been printed."""
    for name in ("device", "threads", "python", "torch", "flatmin", "commit", "load"):
        assert f"{name} {record['setting'][name]}" in printed
    for part in record["parts"].values():
        assert part["title"] in printed and part["rows"]
        for row in part["rows"]:
            assert row["turns"] >= 1 and row["case"]
            assert row["sides"][part["unit"]]["ratio"] == 1
            for name, side in row["sides"].items():
                assert name in printed
                assert 0 < side["seconds"] < math.inf
                assert 0 < side["quartiles"][0] <= side["ratio"] <= side["quartiles"][1]
            assert 0 < row["floor"]["seconds"] < math.inf


@pytest.mark.parametrize("topic", TOPICS)
def test_a_benchmark_runs_and_records(topic, tmp_path, capsys, monkeypatch):
    file = tmp_path / "new folder" / f"benchmark_{topic}.json"
    monkeypatch.setattr(script("stiffness"), "memory", lambda way, name, n, device: 7.0)
    script(topic).main(["--quick", "--record", str(file)])
    record, printed = json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out
    check(record, printed)
    assert ("7 MiB" in printed) is (topic == "stiffness")
    page = script("report").page(file.parent)
    assert page.count("Not recorded yet.") == len(TOPICS) - 1
    assert f"`{file.name}`: device {record['setting']['device']}" in page
    for part in record["parts"].values():
        assert f"**{part['title']}.**" in page


@pytest.mark.gpu
@pytest.mark.parametrize("topic", TOPICS)
def test_a_benchmark_runs_on_a_gpu(topic, tmp_path, capsys):
    file = tmp_path / "record.json"
    script(topic).main(["--quick", "--device", "cuda", "--record", str(file)])
    record = json.loads(file.read_text(encoding="utf-8"))
    check(record, capsys.readouterr().out)
    assert record["setting"]["device"] == torch.cuda.get_device_name()
    if topic == "stack":
        assert "graphs" in record["parts"]["runs"]["rows"][0]["sides"]


def test_the_page_is_made_from_the_records():
    """``python benchmarks/report.py`` writes the page."""
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == script("report").page()


def test_all_of_them_in_one_process(monkeypatch, capsys):
    ran = []
    for topic in TOPICS:
        main = lambda options, topic=topic: ran.append((topic, options))
        monkeypatch.setattr(script(topic), "main", main)
    monkeypatch.setattr(script("report"), "main", lambda: ran.append("page"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script("run_all").main(["--quick"])
    assert ran == [(topic, ["--quick", "--device", "cpu"]) for topic in TOPICS]
    ran.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    script("run_all").main(["--device", "cuda"])
    assert ran == [(topic, ["--device", "cuda"]) for topic in TOPICS]
    script("run_all").main(["--record"])
    assert ("mixup", ["--record", "--device", "cuda"]) in ran
    assert ran[-1] == "page"
    assert f"all benchmarks: {2 * 2 * len(TOPICS) + 1} s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seconds", "0"], "--seconds must be positive"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        script("stack").main(options)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------- common.py


def test_ratios_are_taken_within_a_turn():
    """Ratios do not change if the machine is ten times slower in every other turn."""
    slow = [1.0, 10.0, 1.0, 10.0, 1.0]
    row = script("common").compare({"ours": slow, "theirs": [3 * s for s in slow]}, "ours")
    assert row["turns"] == 5
    assert row["sides"]["theirs"] == {"seconds": 3.0, "ratio": 3.0, "quartiles": [3.0, 3.0]}
    row = script("common").compare({"ours": [1.0] * 5, "theirs": [5.0, 1.0, 4.0, 2.0, 3.0]}, "ours")
    assert row["sides"]["theirs"]["ratio"] == 3 and row["sides"]["theirs"]["quartiles"] == [2, 4]


def test_turns_rotate(monkeypatch):
    common, called = script("common"), []
    bench = common.Benchmark("stack", "", ["--quick"])
    sides = {name: lambda name=name: called.append(name) for name in "abc"}
    row = bench.turns(sides, "a", times=lambda f: f() or 1.0, least=3)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"
    assert row["turns"] == 3
    called.clear()
    bench.turns(sides, "a", times=lambda f: f() or 1.0, least=1, warm_up=False)
    assert "".join(called) == "bca"


def test_a_floor_is_the_longer_of_arithmetic_and_bytes(monkeypatch):
    common = script("common")
    monkeypatch.setattr(common, "matmul_rate", lambda device: 4.0)
    monkeypatch.setattr(common, "copy_rate", lambda device, footprint: max(footprint, 1) / 10)
    for needs, seconds, limit in (
        ({"multiplications": 8}, 2.0, "arithmetic"),
        ({"multiplications": 80, "bytes": 6}, 20.0, "arithmetic"),
        ({"multiplications": 8, "bytes": 6}, 10.0, "bytes"),
        ({"multiplications": 8, "bytes": 60, "footprint": 100}, 6.0, "bytes"),
    ):
        found = common.floor("cpu", **needs)
        assert (found["seconds"], found["of"]) == (seconds, limit)


def test_rates_are_those_of_the_fastest_repeat(monkeypatch):
    common, times = script("common"), [4.0, 2.0, 8.0]
    monkeypatch.setattr(common.Clock, "time", lambda clock, function: times.pop() if times else 9.0)
    assert common.matmul_rate("cpu", repeats=3) == 512**3 / 2
    times.extend([4.0, 2.0, 8.0])
    assert common.copy_rate("cpu", 2**21, repeats=3) == 2**21 / 2


def test_a_busy_machine_is_reported(monkeypatch, capsys):
    common = script("common")
    for before, after, warning in (
        (0.1, 1.1, ""),
        (2.0, 1.1, "when this began"),
        (0.1, 3.0, "at the end"),
    ):
        monkeypatch.setattr(common, "LOAD", before)
        monkeypatch.setattr(common, "load", lambda after=after: after)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        bench = common.Benchmark("stack", "", [])
        bench.finish()
        printed = capsys.readouterr().out
        assert ("WARNING" in printed) is bool(warning) and warning in printed
        assert bench.setting["load"] == before and bench.setting["load at the end"] == after


def test_multiplications_are_counted():
    """The multiplications of a floor, against the flops that PyTorch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    common = script("common")
    convolution = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*convolution, nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 4))
    x, y, params = torch.randn(7, 2, 6, 6), torch.randint(4, (7,)), list(model.parameters())
    assert common.layers(model, x) == [(16, 18, 3), (1, 48, 5), (1, 5, 4)]
    assert common.size(model) == sum(p.numel() for p in params)

    def counted(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops() / 2 / len(x), result

    loss = lambda: nn.functional.cross_entropy(model(x), y)
    forward_backward, _ = counted(lambda: torch.autograd.grad(loss(), params))
    assert forward_backward == common.gradient_multiplications(model, x)
    model = MLP(6, 5, 4, 3)
    x, y, params = torch.randn(7, 6), torch.randint(3, (7,)), list(model.parameters())
    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    v = [torch.randn_like(p) for p in params]
    product, _ = counted(lambda: torch.autograd.grad(gradient, params, v))
    assert product >= common.product_multiplications(model, x) > 0.8 * product


def test_times_and_ratios_are_legible():
    common = script("common")
    assert [common.seconds_text(s) for s in (12.34, 0.5, 0.00213, 1234.5, 3e-6)] == [
        "12.3 s",
        "500 ms",
        "2.13 ms",
        "1234 s",
        "3 µs",
    ]
    side = {"ratio": 2.345, "quartiles": [2.1, 14.0], "error": 3e-6, "products": 12}
    assert common.ratio_text(side) == "2.35× [2.10–14.00]"
    assert common.notes(side) == ["12 products", "error 3e-06"]


# ---------------------------------------------------------------------------------- the sides agree


def ended(module):
    return {name: w.clone() for name, w in module.state_dict().items()}


def test_stack_and_loop_train_the_same(monkeypatch):
    """Each takes the same steps from the same weights, so both clocks time the same work."""
    benchmark, networks, modules = script("stack"), [], []
    monkeypatch.setattr(
        benchmark, "fit", lambda *a, **k: networks.append(fit(*a, networks="last", **k).networks)
    )
    monkeypatch.setattr(
        benchmark, "initial_module", lambda *a: modules.append(initial_module(*a)) or modules[-1]
    )
    data = benchmark.make_data((5, 6, 3), examples=30)
    for side in (benchmark.time_stack, benchmark.time_loop):
        assert side(lambda: MLP(5, 6, 3), data, 2, 4, 10, "cpu") > 0
    assert len(modules) == 2
    for seed, module in enumerate(modules):
        stacked = networks[0].module(seed=seed).state_dict()
        torch.testing.assert_close(stacked, ended(module), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_graphs_train_the_same(monkeypatch):
    benchmark, modules = script("stack"), []
    monkeypatch.setattr(
        benchmark, "initial_module", lambda *a: modules.append(initial_module(*a)) or modules[-1]
    )
    data = benchmark.make_data((5, 6, 3), examples=30).to("cuda")
    for side in (benchmark.time_loop, benchmark.time_graphs):
        assert side(lambda: MLP(5, 6, 3), data, 2, 4, 10, "cuda") > 0
    for one, other in zip(modules[:2], modules[2:], strict=True):
        torch.testing.assert_close(ended(one), ended(other), rtol=1e-4, atol=1e-5)


def test_all_sams_make_the_same_steps():
    """With the same rho, on the same batch."""
    benchmark = script("sam")
    sides = {name: side for name, side in benchmark.SIDES.items() if name != "two passes"}
    if script("common").version(benchmark.PEER):
        sides["peer"] = benchmark.PytorchOptimizer
    weights = {}
    for name, side in sides.items():
        torch.manual_seed(1)
        loop = benchmark.Loop(lambda: MLP(6, 8, 10), torch.ones(5, 6), side, "cpu")
        for _ in range(3):
            loop.step()
        weights[name] = ended(loop.module)
    for name in weights:
        torch.testing.assert_close(weights[name], weights["flatmin"], rtol=1e-5, atol=1e-6)
    plain = benchmark.Loop(lambda: MLP(6, 8, 10), torch.ones(5, 6), benchmark.TwoPasses, "cpu")
    for _ in range(3):
        plain.step()
    last = list(weights["flatmin"])[-1]
    assert not torch.equal(ended(plain.module)[last], weights["flatmin"][last])  # rho matters


@pytest.mark.parametrize("shards", [1, 4])
def test_all_m_sams_have_the_same_gradient(shards):
    sides = script("m_sam").sides(shards)
    expected = sides.pop("by hand")()
    for side in sides.values():
        gradient, _ = side()
        torch.testing.assert_close(list(gradient.values()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_example", [False, True])
def test_all_mixups_mix(monkeypatch, per_example):
    """At λ = 1/4: a quarter of the example and three of its partner, in inputs and targets."""
    benchmark = script("mixup")
    sides = {"flatmin": benchmark.flatmin, "idiom": benchmark.idiom}
    if script("common").version("timm"):
        sides["timm"] = benchmark.timm
    quarter = lambda a, b, size=(): np.full(size, 0.25)[()]
    monkeypatch.setattr("numpy.random.beta", quarter)
    weights = lambda u, alpha: torch.cat([0 * u + 0.25, 0 * u + 0.75])
    monkeypatch.setattr("flatmin.batch.mixup.dirichlet_weights", weights)
    x, y = 4.0 ** torch.arange(6.0), torch.arange(6)
    for side in sides.values():
        z = torch.zeros(6, 10, requires_grad=True)
        mixed, (gradient,) = side(x.view(6, 1, 1, 1), y, z, per_example)()
        partners = (mixed.flatten() - x / 4) / 0.75
        assert partners.sort()[0].tolist() == x.tolist()
        order = partners.log2().div(2).round().long()
        target = 0.25 * torch.eye(10)[y] + 0.75 * torch.eye(10)[order]
        torch.testing.assert_close(gradient, (0.1 - target) / 6)
    assert x.tolist() == [4.0**k for k in range(6)]  # timm works on a copy


@pytest.mark.parametrize("name", ["mlp", "lenet", "cnn"])
def test_all_ways_of_computing_stiffness_agree(name):
    benchmark = script("stiffness")
    problem = benchmark.problem(name, 0.25, 6, "cpu")
    expected = benchmark.identity(*problem)
    for way in benchmark.WAYS.values():
        torch.testing.assert_close(way(*problem), expected, rtol=1e-4, atol=1e-5)
    needs = benchmark.multiplications(*problem[:2], 6)
    assert 0 < needs["identity"] < needs["gradients"]


def test_memory_does_not_include_this_process():
    ballast = torch.ones(2**27)  # 512 MiB
    assert 1 < script("stiffness").memory("loop", "lenet", 50, "cpu") < 400
    del ballast


def test_all_sides_make_as_many_products(monkeypatch):
    benchmark, version = script("spectrum"), script("common").version
    model, x, y = benchmark.trained(lambda: MLP(64, 8, 10), (64,), 20, "cpu")
    count = []

    def counted(product):
        return functools.wraps(product)(lambda *given: count.append(1) or product(*given))

    make = hessian.hessian_product
    monkeypatch.setattr(hessian, "hessian_product", lambda *a, **how: counted(make(*a, **how)))
    sides = {"flatmin": benchmark.Flatmin(model, x, y)}
    if version("pyhessian"):
        sides["pyhessian"] = benchmark.PyHessian(model, x, y)
        theirs = sys.modules["pyhessian.hessian"]
        product = inspect.unwrap(theirs.hessian_vector_product)
        monkeypatch.setattr(theirs, "hessian_vector_product", counted(product))
    if version("curvlinops-for-pytorch"):
        sides["curvlinops"] = benchmark.Curvlinops(model, x, y)
        operator = sides["curvlinops"].operator
        monkeypatch.setattr(operator, "_matmat", counted(operator._matmat))
    for side in sides.values():
        side.density(7, 3, seed=0)
        assert len(count) == 21
        side.largest(9, seed=0)
        assert len(count) == 30
        count.clear()
