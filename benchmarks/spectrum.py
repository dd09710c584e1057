"""How fast are λmax and the spectral density computed, at equal accuracy?

    python benchmarks/spectrum.py [--device cuda] [--record]

``flatmin.measure.hessian`` is compared with PyHessian (power iteration for λmax, Lanczos with full
reorthogonalization for the density) and curvlinops (SciPy's ARPACK on its Hessian for λmax, Lanczos
without reorthogonalization for the density), both from PyPI and skipped if not installed.  All get
the same trained network, batch and precision.  The time includes making the operator.

- *lambda_max*: each side at its loosest tolerance that reaches a relative error of 1e-4, or of
  3e-6, from each of three starting vectors; the time is for all three.  The reference is flatmin's
  result in double precision, to 1e-8.
- *density*: ten probes of 80 steps, two in each of five turns.  Two numbers show that the accuracy
  is equal: the mean eigenvalue of the quadratures, which has a standard error, and the nodes per
  probe above half of the tenth largest eigenvalue, of which there should be ten or a few more
  (ghosts are extra).
- *steps*: the time of the density against the number of Lanczos steps, for one probe.
- *stack*: λmax and density of 20 networks at once, against a loop over them.

Nearly all of the time goes into Hessian-vector products, so their number is recorded for each side.
The side *bare products* computes as many as flatmin takes, by plain autograd on an existing graph,
and nothing else.  A side with the same number of products can save at most the difference to it.
The floor counts the multiplications of that many products.
"""

import copy
import dataclasses
import functools
import inspect
import math
import sys
import warnings

from common import Benchmark, product_multiplications  # isort: skip  (quiets progress bars)
import numpy as np
import torch
from torch import nn

from flatmin import Recipe, eigenvalues, fit, spectral_density
from flatmin.book import MLP, ResNet, digits
from flatmin.measure import HessianDensity, HessianEigenvalues, hessian_operator
from flatmin.optimizer import Adam

TARGETS = (1e-4, 3e-6)  # relative errors of λmax; single precision ends at about 1e-6
TOLERANCES = [10 ** (-k / 2) for k in range(2, 17)]
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
        operator, self.products = hessian_operator(model, criterion, x, y), 0

        def counted(vs):
            self.products += len(vs)
            return operator.products(vs)

        self.operator = dataclasses.replace(operator, products=counted)

    def largest(self, tol, seed):
        return eigenvalues(self.operator, tol=tol, max_steps=1000, seed=seed).values.item()

    def density(self, steps, probes, seed):
        density = spectral_density(self.operator, steps=steps, probes=probes, seed=seed)
        return density.nodes.cpu().numpy(), density.weights.cpu().numpy()


