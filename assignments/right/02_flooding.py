"""Right answers to assignment 2, written differently: each must earn its question's points."""

import copy
import math
import statistics
from decimal import Decimal

import numpy as np
import torch
from scipy.optimize import brentq, fsolve
from torch.func import functional_call, grad, grad_and_value, vmap

# --------------------------------------------------------------------- question 1: how often up?


def fraction_up__log1p(down, up):
    return math.log1p(-down) / (math.log1p(-down) - math.log1p(up))


def fraction_up__one_over(down, up):
    return 1 / (1 - math.log(1 + up) / math.log(1 - down))


def fraction_up__another_base(down, up):
    """The number of steps up that undo one step down."""
    ups = -math.log(1 - down, 1 + up)
    return ups / (1 + ups)


def fraction_up__numpy(down, up):
    steps = np.abs(np.log(np.array([1 - down, 1 + up])))
    return steps[0] / steps.sum()


def fraction_up__torch(down, up):
    fall = -torch.log1p(-torch.tensor(down, dtype=torch.float64))
    return fall / (fall + torch.log1p(torch.tensor(up, dtype=torch.float64)))


def fraction_up__single_precision(down, up):
    a, b = torch.tensor(1 - down).log(), torch.tensor(1 + up).log()
    return a / (a - b)


def fraction_up__log_of_ratio(down, up):
    return math.log10(1 / (1 - down)) / math.log10((1 + up) / (1 - down))


def fraction_up__root(down, up):
    return brentq(lambda f: f * math.log(1 + up) + (1 - f) * math.log(1 - down), 0, 1)


def fraction_up__root_as_an_array(down, up):
    return fsolve(lambda f: (1 + up) ** f * (1 - down) ** (1 - f) - 1, 0.5)


def fraction_up__linear_system(down, up):
    A = np.array([[math.log(1 + up), math.log(1 - down)], [1, 1]])
    return np.linalg.solve(A, np.array([0, 1]))[0]


def fraction_up__decimal(down, up):
    fall, rise = (1 - Decimal(down)).ln(), (1 + Decimal(up)).ln()
    return fall / (fall - rise)


# ---------------------------------------------------------------- question 2: two kinds of flooding


def flooded__one_fold(losses, flood_level, per_example):
    value = losses if per_example else losses.mean()
    return (flood_level + abs(value - flood_level)).mean()


def flooded__level_outside(losses, flood_level, per_example):
    b = flood_level
    return b + ((losses - b).abs().mean() if per_example else (losses - b).mean().abs())


def flooded__where(losses, flood_level, per_example):
    value = losses if per_example else losses.mean()
    return torch.where(value > flood_level, value, 2 * flood_level - value).mean()


def flooded__maximum(losses, flood_level, per_example):
    fold = lambda value: torch.maximum(value, 2 * flood_level - value)
    return torch.mean(fold(losses)) if per_example else fold(torch.mean(losses))


def flooded__relu(losses, flood_level, per_example):
    if not per_example:
        losses = losses.mean(0, keepdim=True)
    return (losses + 2 * torch.relu(flood_level - losses)).mean()


def flooded__sign(losses, flood_level, per_example):
    """The sign carries no gradient, with or without detach."""
    value = losses if per_example else losses.mean()
    sign = torch.sign(value - flood_level).detach()
    return (sign * (value - flood_level) + flood_level).mean()


def flooded__looped(losses, flood_level, per_example):
    total = 0
    for loss in losses:
        if per_example and loss < flood_level:
            loss = 2 * flood_level - loss
        total = total + loss / len(losses)
    return total if per_example or total > flood_level else 2 * flood_level - total


def flooded__in_place_on_a_copy(losses, flood_level, per_example):
    value = losses.clone() if per_example else losses.mean().reshape(1)
    below = value < flood_level
    value[below] = 2 * flood_level - value[below]
    return value.mean()


