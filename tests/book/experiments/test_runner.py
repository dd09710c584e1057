"""The experiment runner: interrupted, sharded, short of memory; the flooding study."""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from flatmin import Recipe, fit
from flatmin.book import MLP
from flatmin.book.experiments import check, flooding_synthetic, records, run, runner
from flatmin.book.experiments.__main__ import main
from flatmin.book.experiments.display import duration
from flatmin.loss import Flooding
from flatmin.optimizer import SGD

TOY = '''
"""Six random walks, each of 30 steps; every unit that is started is logged."""

import os

import torch
import xarray as xr

from flatmin.stack import stream

SOURCE = "no paper"
SETTINGS = {
    "tiny": {"methods": ["a", "b"], "steps": 30, "seeds": 3},
    "reduced": {"methods": ["a"], "steps": 1, "seeds": 1},
}


def units(settings):
    return [{"method": m, "seed": s} for m in settings["methods"] for s in settings["seeds"]]


def cost(settings):
    return 1.0 * len(units(settings)) * settings["steps"]


def run_unit(unit, settings, work):
    with open(os.environ["TOY_LOG"], "a", encoding="utf-8") as file:
        print(f"{unit['method']}{unit['seed']}", file=file)
    generator = stream(unit["seed"], unit["method"])
    walk = torch.randn(settings["steps"], generator=generator).cumsum(0)
    work.progress(settings["steps"])
    runs = xr.Dataset({"walk": ("step", walk)}, {"step": range(settings["steps"])})
    runs.attrs["data"] = f"none for {unit['method']}"
    return runs


def plot(record):
    import matplotlib.pyplot as plt

    return plt.figure()
'''

