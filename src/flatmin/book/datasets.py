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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import number, tensor, whole
from ..data import Data
from ._extras import needs

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

_Part = tuple[Tensor, Tensor]  # inputs and labels

# ------------------------------------------------------------------ subset, split and label noise


def data_stream(seed: int, purpose: str) -> torch.Generator:
    """As :func:`stream`, for data sets, which keep the hash that they have always used.

    If everything were seeded with ``seed`` itself, inputs, splits, label flips and initial weights
    would be made from the same random bits.
    """
    entropy = (whole("seed", seed, 0), *purpose.encode())
    mixed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed))


def _assemble(
    name: str,
    num_classes: int,
    pool: _Part,
    test: _Part,
    train_size: int | None,
    validation_size: int,
    label_noise: float,
    seed: int,
) -> Data:
    """Draw training and validation rows from the pool and flip labels, as the module describes."""
    size = len(pool[0])
    held_out = whole("validation_size", validation_size, 0)
    if train_size is None:
        train_size = max(1, size - held_out)
    if whole("train_size", train_size, 1) + held_out > size:
        raise ValueError(
            f"train_size + validation_size must be at most {size}, the number of training "
            f"examples of {name}, got {train_size} + {held_out}"
        )
    order = torch.randperm(size, generator=data_stream(seed, "rows"))
    parts: dict[str, Tensor] = {"x_test": _floating(test[0]), "y_test": test[1]}
    rows_of = {"train": order[:train_size], "validation": order[size - held_out :]}
    for split, rows in rows_of.items():
        y = pool[1][rows]
        parts[f"x_{split}"] = _floating(pool[0][rows])
        parts[f"y_{split}_clean"] = y
        parts[f"y_{split}"] = flip_labels(
            y, num_classes, label_noise, data_stream(seed, f"{split} labels")
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
    whole("num_classes", num_classes, 2)
    if tensor("y", y).dtype != torch.int64 or y.ndim != 1:
        raise ValueError(f"y must be labels, int64 [n], got {y.dtype} of shape {list(y.shape)}")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(f"y must be in 0 … {num_classes - 1}, got {int(y.min())} … {int(y.max())}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    share = number("label_noise", label_noise, 0, 1)
    flipped = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    shift = torch.randint(1, num_classes, y.shape, generator=generator)
    noisy = y.clone()
    noisy[flipped] = (y[flipped] + shift[flipped]) % num_classes
    return noisy


def _floating(x: Tensor) -> Tensor:
    """Bytes become float32 in [0, 1]; only the rows in use are converted."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


# ------------------------------------------------------------------------------- synthetic sets


def _synthetic(
    name: str,
    draw: Callable[[int, torch.Generator], _Part],
    test_size: int,
    train_size: int,
    validation_size: int,
    label_noise: float,
    seed: int,
) -> Data:
    """A set of two classes and of any size."""
    size = whole("train_size", train_size, 1) + whole("validation_size", validation_size, 0)
    test = draw(whole("test_size", test_size, 1), data_stream(seed, "test inputs"))
    pool = draw(size, data_stream(seed, "inputs"))
    return _assemble(name, 2, pool, test, train_size, validation_size, label_noise, seed)


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

    def draw(n: int, generator: torch.Generator) -> _Part:
        y = torch.randint(2, (n,), generator=generator)
        return torch.randn(n, dimension, generator=generator) + distance * y[:, None], y

    return _synthetic(
        "two_gaussians", draw, test_size, train_size, validation_size, label_noise, seed
    )


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

    def draw(n: int, generator: torch.Generator) -> _Part:
        stuv = torch.randn(n, 4, generator=generator)
        x = 2 * stuv[:, 2:] / stuv.norm(dim=1, keepdim=True)
        return x, (1.5 * x[:, 0] + torch.sin(1.5 * x[:, 1]) > 0).long()

    return _synthetic("sinusoid", draw, test_size, train_size, validation_size, label_noise, seed)


def spiral(
    train_size: int = 100,
    validation_size: int = 100,
    test_size: int = 20_000,
    noise: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    r"""Two spirals of the flooding paper (Ishida et al., ICML 2020).

    .. math:: \begin{gathered}
              x = (a + \pi y)\,(\cos a, \sin a) + \tau\,\nu, \\
              a \sim U[0, 4\pi], \quad \nu \sim \mathcal N(0, I_2),
              \quad y \in \{0, 1\} \text{ with probability } \tfrac12
              \end{gathered}

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

    def draw(n: int, generator: torch.Generator) -> _Part:
        y = torch.randint(2, (n,), generator=generator)
        a = 4 * math.pi * torch.rand(n, generator=generator)
        arm = (a + math.pi * y)[:, None] * torch.stack([a.cos(), a.sin()], dim=1)
        return arm + noise * torch.randn(n, 2, generator=generator), y

    return _synthetic("spiral", draw, test_size, train_size, validation_size, label_noise, seed)


# ------------------------------------------------------- sets that come with a Python package


def digits(
    train_size: int | None = None,
    validation_size: int = 200,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """Handwritten digits from scikit-learn: 1,797 images of 8×8, as inputs of shape [64] in [0, 1].

    597 of them are the test part, drawn once and the same for every seed.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.

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
    y = torch.tensor(labels, dtype=torch.int64)[order]
    pool, test = (x[597:], y[597:]), (x[:597], y[:597])
    return _assemble("digits", 10, pool, test, train_size, validation_size, label_noise, seed)


def mnist1d(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
    *,
    generate: bool = False,
    test_size: int = 1000,
) -> Data:
    """MNIST-1D (Greydanus & Kobak, ICML 2024): 4,000 + 1,000 sequences of length 40, 10 classes.

    Generated, without a network, by the package ``mnist1d`` with its default arguments; its
    generator's own seed is fixed, so that every ``seed`` has the same 5,000 sequences.
    The first call in a process takes about two seconds.

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.
    generate : bool
        Whether each ``seed`` has sequences of its own, for training and for testing: then results
        vary with the data, too.  A thousand take about a third of a second.
    test_size : int
        Examples to test on; other numbers than 1,000 need ``generate=True``.

    Examples
    --------
    >>> mnist1d(validation_size=500, label_noise=0.2)
    Data('mnist1d', 10 classes, inputs [40], 3500 train (700 noisy), 500 validation, 1000 test)
    >>> mnist1d(100, test_size=50, generate=True)
    Data('mnist1d', 10 classes, inputs [40], 100 train, 0 validation, 50 test)
    """
    size = 4000
    if whole("test_size", test_size, 1) != 1000 and not generate:
        raise ValueError(f"test_size must be 1000 without generate=True, got {test_size}")
    if not generate:
        x, y = _mnist1d_sequences()
    else:
        if train_size is not None:
            size = whole("train_size", train_size, 1) + whole("validation_size", validation_size, 0)
        own = data_stream(seed, "sequences").initial_seed() % 2**32
        x, y = _mnist1d_sequences.__wrapped__(size + test_size, own)
    pool, test = (x[:size], y[:size]), (x[size:][:test_size].clone(), y[size:][:test_size].clone())
    return _assemble("mnist1d", 10, pool, test, train_size, validation_size, label_noise, seed)


@functools.lru_cache(maxsize=1)
def _mnist1d_sequences(size: int = 5000, seed: int = 42) -> _Part:
    """At least ``size`` sequences; the package seeds the global generators, so restore them."""
    with needs("data", "mnist1d()"):
        from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed = -(-size // 10) * 10, seed  # as many of each class
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        arrays = make_dataset(arguments)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    x, y = (np.concatenate([arrays[name], arrays[f"{name}_test"]]) for name in "xy")
    return torch.tensor(x).float(), torch.tensor(y)


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
    """The cached archive, downloaded if it is missing or its sum is wrong."""
    with needs("data", "a download"):
        import pooch

    address, sums = _ARCHIVES[folder]
    url = address.format(archive)
    cache, name = Path(pooch.os_cache("flatmin")) / folder, url.rsplit("/", 1)[1]
    try:  # into a temporary file, moved to its place only if its sum is right
        return Path(pooch.retrieve(url, sums[archive], name, cache, progressbar=True))
    except (OSError, ValueError) as error:  # the network, a read-only cache, the sum
        raise OSError(
            f"{cache / name} could not be downloaded from {url}, and no part of it was kept: "
            f"{error}. Try again, or unpack the archive yourself and set FLATMIN_DATA to that "
            "folder."
        ) from error


def _local(path: Path) -> Path:
    """This file of an unpacked archive, with its ending or without."""
    for file in (path, path.with_suffix("")):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{path} does not exist. FLATMIN_DATA is set, so sets are read from that folder and "
        "nothing is downloaded: put the file there, or unset FLATMIN_DATA."
    )


def _read(folder: str, archive: str, names: list[str], parse: Callable[[bytes], Any]) -> list[Any]:
    """Parse these files of an archive, those under FLATMIN_DATA or else the downloaded ones."""
    if root := os.environ.get("FLATMIN_DATA"):
        paths = [_local(Path(root).expanduser() / folder / name) for name in names]
        files = {str(path): path.read_bytes() for path in paths}
    elif (path := _download(folder, archive)).name in names:
        files = {str(path): path.read_bytes()}
    else:
        with tarfile.open(path) as tar:  # in one pass; nothing is unpacked
            members = {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
        files = {name: members[f"{folder}/{name}"] for name in names}
    parsed = []
    for name, raw in files.items():
        try:
            parsed.append(parse(raw))
        except Exception as error:
            raise ValueError(f"{name} is corrupt or cut short: {error!r}") from error
    return parsed


def _idx(raw: bytes, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of bytes, zipped or not: a magic number, the sizes, all big-endian; the data."""
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    magic, n, *sizes = np.frombuffer(raw, ">u4", 2 + len(shape)).tolist()
    if (magic, *sizes) != (0x801 + len(shape), *shape):
        raise ValueError(f"its header is not that of an IDX file of items of shape {shape}")
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 * (2 + len(shape)))).view(n, *shape)


def _mnist(name: str) -> tuple[_Part, _Part]:
    """Training and test part of MNIST or of a set in its format."""

    def read(archive: str, *shape: int) -> Tensor:
        return _read(name, archive, [f"{archive}-ubyte.gz"], lambda raw: _idx(raw, shape))[0]

    def part(which: str) -> _Part:
        x, y = read(f"{which}-images-idx3", 28, 28), read(f"{which}-labels-idx1")
        if len(x) != len(y):
            raise ValueError(f"{name} is corrupt: {len(x)} {which} images but {len(y)} labels")
        return x[:, None], y.long()

    return part("train"), part("t10k")


def mnist(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """MNIST (LeCun, Cortes & Burges): 60,000 + 10,000 images of 28×28, 11 MB to download.

    Inputs have shape [1, 28, 28] and lie in [0, 1].

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.

    Raises
    ------
    OSError
        If a file cannot be downloaded, or is not under ``FLATMIN_DATA``.
    ValueError
        If a file under ``FLATMIN_DATA`` is corrupt.
    """
    parts = _mnist("mnist")
    return _assemble("mnist", 10, *parts, train_size, validation_size, label_noise, seed)


def fashion_mnist(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): like :func:`mnist`, of clothes; 31 MB.

    Parameters and errors are those of :func:`mnist`.
    """
    parts = _mnist("fashion_mnist")
    return _assemble("fashion_mnist", 10, *parts, train_size, validation_size, label_noise, seed)


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, bytes and NumPy arrays; runs no code."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("._core", ".core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return np.empty(0).__reduce__()[0]
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")


def _cifar(folder: str, names: list[str], labels: bytes) -> tuple[_Part, _Part]:
    """Training and test part of files that are pickled dictionaries, the last one for testing."""

    def parse(raw: bytes) -> _Part:
        batch = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
        y = torch.tensor(batch[labels])
        return torch.from_numpy(batch[b"data"]).reshape(len(y), 3, 32, 32), y

    (archive,) = _ARCHIVES[folder][1]
    *batches, test = _read(folder, archive, names, parse)
    x, y = map(torch.cat, zip(*batches, strict=True))
    return (x, y), test


def cifar10(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32×32, 170 MB to download.

    Inputs have shape [3, 32, 32] and lie in [0, 1].

    Parameters
    ----------
    train_size, validation_size, label_noise, seed
        As in every set, see :mod:`flatmin.book.datasets`.

    Raises
    ------
    OSError
        If the archive cannot be downloaded, or a file is not under ``FLATMIN_DATA``.
    ValueError
        If a file under ``FLATMIN_DATA`` is corrupt.
    """
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    parts = _cifar("cifar-10-batches-py", names, b"labels")
    return _assemble("cifar10", 10, *parts, train_size, validation_size, label_noise, seed)


def cifar100(
    train_size: int | None = None,
    validation_size: int = 0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """CIFAR-100 (Krizhevsky 2009): like :func:`cifar10`, with 100 classes.

    They belong to 20 superclasses, see :data:`CIFAR100_SUPERCLASS`. Parameters and errors are
    those of :func:`cifar10`.
    """
    parts = _cifar("cifar-100-python", ["train", "test"], b"fine_labels")
    return _assemble("cifar100", 100, *parts, train_size, validation_size, label_noise, seed)


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
