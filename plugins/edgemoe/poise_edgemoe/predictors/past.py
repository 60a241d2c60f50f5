"""What layers have used so far: all that a predictor from routing alone knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from poise.errors import DataError
from poise_edgemoe.cache.traces import RoutingTrace, tokens_of

HALF_LIVES = (1, 4, 16, 64)  # tokens, of rates of use of late
KEPT = 0.5 ** (1 / np.array(HALF_LIVES))[:, None]
BEFORE = 3  # layers that are looked back on

Tokens = list[list[list[int]]]  # by token and layer, experts in ascending order


class Past:
    """Routing up to now, token after token, layer after layer.

    Attributes
    ----------
    used : list of tuple of int
        By layer, the experts of its last token, ascending.
    rate : float array, (layers, half-lives, experts)
        How often each was used of late, per token, as an exponential average: a use counts at once.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.used: list[tuple[int, ...]] = [()] * layers
        self.rate = np.zeros((layers, len(HALF_LIVES), experts))

    def before(self, n: int, ahead: int = 1) -> list[tuple[int, ...]]:
        """Return what 1 to `BEFORE` layers before layer n have used, and layer n itself a token ago.

        Before the first layers of a token run the last ones of the token before.

        Parameters
        ----------
        ahead : int
            How many layers after the one that runs n is: of layers between them nothing is known.
        """
        layers = len(self.used)
        known = [self.used[(n - back) % layers] if back >= ahead else () for back in range(1, BEFORE + 1)]
        return [*known, self.used[n]]

    def note(self, n: int, experts: Sequence[int]) -> None:
        """Say what layer n uses."""
        self.used[n] = tuple(sorted(experts))
        rate = self.rate[n]
        rate[:, list(experts)] += 1 - KEPT
        rate *= KEPT


def tokens_of_traces(traces: Sequence[RoutingTrace]) -> tuple[list[Tokens], int, int]:
    """Return the tokens of each trace, those of the prompt first, layers and experts.

    Raises
    ------
    DataError
        For no traces, traces of different models, or none with two tokens.
    """
    shapes = sorted({(t.layers, t.experts) for t in traces})
    if len(shapes) != 1:
        said = ", ".join(f"{layers} layers of {experts} experts" for layers, experts in shapes)
        raise DataError(f"traces are of {said or 'nothing'}: give traces of one model")
    if len({t.model for t in traces} - {None}) > 1:
        raise DataError("traces are of models with different routers: give traces of one model")
    found = [[list(map(list, token)) for token in t.prompt_tokens] + tokens_of(t.decode, t.layers)
             for t in traces]
    if max(map(len, found)) < 2:
        raise DataError("no trace has two tokens: nothing can be learned of what follows what")
    return found, *shapes[0]


def replayed(tokens: Tokens, past: Past) -> Iterator[tuple[int, list[int]]]:
    """Yield layer and experts of every token, before `past` knows of them."""
    for token in tokens:
        for n, experts in enumerate(token):
            yield n, experts
            past.note(n, experts)
