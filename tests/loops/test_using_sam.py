"""The code of the page *Using SAM in your loop* runs, and trains."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "book" / "using_sam.md"
PROSE, FRAMEWORKS = PAGE.read_text(encoding="utf-8").split("## Lightning\n")
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
START, *RUN = BLOCK.findall(PROSE)
CHECK = """
start = dict(vars_at_start)
now = {name.removeprefix("module."): w for name, w in model.named_parameters()}
whole = lambda w: w.full_tensor() if hasattr(w, "full_tensor") else w
for name, w in now.items():
    w = whole(w.detach())
    moved = not torch.equal(w, start[name])
    assert w.isfinite().all() and (moved or name == "0.bias"), name  # BatchNorm undoes a bias
assert optimizer.skipped == 0
"""
KEEP = "vars_at_start = {name: w.detach().clone() for name, w in model.named_parameters()}\n"


def program(code):
    """The block between the first of the page and a check, before the processes part."""
    end = "\ndist.destroy_process_group()\n"
    check = CHECK + end if end in code else CHECK
    return START + KEEP + code.replace(end, "") + check


def title(code):
    named = ("fully_shard", "Distributed", "GradScaler", "autocast", "clip_grad", "split", "groups")
    return next((name for name in named if name in code), "plain")


def test_the_page_has_its_blocks():
    assert "import SAM" in START and len(RUN) >= 10
    assert len(BLOCK.findall(FRAMEWORKS)) == 5  # which test_frameworks.py runs


@pytest.mark.parametrize("code", [c for c in RUN if "init_process_group" not in c], ids=title)
def test_a_block_trains(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(program(code), str(PAGE), "exec"), {})


@pytest.mark.parametrize("code", [c for c in RUN if "init_process_group" in c], ids=title)
def test_a_block_trains_in_two_processes(code, tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of PyTorch has no gloo")
    if "fully_shard" in code and torch.__version__.startswith("2.6."):
        pytest.skip("fully_shard of PyTorch 2.6 does not run on a CPU")
    code = code.replace(
        'init_process_group("gloo")',
        f'init_process_group("gloo", f"file://{tmp_path}/meeting", rank=RANK, world_size=2)',
    )
    script = tmp_path / "train.py"
    rank_of_the_process = "import sys\n\nRANK = int(sys.argv[1])\n"
    script.write_text(rank_of_the_process + program(code), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
