"""Evicts who is least likely to be used soon, as a predictor says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise_edgemoe.cache.policies import ByWait
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.predictors.blocks import Usual
from poise_edgemoe.predictors.chances import sigmoid
from poise_edgemoe.predictors.past import KEPT


class Predicted(ByWait):
    """The longest expected time to the next use goes first; see `ByWait`.

    p is the chance that an expert is used in a token soon, from how often it was used of all tokens and of
    late, on several scales of time. It goes on counting.

    Parameters
    ----------
    usual : Usual
        What was counted so far.
    again : float array
        Weights of 1 and its numbers.
    """

    name = "predicted"
    floor = 1e-6

    def __init__(self, usual: Usual, again: np.ndarray) -> None:
        layers, experts = usual.counts.shape
        super().__init__(layers, experts)
        self._usual, self._again = usual.copy(), again
        self._rate = np.zeros((self.layers, len(KEPT), self.experts))
        self._ran = np.zeros(self.layers, dtype=bool)  # in this token
        self._old = np.ones(self.layers, dtype=bool)  # whose waits are not those of the rates

    def used(self, key: Key) -> None:
        super().used(key)
        self._count(key[0], [key[1]])

    def used_together(self, layer: int, experts: Sequence[int]) -> None:
        for e in experts:
            super().used((layer, e))
        self._count(layer, list(experts))

    def _count(self, n: int, experts: list[int]) -> None:
        uses = np.bincount(experts, minlength=self.experts)  # one that is named twice was used twice
        self._rate[n] += (1 - KEPT) * uses
        self._usual.counts[n] += uses
        self._ran[n] = self._old[n] = True

    def next_token(self) -> None:
        super().next_token()
        self._rate *= KEPT
        self._usual.tokens += self._ran
        self._ran[:], self._old[:] = False, True

    def _settle(self) -> None:
        if len(old := np.flatnonzero(self._old)):
            numbers = self._usual.numbers(old, self._rate[old])
            self._wait[old] = self._waits(sigmoid(self._again[0] + self._again[1:] @ numbers))
            self._old[:] = False
