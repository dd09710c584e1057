"""Right answers to assignment 7, written differently: each must earn its question's points."""

import itertools
import math
import statistics

import numpy as np
import scipy.linalg
import scipy.stats
import torch
from torch.func import grad, grad_and_value, jacrev, vmap

# ----------------------------------------------------------------- question 1: how good is a probe


def probe_variance__frobenius(H):
    return 2 * (torch.linalg.matrix_norm(H) ** 2 - H.diagonal().square().sum())


def probe_variance__upper_triangle(H):
    return 4 * H.triu(1).square().sum()


def probe_variance__looped(H):
    n, total = len(H), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += 2 * float(H[i, j]) ** 2
    return total


def probe_variance__trace_of_square(H):
    return 2 * torch.trace(H @ H) - 2 * H.diag() @ H.diag()


def probe_variance__einsum(H):
    return 2 * torch.einsum("ij,ji->", H, H) - 2 * torch.einsum("ii,ii->", H, H)


def probe_variance__numpy(H):
    H = H.numpy()
    return 2 * ((H - np.diag(np.diag(H))) ** 2).sum()


def probe_variance__mask(H):
    return 2 * H[~torch.eye(len(H), dtype=torch.bool)].pow(2).sum().item()


def probe_variance__in_place_on_a_copy(H):
    off = H.clone()
    off.fill_diagonal_(0)
    return 2 * torch.sum(off * off)


def probe_variance__eigenvalues(H):
    return 2 * (torch.linalg.eigvalsh(H).square().sum() - (H.diagonal() ** 2).sum())


def probe_variance__all_signs(H):
    z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(H)))).to(H.dtype)
    values = torch.einsum("ki,ij,kj->k", z, H, z)
    return values.square().mean() - H.trace() ** 2


def probe_variance__all_signs_in_python(H):
    rows, values = H.tolist(), []
    for z in itertools.product((-1, 1), repeat=len(rows)):
        values.append(sum(a * h * b for a, row in zip(z, rows) for h, b in zip(row, z)))
    return statistics.pvariance(values)


def probe_variance__single_precision(H):
    H = H.float()
    return 2 * ((H**2).sum() - (H.diagonal() ** 2).sum())


def probe_variance__all_signs_in_single_precision(H):
    z = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(H))))
    return ((z @ H.float()) * z).sum(1).var(unbiased=False)


def probe_variance__requires_grad(H):
    H.requires_grad_()
    off = H.tril(-1)
    return (2 * off).norm() ** 2


# ---------------------------------------------------------------------- question 2: m-sharpness


def m_sharpness__autograd(losses, w, n, m, rho):
    w, total = w.clone().requires_grad_(), 0
    for start in range(0, n, m):
        rows = torch.arange(start, min(start + m, n))
        here = losses(w, rows)
        (g,) = torch.autograd.grad(here.mean(), w)
        total += (losses(w + rho * g / g.norm(), rows) - here).sum()
    return total / n


def m_sharpness__backward(losses, w, n, m, rho):
    total = 0.0
    for rows in torch.split(torch.arange(n), m):
        v = w.detach().clone().requires_grad_(True)
        before = losses(v, rows).sum()
        before.backward()
        with torch.no_grad():
            v += rho * v.grad / v.grad.norm()
            total += (losses(v, rows).sum() - before).item()
    return total / n


def m_sharpness__requires_grad(losses, w, n, m, rho):
    w.requires_grad_()
    rises = []
    for rows in torch.arange(n).split(m):
        loss = losses(w, rows).mean()
        g = torch.autograd.grad(loss, w, create_graph=True)[0]
        rises.append(len(rows) / n * (losses(w + rho * g / g.norm(), rows).mean() - loss))
    return torch.stack(rises).sum()


def m_sharpness__grad_and_value(losses, w, n, m, rho):
    mean = lambda w, rows: losses(w, rows).mean()
    rises = []
    for rows in torch.arange(n).split(m):
        g, value = grad_and_value(mean)(w, rows)
        e = rho * torch.nn.functional.normalize(g, dim=0)
        rises += [mean(w + e, rows) - value] * len(rows)
    return sum(rises) / len(rises)


def m_sharpness__one_jacobian(losses, w, n, m, rho):
    J = jacrev(losses)(w, torch.arange(n))
    rises = torch.zeros(n, dtype=w.dtype)
    for rows in torch.arange(n).split(m):
        g = J[rows].mean(0)
        rises[rows] = losses(w + rho * g / g.norm(), rows)
    return (rises - losses(w, torch.arange(n))).mean()


def m_sharpness__cat(losses, w, n, m, rho):
    def up(rows):
        g = grad(lambda v: losses(v, rows).sum())(w)
        return losses(w + rho * g / torch.linalg.vector_norm(g), rows)

    return (
        torch.cat([up(rows) for rows in torch.arange(n).split(m)]).mean()
        - losses(w, torch.arange(n)).mean()
    )


