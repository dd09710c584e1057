"""Checks of assignment 7: m-sharpness and the Hessian's spectrum."""

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch.func import grad

from ...measure import eigenvalues
from ...optimizer import SGD
from ...pipeline import Recipe
from ...stack import fit
from ..datasets import mnist1d
from ..models import MLP
from .grading import Mistake, Trial, question


@question
def probe_variance(trial: Trial) -> None:
    """The variance of zᵀHz over all vectors of signs."""
    for part, size in (("a 3×3 matrix", 3), ("a 7×7 matrix", 7)):
        H = trial.randn(size, size)
        H = H + H.T
        z = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size))).double()
        all_signs = ((z @ H) * z).sum(1)
        squares, diagonal = (H**2).sum(), (H.diagonal() ** 2).sum()
        trial(
            part,
            {"H": H},
            want=all_signs.var(correction=0),
            rivals={
                "That is for Gaussian probes. For signs z_i² = 1, so the diagonal does not vary.": 2
                * squares,
                "Every pair i ≠ j occurs twice in zᵀHz, as ij and as ji; a factor 2 is missing.": squares
                - diagonal,
                "A factor 2 is too much.": 4 * (squares - diagonal),
                "That is the trace, the mean of zᵀHz.": H.trace(),
                "That is the standard deviation; the variance is its square.": all_signs.std(
                    correction=0
                ),
            },
            hint="zᵀHz - tr H is a sum over pairs i ≠ j of H_ij z_i z_j. Which of these products "
            "are uncorrelated?",
        )
    H = torch.diag(trial.randn(5))
    trial(
        "a diagonal matrix",
        {"H": H},
        want=0.0,
        atol=1e-9,
        hint="On a diagonal matrix every vector of signs gives the trace exactly.",
    )


@question
def m_sharpness(trial: Trial) -> None:
    """The mean over shards of the rise of the loss at each shard's own ε̂."""
    X, t = trial.randn(10, 4), trial.randn(10)
    w, rho = trial.randn(4), trial.number(0.1, 0.5)

    def losses(w, rows):
        return torch.log(torch.cosh(X[rows] @ w - t[rows]))

    def rise(rows, ascent_rows=None):
        L = lambda w: losses(w, rows).mean()
        g = grad(L if ascent_rows is None else lambda w: losses(w, ascent_rows).mean())(w)
        return L(w + rho * g / g.norm()) - L(w)

    every = torch.arange(10)
    for part, m in (
        ("one shard", 10),
        ("shards of five", 5),
        ("single examples", 1),
        ("shards of four: the last has two", 4),
    ):
        shards = every.split(m)
        rises = torch.stack([rise(s) for s in shards])
        sizes = torch.tensor([len(s) for s in shards]).double()
        want = (rises * sizes).sum() / 10
        full = sum(s * rise(rows, every) for s, rows in zip(sizes, shards)) / 10
        slopes = [grad(lambda w, s=s: losses(w, s).mean())(w).norm() for s in shards]
        rivals = {
            "All shards were moved by one and the same ε̂, that of all examples. Each has its own.": full,
            "The worst shard is not asked for, but the mean over shards.": rises.max(),
            "The shards all weigh the same here; a shard of fewer examples counts less.": rises.mean(),
            "That is the first-order form (7.3), ρ‖g_B‖; the loss itself is to be evaluated.": sum(
                s * rho * g for s, g in zip(sizes, slopes)
            )
            / 10,
            "The last, smaller shard was left out.": rises[sizes == m].mean(),
            "That is the loss at the worst points; the loss at w has to be taken away.": want
            + losses(w, every).mean(),
        }
        trial(
            part, {"losses": losses, "w": w, "n": 10, "m": m, "rho": rho}, want=want, rivals=rivals
        )


