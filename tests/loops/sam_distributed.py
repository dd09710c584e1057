"""Two processes over gloo: run by tests/loops/test_sam.py as ``python sam_distributed.py FOLDER RANK``.

Every check compares with one process that has all the data, and returns the largest difference;
each rank writes its results as JSON.
"""

import copy
import datetime
import json
import math
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from flatmin import SAM, dual_norm_perturbation

RANKS, EXAMPLES, STEPS = 2, 8, 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXAMPLES, 5, generator=generator).double(), torch.randn(
        EXAMPLES, 1, generator=generator
    ).double()


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def base(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def alone(**settings):
    """One process with all the data."""
    model = network()
    optimizer = SAM(base(model), **settings)
    for _ in range(STEPS):
        optimizer.step(closure_of(model, optimizer, *data()))
    return list(model.parameters())


def m_sam(rho):
    """One process; each process's part of the batch has its own perturbation, by the formula."""
    model = network()
    weights, optimizer = list(model.parameters()), base(model)
    for _ in range(STEPS):
        mean = [torch.zeros_like(w) for w in weights]
        for x, y in zip(*(t.chunk(RANKS) for t in data()), strict=True):
            loss = lambda x=x, y=y: nn.functional.mse_loss(model(x), y)
            gradient = torch.autograd.grad(loss(), weights)
            length = torch.cat([g.flatten() for g in gradient]).norm()
            kept = copy.deepcopy(weights)
            with torch.no_grad():
                for w, g in zip(weights, gradient, strict=True):
                    w += rho * g / length
            for m, g in zip(mean, torch.autograd.grad(loss(), weights), strict=True):
                m += g / RANKS
            with torch.no_grad():
                for w, old in zip(weights, kept, strict=True):
                    w.copy_(old)
        for w, m in zip(weights, mean, strict=True):
            w.grad = m
        optimizer.step()
    return weights


def mine(rank):
    return (t.chunk(RANKS)[rank] for t in data())


def difference(found, expected):
    whole = lambda w: w.full_tensor() if isinstance(w, DTensor) else w
    return max(
        (whole(a.detach()) - b.detach()).abs().max().item()
        for a, b in zip(found, expected, strict=True)
    )


def ddp(rank, expected, **settings):
    model = DistributedDataParallel(network())
    optimizer = SAM(base(model), rho=0.3, model=model, **settings)
    closure = closure_of(model, optimizer, *mine(rank))
    for _ in range(STEPS):
        optimizer.step(closure)
    return difference(model.parameters(), expected)


def ddp_global(rank):
    return ddp(rank, alone(rho=0.3))


def ddp_per_rank(rank):
    return ddp(rank, m_sam(0.3), per_rank=True)


def ddp_global_is_not_per_rank(rank):
    return ddp(rank, m_sam(0.3))


def ddp_in_two_phases(rank):
    model = DistributedDataParallel(network())
    optimizer = SAM(base(model), rho=0.3, model=model, per_rank=True)
    x, y = mine(rank)
    for _ in range(STEPS):
        with model.no_sync():
            nn.functional.mse_loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
    return difference(model.parameters(), m_sam(0.3))


def ddp_closure_that_does_not_zero(rank):
    errors = []
    for views in (True, False):
        model = DistributedDataParallel(network(), gradient_as_bucket_view=views)
        optimizer = SAM(base(model), rho=0.3, model=model)
        x, y = mine(rank)
        for _ in range(STEPS):
            optimizer.step(lambda: nn.functional.mse_loss(model(x), y).backward())
        errors.append(difference(model.parameters(), alone(rho=0.3)))
    return max(errors)


def ddp_skips_together(rank):
    """Only one process has an infinite first gradient: both skip, and neither waits for ever."""
    model = DistributedDataParallel(network())
    optimizer = SAM(base(model), rho=0.3, model=model, per_rank=True)
    x, y = mine(rank)
    before = copy.deepcopy(list(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(closure_of(model, optimizer, x * (math.inf if rank else 1), y))
    assert optimizer.skipped == 1
    return difference(model.parameters(), before)


def ddp_scalers_agree(rank):
    model = DistributedDataParallel(network().float())
    optimizer = SAM(base(model), rho=0.3, model=model, per_rank=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = (t.float() for t in mine(rank))
    before = copy.deepcopy(list(model.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x * (math.inf if rank else 1)), y)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, scaler)
    scaler.update()
    assert scaler.get_scale() == 4.0
    return difference(model.parameters(), before)


def ddp_static_graph(rank):
    """With its own INTERNAL ASSERT after a first pass without communication."""
    model = DistributedDataParallel(network(), static_graph=True)
    try:
        SAM(base(model), model=model, per_rank=True)
    except ValueError as error:
        assert "per_rank must be False" in str(error)
    else:
        raise AssertionError("not refused")
    optimizer = SAM(base(model), rho=0.3, model=model)
    for _ in range(STEPS):
        optimizer.step(closure_of(model, optimizer, *mine(rank)))
    return difference(model.parameters(), alone(rho=0.3))


def ddp_compiled(rank):
    errors = []
    for backend in ("eager", "aot_eager"):
        inside = DistributedDataParallel(torch.compile(network(), backend=backend))
        outside = torch.compile(DistributedDataParallel(network()), backend=backend)
        for model in (inside, outside):
            for per_rank in (True, False):
                start(model)
                optimizer = SAM(base(model), rho=0.3, model=model, per_rank=per_rank)
                for _ in range(STEPS):
                    optimizer.step(closure_of(model, optimizer, *mine(rank)))
                expected = m_sam(0.3) if per_rank else alone(rho=0.3)
                errors.append(difference(model.parameters(), expected))
    return max(errors)


def start(model):
    """The weights of a new network()."""
    with torch.no_grad():
        for w, new in zip(model.parameters(), network().parameters(), strict=True):
            w.copy_(new)
            w.grad = None


def dtensor_placements(rank):
    """Sharded (unevenly) by rows or columns, or replicated: one norm over all parts."""
    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(2)
    shapes, placements = [(5, 4), (3, 7), (6,), (1,)], [Shard(0), Shard(1), Replicate(), Shard(0)]
    whole = [torch.randn(shape, generator=generator).double() for shape in shapes * 2]
    distribute = lambda tensors: [
        distribute_tensor(t.clone(), mesh, [place])
        for t, place in zip(tensors, placements, strict=True)
    ]
    errors = []
    for p in (1, 1.5, 2, 3, math.inf):
        weights = [nn.Parameter(w) for w in distribute(whole[:4])]
        for w, g in zip(weights, distribute(whole[4:]), strict=True):
            w.grad = g
        optimizer = SAM(torch.optim.SGD(weights, lr=0.1), rho=0.3, p=p)
        optimizer.first_step()
        flat = dual_norm_perturbation(torch.cat([g.flatten() for g in whole[4:]]), 0.3, p)
        moves = flat.split([g.numel() for g in whole[4:]])
        moved = [w + e.view_as(w) for w, e in zip(whole[:4], moves, strict=True)]
        errors.append(difference(weights, moved))
        optimizer.restore()
        errors.append(difference(weights, whole[:4]))
    return max(errors)


class Unsupported(Exception):
    pass


def fsdp(rank, bad=1.0, steps=STEPS, **settings):
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise Unsupported("this PyTorch has no fully_shard") from error
    if torch.__version__.startswith("2.6."):
        raise Unsupported("fully_shard of PyTorch 2.6 does not run on a CPU")
    model = network()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model[2].bias, DTensor)  # one number, of which the second process has no part
    optimizer = SAM(base(model), **settings)
    x, y = mine(rank)
    closure = closure_of(model, optimizer, x * (bad if rank else 1.0), y)
    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


def fsdp_norm(rank):
    return difference(fsdp(rank, rho=0.3)[0].parameters(), alone(rho=0.3))


def fsdp_any_p(rank):
    errors = []
    for settings in ({"p": math.inf}, {"p": 1}, {"p": 1.5, "adaptive": True}):
        settings["rho"] = 0.1
        errors.append(difference(fsdp(rank, **settings)[0].parameters(), alone(**settings)))
    return max(errors)


def fsdp_skips_together(rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = fsdp(rank, bad=math.nan, rho=0.3)
    assert optimizer.skipped == STEPS
    return difference(model.parameters(), network().parameters())


def fsdp_checkpoints(rank):
    """Half of the steps, and the other half by a fresh SAM from torch.distributed.checkpoint."""
    model, optimizer = fsdp(rank, steps=STEPS // 2, rho=0.3)
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    model, optimizer = fsdp(rank, steps=0, rho=0.1)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    for _ in range(STEPS - STEPS // 2):
        optimizer.step(closure_of(model, optimizer, *mine(rank)))
    return difference(model.parameters(), alone(rho=0.3))


def fsdp1_is_refused(rank):
    for original in (True, False):
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=original
        )
        try:
            SAM(base(model))
        except TypeError as error:
            assert "shard with FSDP2" in str(error)
        else:
            raise AssertionError(f"not refused with use_orig_params={original}")
    return 0.0


CHECKS = [
    ddp_global,
    ddp_per_rank,
    ddp_global_is_not_per_rank,
    ddp_in_two_phases,
    ddp_closure_that_does_not_zero,
    ddp_skips_together,
    ddp_scalers_agree,
    ddp_static_graph,
    ddp_compiled,
    dtensor_placements,
    fsdp_norm,
    fsdp_any_p,
    fsdp_skips_together,
    fsdp_checkpoints,
    fsdp1_is_refused,
]


def main(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=9)  # stops only what hangs, before the test kills it
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=limit
    )
    results = {}
    for check in CHECKS:
        try:
            results[check.__name__] = check(rank)
        except Unsupported as error:
            results[check.__name__] = f"not run: {error}"
        except Exception:
            results[check.__name__] = traceback.format_exc()
    Path(folder, f"results{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
