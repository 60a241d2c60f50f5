"""Belady's optimum: what no policy can beat, since it knows the future."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from poise_edgemoe.cache.policy import Key, Policy

NEVER = np.iinfo(np.int64).max


class Belady(Policy):
    """The one whose next use is farthest goes first.

    `future` is the whole sequence of uses, which must come in this order. Optimal for experts of one size
    when nothing is pinned: among policies that keep every expert that is asked for, or with `bypass` among
    all, those that let some pass through included.
    """

    name = "belady"

    def __init__(self, layers: int, experts: int, future: Sequence[Key], bypass: bool = False):
        super().__init__(layers, experts)
        self.bypass = bypass
        following, self._after = {}, np.empty(len(future), dtype=np.int64)
        for at in range(len(future) - 1, -1, -1):
            self._after[at] = following.get(future[at], NEVER)
            following[future[at]] = at
        self._next = np.zeros((layers, experts), dtype=np.int64)
        self._at = 0

    def used(self, key: Key) -> None:
        super().used(key)
        self._next[key] = self._after[self._at]
        self._at += 1

    def victim(self, key: Key, pinned: Iterable[Key] = ()) -> Key | None:
        """Return who should leave; with `bypass` nobody where all others are used before `key` is."""
        gone = super().victim(key, pinned)
        if self.bypass and gone is not None and self._next[gone] <= self._next[key]:
            return None
        return gone

    def scores(self) -> np.ndarray:
        return self._next
