"""Wrong answers to assignment 5: question__mistake, and what the check must say of it."""


def expected_mixing__variance(alphas):
    """That is the variance"""
    A = alphas.sum()
    return alphas * (A - alphas) / (A**2 * (A + 1))


def expected_mixing__two_weights(alphas):
    """for two equal weights"""
    return alphas / (2 * (2 * alphas + 1))


def expected_mixing__half(alphas):
    """A factor 2 is off"""
    A = alphas.sum()
    return alphas * (A - alphas) / (2 * A * (A + 1))


def expected_mixing__variance_twice(alphas):
    """The variance was subtracted twice"""
    A = alphas.sum()
    mean = alphas / A
    return mean * (1 - mean) * (1 - 2 / (A + 1))


def mixed_loss__divided_by_the_weights(logits, labels, partners, lam):
    """λ plays no part, or it cancels"""
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam * own).sum() / lam.sum() + ((1 - lam) * other).sum() / (1 - lam).sum()


def mixed_loss__heavier(logits, labels, partners, lam):
    """max(λ, 1-λ) was taken"""
    lam = torch.maximum(lam, 1 - lam)
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__inverted(logits, labels, partners, lam):
    """or the permutation was inverted"""
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners.argsort()], reduction="none")
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__weights_of_the_partners(logits, labels, partners, lam):
    """not 1 - lam[partners]"""
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam * own + (1 - lam[partners]) * other).mean()


def mixed_loss__exchanged(logits, labels, partners, lam):
    """are exchanged"""
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return ((1 - lam) * own + lam * other).mean()


def mixed_loss__mean_first(logits, labels, partners, lam):
    """before the weights came in"""
    own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partners])
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__squares(logits, labels, partners, lam):
    """λ comes in twice"""
    own = F.cross_entropy(logits, labels, reduction="none")
    other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam**2 * own + (1 - lam) ** 2 * other).mean()


def mixed_loss__one_label(logits, labels, partners, lam):
    """Each example has only one label here"""
    return F.cross_entropy(logits, torch.where(lam > 0.5, labels, labels[partners]))


def mixed_loss__logits_mixed(logits, labels, partners, lam):
    """The logits were mixed"""
    z = lam[:, None] * logits + (1 - lam[:, None]) * logits[partners]
    own = F.cross_entropy(z, labels, reduction="none")
    other = F.cross_entropy(z, labels[partners], reduction="none")
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__partners_detached(logits, labels, partners, lam):
    """The partners' loss has no gradient"""
    own = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        other = F.cross_entropy(logits, labels[partners], reduction="none")
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__detached(logits, labels, partners, lam):
    """Was a part of the loss detached on the way?"""
    z = logits.detach()
    own = F.cross_entropy(z, labels, reduction="none")
    other = F.cross_entropy(z, labels[partners], reduction="none")
    return (lam * own + (1 - lam) * other).mean()


def mixed_loss__soft_labels(logits, labels, partners, lam):
    """A soft label was made"""
    one = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.cross_entropy(logits, lam[:, None] * one + (1 - lam)[:, None] * one[partners])


def mixed_loss__soft_labels_by_hand(logits, labels, partners, lam):
    """A soft label was made"""
    each, soft = torch.arange(len(labels)), torch.zeros_like(logits)
    soft[each, labels] += lam
    soft[each, labels[partners]] += 1 - lam
    return -(soft * logits.log_softmax(1)).sum(1).mean()


def dirichlet_mixup__own_labels(x, labels, num_classes, alpha, k, generator):
    """The labels are the examples' own"""
    shapes = torch.full((k, len(x), 1), alpha, dtype=torch.float64)
    w = torch._standard_gamma(shapes, generator=generator)
    who = [torch.arange(len(x))] + [
        torch.randperm(len(x), generator=generator) for _ in range(k - 1)
    ]
    return sum(a * x[i] for a, i in zip(w / w.sum(0), who)), F.one_hot(labels, num_classes)


