"""Right answers to assignment 5, written differently: each must earn its question's points."""

import math

import numpy as np
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

# -------------------------------------------------------------------- question 1: how much is mixed


def expected_mixing__moments(alphas):
    A = alphas.sum()
    mean, square = alphas / A, alphas * (alphas + 1) / (A * (A + 1))
    return mean - square


def expected_mixing__variance(alphas):
    m = alphas / alphas.sum()
    var = m * (1 - m) / (alphas.sum() + 1)
    return m - m**2 - var


def expected_mixing__looped(alphas):
    total = float(sum(alphas))
    return [float(a) * (total - float(a)) / (total * (total + 1)) for a in alphas]


def expected_mixing__pairs(alphas):
    """1 - w_j is the sum of the others: E w_i w_j = α_i α_j / (A(A+1))."""
    A = alphas.sum()
    products = torch.outer(alphas, alphas) / (A * (A + 1))
    return products.sum(1) - products.diagonal()


def expected_mixing__einsum(alphas):
    A, others = alphas.sum(), 1 - torch.eye(len(alphas), dtype=alphas.dtype)
    return torch.einsum("i,j,ij->i", alphas, alphas, others) / A / (1 + A)


def expected_mixing__numpy(alphas):
    a = alphas.numpy()
    b = a.sum() - a
    return a * b / ((a + b) * (a + b + 1))


def expected_mixing__scipy_dirichlet(alphas):
    law = scipy.stats.dirichlet(np.asarray(alphas))
    return law.mean() * (1 - law.mean()) - law.var()


def expected_mixing__scipy_beta(alphas):
    rest = [sum(alphas) - a for a in alphas]
    laws = [scipy.stats.beta(float(a), float(b)) for a, b in zip(alphas, rest)]
    return tuple(law.mean() - law.moment(2) for law in laws)


def expected_mixing__beta_functions(alphas):
    """∫ w^a (1-w)^b / B(a, b) = B(a+1, b+1) / B(a, b)"""
    a, b = alphas.numpy(), (alphas.sum() - alphas).numpy()
    return torch.from_numpy(np.exp(scipy.special.betaln(a + 1, b + 1) - scipy.special.betaln(a, b)))


def expected_mixing__torch_distributions(alphas):
    law = torch.distributions.Dirichlet(alphas)
    return law.mean - (law.variance + law.mean.square())


def expected_mixing__single_precision(alphas):
    alphas = alphas.float()
    total = alphas.sum()
    return alphas * (total - alphas) / (total * (total + 1))


def expected_mixing__in_place_on_a_copy(alphas):
    A, out = alphas.sum().item(), alphas.clone()
    out *= A - alphas
    out /= A * (A + 1)
    return out


def expected_mixing__requires_grad(alphas):
    alphas.requires_grad_()
    A = alphas.sum()
    return alphas / A * (A - alphas) / (A + 1)


# ------------------------------------------------------------------------- question 2: two losses


def mixed_loss__sum(logits, labels, partners, lam):
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam * own + (1 - lam) * other).sum() / len(labels)


def mixed_loss__module(logits, labels, partners, lam):
    criterion = nn.CrossEntropyLoss(reduction="none")
    a, b = criterion(logits, labels), criterion(logits, labels[partners])
    return torch.lerp(b, a, lam).mean()


def mixed_loss__nll(logits, labels, partners, lam):
    logp = F.log_softmax(logits, dim=1)
    own = F.nll_loss(logp, labels, reduction="none")
    other = F.nll_loss(logp, labels.index_select(0, partners), reduction="none")
    return torch.mean(own * lam + other * (1.0 - lam))


def mixed_loss__gather(logits, labels, partners, lam):
    logp = logits - logits.logsumexp(1, keepdim=True)
    own = logp.gather(1, labels[:, None])[:, 0]
    other = logp.gather(1, labels[partners].unsqueeze(1)).squeeze(1)
    return -(lam * own + (1 - lam) * other).mean()


def mixed_loss__looped(logits, labels, partners, lam):
    total = 0.0
    for i in range(len(labels)):
        z = logits[i : i + 1]
        j = partners[i]
        total += lam[i] * F.cross_entropy(z, labels[i : i + 1])
        total += (1 - lam[i]) * F.cross_entropy(z, labels[j : j + 1])
    return total / len(labels)


def mixed_loss__dot_products(logits, labels, partners, lam):
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam @ own + (1 - lam) @ other) / lam.numel()


