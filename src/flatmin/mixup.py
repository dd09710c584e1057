r"""Mixup and its kin: train on the vicinity of the examples in place of the examples.

Empirical risk puts a Dirac on every example.  *Vicinal* risk puts a distribution around it, and a
training step draws from it (Chapelle, Weston, Bottou & Vapnik, *Vicinal Risk Minimization*, NIPS
2000):

.. math:: L_\nu(\theta) = \frac1n\sum_i
          \mathbb E_{(\tilde x,\tilde y)\sim\nu(\cdot\,|\,x_i,y_i)}\,\ell(\theta;\tilde x,\tilde y).

:class:`Dirac`, :class:`Gaussian`, :class:`LabelSmoothing` and :class:`Mixup` are such
distributions.  Each has two methods: ``draw`` makes the random numbers for one batch, on the CPU,
and calling it computes the batch from them, without randomness.  So a batch can be repeated, and
the same objects fill the batch place of a :class:`~flatmin.training.Recipe` and, wrapped in a
:class:`BatchTransform`, any training loop.  All mixing goes through one line, :func:`combine`.
Nothing here changes a tensor in place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from ._checks import number, whole
from ._random import stream

__all__ = [
    "BatchTransform",
    "Dirac",
    "Gaussian",
    "LabelSmoothing",
    "Mixup",
    "combine",
    "dirichlet_weights",
    "mix",
    "mix_losses",
    "soft_targets",
]

Draw = dict[str, Tensor]


class Vicinity(Protocol):
    """What sits in the batch place, see :class:`flatmin.Recipe`."""

    def draw(
        self, y: Tensor, generator: torch.Generator, shape: Sequence[int], *y_other: Tensor
    ) -> Draw: ...

    def __call__(
        self, x: Tensor, y: Tensor, draw: Draw, num_classes: int, *other: Tensor
    ) -> tuple[Tensor, Tensor]: ...


# ----------------------------------------------------------------------------------- the kernel


def combine(weights: Sequence[float | Tensor] | Tensor, values: Sequence[Tensor]) -> Tensor:
    r"""The weighted sum :math:`\sum_j w_j v_j` of batches.

    Parameters
    ----------
    weights : k numbers or tensors, or a tensor [k] or [k, n]
        :math:`w_j`: one number for the whole batch, or one an example, [n].
    values : k tensors [n, ...]
        :math:`v_j`: inputs, soft targets, or what a hidden layer returns; floating point.

    Returns
    -------
    Tensor
        In the shape and dtype of the values.  Half precision is mixed in single precision and
        rounded once.

    Raises
    ------
    TypeError
        If a value is not floating point: convert images of whole numbers first, and mix the
        embeddings of tokens, not the tokens.

    Examples
    --------
    >>> combine([0.5, 0.25, 0.25], [torch.tensor([4.0]), torch.tensor([8.0]), torch.tensor([0.0])])
    tensor([4.])
    """
    dtype = _floating("values", values[0]).dtype
    values = [v.to(torch.promote_types(dtype, torch.float32)) for v in values]
    first, *rest = [v * _each_example(w, v) for w, v in zip(weights, values, strict=True)]
    return sum(rest, first).to(dtype)


def _each_example(w: float | Tensor, v: Tensor) -> float | Tensor:
    """A weight in the dtype of ``v``, and in a shape that broadcasts with it."""
    if not isinstance(w, Tensor):
        return w
    if w.ndim > 1 or (w.ndim == 1 and w.shape != v.shape[:1]):
        raise ValueError(
            f"weights must be one number, or one for each of the {v.shape[:1].numel()} examples, "
            f"got shape {list(w.shape)}"
        )
    return w.to(v.dtype).reshape(w.shape + (1,) * (v.ndim - w.ndim))


def mix(
    values: Tensor, lam: float | Tensor, permutation: Tensor, other: Tensor | None = None
) -> Tensor:
    r"""Mixup for one tensor: :math:`\tilde v_i = \lambda v_i + (1-\lambda)\,v_{\pi(i)}`.

    Call it with the same :math:`\lambda` and :math:`\pi` for the inputs and for the
    :func:`soft_targets`; for *manifold mixup* (Verma et al., ICML 2019), for what a hidden layer
    returns and the soft targets.

    Parameters
    ----------
    values : Tensor [n, ...]
        Floating point: images, sequences, feature vectors, soft targets, hidden units.
    lam : float or Tensor
        :math:`\lambda\in[0,1]`, the weight of the example itself: one number, or one an example.
    permutation : Tensor [n]
        Whole numbers: :math:`\pi(i)`, the partner of example i.
    other : Tensor [m, ...], optional
        Where partners come from; default: ``values``.

    Returns
    -------
    Tensor
        In the shape and dtype of ``values``.

    References
    ----------
    Zhang, Cissé, Dauphin & Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0], [4.0]]), torch.tensor([0, 1])
    >>> pi = torch.tensor([1, 0])
    >>> mix(x, 0.75, pi)
    tensor([[1.],
            [3.]])
    >>> mix(soft_targets(y, 2), 0.75, pi)
    tensor([[0.7500, 0.2500],
            [0.2500, 0.7500]])

    In a hidden layer:

    >>> encoder, head = torch.nn.Linear(1, 8), torch.nn.Linear(8, 2)
    >>> logits = head(mix(torch.relu(encoder(x)), 0.75, pi))
    """
    _fraction("lam", lam)
    _check_permutation(permutation, len(values))
    return combine((lam, 1 - lam), (values, (values if other is None else other)[permutation]))


def mix_losses(
    criterion: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    y: Tensor,
    lam: float | Tensor,
    permutation: Tensor,
    y_other: Tensor | None = None,
) -> Tensor:
    r"""The two-loss form: :math:`\lambda\,\ell(z_i,y_i)+(1-\lambda)\,\ell(z_i,y_{\pi(i)})`.

    Cross-entropy is linear in its target, so this *equals* the loss on mixed :func:`soft_targets`,
    example by example.  It needs no one-hot targets, and works with any criterion.  What a
    criterion does *after* the examples' losses can make the two differ:

    - **Class weights** with ``reduction="mean"``: for labels, PyTorch divides the sum by the
      weights of the labels; for soft targets by n.
    - **ignore_index**: an ignored label has no one-hot target (a row of zeros at best), and the
      mean over labels leaves ignored examples out of n.  Use the two-loss form.
    - A loss that is not linear in its target, such as a squared error, differs altogether.

    Parameters
    ----------
    criterion : callable
        ``criterion(logits, labels)``: a number, or the examples' losses [n].
    logits : Tensor [n, K]
        Of the mixed inputs.
    y, lam, permutation, y_other
        As in :func:`mix`, with labels [n] in place of values.

    Raises
    ------
    ValueError
        If there is one λ an example and the criterion returns one number: use
        ``reduction="none"``.

    Examples
    --------
    >>> from torch.nn.functional import cross_entropy
    >>> z, y, pi = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 2, 1, 0])
    >>> torch.allclose(mix_losses(cross_entropy, z, y, 0.3, pi),
    ...                cross_entropy(z, mix(soft_targets(y, 3), 0.3, pi)))
    True
    """
    _fraction("lam", lam)
    _check_permutation(permutation, len(y))
    own = criterion(logits, y)
    partners = criterion(logits, (y if y_other is None else y_other)[permutation])
    if isinstance(lam, Tensor) and lam.ndim > own.ndim:
        raise ValueError(
            f"criterion must return one loss an example when lam does (reduction='none'), got "
            f"shapes {list(own.shape)} and {list(lam.shape)}"
        )
    return combine((lam, 1 - lam), (own, partners))


def soft_targets(
    y: Tensor,
    num_classes: int,
    smoothing: float | Tensor = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Targets as probabilities, smoothed if wanted: :math:`(1-s)\,e_y + s/K`.

    Parameters
    ----------
    y : Tensor
        Labels, whole numbers [n] in 0 … K−1, or probabilities [n, K].  A label outside, such as
        PyTorch's ``ignore_index`` −100, gives a row of zeros before smoothing.
    num_classes : int
        K.
    smoothing : float or Tensor
        :math:`s\in[0,1]`: how much of the probability is spread evenly over all classes.
    dtype : torch.dtype, optional
        Default: that of ``y`` if it is floating point, else float32.

    Returns
    -------
    Tensor [n, K]

    Examples
    --------
    >>> soft_targets(torch.tensor([2, 0]), 4, smoothing=0.2)
    tensor([[0.0500, 0.0500, 0.8500, 0.0500],
            [0.8500, 0.0500, 0.0500, 0.0500]])
    """
    _fraction("smoothing", smoothing)
    dtype = dtype or (y.dtype if y.is_floating_point() else torch.float32)
    if y.ndim == 1 and not y.is_floating_point():
        y = y[:, None] == torch.arange(whole("num_classes", num_classes), device=y.device)
    elif y.ndim != 2 or y.shape[1] != num_classes:
        raise ValueError(
            f"y must be labels, whole numbers [n], or probabilities [n, {num_classes}], got "
            f"{y.dtype} of shape {list(y.shape)}"
        )
    y = y.to(dtype)
    if isinstance(smoothing, Tensor) or smoothing:
        y = (1 - smoothing) * y + smoothing / num_classes
    return y