def flooded__numpy(losses, flood_level, per_example):
    x = losses.numpy() if per_example else losses.numpy().mean()
    return np.mean(np.abs(x - flood_level) + flood_level)


def flooded__as_array(losses, flood_level, per_example):
    x = np.asarray(losses) if per_example else np.asarray(losses.mean())
    return np.where(x < flood_level, 2 * flood_level - x, x).mean()


def flooded__pure_python(losses, flood_level, per_example):
    values = losses.tolist() if per_example else [statistics.fmean(losses.tolist())]
    return statistics.fmean(abs(v - flood_level) + flood_level for v in values)


def flooded__single_precision(losses, flood_level, per_example):
    x = losses.to(torch.float32)
    return ((x if per_example else x.mean()) - flood_level).abs().mean() + flood_level


def flooded__sqrt_of_square(losses, flood_level, per_example):
    value = losses if per_example else losses.sum() / losses.numel()
    return (value - flood_level).square().sqrt().add(flood_level).mean()


def flooded__l1_loss(losses, flood_level, per_example):
    value = losses if per_example else losses.mean()
    level = torch.full_like(value, flood_level)
    return torch.nn.functional.l1_loss(value, level) + flood_level


# ----------------------------------------------- question 3: flooding with accumulated gradients


def accumulate__scaled_at_the_end(model, loss, microbatches, flood_level):
    model.zero_grad()
    n, total = 0, 0.0
    for x, y in microbatches:
        value = loss(model(x), y) * len(x)
        value.backward()
        total, n = total + value.item(), n + len(x)
    sign = 1 if total / n > flood_level else -1
    with torch.no_grad():
        for w in model.parameters():
            w.grad *= sign / n


def accumulate__total_with_its_graph(model, loss, microbatches, flood_level):
    """The total remembers where it came from, but backward() has freed what costs memory."""
    for p in model.parameters():
        p.grad = None
    n, total = sum(x.shape[0] for x, _ in microbatches), 0
    for x, y in microbatches:
        share = loss(model(x), y) * x.shape[0] / n
        share.backward()
        total = total + share
    for p in model.parameters():
        p.grad = torch.sign(total.detach() - flood_level) * p.grad


def accumulate__list_of_losses(model, loss, microbatches, flood_level):
    model.zero_grad(set_to_none=False)
    sizes, losses = [y.numel() for _, y in microbatches], []
    for (x, y), size in zip(microbatches, sizes):
        losses.append(loss(model(x), y))
        (losses[-1] * (size / sum(sizes))).backward()
    if np.average([each.item() for each in losses], weights=sizes) < flood_level:
        for p in model.parameters():
            p.grad = -p.grad


def accumulate__autograd_grad(model, loss, microbatches, flood_level):
    weights = list(model.parameters())
    sums, total, n = [torch.zeros_like(w) for w in weights], 0.0, 0
    for x, y in microbatches:
        value = loss(model(x), y)
        for s, g in zip(sums, torch.autograd.grad(value, weights)):
            s += len(y) * g
        total, n = total + len(y) * float(value.detach()), n + len(y)
    for w, s in zip(weights, sums):
        w.grad = math.copysign(1, total / n - flood_level) * s / n


def accumulate__running_mean(model, loss, microbatches, flood_level):
    mean, seen = 0.0, 0
    slopes = {name: 0 for name, _ in model.named_parameters()}
    for x, y in microbatches:
        model.zero_grad()
        value = loss(model(x), y)
        value.backward()
        seen += len(y)
        part = len(y) / seen
        mean += part * (value.item() - mean)
        for name, w in model.named_parameters():
            slopes[name] = slopes[name] + part * (w.grad - slopes[name])
    for name, w in model.named_parameters():
        w.grad = slopes[name] if mean > flood_level else -slopes[name]


