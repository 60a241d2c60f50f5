"""The paper's table over activation paths: what followed the experts of the two layers before.

Source: EdgeMoE section III-C1. Keys that were never seen, and the first layers of a token, are ours: back
to one layer and to none; before a token's first layer run the last ones of the token before.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from poise_edgemoe.predictors.blocks import SMOOTHED, Usual
from poise_edgemoe.predictors.past import Past

MOST_KEYS = 65_536  # are taken up
LEAST = 1e-4  # of a probability whose logarithm is taken
AHEAD = 2  # layers, of which each has keys of its own

Experts = tuple[int, ...]
Key = tuple[int, int, Experts, Experts]


class PathTable:
    """Probabilities by what two layers before have used.

    Attributes
    ----------
    counts : dict
        (layers ahead, layer, experts of the last known layer, of the one before it) to
        [visits, counts (experts,)]; with () for the latter: whatever that one has used.
    most : int
        Keys beyond which none is taken up.
    """

    features: ClassVar[int] = 1

    def __init__(self, usual: Usual) -> None:
        self.usual = usual
        self.experts = usual.counts.shape[1]
        self.counts: dict[Key, list] = {}
        self.most = MOST_KEYS

    def often(self) -> None:
        """Forget keys that came once: they say little, and most are such where many experts are used."""
        self.counts = {key: seen for key, seen in self.counts.items() if seen[0] > 1}

    def inclusion(self, n: int, first: Experts, second: Experts, ahead: int = 1) -> np.ndarray:
        """Return the probability that each expert of layer n is used, (experts,); they sum to k."""
        p = self._backed((ahead, n, first, ()), self.usual.share(n))
        return self._backed((ahead, n, first, second), p)

    def _backed(self, key: Key, less: np.ndarray) -> np.ndarray:
        if (found := self.counts.get(key)) is None:
            return less
        return (found[1] + SMOOTHED * less) / (found[0] + SMOOTHED)

    def of(self, n: int, past: Past, ahead: int) -> np.ndarray:
        first, second = past.before(n)[ahead - 1: ahead + 1]
        return np.log(np.maximum(self.inclusion(n, first, second, ahead), LEAST))[None]

    def learn(self, n: int, experts: list[int], past: Past) -> None:
        before = past.before(n)
        for ahead in range(1, AHEAD + 1):
            first, second = before[ahead - 1: ahead + 1]
            if not first:  # the beginning of a trace
                continue
            for key in dict.fromkeys(((ahead, n, first, ()), (ahead, n, first, second))):
                if key not in self.counts and len(self.counts) >= self.most:
                    continue
                seen = self.counts.setdefault(key, [0, np.zeros(self.experts, dtype=np.int32)])
                seen[0] += 1
                seen[1][experts] += 1

    def tensors(self) -> dict[str, np.ndarray]:
        width = max((len(one) for *_, a, b in self.counts for one in (a, b)), default=0)
        keys = np.full((len(self.counts), 2 + 2 * width), -1, dtype=np.int32)
        for row, (ahead, n, first, second) in zip(keys, self.counts):
            row[:2] = ahead, n
            row[2: 2 + len(first)] = first
            row[2 + width: 2 + width + len(second)] = second
        values = list(self.counts.values())
        return {"keys": keys, "visits": np.array([v for v, _ in values], dtype=np.int32),
                "counts": np.array([c for _, c in values], np.int32).reshape(-1, self.experts)}

    def read(self, tensors: dict[str, np.ndarray]) -> None:
        keys, middle = tensors["keys"], 1 + tensors["keys"].shape[1] // 2
        self.counts = {}
        for row, visits, counts in zip(keys.tolist(), tensors["visits"].tolist(), tensors["counts"]):
            first, second = (tuple(e for e in part if e >= 0) for part in (row[2:middle], row[middle:]))
            self.counts[row[0], row[1], first, second] = [visits, counts.copy()]
