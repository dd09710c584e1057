"""Data sets: splits, label noise, reproducibility, and missing or damaged files."""

import contextlib
import gzip
import hashlib
import http.server
import io
import math
import os
import pickle
import random
import struct
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from flatmin import Data
from flatmin.book import (
    CIFAR100_SUPERCLASS,
    cifar10,
    cifar100,
    digits,
    fashion_mnist,
    mnist,
    mnist1d,
    sinusoid,
    spiral,
    two_gaussians,
)
from flatmin.book import datasets as module
from flatmin.book.datasets import data_stream, flip_labels

SETS = {f.__name__: f for f in (two_gaussians, sinusoid, spiral, digits, mnist1d)}
every_set = pytest.mark.parametrize("make", SETS.values(), ids=SETS.keys())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one: Data, other: Data, *fields: str) -> bool:
    names = fields or [f for f in one.__dataclass_fields__ if f[1:2] == "_"]
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


# ------------------------------------------------------------------------------- label noise


@given(
    n=st.integers(0, 200),
    num_classes=st.integers(2, 12),
    noise=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_noise_changes_exactly_the_rounded_share_of_labels(n, num_classes, noise, seed):
    y = torch.randint(num_classes, (n,), generator=seeded(seed))
    before = y.clone()
    noisy = flip_labels(y, num_classes, noise, seeded(seed))
    assert torch.equal(y, before)
    assert (noisy != y).sum() == round(noise * n)
    assert noisy.dtype == torch.int64
    assert n == 0 or (noisy.min() >= 0 and noisy.max() < num_classes)


@given(low=st.floats(0, 1), high=st.floats(0, 1), seed=st.integers(0, 2**32))
@settings(max_examples=50)
def test_noise_is_nested(low, high, seed):
    low, high = sorted((low, high))
    y = torch.arange(60) % 5
    less, more = (flip_labels(y, 5, noise, seeded(seed)) for noise in (low, high))
    assert torch.equal(less[less != y], more[less != y])


def test_every_wrong_class_is_equally_likely():
    n, num_classes = 40_000, 5
    y = torch.full((n,), 2)
    counts = flip_labels(y, num_classes, 1.0, seeded()).bincount(minlength=num_classes)
    assert counts[2] == 0
    share, spread = 1 / 4, math.sqrt(3 / 16 / n)
    wrong = counts[[0, 1, 3, 4]] / n
    assert ((wrong - share).abs() < 5 * spread).all()


@every_set
def test_noise_touches_training_and_validation_labels_only(make):
    clean, noisy = (make(label_noise=noise, validation_size=50, seed=3) for noise in (0.0, 0.3))
    assert same(clean, noisy, "x_train", "x_validation", "x_test", "y_test")
    assert same(clean, noisy, "y_train_clean", "y_validation_clean")
    assert torch.equal(clean.y_train, clean.y_train_clean)
    for split in ("train", "validation"):
        y, y_clean = noisy.split(split)[1], noisy.split(f"{split}_clean")[1]
        assert (y != y_clean).sum() == round(0.3 * len(y))
        more = make(label_noise=0.6, validation_size=50, seed=3).split(split)[1]
        assert torch.equal(more[y != y_clean], y[y != y_clean])


# ------------------------------------------------------------------------------- subset and split


def assemble(size=100, train_size=None, validation_size=0, seed=0):
    """A data set whose inputs are row numbers."""
    rows = torch.arange(size)
    pool = rows[:, None].float(), rows % 4
    return module._assemble("rows", 4, pool, pool, train_size, validation_size, 0.0, seed)


@given(st.data())
@settings(max_examples=60)
def test_training_and_validation_are_disjoint_and_nested(draw):
    size = draw.draw(st.integers(1, 80))
    validation_size = draw.draw(st.integers(0, size - 1))
    train_size = draw.draw(st.integers(1, size - validation_size))
    seed = draw.draw(st.integers(0, 2**64))
    data = assemble(size, train_size, validation_size, seed=seed)
    train, validation = (x.flatten().tolist() for x in (data.x_train, data.x_validation))
    assert (len(train), len(validation)) == (train_size, validation_size)
    assert len({*train, *validation}) == train_size + validation_size
    assert [row % 4 for row in train + validation] == [*data.y_train, *data.y_validation]
    everything = assemble(size, None, validation_size, seed=seed)
    assert same(data, everything, "x_validation", "y_validation")
    assert torch.equal(data.x_train, everything.x_train[:train_size])


def test_every_row_is_equally_likely_to_be_drawn():
    hits = torch.zeros(20)
    for seed in range(2000):
        hits[assemble(20, train_size=5, seed=seed).x_train.long()] += 1
    assert (hits - 500).abs().max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


@every_set
def test_same_seed_same_data_and_another_seed_other_data(make):
    one, again, other = (make(label_noise=0.2, seed=seed) for seed in (5, 5, 6))
    assert same(one, again)
    assert not torch.equal(one.x_train, other.x_train)
    assert not torch.equal(one.y_train, other.y_train)


@pytest.mark.parametrize("make", [digits, mnist1d], ids=["digits", "mnist1d"])
def test_sets_of_fixed_size_have_one_test_set(make):
    assert same(make(seed=0), make(seed=1), "x_test", "y_test")


@every_set
def test_global_random_states_are_neither_read_nor_changed(make):
    def states():
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    first = make(seed=1, label_noise=0.1)
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    module._mnist1d_sequences.cache_clear()
    before = states()
    second = make(seed=1, label_noise=0.1)
    assert states() == before
    assert same(first, second)


def test_inputs_splits_and_noise_have_their_own_streams():
    purposes = ["inputs", "test inputs", "rows", "train labels", "validation labels"]
    draws = {tuple(torch.rand(4, generator=data_stream(0, p)).tolist()) for p in purposes}
    draws.add(tuple(torch.rand(4, generator=seeded(0)).tolist()))
    assert len(draws) == len(purposes) + 1


def test_a_change_to_one_data_set_does_not_reach_the_next():
    for make in (digits, mnist1d):
        first = make()
        for name in ("x_train", "y_train", "x_test", "y_test"):
            getattr(first, name).zero_()
        assert make().x_train.abs().sum() > 0 < make().x_test.abs().sum()
        assert make().y_test.sum() > 0 < make().y_train.sum()
        assert (make(label_noise=0).y_train_clean.bincount() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_noise": 1.5}, r"label_noise must be a number in \[0, 1\], got 1.5"),
        ({"label_noise": -0.1}, r"label_noise must be .* got -0.1"),
        ({"label_noise": math.nan}, r"label_noise must be .* got nan"),
        ({"label_noise": "0.1"}, r"label_noise must be .* got '0.1'"),
        ({"label_noise": True}, r"label_noise must be .* got True"),
        ({"train_size": 0}, "train_size must be a whole number >= 1, got 0"),
        ({"train_size": 10.0}, "train_size must be a whole number >= 1, got 10.0"),
        ({"validation_size": -1}, "validation_size must be a whole number >= 0, got -1"),
        ({"validation_size": None}, "validation_size must be a whole number >= 0, got None"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 0.5}, "seed must be a whole number >= 0, got 0.5"),
    ],
)
@every_set
def test_bad_input_is_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mnist1d(3900, 200), r"at most 4000, .* of mnist1d, got 3900 \+ 200"),
        (lambda: mnist1d(validation_size=4000), r"at most 4000, .* got 1 \+ 4000"),
        (lambda: digits(1200, 1), r"at most 1200, .* of digits, got 1200 \+ 1"),
        (lambda: sinusoid(train_size=None), "train_size must be a whole number >= 1, got None"),
        (lambda: sinusoid(test_size=0), "test_size must be"),
        (lambda: two_gaussians(dimension=0), "dimension must be a whole number >= 1, got 0"),
        (lambda: two_gaussians(distance=-1), "distance must be a number >= 0, got -1"),
        (lambda: spiral(noise=-1), "noise must be a number >= 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------- the sets


@every_set
def test_shapes_and_types(make):
    data = make(validation_size=40)
    assert data.name == make.__name__
    for split in ("train", "train_clean", "validation", "validation_clean", "test"):
        x, y = data.split(split)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert len(x) == 40 or (y.bincount(minlength=data.num_classes) > 0).all()
    assert len(data.x_validation) == 40
    assert len(make(validation_size=0).x_validation) == 0


def test_two_gaussians_have_their_means_covariance_and_best_accuracy():
    data = two_gaussians(test_size=40_000, distance=0.8, seed=1)
    x, y = data.split("test")
    assert abs(y.float().mean() - 0.5) < 0.02
    for label in (0, 1):
        part = x[y == label]
        torch.testing.assert_close(part.mean(0), torch.full((10,), 0.8 * label), atol=0.05, rtol=0)
        torch.testing.assert_close(part.T.cov(), torch.eye(10), atol=0.06, rtol=0)
    best = ((x.mean(1) > 0.4) == (y == 1)).float().mean()
    bound = torch.distributions.Normal(0, 1).cdf(torch.tensor(0.8 * math.sqrt(10) / 2))
    assert abs(best - bound) < 0.01


def test_sinusoid_is_uniform_on_the_disc_and_labelled_by_its_curve():
    x, y = sinusoid(seed=2).split("test")
    squared = x.square().sum(1)
    assert squared.max() <= 4
    quantiles = squared.quantile(torch.tensor([0.25, 0.5, 0.75]))  # uniform on the disc: r² is
    torch.testing.assert_close(quantiles, torch.tensor([1.0, 2.0, 3.0]), atol=0.06, rtol=0)
    angle = torch.atan2(x[:, 1], x[:, 0])
    assert abs(angle.cos().mean()) < 0.03 and abs(angle.sin().mean()) < 0.03
    assert torch.equal(y == 1, torch.sign(1.5 * x[:, 0] + torch.sin(1.5 * x[:, 1])) > 0)


def test_spiral_without_noise_lies_on_its_two_arms():
    x, y = spiral(noise=0.0, test_size=2000).split("test")
    x = x.double()
    a = x.norm(dim=1) - math.pi * y
    assert a.min() >= -1e-5 and a.max() <= 4 * math.pi + 1e-5
    on_arm = (a + math.pi * y)[:, None] * torch.stack([a.cos(), a.sin()], dim=1)
    torch.testing.assert_close(on_arm, x, atol=1e-4, rtol=0)
    noisy, _ = spiral(noise=0.5, test_size=2000).split("test")
    assert abs((noisy - x).std() - 0.5) < 0.03


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = digits()
    assert data.x_train.shape == (1000, 64)
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    raw = load_digits()
    ours = torch.cat([data.x_train, data.x_validation, data.x_test])
    labels = torch.cat([data.y_train, data.y_validation, data.y_test])

    def rows(x, y):
        return sorted((*np.asarray(a).tolist(), int(b)) for a, b in zip(x, y, strict=True))

    assert rows(ours * 16, labels) == rows(raw.data, raw.target)


def test_mnist1d_is_generated_with_default_arguments_and_no_network(monkeypatch):
    from mnist1d.data import make_dataset

    def refuse(*_, **__):
        raise AssertionError("mnist1d opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("requests.sessions.Session.request", refuse)
    module._mnist1d_sequences.cache_clear()
    data = mnist1d()
    assert data.x_train.shape == (4000, 40) and data.x_test.shape == (1000, 40)
    state = np.random.get_state(), random.getstate()
    raw = make_dataset()
    np.random.set_state(state[0]), random.setstate(state[1])
    torch.testing.assert_close(data.x_test, torch.tensor(raw["x_test"]).float())
    assert torch.equal(data.y_test, torch.tensor(raw["y_test"]))
    torch.testing.assert_close(
        data.x_train.double().sort(0).values, torch.tensor(raw["x"]).float().double().sort(0).values
    )
    everything = torch.cat([data.x_train, data.x_test])
    assert abs(everything.mean()) < 1e-4 and abs(everything.std() - 1) < 1e-3


def test_generated_mnist1d_has_sequences_of_its_own_for_each_seed():
    published = mnist1d()
    one, again, other = (mnist1d(200, 100, seed=s, generate=True, test_size=50) for s in (3, 3, 4))
    assert same(one, again) and one.x_validation.shape == (100, 40) and one.x_test.shape == (50, 40)
    rows = lambda *sets: {tuple(row) for x in sets for row in x.tolist()}
    old = rows(published.x_train, published.x_test)
    new = [rows(d.x_train, d.x_validation, d.x_test) for d in (one, other)]
    assert [len(each) for each in new] == [350, 350]  # no example is in two splits
    assert not (new[0] & new[1] or new[0] & old or new[1] & old)
    assert abs(one.x_train.mean()) < 0.1 and abs(one.x_train.std() - 1) < 0.1
    assert mnist1d(validation_size=500, generate=True).x_train.shape == (3500, 40)
    assert mnist1d(101, test_size=7, generate=True, label_noise=0.5).x_test.shape == (7, 40)


def test_a_published_test_set_has_its_size():
    with pytest.raises(ValueError, match="test_size must be 1000 without generate=True, got 50"):
        mnist1d(test_size=50)


def test_superclasses_of_cifar100_have_five_classes_each():
    assert torch.tensor(CIFAR100_SUPERCLASS).bincount().tolist() == [5] * 20
    # aquatic mammals: beaver, dolphin, otter, seal, whale
    assert [c for c, s in enumerate(CIFAR100_SUPERCLASS) if s == 0] == [4, 30, 55, 72, 95]


# ------------------------------------------------------------------------------- files


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote str, like the official CIFAR files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def pickled(batch: dict) -> bytes:
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(batch)
    return out.getvalue().replace(b"numpy._core", b"numpy.core")


def tiny_sets() -> dict[str, dict[str, bytes]]:
    """All four sets, by folder and file as unpacked: 12 + 4 images, or 4 per file."""
    rng = np.random.default_rng(0)
    mnist = {}
    for part, n in (("train", 12), ("t10k", 4)):
        mnist[f"{part}-images-idx3-ubyte"] = idx(rng.integers(256, size=(n, 28, 28)))
        mnist[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n) % 10)

    def batches(names, key, labels):
        pixels = rng.integers(256, size=(len(names), 4, 3072), dtype=np.uint8)
        return {name: pickled({b"data": pixels[i], key: labels}) for i, name in enumerate(names)}

    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    return {
        "mnist": mnist,
        "fashion_mnist": mnist,
        "cifar-10-batches-py": batches(names, b"labels", [0, 3, 9, 1]),
        "cifar-100-python": batches(["train", "test"], b"fine_labels", [0, 4, 30, 99]),
    }


TINY = tiny_sets()


def lay_out(root, zipped=False):
    """The tiny sets as a FLATMIN_DATA folder."""
    for folder, files in TINY.items():
        (root / folder).mkdir()
        for name, raw in files.items():
            if zipped and name.endswith("-ubyte"):
                name, raw = f"{name}.gz", gzip.compress(raw)
            (root / folder / name).write_bytes(raw)


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A FLATMIN_DATA folder with the tiny sets; downloads fail."""

    def refuse(*_, **__):
        raise AssertionError("a download was tried although FLATMIN_DATA is set")

    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    monkeypatch.setattr(module, "_download", refuse)
    lay_out(tmp_path, zipped=getattr(request, "param", True))
    return tmp_path


@pytest.mark.parametrize("folder", [True, False], ids=["gz", "plain"], indirect=True)
@pytest.mark.parametrize("make", [mnist, fashion_mnist])
def test_local_idx_files_are_read_zipped_or_not(folder, make):
    def images(part):
        raw = np.frombuffer(TINY["mnist"][f"{part}-images-idx3-ubyte"], np.uint8, offset=16)
        return torch.tensor(raw).view(-1, 1, 28, 28) / 255

    data = make()
    assert data.name == make.__name__
    assert torch.equal(data.x_test, images("t10k")) and data.y_test.tolist() == [0, 1, 2, 3]
    rows = [(images("train") == x).flatten(1).all(1).nonzero().item() for x in data.x_train]
    assert sorted(rows) == list(range(12)) and data.y_train.tolist() == [row % 10 for row in rows]


def test_local_cifar_files_are_read(folder):
    data = cifar10(15, 5)
    assert data.x_train.shape == (15, 3, 32, 32) and data.num_classes == 10
    assert data.y_test.tolist() == [0, 3, 9, 1]
    batch = pickle.loads(TINY["cifar-10-batches-py"]["test_batch"], encoding="bytes")
    red = torch.tensor(batch[b"data"][:, :1024]).view(4, 32, 32).float() / 255
    assert torch.equal(data.x_test[:, 0], red)
    assert sorted(cifar10().y_train.tolist()) == sorted([0, 3, 9, 1] * 5)
    assert cifar100().num_classes == 100 and cifar100().y_test.tolist() == [0, 4, 30, 99]


def test_files_written_by_a_current_numpy_are_read(folder):
    place = folder / "cifar-100-python" / "test"
    batch = pickle.loads(place.read_bytes(), encoding="bytes")
    expected = cifar100().x_test
    for protocol in (3, 4):
        place.write_bytes(pickle.dumps(batch, protocol=protocol))
        assert torch.equal(cifar100().x_test, expected)


IMAGES = "mnist/train-images-idx3-ubyte.gz"
LABELS = "mnist/train-labels-idx1-ubyte.gz"
BATCH = "cifar-10-batches-py/data_batch_3"


def unzipped(change):
    return lambda raw: gzip.compress(change(gzip.decompress(raw)))


def zeros(*shape):
    return gzip.compress(idx(np.zeros(shape)))


def without(key, rows=slice(None)):
    """A batch without some labels, or without any."""

    def change(raw):
        batch = pickle.loads(raw, encoding="bytes")
        labels = batch.pop(key)[rows]
        return pickled({**batch, key: labels} if labels else batch)

    return change


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (IMAGES, lambda raw: raw[: len(raw) // 2], "corrupt or cut short"),
        (IMAGES, lambda raw: raw[:100] + b"????" + raw[104:], "corrupt or cut short"),
        (IMAGES, lambda raw: b"<html>404 Not Found</html>", "corrupt or cut short"),
        (IMAGES, lambda raw: b"", "corrupt or cut short"),
        (IMAGES, unzipped(lambda raw: raw[:-1]), "invalid for input of size 9407"),
        (IMAGES, unzipped(lambda raw: raw + b"x"), "invalid for input of size 9409"),
        (IMAGES, unzipped(lambda raw: raw[:10]), "corrupt or cut short"),
        (IMAGES, unzipped(lambda raw: b"\0\0\x09\x03" + raw[4:]), "not that of an IDX file"),
        (IMAGES, lambda raw: zeros(12, 14, 56), r"IDX file of items of shape \(28, 28\)"),
        (LABELS, lambda raw: zeros(12, 28, 28), "not that of an IDX file"),
        (BATCH, lambda raw: raw[: len(raw) // 2], "corrupt or cut short"),
        (BATCH, lambda raw: b"not a pickle", "corrupt or cut short"),
        (BATCH, without(b"labels", slice(0)), "labels"),
        (BATCH, without(b"labels", slice(1, None)), "corrupt or cut short"),
    ],
)
def test_a_damaged_local_file_is_named_and_left_alone(folder, file, damage, message):
    path = folder / file
    path.write_bytes(damaged := damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        (mnist if file.startswith("mnist") else cifar10)()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == damaged


def test_images_and_labels_must_be_equally_many(folder):
    (folder / IMAGES).write_bytes(zeros(11, 28, 28))
    with pytest.raises(ValueError, match="mnist is corrupt: 11 train images but 12 labels"):
        mnist()


@pytest.mark.parametrize("file", [IMAGES, "mnist/t10k-labels-idx1-ubyte.gz", BATCH])
def test_a_missing_local_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match="FLATMIN_DATA is set") as caught:
        (mnist if file.startswith("mnist") else cifar10)()
    assert str(folder / file) in str(caught.value)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_runs_nothing(folder):
    mark = folder / "attacked"
    batch = {b"data": Attack(str(mark)), b"labels": [0]}
    for raw in (pickled(batch), *(pickle.dumps(batch, protocol=p) for p in (3, 4, 5))):
        (folder / BATCH).write_bytes(raw)
        with pytest.raises(ValueError, match=r"data_batch_3 is corrupt .* asks for \w+\.mkdir"):
            cifar10()
        assert not mark.exists()


# ------------------------------------------------------------------------------- downloads


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Serves ``site.files`` on this machine instead of the official addresses, with a new cache.

    A file that is shorter than it was is cut off while it is sent; ``site.asked`` lists the
    requests.
    """

    class Site(http.server.BaseHTTPRequestHandler):
        files: dict[str, bytes] = {}
        asked: list[str] = []
        cache = tmp_path / "cache"

        def do_GET(self):
            name = self.path.lstrip("/")
            Site.asked.append(name)
            if name not in Site.files:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(sizes[name]))
            self.end_headers()
            self.wfile.write(Site.files[name])

        def log_message(self, *_):
            pass

        @staticmethod
        def kept():
            return sorted(p.name for p in Site.cache.rglob("*") if p.is_file())

    for file, raw in TINY["mnist"].items():
        Site.files[f"{file}.gz"] = gzip.compress(raw, mtime=0)
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for member, raw in {"../escape": b"", "readme.html": b"", **TINY[folder]}.items():
                entry = tarfile.TarInfo(f"{folder}/{member}")
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))
        (stem,) = module._ARCHIVES[folder][1]
        Site.files[f"{stem}.tar.gz"] = archive.getvalue()
    sizes = {name: len(body) for name, body in Site.files.items()}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def here(official):
        template, sums = official
        name = template.rsplit("/", 1)[1]
        sha256 = {k: hashlib.sha256(Site.files[name.format(k)]).hexdigest() for k in sums}
        return f"http://127.0.0.1:{server.server_port}/{name}", sha256

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "FLATMIN_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(module, "_ARCHIVES", {k: here(v) for k, v in module._ARCHIVES.items()})
    monkeypatch.setattr("pooch.os_cache", lambda project: Site.cache)
    yield Site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("make", "downloads"),
    [(mnist, 4), (fashion_mnist, 4), (cifar10, 1), (cifar100, 1)],
)
def test_a_set_is_downloaded_once_with_progress(
    site, make, downloads, capsys, monkeypatch, tmp_path
):
    shown = partial(tqdm, disable=False)  # TQDM_DISABLE was read when tqdm was imported
    monkeypatch.setattr("pooch.downloaders.tqdm", shown)
    first = make(label_noise=0.25, seed=2)
    assert len(site.asked) == downloads == len(site.kept())
    assert "100%" in capsys.readouterr().err
    assert same(first, make(label_noise=0.25, seed=2))
    assert len(site.asked) == downloads
    assert not list(site.cache.parent.rglob("escape"))
    lay_out(tmp_path)
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    assert same(first, make(label_noise=0.25, seed=2))


