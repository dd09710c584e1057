r"""The networks that the five articles train, as plain modules.

Any of them can be stacked: :func:`torch.func.stack_module_state` with :func:`torch.vmap` over
:func:`torch.func.functional_call` runs many copies at once, in training and evaluation mode. Batch
norm writes its running statistics in place, so under ``vmap`` pass the stacked buffers along with
the parameters and take them back.

A network draws its initial weights from PyTorch's global random state, as every module does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import whole
from ..layers import Dropout

__all__ = ["MLP", "ResNet", "SmallCNN", "resnet20"]


def _positive_wholes(name: str, values: Sequence[Any], count: int = 1) -> tuple[int, ...]:
    """``values`` as at least ``count`` positive whole numbers, or an error that names them."""
    values = tuple(values)
    good = all(isinstance(v, Integral) and not isinstance(v, bool) and int(v) >= 1 for v in values)
    if not good or len(values) < count:
        raise ValueError(f"{name} must be at least {count} positive whole numbers, got {values}")
    return tuple(int(v) for v in values)


class MLP(nn.Sequential):
    """A multilayer perceptron; flattens its input.

    Each hidden layer is linear → batch norm (if wanted) → activation → dropout (if wanted); the
    last layer is linear.

    Parameters
    ----------
    *sizes : int
        Number of inputs, of units in each hidden layer, and of outputs.
    batch_norm : bool
        Normalize in each hidden layer.
    bias : bool
        Whether the linear layers have a bias.
    activation : callable
        Makes a module, such as ``nn.ReLU`` or ``nn.Tanh``.
    dropout : float
        Probability in [0, 1) with which a hidden unit is dropped, see :class:`Dropout`.  It does
        not change the initial weights.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, one is not a positive whole number, or ``dropout`` is
        not in [0, 1).

    Notes
    -----
    The stiffness paper's network (Fort et al., arXiv 1901.09491) is
    ``MLP(784, 500, 300, 100, 10)``; the one of the flooding paper's demo is
    ``MLP(2, 500, 500, 500, 500, 2, bias=False, batch_norm=True)``.

    Examples
    --------
    >>> model = MLP(40, 100, 100, 10)
    >>> sum(p.numel() for p in model.parameters())
    15210
    >>> model(torch.zeros(32, 40)).shape
    torch.Size([32, 10])
    """

    def __init__(
        self,
        *sizes: int,
        batch_norm: bool = False,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        sizes = _positive_wholes("sizes", sizes, count=2)
        *hidden, last = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes)]
        layers: list[nn.Module] = [nn.Flatten()]
        for linear in hidden:
            layers.append(linear)
            if batch_norm:
                layers.append(nn.BatchNorm1d(linear.out_features))
            layers.append(activation())
            if dropout != 0:
                layers.append(Dropout(dropout))
        super().__init__(*layers, last)


class SmallCNN(nn.Sequential):
    """A small convolutional network, as wide as the stiffness paper's (Fort et al., 1901.09491).

    Each layer is a 3×3 convolution → batch norm (if wanted) → ReLU → 2×2 max-pooling. Then come
    the mean over the image, so that images may have any size, and a linear layer.

    Parameters
    ----------
    channels_in : int
        1 for grey images, 3 for colour.
    num_classes : int
        Number of outputs.
    widths : sequence of int
        Channels of each convolution. k convolutions need images of at least 2^k by 2^k.
    batch_norm : bool
        Normalize after each convolution.

    Raises
    ------
    ValueError
        If a number is not a positive whole number.

    Examples
    --------
    >>> model = SmallCNN(1, 10)
    >>> sum(p.numel() for p in model.parameters())
    14378
    >>> model(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        channels_in: int,
        num_classes: int,
        widths: Sequence[int] = (16, 32, 32),
        batch_norm: bool = False,
    ) -> None:
        sizes = whole("channels_in", channels_in), *_positive_wholes("widths", widths)
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise(sizes):
            layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(c_out))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        head = nn.Linear(sizes[-1], whole("num_classes", num_classes))
        super().__init__(*layers, _ImageMean(), head)


class ResNet(nn.Module):
    r"""Residual network for small images (He et al., CVPR 2016, section 4.2).

    A 3×3 convolution, then stages of basic blocks, then the mean over the image and a linear
    layer. The first block of each stage but the first halves the image and doubles the channels;
    there the shortcut is a 1×1 convolution (the paper's option B). A block is

    .. math:: x \mapsto \mathrm{ReLU}\big(\mathrm{shortcut}(x) + F(x)\big), \qquad
              F = \text{conv} \to \text{norm} \to \text{ReLU} \to \text{conv} \to \text{norm}.

    Without batch norm, adding the branches would make activations grow with depth. There each
    block's branch is multiplied by a learned number that starts at 0, so that every block starts
    as its shortcut (SkipInit: De & Smith, NeurIPS 2020), and convolutions have a bias.

    Parameters
    ----------
    stages : sequence of int
        Blocks in each stage. Three stages of n are the paper's network of depth 6n + 2.
    num_classes : int
        Number of outputs.
    in_channels : int
        1 for grey images, 3 for colour.
    width : int
        Channels of the first stage.
    batch_norm : bool
        Use batch norm; otherwise SkipInit.

    Raises
    ------
    ValueError
        If a number is not a positive whole number.

    Examples
    --------
    >>> model = ResNet([3, 3, 3])
    >>> sum(p.numel() for p in model.parameters())
    272474
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        stages: Sequence[int] = (3, 3, 3),
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = whole("width", width)
        for stage, count in enumerate(_positive_wholes("stages", stages)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(channels, channels * stride, stride, batch_norm))
                channels *= stride
        stem = _convolution(whole("in_channels", in_channels), width, 3, 1, batch_norm)
        self.stem = nn.Sequential(*stem, nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        head = nn.Linear(channels, whole("num_classes", num_classes))
        self.head = nn.Sequential(_ImageMean(), head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def resnet20(num_classes: int = 10, in_channels: int = 3, batch_norm: bool = True) -> ResNet:
    """ResNet-20, 0.27 million parameters: see :class:`ResNet`."""
    return ResNet((3, 3, 3), num_classes, in_channels, batch_norm=batch_norm)


class _Block(nn.Module):
    """The basic block of :class:`ResNet`."""

    def __init__(self, c_in: int, c_out: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(c_in, c_out, 3, stride, batch_norm),
            nn.ReLU(),
            *_convolution(c_out, c_out, 3, 1, batch_norm),
        )
        self.shortcut = nn.Sequential(
            *(_convolution(c_in, c_out, 1, stride, batch_norm) if stride > 1 else [])
        )
        if not batch_norm:
            self.branch.append(_Scale())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.branch(x))


class _Scale(nn.Module):
    """Multiplies by one learned number, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class _ImageMean(nn.Module):
    """[n, channels, height, width] → [n, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


def _convolution(
    c_in: int, c_out: int, size: int, stride: int, batch_norm: bool
) -> list[nn.Module]:
    """A convolution, He-initialized, and its norm or bias."""
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=not batch_norm)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if batch_norm:
        return [conv, nn.BatchNorm2d(c_out)]
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return [conv]
