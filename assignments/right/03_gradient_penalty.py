"""Right answers to assignment 3, written differently: each must earn its question's points."""

import itertools

import numpy as np
import torch
from torch.func import grad, jvp, vjp

# ------------------------------------------------------------------ question 1: any sequence of steps


def effective_objective__loops(rates):
    total, pairs = 0.0, 0.0
    for j, a in enumerate(rates):
        total += a
        for b in rates[j + 1 :]:
            pairs += a * b
    return total, -pairs / 2 / total


def effective_objective__combinations(rates):
    total = sum(rates)
    return [total, -sum(a * b for a, b in itertools.combinations(rates, 2)) / (2 * total)]


def effective_objective__numpy(rates):
    a = np.array(rates)
    return np.array([a.sum(), -(a.sum() ** 2 - (a**2).sum()) / (4 * a.sum())])


def effective_objective__numpy_scalars(rates):
    a = np.asarray(rates)
    return a.sum(), -np.triu(np.outer(a, a), 1).sum() / (2 * a.sum())


def effective_objective__torch(rates):
    a = torch.tensor(rates, dtype=torch.float64)
    return a.sum(), -torch.triu(a[:, None] * a, 1).sum() / (2 * a.sum())


def effective_objective__one_tensor(rates):
    a = torch.tensor(rates, dtype=torch.float64)
    pairs = torch.einsum("i,j->ij", a, a).triu(1).sum()
    return torch.stack([a.sum(), -pairs / (2 * a.sum())])


def effective_objective__single_precision(rates):
    a = torch.tensor(rates)
    return a.sum(), (a.square().sum() - a.sum() ** 2) / (4 * a.sum())


def effective_objective__step_by_step(rates):
    """Composes the steps on L = h w² / 2: the factor is a polynomial in h."""
    factor = np.polynomial.Polynomial([1.0])
    for a in rates:
        factor *= np.polynomial.Polynomial([1.0, -a])
    linear, quadratic = factor.coef[1], factor.coef[2]
    return -linear, quadratic / (2 * linear)


# --------------------------------------------------------------------- question 2: the Taylor remainder


def remainder__autograd(L, theta, eps):
    (g,) = torch.autograd.grad(L(theta), theta, create_graph=True)
    (Hg,) = torch.autograd.grad(g, theta, g.detach())
    down = (theta - eps * g).detach().requires_grad_()
    (there,) = torch.autograd.grad(L(down), down)
    return down + eps * there - theta + eps**2 * Hg


def remainder__half_the_squared_length(L, theta, eps):
    theta.requires_grad_()
    (g,) = torch.autograd.grad(L(theta), theta, create_graph=True)
    (Hg,) = torch.autograd.grad(g @ g / 2, theta)
    down = theta - eps * g
    return (down + eps * grad(L)(down) - (theta - eps**2 * Hg)).detach()


def remainder__backward(L, theta, eps):
    w = theta.detach().clone().requires_grad_()
    L(w).backward(create_graph=True)
    g = w.grad.clone()
    (Hg,) = torch.autograd.grad(0.5 * g.square().sum(), w)
    down = (w - eps * g).detach().requires_grad_()
    L(down).backward()
    return (down + eps * down.grad - (w - eps**2 * Hg)).detach()


def remainder__a_clone_that_requires_grad(L, theta, eps):
    t = theta.clone().requires_grad_()
    L(t).backward()
    g, slope = t.grad, grad(L)
    down = theta - eps * g
    return down + eps * slope(down) - (theta - eps**2 * jvp(slope, (theta,), (g,))[1])


def remainder__backward_on_theta(L, theta, eps):
    """As if theta required grad."""
    L(theta).backward(create_graph=True)
    g = theta.grad.clone()
    (Hg,) = torch.autograd.grad(g, theta, g.detach())
    down = (theta - eps * g).detach()
    return down + eps * grad(L)(down) - theta + eps**2 * Hg


def remainder__hvp(L, theta, eps):
    slope = grad(L)
    g = slope(theta)
    down, Hg = theta - eps * g, torch.autograd.functional.hvp(L, theta, g)[1]
    return down + eps * slope(down) - (theta - eps**2 * Hg)


def remainder__numpy(L, theta, eps):
    slope = grad(L)
    g, Hg = (part.numpy() for part in jvp(slope, (theta,), (slope(theta),)))
    down = theta.numpy() - eps * g
    return down + eps * slope(torch.from_numpy(down)).numpy() - theta.numpy() + eps**2 * Hg


def remainder__vjp(L, theta, eps):
    g, times = vjp(grad(L), theta)
    down = theta - eps * g
    return down + eps * grad(L)(down) - theta + eps**2 * times(g)[0]


def remainder__grad_of_square(L, theta, eps):
    slope = grad(L)
    Hg = grad(lambda t: (slope(t) ** 2).sum() / 2)(theta)
    down = theta - eps * slope(theta)
    return down + eps * slope(down) - (theta - eps**2 * Hg)


def remainder__in_place_on_a_copy(L, theta, eps):
    slope = grad(L)
    w = theta.detach().clone()
    g, Hg = jvp(slope, (w,), (slope(w),))
    left = -w + eps**2 * Hg
    w -= eps * g
    w += eps * slope(w)
    left += w
    return left


