"""Random streams: every draw is a pure function of (seed, purpose, index), made on the CPU.

So a CPU and a GPU run see the same batches, and a resumed run needs no generator state.
"""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from ._checks import whole
from ._tree import Params


def stream(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A separate generator for each seed, purpose and index."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def numpy_stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """As :func:`stream`, for NumPy: ``vmap`` refuses PyTorch's generators, even explicit ones."""
    return np.random.default_rng(stream(seed, purpose, index).initial_seed())


def normals(params: Params, seed: int, purpose: str, index: int = 0) -> Params:
    """Standard normal numbers in the shapes of ``params``: one draw for all runs of a stack."""
    random = numpy_stream(whole("seed", seed, 0), purpose, index)
    draw = lambda w: torch.as_tensor(random.standard_normal(tuple(w.shape)))
    return {name: draw(w).to(w.device, w.dtype) for name, w in params.items()}


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """Beta(a, b) from uniform numbers, by the inverse of its distribution function; 1 for a = 0."""
    from scipy.special import betaincinv  # here, so that importing flatmin is fast

    if a == 0:
        return torch.ones_like(u)
    return torch.as_tensor(betaincinv(float(a), float(b), u.numpy()))


def first_seed() -> int:
    """The seed that a notebook's experiments start from.

    0 by default.  The environment variable ``FLATMIN_SEED`` sets a base seed k, and the first seed
    is then 1000 k, so that different base seeds share no run.

    Examples
    --------
    >>> first_seed() % 1000
    0
    """
    base = os.environ.get("FLATMIN_SEED", "0")
    if not base.isdecimal():
        raise ValueError(f"FLATMIN_SEED must be a whole number >= 0, got {base!r}")
    return 1000 * int(base)


def seeds(n: int) -> list[int]:
    """The ``n`` seeds of an experiment: consecutive numbers from :func:`first_seed`.

    Examples
    --------
    >>> len(seeds(5))
    5
    """
    return list(range(first_seed(), first_seed() + whole("n", n)))
