"""Wrong answers to assignment 2: question__mistake, and what the check must say of it."""


def fraction_up__one_rate(down, up):
    """with one rate for both directions"""
    return -math.log(1 - down) / (math.log(1 + down) - math.log(1 - down))


def fraction_up__first_order(down, up):
    """holds for short steps only"""
    return down / (down + up)


def fraction_up__steps_up_per_step_down(down, up):
    """a ratio of steps up and steps down"""
    return -math.log(1 - down) / math.log(1 + up)


def fraction_up__exchanged_and_first_order(down, up):
    """The two rates are exchanged, and this is first order"""
    return up / (down + up)


def flooded__clamped(losses, flood_level, per_example):
    """below the level it is constant"""
    return (losses if per_example else losses.mean()).clamp(min=flood_level).mean()


def flooded__always_the_mean(losses, flood_level, per_example):
    """per example means fold, then average"""
    return (losses.mean() - flood_level).abs() + flood_level


def flooded__always_by_example(losses, flood_level, per_example):
    """Here the mean is taken, then folded"""
    return ((losses - flood_level).abs() + flood_level).mean()


def flooded__mirrored_at_zero(losses, flood_level, per_example):
    """not at 0: 2b - L, not -L"""
    value = losses if per_example else losses.mean()
    return torch.where(value > flood_level, value, -value).mean()


def flooded__without_the_level(losses, flood_level, per_example):
    """The + b is missing"""
    return ((losses if per_example else losses.mean()) - flood_level).abs().mean()


def flooded__level_subtracted_again(losses, flood_level, per_example):
    """it has to be added"""
    return (flood_level - (losses if per_example else losses.mean())).abs().mean() - flood_level


def flooded__detached(losses, flood_level, per_example):
    """The value is right, but it has no gradient"""
    losses = losses.detach() if per_example else losses.detach().mean()
    return ((losses - flood_level).abs() + flood_level).mean()


def flooded__mirrored_by_a_constant(losses, flood_level, per_example):
    """below the level its gradient does not turn around"""
    value = losses if per_example else losses.mean()
    return (value + 2 * (flood_level - value).detach().clamp(min=0)).mean()


def accumulate__each_by_itself(model, loss, microbatches, flood_level):
    """Every microbatch was flooded by itself"""
    n = sum(len(y) for _, y in microbatches)
    model.zero_grad()
    for x, y in microbatches:
        share = (loss(model(x), y) - flood_level).abs() + flood_level
        (share * len(y) / n).backward()


def accumulate__sign_lost(model, loss, microbatches, flood_level):
    """The sign of the flood is lost"""
    n = sum(len(y) for _, y in microbatches)
    model.zero_grad()
    for x, y in microbatches:
        (loss(model(x), y) * len(y) / n).backward()


def accumulate__sizes_ignored(model, loss, microbatches, flood_level):
    """All microbatches weigh the same here"""
    model.zero_grad()
    total = 0.0
    for x, y in microbatches:
        share = loss(model(x), y) / len(microbatches)
        share.backward()
        total += share.item()
    if total < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__sizes_ignored_in_the_sign(model, loss, microbatches, flood_level):
    """a small one has too much weight"""
    n = sum(len(y) for _, y in microbatches)
    model.zero_grad()
    losses = []
    for x, y in microbatches:
        losses.append(loss(model(x), y))
        (losses[-1] * len(y) / n).backward()
    if sum(value.item() for value in losses) / len(losses) < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__sign_of_the_last(model, loss, microbatches, flood_level):
    """not the loss of one microbatch"""
    n = sum(len(y) for _, y in microbatches)
    model.zero_grad()
    for x, y in microbatches:
        value = loss(model(x), y)
        (value * len(y) / n).backward()
    if value < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__sign_before_the_end(model, loss, microbatches, flood_level):
    """before all microbatches had been seen"""
    total, seen, n = 0.0, 0, sum(len(y) for _, y in microbatches)
    model.zero_grad()
    for x, y in microbatches:
        value = loss(model(x), y)
        total, seen = total + value.item() * len(y), seen + len(y)
        sign = 1 if total / seen > flood_level else -1
        (sign * value * len(y) / n).backward()


def accumulate__emptied_in_the_loop(model, loss, microbatches, flood_level):
    """was .grad emptied in the loop?"""
    n = sum(len(y) for _, y in microbatches)
    total = 0.0
    for x, y in microbatches:
        model.zero_grad()
        share = loss(model(x), y) * len(y) / n
        share.backward()
        total += share.item()
    if total < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__stale(model, loss, microbatches, flood_level):
    """before are still in the sum"""
    n = sum(len(y) for _, y in microbatches)
    total = 0.0
    for x, y in microbatches:
        share = loss(model(x), y) * len(y) / n
        share.backward()
        total += share.item()
    if total < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__all_at_once(model, loss, microbatches, flood_level):
    """put together into one batch"""
    x, y = (torch.cat(part) for part in zip(*microbatches))
    model.zero_grad()
    ((loss(model(x), y) - flood_level).abs() + flood_level).backward()


