"""Factored tables: how much each expert that was used before raises the chance of one.

The paper's key is the set of experts of two layers; where a token uses more than one, there are too many
sets. Here each expert counts for itself: log P(e | e') / P(e), summed over experts e' of the layer before,
of the one before that, and of the same layer a token ago. Source: ours (after EdgeMoE section III-C1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise_edgemoe.predictors.past import Past, Tokens, replayed
from poise_edgemoe.predictors.tables import SMOOTHED, frequencies

SLOW = 0.1  # what the rate of late counts as at least, as a share of the usual one
SOURCES = 3  # one layer before, two, the same layer a token ago


class Factored:
    """Log ratios.

    Parameters
    ----------
    base : float array, (layers, experts)
        Log of the share of tokens that use an expert.
    ratios : float array, (sources, layers, experts, experts)
        [s, n, e', e] is log P(e of layer n | e' of source s) / P(e).
    """

    features = 3 + SOURCES

    def __init__(self, base: np.ndarray, ratios: np.ndarray) -> None:
        self.base, self.ratios = base, ratios

    def of(self, n: int, past: Past) -> np.ndarray:
        """Return what a chance is made of, (features, experts): 1, then logarithms of the share, of each
        source, and of how much more often than usual an expert was used of late."""
        sums = [self.ratios[s, n, list(used)].sum(0) for s, used in enumerate(past.before(n))]
        late = past.rate[n] / np.exp(self.base[n])
        return np.stack([np.ones_like(self.base[n]), self.base[n], *sums, np.log(late + SLOW)])


def factored(traces: Sequence[Tokens], layers: int, experts: int) -> Factored:
    """Count which experts follow which, smoothed towards those that follow any."""
    both = np.zeros((SOURCES, layers, experts, experts), dtype=np.float32)
    visits = np.zeros((SOURCES, layers, experts, 1), dtype=np.float32)
    for trace in traces:
        past = Past(layers, experts)
        for n, used in replayed(trace, past):
            for s, seen in enumerate(past.before(n)):
                both[s, n][np.ix_(seen, used)] += 1
                visits[s, n, list(seen)] += 1
    p = frequencies(traces, layers, experts).astype(np.float32)[:, None, :]
    return Factored(np.log(p[:, 0]), np.log((both + SMOOTHED * p) / (visits + SMOOTHED) / p))
