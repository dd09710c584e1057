r"""The data sets that the chapters train on, kept in memory as a whole.

Every set is a function that returns a :class:`Data` and takes the same four arguments:

``train_size``, ``validation_size``
    How many examples to train on and how many to hold out. For a set of fixed size, the two are
    drawn without replacement from its training part: the first ``train_size`` and the last
    ``validation_size`` rows of one permutation. So for one seed a smaller training set is part of
    a larger one, and the validation set does not depend on the size of the training set.
    ``train_size=None`` takes all rows that validation leaves.
``label_noise``
    The fraction of labels, in [0, 1], that :func:`flip_labels` replaces by a wrong class, in the
    training set and in the validation set. Test labels are always clean. For one seed the inputs
    do not depend on the noise.
``seed``
    A whole number that determines everything random: the same seed gives the same data.
    The global random states of PyTorch, NumPy and Python are neither read nor changed.

Downloaded archives are checked against a SHA-256 sum and kept in the user's cache folder
(``pooch.os_cache("flatmin")``). If the environment variable ``FLATMIN_DATA`` names a folder, the
files of the unpacked archives are read from there instead, and nothing is downloaded:
``mnist/train-images-idx3-ubyte.gz`` (or without ``.gz``) and so on, the same under
``fashion_mnist/``, ``cifar-10-batches-py/data_batch_1`` and so on, ``cifar-100-python/train`` and
``test``.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import os
import pickle
import random
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import needs, number, whole
from .._random import data_stream
from ..data import Data

__all__ = [
    "CIFAR100_SUPERCLASS",
    "Data",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "flip_labels",
    "mnist",
    "mnist1d",
    "sinusoid",
    "spiral",
    "two_gaussians",
]

# ------------------------------------------------------------------ subset, split and label noise


class _Choice(NamedTuple):
    """The four arguments of every set."""

    train_size: int | None
    validation_size: int
    label_noise: float
    seed: int


def _assemble(
    name: str,
    num_classes: int,
    pool: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    choice: _Choice,
) -> Data:
    """Draw training and validation rows from the pool and flip labels, as the module describes."""
    size = len(pool[0])
    held_out = whole("validation_size", choice.validation_size, 0)
    train_size = choice.train_size
    if train_size is None:
        train_size = max(1, size - held_out)
    if whole("train_size", train_size, 1) + held_out > size:
        raise ValueError(
            f"train_size + validation_size must be at most {size}, the number of training "
            f"examples of {name}, got {train_size} + {held_out}"
        )
    order = torch.randperm(size, generator=data_stream(choice.seed, "rows"))
    parts: dict[str, Tensor] = {"x_test": _floating(test[0]), "y_test": test[1]}
    rows_of = {"train": order[:train_size], "validation": order[size - held_out :]}
    for split, rows in rows_of.items():
        y = pool[1][rows]
        parts[f"x_{split}"] = _floating(pool[0][rows])
        parts[f"y_{split}_clean"] = y
        parts[f"y_{split}"] = flip_labels(
            y, num_classes, choice.label_noise, data_stream(choice.seed, f"{split} labels")
        )
    return Data(name, num_classes, **parts)


def flip_labels(
    y: Tensor, num_classes: int, label_noise: float, generator: torch.Generator
) -> Tensor:
    r"""Symmetric label noise: replace a fraction of the labels by a different class.

    Exactly ``round(label_noise * n)`` of the n labels change, each to a class drawn uniformly
    from the K−1 others. With the generator in the same state, the labels that change at one
    noise level change, to the same wrong class, at every higher one.

    Parameters
    ----------
    y : Tensor, shape [n], int64
        Labels in 0 … K−1.
    num_classes : int
        K ≥ 2.
    label_noise : float
        Fraction in [0, 1].
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape [n], int64
        A new tensor.

    Examples
    --------
    >>> y = torch.zeros(10, dtype=torch.int64)
    >>> noisy = flip_labels(y, 3, 0.4, torch.Generator().manual_seed(0))
    >>> int((noisy != y).sum())
    4
    """
    share = number("label_noise", label_noise, 0, 1)
    flipped = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, whole("num_classes", num_classes, 2), y.shape, generator=generator)
    noisy = y.clone()
    noisy[flipped] = (y[flipped] + shift[flipped]) % num_classes
    return noisy


def _floating(x: Tensor) -> Tensor:
    """Bytes become float32 in [0, 1]; only the rows in use are converted."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


# ------------------------------------------------------------------------------- synthetic sets


