"""The code of the page *Using SAM in your loop* runs, and trains."""

import re
from pathlib import Path

import pytest
import torch
from problems import in_two_processes

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


def test_blocks_train_in_two_processes(tmp_path):
    """One after the other in the same two processes, as starting these takes longest."""
    blocks = {title(code): program(code) for code in RUN if "init_process_group" in code}
    assert blocks.keys() == {"Distributed", "fully_shard"}
    old = torch.__version__.startswith("2.6.")
    if old:
        del blocks["fully_shard"]
    lines = ["import sys", "FOLDER, RANK = sys.argv[1], int(sys.argv[2])"]
    for name, code in blocks.items():
        meeting = f'"gloo", f"file://{{FOLDER}}/{name}", rank=RANK, world_size=2'
        code = code.replace('"gloo"', meeting)
        lines.append(f"exec(compile({code!r}, {name!r}, 'exec'), {{**globals()}})")
    script = tmp_path / "train.py"
    script.write_text("\n".join(lines), encoding="utf-8")
    in_two_processes(script, tmp_path)
    if old:
        pytest.skip("fully_shard of PyTorch 2.6 does not run on a CPU")
