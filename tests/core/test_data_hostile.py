"""What stands where a data file should: pipes, folders, files that are too large or unpack to too much."""

from __future__ import annotations

import gzip
import io
import os
import signal
import tarfile
from contextlib import contextmanager

import numpy as np
import pytest
from refusal import refuses

from poise.data import packaged, splits
from poise.data.components import Cifar10, Gsm8k, Images, Tabular, Text
from poise.data.splits import read_bytes
from poise.errors import DataError, FileError
from poise.files import checksum


@contextmanager
def no_waiting():
    """Fail where something would wait for ever."""
    def ring(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


SOURCES = {
    "table": lambda path: Tabular(path=path),
    "text": lambda path: Text(path=path),
    "problems": lambda path: Gsm8k(path=path),
    "images": lambda path: Images(path=path, labels=path),
    "archive": lambda path: Cifar10(path=path),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_pipe_or_a_device_is_no_data_file(source, tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    with no_waiting():
        for path in (tmp_path / "pipe.csv", "/dev/zero"):
            refuses(SOURCES[source](str(path)), str(path), "no regular file")


def test_a_pipe_among_images_is_no_image(tmp_path):
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "0.png")
    with no_waiting():
        refuses(Images(path=str(tmp_path)), "0.png", "no regular file")


def test_checksums_are_of_regular_files(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "SHA256SUMS")
    (tmp_path / "tabular").mkdir()
    os.mkfifo(tmp_path / "tabular" / "manifest.json")
    with no_waiting():
        with pytest.raises(FileError, match="no regular file"):
            checksum(tmp_path / "SHA256SUMS")
        monkeypatch.setenv("POISE_DATA", str(tmp_path))
        assert packaged.licence_of(tmp_path / "tabular" / "a.csv.gz") == "unknown"
        assert packaged.inventory(check=True)


def test_a_file_of_any_size_is_not_read(tmp_path):
    with open(tmp_path / "large.txt", "wb") as f:
        f.truncate(splits.MOST_BYTES + 1)  # takes no room on the disk
    refuses(Text(path=str(tmp_path / "large.txt")), "large.txt", f"{splits.MOST_BYTES} are allowed")


def test_a_gzip_is_unpacked_up_to_a_bound(tmp_path, monkeypatch):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(8 << 20)))
    monkeypatch.setattr(splits, "MOST_UNPACKED", 8 << 20)
    assert read_bytes(path)[0] == bytes(8 << 20)
    monkeypatch.setattr(splits, "MOST_UNPACKED", (8 << 20) - 1)
    refuses(Text(path=str(path)), "bomb.txt.gz", "unpacks to more than", "unpack it before")


@pytest.mark.parametrize("change", [
    lambda raw: raw[:-1], lambda raw: raw + b"more", lambda raw: raw[:-8] + bytes(8),
    lambda raw: b"\x1f\x8b\x07" + raw[3:],
])
def test_a_gzip_that_is_off_is_named(tmp_path, change):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(change(gzip.compress(b"some text\n" * 50)))
    refuses(Text(path=str(path)), "t.txt.gz", "not a whole gzip")


def test_a_tar_archive_that_lies_about_its_members_is_named(tmp_path):
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("train/cat/0.jpg")
        member.pax_headers = {"size": "many"}
        archive.addfile(member)
    (tmp_path / "a.tar").write_bytes(body.getvalue())
    with pytest.raises(DataError, match=r"a\.tar"):
        Cifar10(path=str(tmp_path / "a.tar")).load()


def test_a_short_binary_file_of_cifar_is_named(tmp_path):
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).write_bytes(np.zeros(3073, np.uint8).tobytes())
    (tmp_path / "test_batch.bin").write_bytes(b"1")
    refuses(Cifar10(path=str(tmp_path)), "test_batch.bin", "torn")
