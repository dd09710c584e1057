"""CutMix: paste a patch of another example, and mix the labels by its area."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import hyperparameter, tensor, whole
from .._random import beta_quantile
from .._stage import Batch, BatchStage
from .._targets import classes_of, soft_targets, target_dtype
from .._tree import Params

__all__ = ["CutMix"]


@dataclass(frozen=True)
class CutMix(BatchStage):
    r"""A patch of each example comes from another one, and so does that share of its label.

    .. math:: \tilde x = (1-M)\odot x_i + M\odot x_{\pi(i)},\qquad
              \tilde y = \lambda\,e_{y_i} + (1-\lambda)\,e_{y_{\pi(i)}},\qquad
              \lambda = 1-\overline M

    The mask M is a box around a uniform center with sides of :math:`(1-\lambda')^{1/d}` times the
    image's, :math:`\lambda'\sim\mathrm{Beta}(\alpha,\alpha)`; what lies outside of the image is cut
    off, and :math:`\lambda` is what is left of the example.

    Parameters
    ----------
    alpha : float
        :math:`\alpha\ge0`.  0 is ERM, 1 draws :math:`\lambda'` uniformly.
    dimensions : int
        d, how many of the last dimensions of an input the box extends over: 2 for images, 1 for
        sequences.

    References
    ----------
    Yun et al., *CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features*, ICCV 2019.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 8.0, 8.0, 8.0]]), torch.tensor([0, 1])
    >>> draw = {"mask": torch.tensor([False, True, False, False]), "partners": torch.tensor([1, 0])}
    >>> mixed = CutMix(dimensions=1)(Batch(x, y, num_classes=2), draw)
    >>> mixed.x[0], mixed.y[0]
    (tensor([0., 8., 0., 0.]), tensor([0.7500, 0.2500]))
    """

    alpha: float = 1.0
    dimensions: int = 2

    def __post_init__(self) -> None:
        hyperparameter("alpha", self.alpha, 0)
        whole("dimensions", self.dimensions)

    def draw(self, batch: Batch, generator: torch.Generator) -> Params:
        """The mask, bool with the shape of the last dimensions, and the partners, int64 [n]."""
        if tensor("batch.x", batch.x).ndim <= self.dimensions:
            raise ValueError(
                f"batch.x must have a dimension of examples and {self.dimensions} others for "
                f"dimensions={self.dimensions}, got shape {list(batch.x.shape)}"
            )
        u, *center = torch.rand(1 + self.dimensions, generator=generator, dtype=torch.float64)
        half = 0.5 * (1 - beta_quantile(u, self.alpha, self.alpha)) ** (1 / self.dimensions)
        mask = self.box(float(half), map(float, center), batch.x.shape[-self.dimensions :])
        return {"mask": mask, "partners": torch.randperm(len(batch.x), generator=generator)}

    @staticmethod
    def box(half: float, center: Iterable[float], sizes: Iterable[int]) -> Tensor:
        """True within ``half`` of the image's side from ``center``, in shares of each side."""
        mask = torch.ones((), dtype=torch.bool)
        for c, size in zip(center, sizes, strict=True):
            middle, reach, at = int(c * size), int(half * size), torch.arange(size)
            mask = mask[..., None] & (middle - reach <= at) & (at < middle + reach)
        return mask

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        mask, partners = draw["mask"], draw["partners"]
        y = soft_targets(batch.y, classes_of(batch), dtype=target_dtype(batch.x))
        lam = 1 - mask.to(y.dtype).mean()
        x = torch.where(mask, batch.x[partners], batch.x)
        return batch._replace(x=x, y=lam * y + (1 - lam) * y[partners])
