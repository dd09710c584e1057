"""Right answers to assignment 4, written differently: each must earn its question's points."""

import itertools
import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cosine
from torch.func import vmap

# ----------------------------------------------------------------------- question 1: wrong together


def one_answer_cosine__residuals(K, p):
    r = np.full(K, (1 - p) / (K - 1))
    r[0] = p
    a, b = r.copy(), r.copy()
    a[1] -= 1
    b[2] -= 1
    return a @ b / np.sqrt((a @ a) * (b @ b))


def one_answer_cosine__cosine_similarity(K, p):
    probabilities = torch.tensor([p] + [(1 - p) / (K - 1)] * (K - 1), dtype=torch.float64)
    one = torch.eye(K)
    return F.cosine_similarity(probabilities - one[1], probabilities - one[2], dim=0)


def one_answer_cosine__a_batch_of_one(K, p):
    r = torch.full((1, K), (1 - p) / (K - 1))
    r[:, 0] = p
    labels = F.one_hot(torch.tensor([[1], [2]]), K)
    return F.cosine_similarity(r - labels[0], r - labels[1])


def one_answer_cosine__lists(K, p):
    q = [p] + [(1 - p) / (K - 1) for _ in range(K - 1)]
    a = [x - (k == 1) for k, x in enumerate(q)]
    b = [x - (k == K - 1) for k, x in enumerate(q)]
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.hypot(*b)


def one_answer_cosine__closed_form(K, p):
    """Numerator and denominator times K - 1."""
    top = (K - 1) * p**2 + (1 - p) ** 2 - 2 * (1 - p)
    return top / (top + K - 1)


def one_answer_cosine__simplified(K, p):
    return (K * p * p - 1) / (K * p * p + K - 2)


def one_answer_cosine__term_by_term(K, p):
    q = (1 - p) / (K - 1)
    product = p * p + 2 * q * (q - 1) + (K - 3) * q * q
    square = p * p + (1 - q) ** 2 + (K - 2) * q * q
    return product / square


def one_answer_cosine__scipy(K, p):
    r = np.array([p] + [(1 - p) / (K - 1)] * (K - 1))
    I = np.eye(K)
    return 1 - cosine(r - I[1], r - I[2])


def one_answer_cosine__single_precision(K, p):
    r = torch.full((K,), (1 - p) / (K - 1))
    r[0] = p
    a, b = r.clone(), r.clone()
    a[1] -= 1
    b[2] -= 1
    return torch.dot(a, b) / (torch.linalg.norm(a) * torch.linalg.norm(b))


def one_answer_cosine__matrix(K, p):
    r = F.normalize(torch.full((K, K), (1 - p) / (K - 1), dtype=torch.float64), dim=1) * 0
    r += (1 - p) / (K - 1)
    r[:, 0] = p
    r = F.normalize(r - torch.eye(K), dim=1)
    return (r @ r.T)[1, 2].item()


def one_answer_cosine__fractions(K, p):
    p = Fraction(p)
    small = (1 - p) / (K - 1)
    product = p**2 + (K - 1) * small**2 - 2 * small
    return product / (product + 1)


# ------------------------------------------------------ question 2: the Gram identity for sequences


def sequence_gram__einsum_pairs(inputs, deltas):
    a = torch.einsum("itx,jsx->ijts", inputs, inputs)
    d = torch.einsum("itx,jsx->ijts", deltas, deltas)
    return torch.einsum("ijts,ijts->ij", a + 1, d)


def sequence_gram__one_einsum(inputs, deltas):
    """The 1 of the bias is one more input."""
    a = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
    return torch.einsum("itx,jsx,ity,jsy->ij", a, a, deltas, deltas)


def sequence_gram__one_einsum_in_another_order(inputs, deltas):
    a = F.pad(inputs, (0, 1), value=1.0)
    return torch.einsum("ity,itx,jsy,jsx->ij", deltas, a, deltas, a)


def sequence_gram__weights_and_bias_apart(inputs, deltas):
    weights = torch.einsum("itx,jsx,ity,jsy->ij", inputs, inputs, deltas, deltas)
    bias = deltas.sum(1)
    return weights + bias @ bias.mT


def sequence_gram__looped(inputs, deltas):
    n, T = inputs.shape[:2]
    result = torch.zeros(n, n, dtype=inputs.dtype)
    for i, j, t, s in itertools.product(range(n), range(n), range(T), range(T)):
        result[i, j] += (inputs[i, t] @ inputs[j, s] + 1) * (deltas[i, t] @ deltas[j, s])
    return result


def sequence_gram__pairs_of_examples(inputs, deltas):
    rows = []
    for a, d in zip(inputs, deltas):
        rows.append([((a @ b.T + 1) * (d @ e.T)).sum() for b, e in zip(inputs, deltas)])
    return torch.tensor(rows)


def sequence_gram__lists_of_tensors(inputs, deltas):
    pairs = list(zip(inputs, deltas))
    return [[((a @ b.T + 1) * (d @ e.T)).sum() for b, e in pairs] for a, d in pairs]


