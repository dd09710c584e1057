"""Wrong answers to assignment 6: question__mistake, and what the check must say of it."""


def sharpest_stable__gradient_descent(eta, rho):
    """gradient descent's limit"""
    return 2 / eta


def sharpest_stable__monotone(eta, rho):
    """which is at a factor of -1, not 0"""
    return 2 / (eta * (1 + math.sqrt(1 + 4 * rho / eta)))


def sharpest_stable__roots_cancel(eta, rho):
    """a difference of two nearly equal roots"""
    return (math.sqrt(1 + 8 * rho / eta) - 1) / (2 * rho) if rho > 0 else 2 / eta


def sharpest_stable__radius_times_weight(eta, rho):
    """so it is ρ h w"""
    return 2 / (eta * (1 + rho))


def sharpest_stable__small_radius(eta, rho):
    """For a small ρ it is near 2/η, not equal"""
    return 2 / eta if rho < 1e-3 else (math.sqrt(1 + 8 * rho / eta) - 1) / (2 * rho)


def sharpest_stable__climbs_down(eta, rho):
    """That is the limit for w - ρ g"""
    if rho > eta / 8:
        return 1 / rho
    return 4 / (eta + math.sqrt(eta**2 - 8 * eta * rho))


def sharpest_stable__added(eta, rho):
    """η and ρ do not add up"""
    return 2 / (eta + rho)


def climb__all_of_rho(gradients, rho, p):
    """Every one of the largest got all of ρ"""
    u = [g / max(g.abs().max() for g in gradients) for g in gradients]
    if p == 1:
        return [rho * x.sign() * (x.abs() == 1) for x in u]
    v = [x.sign() * x.abs() ** (1 / (p - 1)) for x in u]
    return [rho * x / torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p) for x in v]


def climb__near_one(gradients, rho, p):
    """A p near 1 is not p = 1"""
    p = max(p, 1.001)
    u = [g / max(g.abs().max() for g in gradients) for g in gradients]
    v = [x.sign() * x.abs() ** (1 / (p - 1)) for x in u]
    return [rho * x / torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p) for x in v]


def climb__square_of_the_norm(gradients, rho, p):
    """divided by the square of its norm"""
    u = [g / max(g.abs().max() for g in gradients) for g in gradients]
    v = [x.sign() * x.abs() ** (1 / (p - 1) if p > 1 else math.inf) for x in u]
    length = torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p)
    return [rho * x / length**2 for x in v]


def climb__wrong_conjugate(gradients, rho, p):
    """The wrong conjugate exponent"""
    v = [g.sign() * g.abs() ** (p - 1) for g in gradients]
    return [rho * x / torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p) for x in v]


def climb__each_tensor(gradients, rho, p):
    """Each tensor was brought to the length"""
    v = [g if p == 2 else g.sign() * (g.abs() / g.abs().max()) ** (1 / (p - 1)) for g in gradients]
    return [rho * x / torch.linalg.vector_norm(x, p) for x in v]


def climb__no_root(gradients, rho, p):
    """The root is missing"""
    top = max(g.abs().max() for g in gradients)
    if p in (1, math.inf):
        return [rho * g.sign() * ((g.abs() == top) | (p > 1)) for g in gradients]
    q = p / (p - 1)
    total = sum((g.abs() ** q).sum() for g in gradients)
    return [rho * g.sign() * g.abs() ** (q - 1) / total for g in gradients]


def climb__sign_lost_at_one(gradients, rho, p):
    """The sign of the gradient is lost"""
    top = max(g.abs().max() for g in gradients)
    if top == 0:
        return [torch.zeros_like(g) for g in gradients]
    if p == 1:
        return [rho * (g.abs() == top).to(g.dtype) for g in gradients]
    v = [g.sign() * (g.abs() / top) ** (1 / (p - 1)) for g in gradients]
    return [rho * x / torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p) for x in v]


def climb__underflows(gradients, rho, p):
    """underflows to 0 there"""
    if p == 1:
        largest = max(g.abs().max() for g in gradients)
        ties = sum((g.abs() == largest).sum() for g in gradients)
        return [torch.where(g.abs() == largest, rho * g.sign() / ties, 0) for g in gradients]
    v = [g.sign() * g.abs() ** (1 / (p - 1)) for g in gradients]
    return [rho * x / torch.linalg.vector_norm(torch.cat([y.flatten() for y in v]), p) for x in v]