RUNNER = """
import importlib.util, sys
from flatmin.book.experiments import records
from flatmin.book.experiments.__main__ import main
records.NAMES.append("toy")
spec = importlib.util.spec_from_file_location("flatmin.book.experiments.toy", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy experiment in the registry; the units that it started, and a folder for records.

    Each unit takes a minute of its clock.
    """
    file, log = tmp_path / "toy.py", tmp_path / "log"
    file.write_text(TOY, encoding="utf-8")
    log.touch()
    monkeypatch.setenv("TOY_LOG", str(log))
    minutes = itertools.count(step=60.0)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    spec = importlib.util.spec_from_file_location("flatmin.book.experiments.toy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    records.NAMES.append("toy")
    started = lambda: log.read_text(encoding="utf-8").split()
    yield SimpleNamespace(file=file, started=started, out=tmp_path / "out", module=module)
    records.NAMES.remove("toy")


@pytest.fixture
def reference(toy, tmp_path, monkeypatch):
    """The record of an uninterrupted run in one process."""
    with monkeypatch.context() as unlogged:
        unlogged.setenv("TOY_LOG", os.devnull)
        return run("toy", "tiny", out=tmp_path / "reference")


def files(folder):
    return sorted(path.name for path in (folder / "toy.parts").iterdir())


# ---------------------------------------------------------------------------- parts and records


def test_the_record_is_what_the_units_return(toy):
    whole = run("toy", "tiny", out=toy.out)
    assert dict(whole.sizes) == {"method": 2, "seed": 3, "step": 30}
    assert list(whole.method.values) == ["a", "b"] and list(whole.seed.values) == [0, 1, 2]
    settings, work = toy.module.SETTINGS["tiny"], SimpleNamespace(progress=lambda n: None)
    for unit in ({"method": m, "seed": s} for m in "ab" for s in range(3)):
        alone = toy.module.run_unit(unit, settings, work)
        np.testing.assert_array_equal(whole.walk.sel(unit), alone.walk)
    check(whole)
    assert whole.attrs["experiment"] == "toy" and whole.attrs["size"] == "tiny"
    assert whole.attrs["data"] == "none for a; none for b"  # the parts' different values are joined
    assert json.loads(whole.attrs["seeds"]) == [0, 1, 2] and whole.attrs["cost"] == 180
    assert json.loads(whole.attrs["settings"]) == settings | {"seeds": [0, 1, 2]}
    assert whole.attrs["seconds"] == 6 * 60
    assert [path.name for path in toy.out.glob("*.nc.xz")] == ["toy-tiny.nc.xz"]
    assert len(files(toy.out)) == 6


def test_nothing_is_done_twice(toy):
    first = run("toy", "tiny", out=toy.out)
    assert first.equals(run("toy", "tiny", out=toy.out)) and len(toy.started()) == 6
    more = run("toy", "tiny", out=toy.out, seeds=5)  # three of the seeds are already done
    assert len(toy.started()) == 10 and more.sel(seed=[0, 1, 2]).equals(first)
    assert more.attrs["size"] == "tiny, seeds=5"


def test_other_settings_give_other_units(toy):
    run("toy", "tiny", out=toy.out)
    short = run("toy", "tiny", out=toy.out, settings={"steps": 29})
    assert len(toy.started()) == 12 and short.sizes["step"] == 29
    assert short.attrs["size"] == "tiny, steps=29"


def test_units_that_are_not_a_grid(toy, monkeypatch):
    chosen = [{"method": "b", "seed": 4}, {"method": "a", "seed": 2}, {"method": "b", "seed": 1}]
    monkeypatch.setattr(toy.module, "units", lambda settings: chosen)
    whole = run("toy", "tiny", out=toy.out)
    assert list(whole.method.values) == ["b", "a"] and list(whole.seed.values) == [4, 2, 1]
    present = whole.walk.notnull().all("step")
    assert [dict(method=m, seed=s) in chosen for m in "ba" for s in (4, 2, 1)] == [
        *present.values.flat
    ]


def test_an_interrupted_run_redoes_only_the_unfinished_unit(toy, reference, monkeypatch, capsys):
    done, stop = toy.module.run_unit, {"method": "b", "seed": 0}

    def interrupted(unit, settings, work):
        result = done(unit, settings, work)
        if unit == stop:
            raise KeyboardInterrupt
        return result

    words = ["toy", "--size", "tiny", "--out", str(toy.out)]
    monkeypatch.setattr(toy.module, "run_unit", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().out == (
        "toy: interrupted, 3 of 6 units are done; the same command computes the others, and the "
        "unfinished unit anew\n"
    )
    assert len(files(toy.out)) == 3 and toy.started() == ["a0", "a1", "a2", "b0"]
    monkeypatch.setattr(toy.module, "run_unit", done)
    assert main(words) == 0
    assert toy.started() == ["a0", "a1", "a2", "b0", "b0", "b1", "b2"]
    assert reference.equals(records.read(toy.out / "toy-tiny.nc.xz"))


def test_a_file_that_is_not_written_to_its_end_is_not_there(toy, reference, monkeypatch):
    compress, calls = records.lzma.compress, itertools.count()

    def full_disk(content, **more):
        if next(calls) == 2:
            raise OSError("no space left")
        return compress(content, **more)

    monkeypatch.setattr(records.lzma, "compress", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run("toy", "tiny", out=toy.out)
    assert len(files(toy.out)) == 2
    assert reference.equals(run("toy", "tiny", out=toy.out)) and len(toy.started()) == 7


def test_a_damaged_file_is_named(toy):
    run("toy", "tiny", out=toy.out)
    part = sorted((toy.out / "toy.parts").iterdir())[3]
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"{re.escape(part.name)} is damaged, delete it"):
        run("toy", "tiny", out=toy.out)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:x"])
def test_bad_devices_are_named(toy, device):
    with pytest.raises(
        ValueError, match=f"device must be one that PyTorch finds here, got '{device}'"
    ):
        run("toy", out=toy.out, device=device)


@pytest.mark.parametrize(
    "path", sorted(records.FOLDERS[1].glob("*.nc.xz")), ids=lambda path: path.name
)
def test_every_record_follows_the_schema(path):
    known = records.read(path)
    check(known)
    size = known.attrs["size"].split(",")[0]
    assert path.name == records.record_path(known.attrs["experiment"], "", size).name
    empty = {
        k for k, v in known.variables.items() if v.dtype.kind == "f" and not np.isfinite(v).any()
    }
    assert empty <= {"xi", "within_group"}  # no line falls to zero; once meant for CIFAR-100


@pytest.mark.parametrize("key", records.SCHEMA)
def test_the_schema_names_what_is_missing(key):
    known = records.record("flooding_synthetic")
    del known.attrs[key]
    with pytest.raises(ValueError, match=rf"got no '{key}'$"):
        check(known)


@pytest.mark.parametrize("name", records.NAMES)
def test_every_experiment_has_the_required_parts(name):
    module = records.experiment(name)
    assert {"tiny", "reduced", "paper"} <= {*module.SETTINGS}
    assert module.SOURCE and module.plot.__doc__
    assert len({frozenset(settings) for settings in module.SETTINGS.values()}) == 1
    costs = {}
    for size in module.SETTINGS:
        todo = runner.plan(name, size)
        assert json.loads(json.dumps(todo.settings)) == todo.settings
        costs[size] = todo.cost
    assert 0 < costs["tiny"] < costs["reduced"] <= costs["paper"]


# ------------------------------------------------------------------------------ several processes


@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_share_the_units_and_the_last_writes_the_record(toy, reference, ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", f"{ranks}")
    results = []
    for rank in reversed(range(ranks)):
        monkeypatch.setenv("RANK", f"{rank}")
        results.append(run("toy", "tiny", out=toy.out))
    assert all(result is None for result in results[:-1]) and reference.equals(results[-1])
    assert sorted(toy.started()) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_dead_rank_leaves_units_that_one_process_computes(toy, reference, monkeypatch, capsys):
    words = ["toy", "--size", "tiny", "--out", str(toy.out)]
    with monkeypatch.context() as rank:
        rank.setenv("WORLD_SIZE", "2")
        assert main(words) == 0
    assert capsys.readouterr().out == (
        "toy: this rank has finished, 3 of 6 units are done; the last rank writes the record\n"
    )
    assert reference.equals(run("toy", "tiny", out=toy.out)) and len(toy.started()) == 6


def test_torchrun_equals_one_process(toy, reference, tmp_path):
    script = tmp_path / "runner.py"
    script.write_text(RUNNER, encoding="utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["toy", "--size", "tiny", "--out", toy.out]
    command = [sys.executable, *torchrun, script, toy.file, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert reference.equals(records.read(toy.out / "toy-tiny.nc.xz"))
    assert sorted(toy.started()) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert "toy: wrote" in done.stdout


# ---------------------------------------------------------------------------------------- memory


def test_out_of_memory_halves_and_goes_on():
    counted = []
    work = runner.Work(torch.device("cpu"), SimpleNamespace(update=counted.append))
    sizes = []

    def hungry(size):
        sizes.append(size)
        work.progress(5)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    with pytest.warns(UserWarning, match="out of memory: retrying with . at a time"):
        assert work.chunks(hungry, 13) == "done"
    assert sizes == [13, 6, 3] and work.gradients == sum(counted) == 5
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError):
        warnings.simplefilter("ignore")
        work.chunks(lambda size: hungry(4), 2)


# ------------------------------------------------------------------------------- the command line


def test_the_last_line_says_what_happened(toy, capsys):
    assert main(["toy", "--size", "tiny", "--out", str(toy.out)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"toy: wrote {toy.out / 'toy-tiny.nc.xz'}, 6 min of computing"]


def test_estimate_and_list_run_nothing(toy, capsys):
    assert main(["toy", "--estimate", "--size", "tiny", "--set", 'methods=["c"]']) == 0
    assert capsys.readouterr().out.splitlines() == [
        "method=c seed=0",
        "method=c seed=1",
        "method=c seed=2",
        'toy, tiny, methods=["c"]: 3 units, 90 single-example gradients, '
        "no record to estimate the time from",
    ]
    known = records.record("flooding_synthetic")
    assert main(["flooding_synthetic", "--estimate", "--seeds", "5"]) == 0
    last, device = capsys.readouterr().out.splitlines()[-1], known.attrs["device"]
    share = 5 / known.sizes["seed"]
    assert last.startswith("flooding_synthetic, demo, seeds=5: 6 units, ")
    time = duration(known.attrs["seconds"] * share)
    assert f"about {time} at the rate of the record on {device}" in last
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == records.NAMES
    assert lines[0].endswith(f"recorded on {device}, size demo")
    assert lines[-1].endswith("no paper; not yet recorded")
    assert toy.started() == []


BAD = {
    "name": (["tou"], "name must be one of .*'toy'.*, got 'tou'"),
    "no name": ([], "name an experiment, or ask for the --list"),
    "size": (["toy", "--size", "big"], r"size must be one of \['reduced', 'tiny'\], got 'big'"),
    "setting": (
        ["toy", "--set", "stepz=3"],
        r"settings must be among \['methods', .*\], got 'stepz'",
    ),
    "no value": (["toy", "--set", "steps"], "--set must be KEY=VALUE, got 'steps'"),
    "kind": (["toy", "--set", "steps=many"], "steps must be a number like 1, got 'many'"),
    "list": (["toy", "--set", "methods=a"], r"methods must be a list like \[\"a\"\], got 'a'"),
    "truth": (["toy", "--set", "steps=true"], "steps must be a number like 1, got True"),
    "seeds": (["toy", "--seeds", "0"], "seeds must be a whole number >= 1, got 0"),
    "no units": (["toy", "--set", "methods=[]"], "settings must give different units"),
    "same units": (
        ["toy", "--set", 'methods=["a", "a"]'],
        "settings must give different units",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(toy, capsys, case):
    words, message = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--out", str(toy.out)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not toy.out.exists()


@pytest.mark.parametrize(
    "device, gpus, processes, sharing",
    [("cpu", 0, 8, 1), ("cuda", 1, 8, 8), ("cuda", 4, 8, 2), ("cuda", 4, 4, 1), ("cuda", 3, 8, 3)],
)
def test_processes_share_a_gpu(device, gpus, processes, sharing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert runner._sharing(torch.device(device), processes) == sharing


def test_only_the_share_of_a_shared_device_counts(toy, monkeypatch):
    monkeypatch.setattr(runner, "_sharing", lambda device, processes: 8)
    shared = run("toy", "tiny", out=toy.out, device="cpu")
    assert shared.attrs["device"] == "cpu, shared by 8 processes"
    assert shared.attrs["seconds"] == 6 * 60 / 8


def test_labels_in_the_result_are_an_error(toy, monkeypatch):
    monkeypatch.setattr(toy.module, "run_unit", lambda *_: xr.Dataset(coords={"seed": [1]}))
    with pytest.raises(
        ValueError, match=r"run_unit must return a Dataset without \['method', 'seed'\]"
    ):
        run("toy", out=toy.out)


# -------------------------------------------------------------------------------- flooding_synthetic

SMALL = {"sets": ["sinusoid"], "optimizers": ["SGD"], "width": 6, "steps": 6, "evaluations": 2}


def test_the_study_equals_fit(tmp_path):
    settings = {"sets": ["spiral"], "label_noise": [0.05, 0.1], "optimizers": ["SGD"]}
    whole = run("flooding_synthetic", "tiny", out=tmp_path, settings=settings)
    assert dict(whole.sizes) == {
        "set": 1,
        "label_noise": 2,
        "optimizer": 1,
        "flood_level": 2,
        "seed": 2,
        "step": 3,
    }
    data = [flooding_synthetic.spiral(label_noise=0.05, test_size=50, seed=seed) for seed in (0, 1)]
    alone = fit(
        lambda: MLP(2, 8, 8, 8, 8, 2, bias=False, batch_norm=True),
        data,
        Recipe(loss=Flooding(0.3), optimizer=SGD(lr=0.01, momentum=0.9)),
        steps=4,
        batch_size=None,
        seeds=2,
        evaluate_at=2,
        device="cpu",
    )
    here = whole.sel(set="spiral", label_noise=0.05, optimizer="SGD", flood_level=0.3)
    np.testing.assert_allclose(here.validation_error, alone.validation_error, rtol=1e-6)
    for name in ("train_loss", "test_loss"):
        np.testing.assert_allclose(
            here[name], alone[name], rtol=2**-16
        )  # the precision of the record
    plt.close(records.plot("flooding_synthetic", whole))


def test_the_demo_has_the_dimensions_that_the_chapter_draws(tmp_path):
    small = {"steps": 4, "evaluations": 2, "test_size": 30, "width": 6}
    demo = run("flooding_synthetic", "demo", out=tmp_path, seeds=2, settings=small)
    known = records.record("flooding_synthetic")
    assert demo.test_error.dims == known.test_error.dims
    assert {*demo.variables} == {*known.variables}
    for name in ("set", "optimizer", "level", "flood_level"):
        assert demo[name].identical(known[name])
    for name, v in known.variables.items():
        assert demo[name].dtype.kind == v.dtype.kind and demo[name].dims == v.dims
    for one in (demo, known):
        plt.close(records.plot("flooding_synthetic", one))
    assert [path.name for path in tmp_path.glob("*.nc.xz")] == ["flooding_synthetic.nc.xz"]


def test_the_record_is_what_the_code_computes(tmp_path):
    """Compares the first steps."""
    first = run(
        "flooding_synthetic",
        "demo",
        out=tmp_path,
        device="cpu",
        seeds=1,
        settings={
            "sets": ["sinusoid"],
            "optimizers": ["SGD"],
            "steps": 10,
            "evaluations": 1,
            "levels": {"SGD": [0.0]},
        },
    )
    known = records.record("flooding_synthetic").sel(
        seed=[0], step=[0, 10], level=[0], set=["sinusoid"], optimizer=["SGD"]
    )
    for name in ("train_loss", "test_loss", "validation_clean_loss", "test_error"):
        np.testing.assert_allclose(first[name], known[name], rtol=1e-3)


def test_progress_of_the_study_is_its_cost(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(runner.Work, "progress", lambda work, n: counted.append(n))
    run("flooding_synthetic", "tiny", out=tmp_path)
    assert sum(counted) == pytest.approx(runner.plan("flooding_synthetic", "tiny").cost)


def test_the_study_with_little_memory(tmp_path, monkeypatch):
    arguments = {"settings": SMALL | {"chunk_size": 8}, "device": "cpu"}
    whole = run("flooding_synthetic", "tiny", out=tmp_path / "whole", **arguments)
    plain, sizes = flooding_synthetic.fit, []

    def little(*args, chunk_size, progress, **more):
        sizes.append(chunk_size)
        calls = itertools.count()

        def fails(gradients):
            if chunk_size > 2 and next(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return progress(gradients)

        return plain(*args, chunk_size=chunk_size, progress=fails, **more)

    monkeypatch.setattr(flooding_synthetic, "fit", little)
    with pytest.warns(UserWarning, match="out of memory"):
        halved = run("flooding_synthetic", "tiny", out=tmp_path / "halved", **arguments)
    assert sizes == [8, 4, 2]
    xr.testing.assert_allclose(whole, halved, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fifty_steps_on_cpu_and_gpu_agree_to_float32(tmp_path, monkeypatch):
    """While float32 on the CPU is near float64; later, rounding makes all of them differ."""
    settings = {"steps": 50, "evaluations": 10, "width": 100}

    def losses(device, dtype):
        monkeypatch.setattr(flooding_synthetic, "fit", functools.partial(fit, dtype=dtype))
        out = tmp_path / f"{device}, {dtype}"
        found = run("flooding_synthetic", "tiny", out=out, device=device, settings=settings)
        return found[["train_loss", "validation_loss", "test_loss"]].to_dataarray()

    exact, cpu = (losses("cpu", dtype) for dtype in (torch.float64, torch.float32))
    gpu = losses("cuda", torch.float32)
    rounding = abs(cpu - exact).max(("variable", "flood_level", "seed"))
    reliable = rounding.cumulative("step").max() < 1e-5
    assert reliable.sel(step=slice(None, 25)).all() and reliable.sel(set="two_gaussians").all()
    np.testing.assert_allclose(gpu.where(reliable), cpu.where(reliable), rtol=1e-3, atol=1e-4)
    assert (abs(gpu - cpu) < 0.2).all()