def dirichlet_mixup__inputs_not_permuted(x, labels, num_classes, alpha, k, generator):
    """The inputs came back as they were"""
    n, one = len(x), F.one_hot(labels, num_classes).to(x.dtype)
    shapes = torch.full((k, n, 1), alpha, dtype=torch.float64)
    w = torch._standard_gamma(shapes, generator=generator)
    w = w / w.sum(0)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * x for a in w), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__always_three(x, labels, num_classes, alpha, k, generator):
    """written into the code"""
    n, one = len(x), F.one_hot(labels, num_classes).to(x.dtype)
    shapes = torch.full((3, n, 1), alpha, dtype=torch.float64)
    w = torch._standard_gamma(shapes, generator=generator)
    w = w / w.sum(0)
    i, j = (torch.randperm(n, generator=generator) for _ in range(2))
    mixed = [w[0] * v + w[1] * v[i] + w[2] * v[j] for v in (x, one)]
    return mixed[0], mixed[1]


def dirichlet_mixup__per_class(x, labels, num_classes, alpha, k, generator):
    """λ was drawn for each class on its own"""
    n = len(x)
    draw = lambda *shape: torch._standard_gamma(
        torch.full(shape, alpha, dtype=torch.float64), generator=generator
    )
    w, v = draw(k, n, 1), draw(k, n, num_classes)
    w, v = w / w.sum(0), v / v.sum(0)
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(v, who))


def dirichlet_mixup__labels_drawn_anew(x, labels, num_classes, alpha, k, generator):
    """not mixed with the weights of the inputs"""
    n = len(x)

    def weights():
        w = torch._standard_gamma(
            torch.full((k, n, 1), alpha, dtype=torch.float64), generator=generator
        )
        return w / w.sum(0)

    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    mixed = [sum(a * v[i] for a, i in zip(weights(), who)) for v in (x, one)]
    return mixed[0], mixed[1]


def dirichlet_mixup__one_draw_a_batch(x, labels, num_classes, alpha, k, generator):
    """All mixtures of a batch have the same weights"""
    n = len(x)
    w = torch._standard_gamma(torch.full((k,), alpha, dtype=torch.float64), generator=generator)
    w = w / w.sum()
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__uniform_normalized(x, labels, num_classes, alpha, k, generator):
    """The weights are not Dirichlet"""
    n = len(x)
    w = torch.rand(k, n, 1, generator=generator, dtype=torch.float64)
    w = w / w.sum(0)
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__global_state(x, labels, num_classes, alpha, k, generator):
    """The same generator should give the same mixtures"""
    n = len(x)
    w = torch.from_numpy(np.random.dirichlet([alpha] * k, n)).T[..., None]
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randperm(n) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__rest_shared_equally(x, labels, num_classes, alpha, k, generator):
    """An example's own weight is right; the weights of its partners"""
    n = len(x)
    shapes = torch.tensor([[alpha], [(k - 1) * alpha]], dtype=torch.float64).expand(2, n)
    pair = torch._standard_gamma(shapes.contiguous(), generator=generator)
    own = (pair[0] / pair.sum(0))[:, None]
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    mixed = [own * v + (1 - own) * sum(v[i] for i in who) / (k - 1) for v in (x, one)]
    return mixed[0], mixed[1]