def climb__zero_over_zero(gradients, rho, p):
    """there is a NaN in it"""
    largest = max(g.abs().max() for g in gradients)
    if p == 2:
        length = torch.cat([g.flatten() for g in gradients]).norm()
        return [rho * g / length.clamp_min(1e-30) for g in gradients]
    u = [g / largest for g in gradients]
    if p == 1:
        v = [torch.where(x.abs() == 1, x, 0) for x in u]
    else:
        v = [x.sign() * x.abs() ** (1 / (p - 1)) for x in u]
    length = torch.linalg.vector_norm(torch.cat([x.flatten() for x in v]), p)
    return [rho * x / length for x in v]


def _climb(weights, rho):
    """From w to w + ε̂, by .grad; returns w."""
    with torch.no_grad():
        length = torch.cat([w.grad.flatten() for w in weights]).norm()
        kept = [w.clone() for w in weights]
        for w in weights:
            w += rho * w.grad / length
    return kept


def _restore(weights, kept):
    with torch.no_grad():
        for w, old in zip(weights, kept):
            w.copy_(old)


def sam_step__not_restored(model, loss, optimizer, rho):
    """The weights were not restored"""
    weights = list(model.parameters())
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    with torch.no_grad():
        length = torch.cat([w.grad.flatten() for w in weights]).norm()
        for w in weights:
            w += rho * w.grad / length
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    return clean.item()


def sam_step__subtracts(model, loss, optimizer, rho):
    """is not w in floating point"""
    weights = list(model.parameters())
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    with torch.no_grad():
        length = torch.cat([w.grad.flatten() for w in weights]).norm()
        moves = [rho * w.grad / length for w in weights]
        for w, e in zip(weights, moves):
            w += e
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for w, e in zip(weights, moves):
            w -= e
    optimizer.step()
    return clean.item()


def sam_step__gradients_added(model, loss, optimizer, rho):
    """Both gradients were added up"""
    weights = list(model.parameters())
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__loss_up_there(model, loss, optimizer, rho):
    """what one logs is the loss at w"""
    weights = list(model.parameters())
    optimizer.zero_grad()
    loss().backward()
    kept = _climb(weights, rho)
    optimizer.zero_grad()
    worst = loss()
    worst.backward()
    _restore(weights, kept)
    optimizer.step()
    return worst.item()


def sam_step__made_anew(model, loss, optimizer, rho):
    """optimizer made anew?"""
    weights = list(model.parameters())
    optimizer = type(optimizer)(weights, **optimizer.defaults)
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    optimizer.zero_grad()
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__optimizer_ignored(model, loss, optimizer, rho):
    """let the optimizer that was given make it"""
    weights = list(model.parameters())
    clean = loss()
    slopes = torch.autograd.grad(clean, weights)
    length = torch.cat([g.flatten() for g in slopes]).norm()
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes):
            w += rho * g / length
    slopes = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for w, old, g in zip(weights, kept, slopes):
            w.copy_(old - optimizer.param_groups[0]["lr"] * g)
    return clean.item()


def sam_step__each_tensor(model, loss, optimizer, rho):
    """one vector with one norm"""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    with torch.no_grad():
        kept = [w.clone() for w in weights]
        for w in weights:
            w += rho * w.grad / w.grad.norm()
    optimizer.zero_grad()
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__stale_gradients(model, loss, optimizer, rho):
    """Gradients from before the call"""
    weights = [w for w in model.parameters() if w.requires_grad]
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    optimizer.zero_grad()
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__descends_the_rise(model, loss, optimizer, rho):
    """That descends the rise"""
    weights = [w for w in model.parameters() if w.requires_grad]
    clean = loss()
    slopes = torch.autograd.grad(clean, weights)
    length = torch.cat([g.flatten() for g in slopes]).norm()
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes):
            w += rho * g / length
    optimizer.zero_grad()
    (loss() - clean.detach()).backward()
    with torch.no_grad():
        for w, old, g in zip(weights, kept, slopes):
            w.copy_(old)
            w.grad -= g
    optimizer.step()
    return clean.item()