class PyHessian:
    def __init__(self, model, x, y):
        import pyhessian

        module, self.products = sys.modules["pyhessian.hessian"], 0
        product = inspect.unwrap(module.hessian_vector_product)

        @functools.wraps(product)
        def counted(*args):
            self.products += 1
            return product(*args)

        module.hessian_vector_product = counted
        self.hessian = pyhessian.hessian(copy.deepcopy(model), criterion, (x, y), cuda=x.is_cuda)

    def largest(self, tol, seed):
        torch.manual_seed(seed)
        return self.hessian.eigenvalues(maxIter=1000, tol=tol)[0][0]

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
        product, self.products = self.operator._matmat, 0

        def counted(vectors):
            self.products += vectors[0].shape[-1]
            return product(vectors)

        self.operator._matmat = counted

    def largest(self, tol, seed):
        from scipy.sparse.linalg import eigsh

        v0 = np.random.default_rng(seed).standard_normal(self.operator.shape[0])
        values = eigsh(
            self.operator.to_scipy(),
            1,
            which="LA",
            tol=tol,
            v0=v0.astype(np.float32),
            return_eigenvectors=False,
        )
        return float(values[0])

    def density(self, steps, probes, seed):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        torch.manual_seed(seed)
        pairs = [fast_lanczos(self.operator, steps) for _ in range(probes)]
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

    def compare(self, functions: dict, products: dict, **turns) -> tuple[dict, dict]:
        """A row and its floor, from the function of each side and its number of products."""
        count = products["flatmin"]
        bare = bare_products(self.model, self.x, self.y, count)
        row = self.bench.turns(functions | {"bare products": bare}, "flatmin", **turns)
        for name, side in row["sides"].items():
            side["products"] = products.get(name, count)
        bare = row["sides"]["bare products"]
        bare["product_seconds"] = bare["seconds"] / count
        per_example = product_multiplications(self.model, self.x)
        return row, self.bench.floor(multiplications=count * len(self.x) * per_example)

    def largest(self, part) -> None:
        """λmax, at the loosest tolerance that reaches each target from all starts."""
        double = hessian_operator(self.model, criterion, self.x, self.y, dtype=torch.float64)
        exact = eigenvalues(double, tol=1e-8, max_steps=1000).values.item()

        @functools.cache
        def run(side, tol):
            """The largest relative error, and the number of products."""
            starts = [(self.sides[side](self.model, self.x, self.y), seed) for seed in SEEDS]
            errors = [abs(peer.largest(tol, seed) / exact - 1) for peer, seed in starts]
            return max(errors), sum(peer.products for peer, _ in starts)

        for target in TARGETS[:1] if self.bench.quick else TARGETS:
            chosen = {}
            for side in self.sides:
                accurate = (tol for tol in TOLERANCES if run(side, tol)[0] <= target)
                chosen[side] = next(accurate, TOLERANCES[-1])
            functions = {
                side: functools.partial(run.__wrapped__, side, tol) for side, tol in chosen.items()
            }
            products = {side: run(side, tol)[1] for side, tol in chosen.items()}
            row, floor = self.compare(functions, products)
            for side, tol in chosen.items():
                row["sides"][side] |= {"tolerance": tol, "error": run(side, tol)[0]}
            part.add({"network": self.name, "to": target}, row, floor)

    def density(self, part, steps=STEPS, probes=PROBES, turns=TURNS) -> None:
        """The density, with the probes spread over the turns."""
        densities, products = {side: [] for side in self.sides}, {}
        top = min(10, self.x[0].numel())
        hessian = hessian_operator(self.model, criterion, self.x, self.y)
        outer = eigenvalues(hessian, top, tol=1e-3).values

        def call(side):
            peer = self.sides[side](self.model, self.x, self.y)
            densities[side].append(peer.density(steps, probes, seed=len(densities[side])))
            products[side] = peer.products

        functions = {side: functools.partial(call, side) for side in self.sides}
        row, floor = self.compare(
            functions, {"flatmin": steps * probes}, least=turns, seconds=0, warm_up=False
        )
        means = {}
        for side, per_turn in densities.items():
            nodes, weights = (np.concatenate(part) for part in zip(*per_turn, strict=True))
            mean = (nodes * weights).sum(1)
            means[side] = mean.mean(), mean.std(ddof=1) / math.sqrt(len(mean))
            row["sides"][side] |= {
                "products": products[side],
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
        products = dict.fromkeys(self.sides, steps)
        part.add({"steps": steps}, *self.compare(functions, products))


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
        "λmax": (30, HessianEigenvalues, {}, lambda H: eigenvalues(H, tol=0, max_steps=30)),
        "density": (
            40,
            HessianDensity,
            {"probes": 1},
            lambda H: spectral_density(H, steps=40, probes=1),
        ),
    }
    for what, (steps, instrument, options, single) in kinds.items():
        for n in sizes:
            stacked = instrument(steps=steps, examples=n, **options)
            functions = {
                "stack": lambda stacked=stacked: networks.measure(stacked, data, "train"),
                "loop": lambda n=n, single=single: [
                    single(hessian_operator(module, criterion, x[:n], y[:n])) for module in modules
                ],
            }
            row = bench.turns(functions, "stack")
            floor = bench.floor(multiplications=runs * steps * n * per_example)
            part.add({"what": what, "examples": n}, row, floor)


def main(arguments=None) -> None:
    bench = Benchmark("spectrum", __doc__, arguments, peers=PEERS)
    warnings.filterwarnings("ignore", "after .* steps the errors")  # the number of steps is fixed
    warnings.filterwarnings("ignore", "Using backward")  # PyHessian's
    networks = QUICK if bench.quick else NETWORKS
    problems = [Problem(bench, name, *network) for name, network in networks.items()]
    part = bench.part("lambda_max", "λmax to a relative error, from three starts", "flatmin")
    for problem in problems:
        problem.largest(part)
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
