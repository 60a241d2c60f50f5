"""The paper's table over activation paths: what followed the experts of the two layers before.

Source: EdgeMoE section III-C1. Keys that were never seen, and the first layers of a token, are ours: back
to one layer and to none; before a token's first layer run the last ones of the token before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise_edgemoe.predictors.past import Past, Tokens, replayed

SMOOTHED = 4.0  # visits that a shorter key counts as
MOST_KEYS = 65_536  # of two layers, the most visited ones
LEAST = 1e-4  # of a probability whose logarithm is taken

Experts = tuple[int, ...]
Counts = dict[tuple[int, Experts, Experts], tuple[int, np.ndarray]]


class PathTable:
    """Probabilities by what the two layers before have used.

    Parameters
    ----------
    none : float array, (layers, experts)
        Share of tokens that use an expert, smoothed.
    one, two : dict
        (layer, experts of the layer before, of the one before that) to (visits, counts (experts,)); `one`
        has () for the latter.
    """

    features = 2

    def __init__(self, none: np.ndarray, one: Counts, two: Counts) -> None:
        self.none, self.one, self.two = none, one, two

    def inclusion(self, n: int, first: Experts, second: Experts) -> np.ndarray:
        """Return the probability that each expert of layer n is used, (experts,); they sum to k."""
        p = _backed(self.one.get((n, first, ())), self.none[n])
        return _backed(self.two.get((n, first, second)), p)

    def of(self, n: int, past: Past) -> np.ndarray:
        """Return what a probability is made of, (features, experts): 1 and a logarithm."""
        first, second, _ = past.before(n)
        p = self.inclusion(n, first, second)
        return np.stack([np.ones_like(p), np.log(np.maximum(p, LEAST))])


def _backed(found: tuple[int, np.ndarray] | None, less: np.ndarray) -> np.ndarray:
    if found is None:
        return less
    visits, counts = found
    return (counts + SMOOTHED * less) / (visits + SMOOTHED)


def frequencies(traces: Sequence[Tokens], layers: int, experts: int) -> np.ndarray:
    """Return the share of tokens that use each expert, (layers, experts), smoothed towards all alike."""
    counts, tokens = np.zeros((layers, experts)), sum(map(len, traces))
    for trace in traces:
        for n, used in replayed(trace, Past(layers, experts)):
            counts[n, used] += 1
    k = counts.sum(1, keepdims=True) / max(1, tokens)
    return (counts + SMOOTHED * k / experts) / (tokens + SMOOTHED)


def path_table(traces: Sequence[Tokens], layers: int, experts: int) -> PathTable:
    """Count what follows every key, but at the beginning of a trace, where none is known."""
    one: Counts = {}
    two: Counts = {}
    for trace in traces:
        past = Past(layers, experts)
        for n, used in replayed(trace, past):
            first, second, _ = past.before(n)
            for table, key in ((one, (n, first, ())), (two, (n, first, second))):
                visits, counts = table.get(key, (0, None))
                counts = np.zeros(experts, dtype=np.int32) if counts is None else counts
                counts[used] += 1
                table[key] = visits + 1, counts
    kept = sorted(two, key=lambda key: -two[key][0])[:MOST_KEYS]
    return PathTable(frequencies(traces, layers, experts), one, {key: two[key] for key in kept})