def m_sharpness__numpy_average(losses, w, n, m, rho):
    rises, sizes = [], []
    for rows in np.array_split(np.arange(n), range(m, n, m)):
        rows = torch.from_numpy(rows)
        v = torch.nn.Parameter(w.clone())
        loss = losses(v, rows).mean()
        loss.backward()
        e = rho * v.grad / v.grad.norm()
        rises.append((losses(w + e, rows).mean() - loss).item())
        sizes.append(len(rows))
    return np.average(rises, weights=sizes)


def m_sharpness__example_by_example(losses, w, n, m, rho):
    one = lambda v, i: losses(v, torch.tensor([i]))[0]
    total = 0
    for first in range(0, n, m):
        shard = range(first, min(n, first + m))
        g = sum(grad(one)(w, i) for i in shard) / len(shard)
        up = w + rho * g / g.dot(g).sqrt()
        total = total + sum(one(up, i) - one(w, i) for i in shard)
    return float(total) / n


def m_sharpness__sorted_into_a_dict(losses, w, n, m, rho):
    shards = {}
    for i in range(n):
        shards.setdefault(i // m, []).append(i)
    rise = 0.0
    for members in shards.values():
        rows = torch.tensor(members)
        jacobian = torch.autograd.functional.jacobian(lambda v: losses(v, rows), w)
        g = jacobian.mean(0)
        rise += (losses(w + g * (rho / g.norm()), rows) - losses(w, rows)).sum()
    return np.float32(rise / n)


def m_sharpness__per_example_gradients_by_vmap(losses, w, n, m, rho):
    single = lambda v, i: losses(v, i[None])[0]
    G, rises = vmap(grad(single), in_dims=(None, 0))(w, torch.arange(n)), 0.0
    for k in range(math.ceil(n / m)):
        rows = torch.arange(n)[k * m : (k + 1) * m]
        g = G[k * m : (k + 1) * m].sum(0)
        rises += losses(w + rho * g / g.norm(), rows).sum() - losses(w, rows).sum()
    return rises / n


# -------------------------------------------------------------------------- question 3: Lanczos


def lanczos__preallocated(matvec, v, steps):
    n = len(v)
    alpha, beta = torch.zeros(steps, dtype=v.dtype), torch.zeros(steps - 1, dtype=v.dtype)
    Q = torch.zeros(steps, n, dtype=v.dtype)
    Q[0] = v / v.norm()
    for j in range(steps):
        r = matvec(Q[j])
        alpha[j] = torch.dot(Q[j], r)
        r = r - alpha[j] * Q[j] - (beta[j - 1] * Q[j - 1] if j else 0)
        for _ in range(2):
            r = r - Q[: j + 1].T @ (Q[: j + 1] @ r)
        if j + 1 < steps:
            beta[j] = r.norm()
            Q[j + 1] = r / beta[j]
    return alpha, beta, Q


def lanczos__gram_schmidt_one_by_one(matvec, v, steps):
    basis, alpha, beta = [v / v.norm()], [], []
    while True:
        r = matvec(basis[-1]).clone()
        alpha.append(basis[-1].dot(r))
        for q in basis + basis:
            r -= q.dot(r) * q
        if len(alpha) == steps:
            return torch.stack(alpha), torch.stack(beta), torch.stack(basis)
        beta.append(torch.linalg.vector_norm(r))
        basis.append(r / beta[-1])


def lanczos__double_inside(matvec, v, steps):
    q = v.double() / v.double().norm()
    Q, alpha, beta = q[None], [], []
    for j in range(steps):
        r = matvec(Q[-1].to(v.dtype)).double()
        alpha.append(Q[-1] @ r)
        r = r - Q.T @ (Q @ r)
        r = r - Q.T @ (Q @ r)
        if j < steps - 1:
            beta.append(r.norm())
            Q = torch.cat([Q, (r / r.norm())[None]])
    return torch.stack(alpha), torch.stack(beta), Q


def lanczos__numpy(matvec, v, steps):
    dtype = v.dtype
    q = v.numpy() / np.linalg.norm(v.numpy())
    basis, alpha, beta = [], [], []
    for j in range(steps):
        basis.append(q)
        Q = np.array(basis)
        r = matvec(torch.as_tensor(q, dtype=dtype)).numpy()
        alpha.append(q @ r)
        r = r - Q.T @ (Q @ r)
        r = r - Q.T @ (Q @ r)
        if j < steps - 1:
            beta.append(np.linalg.norm(r))
            q = r / beta[-1]
    return np.array(alpha), np.array(beta), Q


def lanczos__tensors_of_lists(matvec, v, steps):
    q, alpha, beta, basis = v / v.norm(), [], [], []
    for j in range(steps):
        basis.append(q)
        r = matvec(q)
        alpha.append((q * r).sum().item())
        for _ in range(2):
            for p in basis:
                r = r - (p * r).sum() * p
        if j < steps - 1:
            beta.append(r.norm().item())
            q = r / beta[-1]
    return torch.tensor(alpha), torch.tensor(beta), torch.stack(basis)


def lanczos__columns(matvec, v, steps):
    V = (v / v.norm()).unsqueeze(1)
    alpha, beta = v.new_empty(steps), v.new_empty(steps - 1)
    for j in range(steps):
        w = matvec(V[:, j])
        h = V.T @ w
        w = w - V @ h
        alpha[j] = h[j]
        w = w - V @ (V.T @ w)
        if j == steps - 1:
            break
        beta[j] = w.norm()
        V = torch.hstack([V, w[:, None] / beta[j]])
    return alpha, beta, V.T


def lanczos__householder_of_the_columns(matvec, v, steps):
    """Arnoldi, with a projection by QR; the signs of a new vector are free."""
    Q = (v / v.norm())[:, None]
    alpha, beta = [], []
    for j in range(steps):
        q = Q[:, -1]
        r = matvec(q)
        alpha.append(q @ r)
        if j < steps - 1:
            q = torch.linalg.qr(torch.cat([Q, r[:, None]], 1)).Q[:, -1]
            beta.append(q @ r)
            Q = torch.cat([Q, q[:, None]], 1)
    return [torch.stack(alpha), torch.stack(beta), Q.T.contiguous()]


def lanczos__read_from_the_projection(matvec, v, steps):
    q, basis, images = v / v.norm(), [], []
    for _ in range(steps):
        basis.append(q)
        images.append(matvec(q))
        Q, r = torch.stack(basis), images[-1]
        for _ in range(3):
            r = r - torch.einsum("kn,km,m->n", Q, Q, r)
        q = r / r.norm()
    T = Q @ torch.stack(images).T
    return T.diagonal(), T.diagonal(1), Q


def lanczos__scipy_orthogonal_complement(matvec, v, steps):
    dtype, basis, alpha, beta = v.dtype, [], [], []
    q = v.double().numpy() / scipy.linalg.norm(v.double().numpy())
    for _ in range(steps):
        basis.append(q)
        r = matvec(torch.tensor(q, dtype=dtype)).double().numpy()
        alpha.append(float(r @ q))
        for _ in range(2):
            r = r - sum((r @ p) * p for p in basis)
        beta.append(float(scipy.linalg.norm(r)))
        q = r / beta[-1]
    return torch.tensor(alpha), torch.tensor(beta[:-1]), torch.tensor(np.stack(basis))


def lanczos__requires_grad(matvec, v, steps):
    v.requires_grad_()
    q, alpha, beta, basis = v / v.norm(), [], [], []
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


# --------------------------------------------------------- question 4: the trace, with an error bar


def hutchinson__products_of_all(matvec, probes):
    values = (probes * matvec(probes.T).T).sum(1)
    return values.mean(), values.std() / math.sqrt(len(values))


def hutchinson__vmap(matvec, probes):
    values = vmap(lambda z: z @ matvec(z))(probes)
    return values.mean(), (values.var() / len(values)).sqrt()


def hutchinson__floats(matvec, probes):
    values = [float(z @ matvec(z)) for z in probes]
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def hutchinson__numpy(matvec, probes):
    values = np.array([z.numpy() @ matvec(z).numpy() for z in probes])
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))


