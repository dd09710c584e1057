"""Right answers to assignment 1, written differently: each must earn its question's points."""

import math
import statistics
from decimal import Decimal, localcontext

import mpmath
import numpy as np
import torch
from scipy import special, stats

# -------------------------------------------------------------- question 1: knowing everything, by luck


def lucky__numpy(n, M):
    return -np.expm1(M * np.log1p(-(0.5**n)))


def lucky__numpy_arrays(n, M):
    chance = np.array(2.0) ** -n
    return -np.expm1(np.multiply(M, np.log1p(-chance)))


def lucky__an_array_of_one(n, M):
    return 0 - np.expm1(np.array([M]) * np.log1p(np.array([-(2.0**-n)])))


def lucky__torch(n, M):
    chance = torch.tensor(2.0, dtype=torch.float64) ** -n
    return -torch.expm1(M * torch.log1p(-chance))


def lucky__binomial(n, M):
    return stats.binom.sf(0, M, 2.0**-n)


def lucky__geometric(n, M):
    """The first lucky network is among the first M."""
    return stats.geom.cdf(M, 2.0**-n)


def lucky__incomplete_beta(n, M):
    return special.betainc(1, M, 2.0**-n)


def lucky__doubling(n, M):
    """Chances of groups are joined by p + q - pq, as in fast exponentiation."""
    result, chance = 0.0, 2.0**-n
    while M:
        if M & 1:
            result += chance - result * chance
        chance += chance - chance * chance
        M >>= 1
    return result


def lucky__geometric_series(n, M):
    """The k-th network is the first that is lucky."""
    q = 2.0**-n
    return q * math.fsum((1 - q) ** k for k in range(M))


def lucky__one_by_one(n, M):
    none_before, total = 1.0, 0.0
    for _ in range(M):
        total += none_before * 2.0**-n
        none_before *= 1 - 2.0**-n
    return total


def lucky__decimal(n, M):
    with localcontext() as context:
        context.prec = 60
        return 1 - (1 - Decimal(2) ** -n) ** M


def lucky__decimal_as_float(n, M):
    with localcontext() as context:
        context.prec = 60
        return float(1 - (1 - Decimal(1) / 2**n) ** M)


def lucky__mpmath(n, M):
    with mpmath.workdps(50):
        return 1 - (1 - mpmath.mpf(2) ** -n) ** M


# ------------------------------------------------------------------------------ question 2: margins


def margins__looped(logits, labels):
    result = []
    for row, y in zip(logits, labels):
        others = [z for k, z in enumerate(row) if k != y]
        result.append(row[y] - max(others))
    return torch.stack(result)


def margins__list_of_tensors(logits, labels):
    return [row[y] - torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(logits, labels)]


def margins__list_of_numbers(logits, labels):
    z, result = logits.tolist(), []
    for row, y in zip(z, labels.tolist()):
        own = row.pop(y)
        result.append(own - max(row))
    return result


def margins__numpy(logits, labels):
    z, y = logits.numpy(), labels.numpy()
    mask = np.arange(z.shape[1]) == y[:, None]
    return z[mask] - np.where(mask, -np.inf, z).max(1)


def margins__masked_array(logits, labels):
    z, y = np.asarray(logits), np.asarray(labels)
    others = np.ma.masked_array(z, mask=np.eye(z.shape[1], dtype=bool)[y])
    return np.take_along_axis(z, y[:, None], 1).squeeze(1) - others.max(1)


def margins__in_place_on_a_copy(logits, labels):
    rows, others = torch.arange(len(labels)), logits.clone()
    others[rows, labels] = float("-inf")
    return logits[rows, labels] - others.max(dim=1).values


def margins__large_number(logits, labels):
    one = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (logits * one).sum(1) - (logits - 1e9 * one).max(1)[0]


def margins__two_largest(logits, labels):
    top, which = logits.topk(2)
    rival = torch.where(which[:, 0] == labels, top[:, 1], top[:, 0])
    return logits[range(len(labels)), labels] - rival


def margins__sorted(logits, labels):
    ordered, which = logits.sort(1, descending=True)
    rival = ordered[which != labels[:, None]].view(len(labels), -1)[:, 0]
    return torch.einsum("nk,nk->n", logits, torch.eye(logits.shape[1]).double()[labels]) - rival


def margins__single_precision(logits, labels):
    z = logits.float()
    right = z.gather(1, labels.unsqueeze(1))
    return (right - z.scatter(1, labels.unsqueeze(1), -math.inf).amax(1, keepdim=True)).flatten()


def margins__log_probabilities(logits, labels):
    """They differ from the logits by one number a row."""
    logp, own = torch.log_softmax(logits, 1), labels[:, None]
    return (logp.gather(1, own) - logp.scatter(1, own, -torch.inf).amax(1, keepdim=True)).squeeze(1)


def margins__smallest_difference(logits, labels):
    right = logits.gather(1, labels[:, None])
    lead = right - logits
    lead.scatter_(1, labels[:, None], torch.inf)
    return lead.amin(1)


