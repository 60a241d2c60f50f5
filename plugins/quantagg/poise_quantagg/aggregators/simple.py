"""Aggregators that others ship: average, median, best single model, greedy, QRA and factor QRA."""

from __future__ import annotations

import numpy as np

from poise_quantagg import programs
from poise_quantagg.aggregators.fitted import FittedMedian, LinearFit
from poise_quantagg.checks import row_blocks

WILD = 100.0
_HARDLY = 1e-6
_SAME = 1e-12
_NOISE = 1e-14  # of the largest variance; a component below it is rounding


def average(Z: np.ndarray) -> LinearFit:
    """Return equal weights for predictions of shape (n, p, m)."""
    p, m = Z.shape[1:]
    return LinearFit(np.full(p, 1 / p), m)


def median(Z: np.ndarray) -> FittedMedian:
    """Return the median over models for predictions of shape (n, p, m)."""
    return FittedMedian(*Z.shape[1:])


def losses(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return the weighted mean pinball loss of each model, shape (p,)."""
    total = np.zeros(Z.shape[1])
    for block in row_blocks(len(Z), Z.shape[1] * Z.shape[2]):
        u = y[block, None, None] - Z[block]
        total += np.einsum("n,npm->p", s[block], np.maximum(levels * u, (levels - 1) * u))
    return total / (s.sum() * Z.shape[2])


def best(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray) -> LinearFit:
    """Return all weight on the model of least loss; models of equal loss share it."""
    loss = losses(Z, y, levels, s)
    first = loss <= loss.min() * (1 + _SAME)
    return LinearFit(first / first.sum(), Z.shape[2], objective=float(loss.min()))


def greedy(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, rounds: int) -> LinearFit:
    """Add models one at a time, with replacement (Caruana et al. 2004, as AutoGluon does).

    Each round adds the model that makes the average of all added so far best; the weights are those
    after the best round. Models that are equally good are added together, in equal parts.
    """
    n, p, m = Z.shape
    counts, best_loss, best_counts = np.zeros(p), np.inf, np.full(p, 1 / p)
    total = np.zeros((n, m))
    for _ in range(rounds):
        trial = np.zeros(p)
        size = counts.sum() + 1
        for block in row_blocks(n, m):
            for j in range(p):
                u = y[block, None] - (total[block] + Z[block, j]) / size
                trial[j] += s[block] @ np.maximum(levels * u, (levels - 1) * u).sum(axis=1)
        chosen = trial <= trial.min() * (1 + _SAME)
        share = chosen / chosen.sum()
        counts = counts + share
        for block in row_blocks(n, p * m):
            total[block] += np.matmul(share, Z[block])
        if trial.min() < best_loss * (1 - _SAME):
            best_loss, best_counts = trial.min(), counts / counts.sum()
    return LinearFit(best_counts, m, objective=float(best_loss / (s.sum() * m)))


def qra(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, *, intercept: bool,
        simplex: bool) -> LinearFit:
    """Regress the target on the models' predictions, level by level (Nowotarski and Weron 2015).

    Models that hardly differ can get weights of thousands that cancel on these rows and on no others.
    Levels where a weight exceeds `WILD` are solved again without the directions in which the models
    differ by less than a thousandth; the gap then counts from the whole program's bound.
    """
    found = programs.medium(Z, y, levels, s, simplex=simplex, intercept=intercept)
    fit = LinearFit(found.w, Z.shape[2], found.intercept if intercept else None, found.objective, found.gap)
    wild = np.abs(found.w).max(axis=0) > WILD
    if not wild.any():
        return fit
    tame = programs.medium(Z[:, :, wild], y, levels[wild], s, simplex=False, intercept=intercept,
                           dependent=_HARDLY)
    w, shift = found.w.copy(), found.intercept.copy()
    w[:, wild], shift[wild] = tame.w, tame.intercept
    fit = LinearFit(w, Z.shape[2], shift if intercept else None)
    u = y[:, None] - fit.predict(Z)
    objective = float((s / s.sum()) @ np.maximum(levels * u, (levels - 1) * u).mean(axis=1))
    return LinearFit(w, Z.shape[2], fit.intercept, objective, objective - (found.objective - found.gap))


def fqra(
    Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, *, factors: int | None,
    choose: str, variance: float,
) -> LinearFit:
    """Regress on the leading principal components of the predictions (Maciejowska et al. 2016).

    Components are taken level by level, with an intercept. Their number is given, or the fewest that
    explain the share `variance` on average over levels, or what minimises the Bayesian information
    criterion log(loss) + (r + 1) log(n) / 2n, averaged over levels (Lee, Noh and Park 2014). In
    terms of the models' predictions the result is again a weighted sum with an intercept.
    """
    n, _, m = Z.shape
    share = s / s.sum()
    centre = np.einsum("n,npm->pm", share, Z)
    moved = Z - centre
    covariance = np.einsum("n,npm,nqm->mpq", share, moved, moved, optimize=True)
    value, vector = np.linalg.eigh(covariance)
    value, vector = np.maximum(value[:, ::-1], 0), vector[:, :, ::-1]
    if factors is None and choose == "variance":
        explained = np.cumsum(value, axis=1) / np.maximum(value.sum(axis=1, keepdims=True), 1e-300)
        factors = int(np.argmax(explained.mean(axis=0) >= variance - _SAME)) + 1
    rank = max(1, int((value > _NOISE * value[:, :1]).sum(axis=1).max()))
    sizes = range(1, rank + 1) if factors is None else [min(factors, rank)]
    best_fit: tuple[float, LinearFit] | None = None
    for r in sizes:
        F = np.einsum("npm,mpr->nrm", moved, vector[:, :, :r], optimize=True)
        found = programs.medium(F, y, levels, s, simplex=False, intercept=True)
        w = np.einsum("mpr,rm->pm", vector[:, :, :r], found.w)
        shift = found.intercept - (w * centre).sum(axis=0)
        u = y[:, None] - LinearFit(w, m, shift).predict(Z)
        loss = share @ np.maximum(levels * u, (levels - 1) * u)
        # of these weights, rounding included; the bound is that of the program in factors
        objective = max(float(loss.mean()), found.objective - found.gap)
        fit = LinearFit(w, m, shift, objective, objective - (found.objective - found.gap))
        score = float(np.log(np.maximum(loss, 1e-300)).mean() + (r + 1) * np.log(n) / (2 * n))
        if best_fit is None or score < best_fit[0]:
            best_fit = score, fit
    assert best_fit is not None
    return best_fit[1]
