r"""The vicinity of an example: noise on its input or on its label, or nothing but the example.

Empirical risk puts a Dirac on every example.  *Vicinal* risk puts a distribution around it, and a
training step draws from it (Chapelle, Weston, Bottou & Vapnik, *Vicinal Risk Minimization*, NIPS
2000):

.. math:: L_\nu(\theta) = \frac1n\sum_i
          \mathbb E_{(\tilde x,\tilde y)\sim\nu(\cdot\,|\,x_i,y_i)}\,\ell(\theta;\tilde x,\tilde y).

Mixup is another such distribution (:mod:`flatmin.batch.mixup`).
"""

from dataclasses import dataclass

import torch

from .._checks import hyperparameter, tensor
from .._stage import Batch, BatchStage
from .._targets import classes_of, floating, soft_targets, target_dtype
from .._tree import Params

__all__ = ["Dirac", "Gaussian", "LabelSmoothing"]


@dataclass(frozen=True)
class Dirac(BatchStage):
    """The vicinity is the example itself: empirical risk minimization.

    Examples
    --------
    >>> batch = Batch(torch.ones(1, 2), torch.tensor([0]))
    >>> Dirac()(batch, draw={}) == batch
    True
    """

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        return batch


@dataclass(frozen=True)
class Gaussian(BatchStage):
    r"""Noise on the inputs: :math:`\tilde x\sim\mathcal N(x_i,\sigma^2 I)`, :math:`\tilde y=y_i`.

    The vicinity that Chapelle et al. (NIPS 2000) study.

    Parameters
    ----------
    sigma : float
        The standard deviation :math:`\sigma\ge0`, in the unit of the inputs.

    Examples
    --------
    >>> batch = Batch(torch.ones(1, 2), torch.tensor([0]))
    >>> Gaussian(sigma=0.1)(batch, {"noise": torch.tensor([[1.0, -2.0]])}).x
    tensor([[1.1000, 0.8000]])
    """

    sigma: float = 0.1

    def __post_init__(self) -> None:
        hyperparameter("sigma", self.sigma, 0)

    def draw(self, batch: Batch, generator: torch.Generator) -> Params:
        shape = tensor("batch.x", batch.x).shape
        return {"noise": torch.randn(shape, generator=generator, dtype=torch.float32)}

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        x = floating("x", batch.x)
        return batch._replace(x=x + self.sigma * draw["noise"].to(x.dtype))


@dataclass(frozen=True)
class LabelSmoothing(BatchStage):
    r"""A vicinity on the labels: :math:`\tilde x=x_i`, :math:`\tilde y=(1-s)\,e_{y_i}+s/K`.

    The expectation of a label that, with probability s, is redrawn uniformly from all K classes.
    Cross-entropy is linear in the target, so the expected loss is the loss of the expectation.

    Parameters
    ----------
    smoothing : float
        :math:`s\in[0,1]`.

    References
    ----------
    Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, CVPR 2016.

    Examples
    --------
    >>> batch = Batch(torch.ones(1, 1), torch.tensor([0]), num_classes=2)
    >>> LabelSmoothing(0.2)(batch, draw={}).y
    tensor([[0.9000, 0.1000]])
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        hyperparameter("smoothing", self.smoothing, 0, 1)

    def __call__(self, batch: Batch, draw: Params) -> Batch:
        dtype = target_dtype(batch.x)
        return batch._replace(y=soft_targets(batch.y, classes_of(batch), self.smoothing, dtype))