def margins__vmap(logits, labels):
    def one(z, y):
        own = torch.arange(len(z)) == y
        return (z * own).sum() - z.masked_fill(own, -torch.inf).max()

    return torch.func.vmap(one)(logits, labels)


# -------------------------------------------------------------------- question 3: a paired interval


def paired_interval__numpy(a, b):
    d = (a - b).numpy()
    n = d.size
    return d.mean(), stats.t.ppf(0.975, df=n - 1) * d.std(ddof=1) / np.sqrt(n)


def paired_interval__standard_error(a, b):
    d = np.asarray(a) - np.asarray(b)
    return np.mean(d), stats.sem(d) * stats.t.ppf(1 - 0.05 / 2, len(d) - 1)


def paired_interval__statistics(a, b):
    d = [x - y for x, y in zip(a.tolist(), b.tolist())]
    half = stats.t.ppf(0.975, len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))
    return statistics.fmean(d), float(half)


def paired_interval__looped(a, b):
    n, mean, squares = len(a), 0.0, 0.0
    for x, y in zip(a, b):
        mean += (x - y) / n
    for x, y in zip(a, b):
        squares += (x - y - mean) ** 2
    return [mean, stats.t.ppf(0.975, n - 1) * torch.sqrt(squares / (n - 1) / n)]


def paired_interval__one_tensor(a, b):
    d = a - b
    quantile = torch.tensor(stats.t.ppf(0.975, len(d) - 1))
    return torch.stack([d.mean(), quantile * d.var().div(len(d)).sqrt()])


def paired_interval__one_array(a, b):
    d = np.array(a - b)
    return np.array([d.mean(), -stats.t.ppf(0.025, d.size - 1) * d.std(ddof=1) / d.size**0.5])


def paired_interval__single_precision(a, b):
    d = a.float() - b.float()
    return d.mean().item(), stats.t.ppf(0.975, d.numel() - 1) * d.std().item() / d.numel() ** 0.5


def paired_interval__upper_tail(a, b):
    d = torch.sub(a, b)
    std, mean = torch.std_mean(d)
    return mean, stats.t.isf(0.025, len(d) - 1) * std * len(d) ** -0.5


def paired_interval__covariance(a, b):
    """The variance of a difference, from those of the two and their covariance."""
    n, c = len(a), torch.cov(torch.stack([a, b]))
    variance = c[0, 0] + c[1, 1] - 2 * c[0, 1]
    return a.mean() - b.mean(), stats.t.ppf(0.975, n - 1) * (variance / n) ** 0.5


def paired_interval__interval(a, b):
    d = (a - b).numpy()
    low, high = stats.t.interval(0.95, len(d) - 1, loc=d.mean(), scale=stats.sem(d))
    return (low + high) / 2, (high - low) / 2


# -------------------------------------------------------------- question 4: stopping early, honestly


def stopped_early__looped(validation_loss, test_error):
    return torch.stack([e[v.argmin()] for v, e in zip(validation_loss, test_error)])


def stopped_early__list_of_tensors(validation_loss, test_error):
    return [test_error[i, torch.argmin(v)] for i, v in enumerate(validation_loss)]


def stopped_early__pure_python(validation_loss, test_error):
    rows = zip(validation_loss.tolist(), test_error.tolist())
    return [min(zip(v, e))[1] for v, e in rows]


def stopped_early__tuple(validation_loss, test_error):
    result = ()
    for v, e in zip(validation_loss.tolist(), test_error.tolist()):
        result += (e[v.index(min(v))],)
    return result


def stopped_early__numpy(validation_loss, test_error):
    step = validation_loss.numpy().argmin(axis=1)
    return test_error.numpy()[np.arange(len(step)), step]


def stopped_early__along_axis(validation_loss, test_error):
    step = np.argmin(np.asarray(validation_loss), axis=1, keepdims=True)
    return np.take_along_axis(np.asarray(test_error), step, axis=1)[:, 0]


def stopped_early__take_along_dim(validation_loss, test_error):
    best = validation_loss.min(dim=1, keepdim=True).indices
    return torch.take_along_dim(test_error, best, 1).squeeze(1)


def stopped_early__one_hot(validation_loss, test_error):
    one = torch.nn.functional.one_hot(validation_loss.argmin(1), validation_loss.shape[1])
    return torch.einsum("rs,rs->r", one.double(), test_error)


def stopped_early__mask(validation_loss, test_error):
    return test_error[validation_loss == validation_loss.amin(1, keepdim=True)]


def stopped_early__best_so_far(validation_loss, test_error):
    best, error = torch.full((len(validation_loss),), torch.inf), torch.zeros(len(test_error))
    for v, e in zip(validation_loss.T, test_error.T):
        error = torch.where(v < best, e, error)
        best = torch.minimum(v, best)
    return error


def stopped_early__single_precision(validation_loss, test_error):
    result = torch.empty(len(test_error))
    for i in range(len(test_error)):
        result[i] = test_error[i][validation_loss[i].float().argmin()]
    return result


def stopped_early__sorted(validation_loss, test_error):
    return test_error.gather(1, validation_loss.argsort(1))[:, 0].clone().requires_grad_()
