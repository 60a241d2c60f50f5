"""Progress: a rich bar on a terminal, a plain line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

LINE_EVERY_S = 2.0


def progress(total: int | None, label: str, quiet: bool = False) -> Any:
    """Return a context manager with `advance(n=1, note="")`."""
    if quiet:
        return _Silent()
    return _Bar(total, label) if sys.stderr.isatty() else _Lines(total, label)


@contextmanager
def parts(label: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of parts that are done, from 0 to all, and all: it shows how far something is.

    What shows it is there until all are done, and anew for what comes after.
    """
    with ExitStack() as shown:
        bar, before = None, 0

        def tell(done: int, of: int) -> None:
            nonlocal bar, before
            bar = bar or shown.enter_context(progress(of, label, quiet))
            if done > before:
                bar.advance(done - before)
            before = done
            if done == of:
                bar, before = None, 0
                shown.close()

        yield tell


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, n: int = 1, note: str = "") -> None:
        pass


class _Lines(_Silent):
    def __init__(self, total: int | None, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self.started = self.printed = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY_S:
            self.printed = now
            of = f"/{self.total}" if self.total else ""
            left = ""
            if self.total:
                seconds = (now - self.started) / self.done * (self.total - self.done)
                left = f", about {seconds:.0f} s left"
            print(f"{self.label}: {self.done}{of}{left} {note}".rstrip(), file=sys.stderr, flush=True)


class _Bar(_Silent):
    def __init__(self, total: int | None, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining(),
            TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
        )
        self.task = self.bar.add_task(label, total=total, note="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.bar.update(self.task, advance=n, note=note)