def remainder__as_an_array(L, theta, eps):
    slope = grad(L)
    g, Hg = jvp(slope, (theta,), (slope(theta),))
    down = theta - eps * g
    return (eps * (slope(down) - g) + eps**2 * Hg).detach().numpy()


def remainder__in_a_loop(L, theta, eps):
    slope, place = grad(L), theta
    for rate in (eps, -eps):
        place = place - rate * slope(place)
    return place - theta + eps**2 * jvp(slope, (theta,), (slope(theta),))[1]


# ------------------------------------------------------------- question 3: the objective of two rates


def two_rate_loss__autograd(L, theta, eps1, eps2):
    value = L(theta)
    (g,) = torch.autograd.grad(value, theta, create_graph=True)
    return value + eps1 * eps2 / (2 * (eps1 - eps2)) * g @ g


def two_rate_loss__requires_grad(L, theta, eps1, eps2):
    theta.requires_grad_()
    g = torch.autograd.grad(L(theta), theta, create_graph=True)[0]
    return L(theta) + 0.5 * eps1 * eps2 / (eps1 - eps2) * g.pow(2).sum()


def two_rate_loss__norm(L, theta, eps1, eps2):
    return L(theta) + grad(L)(theta).norm() ** 2 * eps1 * eps2 / (eps1 - eps2) / 2


def two_rate_loss__grad_and_value(L, theta, eps1, eps2):
    g, value = torch.func.grad_and_value(L)(theta)
    return value + torch.dot(g, g) / (2 * (1 / eps2 - 1 / eps1))


def two_rate_loss__einsum(L, theta, eps1, eps2):
    g = grad(L)(theta)
    return torch.einsum("i,i->", g, g) * (eps1 * eps2) / (2 * eps1 - 2 * eps2) + L(theta)


def two_rate_loss__jvp(L, theta, eps1, eps2):
    """‖g‖² is the derivative of L along g."""
    g = grad(L)(theta)
    value, square = jvp(L, (theta,), (g,))
    return value + eps1 * eps2 * square / (2 * (eps1 - eps2))


def two_rate_loss__vjp(L, theta, eps1, eps2):
    value, times = vjp(L, theta)
    (g,) = times(torch.ones_like(value))
    return value + eps1 * eps2 * (g * g).sum() / 2 / (eps1 - eps2)


def two_rate_loss__finite_differences(L, theta, eps1, eps2):
    steps = 1e-3 * torch.eye(len(theta), dtype=theta.dtype)
    g = torch.stack([(L(theta + e) - L(theta - e)) / 2e-3 for e in steps])
    return L(theta) + eps1 * eps2 / (2 * (eps1 - eps2)) * (g**2).sum()


def two_rate_loss__a_shape_of_one(L, theta, eps1, eps2):
    g = grad(L)(theta)
    return torch.add(L(theta), (g**2).sum(), alpha=eps1 * eps2 / (2 * (eps1 - eps2)))


# --------------------------------------------------------- question 4: a penalty without a Hessian


def difference_penalty__mixture(gradient, theta, penalty, radius):
    """(1 - α) g + α g(θ + r g)"""
    g, alpha = gradient(theta), penalty / radius
    return (1 - alpha) * g + alpha * gradient(theta + radius * g)


def difference_penalty__named(gradient, theta, penalty, radius):
    here = gradient(theta)
    there = gradient(theta + radius * here)
    Hg = (there - here) / radius
    return here + penalty * Hg


def difference_penalty__in_place(gradient, theta, penalty, radius):
    g = gradient(theta).clone()
    there = gradient(theta + radius * g)
    there -= g
    there *= penalty / radius
    there += g
    return there


def difference_penalty__add(gradient, theta, penalty, radius):
    g = gradient(theta)
    return torch.add(g, gradient(torch.add(theta, g, alpha=radius)) - g, alpha=penalty / radius)


def difference_penalty__lerp(gradient, theta, penalty, radius):
    g = gradient(theta)
    return torch.lerp(g, gradient(theta + radius * g), penalty / radius)


def difference_penalty__numpy(gradient, theta, penalty, radius):
    g = gradient(theta).detach().numpy()
    there = gradient(theta + radius * torch.from_numpy(g)).detach().numpy()
    return g + penalty * (there - g) / radius


def difference_penalty__numpy_theta(gradient, theta, penalty, radius):
    g = gradient(theta).numpy()
    there = gradient(torch.tensor(theta.numpy() + radius * g)).numpy()
    return g + penalty / radius * (there - g)


def difference_penalty__a_clone_that_requires_grad(gradient, theta, penalty, radius):
    t = theta.clone().requires_grad_()
    g = gradient(t)
    return (g + penalty / radius * (gradient(t + radius * g) - g)).detach()


def difference_penalty__requires_grad(gradient, theta, penalty, radius):
    theta.requires_grad_()
    g = gradient(theta)
    return g + penalty / radius * (gradient(theta + radius * g) - g)


def difference_penalty__loop(gradient, theta, penalty, radius):
    g = gradient(theta)
    there = gradient(theta + radius * g)
    return torch.stack([a + penalty * (b - a) / radius for a, b in zip(g, there)])


def difference_penalty__no_grad(gradient, theta, penalty, radius):
    g = gradient(theta.detach()).detach()
    with torch.no_grad():
        displaced = theta + radius * g
    return g + penalty / radius * (gradient(displaced).detach() - g)
