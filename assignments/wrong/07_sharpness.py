"""Wrong answers to assignment 7: question__mistake, and what the check must say of it."""


def probe_variance__gaussian(H):
    """That is for Gaussian probes"""
    return 2 * (H**2).sum()


def probe_variance__squared_norm(H):
    """That is ‖H‖²"""
    return (H**2).sum()


def probe_variance__factor_two(H):
    """a factor 2 is missing"""
    return (H**2).sum() - (H.diagonal() ** 2).sum()


def probe_variance__mean(H):
    """there is no mean in it"""
    return 2 * ((H - torch.diag(H.diagonal())) ** 2).mean()


def probe_variance__trace_squared(H):
    """(tr H)² is not the sum"""
    return 2 * torch.trace(H @ H) - 2 * H.trace() ** 2


def m_sharpness__one_perturbation(losses, w, n, m, rho):
    """one and the same"""
    g = grad(lambda w: losses(w, torch.arange(n)).mean())(w)
    up = w + rho * g / g.norm()
    shards = torch.arange(n).split(m)
    return sum((losses(up, rows) - losses(w, rows)).sum() for rows in shards) / n


def m_sharpness__worst_shard(losses, w, n, m, rho):
    """The worst shard is not asked for"""
    rises = []
    for rows in torch.arange(n).split(m):
        mean = lambda w: losses(w, rows).mean()
        g = grad(mean)(w)
        rises.append(mean(w + rho * g / g.norm()) - mean(w))
    return max(rises)


def m_sharpness__shards_equal(losses, w, n, m, rho):
    """a shard of fewer examples counts less"""
    rises = []
    for rows in torch.arange(n).split(m):
        mean = lambda w: losses(w, rows).mean()
        g = grad(mean)(w)
        rises.append(mean(w + rho * g / g.norm()) - mean(w))
    return torch.stack(rises).mean()


def m_sharpness__number_of_shards(losses, w, n, m, rho):
    """not the number of shards"""
    total = 0.0
    for rows in torch.arange(n).chunk(m):
        mean = lambda w: losses(w, rows).mean()
        g = grad(mean)(w)
        total = total + len(rows) * (mean(w + rho * g / g.norm()) - mean(w))
    return total / n


def m_sharpness__loss_of_all(losses, w, n, m, rho):
    """the rise of its own loss"""
    total, everything = 0.0, lambda w: losses(w, torch.arange(n)).mean()
    for rows in torch.arange(n).split(m):
        g = grad(lambda w: losses(w, rows).mean())(w)
        total = total + len(rows) * (everything(w + rho * g / g.norm()) - everything(w))
    return total / n


def m_sharpness__not_normalized(losses, w, n, m, rho):
    """has to be divided by its length"""
    total = 0.0
    for rows in torch.arange(n).split(m):
        mean = lambda w: losses(w, rows).mean()
        total = total + len(rows) * (mean(w + rho * grad(mean)(w)) - mean(w))
    return total / n


def m_sharpness__signs(losses, w, n, m, rho):
    """not along its signs"""
    total = 0.0
    for rows in torch.arange(n).split(m):
        mean = lambda w: losses(w, rows).mean()
        total = total + len(rows) * (mean(w + rho * grad(mean)(w).sign()) - mean(w))
    return total / n


def lanczos__last_row_left_out(matvec, v, steps):
    """make each new vector orthogonal to all rows of Q"""
    q, before, b = v / v.norm(), torch.zeros_like(v), 0.0
    alpha, beta, basis = [], [], []
    for step in range(steps):
        r = matvec(q) - b * before
        alpha.append(q @ r)
        r = r - alpha[-1] * q
        if step:
            Q = torch.stack(basis)
            for _ in range(2):
                r = r - Q.T @ (Q @ r)
        basis.append(q)
        b = r.norm()
        if step < steps - 1:
            beta.append(b)
        before, q = q, r / b
    return torch.stack(alpha), torch.stack(beta), torch.stack(basis)


def lanczos__orthonormal_in_the_end(matvec, v, steps):
    """Was Q made orthonormal in the end?"""
    q, before, b = v / v.norm(), torch.zeros_like(v), 0.0
    alpha, beta, basis = [], [], []
    for step in range(steps):
        basis.append(q)
        r = matvec(q) - b * before
        alpha.append(q @ r)
        r = r - alpha[-1] * q
        b = r.norm()
        if step < steps - 1:
            beta.append(b)
        before, q = q, r / b
    Q, R = torch.linalg.qr(torch.stack(basis).T)
    return torch.stack(alpha), torch.stack(beta), (Q * R.diagonal().sign()).T


