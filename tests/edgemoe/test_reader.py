"""The reader: demand before prefetch, nothing lost that is cancelled, closed in bounded time."""

from __future__ import annotations

import mmap
import threading
import time
import zlib

import pytest

from poise.errors import FileError, RunError
from poise_edgemoe.store.index import EXPERTS, Matrix
from poise_edgemoe.store.reader import Reader, Request

PAGES = 12


@pytest.fixture
def blobs(tmp_path):
    """A file of pages that are all different, and where each lies."""
    data = [bytes([n]) * 4096 for n in range(PAGES)]
    (tmp_path / EXPERTS).write_bytes(b"".join(data))
    return tmp_path, [Matrix(4096 * n, 4000, 0, zlib.crc32(d[:4000])) for n, d in enumerate(data)]


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def reader(blobs, request):
    made = Reader(blobs[0], direct=request.param)
    yield made
    made.close()


def ask(matrix, what=""):
    return Request(matrix, memoryview(mmap.mmap(-1, 4096)), what)


def held_back(reader, monkeypatch):
    """Let the reader wait before its first read; return what lets it go on, and the order of its reads."""
    go, order, real = threading.Event(), [], Reader._read

    def read(self, request):
        go.wait(10)
        order.append(request.what)
        real(self, request)

    monkeypatch.setattr(Reader, "_read", read)
    return go, order


def test_what_is_read_is_what_was_written(blobs, reader):
    requests = [ask(m) for m in blobs[1]]
    reader.demand(requests)
    for n, r in enumerate(requests):
        r.wait()
        assert bytes(r.buffer) == bytes([n]) * 4096
    assert reader.bytes_read == PAGES * 4096


def test_demand_goes_before_prefetch_and_waits_for_one_read_at_most(blobs, reader, monkeypatch):
    go, order = held_back(reader, monkeypatch)
    ahead = [ask(m, f"ahead {n}") for n, m in enumerate(blobs[1][:4])]
    now = [ask(m, f"now {n}") for n, m in enumerate(blobs[1][4:6])]
    reader.prefetch(ahead)
    time.sleep(0.05)  # the first of them is being read
    reader.demand(now)
    reader.promote(ahead[3])
    reader.promote(ahead[3])
    go.set()
    for r in (*ahead, *now):
        r.wait()
    assert order == ["ahead 0", "now 0", "now 1", "ahead 3", "ahead 1", "ahead 2"]


def test_what_is_cancelled_before_it_began_is_not_read_and_says_so(blobs, reader, monkeypatch):
    go, order = held_back(reader, monkeypatch)
    requests = [ask(m, f"page {n}") for n, m in enumerate(blobs[1][:4])]
    reader.prefetch(requests)
    time.sleep(0.05)
    reader.cancel(requests[:3])
    go.set()
    requests[3].wait()
    requests[0].wait()  # it was being read: it ends
    reader.cancel(requests)  # all is done: nothing happens
    for r in requests[1:3]:
        with pytest.raises(RunError, match=r"reading page \d was cancelled"):
            r.wait()
    assert order == ["page 0", "page 3"] and not any(requests[1].buffer)


def test_it_closes_while_it_reads_and_fails_what_is_left(blobs, monkeypatch):
    reader = Reader(blobs[0])
    go, _ = held_back(reader, monkeypatch)
    requests = [ask(m) for m in blobs[1]]
    reader.demand(requests)
    time.sleep(0.05)
    threading.Timer(0.05, go.set).start()
    reader.close()
    reader.close()
    requests[0].wait()
    with pytest.raises(RunError, match="closed before it came to this"):
        requests[-1].wait()
    with pytest.raises(RunError, match="the reader is closed"):
        reader.demand([ask(blobs[1][0])])


def test_other_bytes_are_named(blobs, reader):
    wrong = ask(Matrix(4096, 4000, 0, 1), "down of expert 3 in layer 2")
    reader.demand([wrong])
    with pytest.raises(FileError, match="checksum of down of expert 3 in layer 2, at 4096, does not match"):
        wrong.wait()
