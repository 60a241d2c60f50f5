"""Images: IDX files and PNG folders come back as written, and every bad one is named."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import refuses

from poise.data.components import Images
from poise.data.images import read_idx
from poise.data.pixels import decode
from poise.errors import ConfigError, DataError


def idx(array):
    """Write an array of bytes the way MNIST's files are."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), st.booleans(),
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
    refuses(Images(**pair), "x holds nothing", "0 x 2 x 2")
    for sizes in ((0, 2**32 - 1, 2**32 - 1), (3, 0, 5)):
        (tmp_path / "x").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *sizes))
        refuses(Images(**pair), "x holds nothing", str(sizes[-1]))
    for sizes in ((2**32 - 1,) * 3, (2**16, 2**24, 2**24), (2**31, 2, 2**32 - 1)):  # 2^64, as 0 or 1 in C
        (tmp_path / "x").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *sizes) + b"1")
        refuses(Images(**pair), "truncated", "17 bytes", str(16 + sizes[0] * sizes[1] * sizes[2]))


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


def test_test_images_are_of_the_kind_and_classes_of_the_training_ones(pair, tmp_path):
    (tmp_path / "wide").write_bytes(idx(np.zeros((40, 6, 9), np.uint8)))
    other = Images(**pair, test_path=str(tmp_path / "wide"), test_labels=pair["labels"])
    refuses(other, "test images are (1, 6, 9), training ones (1, 6, 5): give `size`")
    pngs(tmp_path / "both" / "train")
    (tmp_path / "both" / "test").mkdir()
    refuses(Images(path=str(tmp_path / "both")), "test has no PNG files")
    pngs(tmp_path / "both" / "test" / "more")  # as a class of its own
    refuses(Images(path=str(tmp_path / "both")), "has classes that train/ lacks: ['more']")


def test_a_mode_that_is_neither_grey_nor_colour_is_refused():
    from PIL import Image

    file = io.BytesIO()
    Image.new("F", (3, 2)).save(file, "TIFF")
    with pytest.raises(DataError, match="it is of Pillow's mode F: save it as grey or RGB"):
        decode(file.getvalue(), "it", 1, ("TIFF",))


def test_a_gzip_of_nothing_is_empty(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"x\.gz is empty inside its gzip"):
        read_idx(tmp_path / "x.gz", 3, {})


# ------------------------------------------------------------------ kinds of PNG file


def png(kind, depth, rows, *, more=b""):
    """Return a PNG file of raw rows (bytes), written without Pillow, which cannot write every kind."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    size = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits, len(rows), depth, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GREY = [bytes(range(8)), bytes(range(248, 256))]
PALETTE = struct.pack(">I", 6) + b"PLTE" + bytes((1, 2, 3, 250, 251, 252))
PALETTE += struct.pack(">I", zlib.crc32(PALETTE[4:]))


@pytest.mark.parametrize(("kind", "depth", "rows", "more", "values"), [
    (0, 1, [b"\x80", b"\x01"], b"", [[1] + [0] * 7, [0] * 7 + [1]]),
    (0, 2, [b"\x1b", b"\xe4"], b"", [[0, 1 / 3, 2 / 3, 1], [1, 2 / 3, 1 / 3, 0]]),
    (0, 4, [b"\x0f", b"\x5a"], b"", [[0, 1], [1 / 3, 2 / 3]]),
    (0, 8, GREY, b"", np.array([list(r) for r in GREY]) / 255),
    (0, 16, GREY, b"", np.array([np.frombuffer(r, ">u2") for r in GREY]) / 65535),
    (2, 8, [bytes(range(6))], b"", (np.arange(6) / 255).reshape(1, 2, 3)),
    (3, 8, [b"\0\1"], PALETTE, np.array([[(1, 2, 3), (250, 251, 252)]]) / 255),
    (4, 8, [b"\x07\xff\x09\xff"], b"", np.array([[7, 9]]) / 255),
    (6, 8, [b"\1\2\3\xff"], b"", np.array([[[1, 2, 3]]]) / 255),
])
def test_every_kind_of_png_is_read_right(tmp_path, kind, depth, rows, more, values):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(kind, depth, rows, more=more))
    x = Images(path=str(tmp_path), test=0, validation=0).load().train.x
    values = np.asarray(values, np.float32)
    wanted = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    assert x.dtype == np.float32 and np.allclose(x, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("kind", "depth", "rows", "words"), [
    (2, 16, [bytes(12)], "16 bits a channel"),
    (4, 16, [bytes(8)], "16 bits a channel"),
    (6, 16, [bytes(16)], "16 bits a channel"),
    (6, 8, [b"\1\2\3\xfe"], "partly transparent"),
    (4, 8, [b"\7\0"], "partly transparent"),
])
def test_kinds_of_png_that_would_lose_something_are_refused(tmp_path, kind, depth, rows, words):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(kind, depth, rows))
    refuses(Images(path=str(tmp_path)), "0.png", words)


def test_images_of_8_and_16_bits_and_of_other_sizes_meet(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(0, 16, [b"\x10\x01" * 3] * 3))
    (tmp_path / "a" / "1.png").write_bytes(png(0, 8, [b"\x64" * 3] * 3))
    for more in ({}, {"size": 2}, {"size": 7, "channels": 3}):
        x = Images(path=str(tmp_path), test=0, validation=0, **more).load().train.x
        assert np.allclose(x[0], 0x1001 / 65535, atol=1e-7) and np.allclose(x[1], 100 / 255, atol=1e-7)


def test_colours_after_a_grey_image_are_not_dropped(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(0, 8, [b"\7\7"]))
    (tmp_path / "a" / "1.png").write_bytes(png(2, 8, [bytes(range(6))]))
    refuses(Images(path=str(tmp_path)), "1.png has colours", "0.png is grey", "channels")
    assert Images(path=str(tmp_path), channels=1, validation=0, test=0).load().train.x.shape == (2, 1, 1, 2)


def test_a_byte_that_is_off_in_a_png_is_seen(tmp_path):
    """Pillow itself reads over the checksums of the pixels."""
    rows = [bytes(np.random.default_rng(i).integers(0, 256, 30, dtype=np.uint8)) for i in range(30)]
    whole = png(0, 8, rows)
    right = decode(whole, "x", 1)
    for at in range(len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << at % 8
        try:
            assert (decode(bytes(raw), "x", 1) == right).all(), at
        except DataError as error:
            assert "\n" not in str(error)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    from PIL import Image

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png(0, 8, [bytes(100)] * 150))
    for most in (10_000, 1_000):  # Pillow warns of the first, and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        refuses(Images(path=str(tmp_path)), "0.png has more than", f"{most} pixels")


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
