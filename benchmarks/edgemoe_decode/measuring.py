"""What a process takes, and the limit it is put under. Standard library: peers have their own Python."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent


@dataclass
class Counters:
    """What the process has taken so far: seconds, those of all threads, bytes from the block layer."""

    wall: float
    cpu: float
    read: int

    @classmethod
    def now(cls) -> Counters:
        used = resource.getrusage(resource.RUSAGE_SELF)
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return cls(time.perf_counter(), used.ru_utime + used.ru_stime, int(lines["read_bytes"]))

    def since(self, before: Counters) -> Counters:
        return Counters(self.wall - before.wall, self.cpu - before.cpu, self.read - before.read)


def decode(begin: Callable[[], Any], feed: Callable[[int], Any], tokens: Sequence[int]) -> dict[str, Any]:
    """Compute a prompt, then feed tokens one by one; return what each part took.

    Every engine is fed the same tokens, whatever it would have said: random weights go round in circles,
    and a circle needs the same few experts again and again.
    """
    started = Counters.now()
    begin()
    prompt = Counters.now()
    each = []
    for token in tokens:
        before = time.perf_counter()
        feed(token)
        each.append(time.perf_counter() - before)
    first, made = prompt.since(started), Counters.now().since(prompt)
    n = len(tokens)
    return {
        "prompt_seconds": first.wall, "prompt_cpu_seconds": first.cpu, "prompt_read_mb": first.read / 1e6,
        "tokens_per_second": n / made.wall, "cpu_ms": 1e3 * made.cpu / n, "read_mb": made.read / n / 1e6,
        "slowest_ms": 1e3 * max(each), "peak_mb": status("VmHWM") / 1e6,
    }


def status(name: str) -> int:
    """Return what the system says of this process in bytes: VmRSS, VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


# ------------------------------------------------------------------ a group whose memory is limited


def held(group: str) -> int:
    """Return what libraries hold in a group: memory, code that is mapped, what the kernel keeps of both."""
    stat = dict(line.split() for line in Path(group, "memory.stat").read_text().splitlines())
    if _old(group):
        kernel = int(Path(group, "memory.kmem.usage_in_bytes").read_text())
        return int(stat["rss"]) + int(stat["mapped_file"]) + kernel
    return int(stat["anon"]) + int(stat["file_mapped"]) + int(stat["kernel"])


def limit(group: str, size: int) -> None:
    """Let a group hold that many bytes, page cache included; more ends its process."""
    Path(group, "memory.limit_in_bytes" if _old(group) else "memory.max").write_text(str(size))


def _old(group: str) -> bool:
    return Path(group, "memory.limit_in_bytes").exists()


@contextlib.contextmanager
def control_group() -> Iterator[str | None]:
    """Make a control group beneath our own whose memory can be limited; None where there can be none."""
    folder = _own_group()
    made = folder / f"poise-{os.getpid()}" if folder is not None else None
    try:
        if made is not None:
            made.mkdir()
            limit(str(made), 1 << 40)
    except OSError:
        with contextlib.suppress(OSError):
            made.rmdir()  # type: ignore[union-attr]
        made = None
    try:
        yield None if made is None else str(made)
    finally:
        if made is not None:
            made.rmdir()


def _own_group() -> Path | None:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return Path("/sys/fs/cgroup/memory" + path)
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").is_file():
            return Path("/sys/fs/cgroup" + path)
    return None


def forget(folder: Path, everything: bool) -> None:
    """Take files out of the page cache; everything: all of the system's, where that is allowed."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # what is not written yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    if everything:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")


def given() -> dict[str, Any]:
    """Return what a worker was asked for."""
    return json.loads(sys.argv[1])


def say(row: dict[str, Any]) -> None:
    """Print a worker's row: the last line of what it says."""
    print(json.dumps(row), flush=True)