def _synthetic(
    name: str,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    test_size: int,
    choice: _Choice,
) -> Data:
    """A set of two classes and of any size."""
    pool_size = whole("train_size", choice.train_size, 1) + whole(
        "validation_size", choice.validation_size, 0
    )
    test = draw(whole("test_size", test_size, 1), data_stream(choice.seed, "test inputs"))
    pool = draw(pool_size, data_stream(choice.seed, "inputs"))
    return _assemble(name, 2, pool, test, choice)


def two_gaussians(
    train_size: int = 100,
    validation_size: int = 100,
    test_size: int = 20_000,
    dimension: int = 10,
    distance: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    r"""Two Gaussians of the flooding paper (Ishida et al., ICML 2020).

    .. math:: x \mid y \sim \mathcal N(m\,y\,\mathbf 1,\; I_d),
              \qquad y \in \{0, 1\} \text{ with probability } \tfrac12

    No classifier's accuracy exceeds :math:`\Phi(m\sqrt d / 2)`.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    test_size : int
        Examples to test on.
    dimension : int
        d ≥ 1.
    distance : float
        m ≥ 0, how far apart the means are in each coordinate.

    Examples
    --------
    >>> two_gaussians(distance=0.8).x_train.shape
    torch.Size([100, 10])
    """
    dimension, distance = whole("dimension", dimension, 1), number("distance", distance, 0)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (n,), generator=generator)
        return torch.randn(n, dimension, generator=generator) + distance * y[:, None], y

    choice = _Choice(train_size, validation_size, label_noise, seed)
    return _synthetic("two_gaussians", draw, test_size, choice)


def sinusoid(
    train_size: int = 100,
    validation_size: int = 100,
    test_size: int = 20_000,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    r"""Sinusoid of the flooding paper, as its authors' demo draws it.

    .. math:: x = \frac{2\,(u, v)}{\|(s, t, u, v)\|}, \quad s, t, u, v \sim \mathcal N(0, 1),
              \qquad y = [\,1.5\,x_1 + \sin 1.5\,x_2 > 0\,]

    Two coordinates of a uniform point on the sphere in four dimensions are uniform on the disc:
    x is uniform on the disc of radius 2. The demo trains with ``label_noise=0.1``.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    test_size : int
        Examples to test on.

    Examples
    --------
    >>> data = sinusoid(label_noise=0.1)
    >>> bool((data.x_test.norm(dim=1) <= 2).all())
    True
    """

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        stuv = torch.randn(n, 4, generator=generator)
        x = 2 * stuv[:, 2:] / stuv.norm(dim=1, keepdim=True)
        return x, (1.5 * x[:, 0] + torch.sin(1.5 * x[:, 1]) > 0).long()

    choice = _Choice(train_size, validation_size, label_noise, seed)
    return _synthetic("sinusoid", draw, test_size, choice)


def spiral(
    train_size: int = 100,
    validation_size: int = 100,
    test_size: int = 20_000,
    noise: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    r"""Two spirals of the flooding paper (Ishida et al., ICML 2020).

    .. math:: x = (a + \pi y)\,(\cos a, \sin a) + \tau\,\nu,
              \quad a \sim U[0, 4\pi], \quad \nu \sim \mathcal N(0, I_2),
              \qquad y \in \{0, 1\} \text{ with probability } \tfrac12

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    test_size : int
        Examples to test on.
    noise : float
        τ ≥ 0, the standard deviation of the noise on the inputs. The arms are π apart.

    Examples
    --------
    >>> spiral(noise=0.5).y_train.bincount().sum()
    tensor(100)
    """
    noise = number("noise", noise, 0)

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (n,), generator=generator)
        a = 4 * math.pi * torch.rand(n, generator=generator)
        arm = (a + math.pi * y)[:, None] * torch.stack([a.cos(), a.sin()], dim=1)
        return arm + noise * torch.randn(n, 2, generator=generator), y

    choice = _Choice(train_size, validation_size, label_noise, seed)
    return _synthetic("spiral", draw, test_size, choice)


# ------------------------------------------------------- sets that come with a Python package


def digits(
    train_size: int | None = None,
    validation_size: int = 200,
    test_size: int = 597,
    label_noise: float = 0.0,
    seed: int = 0,
    flat: bool = True,
) -> Data:
    """Handwritten digits from scikit-learn, 1,797 images of 8×8.

    The test part is drawn once and is the same for every seed.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    test_size : int
        Examples to test on; the other 1,797 − ``test_size`` are for training and validation.
    flat : bool
        Inputs of shape [64], or [1, 8, 8] if False; in [0, 1].

    Examples
    --------
    >>> digits()
    Data('digits', 10 classes, inputs [64], 1000 train, 200 validation, 597 test)
    """
    with needs("data", "digits()"):
        from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=data_stream(0, "digits"))
    x = torch.tensor(images, dtype=torch.float32).div_(16)[order]
    x = x if flat else x.view(-1, 1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64)[order]
    test_size = whole("test_size", test_size, 1)
    if test_size >= len(y):
        raise ValueError(
            f"test_size must be less than {len(y)}, the number of examples of digits, "
            f"got {test_size}"
        )
    return _assemble(
        "digits",
        10,
        (x[test_size:], y[test_size:]),
        (x[:test_size], y[:test_size]),
        _Choice(train_size, validation_size, label_noise, seed),
    )