def lanczos__no_reorthogonalization(matvec, v, steps):
    """The rows of Q are not orthonormal"""
    q, before, b = v / v.norm(), torch.zeros_like(v), 0.0
    alpha, beta, basis = [], [], []
    for step in range(steps):
        basis.append(q)
        r = matvec(q) - b * before
        alpha.append(q @ r)
        r = r - alpha[-1] * q
        b = r.norm()
        if step < steps - 1:
            beta.append(b)
        before, q = q, r / b
    return torch.stack(alpha), torch.stack(beta), torch.stack(basis)


def lanczos__term_missing(matvec, v, steps):
    """The next row is what is left of H q_j"""
    q, alpha, beta, basis = v / v.norm(), [], [], []
    for step in range(steps):
        basis.append(q)
        r = matvec(q)
        alpha.append(q @ r)
        r = r - alpha[-1] * q
        if step < steps - 1:
            beta.append(r.norm())
            q = r / beta[-1]
    return torch.stack(alpha), torch.stack(beta), torch.stack(basis)


def lanczos__length_before(matvec, v, steps):
    """That is the length of H q_j"""
    q, alpha, beta, basis = v / v.norm(), [], [], []
    for step in range(steps):
        basis.append(q)
        Q = torch.stack(basis)
        r = matvec(q)
        alpha.append(q @ r)
        if step < steps - 1:
            beta.append(r.norm())
        for _ in range(2):
            r = r - Q.T @ (Q @ r)
        q = r / r.norm()
    return torch.stack(alpha), torch.stack(beta), Q


def lanczos__squared_beta(matvec, v, steps):
    """not its root or square"""
    q, alpha, beta, basis = v / v.norm(), [], [], []
    for step in range(steps):
        basis.append(q)
        Q = torch.stack(basis)
        r = matvec(q)
        alpha.append(q @ r)
        for _ in range(2):
            r = r - Q.T @ (Q @ r)
        if step < steps - 1:
            beta.append(r @ r)
            q = r / r.norm()
    return torch.stack(alpha), torch.stack(beta), Q


def lanczos__start_not_normalized(matvec, v, steps):
    """divided by its length"""
    q, alpha, beta, basis = v, [], [], []
    for step in range(steps):
        basis.append(q)
        Q = torch.stack(basis)
        r = matvec(q)
        alpha.append(q @ r)
        for _ in range(2):
            r = r - Q.T @ (Q @ r)
        if step < steps - 1:
            beta.append(r.norm())
            q = r / beta[-1]
    return torch.stack(alpha), torch.stack(beta), Q


def hutchinson__all_at_once(matvec, probes):
    """matvec takes one vector"""
    values = (probes * matvec(probes)).sum(1)
    return values.mean(), values.std() / len(values) ** 0.5


def hutchinson__spread(matvec, probes):
    """smaller by √k"""
    values = torch.stack([z @ matvec(z) for z in probes])
    return values.mean(), values.std()


def hutchinson__normalized(matvec, probes):
    """estimates the mean eigenvalue"""
    values = torch.stack([z @ matvec(z) / (z @ z) for z in probes])
    return values.mean(), values.std() / len(values) ** 0.5


def hutchinson__half_width(matvec, probes):
    """That is a width of an interval"""
    values = torch.stack([z @ matvec(z) for z in probes])
    return values.mean(), 1.96 * values.std() / len(values) ** 0.5


def hutchinson__root_of_n(matvec, probes):
    """not of columns or entries"""
    values = torch.stack([z @ matvec(z) for z in probes])
    return values.mean(), values.std() / probes.shape[1] ** 0.5


def hutchinson__entries_apart(matvec, probes):
    """zᵀHz is one number for each probe"""
    values = torch.stack([z * matvec(z) for z in probes])
    return values.mean(0), values.std(0) / len(values) ** 0.5


def sharpness_effect__no_return(seeds):
    """A dict should have come back"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    assert len(data) == 5


def sharpness_effect__one_model(seeds):
    """a function that makes the model"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    model, grid = MLP(40, 16, 10, activation=torch.nn.Tanh), {"lr": [0.05, 0.3]}
    recipe, last = Recipe(optimizer=SGD()), {"networks": "last", "dtype": torch.float64}
    runs = fit(model, data, recipe, steps=600, seeds=seeds, grid=grid, **last)
    largest = runs.networks.measure(eigenvalues, data, "train").value.squeeze("eigenvalue")
    return {
        "largest eigenvalue": (largest.diff("lr").squeeze("lr"), "lower"),
        "test error": (runs.test_error.isel(step=-1).diff("lr").squeeze("lr"), "undecided"),
    }