def accumulate__optimizer(model, loss, microbatches, flood_level):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    n = len(torch.cat([y for _, y in microbatches]))
    total = torch.tensor(0.0)
    for x, y in microbatches:
        out = model(x)
        share = loss(out, y).mul(len(out)).div(n)
        torch.autograd.backward(share)
        with torch.no_grad():
            total += share
    if total < flood_level:
        for group in optimizer.param_groups:
            torch._foreach_neg_([w.grad for w in group["params"]])


def accumulate__torch_func(model, loss, microbatches, flood_level):
    params = {name: w.detach() for name, w in model.named_parameters()}
    slope = grad_and_value(lambda params, x, y: loss(functional_call(model, params, (x,)), y))
    n, total, sums = sum(len(y) for _, y in microbatches), 0.0, dict.fromkeys(params, 0.0)
    for x, y in microbatches:
        g, value = slope(params, x, y)
        total += value * len(y) / n
        sums = {name: sums[name] + g[name] * len(y) / n for name in g}
    for name, w in model.named_parameters():
        w.grad = sums[name] * (1 if total > flood_level else -1)


def accumulate__example_by_example(model, loss, microbatches, flood_level):
    model.zero_grad()
    values = []
    for x, y in microbatches:
        for i in range(len(y)):
            values.append(loss(model(x[i : i + 1]), y[i : i + 1]))
            values[-1].backward()
    up = statistics.fmean(float(v.detach()) for v in values) < flood_level
    for w in model.parameters():
        w.grad.div_(-len(values) if up else len(values))


def accumulate__vmap(model, loss, microbatches, flood_level):
    """Gradients of examples, without a batch dimension inside."""
    params = {name: w.detach() for name, w in model.named_parameters()}
    one = grad_and_value(lambda params, x, y: loss(functional_call(model, params, (x,)), y))
    n, total, sums = sum(len(y) for _, y in microbatches), 0.0, dict.fromkeys(params, 0.0)
    for x, y in microbatches:
        g, values = vmap(one, (None, 0, 0))(params, x, y)
        total += values.sum() / n
        sums = {name: sums[name] + g[name].sum(0) / n for name in g}
    for name, w in model.named_parameters():
        w.grad = torch.sign(total - flood_level) * sums[name]


def accumulate__old_gradient_subtracted(model, loss, microbatches, flood_level):
    old = [0 if w.grad is None else w.grad.clone() for w in model.parameters()]
    n, total = sum(y.shape[0] for _, y in microbatches), 0.0
    for x, y in microbatches:
        share = loss(model(x), y) * y.shape[0] / n
        share.backward()
        total += share.item()
    for w, before in zip(model.parameters(), old):
        w.grad -= before
        if total < flood_level:
            w.grad.mul_(-1)


def accumulate__a_copy_of_the_model(model, loss, microbatches, flood_level):
    twin = copy.deepcopy(model)
    twin.zero_grad()
    n, total = sum(len(y) for _, y in microbatches), 0.0
    for x, y in microbatches:
        share = loss(twin(x), y) * len(y) / n
        share.backward()
        total += share.item()
    for w, v in zip(model.parameters(), twin.parameters()):
        w.grad = v.grad if total > flood_level else -v.grad


def accumulate__graph_retained(model, loss, microbatches, flood_level):
    """retain_graph is of no use here, but each graph goes with its variable."""
    model.zero_grad()
    n, total = sum(len(y) for _, y in microbatches), 0.0
    for x, y in microbatches:
        share = loss(model(x), y) * len(y) / n
        share.backward(retain_graph=True)
        total += share.item()
    if total < flood_level:
        for w in model.parameters():
            w.grad.neg_()


def accumulate__single_precision(model, loss, microbatches, flood_level):
    weights = list(model.parameters())
    sums, total, n = [torch.zeros(w.shape) for w in weights], 0.0, 0
    for x, y in microbatches:
        value = loss(model(x), y)
        for s, g in zip(sums, torch.autograd.grad(value, weights)):
            s += g.float() * len(y)
        total += value.item() * len(y)
        n += len(y)
    for w, s in zip(weights, sums):
        w.grad = (s / n if total / n > flood_level else -s / n).to(w.dtype)


