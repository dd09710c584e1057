"""Wrong answers to assignment 3: question__mistake, and what the check must say of it."""


def effective_objective__factor_two(rates):
    """a factor 2 is off in the weight"""
    total = sum(rates)
    return total, -(total**2 - sum(a * a for a in rates)) / 2 / total


def effective_objective__sign(rates):
    """The weight has the wrong sign"""
    total = sum(rates)
    return total, (total**2 - sum(a * a for a in rates)) / 4 / total


def effective_objective__pairs_with_itself(rates):
    """paired with itself"""
    total = sum(rates)
    pairs = sum(a * b for j, a in enumerate(rates) for b in rates[j:])
    return total, -pairs / (2 * total)


def effective_objective__neighbours(rates):
    """not only the first or those of neighbours"""
    total = sum(rates)
    return total, -sum(a * b for a, b in zip(rates, rates[1:])) / (2 * total)


def effective_objective__factor_of_Hg(rates):
    """That is the factor of Hg"""
    total = sum(rates)
    return total, (total**2 - sum(a * a for a in rates)) / 2


def remainder__half(L, theta, eps):
    """A factor 2 is off"""
    g = grad(L)
    slope, curved = jvp(g, (theta,), (g(theta),))
    down = theta - eps * slope
    return down + eps * g(down) - (theta - eps**2 / 2 * curved)


def remainder__old_gradient(L, theta, eps):
    """used the gradient of the old place"""
    g = grad(L)
    slope, curved = jvp(g, (theta,), (g(theta),))
    down = theta - eps * slope
    return down + eps * slope - (theta - eps**2 * curved)


def remainder__at_the_new_place(L, theta, eps):
    """Here one was taken at θ'"""
    g = grad(L)
    down = theta - eps * g(theta)
    slope, curved = jvp(g, (down,), (g(theta),))
    return down + eps * slope - (theta - eps**2 * curved)


def remainder__forms_the_hessian(L, theta, eps):
    """without forming H"""
    g, H = grad(L), torch.func.hessian(L)(theta)
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * H @ g(theta))


def remainder__jacobian_of_the_gradient(L, theta, eps):
    """without forming H"""
    g, H = grad(L), torch.func.jacrev(grad(L))(theta)
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * H @ g(theta))


def remainder__forward_over_the_gradient(L, theta, eps):
    """without forming H"""
    g, H = grad(L), torch.func.jacfwd(grad(L))(theta)
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * H @ g(theta))


def remainder__columns(L, theta, eps):
    """without forming H"""
    g, one = grad(L), torch.eye(len(theta), dtype=theta.dtype)
    H = torch.stack([jvp(g, (theta,), (e,))[1] for e in one], dim=1)
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * H @ g(theta))


def remainder__row_by_row(L, theta, eps):
    """without forming H"""
    w = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(L(w), w, create_graph=True)
    Hg = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0] @ g for x in g])
    down = theta - eps * g
    return (down + eps * grad(L)(down) - (theta - eps**2 * Hg)).detach()


def remainder__another_hessian(L, theta, eps):
    """without forming H"""
    g, H = grad(L), getattr(torch.autograd.functional, "hess" + "ian")(L, theta)
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * H @ g(theta))


def remainder__jvp_of_the_loss(L, theta, eps):
    """jvp of L is the number"""
    g = grad(L)
    _, curved = jvp(L, (theta,), (g(theta),))
    down = theta - eps * g(theta)
    return down + eps * g(down) - (theta - eps**2 * curved)


def two_rate_loss__factor_two(L, theta, eps1, eps2):
    """A factor 2 is off in the weight"""
    return L(theta) + eps1 * eps2 / (eps1 - eps2) * (grad(L)(theta) ** 2).sum()


def two_rate_loss__detached(L, theta, eps1, eps2):
    """The penalty has no gradient"""
    slope = grad(L)(theta).detach()
    return L(theta) + eps1 * eps2 / (2 * (eps1 - eps2)) * (slope**2).sum()


def two_rate_loss__not_squared(L, theta, eps1, eps2):
    """The length is not squared"""
    return L(theta) + eps1 * eps2 / (2 * (eps1 - eps2)) * grad(L)(theta).norm()


def two_rate_loss__after_the_step_down(L, theta, eps1, eps2):
    """are taken at θ, where"""
    slope = grad(L)(theta - eps1 * grad(L)(theta))
    return L(theta) + eps1 * eps2 / (2 * (eps1 - eps2)) * (slope**2).sum()