def mixed_loss__einsum(logits, labels, partners, lam):
    both = torch.stack([labels, labels[partners]])
    losses = F.cross_entropy(
        logits.expand(2, -1, -1).flatten(0, 1), both.flatten(), reduction="none"
    )
    weights = torch.stack([lam, 1 - lam])
    return torch.einsum("ai,ai->", weights, losses.view(2, -1)) / len(lam)


def mixed_loss__numpy(logits, labels, partners, lam):
    z, y, lam = logits.detach().numpy(), labels.numpy(), lam.numpy()
    logp = z - scipy.special.logsumexp(z, axis=1, keepdims=True)
    each = np.arange(len(y))
    losses = -lam * logp[each, y] - (1 - lam) * logp[each, y[partners.numpy()]]
    return losses.mean()


def mixed_loss__item(logits, labels, partners, lam):
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return float((lam * own + (1 - lam) * other).mean())


def mixed_loss__pure_python(logits, labels, partners, lam):
    rows, y, total = logits.tolist(), labels.tolist(), 0
    for row, own, j, weight in zip(rows, y, partners.tolist(), lam.tolist()):
        norm = math.log(math.fsum(map(math.exp, row)))
        total += weight * (norm - row[own]) + (1 - weight) * (norm - row[y[j]])
    return total / len(y)


def mixed_loss__single_precision(logits, labels, partners, lam):
    logits, lam = logits.float(), lam.float()
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return torch.mean(lam * own + (1 - lam) * other)


def mixed_loss__one_hot(logits, labels, partners, lam):
    """Hard labels, as one-hot rows."""
    one = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    own = F.cross_entropy(logits, one, reduction="none")
    other = F.cross_entropy(logits, one[partners], reduction="none")
    return (other + lam * (own - other)).mean()


def mixed_loss__weighted_one_hots(logits, labels, partners, lam):
    """Each hard label has its weight, and no two are added."""
    one, logp = F.one_hot(labels, logits.shape[1]), logits.log_softmax(1)
    own, other = lam[:, None] * one, (1 - lam)[:, None] * one[partners]
    return -((own * logp).sum() + (other * logp).sum()) / len(labels)


def mixed_loss__pairs(logits, labels, partners, lam):
    weights, both = torch.stack([lam, 1 - lam], 1), torch.stack([labels, labels[partners]], 1)
    return -(weights * logits.log_softmax(1).gather(1, both)).sum(1).mean()


def mixed_loss__vmap(logits, labels, partners, lam):
    losses = torch.func.vmap(F.cross_entropy)
    return (lam * losses(logits, labels) + (1 - lam) * losses(logits, labels[partners])).mean()


def mixed_loss__one_example_by_vmap(logits, labels, partners, lam):
    """With the gradient inside, which is not needed."""

    def one(z, a, b, weight):
        loss = lambda z: weight * F.cross_entropy(z, a) + (1 - weight) * F.cross_entropy(z, b)
        return torch.func.grad_and_value(loss)(z)[1]

    return torch.func.vmap(one)(logits, labels, labels[partners], lam).mean()


def mixed_loss__in_place_on_a_copy(logits, labels, partners, lam):
    out = F.cross_entropy(logits, labels, reduction="none") * lam
    out += (1 - lam.detach()) * F.cross_entropy(logits, labels[partners], reduction="none")
    return out.mean()


# ------------------------------------------------------------------- question 3: mixing k examples


def weighted_sum(x, labels, num_classes, weights, who):
    """weights, who: [n, k]"""
    one = F.one_hot(labels, num_classes).to(x.dtype)
    weights = weights.to(x.dtype)
    return tuple(torch.einsum("nk,nkd->nd", weights, v[who]) for v in (x, one))


def permutations(n, k, generator):
    own = [torch.arange(n)]
    return torch.stack(own + [torch.randperm(n, generator=generator) for _ in range(k - 1)], 1)


def numpy_generator(generator):
    return np.random.default_rng(torch.randint(2**31, (1,), generator=generator).item())


def dirichlet_mixup__einsum(x, labels, num_classes, alpha, k, generator):
    gammas = torch._standard_gamma(torch.full((len(x), k), alpha), generator=generator)
    who = permutations(len(x), k, generator)
    return weighted_sum(x, labels, num_classes, gammas / gammas.sum(1, keepdim=True), who)


def dirichlet_mixup__numpy_generator(x, labels, num_classes, alpha, k, generator):
    rng = numpy_generator(generator)
    weights = torch.from_numpy(rng.dirichlet([alpha] * k, size=len(x)))
    who = [np.arange(len(x))] + [rng.permutation(len(x)) for _ in range(k - 1)]
    return weighted_sum(x, labels, num_classes, weights, torch.from_numpy(np.stack(who, 1)))


