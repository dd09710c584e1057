"""Random streams: every draw is a pure function of (seed, what for, index), made on the CPU.

So a CPU and a GPU run see the same batches, and a resumed run needs no generator's state.
"""

import hashlib
import os

import torch

from ._checks import whole


def stream(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator of its own for each seed, purpose and index."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def first_seed() -> int:
    """The seed that a notebook's experiments start from.

    0, unless the environment variable ``FLATMIN_SEED`` moves it: base seed k starts at 1000 k,
    so that different base seeds share no run.

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