def sequence_gram__numpy(inputs, deltas):
    a, d = inputs.numpy(), deltas.numpy()
    every = (np.tensordot(a, a, (2, 2)) + 1) * np.tensordot(d, d, (2, 2))
    return every.sum(axis=(1, 3))


def sequence_gram__numpy_einsum(inputs, deltas):
    a, d = np.asarray(inputs), np.asarray(deltas)
    return np.einsum("itx,jsx,ity,jsy->ij", a, a, d, d) + np.einsum("ity,jsy->ij", d, d)


def sequence_gram__broadcast(inputs, deltas):
    a = (inputs[:, None, :, None] * inputs[None, :, None]).sum(-1)
    d = (deltas[:, None, :, None] * deltas[None, :, None]).sum(-1)
    return ((a + 1) * d).sum((-1, -2))


def sequence_gram__position_by_position(inputs, deltas):
    result = 0
    for t in range(inputs.shape[1]):
        for s in range(inputs.shape[1]):
            a, d = inputs[:, t] @ inputs[:, s].T, deltas[:, t] @ deltas[:, s].T
            result = result + (1 + a) * d
    return result


def sequence_gram__vmap(inputs, deltas):
    pair = lambda a, d, b, e: ((a @ b.mT + 1) * (d @ e.mT)).sum()
    rows = vmap(vmap(pair, (None, None, 0, 0)), (0, 0, None, None))
    return rows(inputs, deltas, inputs, deltas)


def sequence_gram__single_precision(inputs, deltas):
    n, T, _ = inputs.shape
    a, d = inputs.float().reshape(n * T, -1), deltas.float().reshape(n * T, -1)
    return ((a @ a.T + 1) * (d @ d.T)).reshape(n, T, n, T).sum(3).sum(1)


def sequence_gram__half_of_it(inputs, deltas):
    """The matrix is symmetric."""
    n = len(inputs)
    gram = np.zeros((n, n), dtype=np.float32)
    for i in range(n):
        for j in range(i + 1):
            a, d = inputs[i] @ inputs[j].T, deltas[i] @ deltas[j].T
            gram[i, j] = gram[j, i] = torch.sum(a * d) + torch.sum(d)
    return gram


# ----------------------------------------------------------------------- question 3: class by class


def class_means__one_hot(values, classes, num_classes):
    one = F.one_hot(classes, num_classes).to(values.dtype)
    size = one.sum(0)
    off = values - torch.diag(torch.diag(values))
    return one.T @ off @ one / (torch.outer(size, size) - torch.diag(size))


def class_means__nanmean(values, classes, num_classes):
    off = values.clone()
    off.fill_diagonal_(torch.nan)
    blocks = [
        off[classes == a][:, classes == b].nanmean()
        for a in range(num_classes)
        for b in range(num_classes)
    ]
    return torch.stack(blocks).reshape(num_classes, num_classes)


def class_means__single_precision(values, classes, num_classes):
    result = torch.full((num_classes, num_classes), float("nan"))
    different = ~torch.eye(len(values)).bool()
    for a in range(num_classes):
        for b in range(num_classes):
            chosen = torch.outer(classes == a, classes == b) & different
            if chosen.sum() > 0:
                result[a, b] = values[chosen].mean()
    return result


def class_means__pure_python(values, classes, num_classes):
    sums, counts = defaultdict(float), defaultdict(int)
    for (i, a), (j, b) in itertools.permutations(enumerate(classes.tolist()), 2):
        sums[a, b] += values[i, j].item()
        counts[a, b] += 1
    K = range(num_classes)
    return [[sums[a, b] / counts[a, b] if counts[a, b] else math.nan for b in K] for a in K]


def class_means__lists_of_tensors(values, classes, num_classes):
    n, K = len(values), range(num_classes)
    pairs = lambda a, b: [
        values[i, j]
        for i in range(n)
        for j in range(n)
        if i != j and classes[i] == a and classes[j] == b
    ]
    mean = lambda found: sum(found) / len(found) if found else float("nan")
    return [[mean(pairs(a, b)) for b in K] for a in K]


def class_means__numpy(values, classes, num_classes):
    v, y = values.numpy(), classes.numpy()
    result = np.full((num_classes, num_classes), np.nan)
    off = ~np.eye(len(y), dtype=bool)
    for a in range(num_classes):
        for b in range(num_classes):
            mask = (y == a)[:, None] & (y == b)[None, :] & off
            if mask.any():
                result[a, b] = v[mask].mean()
    return result


def class_means__bincount(values, classes, num_classes):
    y, K = classes.numpy(), num_classes
    i, j = np.nonzero(~np.eye(len(y), dtype=bool))
    which = y[i] * K + y[j]
    sums = np.bincount(which, weights=values.numpy()[i, j], minlength=K * K)
    counts = np.bincount(which, minlength=K * K)
    with np.errstate(invalid="ignore"):
        return (sums / counts).reshape(K, K)