def dirichlet_mixup__matrix(x, labels, num_classes, alpha, k, generator):
    n = len(x)
    shape = torch.full((n, k), alpha, dtype=x.dtype)
    weights = torch._standard_gamma(shape, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    mixing = torch.diag(weights[:, 0])
    for j in range(1, k):
        mixing += (
            weights[:, j, None]
            * torch.eye(n, dtype=x.dtype)[torch.randperm(n, generator=generator)]
        )
    return mixing @ x, mixing @ F.one_hot(labels, num_classes).to(x.dtype)


def dirichlet_mixup__looped(x, labels, num_classes, alpha, k, generator):
    rng = numpy_generator(generator)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(k - 1)]
    inputs, targets = torch.zeros_like(x), torch.zeros(len(x), num_classes, dtype=x.dtype)
    for i in range(len(x)):
        parts = [i] + [int(order[i]) for order in orders]
        for weight, j in zip(rng.dirichlet(np.full(k, alpha)), parts):
            inputs[i] += weight * x[j]
            targets[i, labels[j]] += weight
    return inputs, targets


def dirichlet_mixup__all_numpy(x, labels, num_classes, alpha, k, generator):
    rng = np.random.default_rng(int(torch.randint(0, 2**63 - 1, [], generator=generator)))
    v, one = x.numpy(), np.eye(num_classes)[labels.numpy()]
    weights = rng.dirichlet(alpha * np.ones(k), len(v))
    mixed, soft = weights[:, :1] * v, weights[:, :1] * one
    for j in range(1, k):
        order = rng.permutation(len(v))
        mixed = mixed + weights[:, j : j + 1] * v[order]
        soft = soft + weights[:, j : j + 1] * one[order]
    return mixed, soft


def dirichlet_mixup__inverse_of_the_distribution(x, labels, num_classes, alpha, k, generator):
    u = torch.rand(len(x), k, generator=generator, dtype=torch.float64).numpy()
    gammas = torch.from_numpy(scipy.special.gammaincinv(alpha, u))
    weights = gammas / gammas.sum(1, keepdim=True)
    return weighted_sum(x, labels, num_classes, weights, permutations(len(x), k, generator))


def dirichlet_mixup__broken_sticks(x, labels, num_classes, alpha, k, generator):
    rng, left, weights = numpy_generator(generator), np.ones(len(x)), []
    for j in range(1, k):
        piece = left * rng.beta(alpha, alpha * (k - j), size=len(x))
        weights.append(piece)
        left = left - piece
    weights = torch.from_numpy(np.stack([*weights, left], axis=1))
    return weighted_sum(x, labels, num_classes, weights, permutations(len(x), k, generator))


def dirichlet_mixup__scipy(x, labels, num_classes, alpha, k, generator):
    seed = torch.randint(100_000_000, (1,), generator=generator).item()
    weights = scipy.stats.dirichlet([alpha] * k).rvs(len(x), random_state=seed)
    who = permutations(len(x), k, generator)
    return list(weighted_sum(x, labels, num_classes, torch.tensor(weights), who))


def dirichlet_mixup__torch_distributions(x, labels, num_classes, alpha, k, generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.randint(2**40, (), generator=generator).item())
        weights = torch.distributions.Dirichlet(torch.full((k,), float(alpha))).sample([len(x)])
    return weighted_sum(x, labels, num_classes, weights, permutations(len(x), k, generator))


def dirichlet_mixup__sorted_noise(x, labels, num_classes, alpha, k, generator):
    """A random permutation is the order of random numbers."""
    n = len(x)
    orders = torch.rand(n, k - 1, generator=generator).argsort(0)
    who = torch.cat([torch.arange(n)[:, None], orders], 1)
    gammas = torch._standard_gamma(alpha * torch.ones(k, n).double(), generator=generator).T
    return weighted_sum(x, labels, num_classes, gammas / gammas.sum(1)[:, None], who)


def dirichlet_mixup__single_precision(x, labels, num_classes, alpha, k, generator):
    x, one = x.float(), F.one_hot(labels, num_classes).float()
    gammas = torch._standard_gamma(torch.full((k, len(x), 1), alpha), generator=generator)
    weights = gammas / gammas.sum(dim=0, keepdim=True)
    mixed, soft = weights[0] * x, weights[0] * one
    for w in weights[1:]:
        order = torch.randperm(len(x), generator=generator)
        mixed += w * x[order]
        soft += w * one[order]
    return mixed, soft


