"""What layers have used so far: all that a predictor from routing alone knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from poise.errors import DataError
from poise_edgemoe.cache.traces import RoutingTrace, tokens_of

HALF_LIFE = 16  # tokens, of the rate of use of late
KEPT = 0.5 ** (1 / HALF_LIFE)

Tokens = list[list[list[int]]]  # by token and layer, experts in ascending order


class Past:
    """Routing up to now, token after token, layer after layer.

    Attributes
    ----------
    used : list of tuple of int
        By layer, the experts of its last token, ascending.
    rate : float array, (layers, experts)
        How often each was used of late, per token.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.used: list[tuple[int, ...]] = [()] * layers
        self.rate = np.zeros((layers, experts))

    def before(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return what was used one and two layers before layer n, and by layer n a token ago.

        Before the first layers of a token run the last ones of the token before.
        """
        layers = len(self.used)
        return self.used[(n - 1) % layers], self.used[(n - 2) % layers], self.used[n]

    def note(self, n: int, experts: Sequence[int]) -> None:
        """Say what layer n uses."""
        self.used[n] = tuple(sorted(experts))
        rate = self.rate[n]
        rate[list(experts)] += 1 - KEPT
        rate *= KEPT


def tokens_of_traces(traces: Sequence[RoutingTrace]) -> tuple[list[Tokens], int, int]:
    """Return decoded tokens of each trace, layers and experts.

    Raises
    ------
    DataError
        For no traces, traces of different models, or none with two tokens.
    """
    shapes = sorted({(t.layers, t.experts) for t in traces})
    if len(shapes) != 1:
        said = ", ".join(f"{layers} layers of {experts} experts" for layers, experts in shapes)
        raise DataError(f"traces are of {said or 'nothing'}: give traces of one model")
    found = [tokens_of(t.decode, t.layers) for t in traces]
    if max(map(len, found)) < 2:
        raise DataError("no trace has two decoded tokens: nothing can be learned of what follows what")
    return found, *shapes[0]


def replayed(tokens: Tokens, past: Past) -> Iterator[tuple[int, list[int]]]:
    """Yield layer and experts of every token, before `past` knows of them."""
    for token in tokens:
        for n, experts in enumerate(token):
            yield n, experts
            past.note(n, experts)