@question
def lanczos(trial: Trial) -> None:
    """Lanczos' α, β and Q, with a basis that stays orthogonal."""

    def problem(part, values, steps, dtype=torch.float64):
        n = len(values)
        Q, _ = torch.linalg.qr(trial.randn(n, n))
        H = ((Q * values) @ Q.T).to(dtype)
        H = (H + H.T) / 2
        calls = []

        def matvec(v):
            calls.append(v)
            return H @ v

        v = trial.randn(n).to(dtype)
        got = trial.call(part, {"matvec": matvec, "v": v, "steps": steps})
        shown = f"a {n}×{n} matrix, {steps} steps, {str(dtype).removeprefix('torch.')}"
        trial.require(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "Three tensors should have come back: alpha, beta and Q.",
            input=shown,
        )
        shapes = [steps], [steps - 1], [steps, n]
        for name, value, shape in zip(("alpha", "beta", "Q"), got, shapes):
            trial.require(
                isinstance(value, torch.Tensor) and list(value.shape) == shape,
                f"{name} should be a tensor of shape {shape}.",
                got=f"shape {list(getattr(value, 'shape', []))}",
                input=shown,
            )
        alpha, beta, basis = (part.detach().double() for part in got)
        trial.require(
            all(p.isfinite().all() for p in (alpha, beta, basis)),
            "There is a NaN or an infinity in what came back.",
            input=shown,
        )
        first = v.double() / v.double().norm()
        trial.require(
            torch.allclose(basis[0], first, atol=1e-5),
            "The first row of Q should be v, divided by its length.",
            input=shown,
        )
        deviation = float((basis @ basis.T - torch.eye(steps).double()).abs().max())
        small = 1e-4 if dtype == torch.float32 else 1e-8
        trial.require(
            deviation < small,
            "The rows of Q are not orthonormal.",
            input=shown,
            got=f"largest entry of QQᵀ - 1: {deviation:.1e}",
            hint="In floating point (7.5) alone loses orthogonality, and ghosts appear: "
            "make each new vector orthogonal to all earlier ones, twice. And divide it "
            "by its length.",
        )
        T = basis @ H.double() @ basis.T
        tridiagonal = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
        scale = float(values.abs().max())
        if not torch.allclose(tridiagonal, T, atol=small * scale):
            alpha_right = torch.allclose(alpha, T.diagonal(), atol=small * scale)
            raise Mistake(
                "T, made of alpha and beta, is not Q H Qᵀ.",
                input=shown,
                got=f"beta {show_few(beta) if alpha_right else 'and alpha ' + show_few(alpha)}",
                wanted=f"{show_few(T.diagonal(1) if alpha_right else T.diagonal())}",
                hint="beta_j is the length of what is left of H q_j; its square root or its "
                "square is not."
                if alpha_right
                else "alpha_j is q_j · H q_j.",
            )
        trial.require(
            len(calls) <= steps,
            f"There were {len(calls)} products for {steps} steps; one per step is enough.",
            input=shown,
        )

    problem("a few steps in double precision", trial.randn(30).abs() + 0.5, 6)
    spectrum = torch.cat([trial.rand(57) * 0.01, torch.tensor([50.0, 30.0, 20.0]).double()])
    problem(
        "forty steps, three eigenvalues far from the others, in single precision",
        spectrum,
        40,
        torch.float32,
    )


def show_few(values):
    return "[" + ", ".join(f"{x:.4g}" for x in values[:4].tolist()) + ", …]"


@question
def hutchinson(trial: Trial) -> None:
    """Trace and standard error from given probes."""
    n, k = 12, 9
    H = trial.randn(n, n)
    H = H @ H.T
    probes = (trial.integers(2, k, n) * 2 - 1).double()
    values = ((probes @ H) * probes).sum(1)
    mean, error = values.mean(), values.std() / k**0.5
    inputs = {"matvec": lambda v: H @ v, "probes": probes}
    trial(
        "nine probes",
        inputs,
        want=(mean, error),
        rivals={
            "That is the spread of single probes; the standard error of their mean is smaller by √k.": (
                mean,
                values.std(),
            ),
            "The variance was divided by k, not by k - 1.": (
                mean,
                values.std(correction=0) / k**0.5,
            ),
            "That was divided by zᵀz: it estimates the mean eigenvalue, not the trace.": (
                mean / n,
                error / n,
            ),
            "That is the variance of the mean; the standard error is its root.": (mean, error**2),
            "These are sums over the probes.": (values.sum(), values.std() * k**0.5),
            "That is the mean of ‖Hz‖, not of zᵀHz.": ((probes @ H).norm(dim=1).mean(), error),
        },
    )


@lru_cache
def _sharpness_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        data,
        Recipe(optimizer=SGD()),
        steps=600,
        grid={"lr": [0.05, 0.3]},
        seeds=list(seeds),
        evaluate_at=[600],
        networks="last",
        dtype=torch.float64,
    )
    assert runs.networks is not None
    largest = runs.networks.measure(eigenvalues, data, "train").value.squeeze("eigenvalue")
    end = runs.isel(step=0)
    change = lambda v: (v.sel(lr=0.3) - v.sel(lr=0.05)).values
    return {"largest eigenvalue": change(largest), "test error": change(end.test_error)}


@question(seconds=120)
def sharpness_effect(trial: Trial) -> None:
    """How a larger learning rate changes the largest eigenvalue and the test error."""
    trial.experiment(
        _sharpness_effect,
        atol=0.01,
        rivals={
            "The difference is the wrong way round: the larger rate minus the smaller.": lambda want: {
                key: -value for key, value in want.items()
            },
        },
    )
