"""Random layers that can be stacked: their randomness is a function of their buffers."""

import torch
from torch import Tensor, nn

from ._checks import number

__all__ = ["Dropout"]


class Dropout(nn.Module):
    r"""Dropout that can be stacked: its randomness is a function of buffers.

    In training mode, each unit is set to zero with probability :math:`p`, and the others are
    divided by :math:`1-p`, which keeps the mean:

    .. math:: x_i \mapsto \frac{m_i}{1-p}\,x_i, \qquad
              m_i = \mathbb 1\big[h(\text{key}, \text{counter}, i) \ge p\big].

    In evaluation mode it is the identity. :math:`h` is a hash with values in [0, 1), computed in
    whole numbers, so that a CPU and a GPU drop the same units. The buffer ``key`` is drawn from
    PyTorch's global random state when the layer is made, like initial weights; the buffer
    ``counter`` goes up by one in each forward pass in training mode. Both are saved with the
    network, so a resumed run drops what the uninterrupted one would have dropped.

    Parameters
    ----------
    p : float
        The probability of dropping a unit, in [0, 1).

    Raises
    ------
    ValueError
        If ``p`` is not in [0, 1), or above :math:`1-2^{-32}`.
    RuntimeError
        If it is called in a backward pass, as ``torch.utils.checkpoint`` does: the counter has gone
        on, so that it would drop other units.

    Notes
    -----
    Passes that start from the same buffers drop the same units, such as the two gradients of a
    SAM step (of :class:`flatmin.SAM` if it is given the ``model``). The mask depends on the
    position in the batch, so ``vmap`` over the *examples* of a batch gives all of them the same
    mask. Processes of a distributed run that share buffers use the same mask for their parts of the
    batch. A copy has the same key: the layers of ``nn.TransformerEncoder``, which copies one layer,
    all drop the same units.

    References
    ----------
    Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*,
    JMLR 15 (2014). The hash combines splitmix64 with a 32-bit multiply–xorshift function.

    Examples
    --------
    >>> layer = Dropout(0.5)
    >>> y = layer(torch.ones(10_000))
    >>> y.unique(), bool(4_800 < (y == 0).sum() < 5_200)
    (tensor([0., 2.]), True)
    >>> layer.eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    p: float
    key: Tensor
    counter: Tensor

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = number("p", p, 0, 1, below=True)
        if self._threshold() == 2**31:
            raise ValueError(f"p must be at most 1 - 2**-32, got {p!r}")
        self.register_buffer("key", torch.randint(2**62, ()))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "flatmin.layers.Dropout must not be called in a backward pass, as "
                "torch.utils.checkpoint does; use nn.Dropout in what is checkpointed"
            )
        bits = _random_bits(self.key, self.counter, x.numel())
        self.counter.add_(1)
        keep = bits.reshape(x.shape) >= self._threshold()
        return torch.where(keep, x / (1 - self.p), 0.0)

    def _threshold(self) -> int:
        return round(self.p * 2**32) - 2**31

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _random_bits(key: Tensor, counter: Tensor, n: int) -> Tensor:
    """``n`` random int32, each a hash of (key, counter, its position).

    Integers wrap around, and ``>>`` keeps the sign, so the bits that it shifts in are masked out.
    """
    word = key + counter * -0x61C8864680B583EB  # splitmix64: the counter-th state of stream `key`
    word = (word ^ (word >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    word = (word ^ (word >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    word = word ^ (word >> 31 & 2**33 - 1)
    first, second = (word >> 32).to(torch.int32), (word << 32 >> 32).to(torch.int32)
    bits = torch.arange(n, dtype=torch.int32, device=key.device) ^ first
    bits ^= bits >> 16 & 0xFFFF  # in place: half the time
    bits *= 0x7FEB352D
    bits ^= bits >> 15 & 0x1FFFF
    bits ^= second
    bits *= -0x7B935975
    bits ^= bits >> 16 & 0xFFFF
    return bits
