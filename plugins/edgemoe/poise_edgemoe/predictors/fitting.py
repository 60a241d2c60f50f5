"""Fits predictors to recorded routing, and makes probabilities of their scores.

A logistic regression for each layer turns what tables say into a score, and a curve that never falls, the
same for all layers, turns scores into chances. Both are fitted on tokens that the tables have not seen:
counts are sure of what they were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from poise.errors import ConfigError, nearest
from poise_edgemoe.cache.traces import RoutingTrace
from poise_edgemoe.predictors.factored import factored
from poise_edgemoe.predictors.past import Past, Tokens, replayed, tokens_of_traces
from poise_edgemoe.predictors.tables import path_table

if TYPE_CHECKING:
    from poise_edgemoe.prefetch import Seen

METHODS = {"table": path_table, "factored": factored}
LEAST = 0.05  # chance of an expert that is spoken of
RIDGE = 10.0  # in cases: how far a layer's weights are held to those of all layers
GROUPS = 400  # of cases, of which a curve is made
STEPS = 30  # of Newton's method, at most


class Scorer(Protocol):
    """Says what the chances of a layer's experts are made of."""

    features: int

    def of(self, n: int, past: Past) -> np.ndarray:
        """Return numbers, (features, experts)."""
        ...


class FromRouting:
    """Predicts from routing alone; a source for `Engine.open(prefetch=...)`.

    Parameters
    ----------
    scorers : list of Scorer
        By layer.
    weights : list of float array, (features,)
        Of each layer's scorer.
    curve : pair of float array, (knots,)
        Scores, rising, and the chances that they mean.
    """

    def __init__(
        self, scorers: Sequence[Scorer], weights: Sequence[np.ndarray],
        curve: tuple[np.ndarray, np.ndarray], experts: int,
    ) -> None:
        self.scorers, self.weights, self.curve, self.experts = list(scorers), list(weights), curve, experts
        self.past = Past(len(self.scorers), experts)

    def chances(self, n: int, past: Past) -> np.ndarray:
        """Return the chance that each expert of layer n is used next, (experts,)."""
        return np.interp(self.weights[n] @ self.scorers[n].of(n, past), *self.curve)

    def candidates(self, layer: int, seen: Seen) -> Iterable[tuple[int, float]]:
        """Return experts that have some chance, each with it."""
        self.past.note(seen.layer, seen.experts)
        chances = self.chances(layer, self.past)
        return [(int(e), float(chances[e])) for e in np.flatnonzero(chances >= LEAST)]


def fit(
    traces: Sequence[RoutingTrace], method: str = "auto", *, held_out: float = 0.3
) -> FromRouting:
    """Return a predictor of the next layer's experts.

    Parameters
    ----------
    traces : list of RoutingTrace
        Of one model; each is of tokens that follow one another.
    method : "auto", "table" or "factored"
        The paper's table over the experts of two layers; or each expert for itself; "auto" takes for each
        layer the one whose chances are better on what is held out.
    held_out : float
        Share of each trace, its end, that tables are not made from, to fit chances.

    Raises
    ------
    ConfigError
        For another method, or a share that leaves nothing.
    DataError
        For no traces, those of different models, or too few tokens.
    """
    if method != "auto" and method not in METHODS:
        names = ["auto", *METHODS]
        raise ConfigError(f"method={method!r} is none of {', '.join(names)}{nearest(method, names)}")
    if not isinstance(held_out, float) or not 0 < held_out < 1:
        raise ConfigError(f"held_out={held_out!r} is not allowed: it must be a share between 0 and 1")
    tokens, layers, experts = tokens_of_traces(traces)
    cut = [max(1, round(len(t) * (1 - held_out))) for t in tokens]
    found = []
    for name in METHODS if method == "auto" else (method,):
        early = METHODS[name]([t[:c] for t, c in zip(tokens, cut)], layers, experts)
        cases = _cases(early, tokens, cut, layers, experts)
        weights = fitted(cases)
        whole = METHODS[name](tokens, layers, experts)
        found.append([(_loss(*cases[n], weights[n]), whole, weights[n], cases[n]) for n in range(layers)])
    best = [min(ways, key=lambda way: way[0]) for ways in zip(*found)]
    curve = rising(np.concatenate([x @ w for _, _, w, (x, _) in best]),
                   np.concatenate([y for *_, (_, y) in best]))
    return FromRouting([way[1] for way in best], [way[2] for way in best], curve, experts)


def _cases(
    scorer: Any, tokens: Sequence[Tokens], cut: Sequence[int], layers: int, experts: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return by layer what chances are made of, (cases, features), and what was used, (cases,)."""
    x: list[list[np.ndarray]] = [[] for _ in range(layers)]
    y: list[list[np.ndarray]] = [[] for _ in range(layers)]
    for trace, c in zip(tokens, cut):
        past = Past(layers, experts)
        for _ in replayed(trace[:c], past):
            pass
        for n, used in replayed(trace[c:], past):
            x[n].append(scorer.of(n, past))
            y[n].append(np.isin(np.arange(experts), used))
    return [(np.concatenate(xs, 1).T, np.concatenate(ys)) for xs, ys in zip(x, y)]


def fitted(cases: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Return weights by layer, held to those of all layers."""
    start = np.zeros(cases[0][0].shape[1])
    x, y = (np.concatenate(of) for of in zip(*cases))
    alike = _logistic(x, y, start, 1e-3)
    return [_logistic(x, y, alike, RIDGE) for x, y in cases]


def _logistic(x: np.ndarray, y: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Return the weights of a logistic regression that stay near `start`, by Newton's method."""

    def objective(w: np.ndarray) -> float:
        return _loss(x, y, w) + ridge / 2 * float(((w - start) ** 2).sum())

    w = start
    for _ in range(STEPS):
        p = sigmoid(x @ w)
        slope = x.T @ (p - y) + ridge * (w - start)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w)), slope)
        now = objective(w)
        while objective(w - step) > now and np.abs(step).max() > 1e-9:
            step = step / 2
        w = w - step
        if np.abs(step).max() < 1e-7:
            break
    return w


def rising(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores, rising, and the shares of cases that happened there, which never fall.

    Neighbours whose shares fall are pooled (the least squares of rising curves); each group counts a half
    of a case more on either side, so that nothing is sure.
    """
    groups: list[list[float]] = []  # cases, those that happened, sum of scores
    for at in np.array_split(np.argsort(z, kind="stable"), min(len(z), GROUPS)):
        groups.append([len(at) + 1.0, float(y[at].sum()) + 0.5, float(z[at].sum() + z[at].mean())])
        while len(groups) > 1 and groups[-2][1] * groups[-1][0] >= groups[-1][1] * groups[-2][0]:
            last = groups.pop()
            groups[-1] = [a + b for a, b in zip(groups[-1], last)]
    cases, happened, scores = np.array(groups).T
    return scores / cases, happened / cases


def _loss(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    z = x @ w
    return float(np.logaddexp(0, z).sum() - z[y].sum())


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-z))."""
    return 0.5 * (1 + np.tanh(0.5 * z))
