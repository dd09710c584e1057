r"""Stiffness: does a step on one example help another?

A small step of gradient descent on example 1 changes the loss of example 2 by

.. math:: \Delta\ell_2 = -\varepsilon\, g_1\cdot g_2 + O(\varepsilon^2),
          \qquad g_i = \nabla_\theta\,\ell_i(\theta),

so the sign of :math:`g_1\cdot g_2` says whether the step helps, and the cosine how well the two
directions agree (Fort, Nowak, Jastrzębski, Narayanan, arXiv 1901.09491).

The gradients of a few thousand examples do not fit into memory.  But the gradient of a layer is a
sum of outer products of its input, :math:`a`, and the gradient of its output, :math:`\delta`, and
inner products of those factorize: for a linear layer with a bias

.. math:: g_i\cdot g_j = (a_i\cdot a_j + 1)\,(\delta_i\cdot\delta_j).

One forward and one backward pass of a batch give all :math:`a` and :math:`\delta`: while the
network runs, a :class:`torch.overrides.TorchFunctionMode` sees every operation of PyTorch that uses
a parameter.  It covers the parameters that are used *only* by operations known here
(``_OPERATIONS``); the others get :func:`torch.func.vmap` of :func:`torch.func.grad`.
"""

import functools
import inspect
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .._checks import number, whole
from .._functional import Loss, Network, check_examples, evaluation
from .._random import stream
from .._targets import example_losses
from .._tree import Params, norm

__all__ = [
    "ClassStiffness",
    "CriticalLength",
    "Stiffness",
    "between_classes",
    "class_matrix",
    "critical_length",
    "gradient_norm",
    "input_distance",
    "network_stiffness",
    "residual_stiffness",
    "stiffness",
    "within_classes",
]


@dataclass(frozen=True)
class Stiffness:
    r"""Stiffness of all pairs of examples.

    Attributes
    ----------
    gram : Tensor
        Raw inner products :math:`g_i\cdot g_j`, [n1, n2].
    cosine : Tensor
        :math:`g_i\cdot g_j/(\|g_i\|\|g_j\|)` in [-1, 1], [n1, n2]; 0 where a gradient is zero, as
        is its sign: a step along it changes nothing.  It does not underflow where ``gram`` does.
    norms1, norms2 : Tensor
        :math:`\|g_i\|`, [n1] and [n2].

    Notes
    -----
    A gradient with a NaN makes its own rows, columns and norm NaN, and nothing else.
    """

    gram: Tensor
    cosine: Tensor
    norms1: Tensor
    norms2: Tensor

    @property
    def sign(self) -> Tensor:
        """Signs of the inner products: -1, 0 or 1, [n1, n2]."""
        return torch.where(self.cosine.isnan(), self.cosine, self.cosine.sign())


def stiffness(
    model: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    x1: Tensor,
    y1: Tensor,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    memory: float = 2**30,
) -> Stiffness:
    r"""Stiffness of every example of one set with every example of another, or of the same set.

    The gradients are those of ``model`` in evaluation mode (as it predicts: no dropout, batch norm
    with its running statistics), with respect to its parameters that require one.

    Parameters
    ----------
    model : Module
        Any; the first dimension of its input and output counts examples.
    loss : callable
        ``loss(model(x), y)`` gives one number per example, [n]; e.g.
        ``nn.CrossEntropyLoss(reduction="none")``.
    x1, y1 : Tensor
        Inputs [n1, ...] and targets [n1, ...], on the model's device.
    x2, y2 : Tensor, optional
        A second set, [n2, ...]: training examples against validation examples, say.
    chunk_size : int, optional
        How many examples go through the network at once.
    memory : float
        How many bytes to plan with: it sets ``chunk_size`` unless that is given, and for how many
        examples the factors are kept while others stream past.  A guide, not a limit.

    Returns
    -------
    Stiffness
        ``.gram``, ``.sign``, ``.cosine`` [n1, n2], and the norms of the gradients.  In single
        precision for a network in half precision.  Depends on ``chunk_size`` and ``memory`` only
        by rounding.

    Raises
    ------
    ValueError
        If sizes disagree, ``loss`` does not return one number per example, no parameter requires a
        gradient, or batch norm takes its statistics from the batch even in evaluation mode
        (``track_running_stats=False``): then an example has no gradient of its own.
    TypeError
        If ``x1`` or ``x2`` is not a tensor.

    Notes
    -----
    The method for a parameter depends on how it is used (by a module or by a plain function).
    With T the positions at which a layer sees an example (1 for a vector; the length of a sequence;
    the pixels of a convolution's output; summed over all uses if there are several), I its inputs
    and O its outputs per position:

    - *Linear* layers and *convolutions* (with groups, stride, padding, dilation; then I and O are
      those of a group, and I counts the pixels of a patch): the identity above, summed over pairs
      of positions, costs T²(I + O); computing the gradients of a block of examples costs IO.  The
      cheaper is taken: the identity for vectors and for small maps of many channels, the gradients
      for long sequences and for large maps of few channels (by one convolution with a group per
      example on a CPU, from patches elsewhere).  With the identity, the bias is one more input
      that is always 1.
    - *Embeddings*: the same, where I is the vocabulary and :math:`a\cdot a'` compares two tokens.
    - *Scales and biases* (of layer, group, instance, RMS, and batch norm, or any parameter that
      is added to or multiplied with activations): small, so their gradients are computed.
    - *Everything else*, and every parameter with a use that is not listed here (weights of
      recurrent layers and of ``nn.MultiheadAttention``, transposed convolutions, …):
      ``vmap(grad)``, in chunks; one example after another if ``vmap`` cannot run the model.

    A weight used several times, tied between layers or called twice, is one parameter: its
    gradient is the sum over the uses.

    Model, mode, buffers, ``.grad`` and global random state are left as they were, also after an
    exception.  Examples must not otherwise influence each other inside the model.

    On a GPU, kernel launches dominate the time of small networks, and ``vmap(grad)`` needs fewer:
    for a few hundred examples it can take half the time.  It needs more memory:
    ``benchmarks/README.md``.

    References
    ----------
    Fort et al., arXiv 1901.09491.  The identity for sequences and convolutions is known from the
    norms of private training: Bu et al., *Scalable and Efficient Training of Large Convolutional
    Neural Networks with Differential Privacy*, NeurIPS 2022.

    Examples
    --------
    The gradient of a linear model's squared error is residual · input:

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> squared = lambda output, y: (output[:, 0] - y) ** 2 / 2
    >>> x, y = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), torch.tensor([1.0, 1.0, -1.0])
    >>> s = stiffness(model, squared, x, y)
    >>> s.gram
    tensor([[ 1.,  3.,  0.],
            [ 3., 25., -8.],
            [ 0., -8.,  4.]])
    >>> s.cosine[0, 1], s.sign[1, 2]
    (tensor(0.6000), tensor(-1.))
    """
    n1 = check_examples("1", x1, y1)
    if (x2 is None) != (y2 is None):
        raise ValueError("x2 and y2 must be given both or neither")
    if x2 is not None:
        check_examples("2", x2, y2)
        if x1.shape[1:] != x2.shape[1:]:
            raise ValueError(
                "x1 and x2 must be examples of the same shape, got "
                f"{tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}"
            )
    if chunk_size is not None:
        whole("chunk_size", chunk_size)
    memory = number("memory", memory, 1)
    with evaluation(model), torch.inference_mode(False), torch.no_grad():
        gradients_of = _ModuleGradients(model, loss, x1, y1)
        chunk = chunk_size or min(256, max(1, int(memory / 4 / gradients_of.bytes_passing)))
        block = chunk * max(1, int(memory / 2 / gradients_of.bytes_kept / chunk))
        slices = lambda a, n: [slice(i, min(i + chunk, n)) for i in range(a, n, chunk)]
        dtype = _upcast(next(model.parameters())).dtype
        inner = torch.zeros(n1, len(x1 if x2 is None else x2), dtype=dtype, device=x1.device)
        # for each chunk: squares of the gradients' norms, and units
        norms1: list[tuple[Tensor, Tensor]] = []
        norms2: list[tuple[Tensor, Tensor]] = []
        for a in range(0, n1, block):
            kept = [
                (rows, gradients_of(x1[rows], y1[rows])) for rows in slices(a, min(a + block, n1))
            ]
            for i, (rows, gradients) in enumerate(kept):
                norms1.append((gradients.squares, gradients.unit))
                if x2 is None:
                    inner[rows, rows] = _symmetric(_inner(gradients, gradients))
                    for columns, other in kept[i + 1 :]:
                        inner[rows, columns] = _inner(gradients, other)
                        inner[columns, rows] = inner[rows, columns].mT
            x, y, first = (x1, y1, a + block) if x2 is None or y2 is None else (x2, y2, 0)
            for columns in slices(first, len(x)):
                other = gradients_of(x[columns], y[columns])
                for rows, gradients in kept:
                    inner[rows, columns] = _inner(gradients, other)
                    if x2 is None:
                        inner[columns, rows] = inner[rows, columns].mT
                if x2 is not None and a == 0:
                    norms2.append((other.squares, other.unit))
            del kept
    squares1, unit1 = (torch.cat(part) for part in zip(*norms1))
    squares2, unit2 = (torch.cat(part) for part in zip(*(norms1 if x2 is None else norms2)))
    return _as_stiffness(inner, squares1, unit1, squares2, unit2)