def sam_step__followed_by_gradients(model, loss, optimizer, rho):
    """no gradient may follow it"""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    length = torch.cat([w.grad.flatten() for w in weights]).norm()
    for w in weights:
        w += rho * w.grad / length
    return clean.item()


def sam_step__restored_late(model, loss, optimizer, rho):
    """go back to w first"""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    with torch.no_grad():
        length = torch.cat([w.grad.flatten() for w in weights]).norm()
        moves = [rho * w.grad / length for w in weights]
        for w, e in zip(weights, moves):
            w += e
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    with torch.no_grad():
        for w, e in zip(weights, moves):
            w -= e
    return clean.item()


def sam_step__all_have_a_gradient(model, loss, optimizer, rho):
    """leave those with requires_grad=False out"""
    weights = list(model.parameters())
    optimizer.zero_grad()
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    optimizer.zero_grad()
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__frozen_gradients_kept(model, loss, optimizer, rho):
    """An old .grad was left in it"""
    weights = [w for w in model.parameters() if w.requires_grad]
    for w in weights:
        w.grad = None
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    for w in weights:
        w.grad = None
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def sam_step__frozen_gradients_zero(model, loss, optimizer, rho):
    """or a zero, to which the optimizer adds weight decay"""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer.zero_grad(set_to_none=False)
    clean = loss()
    clean.backward()
    kept = _climb(weights, rho)
    optimizer.zero_grad(set_to_none=False)
    loss().backward()
    _restore(weights, kept)
    optimizer.step()
    return clean.item()


def adaptive_climb__signs_of_w(w, gradient, rho):
    """The sign of the gradient is lost"""
    return rho * w * (w * gradient).abs() / (w * gradient).norm()


def adaptive_climb__once(w, gradient, rho):
    """T is there once"""
    stretched = w.abs() * gradient
    return rho * stretched / stretched.norm()


def adaptive_climb__plain(w, gradient, rho):
    """the ball does not stretch"""
    return rho * gradient / gradient.norm()


def adaptive_climb__inverted(w, gradient, rho):
    """T is inverted"""
    shrunk = gradient / w.abs()
    return rho * shrunk / w.abs() / shrunk.norm()


def adaptive_climb__signed(w, gradient, rho):
    """the signs of w have come in"""
    stretched = w * gradient
    return rho * w.abs() * stretched / stretched.norm()


def sam_effect__unfair(seeds):
    """Go through the settings once more"""
    data = [mnist1d(train_size=300, label_noise=0.3, seed=s) for s in seeds]
    sgd = SGD(lr=0.1, momentum=0.9, schedule="cosine")

    def train(recipe):
        return fit(
            lambda: MLP(40, 32, 10),
            data,
            recipe,
            steps=150,
            seeds=seeds,
            evaluate_at=[150],
            dtype=torch.float64,
        ).isel(step=0)

    change = train(Recipe(gradient=SAM(rho=0.5), optimizer=sgd)) - train(Recipe(optimizer=sgd))
    return {
        "training error": (change.train_error, "higher"),
        "test error": (change.test_error, "lower"),
    }


def sam_effect__normal_quantile(seeds):
    """your interval is too narrow"""
    data = [mnist1d(train_size=300, label_noise=0.3, seed=s) for s in seeds]
    sgd, model = SGD(lr=0.1, momentum=0.9, schedule="cosine"), lambda: MLP(40, 32, 10)

    def end(recipe, steps):
        runs = fit(model, data, recipe, steps=steps, seeds=seeds, dtype=torch.float64)
        return runs.isel(step=-1, drop=True)

    def verdict(d):
        half = 1.96 * float(d.std(ddof=1)) / len(d) ** 0.5
        return "undecided" if abs(d.mean()) <= half else "lower" if d.mean() < 0 else "higher"

    change = end(Recipe(gradient=SAM(rho=0.5), optimizer=sgd), 150) - end(
        Recipe(optimizer=sgd), 300
    )
    return {
        "training error": (change.train_error, verdict(change.train_error)),
        "test error": (change.test_error, verdict(change.test_error)),
    }