def hutchinson__scipy_sem(matvec, probes):
    values = [torch.dot(z, matvec(z)).item() for z in probes]
    return [np.mean(values), scipy.stats.sem(values)]


def hutchinson__one_array(matvec, probes):
    v = np.asarray([(z * matvec(z)).sum().item() for z in probes])
    return np.array([v.mean(), np.sqrt(((v - v.mean()) ** 2).sum() / (v.size - 1) / v.size)])


def hutchinson__one_tensor(matvec, probes):
    values = torch.einsum("ki,ki->k", probes, torch.stack([matvec(z) for z in probes]))
    k = values.numel()
    return torch.stack([values.sum() / k, values.std(correction=1) * k**-0.5])


def hutchinson__running(matvec, probes):
    """Welford's sums."""
    mean, squares = 0.0, 0.0
    for i, z in enumerate(probes, 1):
        value = (z @ matvec(z)).item()
        step = value - mean
        mean += step / i
        squares += step * (value - mean)
    return mean, (squares / (i - 1) / i) ** 0.5


def hutchinson__std_mean(matvec, probes):
    deviation, mean = torch.std_mean(torch.stack([z.dot(matvec(z)) for z in probes]))
    return mean, deviation / torch.sqrt(torch.tensor(len(probes)))


def hutchinson__single_precision(matvec, probes):
    values = torch.tensor([z @ matvec(z) for z in probes], dtype=torch.float32)
    return values.mean(), values.std() / len(values) ** 0.5


def hutchinson__jackknife(matvec, probes):
    values = torch.stack([z @ matvec(z) for z in probes])
    k = len(values)
    without = (values.sum() - values) / (k - 1)
    return values.mean(), ((k - 1) / k * (without - without.mean()).square().sum()).sqrt()


def hutchinson__tensor_of_lists(matvec, probes):
    values = torch.tensor([z @ matvec(z) for z in probes.unbind()])
    return values.double().mean().reshape(()), values.double().std().div(len(values) ** 0.5)
