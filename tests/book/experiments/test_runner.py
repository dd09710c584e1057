"""The experiment runner: killed at any moment, sharded, short of memory; the flooding study."""

import functools
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
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
from flatmin.loss import Flooding
from flatmin.optimizer import SGD

TOY = '''
"""Six random walks, each of 30 steps; every step is logged."""

import os
import time
from pathlib import Path

import xarray as xr

from flatmin.stack import stream

SOURCE = "no paper"
SETTINGS = {
    "tiny": {"methods": ["a", "b"], "steps": 30, "seeds": 3, "pause": 0.001, "every": 0.01},
    "reduced": {"methods": ["a"], "steps": 1, "seeds": 1, "pause": 0.0, "every": 1.0},
}


def units(settings):
    return [{"method": m, "seed": s} for m in settings["methods"] for s in settings["seeds"]]


def cost(settings):
    return 1.0 * len(units(settings)) * settings["steps"]


def log(*words):
    with open(os.environ["TOY_LOG"], "a") as file:
        print(*words, file=file)


def run_unit(unit, settings, work):
    name = f"{unit['method']}{unit['seed']}"
    part = Path(str(work.path).rpartition("-")[0])
    log("again" if part.exists() else "start", name)
    state = work.load() or {"walk": []}
    while len(state["walk"]) < settings["steps"]:
        if work.due(settings["every"]):
            work.save(state)
        time.sleep(settings["pause"])
        t, here = len(state["walk"]), (state["walk"] or [0.0])[-1]
        generator = stream(unit["seed"], unit["method"], t)
        log("step", name, t)
        state = {"walk": [*state["walk"], here + float(generator.initial_seed() % 1000)]}
        work.progress(1)
    runs = xr.Dataset({"walk": ("step", state["walk"])}, {"step": range(settings["steps"])})
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
    """The toy experiment in the registry; its log, and a folder for its records."""
    for name in ("FLATMIN_SEED", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file, log = tmp_path / "toy.py", tmp_path / "log"
    file.write_text(TOY)
    log.write_text("")
    monkeypatch.setenv("TOY_LOG", str(log))
    spec = importlib.util.spec_from_file_location("flatmin.book.experiments.toy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    records.NAMES.append("toy")
    lines = lambda kind: [line for line in log.read_text().splitlines() if line.startswith(kind)]
    yield SimpleNamespace(file=file, log=lines, out=tmp_path / "out", module=module)
    records.NAMES.remove("toy")


@pytest.fixture
def reference(toy, tmp_path, monkeypatch):
    """The record of an uninterrupted run in one process."""
    with monkeypatch.context() as unlogged:
        unlogged.setenv("TOY_LOG", os.devnull)
        return run("toy", "tiny", out=tmp_path / "reference")


def units_in(folder):
    """The number of finished units."""
    return len([p for p in (folder / "toy.parts").glob("*") if p.is_file() and p.suffix != ".part"])


def same(a, b):
    return a.equals(b)


CHILDREN = set()


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    for pid in [*CHILDREN]:
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)


def child(output, *words, **environment):
    """``main(words)`` in a fork of this process, which needs no second import of PyTorch."""
    pid = os.fork()
    if pid:
        CHILDREN.add(pid)
        return pid
    code = 99
    try:
        os.environ.update(environment)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a job in the background ignores it
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = open(1, "w", closefd=False)
        code = main(list(words))
        sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid):
    CHILDREN.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


# ---------------------------------------------------------------------------- parts and records


def test_the_record_is_what_the_units_return(toy):
    whole = run("toy", "tiny", out=toy.out)
    assert dict(whole.sizes) == {"method": 2, "seed": 3, "step": 30}
    assert list(whole.method.values) == ["a", "b"] and list(whole.seed.values) == [0, 1, 2]
    work = SimpleNamespace(
        path=Path("x-y"),
        load=lambda: None,
        save=lambda state: None,
        due=lambda every: False,
        progress=lambda n: None,
    )
    settings = toy.module.SETTINGS["tiny"]
    for unit in ({"method": m, "seed": s} for m in "ab" for s in range(3)):
        alone = toy.module.run_unit(unit, settings, work)
        np.testing.assert_array_equal(whole.walk.sel(unit), alone.walk)
    check(whole)
    assert whole.attrs["experiment"] == "toy" and whole.attrs["size"] == "tiny"
    assert whole.attrs["data"] == "none for a; none for b"  # the parts' different values are joined
    assert json.loads(whole.attrs["seeds"]) == [0, 1, 2] and whole.attrs["cost"] == 180
    assert json.loads(whole.attrs["settings"]) == settings | {"seeds": [0, 1, 2]}
    assert whole.attrs["seconds"] > 6 * 30 * 0.001
    assert [path.name for path in toy.out.glob("*.nc.xz")] == ["toy-tiny.nc.xz"]
    assert (
        len([*(toy.out / "toy.parts").iterdir()]) == 6
    )  # no folder and no half-written file is left


def test_nothing_is_done_twice(toy):
    first = run("toy", "tiny", out=toy.out)
    assert same(first, run("toy", "tiny", out=toy.out))
    assert len(toy.log("start")) == 6 and len(toy.log("step")) == 180
    more = run("toy", "tiny", out=toy.out, seeds=5)  # three of the seeds are already done
    assert len(toy.log("start")) == 10 and same(more.sel(seed=[0, 1, 2]), first)
    assert more.attrs["size"] == "tiny, seeds=5"


def test_other_settings_give_other_units(toy):
    run("toy", "tiny", out=toy.out)
    short = run("toy", "tiny", out=toy.out, settings={"steps": 29})
    assert len(toy.log("start")) == 12 and short.sizes["step"] == 29
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


@pytest.mark.parametrize("spoil", ["cut", "changed", "empty"])
def test_a_damaged_part_is_computed_again(toy, spoil):
    first = run("toy", "tiny", out=toy.out)
    part = sorted((toy.out / "toy.parts").iterdir())[3]
    content = part.read_bytes()
    spoilt = {
        "cut": content[:-100],
        "changed": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
    }
    part.write_bytes(spoilt[spoil])
    with pytest.warns(UserWarning, match="is damaged, its unit is computed again"):
        assert same(first, run("toy", "tiny", out=toy.out))
    assert len(toy.log("start")) == 7


def test_a_damaged_part_of_another_rank_is_an_error(toy, monkeypatch):
    run("toy", "tiny", out=toy.out)
    part = toy.out / "toy.parts" / runner.plan("toy", "tiny").file({"method": "a", "seed": 1})
    part.write_bytes(b"x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(RuntimeError, match="same command"),
    ):
        run("toy", "tiny", out=toy.out)
    monkeypatch.delenv("WORLD_SIZE")
    assert run("toy", "tiny", out=toy.out).walk.notnull().all() and len(toy.log("start")) == 7


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:x"])
def test_bad_devices_are_named(toy, device):
    with pytest.raises(
        ValueError, match=f"device must be one that PyTorch finds here, got '{device}'"
    ):
        run("toy", out=toy.out, device=device)


def test_a_damaged_checkpoint_starts_its_unit_anew(tmp_path):
    bar = SimpleNamespace(update=lambda n: None)
    work = runner.Work(torch.device("cpu"), tmp_path, [], bar)
    work.progress(7)
    work.save({"w": torch.arange(3.0), "t": 4})
    again = runner.Work(torch.device("cpu"), tmp_path, [], bar)
    state = again.load()
    assert torch.equal(state["w"], torch.arange(3.0)) and state["t"] == 4 and again.gradients == 7
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:-30])
    with pytest.warns(UserWarning, match="is damaged, its unit starts anew"):
        assert runner.Work(torch.device("cpu"), tmp_path, [], bar).load() is None


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
    assert empty <= {"xi", "within_group"}  # no line falls to zero; no super-classes


@pytest.mark.parametrize("key", records.SCHEMA)
def test_the_schema_names_what_is_missing(key):
    known = records.record("flooding_synthetic")
    del known.attrs[key]
    with pytest.raises(ValueError, match=rf"got no '{key}'$"):
        check(known)


@pytest.mark.parametrize("name", records.NAMES)
def test_every_experiment_has_the_required_parts(name):
    module = records.experiment(name)
    assert (
        {"tiny", "reduced", "paper"} <= {*module.SETTINGS} and module.SOURCE and module.plot.__doc__
    )
    costs = {}
    for size in module.SETTINGS:
        todo = runner.plan(name, size)
        assert json.loads(json.dumps(todo.settings)) == todo.settings
        costs[size] = todo.cost
    assert 0 < costs["tiny"] < costs["reduced"] <= costs["paper"]


# ------------------------------------------------------------------------------------ interrupted


@forks
@pytest.mark.parametrize("every", [0.01, 1000.0], ids=["checkpoints", "no checkpoints"])
def test_killed_at_any_moment(toy, reference, every, tmp_path):
    moments, kills = random.Random(f"{every}"), 0
    words = ["toy", "--size", "tiny", "--out", str(toy.out), "--set", f"every={every}"]
    while True:
        finished, before = units_in(toy.out), len(toy.log("start"))
        pid = child(tmp_path / "output", *words)
        if kills < 4:  # after a number of the 180 steps; later kills come after some time
            steps = len(toy.log("step")) + moments.randint(0, 30)
            until(lambda steps=steps: len(toy.log("step")) >= steps)
        time.sleep(
            moments.uniform(0, 0.01) if kills < 4 else moments.uniform(0.02, 0.25) * kills / 4
        )
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == 0:
            break
        kills += 1
        assert len(toy.log("start")) - before <= 6 - finished and kills < 50
    assert kills >= 2 and toy.log("again") == []
    got = records.read(toy.out / "toy-tiny.nc.xz")
    assert same(reference, got) and "wrote" in (tmp_path / "output").read_text().splitlines()[-1]


@forks
@pytest.mark.parametrize("key", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_saves_and_loses_no_step(toy, reference, key, tmp_path):
    words = ["toy", "--size", "tiny", "--out", str(toy.out), "--set", "every=1000"]
    for steps in (10, 45, 100, 150):
        pid = child(tmp_path / "output", *words)
        until(lambda: len(toy.log("step")) >= steps)
        os.kill(pid, key)
        assert exit_code(pid) == 130
        last = (tmp_path / "output").read_text().splitlines()[-1]
        done = units_in(toy.out)
        assert (
            last == f"toy: interrupted, {done} of 6 units are done; run the same command to resume"
        )
    assert exit_code(child(tmp_path / "output", *words)) == 0
    steps = toy.log("step")
    assert len(steps) == len({*steps}) == 180
    assert same(reference, records.read(toy.out / "toy-tiny.nc.xz"))


@forks
def test_a_second_stop_request_stops_at_once(toy, tmp_path):
    words = ["toy", "--size", "tiny", "--out", str(toy.out), "--set", "pause=60"]
    pid = child(tmp_path / "output", *words)
    until(lambda: toy.log("start"))
    started = time.monotonic()
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        os.kill(pid, signal.SIGINT)  # repeatedly, as two pending signals count as one
        time.sleep(0.2)
    assert exit_code(pid) == 130 and time.monotonic() - started < 30
    assert "interrupted, 0 of 6" in (tmp_path / "output").read_text()


def test_an_exception_keeps_finished_units(toy, reference, monkeypatch):
    done = toy.module.run_unit

    def breaks(unit, settings, work):
        if unit == {"method": "b", "seed": 1}:
            raise RuntimeError("the device is gone")
        return done(unit, settings, work)

    handlers = [signal.getsignal(key) for key in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(toy.module, "run_unit", breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run("toy", "tiny", out=toy.out)
    assert handlers == [signal.getsignal(key) for key in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(toy.module, "run_unit", done)
    assert same(reference, run("toy", "tiny", out=toy.out))
    assert toy.log("again") == [] and len(toy.log("step")) == 180


# ------------------------------------------------------------------------------ several processes


@forks
@pytest.mark.parametrize("ranks", [2, 7])
def test_several_processes_equal_one(toy, reference, ranks, tmp_path):
    words = ["toy", "--size", "tiny", "--out", str(toy.out)]
    pids = [
        child(tmp_path / f"{rank}", *words, RANK=f"{rank}", WORLD_SIZE=f"{ranks}")
        for rank in range(ranks)
    ]
    assert [exit_code(pid) for pid in pids] == [0] * ranks
    assert len(toy.log("start")) == 6 and toy.log("again") == []
    assert same(reference, records.read(toy.out / "toy-tiny.nc.xz"))
    last = [(tmp_path / f"{rank}").read_text().splitlines()[-1] for rank in range(ranks)]
    assert "wrote" in last[0] and all("this rank's units are done" in line for line in last[1:])


@forks
def test_the_units_of_a_dead_rank_are_named_and_can_be_computed(toy, reference, tmp_path):
    words = ["toy", "--size", "tiny", "--out", str(toy.out)]
    alone = child(tmp_path / "0", *words, "--patience", "0.3", RANK="0", WORLD_SIZE="2")
    assert exit_code(alone) == 1
    waits, last = (tmp_path / "0").read_text().splitlines()[-2:]
    assert waits == "toy: waiting for 3 units of other ranks"
    assert last == (
        "toy: no sign of life from other ranks for 0.3 s, and 3 of 6 units are missing: "
        "method=a seed=1; method=b seed=0; method=b seed=2. Run the same command to compute these."
    )
    assert same(reference, run("toy", "tiny", out=toy.out)) and len(toy.log("start")) == 6


@forks
def test_a_slow_rank_is_waited_for_while_it_lives(toy, tmp_path):
    words = [
        "toy",
        "--size",
        "tiny",
        "--out",
        str(toy.out),
        "--set",
        "pause=0.1",
        "--patience",
        "2",
    ]
    first = child(tmp_path / "0", *words, RANK="0", WORLD_SIZE="6")
    others = [child(tmp_path / "x", *words, RANK=f"{r}", WORLD_SIZE="6") for r in range(1, 6)]
    assert [exit_code(pid) for pid in (first, *others)] == [0] * 6


def test_torchrun_equals_one_process(toy, reference, tmp_path):
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            runner,
            toy.file,
            "toy",
            "--size",
            "tiny",
            "--out",
            toy.out,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert same(reference, records.read(toy.out / "toy-tiny.nc.xz"))
    assert len(toy.log("start")) == 6
    assert {"wrote", "this"} == {
        line.split()[1] for line in done.stdout.splitlines() if " s" in line
    }


# ---------------------------------------------------------------------------------------- memory


def test_out_of_memory_halves_and_goes_on(tmp_path):
    counted = []
    work = runner.Work(torch.device("cpu"), tmp_path, [], SimpleNamespace(update=counted.append))
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
    assert out[-1].startswith(
        f"toy: wrote {toy.out / 'toy-tiny.nc.xz'} (6 units, 0 s of computing; this call"
    )


def test_estimate_and_list_run_nothing(toy, capsys):
    assert main(["toy", "--estimate", "--size", "tiny", "--set", 'methods=["c"]']) == 0
    assert capsys.readouterr().out.splitlines() == [
        "method=c seed=0",
        "method=c seed=1",
        "method=c seed=2",
        'toy, tiny, methods=["c"]: 3 units, 90 single-example gradients, '
        "no record to estimate the time from",
    ]
    assert main(["flooding_synthetic", "--estimate", "--seeds", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "flooding_synthetic, demo, seeds=5: 6 units, 4.3e+06 single-example gradients, "
        "about 18 min at the rate of the record on cpu, for the same time per gradient; a larger network takes longer"
    )
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == records.NAMES
    assert lines[0].endswith("recorded on cpu, size demo") and lines[-1].endswith(
        "no paper; not yet recorded"
    )
    assert toy.log("start") == []


BAD = {
    "name": (["tou"], "name must be one of .*'toy'.*, got 'tou'"),
    "no name": ([], "name an experiment, or ask for the --list"),
    "size": (["toy", "--size", "big"], r"size must be one of \['reduced', 'tiny'\], got 'big'"),
    "setting": (
        ["toy", "--set", "stepz=3"],
        r"settings must be among \['every', .*\], got 'stepz'",
    ),
    "no value": (["toy", "--set", "steps"], "--set must be KEY=VALUE, got 'steps'"),
    "kind": (["toy", "--set", "steps=many"], "steps must be a number like 1, got 'many'"),
    "list": (["toy", "--set", "methods=a"], r"methods must be a list like \[\"a\"\], got 'a'"),
    "truth": (["toy", "--set", "steps=true"], "steps must be a number like 1, got True"),
    "seeds": (["toy", "--seeds", "0"], "seeds must be a whole number >= 1, got 0"),
    "no units": (["toy", "--set", "methods=[]"], "units must be a list, not empty, of different"),
    "same units": (
        ["toy", "--set", 'methods=["a", "a"]'],
        "units must be a list, not empty, of different",
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


def test_only_the_share_of_a_shared_device_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.Work, "seconds", property(lambda self: 60.0))
    alone = run("flooding_synthetic", "tiny", out=tmp_path / "alone")
    monkeypatch.setattr(runner, "_sharing", lambda device, processes: 8)
    shared = run("flooding_synthetic", "tiny", out=tmp_path / "shared")
    assert shared.attrs["device"] == "cpu, shared by 8 processes"
    assert shared.attrs["seconds"] == alone.attrs["seconds"] / 8 > 0
    xr.testing.assert_equal(shared, alone)


@pytest.mark.parametrize(
    "key, value",
    [("RANK", "-1"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", "0")],
)
def test_bad_ranks_are_named(toy, monkeypatch, key, value):
    monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=rf"{key} must be a whole number >= [01], got '?{value}"):
        run("toy", out=toy.out)


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


def test_the_study_stops_within_a_stack_and_loses_no_step(tmp_path, monkeypatch):
    arguments = {"settings": SMALL | {"chunk_size": 3}, "device": "cpu"}
    whole = run("flooding_synthetic", "tiny", out=tmp_path / "whole", **arguments)
    progress, steps = runner.Work.progress, itertools.count()
    stopping = {3, 9, 15}  # in the first stack, at its end, and in the second

    def stops(work, gradients):
        work._stop += [signal.SIGINT] * (next(steps) in stopping)
        return progress(work, gradients)

    monkeypatch.setattr(runner.Work, "progress", stops)
    for _ in stopping:
        with pytest.raises(KeyboardInterrupt):
            run("flooding_synthetic", "tiny", out=tmp_path / "parts", **arguments)
    rest = run("flooding_synthetic", "tiny", out=tmp_path / "parts", **arguments)
    assert same(whole, rest)


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
