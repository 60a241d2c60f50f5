"""C that is built where it runs: one source file, the system's compiler, a library kept in the cache.

A library's name holds a digest of its source, the compiler and the processor. Where it cannot be had (no
compiler, one that fails, no folder to write to), the caller computes in another way.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from poise.caches import cache_folder
from poise.errors import FileError
from poise.files import write_bytes
from poise.trust import read_own, refuse_foreign_folder

T = TypeVar("T")
COMPILE = ("-c", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fPIC", "-std=gnu11")
LINK = ("-shared",)
HEADERS = Path(__file__).parent  # threads.h, numbers.h, packed.h: any source may include them
TIMEOUT = 120  # seconds
FAILURES = (OSError, AttributeError, subprocess.SubprocessError, RuntimeError, ValueError, FileError)


def built(source: Path, folder: str, libraries: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """Return the path of a library, built at the first call.

    A file that is torn, altered or somebody else's is not given out, but built again: a torn library ends
    the process when it is loaded, and an altered one computes something else. The file ends with the
    checksum of what is before.

    Parameters
    ----------
    source : Path
        One file of C, which may include headers beside it, and those of `HEADERS`.
    folder : str
        Of the cache.
    libraries : list of str
        That it is linked with.
    flags : list of str
        For the compiler, beside `COMPILE`.

    Raises
    ------
    OSError, RuntimeError, ValueError, subprocess.SubprocessError
        When there is no compiler, CC cannot be read, it fails, or the folder cannot be used.
    FileError
        When somebody else could write to the folder.
    """
    path = _made(source, folder, (*COMPILE, *flags), libraries)
    try:
        whole = is_whole(read_own(path))
    except FileError:
        whole = False
    if not whole:
        path.unlink()
        path = _made(source, folder, (*COMPILE, *flags), libraries)
    return path


def is_whole(data: bytes) -> bool:
    """Return whether a library ends with the checksum of what is before."""
    body, checksum = data[:-hashlib.sha256().digest_size], data[-hashlib.sha256().digest_size:]
    return hashlib.sha256(body).digest() == checksum


def _made(source: Path, folder: str, flags: Sequence[str], libraries: Sequence[str]) -> Path:
    """Return the library's path; compile where it is not there yet."""
    compiler = shlex.split(os.environ.get("CC", "")) or compiler_at_hand()
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"compiler {compiler[0]} is not there")
    target = _folder(folder) / f"{source.stem}-{_digest(compiler, source, flags, libraries)}.so"
    if not os.path.lexists(target):
        _compile([*compiler, *flags], source, compiler, libraries, target)
    return target


def compiler_at_hand() -> list[str]:
    """Return the system's compiler; raises RuntimeError where there is none."""
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no compiler: install gcc or clang, or set CC")


def _folder(name: str) -> Path:
    """Return the folder of built libraries; code is loaded from it, so nobody else may write there."""
    folder = cache_folder(name)
    if not folder.is_symlink():
        folder.chmod(0o700)  # raises unless it is this user's
    return refuse_foreign_folder(folder)


def _digest(compiler: list[str], source: Path, flags: Sequence[str], libraries: Sequence[str]) -> str:
    asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT, check=True)
    headers = [*sorted(HEADERS.glob("*.h")), *sorted(source.parent.glob("*.h"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in (source, *headers)) + asked.stdout)
    digest.update(repr((compiler[1:], tuple(flags), LINK, tuple(libraries), platform.machine(),
                        _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Return what -march=native looks at: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def processor_flags() -> frozenset[str]:
    """Return the names that Linux has for what this processor can do; none where nobody says so."""
    return frozenset(_processor().split())


def _compile(
    compile_: Sequence[str], source: Path, compiler: Sequence[str], libraries: Sequence[str], target: Path
) -> None:
    """Compile into a folder of its own, then move the library into place in one go."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        object_file, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for command in ([*compile_, f"-I{HEADERS}", "-o", str(object_file), str(source)],
                        [*compiler, *LINK, "-o", str(library), str(object_file), *libraries]):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                                  timeout=TIMEOUT, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(f"{' '.join(compiler)} failed: {last}")
        data = library.read_bytes()
        write_bytes(target, data + hashlib.sha256(data).digest())  # what follows a library is not looked at


class Loaded(Generic[T]):
    """What is made when it is first asked for, once for all threads.

    Parameters
    ----------
    make : callable
        Returns it, or raises one of `FAILURES`.

    Attributes
    ----------
    why : str
        Why it cannot be had; empty while it can, or nobody has asked.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._it: T | None = None
        self._asked, self.why = False, ""

    def get(self) -> T | None:
        """Return it; None where it cannot be had."""
        if not self._asked:
            with self._lock:
                if not self._asked:
                    try:
                        self._it = self._make()
                    except FAILURES as error:
                        self.why = str(error)
                    self._asked = True
        return self._it

    def made(self) -> T | None:
        """Return it if it has been made; nothing is made for that."""
        return self._it


def team() -> ctypes.c_void_p | None:
    """Return the call that runs a function on torch's own OpenMP threads, or None where there is none.

    Those threads wait for work by spinning: other threads would have to share their cores with them.
    """
    import torch

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