def network_stiffness(
    network: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: dict[str, Tensor],
    x1: Tensor,
    y1: Tensor,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = example_losses,
) -> Stiffness:
    """:func:`stiffness` as a pure function, to be run under ``vmap`` over many networks at once.

    The same kernel, the same operations, the same result; all examples at once.

    Parameters
    ----------
    network : callable
        ``network(params, x)`` gives the output [n, ...] in evaluation mode, by
        :func:`torch.func.functional_call` with ``params`` passed on unchanged.
    params : dict of Tensor
        Gradients are taken with respect to all of them.
    x1, y1, x2, y2, loss
        As in :func:`stiffness`; ``loss`` defaults to the cross-entropy.

    Examples
    --------
    As an instrument of :func:`flatmin.fit` or ``Networks.measure``, on the first 200 examples of
    the split (see also :class:`ClassStiffness`):

    >>> def cosines(network, params, x, y):
    ...     return network_stiffness(network, params, x[:200], y[:200]).cosine

    Two networks at once:

    >>> params = {"weight": torch.tensor([[[1.0], [0.0]], [[0.0], [0.0]]])}
    >>> linear = nn.Linear(1, 2, bias=False)
    >>> network = lambda params, x: torch.func.functional_call(linear, params, (x,))
    >>> x, y = torch.ones(2, 1), torch.tensor([0, 1])
    >>> vmap(lambda params: network_stiffness(network, params, x, y).sign)(params)[:, 0, 1]
    tensor([-1., -1.])
    """
    check_examples("1", x1, y1)
    if (x2 is None) != (y2 is None):
        raise ValueError("x2 and y2 must be given both or neither")
    if x2 is not None:
        check_examples("2", x2, y2)
    with sdpa_kernel(SDPBackend.MATH):  # vmap supports no other attention
        uses = _functional_uses(network, params, x1)
        one = _functional_gradients(network, params, loss, uses, x1, y1)
        two = one
        if x2 is not None and y2 is not None:
            two = _functional_gradients(network, params, loss, uses, x2, y2)
    inner = _inner(one, two) if x2 is not None else _symmetric(_inner(one, one))
    return _as_stiffness(inner, one.squares, one.unit, two.squares, two.unit)


