"""What all tests share: property tests are the same every time and are never failed by the clock."""

from __future__ import annotations

import signal
import threading

from hypothesis import settings

settings.register_profile("poise", deadline=None, derandomize=True, database=None)
settings.load_profile("poise")


def pytest_sessionstart() -> None:
    """Let signals do what they do at a terminal: a job in the background inherits that they are ignored."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
