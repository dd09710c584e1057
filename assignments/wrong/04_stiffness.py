"""Wrong answers to assignment 4: question__mistake, and what the check must say of it."""


def one_answer_cosine__equal_probabilities(K, p):
    """for equal probabilities"""
    return -1 / (K - 1)


def one_answer_cosine__not_divided(K, p):
    """the cosine divides by the lengths"""
    small = (1 - p) / (K - 1)
    return p**2 + (K - 1) * small**2 - 2 * small


def sequence_gram__without_bias(inputs, deltas):
    """The bias is missing"""
    W = torch.einsum("nto,nti->noi", deltas, inputs).flatten(1)
    return W @ W.T


def sequence_gram__equal_positions(inputs, deltas):
    """Only equal positions were paired"""
    a = torch.einsum("itx,jtx->ijt", inputs, inputs)
    d = torch.einsum("itx,jtx->ijt", deltas, deltas)
    return ((a + 1) * d).sum(-1)


def sequence_gram__sums_first(inputs, deltas):
    """a product of sums is not a sum of products"""
    a, d = inputs.sum(1), deltas.sum(1)
    return (a @ a.T + 1) * (d @ d.T)


def sequence_gram__gradients_formed(inputs, deltas):
    """It formed gradients"""
    W, c = torch.einsum("nto,nti->noi", deltas, inputs).flatten(1), deltas.sum(1)
    return W @ W.T + c @ c.T


def sequence_gram__gradients_one_by_one(inputs, deltas):
    """It formed gradients"""
    rows = []
    for a, d in zip(inputs, deltas):
        rows.append(torch.cat([(d.T @ a).flatten(), d.sum(0)]))
    return torch.stack([torch.stack([g @ h for h in rows]) for g in rows])


def class_means__diagonal_left_in(values, classes, num_classes):
    """The diagonal was left in"""
    one = torch.nn.functional.one_hot(classes, num_classes).to(values.dtype)
    return one.T @ values @ one / (one.sum(0)[:, None] * one.sum(0))


def class_means__diagonal_counted(values, classes, num_classes):
    """still counted in the number of pairs"""
    one = torch.nn.functional.one_hot(classes, num_classes).to(values.dtype)
    off = values - torch.diag(values.diagonal())
    return one.T @ off @ one / (one.sum(0)[:, None] * one.sum(0))


def class_means__zeroes_its_input(values, classes, num_classes):
    """changed its input `values` in place"""
    values.fill_diagonal_(0)
    one = torch.nn.functional.one_hot(classes, num_classes).to(values.dtype)
    size = one.sum(0)
    return one.T @ values @ one / (size[:, None] * size - torch.diag(size))


def cosines__zero_over_zero(gram):
    """changes nothing: its cosines are 0"""
    length = gram.diagonal().sqrt()
    return gram / length[:, None] / length


def cosines__constant_below(gram):
    """Small is not zero"""
    length = gram.diagonal().sqrt()
    return gram / (length[:, None] * length + 1e-12)


def cosines__squared(gram):
    """its root is needed"""
    length = gram.diagonal().clamp_min(1e-300)
    return gram / length[:, None] / length


def stiffness_effect__not_a_dict(seeds):
    """A dict should have come back"""
    return ["lower", "lower"]