def two_rate_loss__mean_of_squares(L, theta, eps1, eps2):
    """the sum of the squared entries"""
    return L(theta) + eps1 * eps2 / (2 * (eps1 - eps2)) * (grad(L)(theta) ** 2).mean()


def two_rate_loss__graph_not_kept(L, theta, eps1, eps2):
    """create_graph=True keeps it"""
    value = L(theta)
    (slope,) = torch.autograd.grad(value, theta)
    return value + eps1 * eps2 / (2 * (eps1 - eps2)) * (slope**2).sum()


def difference_penalty__not_divided(gradient, theta, penalty, radius):
    """not divided by the radius"""
    g = gradient(theta)
    return g + penalty * (gradient(theta + radius * g) - g)


def difference_penalty__unit_step(gradient, theta, penalty, radius):
    """that is SAM's"""
    g = gradient(theta)
    return g + penalty / radius * (gradient(theta + radius * g / g.norm()) - g)


def difference_penalty__no_radius(gradient, theta, penalty, radius):
    """taken at θ + g"""
    g = gradient(theta)
    return g + penalty / radius * (gradient(theta + g) - g)


def difference_penalty__exact(gradient, theta, penalty, radius):
    """This is the exact form"""
    g = gradient(theta)
    return g + penalty * jvp(gradient, (theta,), (g,))[1]


def difference_penalty__three_calls(gradient, theta, penalty, radius):
    """computed 3 times"""
    g = gradient(theta)
    return g + penalty / radius * (gradient(theta + radius * g) - gradient(theta))


def level_walk__endless(seeds):
    """never ends"""
    step = 0
    while step < 600:
        pass


def level_walk__norm(seeds):
    """norm of the gradient, not squared"""

    def slope(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return sum((part**2).sum() for part in slopes.values()) ** 0.5

    early, late = list(range(100, 200, 10)), list(range(510, 610, 10))
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=seeds,
        evaluate_at=early + late,
        dtype=torch.float64,
        instruments={"slope": slope},
    )
    change = runs.sel(step=late).mean("step") - runs.sel(step=early).mean("step")
    return {
        "squared gradient": (change.slope, "lower"),
        "test error": (change.test_error, "higher"),
    }


def level_walk__ten_steps_early(seeds):
    """Go through the settings once more"""

    def slope(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return sum((part**2).sum() for part in slopes.values())

    early, late = list(range(100, 200, 10)), list(range(500, 600, 10))
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=seeds,
        evaluate_at=early + late,
        dtype=torch.float64,
        instruments={"slope": slope},
    )
    change = runs.sel(step=late).mean("step") - runs.sel(step=early).mean("step")
    return {
        "squared gradient": (change.slope, "lower"),
        "test error": (change.test_error, "higher"),
    }


def level_walk__median(seeds):
    """Go through the settings once more"""

    def slope(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return sum((part**2).sum() for part in slopes.values())

    early, late = list(range(100, 200, 10)), list(range(510, 610, 10))
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        mnist1d(train_size=100),
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=seeds,
        evaluate_at=early + late,
        dtype=torch.float64,
        instruments={"slope": slope},
    )
    change = runs.sel(step=late).median("step") - runs.sel(step=early).median("step")
    return {
        "squared gradient": (change.slope, "lower"),
        "test error": (change.test_error, "higher"),
    }


def level_walk__data_set_per_seed(seeds):
    """Go through the settings once more"""

    def slope(network, params, x, y):
        slopes = grad(lambda p: F.cross_entropy(network(p, x), y))(params)
        return sum((part**2).sum() for part in slopes.values())

    early, late = list(range(100, 200, 10)), list(range(510, 610, 10))
    runs = fit(
        lambda: MLP(40, 16, 10, activation=torch.nn.Tanh),
        [mnist1d(train_size=100, seed=s) for s in seeds],
        Recipe(loss=Flooding(0.5), optimizer=SGD(lr=1.0)),
        steps=600,
        batch_size=None,
        seeds=seeds,
        evaluate_at=early + late,
        dtype=torch.float64,
        instruments={"slope": slope},
    )
    change = runs.sel(step=late).mean("step") - runs.sel(step=early).mean("step")
    return {
        "squared gradient": (change.slope, "lower"),
        "test error": (change.test_error, "higher"),
    }