def mnist1d(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """MNIST-1D (Greydanus & Kobak, ICML 2024): 4,000 + 1,000 sequences of length 40, 10 classes.

    Generated, without a network, by the package ``mnist1d`` with its default arguments; its
    generator's own seed is fixed, so that every ``seed`` has the same 5,000 sequences.
    The first call in a process takes about two seconds.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.

    Examples
    --------
    >>> mnist1d(validation_size=500, label_noise=0.2)
    Data('mnist1d', 10 classes, inputs [40], 3500 train (700 noisy), 500 validation, 1000 test)
    """
    x, y, x_test, y_test = (torch.tensor(a) for a in _mnist1d_arrays())
    return _assemble(
        "mnist1d",
        10,
        (x.float(), y),
        (x_test.float(), y_test),
        _Choice(train_size, validation_size, label_noise, seed),
    )


@functools.lru_cache(maxsize=1)
def _mnist1d_arrays() -> tuple[np.ndarray, ...]:
    """Generate MNIST-1D; the package seeds the global generators, so restore them."""
    with needs("data", "mnist1d()"):
        from mnist1d.data import make_dataset

    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        arrays = make_dataset()
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    return arrays["x"], arrays["y"], arrays["x_test"], arrays["y_test"]


# ------------------------------------------------------------------------------ downloaded sets

# For the folder that a set unpacks into: the address of its archives, and the SHA-256 sum of each.
# Addresses and sums are those of torchvision, Keras and TensorFlow Datasets.
_ARCHIVES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/{}-ubyte.gz",
        {
            "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}-ubyte.gz",
        {
            "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "cifar-10-batches-py": (
        "https://www.cs.toronto.edu/~kriz/{}.tar.gz",
        {"cifar-10-python": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
    ),
    "cifar-100-python": (
        "https://www.cs.toronto.edu/~kriz/{}.tar.gz",
        {"cifar-100-python": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"},
    ),
}


def _download(folder: str, archive: str) -> Path:
    """The cached archive, downloaded if it is missing or corrupt."""
    with needs("data", "a download"):
        import pooch
        import requests

    address, sums = _ARCHIVES[folder]
    url, sha256 = address.format(archive), sums[archive]
    path = Path(pooch.os_cache("flatmin")) / folder / url.rsplit("/", 1)[1]
    if path.exists() and pooch.file_hash(str(path)) != sha256:
        path.unlink(missing_ok=True)
        warnings.warn(f"{path} was corrupt (wrong SHA-256) and was deleted", stacklevel=2)
    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=60)
    try:  # into a temporary file, moved to `path` only if its sum is right
        pooch.retrieve(url, sha256, fname=path.name, path=path.parent, downloader=downloader)
    except (requests.RequestException, ValueError) as error:
        raise OSError(
            f"{path.name} could not be downloaded from {url}, and no part of it was kept: {error}. "
            "Try again, or unpack the archive yourself and set FLATMIN_DATA to that folder."
        ) from error
    return path


def _local(folder: str, *names: str) -> Path | None:
    """The first of these names that is a file under FLATMIN_DATA; None if that is not set."""
    root = os.environ.get("FLATMIN_DATA")
    if not root:
        return None
    paths = [Path(root).expanduser() / folder / name for name in names]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{paths[0]} does not exist. FLATMIN_DATA is set, so sets are read from that folder and "
        "nothing is downloaded: put the file there, or unset FLATMIN_DATA."
    )


def _read_idx(folder: str, archive: str, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes as a tensor of shape [n, *shape]; magic, sizes and length are checked.

    The format: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each size
    as a big-endian 32-bit integer, then the data.
    """
    name = f"{archive}-ubyte"
    path = _local(folder, f"{name}.gz", name) or _download(folder, archive)
    raw = path.read_bytes()
    dimensions = 1 + len(shape)
    start = 4 + 4 * dimensions
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < start:
            raise ValueError(
                f"it does not start as an IDX file with {dimensions} dimensions should"
            )
        sizes = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
        if sizes[1:] != shape:
            raise ValueError(f"its items should have shape {shape}, got {sizes[1:]}")
        if len(raw) - start != math.prod(sizes):
            raise ValueError(
                f"{math.prod(sizes)} bytes should follow its header, got {len(raw) - start}"
            )
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is corrupt or cut short: {error}") from error
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(sizes)


def _idx_set(name: str, flat: bool, choice: _Choice) -> Data:
    """MNIST and the sets in its format."""
    train, test = (_idx_part(name, part, flat) for part in ("train", "t10k"))
    return _assemble(name, 10, train, test, choice)


def _idx_part(name: str, part: str, flat: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of one part."""
    x = _read_idx(name, f"{part}-images-idx3", (28, 28))
    y = _read_idx(name, f"{part}-labels-idx1", ())
    if len(x) != len(y):
        raise ValueError(f"{name} is corrupt: {len(x)} {part} images but {len(y)} labels")
    return x.flatten(1) if flat else x[:, None], y.long()


def mnist(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    flat: bool = False,
) -> Data:
    """MNIST (LeCun, Cortes & Burges): 60,000 + 10,000 images of 28×28, 11 MB to download.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    flat : bool
        Inputs of shape [1, 28, 28], or [784] if True; in [0, 1].

    Raises
    ------
    OSError
        If a file cannot be downloaded, or is not under ``FLATMIN_DATA``.
    ValueError
        If a file under ``FLATMIN_DATA`` is corrupt.
    """
    return _idx_set("mnist", flat, _Choice(train_size, validation_size, label_noise, seed))


def fashion_mnist(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    flat: bool = False,
) -> Data:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): like :func:`mnist`, of clothes; 31 MB.

    Parameters and errors are those of :func:`mnist`.
    """
    return _idx_set("fashion_mnist", flat, _Choice(train_size, validation_size, label_noise, seed))


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, bytes and NumPy arrays; runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("._core", ".core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")


def _cifar_members(folder: str, archive: str, names: list[str]) -> dict[str, bytes]:
    """The bytes of these members of a CIFAR archive, each by its path."""
    local = [_local(folder, name) for name in names]
    if all(local):
        return {str(path): path.read_bytes() for path in local if path}
    path = _download(folder, archive)
    contents = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:  # in one pass; nothing is written to disk
            if member.isfile() and member.name in [f"{folder}/{name}" for name in names]:
                contents[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return {f"{path}: {folder}/{name}": contents[f"{folder}/{name}"] for name in names}


def _cifar_set(
    name: str,
    num_classes: int,
    folder: str,
    archive: str,
    members: list[str],
    labels: bytes,
    flat: bool,
    choice: _Choice,
) -> Data:
    """CIFAR-10 and CIFAR-100: members are pickled dictionaries, the last one for testing."""
    batches = []
    for path, raw in _cifar_members(folder, archive, members).items():
        try:
            batch = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
            x, y = torch.from_numpy(batch[b"data"]), torch.tensor(batch[labels])
            if x.dtype != torch.uint8 or x.shape != (len(y), 3072):
                raise ValueError(f"{len(y)} labels, but images of shape {list(x.shape)}")
        except Exception as error:
            raise ValueError(f"{path} is corrupt or cut short: {error!r}") from error
        batches.append((x if flat else x.reshape(-1, 3, 32, 32), y))
    x, y = (torch.cat(part) for part in zip(*batches[:-1], strict=True))
    return _assemble(name, num_classes, (x, y), batches[-1], choice)


def cifar10(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    flat: bool = False,
) -> Data:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32×32, 170 MB to download.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    flat : bool
        Inputs of shape [3, 32, 32], or [3072] if True; in [0, 1].

    Raises
    ------
    OSError
        If the archive cannot be downloaded, or a file is not under ``FLATMIN_DATA``.
    ValueError
        If a file under ``FLATMIN_DATA`` is corrupt.
    """
    return _cifar_set(
        "cifar10",
        10,
        "cifar-10-batches-py",
        "cifar-10-python",
        [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"],
        b"labels",
        flat,
        _Choice(train_size, validation_size, label_noise, seed),
    )


def cifar100(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    flat: bool = False,
    superclass: bool = False,
) -> Data:
    """CIFAR-100 (Krizhevsky 2009): like :func:`cifar10`, with 100 classes in 20 superclasses.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed, flat
        As in :func:`cifar10`.
    superclass : bool
        Label with the 20 superclasses instead of the 100 classes. :data:`CIFAR100_SUPERCLASS`
        has the superclass of each class.
    """
    return _cifar_set(
        "cifar100",
        20 if superclass else 100,
        "cifar-100-python",
        "cifar-100-python",
        ["train", "test"],
        b"coarse_labels" if superclass else b"fine_labels",
        flat,
        _Choice(train_size, validation_size, label_noise, seed),
    )


# fmt: off
#: The superclass of each class of CIFAR-100, both numbered as in its files.
CIFAR100_SUPERCLASS = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)
# fmt: on
