r"""Stiffness: does a step on one example help another?

A small step of gradient descent on example 1 changes the loss of example 2 by

.. math:: \Delta\ell_2 = -\varepsilon\, g_1\cdot g_2 + O(\varepsilon^2),
          \qquad g_i = \nabla_\theta\,\ell_i(\theta),

so the sign of :math:`g_1\cdot g_2` says whether the step helps, and the cosine how well the two
directions agree (Fort, Nowak, Jastrzębski, Narayanan, arXiv 1901.09491).
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad
from torch.overrides import TorchFunctionMode

from .._ball import length, over_largest
from .._checks import known, tensor, whole
from .._contracts import Loss, Network
from .._functional import MeanLoss, check_examples, dims, over_rows
from .._targets import checked_losses, example_losses
from .._tree import Params, flatten, plus

__all__ = [
    "ClassStiffness",
    "Stiffness",
    "between_classes",
    "class_matrix",
    "class_stiffness",
    "gradient_norm",
    "residual_stiffness",
    "stiffness",
    "within_classes",
]

WAY_OUT = "batch_size=1 differentiates one example after another"
MOST_NUMBERS = 2**26  # in the gradients of a chunk of examples


class Stiffness(NamedTuple):
    r"""Stiffness of all pairs of examples.

    Attributes
    ----------
    gram : Tensor
        Inner products :math:`g_i\cdot g_j`, [n1, n2].
    cosine : Tensor
        :math:`g_i\cdot g_j/(\|g_i\|\|g_j\|)` in [-1, 1], [n1, n2]; 0 where a gradient is zero: a
        step along it changes nothing.  It does not underflow where ``gram`` does.

    Notes
    -----
    A gradient with a NaN makes its own rows and columns NaN, and nothing else.
    """

    gram: Tensor
    cosine: Tensor

    @property
    def sign(self) -> Tensor:
        """Signs of the inner products: -1, 0 or 1, [n1, n2]."""
        return torch.where(self.cosine.isnan(), self.cosine, self.cosine.sign())


@dims(gram=["example", "other"], cosine=["example", "other"])
def stiffness(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> Stiffness:
    r"""Instrument: stiffness of all pairs of examples, of one set or of one with another.

    Parameters
    ----------
    network : callable
        ``network(params, x)`` gives the output [n, ...] in evaluation mode.
    params : dict of Tensor
        The gradients are those with respect to all of them.
    x, y : Tensor
        Inputs [n1, ...] and targets [n1, ...].
    x2, y2 : Tensor, optional
        A second set, [n2, ...]: validation examples, say.
    criterion : callable
        From output and targets to one loss per example, [n].
    batch_size : int, optional
        How many examples are differentiated at once; by default, as many as keep the gradients
        that are formed (see below) in 256 MiB of single precision.  1: one after another, without
        ``vmap``, and all gradients are formed.

    Returns
    -------
    Stiffness
        ``.gram``, ``.cosine`` and ``.sign``, [n1, n2]; in single precision for a network in half
        precision.

    Raises
    ------
    ValueError
        If sizes disagree, ``criterion`` does not return one number per example, or batch norm
        takes its statistics from the batch: then an example has no gradient of its own.

    Notes
    -----
    A linear layer that meets each example once, as one vector, has the gradient
    :math:`\delta a^\top`, from its input a and the gradient δ of its output.  It is never formed:

    .. math:: g_i\cdot g_j = (a_i\cdot a_j + 1)\,(\delta_i\cdot\delta_j),

    the 1 for the bias.  The gradients of all other parameters are formed, chunk by chunk.

    All is done by :func:`torch.func.vmap` over examples.  What it cannot run, such as ``nn.LSTM``
    or a branch that depends on data, needs ``batch_size=1``.

    Examples
    --------
    The gradient of a linear model's squared error is residual · input:

    >>> network = lambda params, x: x @ params["w"]
    >>> squared = lambda output, y: (output - y) ** 2 / 2
    >>> x, y = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0, -1.0])
    >>> s = stiffness(network, {"w": torch.zeros(2)}, x, y, criterion=squared)
    >>> s.gram
    tensor([[ 1.,  3.,  0.],
            [ 3., 25., -8.],
            [ 0., -8.,  4.]])
    >>> s.cosine[0, 1], s.sign[1, 2]
    (tensor(0.6000), tensor(-1.))

    Of a module: ``on(model, stiffness, x, y)``.  Of a stack, on its first 200 training examples:
    ``networks.measure(stiffness, data, "train", examples=200)``.
    """
    check_examples("", x, y)
    if (x2 is None) != (y2 is None):
        raise ValueError("x2 and y2 must be given both or neither")
    if x2 is not None:
        check_examples("2", x2, y2)
    loop = batch_size is not None and whole("batch_size", batch_size) == 1
    sets = [(x, y)] if x2 is None or y2 is None else [(x, y), (x2, y2)]
    found = [] if loop else [_linear_layers(network, params, x[:1]) for x, _ in sets]
    layers = found[0] if found and found[0] == found[-1] else {}
    formed = sum(p.numel() for p in _others(params, layers).values())
    size = max(1, MOST_NUMBERS // formed) if formed else 250
    size = size if batch_size is None or loop else whole("batch_size", batch_size)

    @lru_cache(1 if formed else None)  # factors of outer products are small enough to keep
    def gradients(which: int, first: int) -> _Gradients:
        x, y = (t[first : first + size] for t in sets[which])
        return _normalized(_example_gradients(network, params, layers, x, y, criterion, loop))

    rows: list[list[Tensor]] = []
    lengths1, lengths2 = {}, {}
    for i, first in enumerate(range(0, len(x), size)):
        one, lengths1[i] = gradients(0, first)
        rows.append([rows[j][i].mT for j in range(i)] if len(sets) == 1 else [])
        for j in range(len(rows[i]), math.ceil(len(sets[-1][0]) / size)):
            two, lengths2[j] = gradients(len(sets) - 1, j * size)
            rows[i].append(_inner(one, two))
    cosine = torch.cat([torch.cat(row, 1) for row in rows]).clamp(-1, 1)
    if len(sets) == 1:
        cosine = (cosine + cosine.mT) / 2  # symmetric to the last bit
    length1, length2 = (torch.cat([*lengths.values()]) for lengths in (lengths1, lengths2))
    return Stiffness(cosine * (length1[:, None] * length2), cosine)


# -------------------------------------------------- gradients of examples, as outer products δ aᵀ


class _Layer(NamedTuple):
    """A part of the gradients of n examples: δ [n, O] times the input [n, I], 1 for a bias."""

    a: Tensor
    delta: Tensor

    def inner(self, other: "_Layer") -> Tensor:
        """(a_i·a_j)(δ_i·δ_j)"""
        return (self.a @ other.a.mT) * (self.delta @ other.delta.mT)


class _Gradients(NamedTuple):
    """Gradients of n examples."""

    directions: list[_Layer]  # of length 1, or 0
    length: Tensor  # [n]


def _inner(one: list[_Layer], two: list[_Layer]) -> Tensor:
    """g_i·g_j, the sum over layers."""
    return reduce(add, (a.inner(b) for a, b in zip(one, two, strict=True)))


def _normalized(layers: list[_Layer]) -> _Gradients:
    """Directions and lengths; a and δ by their largest entries, whose squares are in range."""
    of_rows = lambda v, p: torch.linalg.vector_norm(v, p, dim=1, keepdim=True)
    nonzero = lambda v: torch.where(v == 0, 1, v)
    scaled, scales = [], []
    for layer in layers:
        (a, of_a), (delta, of_delta) = (over_largest(v, of_rows) for v in layer)
        scaled.append(_Layer(a, delta))
        scales.append(of_a.double() * of_delta)  # in double, since float32 may not hold it
    largest = nonzero(torch.stack(scales).amax(0))
    shares = [scale / largest for scale in scales]
    lengths = [s * of_rows(u.a, 2) * of_rows(u.delta, 2) for s, u in zip(shares, scaled)]
    length = of_rows(torch.cat(lengths, 1), 2)
    unit = [
        u._replace(delta=u.delta * (s / nonzero(length)).to(u.delta))
        for s, u in zip(shares, scaled, strict=True)
    ]
    return _Gradients(unit, (largest * length).to(unit[0].delta)[:, 0])


def _example_gradients(
    network: Network,
    params: Params,
    layers: dict[str, str | None],
    x: Tensor,
    y: Tensor,
    criterion: Loss,
    loop: bool,
) -> list[_Layer]:
    """By one forward and one backward pass of each example, a batch of one."""
    others = _others(params, layers)
    probes = {name: params[name].new_zeros(len(params[name])) for name in layers}

    def of_one(x: Tensor, y: Tensor) -> Any:
        def loss(others: Params, probes: Params) -> tuple[Tensor, Params]:
            with _ParameterUses(params, probes) as uses:
                output = network({**params, **others}, x[None])
            if uses.layers() != layers:
                raise ValueError(
                    "network must use its weights in the same way for every example, got a weight "
                    f"with more or fewer uses: {WAY_OUT}"
                )
            losses = checked_losses(criterion(output, y[None]), x[None], y[None])
            return losses.mean(), uses.inputs

        # the gradient of a probe, which is added to the output of a layer, is its δ
        return grad(loss, argnums=(0, 1), has_aux=True)(others, probes)

    (gradients, deltas), inputs = over_rows(of_one, 0, WAY_OUT, 1 if loop else None)(x, y)
    with_one = lambda a, bias: a if bias is None else F.pad(a, (0, 1), value=1)
    parts = [
        _Layer(_at_least_single(with_one(inputs[w], bias)), _at_least_single(deltas[w]))
        for w, bias in layers.items()
    ]
    for gradient in gradients.values():  # a constant input, whose δ is the whole gradient
        g = _at_least_single(gradient).reshape(len(x), -1)
        parts.append(_Layer(g.new_ones(len(x), 1), g))
    return parts


def _at_least_single(t: Tensor) -> Tensor:
    """Half precision is too short for sums of products."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _linear_layers(network: Network, params: Params, x: Tensor) -> dict[str, str | None]:
    """The layers of an example, see :meth:`_ParameterUses.layers`."""
    uses = _ParameterUses(params)

    def run(x: Tensor) -> Tensor:
        with uses:
            network(params, x[None])
        return x

    run(x[0])
    return uses.layers()