def residual_stiffness(
    logits1: Tensor, y1: Tensor, logits2: Tensor | None = None, y2: Tensor | None = None
) -> Stiffness:
    r"""The baseline: what the residuals of the softmax alone give.

    .. math:: \frac{r_i\cdot r_j}{\|r_i\|\|r_j\|}, \qquad
              r_i = \mathrm{softmax}(z_i) - \mathrm{onehot}(y_i),

    which is the stiffness of the last layer's bias.  It exists before anything is learned: where
    all K probabilities are equal, the cosine is 1 within a class and −1/(K−1) between classes,
    whatever the inputs, and even with random labels.  Stiffness is informative about a network only
    as far as it differs from this.

    Parameters
    ----------
    logits1, logits2 : Tensor
        [n1, K] and [n2, K]; without the second, all pairs of the first.
    y1, y2 : Tensor
        Classes [n], or soft targets [n, K].

    Examples
    --------
    >>> residual_stiffness(torch.zeros(3, 5), torch.tensor([0, 0, 1])).cosine
    tensor([[ 1.0000,  1.0000, -0.2500],
            [ 1.0000,  1.0000, -0.2500],
            [-0.2500, -0.2500,  1.0000]])
    """
    if (logits2 is None) != (y2 is None):
        raise ValueError("logits2 and y2 must be given both or neither")

    def gradients(logits: Tensor, y: Tensor) -> _ExampleGradients:
        # computed as the cross-entropy's gradient, so that it is rounded as in the bias itself
        residual = grad(lambda z: example_losses(z, y).sum())(logits)
        unit = _unit([residual], len(logits))
        return _ExampleGradients({"": _Explicit(_upcast(residual / unit[:, None]))}, unit)

    one = gradients(logits1, y1)
    two = one if logits2 is None or y2 is None else gradients(logits2, y2)
    return _as_stiffness(_inner(one, two), one.squares, one.unit, two.squares, two.unit)


def gradient_norm(
    network: Callable[[Params, Tensor], Tensor], params: Params, x: Tensor, y: Tensor
) -> Tensor:
    r"""An instrument: the length :math:`\|\nabla L\|` of the gradient of the mean loss, for ``fit``
    and :meth:`~flatmin.Networks.measure`.

    Parameters
    ----------
    network : callable
        ``network(params, x)`` gives logits [n, K].
    params : dict of Tensor
    x, y : Tensor
        Inputs and classes [n].

    Returns
    -------
    Tensor
        One number, in nats per unit of weight.

    Examples
    --------
    One example, two classes, zero weights: the residual is ±½ on an input of length 5.

    >>> network = lambda params, x: x @ params["w"]
    >>> x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
    >>> round(gradient_norm(network, {"w": torch.zeros(2, 2)}, x, y).item(), 4)   # 5 √½
    3.5355
    """
    loss = lambda params: torch.nn.functional.cross_entropy(network(params, x), y)
    return norm(grad(loss)(params))


# ---------------------------------------------------------------------------------------- classes


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
        diagonal for a class with a single example.  Also NaN where one of the averaged values is.

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
    whole("num_classes", num_classes)
    sizes = (len(classes1), len(classes1 if classes2 is None else classes2))
    if values.ndim != 2 or values.shape != sizes:
        raise ValueError(
            f"values must have one row and one column per example, {sizes}, "
            f"got shape {tuple(values.shape)}"
        )
    same = classes2 is None
    one = F.one_hot(classes1.long(), num_classes).to(values.dtype)
    two = one if classes2 is None else F.one_hot(classes2.long(), num_classes).to(values.dtype)
    if same:
        values = values.clone()
        values.diagonal().zero_()
    missing = values.isnan()
    total = one.mT @ values.masked_fill(missing, 0) @ two
    pairs = one.sum(0)[:, None] * two.sum(0)
    if same:
        pairs = pairs - torch.diag(one.sum(0))
    broken = one.mT @ missing.to(values.dtype) @ two > 0
    return torch.where(broken, math.nan, total / pairs)


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


