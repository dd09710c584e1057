"""How fast are λmax and the spectral density, at equal accuracy?

    python benchmarks/spectrum.py [--turns 3] [--record]

Beside ``flatmin.spectrum`` stand PyHessian (power iteration for λmax, Lanczos with full
reorthogonalization for the density) and curvlinops (SciPy's ARPACK on its Hessian for λmax, Lanczos
without reorthogonalization for the density), both from PyPI and left out where not installed.  All
get the same trained network, the same batch and the same precision, and take turns in one process;
what is compared are the ratios of each turn, and their median.  Making the operator counts.

- *λmax*: each side at the loosest of its tolerances that reaches a relative error of 1e-4, or of
  3e-6, from all of three starting vectors; the reference is a run of ours in double precision, to 1e-8.
- *density*: the same number of probes and steps for all.  Equal accuracy is checked: the mean
  eigenvalue that the quadratures give, which has a standard error, and how many nodes per probe lie
  above half of the tenth largest eigenvalue, where there are ten or a few more (ghosts are extra).
- *stack*: λmax and density of 20 networks at once, against a loop over them.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from torch import nn

from flatmin import MLP, Adam, Recipe, ResNet, digits, fit
from flatmin.spectrum import (
    HessianDensity,
    HessianEigenvalues,
    eigenvalues,
    hessian_operator,
    spectral_density,
)

try:
    from stack import setting
except ImportError:  # imported as benchmarks.spectrum
    from benchmarks.stack import setting

RECORD = Path(__file__).resolve().parent.parent / "results" / "benchmark_spectrum.json"
TARGETS = (1e-4, 3e-6)  # relative errors of λmax; single precision ends at about 1e-6
TOLERANCES = [10 ** (-k / 2) for k in range(2, 17)]
SEEDS = range(3)
criterion = nn.CrossEntropyLoss()
NETWORKS = {
    "MLP 64-128-128-10, 500 examples": (lambda: MLP(64, 128, 128, 10), (64,), 500),
    "ResNet-8, 100 examples": (lambda: ResNet(8, 10, 1, batch_norm=False), (1, 8, 8), 100),
}


class Flatmin:
    def __init__(self, model, x, y):
        self.operator = hessian_operator(model, criterion, x, y)

    def largest(self, tol, seed):
        return eigenvalues(self.operator, tol=tol, max_steps=1000, seed=seed).values.item()

    def density(self, steps, probes):
        found = spectral_density(self.operator, steps=steps, probes=probes)
        return found.nodes.numpy(), found.weights.numpy()


class PyHessian:
    def __init__(self, model, x, y):
        import pyhessian

        self.hessian = pyhessian.hessian(copy.deepcopy(model), criterion, data=(x, y), cuda=False)

    def largest(self, tol, seed):
        torch.manual_seed(seed)
        return self.hessian.eigenvalues(maxIter=1000, tol=tol)[0][0]

    def density(self, steps, probes):
        torch.eig, old = eig_of_before, torch.eig
        try:
            nodes, weights = self.hessian.density(iter=steps, n_v=probes)
        finally:
            torch.eig = old
        return np.array(nodes), np.array(weights)


def eig_of_before(matrix, eigenvectors):
    """What PyHessian 0.1 calls, and PyTorch has no more: without this its density cannot run."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.view_as_real(values), vectors.real


class Curvlinops:
    def __init__(self, model, x, y):
        from curvlinops import HessianLinearOperator

        params = [p for p in model.parameters() if p.requires_grad]
        self.operator = HessianLinearOperator(
            model.eval(), criterion, params, [(x, y)], check_deterministic=False
        )

    def largest(self, tol, seed):
        from scipy.sparse.linalg import eigsh

        v0 = np.random.default_rng(seed).standard_normal(self.operator.shape[0])
        found = eigsh(self.operator.to_scipy(), 1, which="LA", tol=tol, v0=v0.astype(np.float32),
                      return_eigenvectors=False)  # fmt: skip
        return float(found[0])

    def density(self, steps, probes):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        found = [fast_lanczos(self.operator, steps) for _ in range(probes)]
        weights = [vectors[0] ** 2 for _, vectors in found]
        return torch.stack([values for values, _ in found]).numpy(), torch.stack(weights).numpy()


def sides() -> dict:
    found = {"flatmin": Flatmin}
    for name, module, side in [("pyhessian", "pyhessian", PyHessian),
                               ("curvlinops", "curvlinops", Curvlinops)]:  # fmt: skip
        try:
            __import__(module)
            found[name] = side
        except ImportError:
            print(f"{name} is not installed: not measured\n")
    return found


def trained(name):
    """The network after 300 steps of Adam on the digits, and a batch of their training part."""
    make, shape, n = NETWORKS[name]
    torch.manual_seed(0)
    x, y = digits().split("train")
    x, model = x.view(-1, *shape), make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(300):
        rows = torch.arange(step * 100, step * 100 + 100) % len(x)
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model, x[:n], y[:n]


def turns(functions: dict, count: int) -> tuple[dict, dict]:
    """Seconds, and the median over the turns of each side's ratio to the first; and results."""
    times, results, order = {name: [] for name in functions}, {}, list(functions.items())
    for _ in range(count):
        for name, function in order:
            started = time.perf_counter()
            results[name] = function()
            times[name].append(time.perf_counter() - started)
        order = [*order[1:], order[0]]  # so that none always follows the same other
    first = next(iter(functions))
    ratio = lambda name: statistics.median(a / b for a, b in zip(times[name], times[first]))
    return {name: {"seconds": statistics.median(each), "ratio": ratio(name)}
            for name, each in times.items()}, results  # fmt: skip


