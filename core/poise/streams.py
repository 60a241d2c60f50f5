"""The standard streams of a process: open, able to hold every character, and never in the way of the work.

What goes to stderr is a courtesy: where it cannot be written, it is left out. What goes to stdout was asked
for: a reader that leaves early is no error, a full disk is one.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Any

from poise.errors import FileError

_SPELLED = {"±": "+-", "×": "x", "…": "...", "–": "-", "─": "-"}
_names = ("stdin", "stdout", "stderr")


class _Stream(io.FileIO):
    """A file that fails once at most: what comes after a failure is dropped."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.name, self.broken = _names[number], False

    def write(self, data: Any, /) -> int:
        if not self.broken:
            try:
                return super().write(data)
            except OSError as error:
                self.broken = True
                if self.name == "stdout" and not isinstance(error, BrokenPipeError):
                    raise FileError(f"cannot write to stdout: {error.strerror}") from None
        return len(data)


def fit_streams() -> None:
    """Replace this process's own stdout and stderr, unless somebody else has; twice is as good as once."""
    codecs.register_error("poise.spelled", _spell)
    for number in range(len(_names)):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        own = getattr(sys, f"__{_names[number]}__")
        if getattr(sys, _names[number]) is own:
            setattr(sys, _names[number], _fit(number, own))


def _fit(number: int, own: Any) -> io.TextIOWrapper:
    if own is not None:
        own.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(number)), encoding=getattr(own, "encoding", "utf-8"),
        errors="poise.spelled", line_buffering=number == 2 or os.isatty(number),
    )


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Write a character that the encoding lacks in other ones."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end