@dataclass(frozen=True)
class ClassStiffness:
    """Instrument: stiffness by class, of many networks at once.

    For :func:`flatmin.fit` (``instruments={"within": ClassStiffness(10)}``) and
    ``Networks.measure``; pairs are formed among the first examples of the split.

    Parameters
    ----------
    num_classes : int
        K.
    of : {"within", "between", "matrix"}
        The mean over the class matrix's diagonal, off it, or the matrix [K, K] itself.
    measure : {"cosine", "sign"}
        Which stiffness.  Fort et al. prefer the cosine within a class, the sign between.
    examples : int, optional
        How many examples of the split; default: all.
    loss : callable
        From logits [n, K] and classes [n] to losses [n].
    """

    num_classes: int
    of: str = "within"
    measure: str = "cosine"
    examples: int | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = example_losses

    def __post_init__(self) -> None:
        whole("num_classes", self.num_classes)
        if self.examples is not None:
            whole("examples", self.examples)
        for name, allowed in {"of": [*_MEANS], "measure": ["cosine", "sign"]}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions that it returns."""
        return ("class_1", "class_2") if self.of == "matrix" else ()

    def __call__(self, network: Network, params: Params, x: Tensor, y: Tensor) -> Tensor:
        x, y = x[: self.examples], y[: self.examples]
        pairs = getattr(network_stiffness(network, params, x, y, loss=self.loss), self.measure)
        return _MEANS[self.of](class_matrix(pairs, y, num_classes=self.num_classes))


_MEANS = {"within": within_classes, "between": between_classes, "matrix": lambda matrix: matrix}


# --------------------------------------------------------------------------------------- distance


def input_distance(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    r"""Distance of inputs on the unit sphere, :math:`1-\cos(X_1, X_2)`: [n1, n2], in [0, 2].

    Inputs of any shape [n, ...] are flattened; without ``x2``, all pairs of ``x1``.  An input that
    is all zeros has no direction: its distances are NaN.

    >>> x2 = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    >>> input_distance(torch.tensor([[1.0, 0.0]]), x2)
    tensor([[0., 1., 2.]])
    """
    on_sphere = lambda x: (u := x.flatten(1)) / u.norm(dim=1, keepdim=True)
    one = on_sphere(x1)
    return 1 - (one @ (one if x2 is None else on_sphere(x2)).mT).clamp(-1, 1)


@dataclass(frozen=True)
class CriticalLength:
    """Where stiffness, fitted as a line in the inputs' distance, falls to zero.

    Attributes
    ----------
    xi : float
        The dynamical critical length: the distance at which the line crosses zero.  NaN if the
        line does not fall, or does not cross zero between the smallest and the largest distance
        of the pairs.
    low, high : float
        Its bootstrap interval.  NaN unless the lines of at least ``confidence`` of the resamples
        cross zero within the data.
    crossing : float
        Share of the resamples whose lines cross zero within the data.
    slope, intercept : float
        The line, by least squares.
    """

    xi: float
    low: float
    high: float
    crossing: float
    slope: float
    intercept: float


def critical_length(
    values: Tensor,
    distance: Tensor,
    classes1: Tensor,
    classes2: Tensor | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CriticalLength:
    r"""Dynamical critical length ξ of the stiffness within classes, with a bootstrap interval.

    Over the pairs within a class, :math:`X_1\neq X_2`, the line

    .. math:: S \approx \alpha + \beta\,d, \qquad \xi = -\alpha/\beta,

    is fitted by least squares: up to the distance ξ, a step on an example helps its own class
    (Fort et al., arXiv 1901.09491).

    Parameters
    ----------
    values : Tensor
        Stiffness of each pair, [n1, n2].
    distance : Tensor
        Their distance, [n1, n2], see :func:`input_distance`.
    classes1, classes2 : Tensor
        Classes [n1] and [n2]; without the second, rows and columns are the same examples.
    resamples : int
        How many bootstrap resamples.
    confidence : float
        Coverage of the interval from ``low`` to ``high``, between two quantiles.
    seed : int
        Seed of the resamples.

    Returns
    -------
    CriticalLength

    Notes
    -----
    The bootstrap draws *examples*, and takes all pairs of those drawn: n examples make n² pairs,
    but pairs that share an example vary together, and an interval from drawn pairs would be far
    too narrow.  An example that is drawn twice makes no pair with itself.

    Examples
    --------
    Points on an arc, and a stiffness that falls to zero at the distance ½:

    >>> angle = torch.linspace(0, 1.5, 30)
    >>> d = input_distance(torch.stack([angle.cos(), angle.sin()], 1))
    >>> result = critical_length(1 - 2 * d, d, torch.zeros(30))
    >>> round(result.xi, 4), round(result.low, 4), round(result.high, 4), result.crossing
    (0.5, 0.5, 0.5, 1.0)
    """
    sizes = (len(classes1), len(classes1 if classes2 is None else classes2))
    for name, matrix in {"values": values, "distance": distance}.items():
        if matrix.shape != sizes:
            raise ValueError(f"{name} must have shape {sizes}, got {tuple(matrix.shape)}")
    whole("resamples", resamples)
    if not 0 < number("confidence", confidence, 0, 1) < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence!r}")
    same = classes2 is None
    pairs: Any = classes1[:, None] == (classes1 if same else classes2)
    if same:
        pairs = pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)
    nan = math.nan
    undefined = CriticalLength(nan, nan, nan, 0.0, nan, nan)
    if not pairs.any():
        return undefined
    s, d = values.double(), distance.double()
    nearest, farthest = d[pairs].min(), d[pairs].max()
    middle = (nearest + farthest) / 2  # a centred distance keeps the sums below accurate
    centred = d - middle
    terms = [torch.ones_like(d), centred, centred**2, s, centred * s]
    terms = [torch.where(pairs, term, 0) for term in terms]

    def lines(weights1: Tensor, weights2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted least squares; example weights [B, n1] and [B, n2] make weights of pairs."""
        w, wd, wdd, ws, wds = [((weights1 @ t) * weights2).sum(1) for t in terms]
        slope = (w * wds - wd * ws) / (w * wdd - wd**2)
        intercept = (ws - slope * wd) / w - slope * middle
        xi = -intercept / slope
        falls_to_zero = (slope < 0) & (nearest <= xi) & (xi <= farthest)
        return slope, intercept, torch.where(falls_to_zero, xi, math.nan)

    def draw_counts(n: int, purpose: str) -> Tensor:
        """How often each of n examples is drawn, [B, n]."""
        draws = torch.randint(n, (resamples, n), generator=stream(seed, purpose))
        return torch.zeros(resamples, n).scatter_add_(1, draws, torch.ones(resamples, n)).to(s)

    if nearest == farthest:
        return undefined
    each_once = [s.new_ones(1, n) for n in sizes]
    slope, intercept, xi = (float(v) for v in lines(*each_once))
    weights1 = draw_counts(sizes[0], "bootstrap of rows")
    weights2 = weights1 if same else draw_counts(sizes[1], "bootstrap of columns")
    crossings = lines(weights1, weights2)[2]
    crossings = crossings[~crossings.isnan()]
    crossing, low, high = len(crossings) / resamples, math.nan, math.nan
    if crossing >= confidence:
        tail = (1 - confidence) / 2
        low, high = crossings.quantile(crossings.new_tensor([tail, 1 - tail])).tolist()
    return CriticalLength(xi, low, high, crossing, slope, intercept)


# --------------------------------------------------- inner products of gradients, from factors


@dataclass(frozen=True)
class _Explicit:
    """The gradients themselves, [n, P]."""

    gradient: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.gradient,)

    def inner(self, other: Any) -> Tensor:  # of the same kind
        return self.gradient @ other.gradient.mT

    def squares(self) -> Tensor:
        return self.gradient.norm(dim=1).square()


_MAX_TEMPORARY = 2**22  # numbers in a temporary tensor, so that it fits into a cache


