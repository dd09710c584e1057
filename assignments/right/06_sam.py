"""Right answers to assignment 6, written differently: each must earn its question's points."""

import copy
import math
from decimal import Decimal

import numpy as np
import scipy.optimize
import torch
from torch import nn

# ------------------------------------------------------------- question 1: how sharp may it be


def sharpest_stable__case_of_zero(eta, rho):
    if rho < 1e-9:
        return 2 / eta * (1 - 2 * rho / eta)
    return (-1 + math.sqrt(1 + 8 * rho / eta)) / (2 * rho)


def sharpest_stable__denominator(eta, rho):
    return 4 / (eta + math.sqrt(eta * eta + 8 * rho * eta))


def sharpest_stable__hypot(eta, rho):
    return 4 / (eta + math.hypot(eta, math.sqrt(8 * eta * rho)))


def sharpest_stable__numpy(eta, rho):
    return np.float64(4.0) / (eta * (1 + np.sqrt(1 + 8 * rho / eta)))


def sharpest_stable__expm1(eta, rho):
    if rho == 0:
        return 2 / eta
    return math.expm1(0.5 * math.log1p(8 * rho / eta)) / (2 * rho)


def sharpest_stable__torch_scalar(eta, rho):
    eta, rho = torch.tensor(eta, dtype=torch.float64), torch.tensor(rho, dtype=torch.float64)
    return 4 / (eta * (1 + torch.sqrt(1 + 8 * rho / eta)))


def sharpest_stable__single_precision(eta, rho):
    x = torch.tensor([eta, rho])
    return 4 / (x[0] * (1 + (1 + 8 * x[1] / x[0]).sqrt()))


def sharpest_stable__brentq(eta, rho):
    return scipy.optimize.brentq(lambda h: eta * h * (1 + rho * h) - 2, 0, 2 / eta + 1)


def sharpest_stable__bisection(eta, rho):
    low, high = 0.0, 4 / eta
    for _ in range(200):
        h = (low + high) / 2
        if abs(1 - eta * h * (1 + rho * h)) <= 1:
            low = h
        else:
            high = h
    return low


def sharpest_stable__newton(eta, rho):
    h = 2 / eta
    for _ in range(100):
        h -= (eta * h * (1 + rho * h) - 2) / (eta * (1 + 2 * rho * h))
    return np.array(h)


def sharpest_stable__fixed_point_of_a_fraction(eta, rho):
    h = 2 / eta
    for _ in range(20_000):
        h = 0.5 * h + 0.5 * 2 / (eta * (1 + rho * h))
    return h


def sharpest_stable__decimal(eta, rho):
    eta, rho = Decimal(eta), Decimal(rho)
    if not rho:
        return 2 / eta
    return ((1 + 8 * rho / eta).sqrt() - 1) / (2 * rho)


# ---------------------------------------------------------- question 2: the worst direction, any p


