"""Fits predictors to recorded routing, and makes chances of what is counted.

Traces are gone through once, as an engine will go through its tokens: what is known before a layer runs is
put down beside what it then uses, and only then is it counted. So counts are never asked about what they
were made from. A logistic regression for each layer turns numbers into a score, and a curve that never
falls, the same for all layers, turns scores into chances.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from poise.errors import ConfigError, nearest
from poise_edgemoe.cache.traces import ByToken, RoutingTrace
from poise_edgemoe.predictors.blocks import Block
from poise_edgemoe.predictors.chances import Cases, alike_for, fitted, loss, rising
from poise_edgemoe.predictors.past import Past, Tokens, replayed, tokens_of_traces
from poise_edgemoe.predictors.routing import AHEAD, METHODS, ORDER, FromRouting, blocks_for
from poise_edgemoe.predictors.tables import PathTable

MOST_CASES = 400_000  # (tokens x layers x experts) that weights are fitted to
MOST_USED = 2  # experts of a token, for keys that are sets of them
FIRST = 4  # tokens of a trace that are no cases: nothing is known yet
SOON = 0.8  # weight of a use a token later, and so on


def fit(traces: Sequence[RoutingTrace], method: str = "auto", *, depth: int | None = None) -> FromRouting:
    """Return a predictor of the experts of layers to come.

    Parameters
    ----------
    traces : list of RoutingTrace
        Of one model; each is of tokens that follow one another.
    method : "auto", "table", "factored", "both", "lookahead", "combined" or "all"
        The paper's table over the experts of two layers; each expert for itself; both of these; the next
        router; it and each expert for itself; all of them. "auto" takes for each layer the one whose
        chances were better, of those that the traces have what is needed for (`RoutingTrace.looked`), and
        with the table only where a token uses at most `MOST_USED` experts: keys of more do not come again.
    depth : int, optional
        Layers ahead of which it speaks, 1 or 2; without 2, or 1 where only the next router is asked.

    Raises
    ------
    ConfigError
        For another method or depth; a method that looks into routers, and traces without that.
    DataError
        For no traces, those of different models, or too few tokens.
    """
    methods = _methods(method, traces)
    most = 1 if method == "lookahead" else AHEAD
    if depth is not None and (isinstance(depth, bool) or depth not in range(1, most + 1)):
        raise ConfigError(f"depth={depth!r} is not allowed: of method {method!r} it must be "
                          f"{' or '.join(map(str, range(1, most + 1)))}")
    tokens, layers, experts = tokens_of_traces(traces)
    k = _used(tokens, layers)
    if method == "auto" and k.max() > MOST_USED:
        methods = [m for m in methods if "path" not in METHODS[m]]
    blocks = blocks_for({name for m in methods for name in METHODS[m]}, k, experts)
    cases = _Cases(blocks, layers, experts, depth or most, tokens)
    for walked, trace in zip(tokens, traces):
        cases.walk(walked, trace.looked)
    ways = [_best(cases, ahead, methods) for ahead in range(depth or most)]
    kept = _needed(blocks, [m for way in ways for m in way[0]])
    model = next((t.model for t in traces if t.model is not None), None)
    return FromRouting(kept, [w[0] for w in ways], [w[1] for w in ways], [w[2] for w in ways],
                       alike_for(cases.again()), model)


def _methods(method: str, traces: Sequence[RoutingTrace]) -> list[str]:
    names = ["auto", *METHODS]
    if method not in names:
        raise ConfigError(f"method={method!r} is none of {', '.join(names)}{nearest(str(method), names)}")
    looks = bool(traces) and all(t.looked for t in traces)
    if method == "auto":
        return [m for m in METHODS if looks or "looked" not in METHODS[m]]
    if "looked" in METHODS[method] and not looks:
        raise ConfigError(f"method={method}: a trace has not recorded what the next router said; record "
                          f"one (poise moe fit STORE), or take table or factored")
    return [method]


def _used(tokens: Sequence[Tokens], layers: int) -> np.ndarray:
    """Return by layer how many experts a token uses."""
    sizes = np.array([[len(used) for used in token] for trace in tokens for token in trace])
    return sizes.sum(0) / np.maximum(1, (sizes > 0).sum(0))


def _needed(blocks: dict[str, Block], methods: Sequence[str]) -> dict[str, Block]:
    """Return the blocks that some method looks at; shares stand behind all."""
    names = {"usual", *(name for m in methods for name in METHODS[m])}
    if isinstance(table := blocks.get("path"), PathTable):
        table.often()
    return {name: blocks[name] for name in ORDER if name in names}


class _Cases:
    """What was known and what happened, by layers ahead and layer."""

    def __init__(
        self, blocks: dict[str, Block], layers: int, experts: int, depth: int, tokens: Sequence[Tokens]
    ) -> None:
        self.blocks, self.layers, self.experts = blocks, layers, experts
        self.every = -(-sum(map(len, tokens)) * layers * experts // MOST_CASES)
        self.x: list[list[list[np.ndarray]]] = [[[] for _ in range(layers)] for _ in range(depth)]
        self.y: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self.soon: list[list[np.ndarray]] = [[] for _ in range(layers)]
        self.columns = {name: slice(a, b) for name, (a, b) in zip(blocks, pairwise(
            np.cumsum([1, *(block.features for block in blocks.values())]).tolist()))}

    def walk(self, tokens: Tokens, looked: ByToken) -> None:
        """Go through one trace."""
        past, first = Past(self.layers, self.experts), min(FIRST, len(tokens) - 1)
        later = _later(tokens, self.layers, self.experts)
        ahead_of = len(tokens) - len(looked)  # tokens of the prompt, of which no router was asked
        for at, (n, used) in enumerate(replayed(tokens, past)):
            t = at // self.layers
            if not used:  # the last layer of a prompt needs its last token only
                continue
            if "looked" in self.blocks and t >= ahead_of:
                self.blocks["looked"].ranks[n] = [list(looked[t - ahead_of][n])]  # type: ignore[attr-defined]
            if t >= first and t % self.every == 0:
                self._put(n, used, past)
                self.soon[n].append(later[t, n])
            for block in self.blocks.values():
                block.learn(n, used, past)

    def _put(self, n: int, used: list[int], past: Past) -> None:
        for ahead, x in enumerate(self.x, 1):
            said = [np.ones((1, self.experts)), *(b.of(n, past, ahead) for b in self.blocks.values())]
            x[n].append(np.concatenate(said).astype(np.float32))
        self.y[n].append(np.isin(np.arange(self.experts), used))

    def of(self, ahead: int, names: Sequence[str]) -> list[Cases]:
        """Return cases by layer, of some blocks."""
        columns = np.concatenate([[0], *(np.arange(99)[self.columns[name]] for name in names)])
        return [self._case(self.x[ahead][n], self.y[n], columns) for n in range(self.layers)]

    def again(self) -> list[Cases]:
        """Return cases by layer of who is used soon."""
        columns = np.arange(self.columns["usual"].stop)
        return [self._case(self.x[0][n], self.soon[n], columns) for n in range(self.layers)]

    def _case(self, x: list[np.ndarray], y: list[np.ndarray], columns: np.ndarray) -> Cases:
        if not x:
            return np.zeros((0, len(columns))), np.zeros(0)
        return np.concatenate(x, 1)[columns].T.astype(float), np.concatenate(y).astype(float)


def _later(tokens: Tokens, layers: int, experts: int) -> np.ndarray:
    """Return uses of every expert from a token on, later ones counting less: a weighted mean, (t, n, e)."""
    found = np.zeros((len(tokens), layers, experts), dtype=np.float32)
    uses, weight = np.zeros((layers, experts)), 0.0
    for t in range(len(tokens) - 1, -1, -1):
        uses, weight = SOON * uses, 1 + SOON * weight
        for n, used in enumerate(tokens[t]):
            uses[n, used] += 1
        found[t] = uses / weight
    return found


def _best(cases: _Cases, ahead: int, methods: Sequence[str]) -> tuple[list[str], list[np.ndarray], Any]:
    """Return by layer the method with the least surprise, its weights; and the curve."""
    ways = []
    for m in methods:
        if ahead and m == "lookahead":
            continue  # which knows the next layer only
        own = cases.of(ahead, METHODS[m])
        # a weight more has to be worth a nat (Akaike)
        ways.append([(loss(x, y, w) + len(w), m, w, x @ w, y) for (x, y), w in zip(own, fitted(own))])
    best = [min(of_layer, key=lambda way: way[0]) for of_layer in zip(*ways)]
    curve = rising(np.concatenate([way[3] for way in best]), np.concatenate([way[4] for way in best]))
    return [way[1] for way in best], [way[2] for way in best], curve
