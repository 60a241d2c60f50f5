"""What every eviction policy shares: who is resident, who was used when, and how the victim is found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from poise.errors import ConfigError

Key = tuple[int, int]  # (MoE layer, expert)
MOST_EXPERTS = 1 << 22  # layers x experts: a policy holds a few arrays of that size


def leaves(
    scores: np.ndarray, resident: np.ndarray, last: np.ndarray, among: range, pinned: Sequence[int]
) -> int | None:
    """Return whose score is the largest; of equal ones who was used the longest ago, then the first.

    Parameters
    ----------
    scores, resident, last : array, (layers, experts)
        `last` is the time of the last use.
    among : range
        Of positions in those arrays, which `pinned` names too: nobody who is pinned leaves.
    """
    ranked = np.where(resident, scores, -np.inf).reshape(-1)
    ranked[pinned] = -np.inf
    ranked = ranked[among.start: among.stop]
    best = ranked.max()
    if best == -np.inf:
        return None
    equal = np.flatnonzero(ranked == best) + among.start
    return int(equal[last.reshape(-1)[equal].argmin()])


class Policy:
    """Chooses who leaves a cache of experts. It knows no slots and no bytes: its owner keeps those.

    The owner calls `used` for every expert that a layer asks for, resident or not; `added` and
    `removed` when an expert takes or leaves its place; `next_token` once between two tokens, of which
    a prompt is one; and `victim` until there is room. For a layer with experts A:

        for key in A:
            policy.used(key)
            if key not in resident:
                while not room:                             # slots, or bytes
                    gone = policy.victim(key, pinned=A)     # None: no room can be made, stream the expert
                    policy.removed(gone)
                policy.added(key)                           # when its place is taken, before it is read

    With A pinned it makes no difference whether all of A is used first. An expert may also be added
    ahead of its use (prefetch).

    A policy says `scores`: the resident with the largest leaves first; of equal ones the least
    recently used, then the one of the lower layer, then of the lower index. Unequal sizes are ranked
    alike: a miss counts, not its bytes.
    """

    name: ClassVar[str]
    layered: ClassVar[bool] = False  # whether the layer of an expert matters
    per_layer: ClassVar[bool] = False  # whether each layer has an equal share of the cache to itself

    def __init__(self, layers: int, experts: int):
        """Start with an empty cache for `layers` MoE layers of `experts` experts.

        Raises
        ------
        ConfigError
            When a number is below 1, or their product beyond `MOST_EXPERTS`.
        """
        if layers < 1 or experts < 1 or layers * experts > MOST_EXPERTS:
            raise ConfigError(
                f"layers={layers}, experts={experts}: from 1, at most {MOST_EXPERTS} experts in all"
            )
        self.layers, self.experts = layers, experts
        self.served = False  # whether an engine has it: it is told of one cache only
        self.search = leaves  # who leaves, given scores; an engine has a faster one
        self.layer = 0  # the one that runs: of the last use
        self._resident = np.zeros((layers, experts), dtype=bool)
        self._last = np.zeros((layers, experts), dtype=np.int64)  # time of the last use
        self._time = 0
        self._began = 0  # when the current layer did

    def used(self, key: Key) -> None:
        """Note that the layer that runs asks for `key`, resident or not."""
        if key[0] != self.layer:
            self.layer, self._began = key[0], self._time
        self._stamp(key)

    def used_together(self, layer: int, experts: Sequence[int]) -> None:
        """Note that a layer asks for some experts, one after the other."""
        for e in experts:
            self.used((layer, e))

    def added(self, key: Key) -> None:
        """Note that `key` is resident; one that the current layer did not ask for counts as used now."""
        self._resident[key] = True
        if self._last[key] <= self._began:
            self._stamp(key)

    def removed(self, key: Key) -> None:
        """Note that `key` is resident no more."""
        self._resident[key] = False

    def next_token(self) -> None:
        """Note that a token, or the prompt as a whole, is over."""
        self._began = self._time

    def resident(self) -> list[Key]:
        """Return who is resident, by layer and index."""
        return [(int(i), int(j)) for i, j in np.argwhere(self._resident)]

    def victim(self, key: Key, pinned: Iterable[Key] = ()) -> Key | None:
        """Return who should leave for `key`, never one of `pinned`; None when nobody may."""
        n = self.experts
        scores = self.scores()
        if scores.shape != self._resident.shape:
            scores = np.broadcast_to(scores, self._resident.shape)
        among = range(key[0] * n, (key[0] + 1) * n) if self.per_layer else range(self.layers * n)
        found = self.search(scores, self._resident, self._last, among, [i * n + j for i, j in pinned])
        return None if found is None else divmod(found, n)

    def yields(self, gone: Key, key: Key, chance: float) -> bool:
        """Return whether an expert that would leave is less likely to be used than a guess.

        A policy that knows no probabilities says yes: whom it would give away for an expert that is
        needed, it gives away for a guess.

        Parameters
        ----------
        gone : (int, int)
            Its victim.
        key : (int, int)
            The guess.
        chance : float
            That the guess is used when its layer runs.
        """
        return True

    def scores(self) -> np.ndarray:
        """Return every expert's score, (layers, experts) or (layers, 1): the largest leaves first."""
        raise NotImplementedError

    def _stamp(self, key: Key) -> None:
        self._time += 1
        self._last[key] = self._time
