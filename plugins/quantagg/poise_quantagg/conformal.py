"""Conformal calibration of quantile predictions: split CQR, one-sided, CV+, nested CV+ (NumPy only).

Coverage statements are about exchangeable rows and hold on average over calibration sets and new rows,
not for a given x. `n` calibration rows, `m` levels, `K` folds; values have the unit of y. An end whose
rank lies outside 1..n is infinite, never clamped: a finite one would not have the coverage. Source:
arXiv 2103.00083, section 5; the pairs alpha = 2 tau are calibrated one by one.

After calibration the min-max sweep makes the intervals nested. It moves lower ends down and upper ends
up only, so every coverage statement "at least" survives it; sorting has no such property.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import (
    LEVEL_TOLERANCE,
    QuantileWarning,
    check_levels,
    finite,
    level_index,
    open_unit,
    row_blocks,
    same_rows,
)
from poise_quantagg.monotone import pivot_index, sweep

Array = np.ndarray | Sequence

RANK_TOLERANCE = 1e-9  # 0.7 * 10 is 7.000000000000001 or 6.999...: both mean the rank 7


def upper_rank(level: float, n: int) -> int:
    """Return ceil(level * (n + 1)), tolerant to rounding; more than n stands for infinity."""
    return math.ceil(level * (n + 1) - RANK_TOLERANCE)


def lower_rank(level: float, n: int) -> int:
    """Return floor(level * (n + 1)), tolerant to rounding; 0 stands for minus infinity."""
    return math.floor(level * (n + 1) + RANK_TOLERANCE)


# ------------------------------------------------------------------ split


@dataclass
class _Offsets:
    """What a calibration by one number per level has in common: the numbers, and how they are added."""

    levels_: np.ndarray = field(init=False, repr=False)
    offset_: np.ndarray = field(init=False, repr=False)
    n_: int = field(init=False, repr=False)

    def predict(self, q: Array) -> np.ndarray:
        """Return calibrated quantiles of new rows, shape (n, m).

        Raises
        ------
        ConfigError
            Before `fit`.
        DataError
            Unless q has shape (n, m) and is finite.
        """
        levels, q = _levels(self), finite("q", q, 2)
        if q.shape[1] != len(levels):
            raise DataError(f"q has {q.shape[1]} levels: expected the {len(levels)} of the calibration")
        out = q + self.offset_
        return sweep(out, pivot_index(levels)) if self.sweep else out


@dataclass
class SplitCQR(_Offsets):
    """Conformalized quantile regression on rows that no model has seen (eqs 26 and 27).

    Symmetric: E_i = max(q_lo(x_i) - y_i, y_i - q_hi(x_i)) and Q the ceil((1 - alpha)(n + 1))-th smallest
    of them give [q_lo - Q, q_hi + Q], whose coverage lies in `split_bounds(n, alpha)` (the upper bound
    for scores without ties and without the sweep). Asymmetric (Romano et al.): each end has its own
    scores at alpha / 2; the same guarantee, honest tails, usually wider.

    Parameters
    ----------
    symmetric : bool
    sweep : bool
        Nest the intervals around the median; see the module.

    Attributes
    ----------
    levels_ : array, shape (m,)
    offset_ : array, shape (m,)
        What is added to the predictions, in the unit of y; 0 at the median, which stays as predicted.
    n_ : int
        Calibration rows.
    """

    symmetric: bool = True
    sweep: bool = True

    def fit(self, y: Array, q: Array, levels: Array) -> SplitCQR:
        """Learn the offsets from calibration rows.

        Parameters
        ----------
        y : array, shape (n,)
        q : array, shape (n, m)
            Predictions for these rows, which training must not have used.
        levels : array, shape (m,)
            Mirror pairs around 0.5, with or without 0.5.

        Raises
        ------
        ConfigError
            For levels that are ill-formed or not mirror pairs.
        DataError
            For shapes that do not fit, or values that are not finite.

        Warns
        -----
        QuantileWarning
            Once, naming the levels whose ends are infinite for want of rows.
        """
        _flags(self)
        y, q, tau = _calibration(y, q, levels)
        self.levels_, self.n_, self.offset_ = tau, len(y), np.zeros(len(tau))
        for low, high in _mirror_pairs(tau):
            if self.symmetric:
                score = np.maximum(q[:, low] - y, y - q[:, high])
                width = _smallest(score, upper_rank(1 - 2 * tau[low], len(y)))
                self.offset_[low], self.offset_[high] = -width, width
            else:
                self.offset_[low] = _smallest(y - q[:, low], lower_rank(tau[low], len(y)))
                self.offset_[high] = _smallest(y - q[:, high], upper_rank(tau[high], len(y)))
        _warn_infinite(tau, self.offset_, len(y))
        return self

    def predict_interval(self, q: Array, alpha: float) -> np.ndarray:
        """Return the central (1 - alpha) intervals of new rows, shape (n, 2): lower end, upper end.

        Raises
        ------
        ConfigError
            When alpha / 2 is not among the levels.
        DataError
            As for `predict`.
        """
        return self.predict(q)[:, _ends(self.levels_, alpha)]


@dataclass
class OneSided(_Offsets):
    """Each level calibrated on its own residuals y - q_tau, so that P(Y <= q_tau) is tau, safely.

    From 0.5 on the ceil(tau (n + 1))-th smallest residual is added: P(Y <= .) >= tau. Below it is the
    floor(tau (n + 1))-th: P(Y < .) <= tau. For mirror pairs this is asymmetric CQR; levels may be any.

    Parameters
    ----------
    sweep : bool
        Nest the quantiles around the level nearest to 0.5; both statements survive.
    """

    sweep: bool = True

    def fit(self, y: Array, q: Array, levels: Array) -> OneSided:
        """Learn the offsets from calibration rows; parameters, errors and warning as in `SplitCQR`."""
        y, q, tau = _calibration(y, q, levels)
        ranks = [(upper_rank if t > 0.5 - LEVEL_TOLERANCE else lower_rank)(t, len(y)) for t in tau]
        self.levels_, self.n_ = tau, len(y)
        self.offset_ = np.array([_smallest(y - column, r) for column, r in zip(q.T, ranks)])
        _warn_infinite(tau, self.offset_, len(y))
        return self


# ------------------------------------------------------------------ CV+


@dataclass
class CVPlus:
    """CV+ for quantile regression: all rows train and calibrate (eqs 28 and 29).

    R_i = max(q_lo(x_i) - y_i, y_i - q_hi(x_i)) with the model that did not see fold k(i). At a new x the
    lower end is the floor(alpha (n + 1))-th smallest of q_lo^{-k(i)}(x) - R_i over all i, the upper end
    the ceil((1 - alpha)(n + 1))-th smallest of q_hi^{-k(i)}(x) + R_i: quantiles of the sums, not sums of
    quantiles. Coverage is at least `cv_plus_bound(n, K, alpha)`, usually near 1 - alpha. Asymmetric: each
    end has its own residuals, at alpha / 2.

    Parameters
    ----------
    symmetric : bool
    sweep : bool
        Nest the intervals around the median; see the module.

    Attributes
    ----------
    levels_ : array, shape (m,)
    residuals_ : dict of level position -> list of K arrays
        By fold, largest first.
    n_ : int
    """

    symmetric: bool = True
    sweep: bool = True
    levels_: np.ndarray = field(init=False, repr=False)
    residuals_: dict[int, list[np.ndarray]] = field(init=False, repr=False)
    n_: int = field(init=False, repr=False)

    def fit(self, y: Array, q_oof: Array, fold: Array, levels: Array) -> CVPlus:
        """Learn the residuals.

        Parameters
        ----------
        y : array, shape (n,)
        q_oof : array, shape (n, m)
            Row i predicted by the model that did not see fold[i].
        fold : array of int, shape (n,)
            From 0 to K - 1, none empty, K >= 2.
        levels : array, shape (m,)
            Mirror pairs around 0.5, with or without 0.5.

        Raises
        ------
        ConfigError
            For levels that are ill-formed or not mirror pairs.
        DataError
            For shapes that do not fit, values that are not finite, or folds other than 0..K-1.

        Warns
        -----
        QuantileWarning
            Once, naming the levels whose ends are infinite for want of rows.
        """
        _flags(self)
        y, q, tau = _calibration(y, q_oof, levels)
        fold, k = check_folds(fold, len(y))
        self.levels_, self.n_, self.residuals_ = tau, len(y), {}
        for low, high in _mirror_pairs(tau):
            below, above = q[:, low] - y, y - q[:, high]
            both = np.maximum(below, above)
            for at, own in ((low, below), (high, above)):
                r = both if self.symmetric else own
                self.residuals_[at] = [np.sort(r[fold == j])[::-1] for j in range(k)]
        empty = [at for at in self.residuals_ if self._rank(at) == 0]
        _warn_infinite(tau, np.where(np.isin(np.arange(len(tau)), empty), np.inf, 0.0), len(y))
        return self

    def predict(self, q_folds: Array, median: Array | None = None) -> np.ndarray:
        """Return calibrated quantiles of new rows, shape (n_new, m).

        Time and values grow as n_new * n * m, in blocks of rows of bounded memory.

        Parameters
        ----------
        q_folds : array, shape (K, n_new, m)
            The new rows predicted by the model without fold k.
        median : array, shape (n_new,), optional
            The point prediction that takes the place of level 0.5, if there is one, say of a model fitted
            on all rows; the mean over folds by default.

        Raises
        ------
        DataError
            For another number of folds or levels, or values that are not finite.
        """
        q = self._check_new(q_folds)
        out = q.mean(axis=0)
        pivot = pivot_index(self.levels_)
        if median is not None and abs(self.levels_[pivot] - 0.5) <= LEVEL_TOLERANCE:
            point = finite("median", median, 1)
            same_rows("median", point, len(out), "q_folds[0]")
            out[:, pivot] = point
        for at in self.residuals_:
            out[:, at] = self._end(q[:, :, at], at)
        return sweep(out, pivot) if self.sweep else out

    def predict_interval(self, q_folds: Array, alpha: float) -> np.ndarray:
        """Return the central (1 - alpha) intervals of new rows, shape (n_new, 2).

        Without the sweep only this pair of levels is computed.

        Raises
        ------
        ConfigError
            When alpha / 2 is not among the levels.
        DataError
            As for `predict`.
        """
        ends = _ends(_levels(self), alpha)
        if self.sweep:
            return self.predict(q_folds)[:, ends]
        q = self._check_new(q_folds)
        return np.stack([self._end(q[:, :, at], at) for at in ends], axis=1)

    def _check_new(self, q_folds: Array) -> np.ndarray:
        levels, q = _levels(self), finite("q_folds", q_folds, 3)
        k = len(next(iter(self.residuals_.values()))) if self.residuals_ else len(q)
        if (q.shape[0], q.shape[2]) != (k, len(levels)):
            raise DataError(f"q_folds has shape {q.shape}: expected ({k}, n_new, {len(levels)})")
        return q

    def _rank(self, at: int) -> int:
        tail = min(self.levels_[at], 1 - self.levels_[at])
        return lower_rank(2 * tail if self.symmetric else tail, self.n_)

    def _end(self, centre: np.ndarray, at: int) -> np.ndarray:
        """Return one end of new rows, shape (n_new,); the upper one is minus a lower one of -q."""
        sign = 1 if self.levels_[at] < 0.5 else -1
        return sign * _low_ends(sign * centre, self.residuals_[at], self._rank(at))


class NestedCVPlus(CVPlus):
    """CV+ for an aggregator of cross-fitted models, whose own weights must not see fold k(i) either.

    1. For every pair of folds k < l (`nested_pairs`) fit every base model without both, and predict the
       rows of both: K(K - 1)/2 fits a model, because leaving out k then l is leaving out l then k.
    2. `nested_fold_arrays` gives for each k the rows outside fold k with predictions of models that saw
       neither k nor the row's own fold: fit the aggregator w^{-k} on them.
    3. Fit every base model without fold k (K more fits): w^{-k} of their predictions gives q_oof for
       the rows of fold k and q_folds[k] for new rows. `fit` and `predict` then are those of `CVPlus`.
    """


def nested_pairs(n_folds: int) -> list[tuple[int, int]]:
    """Return the K(K - 1)/2 pairs of folds (k, l), k < l, that nested CV+ leaves out.

    Raises
    ------
    ConfigError
        For fewer than 3 folds: with 2, a model without both would have no rows.
    """
    if n_folds < 3:
        raise ConfigError(f"n_folds={n_folds!r}: nested CV+ needs at least 3")
    return list(combinations(range(n_folds), 2))


def nested_fold_arrays(
    pair_predictions: Mapping[tuple[int, int], Array], fold: Array
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each outer fold k the rows outside it and their predictions, for the aggregator w^{-k}.

    Parameters
    ----------
    pair_predictions : dict of (k, l) -> array, shape (rows of folds k and l, p, m)
        For every pair of `nested_pairs`; predictions of models fitted without both folds, for the rows
        of both, in the order of the rows.
    fold : array of int, shape (n,)
        From 0 to K - 1.

    Yields
    ------
    rows : array of int, shape (n_k,)
        Positions outside fold k, increasing.
    Z : array, shape (n_k, p, m)
        Row i predicted without folds k and fold[i].

    Raises
    ------
    ConfigError
        For fewer than 3 folds.
    DataError
        For a pair that is missing, shapes that do not fit, or values that are not finite.
    """
    where, n_folds = check_folds(fold, len(fold))
    pairs, shapes = {}, set()
    for k, l in nested_pairs(n_folds):
        name = f"pair_predictions[{k}, {l}]"
        if (k, l) not in pair_predictions:
            raise DataError(f"{name} is missing: give every pair k < l of {n_folds} folds")
        pairs[k, l] = finite(name, pair_predictions[k, l], 3, keep_float32=True)
        expected = int(np.isin(where, (k, l)).sum())
        if len(pairs[k, l]) != expected:
            raise DataError(f"{name} has {len(pairs[k, l])} rows: folds {k} and {l} have {expected}")
        shapes.add(pairs[k, l].shape[1:])
    if len(shapes) > 1:
        raise DataError(f"pair_predictions have models and levels {sorted(shapes)}: they must be equal")
    return _nested_arrays(pairs, where, n_folds)