def dirichlet_mixup__softmax_of_logarithms(x, labels, num_classes, alpha, k, generator):
    shape = torch.full((len(x), k), alpha + 1.0, dtype=torch.float64)
    gammas = torch._standard_gamma(shape, generator=generator)
    u = torch.rand(len(x), k, dtype=torch.float64, generator=generator)
    logs = gammas.log() + u.log() / alpha  # Gamma(α) is Gamma(α + 1) times U^(1/α)
    who = permutations(len(x), k, generator)
    return weighted_sum(x, labels, num_classes, logs.softmax(1), who)


# --------------------------------------------------- question 4: what is left without the noise


def toward_the_mean(x, targets, theta):
    return tuple(v.mean(0) + theta * (v - v.mean(0)) for v in (x, targets))


def shrunk__gamma_functions(x, targets, alpha):
    b = math.gamma(alpha) ** 2 / math.gamma(2 * alpha)
    return toward_the_mean(x, targets, 0.5 + 4**-alpha / (alpha * b))


def shrunk__mixture_of_means(x, targets, alpha):
    c = 0.5 + 0.25**alpha / alpha / scipy.special.beta(alpha, alpha)
    return c * x + (1 - c) * x.mean(0), c * targets + (1 - c) * targets.mean(0)


def shrunk__betainc(x, targets, alpha):
    """2 E[λ; λ > ½] = P(λ' > ½) with λ' of Beta(α + 1, α)"""
    return toward_the_mean(x, targets, 1 - scipy.special.betainc(alpha + 1, alpha, 0.5))


def shrunk__survival(x, targets, alpha):
    theta = scipy.stats.beta(alpha + 1, alpha).sf(0.5)
    return toward_the_mean(x, targets, torch.tensor(theta))


def shrunk__quadrature(x, targets, alpha):
    """The heavier weight's mean; λ = 1 - u^(1/α) takes the pole at 1 away."""
    density = lambda u: (1 - u ** (1 / alpha)) ** alpha / alpha
    integral, _ = scipy.integrate.quad(density, 0, 0.5**alpha)
    return toward_the_mean(x, targets, 2 * integral / scipy.special.beta(alpha, alpha))


def shrunk__quadrature_of_the_density(x, targets, alpha):
    law = scipy.stats.beta(alpha, alpha)
    theta, _ = scipy.integrate.quad(lambda v: max(v, 1 - v) * law.pdf(v), 0, 1, points=[0.5])
    return toward_the_mean(x, targets, theta)


def shrunk__lgamma(x, targets, alpha):
    a = torch.tensor(alpha, dtype=torch.float64)
    log_b = 2 * torch.lgamma(a) - torch.lgamma(2 * a)
    theta = 0.5 + torch.exp(-a * math.log(4) - a.log() - log_b)
    return [torch.lerp(v.mean(0, keepdim=True), v, theta) for v in (x, targets)]


def shrunk__numpy(x, targets, alpha):
    theta = 0.5 + np.power(4.0, -alpha) / (alpha * scipy.special.beta(alpha, alpha))
    x, y = np.asarray(x), np.asarray(targets)
    return x.mean(0) + theta * (x - x.mean(0)), y.mean(axis=0) + theta * (y - y.mean(axis=0))


def shrunk__single_precision(x, targets, alpha):
    theta = 0.5 + 4**-alpha / (alpha * scipy.special.beta(alpha, alpha))
    return toward_the_mean(x.float(), targets.float(), theta)


def shrunk__looped(x, targets, alpha):
    theta = 0.5 + math.exp(-alpha * math.log(4) - scipy.special.betaln(alpha, alpha)) / alpha
    results = []
    for v in (x, targets):
        center = sum(v) / len(v)
        results.append(torch.stack([center + theta * (row - center) for row in v]))
    return tuple(results)


def shrunk__over_all_pairs(x, targets, alpha):
    """The mean over the partners j of θ x_i + (1 - θ) x_j."""
    theta = 0.5 + 4**-alpha / (alpha * scipy.special.beta(alpha, alpha))
    pairs = lambda v: theta * v[:, None] + (1 - theta) * v[None]
    return pairs(x).mean(1), pairs(targets).mean(1)


def shrunk__a_matrix(x, targets, alpha):
    theta = 0.5 + 4**-alpha / (alpha * scipy.special.beta(alpha, alpha))
    n = len(x)
    S = theta * torch.eye(n).double() + (1 - theta) / n
    return S @ x, torch.einsum("ij,jk->ik", S, targets)


def shrunk__in_place_on_a_copy(x, targets, alpha):
    theta = 0.5 + 4**-alpha / (alpha * scipy.special.beta(alpha, alpha))
    x, targets = x.clone(), targets.clone()
    for v in (x, targets):
        center = v.mean(0)
        v -= center
        v *= theta
        v += center
    return x, targets