def one_vector(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def as_list(flat, gradients):
    parts = torch.split(flat, [g.numel() for g in gradients])
    return [part.reshape(g.shape) for part, g in zip(parts, gradients)]


def climb__flat(gradients, rho, p):
    g = one_vector(gradients)
    top = g.abs().max()
    if top == 0:
        return [torch.zeros_like(x) for x in gradients]
    if p == 1:
        e = torch.zeros_like(g)
        e[g.abs().argmax()] = rho * g[g.abs().argmax()].sign()
        return as_list(e, gradients)
    q = 1 if p == math.inf else p / (p - 1)
    u = g.abs() / top
    v = g.sign() * u ** (q - 1)
    return as_list(rho * v / (u**q).sum() ** (1 / p), gradients)


def climb__in_double(gradients, rho, p):
    """In double precision |g|^10 does not underflow."""
    flat = one_vector(gradients).double()
    if not flat.any():
        return [0 * g for g in gradients]
    if p == 1:
        v = torch.where(flat.abs() == flat.abs().max(), flat.sign(), 0.0)
        v /= v.abs().sum()
    elif p == math.inf:
        v = flat.sign()
    else:
        v = flat.sign() * flat.abs() ** (1 / (p - 1))
        v /= (v.abs() ** p).sum() ** (1 / p)
    return [part.to(g.dtype) for part, g in zip(as_list(rho * v, gradients), gradients)]


def climb__logarithms(gradients, rho, p):
    flat = one_vector(gradients)
    size = flat.abs()
    if size.max() == 0:
        return as_list(flat.clone(), gradients)
    if p == 1:
        e = torch.zeros_like(flat)
        i = size.argmax()
        e[i] = rho * torch.sign(flat[i])
    elif math.isinf(p):
        e = rho * torch.sign(flat)
    else:
        logs = (size / size.max()).log()
        q = p / (p - 1)
        e = rho * flat.sign() * torch.exp((q - 1) * logs - torch.logsumexp(q * logs, 0) / p)
    return as_list(e, gradients)


def climb__gradient_of_the_dual_norm(gradients, rho, p):
    """The best step is ρ times the gradient of ‖g‖_q."""
    top = max(g.abs().max() for g in gradients)
    if top == 0:
        return [torch.zeros_like(g) for g in gradients]
    q = math.inf if p == 1 else 1 if p == math.inf else p / (p - 1)
    leaves = [(g / top).detach().requires_grad_() for g in gradients]
    norm = torch.linalg.vector_norm(one_vector(leaves), q)
    return [rho * e for e in torch.autograd.grad(norm, leaves)]


def climb__numpy(gradients, rho, p):
    arrays = [g.numpy().astype(np.float64) for g in gradients]
    top = max(np.abs(a).max() for a in arrays)
    if top == 0:
        return [np.zeros_like(a) for a in arrays]
    with np.errstate(divide="ignore"):
        exponent = np.inf if p == 1 else 1 / (p - 1)
    raised = [np.sign(a) * (np.abs(a) / top) ** exponent for a in arrays]
    flat = np.concatenate([v.ravel() for v in raised])
    length = np.abs(flat).max() if p == np.inf else (np.abs(flat) ** p).sum() ** (1 / p)
    return [rho * v / length for v in raised]


def climb__in_place_on_a_copy(gradients, rho, p):
    moves = [g.clone() for g in gradients]
    top = max(float(g.abs().max()) for g in gradients)
    if top:
        for v in moves:
            v /= top
            exponent = 1 / (p - 1) if p > 1 else math.inf
            v.copy_(v.sign() * v.abs().pow(exponent))
        length = one_vector(moves).norm(p)
        for v in moves:
            v.mul_(rho / length)
    return tuple(moves)


def climb__foreach(gradients, rho, p):
    top = torch.stack([g.abs().amax() for g in gradients]).amax().clamp_min(1e-30)
    u = torch._foreach_div(gradients, top.item())
    if p == 1:
        v = [x * (x.abs() >= 1) for x in u]
    else:
        v = [torch.copysign(x.abs() ** (1 / (p - 1)), x) * (x != 0) for x in u]
    norms = torch.stack(torch._foreach_norm(v, p))
    length = torch.linalg.vector_norm(norms, p).clamp_min(1e-30)
    return [rho / length * x for x in v]


def climb__two_branches(gradients, rho, p):
    g = one_vector(gradients)
    if g.norm() == 0:
        return [torch.zeros(x.shape, dtype=x.dtype) for x in gradients]
    if p == 2:
        return [rho * x / g.norm() for x in gradients]
    if p == float("inf"):
        return [rho * x.sign() for x in gradients]
    if p == 1:
        top = g.abs().max()
        ties = (g.abs() == top).sum()
        return [rho * x.sign() * (x.abs() == top) / ties for x in gradients]
    u = g / g.abs().max()
    q = 1 / (1 - 1 / p)
    e = rho * u.sign() * u.abs() ** (q - 1) / u.abs().pow(q).sum().pow(1 / p)
    return as_list(e, gradients)


def climb__looped(gradients, rho, p):
    numbers = [float(x) for g in gradients for x in g.flatten()]
    top = max(map(abs, numbers))
    if top == 0:
        return [g.detach().clone() for g in gradients]
    if p == 1:
        best = max(range(len(numbers)), key=lambda i: abs(numbers[i]))
        steps = [rho * math.copysign(i == best, x) for i, x in enumerate(numbers)]
    else:
        raised = [math.copysign(abs(x / top) ** (1 / (p - 1)), x) for x in numbers]
        length = 1 if p == math.inf else sum(abs(v) ** p for v in raised) ** (1 / p)
        steps = [rho * v / length for v in raised]
    return as_list(torch.tensor(steps, dtype=gradients[0].dtype), gradients)


def climb__the_first_of_the_largest(gradients, rho, p):
    if p > 1:
        return climb__in_double(gradients, rho, p)
    tops = [float(g.abs().max()) for g in gradients]
    first, moves = tops.index(max(tops)), [torch.zeros_like(g) for g in gradients]
    where = gradients[first].abs().argmax()
    moves[first].view(-1)[where] = rho * gradients[first].flatten()[where].sign()
    return moves


def climb__single_precision(gradients, rho, p):
    flat = one_vector(gradients).float()
    u = flat / flat.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    v = (u.abs() == 1) * u if p == 1 else u.sign() * u.abs() ** (1 / (p - 1))
    length = torch.linalg.norm(v, p)
    return as_list(rho * v / torch.where(length > 0, length, 1.0), gradients)


# ---------------------------------------------------------------------- question 3: a step of SAM


def sam_step__state_dict(model, loss, optimizer, rho):
    kept = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    value = loss()
    value.backward()
    weights = [w for w in model.parameters() if w.requires_grad]
    norm = torch.sqrt(sum((w.grad**2).sum() for w in weights))
    with torch.no_grad():
        for w in weights:
            w.add_(w.grad, alpha=(rho / norm).item())
    model.zero_grad()
    loss().backward()
    model.load_state_dict(kept)
    optimizer.step()
    return value.item()


def sam_step__autograd(model, loss, optimizer, rho):
    weights = [w for w in model.parameters() if w.requires_grad]
    value = loss()
    slopes = torch.autograd.grad(value, weights)
    norm = torch.cat([g.flatten() for g in slopes]).norm()
    kept = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes):
            w += rho * g / norm
    slopes = torch.autograd.grad(loss(), weights)
    optimizer.zero_grad()
    with torch.no_grad():
        for w, old, g in zip(weights, kept, slopes):
            w.copy_(old)
            w.grad = g
    optimizer.step()
    return value


