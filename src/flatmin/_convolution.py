"""Convolutions of many networks at once, on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode


class MatrixConvolutions(TorchFunctionMode):
    r"""Within it, a convolution is a product of matrices.

    With :math:`X_{kp}` what the kernel's k-th weight sees at position p, a convolution is

    .. math:: Y_{op} = \sum_k W_{ok} X_{kp} + b_o .

    Under ``vmap`` over networks this is a batched product of matrices.  PyTorch's own convolution
    becomes a grouped one there, of a group a network, for which cuDNN has only slow kernels.  X
    takes as much memory as the input times the size of the kernel.

    Examples
    --------
    >>> conv, x = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1).double(), torch.rand(2, 3, 9, 8)
    >>> with MatrixConvolutions():
    ...     y = conv(x.double())
    >>> torch.testing.assert_close(y, conv(x.double()))
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (convolve if func is torch.conv2d else func)(*args, **(kwargs or {}))


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """:func:`torch.nn.functional.conv2d`, which also does what has no such product here."""
    as_it_is = partial(torch.conv2d, input, weight, bias, stride, padding, dilation, groups)
    if input.ndim != 4 or groups > 1 or isinstance(padding, str):
        return as_it_is()
    (s, t), (p, q), (d, e) = map(_pair, (stride, padding, dilation))
    height, width = weight.shape[2:]
    x = pad(input, (q, q, p, p)) if p or q else input
    rows = range((x.shape[2] - d * (height - 1) - 1) // s + 1)
    columns = range((x.shape[3] - e * (width - 1) - 1) // t + 1)
    if not rows or not columns:
        return as_it_is()  # which says what is wrong
    seen = [
        x[:, :, d * i : d * i + s * len(rows) : s, e * j : e * j + t * len(columns) : t]
        for i in range(height)
        for j in range(width)
    ]
    matrix = torch.stack(seen, 2).flatten(1, 2).flatten(2)
    y = (weight.flatten(1) @ matrix).unflatten(2, (len(rows), len(columns)))
    return y if bias is None else y + bias[:, None, None]


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
