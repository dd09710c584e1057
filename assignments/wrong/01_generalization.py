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


def margins__all_classes_compete(logits, labels):
    """The right class took part in the maximum"""
    return logits.gather(1, labels[:, None])[:, 0] - logits.amax(1)


def margins__changes_its_input(logits, labels):
    """changed its input `logits` in place"""
    rows = torch.arange(len(labels))
    right = logits[rows, labels]
    logits[rows, labels] = -torch.inf
    return right - logits.amax(1)


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


def stopped_early__by_the_test_set(validation_loss, test_error):
    """The test set chose the step"""
    return test_error.amin(1)


def stopped_early__at_one_step(validation_loss, test_error):
    """All runs were stopped at one step"""
    return test_error[:, validation_loss.mean(0).argmin()]


def memorization__verdict_from_the_mean(seeds):
    """does not follow from your own data"""

    def train(label_noise):
        data = [mnist1d(train_size=200, label_noise=label_noise, seed=s) for s in seeds]
        recipe = Recipe(optimizer=SGD(lr=0.1, momentum=0.9))
        return fit(
            lambda: MLP(40, 64, 10),
            data,
            recipe,
            steps=200,
            seeds=seeds,
            evaluate_at=[200],
            dtype=torch.float64,
        ).isel(step=0)

    change = train(0.9) - train(0.0)
    return {
        "training error": (change.train_error, "higher"),
        "test error": (change.test_error, "higher"),
    }