def accumulate__two_passes(model, loss, microbatches, flood_level):
    """went through the model more than once"""
    n = sum(len(y) for _, y in microbatches)
    with torch.no_grad():
        total = sum(loss(model(x), y).item() * len(y) / n for x, y in microbatches)
    model.zero_grad()
    sign = 1 if total > flood_level else -1
    for x, y in microbatches:
        (sign * loss(model(x), y) * len(y) / n).backward()


def accumulate__all_graphs_kept(model, loss, microbatches, flood_level):
    """graphs are all kept until the end"""
    n = sum(len(y) for _, y in microbatches)
    model.zero_grad()
    total = sum(loss(model(x), y) * len(y) / n for x, y in microbatches)
    ((total - flood_level).abs() + flood_level).backward()


def flooded_step__decay_flooded(w, gradient, loss, flood_level, lr, weight_decay):
    """It is not flooded"""
    sign = 1 if loss > flood_level else -1
    return w - lr * sign * (gradient + weight_decay * w)


def flooded_step__level_of_the_full_loss(w, gradient, loss, flood_level, lr, weight_decay):
    """without the weight decay's term"""
    full = loss + weight_decay / 2 * (w**2).sum()
    sign = 1 if full > flood_level else -1
    return w - lr * sign * (gradient + weight_decay * w)


def flooded_step__decayed_twice(w, gradient, loss, flood_level, lr, weight_decay):
    """acts twice, as 2λw"""
    sign = 1 if loss > flood_level else -1
    return (1 - lr * weight_decay) * w - lr * (sign * gradient + weight_decay * w)


def flooded_step__no_decay_below(w, gradient, loss, flood_level, lr, weight_decay):
    """missing below the level"""
    if loss > flood_level:
        return w - lr * (gradient + weight_decay * w)
    return w + lr * gradient


def flooded_step__clamped(w, gradient, loss, flood_level, lr, weight_decay):
    """does not vanish, it turns around"""
    return w - lr * ((gradient if loss > flood_level else 0) + weight_decay * w)


def flooding_effect__wrong_way_round(seeds):
    """flooded minus not flooded"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    end = fit(
        lambda: MLP(40, 32, 10),
        data,
        recipe,
        steps=400,
        seeds=seeds,
        grid={"flood_level": [0.0, 0.3]},
        evaluate_at=[400],
        dtype=torch.float64,
    ).isel(step=0)
    change = end.sel(flood_level=0.0) - end.sel(flood_level=0.3)
    return {
        "test loss": (change.test_loss, "higher"),
        "test error": (change.test_error, "undecided"),
    }


def flooding_effect__exchanged(seeds):
    """another quantity: test error"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    grid, model = {"flood_level": [0.0, 0.3]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=400, seeds=seeds, grid=grid, dtype=torch.float64)
    change = runs.isel(step=-1).diff("flood_level").squeeze("flood_level")

    def verdict(d):
        interval = mean_interval(d)
        return "lower" if interval.high < 0 else "higher" if interval.low > 0 else "undecided"

    return {
        "test loss": (change.test_error, verdict(change.test_error)),
        "test error": (change.test_loss, verdict(change.test_loss)),
    }


def flooding_effect__no_momentum(seeds):
    """There is no difference at all"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1))
    grid, model = {"flood_level": [0.0, 0.3]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=400, seeds=seeds, grid=grid, dtype=torch.float64)
    change = runs.isel(step=-1).diff("flood_level").squeeze("flood_level")
    return {
        "test loss": (change.test_loss, "lower"),
        "test error": (change.test_error, "undecided"),
    }


def flooding_effect__one_step_more(seeds):
    """Go through the settings once more"""
    data = [mnist1d(train_size=200, seed=s) for s in seeds]
    recipe = Recipe(loss=Flooding(), optimizer=SGD(lr=0.1, momentum=0.9))
    grid, model = {"flood_level": [0.0, 0.3]}, lambda: MLP(40, 32, 10)
    runs = fit(model, data, recipe, steps=401, seeds=seeds, grid=grid, dtype=torch.float64)
    change = runs.isel(step=-1).diff("flood_level").squeeze("flood_level")
    return {
        "test loss": (change.test_loss, "lower"),
        "test error": (change.test_error, "undecided"),
    }
