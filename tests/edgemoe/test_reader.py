"""The reader: demand before prefetch, nothing lost that is cancelled, closed in bounded time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from poise.errors import FileError, RunError
from poise_edgemoe.store.index import EXPERTS, Matrix
from poise_edgemoe.store.reader import HUGE, Reader, Request, mapped

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
    return Request({"down": matrix}, memoryview(mmap.mmap(-1, 4096)), what)


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
    reader.promote([ahead[3]])
    reader.promote([ahead[0], ahead[3]])  # running, and promoted already
    go.set()
    for r in (*ahead, *now):
        r.wait()
    assert order == ["ahead 0", "now 0", "now 1", "ahead 3", "ahead 1", "ahead 2"]


def test_what_is_cancelled_before_it_began_is_not_read_and_says_so(blobs, reader, monkeypatch):
    go, order = held_back(reader, monkeypatch)
    requests = [ask(m, f"page {n}") for n, m in enumerate(blobs[1][:6])]
    reader.prefetch(requests[:5])
    time.sleep(0.05)
    reader.demand(requests[5:])
    assert not reader.cancel(requests[:2])  # the first is being read: neither is dropped
    assert reader.cancel(requests[2:4]) and not reader.cancel(requests[2:4])
    assert not reader.cancel(requests[5:])  # somebody waits for it
    go.set()
    for n in (0, 1, 4, 5):
        requests[n].wait()
    assert not reader.cancel(requests[:1])
    for r in requests[2:4]:
        with pytest.raises(RunError, match=r"reading page \d was cancelled"):
            r.wait()
    assert order == ["page 0", "page 5", "page 1", "page 4"] and not any(requests[2].buffer)


def test_neighbours_are_read_in_one_and_told_apart(blobs, reader, monkeypatch):
    calls, real = [], os.preadv

    def preadv(handle, buffers, offset):
        calls.append(offset)
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    both = dict(zip(("gate_up", "down"), blobs[1][2:4], strict=True))
    request = Request(both, memoryview(mmap.mmap(-1, 2 * 4096)), "expert 1")
    reader.demand([request])
    request.wait()
    assert calls == [8192] and request.at(12287) == "gate_up of expert 1"
    assert bytes(request.part("gate_up")) == bytes([2]) * 4000
    assert bytes(request.part("down")) == bytes([3]) * 4000 and request.at(12288) == "down of expert 1"
    both["down"] = Matrix(12288, 4000, 0, 1)
    request = Request(both, memoryview(mmap.mmap(-1, 2 * 4096)), "expert 1")
    reader.demand([request])
    with pytest.raises(FileError, match="checksum of down of expert 1, at 12288, does not match"):
        request.wait()


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
    wrong = ask(Matrix(4096, 4000, 0, 1), "expert 3 in layer 2")
    reader.demand([wrong])
    with pytest.raises(FileError, match="checksum of down of expert 3 in layer 2, at 4096, does not match"):
        wrong.wait()


# ------------------------------------------------------------------ past the page cache, or through it


def every_page(reader, matrices):
    """Read all pages and check them."""
    requests = [ask(m, f"page {n}") for n, m in enumerate(matrices)]
    reader.demand(requests)
    for n, r in enumerate(requests):
        r.wait()
        assert bytes(r.buffer) == bytes([n]) * 4096


def handles():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("where", ["when it is asked for", "at the first read"])
def test_a_file_system_without_direct_reads_is_read_through_the_cache(where, number, blobs, monkeypatch):
    before = handles()
    with monkeypatch.context() as patch:
        def refuses(*given):
            raise OSError(number, os.strerror(number))

        if where == "at the first read":
            patch.setattr(os, "preadv", refuses)
        else:
            real = fcntl.fcntl
            patch.setattr(fcntl, "fcntl", lambda handle, command, *flags: refuses() if flags and
                          flags[0] & os.O_DIRECT else real(handle, command, *flags))
        reader = Reader(blobs[0])
    assert not reader.direct and not fcntl.fcntl(reader._file, fcntl.F_GETFL) & os.O_DIRECT
    every_page(reader, blobs[1])
    reader.close()
    assert handles() == before


def test_a_file_in_memory_is_read_either_way(blobs):
    folder = Path("/dev/shm", f"poise-{os.getpid()}")
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no file system in memory can be written to")
    folder.mkdir()
    try:
        (folder / EXPERTS).write_bytes((blobs[0] / EXPERTS).read_bytes())
        for direct in (True, False):
            reader = Reader(folder, direct=direct)
            every_page(reader, blobs[1])
            reader.close()
    finally:
        (folder / EXPERTS).unlink()
        folder.rmdir()


def test_a_direct_read_that_is_refused_is_made_again_through_the_cache(blobs):
    """Of the file that is open: by its name another one would be found by now."""
    reader, before = Reader(blobs[0]), handles()
    if not reader.direct:
        pytest.skip("the file system has no direct reads")
    (blobs[0] / EXPERTS).unlink()
    (blobs[0] / EXPERTS).write_bytes(bytes(4096 * PAGES))
    odd = ask(Matrix(4096 * 3 + 8, 4000, 0, zlib.crc32(bytes([3]) * 4000)), "an odd place")
    reader.demand([odd])
    odd.wait()
    assert bytes(odd.buffer) == bytes([3]) * 4088 + bytes([4]) * 8 and not reader.direct
    every_page(reader, blobs[1])
    assert handles() == before
    reader.close()


def cached(path):
    """Return the bytes of a file that are in the page cache."""
    size = path.stat().st_size
    with open(path, "rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ) as view:
        pages = np.zeros(-(-size // 4096), np.uint8)
        whole = np.frombuffer(view, np.uint8)
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(size),
                                             pages.ctypes.data_as(ctypes.c_void_p))
        del whole
    return 4096 * int((pages & 1).sum())


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_read_leaves_no_pages_in_the_cache(direct, tmp_path):
    n, each = 8, 3 * 4096 * 100
    data = np.random.default_rng(0).bytes(n * each)
    with open(tmp_path / EXPERTS, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(tmp_path / EXPERTS):
        pytest.skip("the file system keeps its files in memory")
    reader, most = Reader(tmp_path, direct=direct), 0
    for k in (*range(n), *range(n)):
        request = Request({"": Matrix(k * each, each, 0, zlib.crc32(data[k * each:][:each]))},
                          memoryview(mapped(each)), "")
        reader.demand([request])
        request.wait()
        most = max(most, cached(tmp_path / EXPERTS))
    reader.close()
    (tmp_path / EXPERTS).read_bytes()
    assert most <= each / 10 and cached(tmp_path / EXPERTS) == n * each


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_no_file_is_refused_and_nothing_stays_open(direct, tmp_path, blobs, monkeypatch):
    before = handles()
    with pytest.raises(FileError, match=r"cannot read .*experts.bin: No such file"):
        Reader(tmp_path / "none", direct=direct)
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink(blobs[0] / EXPERTS, p)):
        folder = tmp_path / getattr(make, "__name__", "link")
        folder.mkdir()
        make(folder / EXPERTS)
        with pytest.raises(FileError, match=r"cannot read .*experts.bin: (it is no regular|Too many)"):
            Reader(folder, direct=direct)
    if direct:
        def fails(*given):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(FileError, match="Input/output error"):
            Reader(blobs[0])
    assert handles() == before


# ------------------------------------------------------------------ memory to read into


def resident(place):
    """Return the bytes of a place that are in memory, and those in huge pages, as the system lists them."""
    begin = np.frombuffer(place, np.uint8).ctypes.data
    held = {"Rss": 0, "AnonHugePages": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= begin < high
        elif inside and first[:-1] in held:
            held[first[:-1]] += 1024 * int(rest.split()[0])
    return held


@pytest.mark.parametrize("size", [4096, HUGE, 4 * HUGE, 3 * HUGE + 8192])
def test_memory_begins_at_a_page_is_zero_and_takes_what_it_says(size):
    place = mapped(size)
    assert len(place) == size and not any(place[::1024])
    assert np.frombuffer(place, np.uint8).ctypes.data % 4096 == 0
    place[:] = b"\x01" * size
    assert place[-1] == 1


def test_large_memory_lies_in_huge_pages_where_there_are_some():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.is_file() or "[never]" in enabled.read_text():
        pytest.skip("the system has no huge pages")
    place = mapped(8 * HUGE)
    place[:] = b"\x01" * (8 * HUGE)
    held = resident(place)
    assert held["Rss"] >= 8 * HUGE
    assert held["AnonHugePages"] >= 4 * HUGE