# -------------------------------------------------------------- question 4: a step with weight decay


def flooded_step__decayed_first(w, gradient, loss, flood_level, lr, weight_decay):
    shrunk = (1 - lr * weight_decay) * w
    return shrunk - lr * gradient if loss > flood_level else shrunk + lr * gradient


def flooded_step__numpy(w, gradient, loss, flood_level, lr, weight_decay):
    w, g = w.numpy(), gradient.numpy()
    return w - lr * (np.sign(loss - flood_level) * g + weight_decay * w)


def flooded_step__looped(w, gradient, loss, flood_level, lr, weight_decay):
    sign = math.copysign(1, loss - flood_level)
    return [
        a - lr * sign * g - lr * weight_decay * a for a, g in zip(w.tolist(), gradient.tolist())
    ]


def flooded_step__list_of_tensors(w, gradient, loss, flood_level, lr, weight_decay):
    up = loss < flood_level
    return [a - lr * ((-g if up else g) + weight_decay * a) for a, g in zip(w, gradient)]


def flooded_step__in_place_on_a_copy(w, gradient, loss, flood_level, lr, weight_decay):
    new = w.clone()
    new.mul_(1 - lr * weight_decay)
    new.sub_(gradient, alpha=lr if loss > flood_level else -lr)
    return new


def flooded_step__addcmul(w, gradient, loss, flood_level, lr, weight_decay):
    sign = torch.sign(torch.tensor(loss - flood_level, dtype=w.dtype))
    return torch.addcmul(w * (1 - lr * weight_decay), gradient, sign, value=-lr)


def flooded_step__optimizer(w, gradient, loss, flood_level, lr, weight_decay):
    p = torch.nn.Parameter(w.clone())
    p.grad = gradient.clone() if loss > flood_level else -gradient
    torch.optim.SGD([p], lr=lr, weight_decay=weight_decay).step()
    return p


def flooded_step__maximize(w, gradient, loss, flood_level, lr, weight_decay):
    p = w.clone().requires_grad_()
    p.grad = gradient.clone()
    torch.optim.SGD([p], lr, weight_decay=weight_decay, maximize=loss < flood_level).step()
    return p.detach()


def flooded_step__autograd(w, gradient, loss, flood_level, lr, weight_decay):
    """The loss to first order, folded, plus λ/2 ‖w‖²."""
    v = w.clone().requires_grad_()
    raw = loss + gradient @ (v - w)
    objective = (raw - flood_level).abs() + flood_level + weight_decay / 2 * v @ v
    (slope,) = torch.autograd.grad(objective, v)
    return w - lr * slope


def flooded_step__torch_func(w, gradient, loss, flood_level, lr, weight_decay):
    folded = lambda v: (loss + gradient @ (v - w) - flood_level).abs() + weight_decay * v @ v / 2
    return w - lr * grad(folded)(w)


def flooded_step__backward(w, gradient, loss, flood_level, lr, weight_decay):
    v = w.detach().clone()
    v.requires_grad_()
    (
        abs(loss + (gradient * (v - w)).sum() - flood_level) + weight_decay / 2 * (v**2).sum()
    ).backward()
    with torch.no_grad():
        v -= lr * v.grad
    return v


def flooded_step__single_precision(w, gradient, loss, flood_level, lr, weight_decay):
    w, g = w.float(), gradient.float()
    direction = g if loss >= flood_level else -g
    return torch.add(w, direction + weight_decay * w, alpha=-lr)


def flooded_step__einsum(w, gradient, loss, flood_level, lr, weight_decay):
    weights = torch.tensor([1 - lr * weight_decay, lr if loss < flood_level else -lr])
    return torch.einsum("k,ki->i", weights.double(), torch.stack([w, gradient]))
