"""Checks of assignment 7: m-sharpness and the Hessian's spectrum."""

import itertools
from typing import Any

import torch
from scipy.special import stdtrit
from torch.func import grad

from ...measure import eigenvalues
from ...optimizer import SGD
from ...pipeline import Recipe
from ..datasets import mnist1d
from .grading import ERROR, Mistake, Trial, by_name, experiment, question, show, train


@question
def probe_variance(trial: Trial) -> None:
    """The variance of zᵀHz over all vectors of signs."""
    for part, size in (("a 3×3 matrix", 3), ("a 7×7 matrix", 7)):
        H = trial.randn(size, size)
        H = H + H.T
        z = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size))).double()
        variance = lambda z, **options: ((z @ H) * z).sum(1).var(**options)
        want, off = variance(z, correction=0), H - torch.diag(H.diagonal())
        squares, trace = (H**2).sum(), H.trace()
        rivals = {
            "That is for Gaussian probes. For signs z_i² = 1: the diagonal does not vary.": 2
            * squares,
            "That is ‖H‖². The diagonal does not vary, and every pair i ≠ j occurs twice.": squares,
            "The diagonal was taken away once; it is in 2 Σ H_ij² twice.": squares + want / 2,
            "Every pair i ≠ j occurs twice in zᵀHz, as ij and as ji; a factor 2 is missing.": want
            / 2,
            "For i < j the coefficient of z_i z_j is 2 H_ij; its square is 4 H_ij².": want / 4,
            "A factor 2 is too much.": 2 * want,
            "That is the trace, the mean of zᵀHz.": trace,
            "That is the mean of (zᵀHz)²; the square of the mean has to be taken away.": want
            + trace**2,
            "(tr H)² is not the sum of the squares H_ii².": [
                2 * squares - 2 * trace**2,
                2 * squares - trace**2,
                squares - trace**2,
            ],
            "That is a standard deviation or a norm; the variance is a square.": [
                want.sqrt(),
                (want / 2).sqrt(),
                (want * 2).sqrt(),
            ],
            "The variances of the products add up: each H_ij is squared by itself.": [
                factor * off.sum() ** exponent for factor in (1, 2) for exponent in (1, 2)
            ],
            "The squares of all entries add up; there is no mean in it, and no row by itself.": [
                *(want / number for number in (size, size**2, size**2 - size)),
                2 * (off**2).sum(1),
                2 * (off**2).mean(1),
            ],
            "These are all vectors of signs, no sample: divide by their number, not by one less.": (
                variance(z, correction=1)
            ),
            "The entries of z are -1 and 1, not 0 and 1.": variance((z + 1) / 2, correction=0),
        }
        hint = "zᵀHz - tr H is a sum over pairs i ≠ j of H_ij z_i z_j. Which of these products "
        hint += "are uncorrelated? (A sample of probes gives the variance only roughly.)"
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
    slope = lambda rows, w=w: grad(mean_loss)(w, rows)
    to_length = lambda v: rho * v / v.norm()
    rise = lambda e, rows, w=w: mean_loss(w + e, rows) - mean_loss(w, rows)
    every = torch.arange(10)

    def average(value, shards):
        """Of value(rows), over the examples."""
        return sum(len(s) / 10 * value(s) for s in shards)

    own = lambda rows: rise(to_length(slope(rows)), rows)
    if own(every[:5]) > own(every[5:]):
        X, t = X.flip(0), t.flip(0)  # the worst shard of five is the last
    for part, m in (
        ("shards of five", 5),
        ("one shard", 10),
        ("single examples", 1),
        ("shards of four: the last has two", 4),
    ):
        shards = every.split(m)
        of = lambda step: average(lambda s: rise(step(slope(s)), s), shards)
        want, each = average(own, shards), torch.stack([own(s) for s in shards])
        place, carried, from_start = w, 0.0, 0.0
        for s in shards:
            e = to_length(slope(s, place))
            carried += len(s) / 10 * rise(e, s, place)
            place = place + e
            from_start += len(s) / 10 * rise(place - w, s)
        rivals = {
            "All shards were moved by one and the same ε̂, that of all examples. Each has its "
            "own.": average(lambda s: rise(to_length(slope(every)), s), shards),
            "Each example was moved by itself; those of a shard move together.": average(
                own, every.split(1)
            ),
            "m is the number of examples in a shard, not the number of shards.": average(
                own, every.chunk(m)
            ),
            "A shard's ε̂ counts by the rise of its own loss, not of the loss of all examples.": (
                average(lambda s: rise(to_length(slope(s)), every), shards)
            ),
            "The worst shard is not asked for, but the mean over shards.": each.max(),
            "The shards weigh the same here; a shard of fewer examples counts less.": [
                each.mean(),
                each.sum() * m / 10,
            ],
            "The last shard was left out.": [each[:-1].mean(), each[:-1].sum() * m / 10]
            if m < 10
            else [],
            "That is a sum, or divided by the wrong number: it is the mean over the examples of "
            "their shard's rise.": [each.sum(), each.sum() / 10, m * want, 10 * want],
            "That is the first-order form (7.3), ρ‖g_B‖; the loss itself is to be evaluated.": (
                average(lambda s: rho * slope(s).norm(), shards)
            ),
            "That is the loss at the worst points; the loss at w has to be taken away.": want
            + mean_loss(w, every),
            "The difference is the wrong way round: it is the loss at w + ε̂ minus that at w.": -want,
            "ε̂ leads uphill; this goes downhill.": [of(lambda g: -to_length(g))]
            + [-of(lambda g: -to_length(g))],
            "ε̂ lies along g_B, not along its signs.": of(lambda g: rho * g.sign()),
            "ε̂ has the length ρ: g_B has to be divided by its length.": of(lambda g: rho * g),
            "A root is missing: g_B is divided by its length, not by the square of it.": of(
                lambda g: rho * g / (g @ g)
            ),
            "Every shard starts from w, not from where the one before has moved to.": [
                carried,
                from_start,
            ],
        }
        hint = "The first m rows are the first shard, and so on. Of each: g_B at w, ε̂, and how "
        hint += "much its own mean loss is higher at w + ε̂ than at w."
        inputs = {"losses": losses, "w": w, "n": 10, "m": m, "rho": rho}
        trial(part, inputs, want, rivals, hint)


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
        hint = "The next row is what is left of H q_j when α_j q_j and β_{j-1} q_{j-1} are taken "
        hint += "away."
        if dtype == torch.float32:
            hint = "In floating point (8.1) alone loses orthogonality, and ghosts appear: make "
            hint += "each new vector orthogonal to all rows of Q, the last one too, twice."
        try:
            alpha, beta, basis = trial.tensors(
                part,
                {"matvec": matvec, "v": v, "steps": steps},
                {"alpha": [steps], "beta": [steps - 1], "Q": [steps, n]},
                shown=f"a {n}×{n} matrix, {steps} steps, {str(dtype).removeprefix('torch.')}",
            )
        except Mistake as mistake:
            if "NaN" in str(mistake):
                mistake.lines["hint"] = hint
            raise
        first = v.double() / v.double().norm()
        trial.require(
            torch.allclose(basis[0], first, atol=1e-5),
            "The first row of Q should be v, divided by its length.",
        )
        trial.require(
            torch.allclose(basis.norm(dim=1), torch.ones(steps).double(), atol=accuracy),
            "Each row of Q should have the length 1.",
            got=f"lengths {show(basis.norm(dim=1))}",
        )
        deviation = float((basis @ basis.T - torch.eye(steps).double()).abs().max())
        trial.require(
            deviation < accuracy,
            "The rows of Q are not orthonormal.",
            got=f"largest entry of QQᵀ - 1: {deviation:.1e}",
            hint=hint,
        )
        HQ = basis @ H.double()
        T = HQ @ basis.T
        a, b = T.diagonal(), T.diagonal(1)
        atol = 2e-6 * float(values.max())
        rivals = {
            "alpha_j is q_j · H q_j, before H q_j is made orthogonal to q_j.": 0 * a,
            "These are the eigenvalues of T; alpha is its diagonal.": torch.linalg.eigvalsh(T),
        }
        hint = "alpha_j is q_j · H q_j."
        if torch.allclose(alpha[:2], a[:2], atol=atol):
            hint = "The first are right. Was Q made orthonormal in the end? Then alpha and beta "
            hint += "belong to the rows it had before: make each new row orthogonal before the "
            hint += "next product."
        trial.compare(alpha, a, rivals, hint, atol=atol)
        rivals = {
            "That is the length of H q_j. Take α_j q_j and β_{j-1} q_{j-1} away first.": HQ.norm(
                dim=1
            )[:-1],
            "beta_1 belongs to the first step; there is no beta before it.": torch.cat(
                [0 * b[:1], b[:-1]]
            ),
        }
        hint = (
            "beta_j is the length of what is left of H q_j, not its root or square; the first "
            "belongs to q_1 and q_2."
        )
        trial.compare(beta, b, rivals, hint, atol=atol)
        rest = T - torch.diag(alpha) - torch.diag(beta, 1) - torch.diag(beta, -1)
        trial.require(rest.abs().max() < atol, "Q H Qᵀ is not tridiagonal: is Q that of (8.1)?")
        trial.require(
            len(calls) <= steps,
            f"There were {len(calls)} products for {steps} steps; one per step is enough.",
        )

    values = trial.randn(30).abs() + 0.5
    problem("a few steps in double precision", values, 6, torch.float64, 1e-5)
    # The deviation of right answers is below 4e-7; if one row is left out, it is above 5e-5.
    values = torch.cat([trial.rand(59) * 0.01, torch.tensor([2000.0]).double()])
    part = "forty steps, one eigenvalue far from the others, in single precision"
    problem(part, values, 40, torch.float32, 1e-5)


