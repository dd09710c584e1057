"""Checks of assignment 7: m-sharpness and the Hessian's spectrum."""

import itertools
from typing import Any

import torch
from torch.func import grad

from ...measure import eigenvalues
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import Trial, experiment, question, train


@question
def probe_variance(trial: Trial) -> None:
    """The variance of zᵀHz over all vectors of signs."""
    for part, size in (("a 3×3 matrix", 3), ("a 7×7 matrix", 7)):
        H = trial.randn(size, size)
        H = H + H.T
        z = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size))).double()
        want = ((z @ H) * z).sum(1).var(correction=0)
        gaussian = 2 * (H**2).sum()
        rivals = {
            "That is for Gaussian probes. For signs z_i² = 1: the diagonal does not vary.": gaussian,
            "Every pair i ≠ j occurs twice in zᵀHz, as ij and as ji; a factor 2 is missing.": want
            / 2,
            "A factor 2 is too much.": 2 * want,
            "That is the trace, the mean of zᵀHz.": H.trace(),
            "That is the standard deviation; the variance is its square.": want.sqrt(),
        }
        hint = "zᵀHz - tr H is a sum over pairs i ≠ j of H_ij z_i z_j. Which of these products "
        hint += "are uncorrelated?"
        # E(zᵀHz)² - (tr H)², or ‖H‖² minus the diagonal's, loses digits in single precision
        atol = 2e-6 * float((H**2).sum() + H.trace() ** 2)
        trial(part, {"H": H}, want, rivals, hint, atol=atol)
    H = torch.diag(trial.randn(5))
    hint = "On a diagonal matrix every vector of signs gives the trace exactly."
    atol = 1e-5 * float((H**2).sum())
    trial("a diagonal matrix", {"H": H}, 0.0, hint=hint, atol=atol)


