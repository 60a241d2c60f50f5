"""Experts that have a place in memory, and those that pass through without one."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from poise_edgemoe.cache.policy import Key
from poise_edgemoe.store.reader import Request

STAGES = 2  # blobs that are read though there is no room to keep them


@dataclass
class Resident:
    """An expert that has its place, read or being read.

    Parameters
    ----------
    requests : list of Request
        The reading of its matrices.
    guessed : bool
        Whether it was read ahead, and nobody has asked for it yet.
    spare : bool
        Whether a failure of these reads is nobody's: they were made ahead, and are made again when needed.
    matrices : dict
        Part to (stored matrix, bias or None), views of the place, made when it is first used.
    told : object or None
        What C is told of them all (`layers.Told`).
    """

    key: Key
    place: mmap.mmap
    requests: list[Request]
    guessed: bool = False
    spare: bool = False
    matrices: dict[str, tuple[Any, Tensor | None]] = field(default_factory=dict)
    told: Any = None

    def request(self, part: str) -> Request:
        """Return the reading of a matrix."""
        return next(r for r in self.requests if part in r.matrices)

    def ready(self) -> bool:
        """Return whether all of it has been read, or has failed."""
        return self.told is not None or all(r.done.is_set() for r in self.requests)

    def forget(self) -> None:
        """Let go of what was made of its bytes."""
        self.matrices.clear()
        if self.told is not None:
            self.told.gone()
            self.told = None

    def settle(self) -> None:
        """Return when its memory is no longer written to, come what may."""
        for request in self.requests:
            request.wait_quietly()


class Stage:
    """Experts that pass through without being kept, read one ahead of the one in use.

    Parameters
    ----------
    read : callable
        Asks for an expert, to be read into a place.
    """

    def __init__(
        self, read: Callable[[Key, mmap.mmap], Resident], keys: list[Key], places: list[mmap.mmap]
    ) -> None:
        self.read, self.keys, self.places = read, keys, places
        self.at, self.held = -1, {}
        for n in range(min(STAGES, len(keys))):
            self.held[keys[n]] = read(keys[n], places[n])

    def reach(self, key: Key) -> Resident:
        """Return an expert; the one before it is gone, and the one after the next is asked for."""
        n = self.keys.index(key)
        if n > self.at:
            self.at = n
            if n >= 1 and (gone := self.held.pop(self.keys[n - 1], None)) is not None:
                gone.forget()
            if n >= 1 and n + 1 < len(self.keys):
                following = self.keys[n + 1]
                self.held[following] = self.read(following, self.places[(n + 1) % STAGES])
        return self.held[key]

    def end(self) -> None:
        """Wait for what is still being read: its memory is used again."""
        for held in self.held.values():
            held.settle()
            held.forget()
        self.held.clear()
