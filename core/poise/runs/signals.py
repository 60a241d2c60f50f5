"""Being asked to stop: by Ctrl-C, by whoever administers the machine, by a terminal that closes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def handled(by: Callable[[int, Any], Any] | int, numbers: tuple[int, ...] = ALL) -> Iterator[None]:
    """Handle signals within the block, but those that the process was started to ignore (nohup)."""
    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, by)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Return a context in which SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does."""
    return handled(_interrupt, (signal.SIGTERM, signal.SIGHUP))


def undisturbed() -> contextlib.AbstractContextManager[None]:
    """Return a context in which nothing interrupts: for last words."""
    return handled(signal.SIG_IGN)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")
