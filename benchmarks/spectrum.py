"""How fast are λmax and the spectral density computed, with equally many products?

    python benchmarks/spectrum.py [--device cuda] [--record]

The instruments of ``flatmin.measure`` are compared with PyHessian (power iteration for λmax,
Lanczos with full reorthogonalization for the density) and curvlinops (Lanczos without
reorthogonalization for both), from PyPI and skipped if not installed.  All get the same trained
network, batch, precision and number of Hessian-vector products, where nearly all of the time goes.

- *lambda_max*: λmax from three starting vectors.  What the products are worth shows in the largest
  relative error, against flatmin's result in double precision.
- *density*: ten probes of 80 steps, two in each of five turns.  Two numbers show the accuracy: the
  mean eigenvalue of the quadratures, which has a standard error, and the nodes per probe above half
  of the tenth largest eigenvalue, of which there should be ten or a few more (ghosts are extra).
- *steps*: the time of the density against the number of Lanczos steps, for one probe.
- *stack*: λmax and density of 20 networks at once, against a loop over them.

The side *bare products* computes as many products by plain autograd on an existing graph, and
nothing else: what is above it is Lanczos itself.  The floor counts the multiplications.
"""

import copy
import functools
import math
import warnings

from common import Benchmark, product_multiplications  # isort: skip  (quiets progress bars)
import numpy as np
import torch
from torch import nn

from flatmin import Recipe, eigenvalues, fit, spectral_density
from flatmin.book import MLP, ResNet, digits
from flatmin.measure import on
from flatmin.optimizer import Adam

LARGEST = (5, 10)  # with more, all sides end at the rounding of single precision
SEEDS = range(3)
STEPS, PROBES, TURNS = 80, 2, 5
GROWTH = (10, 20, 40, 80, 160)
criterion = nn.CrossEntropyLoss()
NETWORKS = {
    "MLP 64-128-128-10, 500 examples": (lambda: MLP(64, 128, 128, 10), (64,), 500),
    "ResNet-8, 100 examples": (lambda: ResNet([1, 1, 1], 10, 1, batch_norm=False), (1, 8, 8), 100),
}
QUICK = {"MLP 64-16-10, 50 examples": (lambda: MLP(64, 16, 10), (64,), 50)}


class Flatmin:
    def __init__(self, model, x, y):
        self.on = functools.partial(on, model, x=x, y=y)

    def largest(self, steps, seed):
        return self.on(eigenvalues, steps=steps, seed=seed).value.item()

    def density(self, steps, probes, seed):
        density = self.on(spectral_density, steps=steps, probes=probes, seed=seed)
        return density.node.cpu().numpy(), density.weight.cpu().numpy()


class PyHessian:
    def __init__(self, model, x, y):
        import pyhessian

        self.hessian = pyhessian.hessian(copy.deepcopy(model), criterion, (x, y), cuda=x.is_cuda)

    def largest(self, steps, seed):
        torch.manual_seed(seed)
        return self.hessian.eigenvalues(maxIter=steps, tol=0)[0][0]

    def density(self, steps, probes, seed):
        torch.manual_seed(seed)
        torch.eig, old = removed_eig, torch.eig
        try:
            nodes, weights = self.hessian.density(iter=steps, n_v=probes)
        finally:
            torch.eig = old
        return np.array(nodes), np.array(weights)


def removed_eig(matrix, eigenvectors):
    """torch.eig, which PyTorch has removed and PyHessian 0.1 needs for its density."""
    values, vectors = torch.linalg.eig(matrix)
    return torch.view_as_real(values), vectors.real


class Curvlinops:
    def __init__(self, model, x, y):
        from curvlinops import HessianLinearOperator

        params = [p for p in model.parameters() if p.requires_grad]
        self.operator = HessianLinearOperator(
            model.eval(), criterion, params, [(x, y)], check_deterministic=False
        )

    def lanczos(self, steps, seed):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        torch.manual_seed(seed)
        return fast_lanczos(self.operator, steps)

    def largest(self, steps, seed):
        return self.lanczos(steps, seed)[0].max().item()

    def density(self, steps, probes, seed):
        pairs = [self.lanczos(steps, seed * probes + i) for i in range(probes)]
        weights = [vectors[0] ** 2 for _, vectors in pairs]
        nodes, weights = torch.stack([values for values, _ in pairs]), torch.stack(weights)
        return nodes.cpu().numpy(), weights.cpu().numpy()


PEERS = {"pyhessian": PyHessian, "curvlinops-for-pytorch": Curvlinops}


def bare_products(model, x, y, count: int):
    """``count`` Hessian-vector products by plain autograd, and nothing else."""
    params = list(model.parameters())
    gradient = torch.autograd.grad(criterion(model(x), y), params, create_graph=True)
    v = [torch.randn_like(p) for p in params]
    product = lambda: torch.autograd.grad(gradient, params, v, retain_graph=True)
    return lambda: [product() for _ in range(count)]


def trained(make, shape, n, device):
    """The network after 300 steps of Adam on the digits, and a batch of the training split."""
    torch.manual_seed(0)
    x, y = digits().split("train")
    x, model = x.view(-1, *shape), make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(300):
        rows = torch.arange(step * 100, step * 100 + 100) % len(x)
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.to(device), x[:n].to(device), y[:n].to(device)