def largest(name, target, count) -> dict:
    """λmax: the loosest tolerance that is good enough for all starts, and the time it takes."""
    model, x, y = trained(name)
    double = hessian_operator(model, criterion, x, y, dtype=torch.float64)
    exact = eigenvalues(double, tol=1e-8, max_steps=1000).values.item()
    chosen, functions = {}, {}
    for side, make in sides().items():
        run = lambda make, tol: [make(model, x, y).largest(tol, seed) for seed in SEEDS]
        for tol in TOLERANCES:
            error = max(abs(value - exact) for value in run(make, tol)) / abs(exact)
            if error <= target:
                break
        chosen[side] = {"tolerance": tol, "error": error}
        functions[side] = partial(run, make, tol)
    times, _ = turns(functions, 3 * count)
    return {"network": name, "lambda_max": exact, "target": target,
            **{side: chosen[side] | times[side] for side in chosen}}  # fmt: skip


def densities(name, count, steps, probes) -> dict:
    model, x, y = trained(name)
    top = eigenvalues(hessian_operator(model, criterion, x, y), 10, tol=1e-3).values
    run = lambda make: make(model, x, y).density(steps, probes)
    torch.manual_seed(0)
    row, found = turns({side: partial(run, make) for side, make in sides().items()}, count)
    for side, (nodes, weights) in found.items():
        means = (nodes * weights).sum(1)
        row[side] |= {
            "mean_eigenvalue": means.mean().item(),
            "standard_error": (means.std(ddof=1) / len(means) ** 0.5).item(),
            "outer_nodes": (nodes > top[-1].item() / 2).sum(1).mean().item(),
        }
        ours = row["flatmin"]
        error = (row[side]["standard_error"] ** 2 + ours["standard_error"] ** 2) ** 0.5
        if abs(row[side]["mean_eigenvalue"] - ours["mean_eigenvalue"]) > 5 * error:
            raise AssertionError(f"{side} and flatmin disagree: {row}")
    return {"network": name, "steps": steps, "probes": probes, **row}


def stacks(count, runs=20) -> list[dict]:
    """λmax (30 steps) and the density (80 steps, 2 probes) of ``runs`` networks."""
    data = digits()
    make = lambda: MLP(64, 100, 100, 10)
    recipe = Recipe(optimizer=Adam(lr=1e-3))
    _, networks = fit(make, data, recipe, seeds=runs, steps=100, networks="last")
    x, y = data.split("train")
    x = x.flatten(1)
    modules = [networks.module(seed=seed) for seed in networks.coords["seed"]]
    rows = []
    for what, instrument in {"λmax": HessianEigenvalues, "density": HessianDensity}.items():
        for n in (100, 500):
            if what == "λmax":
                stacked = partial(networks.measure, instrument(steps=30, examples=n), data, "train")
                one = partial(eigenvalues, tol=0, max_steps=30)
            else:
                stacked = partial(networks.measure, instrument(80, 2, examples=n), data, "train")
                one = partial(spectral_density, steps=80, probes=2)
            loop = lambda one, n: [
                one(hessian_operator(module, criterion, x[:n], y[:n])) for module in modules
            ]
            times, _ = turns({"stack": stacked, "loop": partial(loop, one, n)}, count)
            rows.append({"what": what, "networks": runs, "examples": n} | times)
    return rows


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--steps", type=int, default=80, help="Lanczos steps of a density")
    parser.add_argument("--probes", type=int, default=10, help="random vectors of a density")
    parser.add_argument("--networks", type=int, default=20, help="in the stack")
    parser.add_argument("--record", nargs="?", type=Path, const=RECORD, help="write results here")
    chosen = parser.parse_args(arguments)
    if min(chosen.turns, chosen.steps, chosen.networks) < 1 or chosen.probes < 2:
        parser.error("--turns, --steps and --networks must be at least 1, --probes at least 2")

    about = setting("cpu", turns=chosen.turns)
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    tops, curves = [], []
    for name, target in itertools.product(NETWORKS, TARGETS):
        tops.append(row := largest(name, target, chosen.turns))
        print(f"λmax to {target:g}, {name}: {row['lambda_max']:.4g}, from {len(SEEDS)} starts")
        for side in list(row)[3:]:
            print(f"  {side:<11} {row[side]['seconds']:8.2f} s  {row[side]['ratio']:6.2f}×   "
                  f"tolerance {row[side]['tolerance']:.0e}, error {row[side]['error']:.1g}", flush=True)  # fmt: skip
    for name in NETWORKS:
        curves.append(row := densities(name, chosen.turns, chosen.steps, chosen.probes))
        print(f"\ndensity, {chosen.probes} probes of {chosen.steps} steps, {name}")
        for side in list(row)[3:]:
            print(f"  {side:<11} {row[side]['seconds']:8.2f} s  {row[side]['ratio']:6.2f}×   "
                  f"{row[side]['outer_nodes']:.1f} outer nodes a probe", flush=True)  # fmt: skip
    print(f"\n{chosen.networks} networks, MLP 64-100-100-10: loop / stack")
    together = stacks(chosen.turns, chosen.networks)
    for row in together:
        print(f"  {row['what']:<8} {row['examples']:>4} examples  {row['loop']['seconds']:6.2f} s / "
              f"{row['stack']['seconds']:6.2f} s = {row['loop']['ratio']:.2f}×")  # fmt: skip
    if chosen.record:
        chosen.record.parent.mkdir(parents=True, exist_ok=True)
        content = {"setting": about, "lambda_max": tops, "density": curves, "stack": together}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        chosen.record.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {chosen.record}")


if __name__ == "__main__":
    main()
