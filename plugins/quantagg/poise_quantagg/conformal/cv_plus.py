"""CV+, plain and nested: all rows train and calibrate."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from poise.errors import DataError
from poise_quantagg.atoms import atoms_of, settled
from poise_quantagg.checks import LEVEL_TOLERANCE, finite, row_blocks, same_rows
from poise_quantagg.conformal.nested import check_folds
from poise_quantagg.conformal.parts import (
    Array,
    calibration_rows,
    check_flags,
    fitted_levels,
    interval_ends,
    lower_rank,
    mirror_pairs,
    warn_infinite,
)
from poise_quantagg.grid import mean_of_folds
from poise_quantagg.monotone import pivot_index, sweep


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
    atoms_: np.ndarray = field(init=False, repr=False)  # of y

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
        check_flags(self)
        y, q, tau = calibration_rows(y, q_oof, levels)
        fold, k = check_folds(fold, len(y))
        self.levels_, self.n_, self.residuals_, self.atoms_ = tau, len(y), {}, atoms_of(y)
        for low, high in mirror_pairs(tau):
            below, above = q[:, low] - y, y - q[:, high]
            both = np.maximum(below, above)
            for at, own in ((low, below), (high, above)):
                r = both if self.symmetric else own
                self.residuals_[at] = [np.sort(r[fold == j])[::-1] for j in range(k)]
        empty = [at for at in self.residuals_ if self._rank(at) == 0]
        warn_infinite(tau, np.where(np.isin(np.arange(len(tau)), empty), np.inf, 0.0), len(y))
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
        out = mean_of_folds(q)
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
        ends = interval_ends(fitted_levels(self), alpha)
        if self.sweep:
            return self.predict(q_folds)[:, ends]
        q = self._check_new(q_folds)
        return np.stack([self._end(q[:, :, at], at) for at in ends], axis=1)

    def _check_new(self, q_folds: Array) -> np.ndarray:
        levels, q = fitted_levels(self), finite("q_folds", q_folds, 3)
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
        return settled(sign * _low_ends(sign * centre, self.residuals_[at], self._rank(at)), self.atoms_)


class NestedCVPlus(CVPlus):
    """CV+ for an aggregator of cross-fitted models, whose own weights must not see fold k(i) either.

    1. For every pair of folds k < l (`nested_pairs`) fit every base model without both, and predict the
       rows of both: K(K - 1)/2 fits a model, because leaving out k then l is leaving out l then k.
    2. `nested_fold_arrays` gives for each k the rows outside fold k with predictions of models that saw
       neither k nor the row's own fold: fit the aggregator w^{-k} on them.
    3. Fit every base model without fold k (K more fits): w^{-k} of their predictions gives q_oof for
       the rows of fold k and q_folds[k] for new rows. `fit` and `predict` then are those of `CVPlus`.
    """


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