class Problem:
    """A trained network, its batch, and the sides that are compared on it."""

    def __init__(self, bench, name, make, shape, n):
        self.bench, self.name = bench, name
        self.model, self.x, self.y = trained(make, shape, n, bench.device)
        self.sides = {"flatmin": Flatmin} | {
            name: side for name, side in PEERS.items() if name in bench.setting
        }

    def compare(self, functions: dict, count: int, **turns) -> tuple[dict, dict]:
        """A row and its floor, from the function of each side; all make ``count`` products."""
        bare = bare_products(self.model, self.x, self.y, count)
        row = self.bench.turns(functions | {"bare products": bare}, "flatmin", **turns)
        bare = row["sides"]["bare products"]
        bare["product_seconds"] = bare["seconds"] / count
        per_example = product_multiplications(self.model, self.x)
        return row, self.bench.floor(multiplications=count * len(self.x) * per_example)

    def largest(self, part, steps: int) -> None:
        """λmax from three starts."""
        double = {"dtype": torch.float64, "steps": 200}
        exact = on(self.model, eigenvalues, self.x, self.y, **double).value.item()
        found = {}

        def call(side):
            peer = self.sides[side](self.model, self.x, self.y)
            found[side] = [peer.largest(steps, seed) for seed in SEEDS]

        functions = {side: functools.partial(call, side) for side in self.sides}
        row, floor = self.compare(functions, steps * len(SEEDS))
        for side, values in found.items():
            row["sides"][side]["error"] = max(abs(value / exact - 1) for value in values)
        part.add({"network": self.name, "products": steps}, row, floor)

    def density(self, part, steps=STEPS, probes=PROBES, turns=TURNS) -> None:
        """The density, with the probes spread over the turns."""
        densities = {side: [] for side in self.sides}
        top = min(10, self.x[0].numel())
        outer = on(self.model, eigenvalues, self.x, self.y, top=top, steps=100).value

        def call(side):
            peer = self.sides[side](self.model, self.x, self.y)
            densities[side].append(peer.density(steps, probes, seed=len(densities[side])))

        functions = {side: functools.partial(call, side) for side in self.sides}
        how = {"least": turns, "seconds": 0, "warm_up": False}
        row, floor = self.compare(functions, steps * probes, **how)
        means = {}
        for side, per_turn in densities.items():
            nodes, weights = (np.concatenate(part) for part in zip(*per_turn, strict=True))
            mean = (nodes * weights).sum(1)
            means[side] = mean.mean(), mean.std(ddof=1) / math.sqrt(len(mean))
            row["sides"][side] |= {
                "mean_eigenvalue": float(means[side][0]),
                "standard_error": float(means[side][1]),
                "outer_nodes": float((nodes > outer[-1].item() / 2).sum(1).mean()),
            }
        for side, (mean, error) in means.items():
            ours = means["flatmin"]
            if abs(mean - ours[0]) > 5 * math.hypot(error, ours[1]):
                raise AssertionError(f"{side} and flatmin disagree: {row}")
        part.add({"network": self.name, "probes per turn": probes}, row, floor)

    def steps(self, part, steps: int) -> None:
        functions = {
            side: lambda make=make: make(self.model, self.x, self.y).density(steps, 1, 0)
            for side, make in self.sides.items()
        }
        part.add({"steps": steps}, *self.compare(functions, steps))


def stacks(bench, part, runs: int, sizes) -> None:
    """λmax (30 steps) and the density (one probe of 40 steps) of ``runs`` networks."""
    data, device = digits(), bench.device
    make = lambda: MLP(64, 100, 100, 10)
    recipe = Recipe(optimizer=Adam(lr=1e-3))
    networks = fit(
        make, data, recipe, seeds=runs, steps=100, networks="last", device=device
    ).networks
    x, y = (part.to(device) for part in data.split("train"))
    x = x.flatten(1)
    modules = [networks.module(seed=seed).to(device) for seed in networks.coords["seed"]]
    per_example = product_multiplications(modules[0], x)
    kinds = {
        "λmax": (30, functools.partial(eigenvalues, steps=30)),
        "density": (40, functools.partial(spectral_density, steps=40, probes=1)),
    }
    for what, (steps, instrument) in kinds.items():
        for n in sizes:
            measure = functools.partial(networks.measure, instrument, data, "train", n)
            loop = lambda n=n, f=instrument: [on(one, f, x[:n], y[:n]) for one in modules]
            functions = {"stack": measure, "loop": loop}
            row = bench.turns(functions, "stack")
            floor = bench.floor(multiplications=runs * steps * n * per_example)
            part.add({"what": what, "examples": n}, row, floor)


def main(arguments=None) -> None:
    bench = Benchmark("spectrum", __doc__, arguments, peers=PEERS)
    warnings.filterwarnings("ignore", "Using backward")  # PyHessian's
    networks = QUICK if bench.quick else NETWORKS
    problems = [Problem(bench, name, *network) for name, network in networks.items()]
    part = bench.part("lambda_max", "λmax from three starts, by products from each", "flatmin")
    for problem in problems:
        for steps in LARGEST[:1] if bench.quick else LARGEST:
            problem.largest(part, steps)
    part = bench.part("density", f"Spectral density, {STEPS} steps", "flatmin")
    for problem in problems:
        problem.density(part, *((10, 6, 1) if bench.quick else ()))
    part = bench.part("steps", f"Spectral density of one probe, {problems[0].name}", "flatmin")
    for steps in GROWTH[:1] if bench.quick else GROWTH:
        problems[0].steps(part, steps)
    runs = 2 if bench.quick else 20
    part = bench.part("stack", f"{runs} networks, MLP 64-100-100-10", "stack")
    stacks(bench, part, runs, (20,) if bench.quick else (100, 500))
    bench.finish()


if __name__ == "__main__":
    main()
