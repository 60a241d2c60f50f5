"""Belady's optimum: what no policy can beat, since it knows the future."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise_edgemoe.cache.policy import Key, Policy

NEVER = np.iinfo(np.int64).max


class Belady(Policy):
    """The one whose next use is farthest goes first; every expert that is asked for is kept (no bypass).

    `future` is the whole sequence of uses, which must come in this order. Optimal for experts of one size
    when nothing is pinned.
    """

    name = "belady"

    def __init__(self, layers: int, experts: int, future: Sequence[Key]):
        super().__init__(layers, experts)
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

    def scores(self) -> np.ndarray:
        return self._next
