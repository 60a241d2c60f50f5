"""Reads matrices of experts past the page cache: one thread, one system call at a time, demand first.

Source: EdgeMoE section III-C1 (a thread of its own reads); what it reads goes into memory that is ours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from poise.errors import FileError, RunError
from poise_edgemoe.store.checksums import crc32
from poise_edgemoe.store.index import EXPERTS, Matrix

RETRIES = 3  # of a read that the device fails
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)  # said where there are no direct reads
HUGE = 1 << 21  # bytes of a huge page


@dataclass
class Request:
    """Matrices of an expert to read into memory that begins at a page, and whether they are there.

    Parameters
    ----------
    matrices : dict
        Part to where it lies; they follow one another in the file.
    buffer : memoryview
        As long as all of them, each padded.
    what : str
        Whose they are, said when reading fails.
    check : bool
        Whether checksums are looked at.
    through : memoryview or None
        Memory as long as the buffer, into which they are read first; the reader's alone meanwhile.
    then : callable or None
        Writes what the buffer is to hold, given what was read and the buffer.
    """

    matrices: dict[str, Matrix]
    buffer: memoryview
    what: str
    check: bool = True
    through: memoryview | None = None
    then: Callable[[memoryview, memoryview], None] | None = None
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def part(self, name: str) -> memoryview:
        """Return the bytes of one matrix."""
        first = next(iter(self.matrices.values())).offset
        m = self.matrices[name]
        return self.read_into[m.offset - first: m.offset - first + m.nbytes]

    @property
    def read_into(self) -> memoryview:
        """What the bytes of the file are read into."""
        return self.buffer if self.through is None else self.through

    def at(self, offset: int) -> str:
        """Return in words what lies at an offset of the file."""
        name = [part for part, m in self.matrices.items() if m.offset <= offset][-1]
        return f"{name} of {self.what}"

    def wait(self) -> None:
        """Return when it is there; raise what went wrong.

        Raises
        ------
        FileError
            For bytes that cannot be read, or are not those that were written.
        """
        self.done.wait()
        if self.error is not None:
            raise self.error

    def wait_quietly(self) -> None:
        """Return when its memory is no longer written to, come what may."""
        self.done.wait()


class Reader:
    """Serves requests in the order in which they come, those of `demand` before those of `prefetch`.

    Parameters
    ----------
    folder : Path
        A store, whose index was read.
    direct : bool
        Whether to try O_DIRECT.
    """

    def __init__(self, folder: Path, *, direct: bool = True) -> None:
        self.path = folder / EXPERTS
        self._file, self.direct = _opened(self.path, direct)
        self._demand: deque[Request] = deque()
        self._prefetch: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.bytes_read, self.seconds = 0, 0.0  # in all, and how long that took
        self._thread = threading.Thread(target=self._serve, name="poise expert reader", daemon=True)
        self._thread.start()

    def demand(self, requests: list[Request]) -> None:
        """Read these next."""
        self._submit(self._demand, requests)

    def prefetch(self, requests: list[Request]) -> None:
        """Read these when nothing else is asked for."""
        self._submit(self._prefetch, requests)

    def promote(self, requests: list[Request]) -> None:
        """Let prefetches that are not yet running go before others: somebody waits for them."""
        with self._wake:
            moved = [r for r in requests if _holds(self._prefetch, r)]
            self._prefetch = deque(r for r in self._prefetch if not _holds(moved, r))
            self._demand.extend(moved)

    def cancel(self, requests: list[Request]) -> bool:
        """Drop prefetches if none of them has begun; what is being read is read to its end.

        Returns
        -------
        bool
            Whether they were dropped; otherwise all of them will be read.
        """
        with self._wake:
            if not all(_holds(self._prefetch, r) for r in requests):
                return False
            self._prefetch = deque(r for r in self._prefetch if not _holds(requests, r))
        for request in requests:
            request.error = RunError(f"reading {request.what} was cancelled")
            request.done.set()
        return True

    def close(self) -> None:
        """End the thread and close the file; what is not read yet fails. A second time: nothing."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()
        os.close(self._file)

    def _submit(self, queue: deque[Request], requests: list[Request]) -> None:
        with self._wake:
            if self._closed:
                raise RunError("the reader is closed: open the engine again")
            queue.extend(requests)
            self._wake.notify()

    def _serve(self) -> None:
        while (request := self._next()) is not None:
            started = time.perf_counter()
            try:
                self._read(request)
            except Exception as error:
                request.error = error
            self.seconds += time.perf_counter() - started
            request.done.set()

    def _next(self) -> Request | None:
        """Wait for a request; at the end fail those that are left, and return None."""
        with self._wake:
            while not (self._demand or self._prefetch or self._closed):
                self._wake.wait()
            if self._closed:
                for left in (*self._demand, *self._prefetch):
                    left.error = RunError("the reader was closed before it came to this")
                    left.done.set()
                return None
            return (self._demand or self._prefetch).popleft()

    def _read(self, request: Request) -> None:
        first, length, got = next(iter(request.matrices.values())).offset, len(request.buffer), 0
        while got < length:
            n = self._read_some(request, first + got, got, length)
            if n == 0:
                raise FileError(f"{self.path} ends at {first + got}, in {request.at(first + got)}: the "
                                f"file was cut since the store was opened")
            got += n
        self.bytes_read += length
        if not self.direct:  # the page cache is not ours to fill
            os.posix_fadvise(self._file, first, length, os.POSIX_FADV_DONTNEED)
        for name, m in request.matrices.items() if request.check else ():
            if crc32(request.part(name)) != m.crc:
                raise FileError(f"{self.path} is altered: the checksum of {name} of {request.what}, at "
                                f"{m.offset}, does not match")
        if request.then is not None:
            request.then(request.read_into, request.buffer)

    def _read_some(self, request: Request, offset: int, got: int, length: int) -> int:
        """Read once into what is left; a device's failure is tried again."""
        for left in range(RETRIES, -1, -1):
            try:
                return os.preadv(self._file, [request.read_into[got:length]], offset)
            except OSError as error:
                if error.errno in REFUSED and self.direct:  # a short read left an odd offset
                    _set_direct(self._file, False)
                    self.direct = False
                    continue
                if error.errno != errno.EIO or not left:
                    raise FileError(f"cannot read {request.at(offset)} at {offset} of {self.path}: "
                                    f"{error.strerror}") from error
        raise AssertionError("the last try returns or raises")


