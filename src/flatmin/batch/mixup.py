r"""Mixup: train on convex combinations of examples and of their labels.

Each batch transform here has two methods: ``draw`` makes the random numbers for one batch, on the
CPU, and calling it computes the batch from them, without randomness.  So a batch can be repeated,
and the same objects fill the batch stage of a :class:`~flatmin.Recipe` and, wrapped in a
:class:`~flatmin.BatchTransform`, any training loop.  All mixing goes through one line,
:func:`combine`.  Nothing here changes a tensor in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .._checks import hyperparameter, tensor, whole
from .._random import beta_quantile
from .._stage import Batch, BatchStage
from .._targets import checked_losses, classes_of, floating, soft_targets, target_dtype
from .._tree import Params

__all__ = ["Mixup", "combine", "dirichlet_weights", "mix", "mix_losses"]


# ----------------------------------------------------------------------------------- the kernel


def combine(weights: Sequence[float | Tensor] | Tensor, values: Sequence[Tensor]) -> Tensor:
    r"""The weighted sum :math:`\sum_j w_j v_j` of batches.

    Parameters
    ----------
    weights : k numbers or tensors, or a tensor [k] or [k, n]
        :math:`w_j`: one number for the whole batch, or one per example, [n].
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
        If a value is not floating point: convert integer images first, and mix the embeddings of
        tokens, not the tokens.
    ValueError
        If the values differ in shape, which would broadcast, or the weights do not fit.

    Examples
    --------
    >>> combine([0.5, 0.25, 0.25], [torch.tensor([4.0]), torch.tensor([8.0]), torch.tensor([0.0])])
    tensor([4.])
    """
    if not len(weights) == len(values) > 0:
        raise ValueError(
            f"weights must be as many as values, and at least one, got {len(weights)} for "
            f"{len(values)}"
        )
    shapes = [list(floating("values", v).shape) for v in values]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"values must be alike in shape, got {shapes}")
    dtype = values[0].dtype
    values = [v.to(torch.promote_types(dtype, torch.float32)) for v in values]
    first, *rest = [v * _per_example(w, v) for w, v in zip(weights, values, strict=True)]
    return sum(rest, first).to(dtype)


def _per_example(w: float | Tensor, v: Tensor) -> float | Tensor:
    """A weight in the dtype of ``v``, and in a shape that broadcasts with it."""
    if isinstance(w, Real):
        return w
    w = tensor("weights", w)
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
        :math:`\lambda\in[0,1]`, the weight of the example itself: one number, or one per example.
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
    hyperparameter("lam", lam, 0, 1)
    _check_permutation(permutation, tensor("values", values))
    pool = values if other is None else tensor("other", other)
    return combine((lam, 1 - lam), (values, pool[permutation]))


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
    example by example.  It needs no one-hot targets, and works with any criterion.  The two can
    differ:

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
        If there is one λ per example and the criterion returns one number: use
        ``reduction="none"``.  If it returns neither one number nor one loss per example.

    Examples
    --------
    >>> from torch.nn.functional import cross_entropy
    >>> z, y, pi = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 2, 1, 0])
    >>> torch.allclose(mix_losses(cross_entropy, z, y, 0.3, pi),
    ...                cross_entropy(z, mix(soft_targets(y, 3), 0.3, pi)))
    True
    """
    hyperparameter("lam", lam, 0, 1)
    _check_permutation(permutation, tensor("y", y))
    pool = y if y_other is None else tensor("y_other", y_other)
    own, partners = criterion(tensor("logits", logits), y), criterion(logits, pool[permutation])
    if not isinstance(own, Tensor) or own.ndim:
        checked_losses(own, y, y)
    if isinstance(lam, Tensor) and lam.ndim > own.ndim:
        raise ValueError(
            "criterion must return one loss per example if lam has one value per example "
            f"(reduction='none'), got shapes {list(own.shape)} and {list(lam.shape)}"
        )
    return combine((lam, 1 - lam), (own, partners))


