"""CIFAR-10: binary files and archives come back as written, and bad ones are named."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from refusal import refuses

from poise.data import cifar
from poise.data.cifar import CLASSES, TEST, TRAIN
from poise.data.components import Cifar10
from poise.errors import ConfigError

image = pytest.importorskip("PIL.Image")


@pytest.fixture
def binary(tmp_path):
    """Return the folder of a small binary version, its images (60, 3, 32, 32) and labels."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8), np.arange(60, dtype=np.uint8) % 10
    for i, name in enumerate(TRAIN + TEST):
        part = slice(10 * i, 10 * i + 10)
        (tmp_path / name).write_bytes(np.c_[y[part], x[part].reshape(10, -1)].astype(np.uint8).tobytes())
    return tmp_path, x, y


def packed(path, files):
    with tarfile.open(path, "w:xz") as archive:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return Cifar10(path=str(path), validation=0.2)


def jpeg(colour, size=(32, 32), mode="RGB", kind="JPEG"):
    out = io.BytesIO()
    image.new(mode, size, colour).save(out, kind)
    return out.getvalue()


def files():
    return {f"{part}/{name}/{i}.jpg": jpeg((25 * c, 0, 0)) for part, n in (("train", 2), ("test", 1))
            for c, name in enumerate(CLASSES) for i in range(n)}


def test_the_binary_version_comes_back_as_written(binary):
    folder, x, y = binary
    splits = Cifar10(path=str(folder), validation=0.2).load()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 10, 10]
    assert splits.spec == {"input_shape": (3, 32, 32), "n_classes": 10, "classes": list(CLASSES)}
    assert np.array_equal(np.round(splits.test.x * 255), x[50:]) and np.array_equal(splits.test.y, y[50:])
    seen = np.sort(np.r_[splits.train.x, splits.validation.x].reshape(50, -1).sum(1))
    assert np.allclose(seen, np.sort((x[:50] / np.float32(255)).reshape(50, -1).sum(1)), rtol=1e-5)
    assert set(splits.provenance["sha256"]) == set(TRAIN + TEST)


def test_an_archive_of_jpeg_files_by_class(tmp_path):
    splits = packed(tmp_path / "c.tar.xz", {**files(), "README": b"hello"}).load()
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 4, 10]
    for part in (splits.train, splits.validation, splits.test):
        assert np.allclose(part.x[:, 0].mean((1, 2)) * 255, 25 * part.y, atol=4)


def test_pickled_batches_are_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refuses(Cifar10(path=str(tmp_path)), "data_batch_1.bin", "pickles", "binary version")


def test_torn_and_foreign_binary_files_are_named(binary):
    folder, *_ = binary
    whole = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(whole[:-1])
    refuses(Cifar10(path=str(folder)), "test_batch.bin is torn", "3073")
    (folder / "test_batch.bin").write_bytes(bytes([77]) + whole[1:])
    refuses(Cifar10(path=str(folder)), "class 77")
    (folder / "test_batch.bin").unlink()
    refuses(Cifar10(path=str(folder)), "no test_batch.bin")


@pytest.mark.parametrize(("more", "words"), [
    ({"train/dog/9.jpg": b"not an image"}, "train/dog/9.jpg is not a whole JPEG or PNG image"),
    ({"train/dog/9.jpg": jpeg((1, 2, 3))[:-200]}, "train/dog/9.jpg is not a whole JPEG or PNG image"),
    ({"train/dog/9.jpg": jpeg((1, 2, 3), (16, 32))}, "16x32"),
    ({"test/wolf/9.jpg": jpeg((1, 2, 3))}, "test/wolf/9.jpg is no image of one of"),
    ({"test/dog/9.jpg": bytes(1 << 21)}, "test/dog/9.jpg is no image"),
    ({"train/dog/9.png": jpeg(7, mode="I;16", kind="PNG")}, "9.png has 16 bits a pixel: CIFAR-10 has 8"),
])
def test_bad_members_of_an_archive_are_named(tmp_path, more, words):
    refuses(packed(tmp_path / "c.tar.xz", {**files(), **more}), words)


def test_an_archive_that_unpacks_to_more_than_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_MOST_TOTAL", 1 << 20)
    for more in ({"README": bytes(1 << 21)}, {f"empty/{i}": b"" for i in range(2048)}):
        refuses(packed(tmp_path / "c.tar.xz", {**files(), **more}), "holds more than 1 MiB")
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("train/dog/1.jpg")
        member.pax_headers = {"comment": "x" * (1 << 21)}  # read whole, before the member is seen
        archive.addfile(member)
    refuses(Cifar10(path=str(tmp_path / "p.tar.gz")), "holds more than 1 MiB")


def test_archives_that_are_none_or_torn(tmp_path):
    path = tmp_path / "c.tar.xz"
    only = {name: raw for name, raw in files().items() if name.startswith("train")}
    refuses(packed(path, only), "no test/CLASS")
    packed(path, files())
    path.write_bytes(path.read_bytes()[:400])
    refuses(Cifar10(path=str(path)), "is no whole tar archive")
    refuses(Cifar10(path=str(tmp_path / "nowhere")), "does not exist")


def test_fractions_are_checked():
    with pytest.raises(ConfigError, match="validation"):
        Cifar10(validation=1.0)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
def test_the_shared_archive_is_cifar10():
    splits = Cifar10(limit=300).load()
    assert splits.spec["n_classes"] == 10
    assert len(splits.train) + len(splits.validation) == 300 == len(splits.test)
    assert 0.4 < splits.train.x.mean() < 0.55
