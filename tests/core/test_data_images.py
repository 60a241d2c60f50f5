"""Images: IDX files and PNG folders come back as written, and every bad one is named."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refuses

from poise.data.components import Images
from poise.data.images import read_idx
from poise.errors import ConfigError


def idx(array):
    """Write an array of bytes the way MNIST's files are."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6)), st.booleans(),
       st.integers(0, 99))
def test_idx_round_trip(tmp_path, shape, packed, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert (read_idx(path, 3, {}) == array).all()


@pytest.fixture
def pair(tmp_path):
    """Return the options of an IDX pair of 40 images, 5 wide and 6 high."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 6, 5), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 4
    (tmp_path / "x").write_bytes(idx(x))
    (tmp_path / "y").write_bytes(idx(y))
    return {"path": str(tmp_path / "x"), "labels": str(tmp_path / "y")}


def test_an_idx_pair_splits(pair):
    splits = Images(**pair).load()
    assert splits.spec == {"input_shape": (1, 6, 5), "n_classes": 4}
    assert splits.train.x.dtype == np.float32
    assert splits.train.x.min() >= 0 and splits.train.x.max() <= 1
    assert Images(**pair, size=8, channels=3).load().spec["input_shape"] == (3, 8, 8)
    given = Images(**pair, test_path=pair["path"], test_labels=pair["labels"], limit=20).load()
    assert len(given.test) == 20 and len(given.train) + len(given.validation) == 20
    with pytest.raises(ConfigError, match="both"):
        Images(**pair, test_path=pair["path"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-1], ["truncated"]),
        (lambda raw: raw + b"0", ["too long"]),
        (lambda raw: raw[:9], ["truncated", "header"]),
        (lambda raw: b"\x01" + raw[1:], ["begins with"]),
        (lambda raw: b"", ["empty"]),
        (lambda raw: idx(np.zeros((39, 2, 2), np.uint8)), ["39 images", "40 labels"]),
        (lambda raw: idx(np.zeros(40, np.uint8)), ["begins with 0x00000801"]),
    ],
)
def test_bad_idx_files_are_named(pair, tmp_path, change, words):
    (tmp_path / "x").write_bytes(change((tmp_path / "x").read_bytes()))
    refuses(Images(**pair), *words)


def test_idx_without_labels_or_file_is_named(pair, tmp_path):
    refuses(Images(path=pair["path"]), "labels")
    refuses(Images(path=str(tmp_path / "none")), "does not exist")
    refuses(Images(path=pair["path"], labels=str(tmp_path / "none")), "does not exist")
    (tmp_path / "y").write_bytes(idx(np.zeros(0, np.uint8)))
    (tmp_path / "x").write_bytes(idx(np.zeros((0, 2, 2), np.uint8)))
    refuses(Images(**pair), "no images")


def pngs(folder, mode="L", count=6, size=(5, 4)):
    from PIL import Image

    for shade, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = (shade * 100 + i,) * 3 if mode == "RGB" else shade * 100 + i
            Image.new(mode, size, colour).save(folder / name / f"{i}.png")
    return str(folder)


def test_folders_of_png_files(tmp_path):
    grey = Images(path=pngs(tmp_path / "grey")).load()
    assert grey.spec == {"input_shape": (1, 4, 5), "n_classes": 2, "classes": ["cat", "dog"]}
    assert ((grey.train.x.mean(axis=(1, 2, 3)) * 255 > 50) == grey.train.y).all()
    colour = pngs(tmp_path / "colour", "RGB")
    assert Images(path=colour).load().spec["input_shape"] == (3, 4, 5)
    assert Images(path=colour, channels=1, size=7).load().spec["input_shape"] == (1, 7, 7)
    pngs(tmp_path / "both" / "train")
    pngs(tmp_path / "both" / "test", count=2)
    both = Images(path=str(tmp_path / "both")).load()
    assert len(both.test) == 4 and len(both.train) + len(both.validation) == 12


def test_bad_folders_are_named(tmp_path):
    from PIL import Image

    (tmp_path / "empty").mkdir()
    refuses(Images(path=str(tmp_path / "empty")), "CLASS/*.png")
    folder = pngs(tmp_path / "mixed")
    Image.new("L", (9, 9)).save(tmp_path / "mixed" / "dog" / "z.png")
    refuses(Images(path=folder), "z.png", "9x9", "5x4", "size")
    torn = tmp_path / "mixed" / "dog" / "z.png"
    torn.write_bytes(torn.read_bytes()[:42])
    refuses(Images(path=folder), "z.png", "not a whole PNG")


@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
def test_fashion_mnist_loads():
    splits = Images(limit=500).load()
    assert splits.spec == {"input_shape": (1, 28, 28), "n_classes": 10}
    assert splits.provenance["licence"] == "MIT" and len(splits.test) == 500


def test_fashion_mnist_of_debian_is_found(tmp_path, monkeypatch):
    """Its package holds the four files of the original names, packed by gzip."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 30), ("t10k", 10)):
        images = idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        labels = idx(np.arange(n, dtype=np.uint8) % 10)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    monkeypatch.delenv("POISE_DATA", raising=False)
    monkeypatch.setattr("poise.data.images.DEBIAN", tmp_path)
    splits = Images().load()
    assert len(splits.test) == 10 and splits.spec["input_shape"] == (1, 28, 28)
    monkeypatch.setattr("poise.data.images.DEBIAN", tmp_path / "nowhere")
    refuses(Images(), "POISE_DATA is not set", "dataset-fashion-mnist")
