"""Makes chances of numbers: logistic regressions, held to one another, and a curve that never falls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIDGE = 10.0  # in cases: how far a layer's weights are held to those of all layers
GROUPS = 400  # of cases, of which a curve is made
STEPS = 30  # of Newton's method, at most

Cases = tuple[np.ndarray, np.ndarray]  # numbers (cases, features), what happened (cases,), 0 to 1
Curve = tuple[np.ndarray, np.ndarray]


def fitted(cases: Sequence[Cases]) -> list[np.ndarray]:
    """Return weights by layer, held to those of all layers."""
    alike = alike_for(cases)
    return [_logistic(x, y, alike, RIDGE) for x, y in cases]


def alike_for(cases: Sequence[Cases]) -> np.ndarray:
    """Return weights that are the same for all layers."""
    x, y = (np.concatenate(of) for of in zip(*cases))
    return _logistic(x, y, np.zeros(x.shape[1]), 1.0)


def _logistic(x: np.ndarray, y: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """Return the weights of a logistic regression that stay near `start`, by Newton's method."""

    def objective(w: np.ndarray) -> float:
        return loss(x, y, w) + ridge / 2 * float(((w - start) ** 2).sum())

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


def loss(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Return the surprise at what happened, in nats."""
    z = x @ w
    return float((np.logaddexp(0, z) - y * z).sum())


def rising(z: np.ndarray, y: np.ndarray) -> Curve:
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


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-z))."""
    return 0.5 * (1 + np.tanh(0.5 * z))