@question
def hutchinson(trial: Trial) -> None:
    """Trace and standard error from given probes."""
    n, k = 12, 9
    H = trial.randn(n, n)
    H = H @ H.T
    probes = (trial.integers(2, k, n) * 2 - 1).double()
    values = ((probes @ H) * probes).sum(1)
    estimate = lambda values: (values.mean(), values.std() / k**0.5)
    mean, error = want = estimate(values)
    products = probes * (probes @ H)
    widths = [factor * error for factor in (1.96, 1.959964, 2, float(stdtrit(k - 1, 0.975)))]
    rivals = {
        "The standard error comes second.": (error, mean),
        "That is the spread of single probes; the standard error of their mean is smaller by √k.": (
            mean,
            values.std(),
        ),
        "The variance was divided by k, not by k - 1.": [
            (mean, values.std(correction=0) / k**0.5),
            (mean, values.std(correction=0)),
        ],
        "The spread of the probes is divided by √k: the k - 1 is in the spread.": (
            mean,
            values.std() / (k - 1) ** 0.5,
        ),
        "The spread of the probes is divided by √k, not by k.": (mean, values.std() / k),
        "k counts the probes: it is the number of rows, not of columns or entries.": [
            (mean, values.std() / n**0.5),
            (mean, values.std() / (k * n) ** 0.5),
        ],
        "That is a variance; the standard error is √(variance of zᵀHz / k).": [
            (mean, values.var() / k),
            (mean, values.var()),
        ],
        "That is a width of an interval; the standard error itself is asked for.": [
            (mean, side * width) for side in (1, 2) for width in widths
        ],
        "These are the ends of an interval, not the mean and its standard error.": [
            (mean - width, mean + width) for width in (error, *widths)
        ],
        "That was divided by n, by zᵀz or by a mean over the entries of z: it estimates the mean "
        "eigenvalue, not the trace.": [
            estimate(values / n),
            (mean / n, products.std() / k**0.5),
            (mean / n, products.std() / (k * n) ** 0.5),
        ],
        "Add up the entries of z · Hz first: zᵀHz is one number for each probe.": [
            (products.mean(0), products.std(0) / k**0.5),
            (mean, products.std(0).sum() / k**0.5),
            (mean, products.std(0).norm() / k**0.5),
        ],
        "That is a sum over the probes; the trace is estimated by their mean.": [
            (values.sum(), values.std() * k**0.5),
            (values.sum(), error),
        ],
        "That is the length of Hz, or its square, not zᵀHz.": [
            estimate((probes @ H).norm(dim=1)),
            estimate((probes @ H).norm(dim=1) ** 2),
        ],
        "That is the sum of the entries of Hz: z is missing on the left.": estimate(
            (probes @ H).sum(1)
        ),
    }
    hint = "For each of the given probes z · Hz, a number; of these the mean, and the spread (with "
    hint += "k - 1) divided by √k."

    def matvec(v):
        if v.shape[0] != n:
            raise ValueError(f"matvec takes one vector, of {n} numbers, not {list(v.shape)}")
        return H @ v

    inputs = {"matvec": matvec, "probes": probes}
    trial("nine probes", inputs, want, rivals, hint)


@experiment("the larger rate minus the smaller", largest_eigenvalue=1e-3, test_error=ERROR)
def sharpness_effect(seeds: tuple[int, ...]) -> dict[str, Any]:
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
    change = lambda v: v.sel(lr=0.3) - v.sel(lr=0.05)
    return by_name(change(runs.isel(step=0))) | {"largest eigenvalue": change(largest).values}