def dirichlet_weights(u: Tensor, alpha: float) -> Tensor:
    r"""Weights :math:`w\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha)` from uniform numbers.

    Breaks a stick of length 1: the j-th piece is a share :math:`v_j\sim\mathrm{Beta}(\alpha,
    (k-j)\alpha)` of what is left, with :math:`v_j=F^{-1}(u_j)`, the inverse of Beta's cumulative
    distribution function.  For k = 2 this is mixup's :math:`\lambda\sim\mathrm{Beta}(\alpha,
    \alpha)`.  The same ``u`` with another ``alpha`` gives weights of the same rank, so comparisons
    of values of ``alpha`` are paired.

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
        Non-negative, with sum 1 along the first dimension.

    Examples
    --------
    >>> u = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    >>> dirichlet_weights(u, 1.0)[0]                # Beta(1, 1) is uniform
    tensor([0.1000, 0.5000, 0.9000], dtype=torch.float64)
    >>> dirichlet_weights(u, 0.0)[0]
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    hyperparameter("alpha", alpha, 0)
    if not tensor("u", u).is_floating_point() or not u.ndim:
        raise ValueError(f"u must be floating point, [k-1, ...], got {u.dtype} {list(u.shape)}")
    rest, weights = torch.ones_like(u[0]), []
    for j, uniform in enumerate(u, 1):
        share = beta_quantile(uniform, alpha, (len(u) + 1 - j) * alpha)
        weights.append(share * rest)
        rest = rest * (1 - share)
    return torch.stack([*weights, rest])


# -------------------------------------------------------------------------- vicinal distributions


@dataclass(frozen=True)
class Mixup(BatchStage):
    r"""Convex combinations of examples and of their labels.

    .. math:: \tilde x=\sum_{j=1}^k w_j x_{\pi_j(i)},\quad
              \tilde y=\sum_{j=1}^k w_j e_{y_{\pi_j(i)}},\qquad
              w\sim\mathrm{Dirichlet}(\alpha,\dots,\alpha),\quad \pi_1(i)=i.

    With k = 2 it is mixup: :math:`\lambda=w_1\sim\mathrm{Beta}(\alpha,\alpha)`.

    Parameters
    ----------
    alpha : float
        :math:`\alpha\ge0`.  0 is ERM, 1 mixes evenly, :math:`\alpha\to\infty` takes means.  A grid
        may give one per run.
    k : int
        How many examples are mixed, at least 2.
    partners : {"any", "same", "different"}
        What is mixed: any two examples, only examples of the same class, or only of different
        classes.  ``"any"`` pairs by a random permutation.  The others draw each partner evenly
        from those allowed (for ``"same"`` these include the example itself); an example without
        a partner is left as it is.
    per_example : bool
        Draw weights for every example, not once for the batch.
    second_stream : bool
        Take the partners from a second batch, drawn independently, as from a second loader.
    smoothing : float
        :math:`s\in[0,1]`: also smooth the labels, as :class:`~flatmin.batch.LabelSmoothing` does.
        (Before or after mixing is the same, because the weights sum to one.)

    References
    ----------
    Zhang, Cissé, Dauphin & Lopez-Paz, *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.

    Examples
    --------
    >>> mixup = Mixup(alpha=0.2)
    >>> x, y = torch.tensor([[0.0], [8.0]]), torch.tensor([0, 1])
    >>> draw = {"weights": torch.tensor([[0.75, 0.75], [0.25, 0.25]]),
    ...         "partners": torch.tensor([[1, 0]])}
    >>> mixup(Batch(x, y, num_classes=2), draw).x
    tensor([[2.],
            [6.]])
    >>> draw = mixup.draw(Batch(x, y), torch.Generator().manual_seed(0))
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
        hyperparameter("alpha", self.alpha, 0)
        whole("k", self.k, 2)
        hyperparameter("smoothing", self.smoothing, 0, 1)
        if self.partners not in ("any", "same", "different"):
            raise ValueError(
                f"partners must be 'any', 'same' or 'different', got {self.partners!r}"
            )

    def draw(self, batch: Batch, generator: torch.Generator) -> Params:
        """Weights [k, n], float64, and the k−1 partners of each example, int64 [k−1, n]."""
        y, n = batch.y, len(tensor("batch.y", batch.y))
        examples = n if self.per_example else 1
        u = torch.rand(self.k - 1, examples, generator=generator, dtype=torch.float64)
        weights = dirichlet_weights(u, self.alpha).expand(self.k, n)
        pool = (batch.other or batch).y
        if self.partners == "any":
            partners = _any_partners(n, len(pool), self.k - 1, generator)
            return {"weights": weights, "partners": partners}
        partners, exists = _partners_by_class(self.partners, y, pool, self.k - 1, generator)
        unmixed = torch.zeros_like(weights).index_fill(0, torch.tensor(0), 1.0)
        return {"weights": torch.where(exists, weights, unmixed), "partners": partners}

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        dtype = target_dtype(floating("x", batch.x))
        soft = lambda y: soft_targets(y, classes_of(batch), self.smoothing, dtype)
        batch = batch._replace(y=soft(batch.y))
        if not isinstance(self.alpha, Tensor) and self.alpha == 0:
            return batch
        pool = batch.other._replace(y=soft(batch.other.y)) if batch.other else batch
        mixed = lambda own, pool: combine(
            draw["weights"], (own, *(pool[partner] for partner in draw["partners"]))
        )
        return batch._replace(x=mixed(batch.x, pool.x), y=mixed(batch.y, pool.y))


def _any_partners(n: int, m: int, k: int, generator: torch.Generator) -> Tensor:
    """k partners for each of n examples, out of m: by permutation if m = n."""
    if n == m:
        return torch.stack([torch.randperm(n, generator=generator) for _ in range(k)])
    return torch.randint(m, (k, n), generator=generator)


def _partners_by_class(
    which: str, y: Tensor, pool: Tensor, k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """k partners for each example, of its class or of another, and whether any exist."""
    y, pool = (v.cpu().double().argmax(1) if v.ndim == 2 else v.cpu().long() for v in (y, pool))
    pool, order = pool.sort()  # each class is contiguous; the others follow it cyclically
    first, after = (torch.searchsorted(pool, y, right=right) for right in (False, True))
    start, count = (first, after - first)
    if which == "different":
        start, count = after, len(pool) - count
    steps = torch.rand(k, len(y), generator=generator, dtype=torch.float64) * count
    return order[(start + steps.long()) % len(pool)], count > 0


def _check_permutation(permutation: Tensor, values: Tensor) -> None:
    shape = values.shape[:1]
    if tensor("permutation", permutation).dtype != torch.int64 or permutation.shape != shape:
        raise ValueError(
            f"permutation must be int64 of shape {list(shape)}, got {permutation.dtype} of shape "
            f"{list(permutation.shape)}"
        )