def _others(params: Params, layers: dict[str, str | None]) -> Params:
    """The parameters whose gradients are formed."""
    known = {*layers, *layers.values()}
    return {k: p for k, p in params.items() if k not in known and p.numel()}


class _ParameterUses(TorchFunctionMode):
    """Counts the operations that use a parameter, notes the inputs of linear layers, and adds a
    probe to their outputs."""

    def __init__(self, params: Params, probes: Params | None = None) -> None:
        super().__init__()
        of_tensor = Counter(id(p) for p in params.values())
        self.names = {id(p): name for name, p in params.items() if of_tensor[id(p)] == 1}
        self.level = torch._C._functorch.maybe_current_level()
        self.probes = probes or {}
        self.count: Counter[str] = Counter()
        self.inputs: dict[str, Tensor] = {}  # by the name of the weight
        self.biases: dict[str, str | None] = {}

    def layers(self) -> dict[str, str | None]:
        """{weight: bias} of the layers that meet each example once, as one vector.

        A bias that is used elsewhere too, is broadcast, or is no parameter, is None.
        """
        once = {name for name, count in self.count.items() if count == 1}
        return {w: bias if bias in once else None for w, bias in self.biases.items() if w in once}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and kwargs.get("training"):
            raise ValueError(
                "network must not normalize with the statistics of the batch: then no example has "
                "a gradient of its own. Use evaluation mode, and batch norm with "
                "track_running_stats=True"
            )
        names = map(self._name, _leaves([*args, *kwargs.values()]))
        self.count.update(name for name in names if name)
        out = func(*args, **kwargs)
        if func is F.linear:
            out = self._linear(out, *args, **kwargs)
        return out

    def _inside(self) -> bool:
        """Whether the network itself differentiates or maps: inputs cannot be taken out of that."""
        return bool(torch._C._functorch.maybe_current_level() != self.level)

    def _name(self, v: Any) -> str | None:
        """Which parameter it is, also inside."""
        functorch = torch._C._functorch
        if isinstance(v, Tensor) and self._inside():
            while id(v) not in self.names and functorch.is_functorch_wrapped_tensor(v):
                v = functorch.get_unwrapped(v)
        return self.names.get(id(v))

    def _linear(
        self, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        name = self.names.get(id(weight))
        if name is None or weight.ndim != 2 or self._inside() or input.numel() != input.shape[-1]:
            return out
        self.inputs[name] = input.flatten()
        one_each = bias is not None and bias.shape == weight.shape[:1]
        self.biases[name] = self.names.get(id(bias)) if one_each else None
        return out + self.probes[name] if name in self.probes else out


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


# ---------------------------------------------------------------------------------- comparisons


def residual_stiffness(logits: Tensor, y: Tensor) -> Stiffness:
    r"""The baseline: what the residuals of the softmax alone give.

    .. math:: \frac{r_i\cdot r_j}{\|r_i\|\|r_j\|}, \qquad
              r_i = \mathrm{softmax}(z_i) - \mathrm{onehot}(y_i),

    which is the stiffness of the last layer's bias.  It exists before anything is learned: where
    all K probabilities are equal, the cosine is 1 within a class and −1/(K−1) between classes,
    whatever the inputs, and even with random labels.  Stiffness is informative about a network only
    as far as it differs from this.

    Parameters
    ----------
    logits : Tensor
        [n, K].
    y : Tensor
        Classes [n], or soft targets [n, K].

    Examples
    --------
    >>> residual_stiffness(torch.zeros(3, 5), torch.tensor([0, 0, 1])).cosine
    tensor([[ 1.0000,  1.0000, -0.2500],
            [ 1.0000,  1.0000, -0.2500],
            [-0.2500, -0.2500,  1.0000]])
    """
    if not tensor("logits", logits).is_floating_point() or logits.ndim != 2:
        raise ValueError(
            f"logits must be floating point numbers [n, K], got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    check_examples("", logits, y)
    bias = {"bias": torch.zeros_like(logits[0])}
    return stiffness(lambda p, z: z + p["bias"], bias, logits, y, batch_size=len(logits))


def gradient_norm(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    criterion: Loss = example_losses,
    batch_size: int = 1000,
) -> Tensor:
    r"""Instrument: the length :math:`\|\nabla L\|` of the gradient of the mean loss.

    Parameters
    ----------
    network : callable
        ``network(params, x)`` gives the output [n, ...] in evaluation mode.
    params : dict of Tensor
    x, y : Tensor
        Inputs [n, ...] and targets [n, ...].
    criterion : callable
        From output and targets to one loss per example, [n].
    batch_size : int
        How many examples at once.  The result depends on it only by rounding.

    Returns
    -------
    Tensor
        One number, in units of the loss per unit of weight.

    Examples
    --------
    One example, two classes, zero weights: the residual is ±½ on an input of length 5.

    >>> network = lambda params, x: x @ params["w"]
    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    >>> round(gradient_norm(network, {"w": torch.zeros(2, 2)}, x, y).item(), 4)   # 5 √½
    3.5355
    """
    mean = MeanLoss(network, criterion, x, y, batch_size)
    g = reduce(plus, (grad(mean.of)(params, *batch) for batch in mean.batches))
    return length(flatten(g))


# ------------------------------------------------------------------------------------ by class


class ClassStiffness(NamedTuple):
    """Stiffness by class.

    Attributes
    ----------
    matrix : Tensor
        The class matrix [K, K], see :func:`class_matrix`.
    within, between : Tensor
        Its means over the diagonal, and off it.
    """

    matrix: Tensor
    within: Tensor
    between: Tensor


@dims(matrix=["class_1", "class_2"], within=[], between=[])
def class_stiffness(
    network: Network,
    params: Params,
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    kind: str = "cosine",
    criterion: Loss = example_losses,
    batch_size: int | None = None,
) -> ClassStiffness:
    """Instrument: :func:`stiffness` by class.

    Parameters
    ----------
    network, params, x, criterion, batch_size
        As of :func:`stiffness`.
    y : Tensor
        Classes [n].
    num_classes : int
        K.
    kind : {"cosine", "sign"}
        Which stiffness.  Fort et al. prefer the cosine within a class, the sign between.

    Examples
    --------
    >>> network = lambda params, x: x @ params["w"]
    >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> class_stiffness(network, {"w": torch.zeros(2, 2)}, x, y, num_classes=2).matrix
    tensor([[1.0000, 0.0000],
            [0.0000,    nan]])
    """
    if kind not in ("cosine", "sign"):
        raise ValueError(f"kind must be 'cosine' or 'sign', got {kind!r}")
    pairs = stiffness(network, params, x, y, criterion=criterion, batch_size=batch_size)
    matrix = class_matrix(getattr(pairs, kind), y, num_classes=num_classes)
    return ClassStiffness(matrix, within_classes(matrix), between_classes(matrix))


def class_matrix(
    values: Tensor, classes1: Tensor, classes2: Tensor | None = None, *, num_classes: int
) -> Tensor:
    r"""Class by class: the mean over :math:`X_1\in a`, :math:`X_2\in b`, :math:`X_1\neq X_2`.

    Parameters
    ----------
    values : Tensor
        One value per pair, [n1, n2], such as ``.cosine`` or ``.sign`` of a :class:`Stiffness`.
    classes1, classes2 : Tensor
        The examples' classes, integers in [0, num_classes), [n1] and [n2].  Without ``classes2``,
        rows and columns are the same examples, and the diagonal, where :math:`X_1=X_2`, is left
        out.
    num_classes : int
        K.

    Returns
    -------
    Tensor
        [K, K].  NaN where there is no pair to average: for a class that is missing, and on the
        diagonal for a class with a single example.  A value that is infinite or NaN makes the
        means over it so, and no other.  Half precision gives single precision.

    Notes
    -----
    Super-classes: the class matrix of a class matrix.  With ``groups`` [K] the super-class of each
    class, ``class_matrix(C, groups, num_classes=G)`` is the mean over pairs of *distinct* classes
    of two groups (or of one).

    Examples
    --------
    >>> cosine = torch.tensor([[1.0, 0.5, -0.1], [0.5, 1.0, -0.3], [-0.1, -0.3, 1.0]])
    >>> class_matrix(cosine, torch.tensor([0, 0, 1]), num_classes=2)
    tensor([[ 0.5000, -0.2000],
            [-0.2000,     nan]])
    """
    sizes = (len(tensor("classes1", classes1)), len(classes1 if classes2 is None else classes2))
    if tensor("values", values).shape != sizes:
        raise ValueError(
            f"values must have one row and one column per example, {sizes}, "
            f"got shape {tuple(values.shape)}"
        )
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # half cannot count
    K = whole("num_classes", num_classes)
    one = _of_class("classes1", classes1, K).to(values)
    two = one if classes2 is None else _of_class("classes2", classes2, K).to(values)
    counted = torch.ones_like(values, dtype=torch.bool)
    if classes2 is None:
        counted = counted & ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    total = lambda v: one.mT @ torch.where(counted, v, 0) @ two
    mean = total(torch.where(values.isfinite(), values, 0)) / total(torch.ones_like(values))
    for special in (math.inf, -math.inf, math.nan):  # in a product, 0 times these is NaN
        here = values.isnan() if math.isnan(special) else values == special
        mean = torch.where(total(here.to(values)) > 0, mean + special, mean)
    return mean


def _of_class(name: str, classes: Tensor, num_classes: int) -> Tensor:
    """[n, K]: whether an example is of a class."""
    whole_numbers = not (classes.is_floating_point() or classes.dtype == torch.bool)
    one = classes.flatten()[:, None] == torch.arange(num_classes, device=classes.device)
    if classes.ndim != 1 or not whole_numbers or known(~one.any(1).all()):
        raise ValueError(
            f"{name} must be whole numbers in [0, {num_classes}), of shape [n], got {classes}"
        )
    return one


def within_classes(matrix: Tensor) -> Tensor:
    """Mean of a class matrix [K, K] over its diagonal; NaN if one of the K values is.

    >>> within_classes(torch.tensor([[0.4, 0.1], [0.3, 0.8]]))
    tensor(0.6000)
    """
    return matrix.diagonal().mean()


def between_classes(matrix: Tensor) -> Tensor:
    """Mean of a class matrix [K, K] off its diagonal; NaN if one of those values is, or K is 1.

    >>> between_classes(torch.tensor([[0.4, 0.1], [0.3, math.nan]]))
    tensor(0.2000)
    """
    k = len(matrix)
    return torch.where(torch.eye(k, device=matrix.device) > 0, 0, matrix).sum() / (k * (k - 1))