@pytest.mark.parametrize(
    ("make", "file"),
    [(mnist, "train-images-idx3-ubyte.gz"), (cifar10, "cifar-10-python.tar.gz")],
)
class TestBrokenDownloads:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda body: body[: len(body) // 2], "could not be downloaded"),
            (lambda body: body[:-1] + bytes([body[-1] ^ 1]), "hash"),
            (lambda body: None, "404"),
        ],
        ids=["cut off", "wrong", "not there"],
    )
    def test_it_is_named_not_kept_and_can_be_repeated(self, site, make, file, damage, message):
        body = site.files.pop(file)
        if damaged := damage(body):
            site.files[file] = damaged
        with pytest.raises(OSError, match=message) as caught:
            make()
        assert file in str(caught.value) and "FLATMIN_DATA" in str(caught.value)
        assert site.kept() == []
        site.files[file] = body
        assert len(make().x_train) > 0

    def test_a_corrupt_cached_file_is_replaced_and_never_read(self, site, make, file):
        good = make()
        (path,) = site.cache.rglob(file)
        path.write_bytes(path.read_bytes()[:-10])
        assert same(make(), good)
        path.write_bytes(b"")
        site.files.clear()
        with pytest.raises(OSError, match=file):
            make()

    def test_a_cache_that_cannot_be_written_is_named(self, site, make, file):
        site.cache.touch()  # in the place of the folder
        with pytest.raises(OSError, match="could not be downloaded") as caught:
            make()
        assert str(site.cache) in str(caught.value) and "FLATMIN_DATA" in str(caught.value)

    def test_an_interrupted_download_leaves_nothing(self, site, make, file, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr("requests.Response.iter_content", interrupt)
            make()
        assert site.asked and site.kept() == []
        assert len(make().x_train) > 0


# ------------------------------------------------------------------------------- the real sets


def real(folder):
    root = os.environ.get("FLATMIN_DATA")
    if not root:
        pytest.skip(f"FLATMIN_DATA is not set: real {folder} was not checked")
    if not os.path.isdir(os.path.join(root, folder)):
        pytest.skip(f"FLATMIN_DATA has no {folder}: it was not checked")


def test_real_mnist():
    real("mnist")
    data = mnist(validation_size=10_000)
    assert (len(data.x_train), len(data.x_validation), len(data.x_test)) == (50_000, 10_000, 10_000)
    y = torch.cat([data.y_train, data.y_validation]).bincount().tolist()
    assert y == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    x = torch.cat([data.x_train, data.x_validation]).double()
    assert abs(x.mean() - 0.1306604) < 1e-6 and abs(x.std() - 0.3081078) < 1e-6
    raw = (data.x_test * 255).round().to(torch.uint8).numpy()
    header = struct.pack(">IIII", 0x803, 10_000, 28, 28)
    digest = hashlib.md5(header + raw.tobytes(), usedforsecurity=False).hexdigest()
    assert digest == "2646ac647ad5339dbf082846283269ea"


def test_real_cifar10():
    real("cifar-10-batches-py")
    data = cifar10(1000, 500, label_noise=0.4)
    assert data.x_train.shape == (1000, 3, 32, 32)
    assert data.y_test.bincount().tolist() == [1000] * 10
    assert (data.y_train != data.y_train_clean).sum() == 400
    channels = data.x_test.mean(dim=(0, 2, 3))
    torch.testing.assert_close(channels, torch.tensor([0.4942, 0.4851, 0.4504]), atol=3e-3, rtol=0)
