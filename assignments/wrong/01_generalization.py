"""Wrong answers to assignment 1: question__mistake, and what the check must say of it."""


def lucky__expected_number(n, M):
    """how many such networks are expected"""
    return M * 2.0**-n


def lucky__none(n, M):
    """the chance that there is none"""
    return (1 - 2.0**-n) ** M


def lucky__cancels(n, M):
    """math.log1p and math.expm1"""
    return 1 - (1 - 2.0**-n) ** M


def lucky__each_example_by_another(n, M):
    """One network has to be right on all"""
    return (1 - 0.5**M) ** n


def lucky__single_precision(n, M):
    """torch.float64 has sixteen"""
    return -torch.expm1(M * torch.log1p(-(torch.tensor(2.0) ** -n)))


def lucky__two_formulas(n, M):
    """keeps few of the digits"""
    return 1 - (1 - 0.5**n) ** M if n < 40 else M / 2**n


def lucky__not_all_right(n, M):
    """at least one network is wrong"""
    return 1 - 0.5 ** (n * M)


def lucky__one_coin_less(n, M):
    """all n coins with 2**-n"""
    return -math.expm1(M * math.log1p(-(2.0 ** -(n - 1))))


def lucky__percent(n, M):
    """These are percent"""
    return -100 * math.expm1(M * math.log1p(-(2.0**-n)))


def lucky__sign(n, M):
    """math.expm1(x) is exp(x) - 1"""
    return math.expm1(M * math.log1p(-(2.0**-n)))


def margins__all_classes_compete(logits, labels):
    """The right class took part in the maximum"""
    return logits.gather(1, labels[:, None])[:, 0] - logits.amax(1)


def margins__changes_its_input(logits, labels):
    """changed its input `logits` in place"""
    rows = torch.arange(len(labels))
    right = logits[rows, labels]
    logits[rows, labels] = -torch.inf
    return right - logits.amax(1)


def margins__zero_in_place_of_minus_infinity(logits, labels):
    """set to 0, which is the largest"""
    own = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (logits * own).sum(1) - (logits * (1 - own)).amax(1)


def margins__ten_subtracted(logits, labels):
    """but not the smallest everywhere"""
    own = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (logits * own).sum(1) - (logits - 10 * own).amax(1)


def margins__set_to_minus_ten(logits, labels):
    """but not the smallest everywhere"""
    right = logits.gather(1, labels[:, None])[:, 0]
    return right - logits.scatter(1, labels[:, None], -10).amax(1)


def margins__broadcast(logits, labels):
    """are broadcast to [n, n]"""
    right = logits.gather(1, labels[:, None])
    return right - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def paired_interval__normal_quantile(a, b):
    """1.96 is for a known standard deviation"""
    d = a - b
    return d.mean(), 1.96 * d.std() / len(d) ** 0.5


def paired_interval__unpaired(a, b):
    """Runs that share a seed are pairs"""
    n = len(a)
    return a.mean() - b.mean(), stats.t.ppf(0.975, 2 * n - 2) * ((a.var() + b.var()) / n) ** 0.5


def paired_interval__divides_by_n(a, b):
    """divided by n, not by n - 1"""
    d = (a - b).numpy()
    return d.mean(), stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5


def paired_interval__by_mean_interval(a, b):
    """without mean_interval"""
    interval = mean_interval(xr.DataArray(a - b, dims="seed"))
    return interval["mean"], interval["half"]


def paired_interval__full_width(a, b):
    """This is the full width"""
    d = a - b
    return d.mean(), 2 * stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5


def paired_interval__low_and_high(a, b):
    """An end of the interval came back"""
    d = a - b
    half = stats.t.ppf(0.975, len(d) - 1) * d.std() / len(d) ** 0.5
    return d.mean() - half, d.mean() + half


def paired_interval__no_root(a, b):
    """A root is missing"""
    d = a - b
    return d.mean(), stats.t.ppf(0.975, len(d) - 1) * d.var() / len(d)


def stopped_early__by_the_test_set(validation_loss, test_error):
    """The test set chose the step"""
    return test_error.amin(1)


def stopped_early__at_one_step(validation_loss, test_error):
    """All runs were stopped at one step"""
    return test_error[:, validation_loss.mean(0).argmin()]


def stopped_early__at_the_first_rise(validation_loss, test_error):
    """rises for the first time"""
    rise = (validation_loss.diff(dim=1) > 0).int().argmax(1)
    return test_error.gather(1, rise[:, None])[:, 0]


def stopped_early__whole_rows(validation_loss, test_error):
    """took whole rows or columns"""
    return test_error[validation_loss.argmin(1)]


def memorization__typed_in(seeds):
    """Was it typed in?"""

    def train(label_noise):
        data = [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        return fit(
            lambda: MLP(40, 64, 10),
            data,
            recipe,
            steps=50,
            seeds=seeds,
            evaluate_at=[50],
            dtype=torch.float64,
        ).isel(step=0)

    change = train(0.9) - train(0.0)
    return {
        "training error": (change.train_error, "higher"),
        "test error": (change.test_error, "higher"),
    }


def memorization__percent(seeds):
    """give fractions, not percent"""

    def train(label_noise):
        data = [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        model = lambda: MLP(40, 64, 10)
        runs = fit(model, data, recipe, steps=50, seeds=seeds, dtype=torch.float64)
        return runs.isel(step=-1, drop=True)

    def verdict(d):
        interval = mean_interval(d)
        return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"

    change = 100 * (train(0.9) - train(0.0))
    return {
        f"{name} error": (change[f"{short}_error"], verdict(change[f"{short}_error"]))
        for name, short in (("training", "train"), ("test", "test"))
    }


def memorization__too_many_steps(seeds):
    """There is no difference at all"""

    def train(label_noise):
        data = [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        model = lambda: MLP(40, 64, 10)
        runs = fit(model, data, recipe, steps=200, seeds=seeds, dtype=torch.float64)
        return runs.isel(step=-1, drop=True)

    def verdict(d):
        interval = mean_interval(d)
        return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"

    change = train(0.9) - train(0.0)
    return {
        f"{name} error": (change[f"{short}_error"], verdict(change[f"{short}_error"]))
        for name, short in (("training", "train"), ("test", "test"))
    }


def memorization__as_many_seeds(seeds):
    """The seeds that were given have to go to `fit`"""

    def train(label_noise):
        data = [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        model = lambda: MLP(40, 64, 10)
        runs = fit(model, data, recipe, steps=50, seeds=5, dtype=torch.float64)
        return runs.isel(step=-1, drop=True)

    def verdict(d):
        interval = mean_interval(d)
        return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"

    change = train(0.9) - train(0.0)
    return {
        f"{name} error": (change[f"{short}_error"], verdict(change[f"{short}_error"]))
        for name, short in (("training", "train"), ("test", "test"))
    }