def dirichlet_weights(u: Tensor, alpha: float) -> Tensor:
    r"""Weights :math:`w\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha)` from uniform numbers.

    Breaks a stick of length 1: the j-th piece is a share :math:`v_j\sim\mathrm{Beta}(\alpha,
    (k-j)\alpha)` of what is left, with :math:`v_j=F^{-1}(u_j)`, the inverse of Beta's cumulative
    distribution function.  For k = 2 this is mixup's :math:`\lambda\sim\mathrm{Beta}(\alpha,
    \alpha)`.  The same ``u`` with another ``alpha`` gives weights of the same rank: comparisons of
    values of ``alpha`` are paired.

    Parameters
    ----------
    u : Tensor [k−1, ...]
        Uniform in [0, 1), float64, on the CPU.
    alpha : float
        :math:`\alpha\ge0`.  At 0 all weight is on the first example: ERM.  (The limit
        :math:`\alpha\to0` puts it on a random one of the k, which for a permuted batch is ERM in
        another order.)

    Returns
    -------
    Tensor [k, ...]
        Non-negative, of sum 1 along the first dimension.

    Examples
    --------
    >>> u = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    >>> dirichlet_weights(u, 1.0)[0]                # Beta(1, 1) is uniform
    tensor([0.1000, 0.5000, 0.9000], dtype=torch.float64)
    >>> dirichlet_weights(u, 0.0)[0]
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    from scipy.special import betaincinv  # here: importing flatmin takes no longer than torch

    rest, weights = torch.ones_like(u[0]), []
    for j, uniform in enumerate(u, 1):
        share = torch.ones_like(uniform)
        if alpha > 0:
            share = torch.as_tensor(betaincinv(alpha, (len(u) + 1 - j) * alpha, uniform.numpy()))
        weights.append(share * rest)
        rest = rest * (1 - share)
    return torch.stack([*weights, rest])


# -------------------------------------------------------------------------- vicinal distributions


@dataclass(frozen=True)
class Dirac:
    """All of the vicinity in the example itself: empirical risk minimization.

    Examples
    --------
    >>> Dirac()(torch.ones(1, 2), torch.tensor([0]), {}, num_classes=3)
    (tensor([[1., 1.]]), tensor([0]))
    """

    def draw(
        self, y: Tensor, generator: torch.Generator, shape: Sequence[int], *y_other: Tensor
    ) -> Draw:
        return {}

    def __call__(
        self, x: Tensor, y: Tensor, draw: Draw, num_classes: int, *other: Tensor
    ) -> tuple[Tensor, Tensor]:
        return x, y


@dataclass(frozen=True)
class Gaussian:
    r"""Noise on the inputs: :math:`\tilde x\sim\mathcal N(x_i,\sigma^2 I)`, :math:`\tilde y=y_i`.

    The vicinity that Chapelle et al. (NIPS 2000) study.

    Parameters
    ----------
    sigma : float
        The standard deviation :math:`\sigma\ge0`, in the unit of the inputs.

    Examples
    --------
    >>> noise = {"noise": torch.tensor([[1.0, -2.0]])}
    >>> Gaussian(sigma=0.1)(torch.ones(1, 2), torch.tensor([0]), noise, num_classes=3)
    (tensor([[1.1000, 0.8000]]), tensor([0]))
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        _finite("sigma", self.sigma)

    def draw(
        self, y: Tensor, generator: torch.Generator, shape: Sequence[int], *y_other: Tensor
    ) -> Draw:
        return {"noise": torch.randn(shape, generator=generator, dtype=torch.float32)}

    def __call__(
        self, x: Tensor, y: Tensor, draw: Draw, num_classes: int, *other: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _floating("x", x) + self.sigma * draw["noise"].to(x.dtype), y


@dataclass(frozen=True)
class LabelSmoothing:
    r"""A vicinity on the labels: :math:`\tilde x=x_i`, :math:`\tilde y=(1-s)\,e_{y_i}+s/K`.

    The expectation of a label that is drawn anew, evenly from all K classes, with probability s;
    cross-entropy is linear in the target, so the expected loss is the loss of the expectation.

    Parameters
    ----------
    smoothing : float
        :math:`s\in[0,1]`.

    References
    ----------
    Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, CVPR 2016.

    Examples
    --------
    >>> LabelSmoothing(0.2)(torch.ones(1, 1), torch.tensor([0]), {}, num_classes=2)
    (tensor([[1.]]), tensor([[0.9000, 0.1000]]))
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        _fraction("smoothing", self.smoothing)

    def draw(
        self, y: Tensor, generator: torch.Generator, shape: Sequence[int], *y_other: Tensor
    ) -> Draw:
        return {}

    def __call__(
        self, x: Tensor, y: Tensor, draw: Draw, num_classes: int, *other: Tensor
    ) -> tuple[Tensor, Tensor]:
        return x, soft_targets(y, num_classes, self.smoothing, _target_dtype(x))


@dataclass(frozen=True)
class Mixup:
    r"""Convex combinations of examples and of their labels.

    .. math:: \tilde x=\sum_{j=1}^k w_j x_{\pi_j(i)},\quad
              \tilde y=\sum_{j=1}^k w_j e_{y_{\pi_j(i)}},\qquad
              w\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha),\quad \pi_1(i)=i.

    With k = 2 it is mixup: :math:`\lambda=w_1\sim\mathrm{Beta}(\alpha,\alpha)`.

    Parameters
    ----------
    alpha : float
        :math:`\alpha\ge0`.  0 is ERM, 1 mixes evenly, :math:`\alpha\to\infty` takes means.  A grid
        may give one a run.
    k : int
        How many examples are mixed, at least 2.
    partners : {"any", "same", "different"}
        Who is mixed: any two examples, only examples of the same class, or only of different
        classes.  ``"any"`` pairs by a random permutation.  The others draw each partner evenly
        from those allowed (for ``"same"`` these include the example itself); an example that has
        none is left as it is.
    per_example : bool
        Draw the weights for every example, not once for the batch.
    second_stream : bool
        Take the partners from a second batch, drawn independently, as from a second loader; not
        from the same batch.
    smoothing : float
        :math:`s\in[0,1]`: smooth the labels as well, as :class:`LabelSmoothing` does.  (Before or
        after the mixing is the same, as the weights sum to one.)

    References
    ----------
    Zhang, Cissé, Dauphin & Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.

    Examples
    --------
    >>> mixup = Mixup(alpha=0.2)
    >>> x, y = torch.tensor([[0.0], [8.0]]), torch.tensor([0, 1])
    >>> draw = {"weights": torch.tensor([[0.75, 0.75], [0.25, 0.25]]),
    ...         "partners": torch.tensor([[1, 0]])}
    >>> mixup(x, y, draw, num_classes=2)[0]
    tensor([[2.],
            [6.]])
    >>> draw = mixup.draw(y, torch.Generator().manual_seed(0), x.shape)
    >>> {name: list(v.shape) for name, v in draw.items()}
    {'weights': [2, 2], 'partners': [1, 2]}
    """

    alpha: float = 1.0
    k: int = 2
    partners: str = "any"
    per_example: bool = False
    second_stream: bool = False
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _finite("alpha", self.alpha)
        whole("k", self.k, 2)
        _fraction("smoothing", self.smoothing)
        if self.partners not in ("any", "same", "different"):
            raise ValueError(
                f"partners must be 'any', 'same' or 'different', got {self.partners!r}"
            )

    def draw(
        self, y: Tensor, generator: torch.Generator, shape: Sequence[int], *y_other: Tensor
    ) -> Draw:
        """Weights [k, n], float64, and the k−1 partners of each example, int64 [k−1, n]."""
        n, examples = len(y), len(y) if self.per_example else 1
        u = torch.rand(self.k - 1, examples, generator=generator, dtype=torch.float64)
        weights = dirichlet_weights(u, self.alpha).expand(self.k, n)
        (pool,) = y_other or (y,)
        if self.partners == "any":
            return {"weights": weights, "partners": _anyone(n, len(pool), self.k - 1, generator)}
        partners, found = _by_class(self.partners, y, pool, self.k - 1, generator)
        alone = torch.zeros_like(weights).index_fill(0, torch.tensor(0), 1.0)
        return {"weights": torch.where(found, weights, alone), "partners": partners}

    def __call__(
        self, x: Tensor, y: Tensor, draw: Draw, num_classes: int, *other: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = soft_targets(y, num_classes, self.smoothing, _target_dtype(_floating("x", x)))
        if not isinstance(self.alpha, Tensor) and self.alpha == 0:
            return x, y
        x_pool, y_pool = other or (x, y)
        if other:
            y_pool = soft_targets(y_pool, num_classes, self.smoothing, y.dtype)
        x, y = (
            combine(draw["weights"], (own, *(pool[partner] for partner in draw["partners"])))
            for own, pool in ((x, x_pool), (y, y_pool))
        )
        return x, y


def _anyone(n: int, m: int, k: int, generator: torch.Generator) -> Tensor:
    """k partners for each of n examples, out of m: by permutation, if there are as many."""
    if n == m:
        return torch.stack([torch.randperm(n, generator=generator) for _ in range(k)])
    return torch.randint(m, (k, n), generator=generator)


def _by_class(
    which: str, y: Tensor, pool: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """k partners for each example, of its class or of another; and whether there are any."""
    y, pool = (labels.argmax(1) if labels.ndim == 2 else labels for labels in (y, pool))
    pool, order = pool.cpu().sort()  # a class lies together, the others follow it cyclically
    first, after = (torch.searchsorted(pool, y.cpu(), right=right) for right in (False, True))
    start, count = (first, after - first)
    if which == "different":
        start, count = after, len(pool) - count
    steps = torch.rand(k, len(y), generator=generator, dtype=torch.float64) * count
    return order[(start + steps.long()) % len(pool)], count > 0


# ------------------------------------------------------------------------- in any training loop


class BatchTransform:
    """A vicinity for a training loop of your own: a batch transform, and a collate function.

    Called with a batch of inputs and labels, it returns inputs and (for mixup and label smoothing)
    soft targets, which ``nn.CrossEntropyLoss`` takes.  Nothing is changed in place; the inputs keep
    their dtype and device.

    Parameters
    ----------
    vicinity : Mixup, Gaussian, LabelSmoothing or Dirac
        What to draw from.
    num_classes : int
        K.
    seed : int
        From which all draws follow: batch number t draws from ``stream(seed, "batch", t)``, which
        is also what :func:`flatmin.fit` draws for that seed.  Give each process of a distributed
        run its own.  In a worker of a ``DataLoader``, the worker's own seed, which is new in every
        epoch, joins it.

    Attributes
    ----------
    count : int
        How many batches have been drawn; set it to go on where an interrupted run stopped.

    Raises
    ------
    TypeError
        For inputs that are not floating point, or samples that are no pairs.
    ValueError
        For labels outside 0 … K−1 (on the CPU; a GPU is not waited for).  For labels with an
        ``ignore_index``, mix the inputs with :func:`mix` and the losses with :func:`mix_losses`.

    Examples
    --------
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.randn(10, 3), torch.arange(10) % 2)
    >>> mixup = BatchTransform(Mixup(alpha=0.2), num_classes=2)
    >>> x, y = next(iter(DataLoader(data, batch_size=4, collate_fn=mixup.collate)))
    >>> x.shape, y.shape
    (torch.Size([4, 3]), torch.Size([4, 2]))

    Or after the loader, where the batch may be on a GPU already; and with a second loader:

    >>> loader, second = DataLoader(data, 4, shuffle=True), DataLoader(data, 4, shuffle=True)
    >>> for x, y in loader:
    ...     x, y = mixup(x, y)
    >>> for batch, other in zip(loader, second):
    ...     x, y = mixup(*batch, *other)
    """

    def __init__(self, vicinity: Vicinity, num_classes: int, seed: int = 0) -> None:
        self.vicinity = vicinity
        self.num_classes = whole("num_classes", num_classes)
        self.seed = whole("seed", seed, 0)
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor, *other: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) != len(y):
            raise ValueError(f"y must have one row for each of the {len(x)} inputs, got {len(y)}")
        if len(other) not in (0, 2):
            raise TypeError("other must be the inputs and the labels of a second batch")
        for labels in (y, *other[1:]):
            self._check_labels(labels)
        draw = self.vicinity.draw(y, self._generator(), x.shape, *other[1:])
        draw = {name: v.to(x.device) for name, v in draw.items()}
        return self.vicinity(x, y, draw, self.num_classes, *other)

    def collate(self, samples: list[Any]) -> tuple[Tensor, Tensor]:
        """The batch of a list of samples ``(x, y)``: ``DataLoader(..., collate_fn=….collate)``."""
        batch = default_collate(samples)
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TypeError(f"samples must be pairs (x, y), got {type(samples[0]).__name__}")
        return self(*batch)

    def _generator(self) -> torch.Generator:
        worker = get_worker_info()
        purpose = "batch" if worker is None else f"batch/{worker.seed}"
        self.count += 1
        return stream(self.seed, purpose, self.count - 1)

    def _check_labels(self, y: Tensor) -> None:
        if y.ndim == 1 and y.device.type == "cpu" and len(y) and not y.is_floating_point():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"y must be in 0 … {self.num_classes - 1}, got {low} … {high}; for an "
                    "ignore_index, mix inputs with mix() and losses with mix_losses()"
                )


def _finite(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):  # one value a run: not inspected, see flooding.py
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def _fraction(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor):
        number(name, value, 0, 1)


def _floating(name: str, v: Tensor) -> Tensor:
    if not v.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {v.dtype}: convert images first (x.float() / "
            "255), and mix the embeddings of tokens"
        )
    return v


def _check_permutation(permutation: Tensor, n: int) -> None:
    if permutation.dtype != torch.int64 or permutation.shape != (n,):
        raise ValueError(
            f"permutation must be int64 of shape [{n}], got {permutation.dtype} of shape "
            f"{list(permutation.shape)}"
        )


def _target_dtype(x: Tensor) -> torch.dtype:
    """At least single precision, so that labels of half-precision inputs are not rounded."""
    return torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.float32