def _nested_arrays(pairs, fold: np.ndarray, n_folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(n_folds):
        rows = np.flatnonzero(fold != k)
        first = next(iter(pairs.values()))
        Z = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for l in range(n_folds):
            if l != k:
                own = fold[np.isin(fold, (k, l))] == l
                Z[fold[rows] == l] = pairs[min(k, l), max(k, l)][own]
        yield rows, Z


# ------------------------------------------------------------------ what theory promises


def split_bounds(n: int, alpha: float) -> tuple[float, float]:
    """Return the bounds of the mean coverage of split CQR, [1 - alpha, 1 - alpha + 1 / (n + 1)].

    The upper one needs scores without ties and no sweep.

    Raises
    ------
    ConfigError
        For n < 1 or alpha outside (0, 1).
    """
    _check_bound(n, alpha)
    return 1 - alpha, min(1.0, 1 - alpha + 1 / (n + 1))


def cv_plus_bound(n: int, n_folds: int, alpha: float) -> float:
    """Return the least mean coverage of CV+: 1 - 2 alpha - excess, where the excess is
    min(2 (1 - 1/K) / (n/K + 1), (1 - K/n) / (K + 1)) <= sqrt(2 / n).

    It supposes K equal folds; 0 if negative. Source: Barber et al. 2021, theorem 4; the paper, section 5.

    Raises
    ------
    ConfigError
        For n < 1, alpha outside (0, 1), or K outside 2..n.
    """
    _check_bound(n, alpha)
    if not 2 <= n_folds <= n:
        raise ConfigError(f"n_folds={n_folds!r}: allowed is 2 to n={n}")
    excess = min(2 * (1 - 1 / n_folds) / (n / n_folds + 1), (1 - n_folds / n) / (n_folds + 1))
    return max(0.0, 1 - 2 * alpha - excess)


def beta_band(n: int, alpha: float, level: float = 0.95, n_test: int | None = None) -> tuple[float, float]:
    """Return the central band of the coverage that *one* calibration set of n rows gives.

    Without ties and sweep the coverage given the calibration set follows Beta(r, n + 1 - r) with
    r = ceil((1 - alpha)(n + 1)), and the share covered of n_test new rows the beta-binomial law.

    Parameters
    ----------
    n : int
    alpha : float
    level : float
        Probability of the band, in (0, 1).
    n_test : int, optional
        New rows on which coverage is counted; None for infinitely many.

    Raises
    ------
    ConfigError
        For numbers out of range.
    MissingExtra
        Without SciPy.
    """
    from poise.errors import require

    _check_bound(n, alpha)
    if not 0 < level < 1 or (n_test is not None and n_test < 1):
        raise ConfigError(f"level={level!r}, n_test={n_test!r}: allowed are 0 < level < 1, n_test >= 1")
    rank, ends = upper_rank(1 - alpha, n), [(1 - level) / 2, (1 + level) / 2]
    if rank > n:
        return 1.0, 1.0
    stats = require("scipy.stats", "quantagg")
    if n_test is None:
        band = stats.beta.ppf(ends, rank, n + 1 - rank)
    else:
        band = stats.betabinom.ppf(ends, n_test, rank, n + 1 - rank) / n_test
    return float(band[0]), float(band[1])


def _check_bound(n: int, alpha: float) -> None:
    if n < 1 or not 0 < alpha < 1:
        raise ConfigError(f"n={n!r}, alpha={alpha!r}: allowed are n >= 1 and 0 < alpha < 1")


# ------------------------------------------------------------------ parts


def _levels(calibration: _Offsets | CVPlus) -> np.ndarray:
    if not hasattr(calibration, "levels_"):
        raise ConfigError(f"{type(calibration).__name__} is not fitted: call fit first")
    return calibration.levels_


def _calibration(y: Array, q: Array, levels: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, q = finite("y", y, 1), finite("q", q, 2)
    same_rows("q", q, len(y))
    return y, q, check_levels(levels, q.shape[1])


def _flags(calibration: Any) -> None:
    """Raise `ConfigError` for options that are neither True nor False: any text would count as True."""
    for name in ("symmetric", "sweep"):
        value = getattr(calibration, name)
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f"{type(calibration).__name__}: {name}={value!r}: allowed is True or False")


def check_folds(fold: Array, n: int) -> tuple[np.ndarray, int]:
    """Return the fold of each row, shape (n,), int, and their number K >= 2.

    Raises
    ------
    DataError
        For another length, folds that are not 0..K-1, an empty one, or only one.
    """
    given = np.asarray(fold)
    if given.shape != (n,) or given.dtype.kind not in "iu" or given.min() != 0:
        lowest = f", smallest {given.min()}" if given.dtype.kind in "iu" and given.size else ""
        raise DataError(f"fold has shape {given.shape}, {given.dtype}{lowest}: allowed are {n} integers "
                        f"from 0 to K - 1")
    there = np.unique(given)
    if len(there) < 2 or there[-1] != len(there) - 1:
        raise DataError(f"there are {len(there)} folds, the last is number {there[-1]}: allowed are two or "
                        f"more from 0 to K - 1, none of them empty")
    return given.astype(np.intp), len(there)


def _mirror_pairs(tau: np.ndarray) -> list[tuple[int, int]]:
    """Return positions (low, high) of tau and 1 - tau, outermost first."""
    if np.abs(tau + tau[::-1] - 1).max() > LEVEL_TOLERANCE:
        raise ConfigError(f"levels={np.round(tau, 6).tolist()}: allowed are mirror pairs around 0.5; "
                          "OneSided calibrates any levels")
    return [(k, len(tau) - 1 - k) for k in range(len(tau) // 2)]


def _ends(tau: np.ndarray, alpha: float) -> np.ndarray:
    alpha = open_unit("alpha", alpha)
    return level_index(tau, [alpha / 2, 1 - alpha / 2])


def _smallest(values: np.ndarray, rank: int) -> float:
    """Return the rank-th smallest value, counted from 1; infinite outside 1..n."""
    if rank < 1:
        return -np.inf
    return float(np.partition(values, rank - 1)[rank - 1]) if rank <= len(values) else np.inf


def _low_ends(centre: np.ndarray, residuals: list[np.ndarray], rank: int) -> np.ndarray:
    """Return the rank-th smallest of centre[k] - residual over all residuals of all folds k.

    Only the `rank` largest residuals of a fold can be among the `rank` smallest differences.
    """
    n_new = centre.shape[1]
    if rank == 0:
        return np.full(n_new, -np.inf)
    kept = [r[:rank] for r in residuals]
    out = np.empty(n_new)
    for block in row_blocks(n_new, sum(map(len, kept))):
        values = np.concatenate([c[block, None] - r for c, r in zip(centre, kept)], axis=1)
        out[block] = np.partition(values, rank - 1, axis=1)[:, rank - 1]
    return out


def _warn_infinite(tau: np.ndarray, offset: np.ndarray, n: int) -> None:
    bad = tau[np.isinf(offset)]
    if bad.size:
        names = ", ".join(f"{t:g}" for t in bad)
        warnings.warn(f"{n} calibration rows are too few for the levels {names}: their ends are infinite; "
                      "give more rows or levels nearer to 0.5", QuantileWarning, stacklevel=3)