def sam_step__data(model, loss, optimizer, rho):
    model.zero_grad()
    clean = loss()
    clean.backward()
    free = {name: w for name, w in model.named_parameters() if w.grad is not None}
    norm = sum(float(w.grad.norm()) ** 2 for w in free.values()) ** 0.5
    kept = {}
    for name, w in free.items():
        kept[name] = w.data
        w.data = w.data + rho / (norm + 1e-12) * w.grad
    optimizer.zero_grad(set_to_none=False)
    loss().backward()
    for name, w in free.items():
        w.data = kept[name]
    optimizer.step()
    return clean.detach()


def sam_step__vectors(model, loss, optimizer, rho):
    to_vector, from_vector = nn.utils.parameters_to_vector, nn.utils.vector_to_parameters
    model.zero_grad()
    value = loss()
    value.backward()
    w = to_vector(model.parameters()).detach().clone()
    zero = torch.zeros_like
    g = to_vector([zero(p) if p.grad is None else p.grad for p in model.parameters()])
    from_vector(w + rho * g / g.norm(), model.parameters())
    model.zero_grad()
    loss().backward()
    from_vector(w, model.parameters())
    optimizer.step()
    return value.detach().numpy()


def sam_step__closure(model, loss, optimizer, rho):
    weights = [w for w in model.parameters() if w.requires_grad]
    for w in weights:
        w.grad = None
    clean = loss()
    clean.backward()
    kept = [w.clone().detach() for w in weights]
    total = nn.utils.get_total_norm([w.grad for w in weights])

    def closure():
        with torch.no_grad():
            for w in weights:
                w.add_(rho * w.grad / total)
        optimizer.zero_grad()
        worst = loss()
        worst.backward()
        for w, old in zip(weights, kept):
            w.data.copy_(old)
        return worst

    optimizer.step(closure)
    return float(clean)


