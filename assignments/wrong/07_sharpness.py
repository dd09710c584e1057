"""Wrong answers to assignment 7: question__mistake, and what the check must say of it."""


def probe_variance__gaussian(H):
    """That is for Gaussian probes"""
    return 2 * (H**2).sum()


def probe_variance__factor_two(H):
    """a factor 2 is missing"""
    return (H**2).sum() - (H.diagonal() ** 2).sum()


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


def lanczos__squared_beta(matvec, v, steps):
    """its square root or its square is not"""
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


def hutchinson__spread(matvec, probes):
    """smaller by √k"""
    values = torch.stack([z @ matvec(z) for z in probes])
    return values.mean(), values.std()


def hutchinson__normalized(matvec, probes):
    """estimates the mean eigenvalue"""
    values = torch.stack([z @ matvec(z) / (z @ z) for z in probes])
    return values.mean(), values.std() / len(values) ** 0.5


def sharpness_effect__no_return(seeds):
    """A dict should have come back"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    assert len(data) == 5
