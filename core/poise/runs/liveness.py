"""Whether a run is being carried out: a record lock on a file in its directory, held to the end.

The kernel gives a POSIX record lock back when its process ends, however it ends, and no child inherits one;
a process number alone says little (in a container every run has number 1). Where the file system has no
locks, the kernel, the process and its start time are compared. From another machine, which locks may not
reach, nobody can say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LOCK = "run.lock"
_TRIES, _PAUSE_S = 5, 0.02  # whoever looks at a lock holds it for an instant
_held: dict[tuple[int, int], int] = {}  # lock files of this process: (device, inode) to process number


class HeldError(Exception):
    """Another run holds the lock."""


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory within the block; where the file system has none, hold nothing.

    Raises
    ------
    HeldError
        When another process, or this one, holds it.
    OSError
        When the file of the lock cannot be made.
    """
    path = directory / LOCK
    if _mine(path):  # closing the file again would give up the lock
        raise HeldError
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        _take(handle)
        found = os.fstat(handle)
        key = found.st_dev, found.st_ino
        _held[key] = os.getpid()
        try:
            yield
        finally:
            del _held[key]
    finally:
        os.close(handle)


def _take(handle: int) -> None:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            if not left:
                raise HeldError from None
            time.sleep(_PAUSE_S)
        except OSError:  # no locks here
            return


def fate(directory: Path, process: Mapping[str, Any]) -> str:
    """Return what became of a run whose last word was that it is running.

    Parameters
    ----------
    directory : Path
    process : mapping
        What `this_process` returned to the run; empty when it was stopped before it could say.

    Returns
    -------
    str
        running, killed or unknown.
    """
    locked = _locked(directory / LOCK)
    if locked:
        return "running"
    if not process:
        return "killed"
    here = this_process()
    if not here["boot"] or process.get("boot") != here["boot"]:
        known = process.get("host") == here["host"] and (here["boot"] or locked is not None)
        return "killed" if known else "unknown"
    if locked is None and process.get("namespace") != here["namespace"]:
        return "unknown"
    began = process.get("began") if locked is None else None
    return "running" if began and began == _began(process.get("pid")) else "killed"


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others: machine, kernel, process number, start time."""
    return {
        "host": platform.node(), "boot": _text("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(), "pid": os.getpid(), "began": _began("self"),
    }


def _locked(path: Path) -> bool | None:
    """Tell whether a process holds the lock; None where there is no lock to ask."""
    if _mine(path):
        return True
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return None
    finally:
        os.close(handle)


def _mine(path: Path) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    # a child has the table of its parent, not the lock
    return _held.get((found.st_dev, found.st_ino)) == os.getpid()


def _began(process: Any) -> str:
    """Return when a process began, in clock ticks since the machine did; empty when there is none."""
    fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