def sam_step__param_groups(model, loss, optimizer, rho):
    """As in the well-known class, with the old weights in a dict of its own."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    value = loss()
    value.backward()
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in params if p.grad is not None]), p=2)
    scale, old = rho / (norm + 1e-12), {}
    with torch.no_grad():
        for p in params:
            if p.grad is None:
                continue
            old[p] = p.data.clone()
            p.add_(p.grad * scale.to(p))
    optimizer.zero_grad()
    with torch.enable_grad():
        loss().backward()
    for p in params:
        p.data = old.get(p, p.data)
    optimizer.step()
    return value.item()


def sam_step__clip(model, loss, optimizer, rho):
    """The norm by clip_grad_norm_ with no limit, and a model as the copy of the weights."""
    backup = copy.deepcopy(model)
    optimizer.zero_grad()
    value = loss()
    value.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    with torch.no_grad():
        free = [w for w in model.parameters() if w.requires_grad]
        torch._foreach_add_(free, [rho * w.grad / norm for w in free])
    optimizer.zero_grad()
    loss().backward()
    with torch.no_grad():
        for w, kept in zip(model.parameters(), backup.parameters()):
            w.set_(kept.detach().clone())
    optimizer.step()
    return value.item()


def sam_step__last_call_for_the_loss(model, loss, optimizer, rho):
    weights = list(filter(lambda w: w.requires_grad, model.parameters()))
    slopes = torch.autograd.grad(loss(), weights)
    norm = math.sqrt(sum(float((g * g).sum()) for g in slopes))
    kept = [w.detach().clone() for w in weights]
    for w, g in zip(weights, slopes):
        w.data += rho / norm * g
    optimizer.zero_grad()
    loss().backward()
    for w, old in zip(weights, kept):
        w.data.copy_(old)
    with torch.no_grad():
        value = loss().item()
    optimizer.step()
    return value


def sam_step__create_graph(model, loss, optimizer, rho):
    weights = tuple(w for w in model.parameters() if w.requires_grad)
    optimizer.zero_grad()
    clean = loss()
    slopes = torch.autograd.grad(clean, weights, create_graph=True)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in slopes]))
    kept = [w.data.numpy().copy() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, slopes):
            w += rho * g / norm
    loss().backward()
    with torch.no_grad():
        for w, old in zip(weights, kept):
            w[...] = torch.from_numpy(old)
    optimizer.step()
    return clean.detach()


def sam_step__unused_get_zeros(model, loss, optimizer, rho):
    """A weight without a gradient gets one of zero, and none again before the step."""
    optimizer.zero_grad()
    value = loss()
    value.backward()
    weights = list(model.parameters())
    slopes = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
    length, kept = one_vector(slopes).norm(), [w.detach().clone() for w in weights]
    optimizer.zero_grad()
    with torch.no_grad():
        for w, g in zip(weights, slopes):
            w += rho * g / length
    loss().backward()
    with torch.no_grad():
        for w, old in zip(weights, kept):
            w.copy_(old)
    optimizer.step()
    return value.item()


# ------------------------------------------------------------------ question 4: a ball that stretches


def adaptive_climb__squares(w, gradient, rho):
    return rho * w**2 * gradient / (w * gradient).norm()


def adaptive_climb__change_of_variables(w, gradient, rho):
    T = w.abs()
    u = rho * (T * gradient) / torch.linalg.vector_norm(T * gradient)
    return T * u


def adaptive_climb__matrices(w, gradient, rho):
    T = torch.diag(w.abs())
    return rho * T @ T @ gradient / torch.sqrt(gradient @ T @ T @ gradient)


def adaptive_climb__einsum(w, gradient, rho):
    squared = torch.einsum("i,i->i", w, w)
    return rho * squared * gradient / torch.einsum("i,i,i->", squared, gradient, gradient) ** 0.5


def adaptive_climb__looped(w, gradient, rho):
    length = math.sqrt(sum((float(a) * float(g)) ** 2 for a, g in zip(w, gradient)))
    return [rho * float(a) ** 2 * float(g) / length for a, g in zip(w, gradient)]


def adaptive_climb__numpy(w, gradient, rho):
    T, g = np.abs(np.asarray(w)), np.asarray(gradient)
    return rho * T**2 * g / np.linalg.norm(T * g)


def adaptive_climb__gradient_of_the_dual_norm(w, gradient, rho):
    g = gradient.clone().requires_grad_()
    return torch.autograd.grad(rho * (w.abs() * g).norm(), g)[0]


def adaptive_climb__torch_func(w, gradient, rho):
    return torch.func.grad(lambda g: rho * torch.sqrt(((w * g) ** 2).sum()))(gradient)


def adaptive_climb__requires_grad(w, gradient, rho):
    gradient.requires_grad_()
    w.requires_grad_()
    stretched = torch.nn.functional.normalize(w.abs() * gradient, dim=0)
    return rho * w.abs() * stretched


def adaptive_climb__backward(w, gradient, rho):
    g = gradient.detach().clone().requires_grad_()
    torch.linalg.norm(w * g).backward()
    return g.grad * rho


def adaptive_climb__single_precision(w, gradient, rho):
    w, g = w.float(), gradient.float()
    return rho * w.square() * g / (w * g).norm()


def adaptive_climb__lagrange(w, gradient, rho):
    """T⁻² ε = g / μ; then μ makes it fit into the ball."""
    metric = torch.diag(1 / w**2)
    e = torch.linalg.solve(metric, gradient)
    return e * rho / torch.sqrt(e @ metric @ e)


def adaptive_climb__in_place_on_a_copy(w, gradient, rho):
    e = gradient.clone()
    e *= w.abs()
    e /= e.norm()
    e *= rho * w.abs()
    return e
