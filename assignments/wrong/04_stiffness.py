"""Wrong answers to assignment 4: question__mistake, and what the check must say of it."""


def one_answer_cosine__equal_probabilities(K, p):
    """for equal probabilities"""
    return -1 / (K - 1)


def one_answer_cosine__not_divided(K, p):
    """the cosine divides by the lengths"""
    small = (1 - p) / (K - 1)
    return p**2 + (K - 1) * small**2 - 2 * small


def one_answer_cosine__distance(K, p):
    """That is the distance, 1 - cos"""
    small = (1 - p) / (K - 1)
    product = p**2 + (K - 1) * small**2 - 2 * small
    return 1 - product / (product + 1)


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


def sequence_gram__without_deltas(inputs, deltas):
    """The deltas are missing"""
    return (torch.einsum("itx,jsx->itjs", inputs, inputs) + 1).sum((1, 3))


def sequence_gram__strung_together(inputs, deltas):
    """The positions were strung together"""
    a, d = inputs.flatten(1), deltas.flatten(1)
    return (a @ a.T + 1) * (d @ d.T)


def sequence_gram__a_one_to_the_deltas(inputs, deltas):
    """so 1 is added to the products of the inputs"""
    d = torch.cat([deltas, torch.ones_like(deltas[..., :1])], dim=-1)
    return torch.einsum("itx,jsx,ity,jsy->ij", inputs, inputs, d, d)


def sequence_gram__positions_first(inputs, deltas):
    """that is .view(n, T, n, T)"""
    n, T, _ = inputs.shape
    a, d = inputs.flatten(0, 1), deltas.flatten(0, 1)
    return ((a @ a.T + 1) * (d @ d.T)).view(T, n, T, n).sum((0, 2))


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


def class_means__zeros_left_out(values, classes, num_classes):
    """leave out the diagonal by its place"""
    one = torch.nn.functional.one_hot(classes, num_classes).to(values.dtype)
    off = values - torch.diag(values.diagonal())
    return one.T @ off @ one / (one.T @ (off != 0).to(values.dtype) @ one)


def class_means__within_and_between(values, classes, num_classes):
    """Each pair of classes has a mean of its own"""
    same, off = classes[:, None] == classes, ~torch.eye(len(values), dtype=torch.bool)
    within, between = values[same & off].mean(), values[~same].mean()
    return torch.where(torch.eye(num_classes, dtype=torch.bool), within, between)


def class_means__pairs_in_order(values, classes, num_classes):
    """Only pairs with i < j were taken"""
    before = torch.ones_like(values).triu(1)
    one = torch.nn.functional.one_hot(classes, num_classes).to(values.dtype)
    return one.T @ (before * values) @ one / (one.T @ before @ one)


def class_means__mean_over_nan(values, classes, num_classes):
    """A mean over a NaN is NaN"""
    off, every = values.clone().fill_diagonal_(torch.nan), range(num_classes)
    rows = [[off[classes == a][:, classes == b].mean() for b in every] for a in every]
    return torch.tensor(rows)


def class_means__classes_that_occur(values, classes, num_classes):
    """has a row and a column"""
    off, every = values.clone().fill_diagonal_(torch.nan), classes.unique()
    rows = [[off[classes == a][:, classes == b].nanmean() for b in every] for a in every]
    return torch.tensor(rows)


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


def cosines__of_the_rows(gram):
    """The rows of `gram` are not the gradients"""
    return torch.nn.functional.cosine_similarity(gram[:, None], gram[None], dim=-1)


def cosines__root_of_the_square(gram):
    """The sign was lost"""
    squares = gram.diagonal()
    return (gram.square() / squares[:, None] / squares).nan_to_num().sqrt()


def stiffness_effect__not_a_dict(seeds):
    """A dict should have come back"""
    return ["lower", "lower"]


def stiffness_effect__between_classes(seeds):
    """before training, between classes"""

    def measured(label_noise):
        return fit(
            lambda: MLP(40, 32, 10),
            [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds],
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            steps=100,
            seeds=seeds,
            evaluate_at=[0, 100],
            dtype=torch.float64,
            instruments={"st": partial(class_stiffness, num_classes=10)},
        ).st_between

    change = measured(0.9) - measured(0.0)
    before, after = change.sel(step=0), change.sel(step=100)
    return {"before training": (before, "lower"), "after training": (after, "lower")}


def stiffness_effect__verdict_first(seeds):
    """The differences come first, then the verdict"""

    def measured(label_noise):
        return fit(
            lambda: MLP(40, 32, 10),
            [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds],
            Recipe(optimizer=SGD(lr=0.1, momentum=0.9)),
            steps=100,
            seeds=seeds,
            evaluate_at=[0, 100],
            dtype=torch.float64,
            instruments={"st": partial(class_stiffness, num_classes=10)},
        ).st_within

    change = measured(0.9) - measured(0.0)
    before, after = change.sel(step=0), change.sel(step=100)
    return {"before training": ("lower", before), "after training": ("lower", after)}