def dirichlet_mixup__seed_of_the_generator(x, labels, num_classes, alpha, k, generator):
    """A second batch got the weights of the first"""
    n, rng = len(x), np.random.default_rng(generator.initial_seed())
    w = torch.from_numpy(rng.dirichlet([alpha] * k, n)).T[..., None]
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.from_numpy(rng.permutation(n)) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__any_partners(x, labels, num_classes, alpha, k, generator):
    """indices drawn one by one do not"""
    n = len(x)
    w = torch._standard_gamma(
        torch.full((k, n, 1), alpha, dtype=torch.float64), generator=generator
    )
    w = w / w.sum(0)
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n)] + [torch.randint(n, (n,), generator=generator) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__neighbours(x, labels, num_classes, alpha, k, generator):
    """An example has the same partner in most of the draws"""
    n = len(x)
    w = torch._standard_gamma(
        torch.full((k, n, 1), alpha, dtype=torch.float64), generator=generator
    )
    w = w / w.sum(0)
    one = F.one_hot(labels, num_classes).to(x.dtype)
    who = [torch.arange(n).roll(j) for j in range(k)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__classes_counted(x, labels, num_classes, alpha, k, generator):
    """also for one without examples"""
    n, one = len(x), F.one_hot(labels).to(x.dtype)
    shapes = torch.full((k, n, 1), alpha, dtype=torch.float64)
    w = torch._standard_gamma(shapes, generator=generator)
    w = w / w.sum(0)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * x[i] for a, i in zip(w, who)), sum(a * one[i] for a, i in zip(w, who))


def dirichlet_mixup__swapped(x, labels, num_classes, alpha, k, generator):
    """The inputs come first, then the labels"""
    n, one = len(x), F.one_hot(labels, num_classes).to(x.dtype)
    shapes = torch.full((k, n, 1), alpha, dtype=torch.float64)
    w = torch._standard_gamma(shapes, generator=generator)
    w = w / w.sum(0)
    who = [torch.arange(n)] + [torch.randperm(n, generator=generator) for _ in range(k - 1)]
    return sum(a * one[i] for a, i in zip(w, who)), sum(a * x[i] for a, i in zip(w, who))


def shrunk__mean_of_lambda(x, targets, alpha):
    """it is the heavier weight"""
    toward = lambda v: v.mean(0) + 0.5 * (v - v.mean(0))
    return toward(x), toward(targets)


def shrunk__mixing(x, targets, alpha):
    """That is E[λ(1-λ)]"""
    theta = 1 - alpha / (2 * (2 * alpha + 1))
    toward = lambda v: v.mean(0) + theta * (v - v.mean(0))
    return toward(x), toward(targets)


def shrunk__to_zero(x, targets, alpha):
    """Shrunk towards zero"""
    theta = 0.5 + 4**-alpha / (alpha * beta(alpha, alpha))
    return theta * x, theta * targets


def shrunk__means_of_rows(x, targets, alpha):
    """The mean is that of all rows"""
    theta = 0.5 + 4**-alpha / (alpha * beta(alpha, alpha))
    toward = lambda v: theta * v + (1 - theta) * v.mean(1, keepdim=True)
    return toward(x), toward(targets)


def shrunk__uniform_labels(x, targets, alpha):
    """which is 1/K only if"""
    theta = 0.5 + 4**-alpha / (alpha * beta(alpha, alpha))
    smoothed = theta * targets + (1 - theta) / targets.shape[1]
    return x.mean(0) + theta * (x - x.mean(0)), smoothed


def shrunk__brackets(x, targets, alpha):
    """mind the brackets"""
    theta = 0.5 + 4**-alpha / alpha * beta(alpha, alpha)
    toward = lambda v: v.mean(0) + theta * (v - v.mean(0))
    return toward(x), toward(targets)


def mixup_effect__raises(seeds):
    """It raised KeyError"""
    return {}["test error"]


def mixup_effect__misnamed(seeds):
    """The key 'test error' is missing"""
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    grid, model = {"alpha": [0.0, 1.0]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=300, seeds=seeds, grid=grid, dtype=torch.float64)
    loss, error = (
        runs[name].isel(step=-1).diff("alpha")[0] for name in ("test_loss", "test_error")
    )

    def verdict(d):
        interval = mean_interval(d)
        return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"

    return {"test loss": (loss, verdict(loss)), "test_error": (error, verdict(error))}


def mixup_effect__verdicts_exchanged(seeds):
    """The interval lies below zero: that is 'lower'."""
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    grid, model = {"alpha": [0.0, 1.0]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=300, seeds=seeds, grid=grid, dtype=torch.float64)
    loss, error = (
        runs[name].isel(step=-1).diff("alpha")[0] for name in ("test_loss", "test_error")
    )

    def verdict(d):
        interval = mean_interval(d)
        return "higher" if interval.high < 0 else "lower" if interval.low > 0 else "undecided"

    return {"test loss": (loss, verdict(loss)), "test error": (error, verdict(error))}


def mixup_effect__never_decided(seeds):
    """The interval lies below zero: that is 'lower'."""
    data = [mnist1d(train_size=300, label_noise=0.4, seed=s) for s in seeds]
    recipe = Recipe(batch=Mixup(), optimizer=SGD(lr=0.1, momentum=0.9, schedule="cosine"))
    grid, model = {"alpha": [0.0, 1.0]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=300, seeds=seeds, grid=grid, dtype=torch.float64)
    loss, error = (
        runs[name].isel(step=-1).diff("alpha")[0] for name in ("test_loss", "test_error")
    )
    return {"test loss": (loss, "undecided"), "test error": (error, "undecided")}