def _holds(some: Iterable[Request], one: Request) -> bool:
    """Return whether it is one of them; requests that are equal are not the same."""
    return any(r is one for r in some)


def mapped(size: int) -> mmap.mmap:
    """Return zeroed memory that begins at a page, in huge pages where it is large and the system has them.

    A read then hands the device a few long pieces and not a thousand pages (specification, 3.5). It is
    private to the process: what is shared, Python's default, has no huge pages on most systems.

    Parameters
    ----------
    size : int
        In bytes; no more than that becomes resident.
    """
    place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            place.madvise(mmap.MADV_HUGEPAGE)
    return place


def _opened(path: Path, direct: bool) -> tuple[int, bool]:
    """Open a regular file, past the page cache where that is wanted and the file system allows it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FileError(f"cannot read {path}: it is no regular file")
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead into the page cache
        return handle, direct and _made_direct(handle, path)
    except BaseException:
        os.close(handle)
        raise


def _made_direct(handle: int, path: Path) -> bool:
    """Let an open file be read past the page cache; False: its file system does not allow it."""
    try:
        _set_direct(handle, True)
        with mmap.mmap(-1, 4096) as page:
            os.preadv(handle, [page], 0)
        return True
    except OSError as error:
        if error.errno not in REFUSED:
            raise FileError(f"cannot read {path}: {error.strerror}") from None
    _set_direct(handle, False)
    return False


def _set_direct(handle: int, direct: bool) -> None:
    """Change the way in which an open file is read: by its name another file might be found by now."""
    flags, wanted = fcntl.fcntl(handle, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    if direct and not wanted:
        raise OSError(errno.EINVAL, "no O_DIRECT on this system")
    fcntl.fcntl(handle, fcntl.F_SETFL, flags | wanted if direct else flags & ~wanted)