def class_means__index_put(values, classes, num_classes):
    i, j = torch.nonzero(~torch.eye(len(classes), dtype=torch.bool), as_tuple=True)
    where = (classes[i], classes[j])
    sums = torch.zeros(num_classes, num_classes, dtype=values.dtype)
    counts = torch.zeros_like(sums)
    sums.index_put_(where, values[i, j], accumulate=True)
    counts.index_put_(where, torch.ones_like(values[i, j]), accumulate=True)
    return sums / counts


def class_means__scatter(values, classes, num_classes):
    which = (classes[:, None] * num_classes + classes).flatten()
    weight = (1 - torch.eye(len(classes), dtype=values.dtype)).flatten()
    empty = torch.zeros(num_classes**2, dtype=values.dtype)
    total = empty.scatter_add(0, which, weight * values.flatten())
    return (total / empty.scatter_add(0, which, weight)).view(num_classes, num_classes)


def class_means__pandas(values, classes, num_classes):
    i, j = np.nonzero(~np.eye(len(classes), dtype=bool))
    y = classes.numpy()
    frame = pd.DataFrame({"a": y[i], "b": y[j], "value": values.numpy()[i, j]})
    table = frame.groupby(["a", "b"]).value.mean().unstack()
    return table.reindex(index=range(num_classes), columns=range(num_classes)).to_numpy()


def class_means__sums_minus_diagonal(values, classes, num_classes):
    result = torch.empty(num_classes, num_classes, dtype=values.dtype)
    for a in range(num_classes):
        for b in range(num_classes):
            block = values[classes == a][:, classes == b]
            total, count = block.sum(), block.numel()
            if a == b:
                total, count = total - block.trace(), count - len(block)
            result[a, b] = total / count if count else torch.nan
    return result


def class_means__einsum(values, classes, num_classes):
    one = torch.eye(num_classes, dtype=torch.float64)[classes]
    different = 1 - torch.eye(len(values), dtype=torch.float64)
    sums = torch.einsum("ia,ij,ij,jb->ab", one, values, different, one)
    return sums / torch.einsum("ia,ij,jb->ab", one, different, one)


# ------------------------------------------------------------------------------- question 4: cosines


def cosines__outer(gram):
    length = gram.diag().sqrt()
    product = torch.outer(length, length)
    return torch.where(product > 0, gram / product, 0.0)


def cosines__nan_to_num(gram):
    norms = torch.sqrt(torch.diagonal(gram))
    return torch.nan_to_num(gram / (norms[:, None] * norms[None, :]), nan=0.0)


def cosines__inverse_lengths(gram):
    inverse = gram.diagonal().rsqrt()
    inverse[inverse.isinf()] = 0
    return gram * inverse[:, None] * inverse


def cosines__diagonal_matrices(gram):
    length = gram.diagonal() ** 0.5
    D = torch.diag(torch.where(length == 0, 0.0, 1 / length))
    return D @ gram @ D


def cosines__smallest_number(gram):
    length = gram.diagonal().sqrt().clamp(min=torch.finfo(gram.dtype).tiny)
    return gram / length[:, None] / length[None, :]


def cosines__looped(gram):
    result = torch.zeros_like(gram)
    for i in range(len(gram)):
        for j in range(len(gram)):
            if gram[i, i] > 0 and gram[j, j] > 0:
                result[i, j] = gram[i, j] / (gram[i, i].sqrt() * gram[j, j].sqrt())
    return result


def cosines__pure_python(gram):
    g, n = gram.tolist(), range(len(gram))
    length = [math.sqrt(g[i][i]) or 1.0 for i in n]
    return [[g[i][j] / length[i] / length[j] for j in n] for i in n]


def cosines__lists_of_tensors(gram):
    n = range(len(gram))
    length = [gram[i, i].sqrt() if gram[i, i] else 1 for i in n]
    return [[gram[i, j] / (length[i] * length[j]) for j in n] for i in n]


def cosines__numpy(gram):
    G = gram.numpy()
    length = np.sqrt(np.diag(G))
    below = np.outer(length, length)
    return np.divide(G, below, out=np.zeros_like(G), where=below != 0)


def cosines__in_place_on_a_copy(gram):
    result, length = gram.clone(), gram.diagonal().sqrt()
    some = length > 0
    result[some] /= length[some, None]
    result[:, some] /= length[some]
    return result


def cosines__single_precision(gram):
    g = gram.float()
    length = g.diagonal().sqrt()
    length = torch.where(length > 0, length, torch.ones(()))
    return torch.einsum("ij,i,j->ij", g, 1 / length, 1 / length)


def cosines__a_set_diagonal(gram):
    length = gram.diagonal().sqrt()
    length = length + (length == 0)
    result = gram / torch.outer(length, length)
    result.fill_diagonal_(1.0)
    result[gram.diagonal() == 0] = 0.0
    return result


def cosines__sign_and_ratio(gram):
    squares = gram.diagonal()
    ratio = gram.square() / squares[:, None] / squares
    return gram.sign() * ratio.nan_to_num().sqrt()