@dataclass(frozen=True)
class _OuterProducts:
    r"""Gradients as sums of outer products, :math:`\sum_t \delta_t a_t^\top`, for each group.

    ``a`` is [groups, n, T, I], or [groups, n, T] integers that stand for one-hot vectors;
    ``d`` is [groups, n, T, O].  With ``bias``, each a has one more component, which is 1.
    """

    a: Tensor
    d: Tensor
    bias: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.d

    def inner(self, other: Any) -> Tensor:  # of the same kind
        groups, n1, t1, _ = self.d.shape
        _, n2, t2, _ = other.d.shape
        if t1 == t2 == groups == 1:
            return _position_products(self, other)[0]
        step = max(1, _MAX_TEMPORARY // (groups * t1 * n2 * t2))
        parts = [
            _position_products(self.rows(slice(i, i + step)), other)
            .view(groups, -1, t1, n2, t2)
            .sum((0, 2, 4))
            for i in range(0, n1, step)
        ]
        return torch.cat(parts)

    def squares(self) -> Tensor:
        if self.d.shape[2] == 1 and self.a.is_floating_point():
            return ((self.a.square().sum(-1) + self.bias) * self.d.square().sum(-1)).sum((0, 2))
        groups, n, t, _ = self.d.shape
        step = max(1, _MAX_TEMPORARY // (groups * t * t))
        parts = [self.rows(slice(i, i + step)) for i in range(0, n, step)]
        return torch.cat(
            [(_input_products(p.a, p.a, p.bias) * (p.d @ p.d.mT)).sum((0, 2, 3)) for p in parts]
        )

    def rows(self, rows: slice) -> "_OuterProducts":
        return _OuterProducts(self.a[:, rows], self.d[:, rows], self.bias)


def _position_products(one: _OuterProducts, two: _OuterProducts) -> Tensor:
    """(a·a' + 1)(δ·δ') for all pairs of positions of all pairs of examples: [groups, nT, n'T']."""
    a1, d1, a2, d2 = (t.flatten(1, 2) for t in (one.a, one.d, two.a, two.d))
    return (d1 @ d2.mT).mul_(_input_products(a1, a2, one.bias))


def _input_products(a1: Tensor, a2: Tensor, bias: bool) -> Tensor:
    """Inner products of the last dimensions, plus 1 for a bias; of one-hot vectors, equality."""
    if not a1.is_floating_point():
        return a1[..., :, None] == a2[..., None, :]
    products = a1 @ a2.mT
    return products.add_(1) if bias else products


@dataclass(frozen=True)
class _ExampleGradients:
    """The gradients of n examples, divided by ``unit`` [n]; one part per group of parameters."""

    parts: dict[str, _Explicit | _OuterProducts]
    unit: Tensor

    @property
    def squares(self) -> Tensor:
        return _sum(part.squares() for part in self.parts.values())


def _inner(one: _ExampleGradients, two: _ExampleGradients) -> Tensor:
    return _sum(part.inner(two.parts[name]) for name, part in one.parts.items())


def _symmetric(inner: Tensor) -> Tensor:
    return (inner + inner.mT) / 2


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, tensors)  # sum() would copy the first, onto 0


def _as_stiffness(
    inner: Tensor, squares1: Tensor, unit1: Tensor, squares2: Tensor, unit2: Tensor
) -> Stiffness:
    norms1, norms2 = squares1.clamp(min=0).sqrt(), squares2.clamp(min=0).sqrt()
    inverse1, inverse2 = (torch.where(norms == 0, 0, 1 / norms) for norms in (norms1, norms2))
    cosine = (inner * inverse1[:, None]).mul_(inverse2).clamp(-1, 1)  # NaN, times 0, stays
    unit1, unit2 = unit1.to(inner), unit2.to(inner)
    gram = (inner * unit1[:, None]).mul_(unit2)
    return Stiffness(gram, cosine, norms1 * unit1, norms2 * unit2)


def _unit(gradients: list[Tensor], n: int) -> Tensor:
    """For each example, the power of two just below the largest entry of its output's gradient.

    All gradients are divided by it: the inner product of two gradients of a fitted network, 1e-25
    each, is then not rounded to zero.  Dividing by a power of two itself rounds nothing.
    """
    largest = [g.detach().abs().reshape(n, -1).amax(1) for g in gradients if g.shape[0] == n]
    if not largest:
        return gradients[0].new_ones(n)
    exponent = torch.stack([m.float() for m in largest]).amax(0).log2().floor()
    bound = 14 if gradients[0].dtype == torch.float16 else 120
    return exponent.clamp(-bound, bound).exp2().to(gradients[0].dtype)


# ------------------------------------------------- what operations do with the parameters they use


class _Operation(NamedTuple):
    """One call of a known operation: its parameters, and how to get their gradients."""

    weight: Any
    bias: Any
    saved: Any  # a tensor, or None
    kind: str  # "outer": factors(saved, δ) = a, d;  "scale": factors(saved, δ) = the two gradients
    factors: Callable[[Any, Tensor], tuple[Any, ...]]
    groups: int = 1
    channel: int = -1  # the dimension of δ along which the bias lies
    weight_gradients: Callable[[Tensor, Tensor], Tensor] | None = None  # a faster Σ_t δ_t a_tᵀ


def _by_position(t: Tensor) -> Tensor:
    """[n, ..., I] → [1, n, T, I]."""
    return t.reshape(1, t.shape[0], -1, t.shape[-1])


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Operation:
    return _Operation(
        weight, bias, input, "outer", lambda a, delta: (_by_position(a), _by_position(delta))
    )


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Operation | None:
    size = weight.shape[2:]
    if input.ndim != weight.ndim:  # one image without a batch dimension
        return None
    each = lambda v: (v,) * len(size) if isinstance(v, int) else tuple(v) * (len(size) // len(v))
    stride, dilation = each(stride), each(dilation)
    if padding == "same":
        spread = [dil * (k - 1) for dil, k in zip(dilation, size)]
        pairs = [(s // 2, s - s // 2) for s in spread]
    else:
        pairs = [(p, p) for p in each(0 if padding == "valid" else padding)]
    sides = [side for pair in reversed(pairs) for side in pair]  # F.pad counts from the last

    def factors(image: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.pad(image, sides)
        for dim, (k, step, dil) in enumerate(zip(size, stride, dilation), start=2):
            patches = patches.unfold(dim, dil * (k - 1) + 1, step)[..., ::dil]
        n, out = delta.shape[0], delta.shape[2:].numel()
        patches = patches.unflatten(1, (groups, -1)).movedim(1, 0)  # [g, n, C, *out, *size]
        a = patches.movedim(tuple(range(-len(size), 0)), tuple(range(3, 3 + len(size))))
        return (
            a.reshape(groups, n, -1, out).mT,
            delta.reshape(n, groups, -1, out).movedim(1, 0).mT,
        )

    def weight_gradients(image: Tensor, delta: Tensor) -> Any:
        """All n gradients as the gradient of one convolution with n times as many groups."""
        n, as_channels = len(delta), lambda t: t.reshape(1, -1, *t.shape[2:])
        shape = (n * weight.shape[0], *weight.shape[1:])
        gradient_of = getattr(torch.nn.grad, f"conv{len(size)}d_weight")
        image, delta = as_channels(F.pad(image, sides)), as_channels(delta)
        gradient = gradient_of(image, shape, delta, stride, 0, dilation, n * groups)
        return gradient.reshape(n, -1)

    faster = input.device.type == "cpu"  # there 1.1 to 2.7 times as fast as patches
    special = weight_gradients if faster else None
    return _Operation(weight, bias, input, "outer", factors, groups, 1, special)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> _Operation | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]

    def factors(index: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if padding_idx is not None:
            delta = torch.where((index == padding_idx)[..., None], 0, delta)
        return index.reshape(1, len(index), -1), _by_position(delta)

    return _Operation(weight, None, input, "outer", factors)


def _normalization(function: Callable[..., Tensor]) -> Callable[..., _Operation | None]:
    """Layer, group, instance, RMS and batch norm: a scale and a bias after a fixed map."""
    signature = inspect.signature(function)

    def operation(*args: Any, **kwargs: Any) -> _Operation | None:
        arguments = signature.bind(*args, **kwargs).arguments
        input: Any
        input, weight, bias = (arguments.get(name) for name in ("input", "weight", "bias"))
        shape = getattr(weight if weight is not None else bias, "shape", None)
        if shape is None:
            return None
        if "normalized_shape" not in arguments:  # one value per channel
            shape = (*shape, *[1] * (input.ndim - 2))
        settings = {k: v for k, v in arguments.items() if k not in ("input", "weight", "bias")}

        def factors(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            return _sum_to(delta * function(x, **settings), shape), _sum_to(delta, shape)

        return _Operation(weight, bias, input, "scale", factors)

    return operation


def _scale(parameter: Tensor, other: Tensor) -> _Operation:
    """A parameter times activations."""
    factors = lambda x, delta: (_sum_to(delta * x, parameter.shape), None)
    return _Operation(parameter, None, other, "scale", factors)


def _shift(parameter: Tensor, other: Tensor) -> _Operation:
    """A parameter plus activations."""
    factors = lambda _, delta: (_sum_to(delta, parameter.shape), None)
    return _Operation(parameter, None, None, "scale", factors)


def _sum_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """[n, ...] summed over the dimensions along which a parameter of this shape is repeated."""
    shape = [1] * (t.ndim - 1 - len(shape)) + list(shape)[-(t.ndim - 1) :]
    repeated = [dim for dim, size in enumerate(shape, start=1) if size == 1]
    return (t.sum(repeated) if repeated else t).reshape(t.shape[0], -1)


_OPERATIONS: dict[Any, Callable[..., _Operation | None]] = {
    F.linear: _linear,
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
    F.embedding: _embedding,
    **{f: _normalization(f) for f in (F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm)},
    F.batch_norm: _normalization(F.batch_norm),
}
_COMMUTATIVE: dict[Any, Callable[[Tensor, Tensor], _Operation]] = {
    torch.mul: _scale,
    Tensor.mul: _scale,
    torch.add: _shift,
    Tensor.add: _shift,
}


# ---------------------------------------------------------- what a network does with its parameters


class _Use(NamedTuple):
    """One recorded operation, its parameters by name."""

    weight: str | None
    bias: str | None
    shape: Any  # of the weight, if there is one
    operation: _Operation
    output: Any  # what the recorder's ``on_output`` kept of the output


class _OperationRecorder(TorchFunctionMode):
    """Records the known operations on parameters while a network runs.

    Parameters
    ----------
    params : dict of Tensor
        The parameters to follow, the very tensors that the network uses.
    n : int
        The number of examples, which a known operation has as the first dimension of its output.
    on_output : callable
        From an output to (what is recorded, what the network continues with).
    detach : bool
        Detach the parameters of the known operations: what still has a gradient has another use.
    """

    def __init__(
        self,
        params: Params,
        n: int,
        on_output: Callable[[Any], tuple[Any, Any]] = lambda out: (out.shape, out),
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in params.items()}
        self.n, self.on_output, self.detach = n, on_output, detach
        self.uses: list[_Use] = []
        self.used_otherwise: set[str] = set()  # parameters with a use that is not known

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            _check_batch_norm(inspect.signature(func).bind(*args, **kwargs).arguments)
        used = {id(v) for v in tree_leaves((args, kwargs)) if id(v) in self.names}
        if not used:
            return func(*args, **kwargs)
        operation = self._operation(func, args, kwargs)
        known = {id(p) for p in operation[:2] if id(p) in used} if operation else set()
        if self.detach and known:
            detached = lambda v: v.detach() if id(v) in known else v
            detached_args = [detached(v) for v in args]
            out = func(*detached_args, **{k: detached(v) for k, v in kwargs.items()})
            if out.shape[:1] != (self.n,):
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if operation and known and out.shape[:1] == (self.n,):
            weight, bias = (self.names.get(id(p)) for p in operation[:2])
            shape = getattr(operation.weight, "shape", None)
            kept, out = self.on_output(out)
            nameless = operation._replace(weight=None, bias=None)
            self.uses.append(_Use(weight, bias, shape, nameless, kept))
            used -= known
        if any(isinstance(v, Tensor) for v in tree_leaves(out)):
            self.used_otherwise |= {self.names[i] for i in used}
        return out

    def _operation(self, func: Any, args: Any, kwargs: Any) -> _Operation | None:
        if func in _COMMUTATIVE:
            if kwargs or len(args) != 2 or not all(isinstance(v, Tensor) for v in args):
                return None
            args = sorted(args, key=lambda v: id(v) not in self.names)  # the parameter first
            return _COMMUTATIVE[func](*args)
        return _OPERATIONS[func](*args, **kwargs) if func in _OPERATIONS else None

    @property
    def calls(self) -> list[tuple[str | None, str | None]]:
        return [(use.weight, use.bias) for use in self.uses]


def _check_batch_norm(arguments: dict[str, Any]) -> None:
    if arguments.get("training"):
        raise ValueError(
            "model must not normalize with the statistics of the batch: then examples act on each "
            "other, and none has a gradient of its own. Use evaluation mode, and batch norm with "
            "track_running_stats=True"
        )


def _parts(
    uses: list[_Use], deltas: list[Tensor], rest: Tensor
) -> dict[str, _Explicit | _OuterProducts]:
    """The parts of the gradients, from the uses and the gradients ``deltas`` of their outputs."""
    explicit: dict[str, list[Tensor]] = defaultdict(list)  # the gradients of each use
    outer = defaultdict(list)
    for use, delta in zip(uses, deltas, strict=True):
        if use.operation.kind == "outer":
            outer[use.weight, use.bias].append((use, delta))
        else:
            gradients = use.operation.factors(use.operation.saved, delta)
            for name, gradient in zip((use.weight, use.bias), gradients):
                if name is not None:
                    explicit[name].append(_upcast(gradient))
    # a bias that is always used with the same weight is one more input of that layer
    counts = Counter(name for use in uses for name in {use.weight, use.bias})
    together = {
        (w, b): counts[w] == counts[b] == len(calls)
        for (w, b), calls in outer.items()
        if None not in (w, b)
    }
    weights: dict[str | None, list[tuple[_Use, Tensor]]] = defaultdict(list)
    for (weight, _), calls in outer.items():
        weights[weight] += calls
    parts: dict[str, _Explicit | _OuterProducts] = {}
    for weight, calls in weights.items():
        paired = weight is not None and counts[weight] == len(calls) and _pairs_are_cheaper(calls)
        absorbed = {b for (w, b), always in together.items() if w == weight and always and paired}
        for use, delta in calls:
            if use.bias is not None and use.bias not in absorbed:
                channels = delta.movedim(use.operation.channel, -1)
                gradient = _upcast(channels).reshape(len(delta), -1, channels.shape[-1]).sum(1)
                explicit[use.bias].append(gradient)
        if paired and weight is not None:
            factors = [use.operation.factors(use.operation.saved, delta) for use, delta in calls]
            a, d = (_upcast(_concatenate(part, 2)) for part in zip(*factors))
            parts[weight] = _OuterProducts(a, d, bool(absorbed))
        elif weight is not None:
            explicit[weight] += [_weight_gradients(use, delta) for use, delta in calls]
    explicit[""] = [rest]  # no parameter is called "" or "."
    sums = {name: _sum(gradients) for name, gradients in explicit.items()}
    small = [name for name, gradient in sums.items() if gradient.shape[1] < 1000]
    if small:  # one matrix product instead of many
        sums["."] = torch.cat([sums.pop(name) for name in small], 1)
    return parts | {name: _Explicit(gradient) for name, gradient in sums.items()}


def _sizes(use: _Use, delta: Tensor) -> tuple[int, int, int]:
    """T, I and O of an "outer" operation; a one-hot vector costs as much as one number."""
    is_index = not use.operation.saved.is_floating_point()
    outputs = use.shape[1] if is_index else use.shape[0]
    inputs = 1 if is_index else use.shape[1:].numel()
    return delta[0].numel() // outputs, inputs, outputs // use.operation.groups


def _pairs_are_cheaper(calls: list[tuple[_Use, Tensor]]) -> bool:
    if len({use.operation.saved.is_floating_point() for use, _ in calls}) > 1:
        return False  # an embedding tied to a linear layer
    use, delta = calls[0]
    positions = sum(_sizes(*call)[0] for call in calls)
    _, inputs, outputs = _sizes(use, delta)
    return positions**2 * (inputs + outputs) < use.shape.numel() // use.operation.groups


def _weight_gradients(use: _Use, delta: Tensor) -> Tensor:
    """The weight's gradients, [n, P]: Σ_t δ_t a_tᵀ."""
    positions, inputs, outputs = _sizes(use, delta)
    saved, groups = use.operation.saved, use.operation.groups
    step = max(1, _MAX_TEMPORARY // (positions * (inputs + outputs) * groups))
    gradients = []
    for i in range(0, len(delta), step):
        rows = slice(i, i + step)
        if use.operation.weight_gradients is not None:
            image, d = _upcast(saved[rows]), _upcast(delta[rows])
            gradients.append(use.operation.weight_gradients(image, d))
            continue
        a, d = use.operation.factors(saved[rows], delta[rows])
        d = _upcast(d)
        if a.is_floating_point():
            gradients.append((d.mT @ _upcast(a)).movedim(0, 1).flatten(1))
        else:
            zeros = d.new_zeros(d.shape[1], *use.shape)
            index = a[0][..., None].expand(d[0].shape)
            gradients.append(torch.scatter_add(zeros, 1, index, d[0]).flatten(1))
    return torch.cat(gradients)


def _gradients_by_vmap(
    network: Network,
    params: Params,
    names: list[str],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    unit: Tensor,
) -> Tensor:
    """Gradients with respect to the parameters ``names``, [n, P], by vmap(grad)."""
    if not names:
        return _upcast(unit).new_zeros(len(x), 0)

    def scaled_loss(chosen: Params, x: Tensor, y: Tensor, unit: Tensor) -> Tensor:
        return (loss(network({**params, **chosen}, x[None]), y[None]) / unit).sum()

    chosen = {name: params[name].detach() for name in names}
    with sdpa_kernel(SDPBackend.MATH):  # vmap supports no other attention
        gradients = vmap(grad(scaled_loss), in_dims=(None, 0, 0, 0))(chosen, x, y, unit)
    return torch.cat([_upcast(g).reshape(len(x), -1) for g in gradients.values()], 1)


def _gradients_in_a_loop(
    network: Network,
    params: Params,
    names: list[str],
    loss: Loss,
    x: Tensor,
    y: Tensor,
    unit: Tensor,
) -> Tensor:
    """The same for what vmap cannot run, such as torch.nn.LSTM or a branch that depends on data."""
    chosen = [params[name] for name in names]
    rows = []
    for i in range(len(x)):
        losses = loss(network(params, x[i : i + 1]), y[i : i + 1]) / unit[i]
        gradient = torch.autograd.grad(losses.sum(), chosen, materialize_grads=True)
        rows.append(torch.cat([_upcast(g).flatten() for g in gradient]))
    return torch.stack(rows)


class _ModuleGradients:
    """Gradients of a module's loss: called with examples, it gives each example's."""

    @torch.enable_grad()
    def __init__(self, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> None:
        model = getattr(model, "_orig_mod", model)  # a compiled model hides its operations
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.network = lambda params, x: functional_call(model, (params, buffers), (x,))
        self.loss = loss
        self.calls: list[tuple[str | None, str | None]] | None = None
        renormalized = any(getattr(m, "max_norm", None) is not None for m in model.modules())
        # max_norm changes weights in place
        own = lambda p: p.detach().clone() if renormalized else p.detach()
        self.params = {
            name: own(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()
        }
        trainable = {name: p for name, p in self.params.items() if p.requires_grad}
        if not trainable:
            raise ValueError("model must have a parameter that requires a gradient, got none")

        # Two runs, on 2 and on 3 copies of an example: a dimension that changes counts examples.
        # The parameters of known operations are detached there: those that still get a gradient
        # have another use as well.
        rest = set()
        for n in (2, 3):
            with _OperationRecorder(trainable, n, detach=True) as recorder:
                output = self.network(self.params, _repeat_first(x, n))
            losses = _check_losses(loss(output, _repeat_first(y, n)), n)
            if losses.requires_grad:
                weights = [*trainable.values()]
                gradients = torch.autograd.grad(losses.sum(), weights, allow_unused=True)
                rest |= {name for name, g in zip(trainable, gradients) if g is not None}
        self.rest = sorted(rest)
        self.known = {name: p for name, p in trainable.items() if name not in rest}

        others = losses.new_zeros(n, sum(trainable[name].numel() for name in rest))
        deltas = [losses.new_zeros(use.output) for use in recorder.uses]
        parts = _parts(recorder.uses, deltas, others).values()
        kept = [t.numel() * t.element_size() for part in parts for t in part.tensors]
        self.bytes_kept = sum(kept) // n + 1
        inputs = [use.operation.saved for use in recorder.uses if use.operation.saved is not None]
        numbers = sum(t.numel() for t in inputs) + 3 * sum(u.output.numel() for u in recorder.uses)
        self.bytes_passing = numbers * losses.element_size() // n + self.bytes_kept

    @torch.enable_grad()
    def __call__(self, x: Tensor, y: Tensor) -> _ExampleGradients:
        n = len(x)

        def on_output(out: Tensor) -> tuple[Any, Tensor]:
            # its edge in autograd's graph, which no later in-place operation changes
            return (get_gradient_edge(out) if out.requires_grad else None, out.shape), out

        with _OperationRecorder(self.known, n, on_output) as recorder:
            output = self.network(self.params, x)
        self.calls = self.calls or recorder.calls
        if recorder.calls != self.calls:
            raise ValueError("model must use its parameters in the same way for all inputs")
        losses = _check_losses(self.loss(output, y), n)
        unit, deltas = self._backward(losses, output, [use.output for use in recorder.uses])
        arguments = (self.network, self.params, self.rest, self.loss, x, y, unit)
        try:
            rest = _gradients_by_vmap(*arguments)
        except RuntimeError:
            rest = _gradients_in_a_loop(*arguments)
        with torch.no_grad():
            return _ExampleGradients(_parts(recorder.uses, deltas, rest), unit)

    @staticmethod
    def _backward(losses: Tensor, output: Any, recorded: list[Any]) -> tuple[Tensor, list[Tensor]]:
        """The units of the losses' gradients, and δ of each recorded (edge, shape)."""

        def gradients(inputs: list[Any], weights: Tensor, **options: Any) -> list[Tensor | None]:
            if not (inputs and losses.requires_grad):
                return [None] * len(inputs)
            return [*torch.autograd.grad(losses, inputs, weights, allow_unused=True, **options)]

        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        ones = torch.ones_like(losses)
        of_outputs = [g for g in gradients(outputs, ones, retain_graph=True) if g is not None]
        unit = _unit(of_outputs, len(losses)) if of_outputs else ones.detach()
        edges = [edge for edge, _ in recorded if edge is not None]
        of_edges = iter(gradients(edges, 1 / unit))
        deltas = [next(of_edges) if edge is not None else None for edge, _ in recorded]
        zeros = lambda shape: unit.new_zeros(shape)
        return unit, [zeros(shape) if d is None else d for d, (_, shape) in zip(deltas, recorded)]


class _FunctionalUses(NamedTuple):
    """How a pure function uses its parameters, as :class:`_ModuleGradients` finds for a module."""

    known: dict[str, Tensor]  # parameters of known operations only
    rest: list[str]
    shapes: list[torch.Size]  # of the operations' outputs, for one example


def _functional_uses(network: Network, params: Params, x: Tensor) -> _FunctionalUses:
    # Under vmap nothing shows whether a gradient exists, but there every use is an operation.
    used_otherwise, known_uses = set(), []
    for n in (2, 3):
        with _OperationRecorder(params, n) as recorder:
            network(params, _repeat_first(x, n))
        known_uses.append({name for use in recorder.uses for name in (use.weight, use.bias)})
        used_otherwise |= recorder.used_otherwise
    known = (known_uses[0] & known_uses[1]) - used_otherwise
    shapes = [u.output[1:] for u in recorder.uses if {u.weight, u.bias} & known]
    rest = sorted({*params} - known)
    return _FunctionalUses({k: p for k, p in params.items() if k in known}, rest, shapes)


def _functional_gradients(
    network: Network,
    params: Params,
    loss: Loss,
    parameter_uses: _FunctionalUses,
    x: Tensor,
    y: Tensor,
) -> _ExampleGradients:
    n = len(x)
    uses: list[_Use] = []

    def run(probes: list[Tensor]) -> Any:
        """Probes are zeros, added to the operations' outputs: their gradients are the δ."""
        probe = iter(probes)
        add_probe = lambda out: (None, out + next(probe))
        with _OperationRecorder(parameter_uses.known, n, add_probe) as recorder:
            output = network(params, x)
        uses.extend(recorder.uses)
        losses = _check_losses(loss(output, y), n)
        saved = [use.operation.saved for use in recorder.uses]
        return losses, (output, [losses if t is None else t for t in saved])

    dtype = next(iter(params.values())).dtype
    probes = [
        torch.zeros(n, *shape, dtype=dtype, device=x.device) for shape in parameter_uses.shapes
    ]
    result: Any = vjp(run, probes, has_aux=True)
    _, backward, (output, saved) = result
    unit = _unit([grad(lambda output: loss(output, y).sum())(output)], n)
    (deltas,) = backward(1 / unit)
    uses = [u._replace(operation=u.operation._replace(saved=s)) for u, s in zip(uses, saved)]
    rest = _gradients_by_vmap(network, params, parameter_uses.rest, loss, x, y, unit)
    return _ExampleGradients(_parts(uses, deltas, rest), unit)


# -------------------------------------------------------------------------------- small helpers


def _repeat_first(t: Tensor, n: int) -> Tensor:
    return torch.cat([t[:1]] * n)


def _concatenate(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)  # cat would copy


def _upcast(t: Tensor) -> Tensor:
    """Half precision to single: half is too short for sums of products."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _check_losses(losses: Any, n: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss must return one number per example (reduction='none'), shape ({n},), got {got}"
        )
    return losses