@question
def m_sharpness(trial: Trial) -> None:
    """The mean over shards of the rise of the loss at each shard's own ε̂."""
    X, t = trial.randn(10, 4), trial.randn(10)
    w, rho = trial.randn(4), trial.number(0.1, 0.5)

    def losses(w, rows):
        return torch.log(torch.cosh(X[rows] @ w - t[rows]))

    mean_loss = lambda w, rows: losses(w, rows).mean()

    def rise(rows, ascent_rows):
        g = grad(mean_loss)(w, ascent_rows)
        return mean_loss(w + rho * g / g.norm(), rows) - mean_loss(w, rows)

    every = torch.arange(10)
    for part, m in (
        ("one shard", 10),
        ("shards of five", 5),
        ("single examples", 1),
        ("shards of four: the last has two", 4),
    ):
        shards = every.split(m)
        share = torch.tensor([len(s) / 10 for s in shards], dtype=torch.float64)
        mean = lambda values: share @ torch.stack(values)
        rises = [rise(s, s) for s in shards]
        full = [rise(s, every) for s in shards]
        slopes = [rho * grad(mean_loss)(w, s).norm() for s in shards]
        want, each = mean(rises), torch.stack(rises)
        worst = want + mean_loss(w, every)
        rivals = {
            "All shards were moved by one and the same ε̂, that of all examples. Each has its "
            "own.": mean(full),
            "The worst shard is not asked for, but the mean over shards.": each.max(),
            "The shards weigh the same here; a shard of fewer examples counts less.": each.mean(),
            "That is the first-order form (7.3), ρ‖g_B‖; the loss itself is to be evaluated.": mean(
                slopes
            ),
            "The last, smaller shard was left out.": each[: 10 // m].mean(),
            "That is the loss at the worst points; the loss at w has to be taken away.": worst,
        }
        inputs = {"losses": losses, "w": w, "n": 10, "m": m, "rho": rho}
        trial(part, inputs, want, rivals)


@question
def lanczos(trial: Trial) -> None:
    """Lanczos' α, β and Q, with a basis that stays orthogonal."""

    def problem(part, values, steps, dtype, accuracy):
        n = len(values)
        Q, _ = torch.linalg.qr(trial.randn(n, n))
        H = ((Q * values) @ Q.T).to(dtype)
        H = (H + H.T) / 2
        calls = []

        def matvec(v):
            calls.append(v)
            return H @ v

        v = trial.randn(n).to(dtype)
        alpha, beta, basis = trial.tensors(
            part,
            {"matvec": matvec, "v": v, "steps": steps},
            {"alpha": [steps], "beta": [steps - 1], "Q": [steps, n]},
            shown=f"a {n}×{n} matrix, {steps} steps, {str(dtype).removeprefix('torch.')}",
        )
        first = v.double() / v.double().norm()
        trial.require(
            torch.allclose(basis[0], first, atol=1e-5),
            "The first row of Q should be v, divided by its length.",
        )
        deviation = float((basis @ basis.T - torch.eye(steps).double()).abs().max())
        trial.require(
            deviation < accuracy,
            "The rows of Q are not orthonormal.",
            got=f"largest entry of QQᵀ - 1: {deviation:.1e}",
            hint="In floating point (8.1) alone loses orthogonality, and ghosts appear: make each "
            "new vector orthogonal to all earlier ones, twice. And divide it by its length.",
        )
        T = basis @ H.double() @ basis.T
        atol = accuracy * float(values.max())
        trial.compare(alpha, T.diagonal(), hint="alpha_j is q_j · H q_j.", atol=atol)
        hint = (
            "beta_j is the length of what is left of H q_j; its square root or its square is not."
        )
        trial.compare(beta, T.diagonal(1), hint=hint, atol=atol)
        rest = T - torch.diag(alpha) - torch.diag(beta, 1) - torch.diag(beta, -1)
        trial.require(rest.abs().max() < atol, "Q H Qᵀ is not tridiagonal: is Q that of (8.1)?")
        trial.require(
            len(calls) <= steps,
            f"There were {len(calls)} products for {steps} steps; one per step is enough.",
        )

    values = trial.randn(30).abs() + 0.5
    problem("a few steps in double precision", values, 6, torch.float64, 1e-5)
    values = torch.cat([trial.rand(57) * 0.01, torch.tensor([50.0, 30.0, 20.0]).double()])
    part = "forty steps, three eigenvalues far from the others, in single precision"
    problem(part, values, 40, torch.float32, 1e-4)


@question
def hutchinson(trial: Trial) -> None:
    """Trace and standard error from given probes."""
    n, k = 12, 9
    H = trial.randn(n, n)
    H = H @ H.T
    probes = (trial.integers(2, k, n) * 2 - 1).double()
    values = ((probes @ H) * probes).sum(1)
    mean, error = values.mean(), values.std() / k**0.5
    per_weight = mean / n, error / n
    rivals = {
        "That is the spread of single probes; the standard error of their mean is smaller by √k.": (
            mean,
            error * k**0.5,
        ),
        "The variance was divided by k, not by k - 1.": (mean, error * ((k - 1) / k) ** 0.5),
        "That was divided by zᵀz: it estimates the mean eigenvalue, not the trace.": per_weight,
        "That is the variance of the mean; the standard error is its root.": (mean, error**2),
        "These are sums over the probes.": (values.sum(), values.std() * k**0.5),
        "That is the mean of ‖Hz‖, not of zᵀHz.": ((probes @ H).norm(dim=1).mean(), error),
    }
    inputs = {"matvec": lambda v: H @ v, "probes": probes}
    trial("nine probes", inputs, (mean, error), rivals)


@experiment("the larger rate minus the smaller", "largest eigenvalue", "test error")
def sharpness_effect(seeds: tuple[int, ...]) -> tuple[Any, ...]:
    """How a larger learning rate changes the largest eigenvalue and the test error."""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    runs = train(
        seeds,
        data,
        Recipe(optimizer=SGD()),
        600,
        width=16,
        activation=torch.nn.Tanh,
        grid={"lr": [0.05, 0.3]},
        networks="last",
    )
    assert runs.networks is not None
    largest = runs.networks.measure(eigenvalues, data, "train").value.squeeze("eigenvalue")
    end = runs.isel(step=0)
    change = lambda v: (v.sel(lr=0.3) - v.sel(lr=0.05)).values
    return change(largest), change(end.test_error)
