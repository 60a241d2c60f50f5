"""Calibrations by one number per level: split CQR, and each level by itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from poise.errors import DataError
from poise_quantagg.atoms import atoms_of, settled
from poise_quantagg.checks import LEVEL_TOLERANCE, finite
from poise_quantagg.conformal.parts import (
    Array,
    calibration_rows,
    check_flags,
    fitted_levels,
    interval_ends,
    lower_rank,
    mirror_pairs,
    upper_rank,
    warn_infinite,
)
from poise_quantagg.monotone import pivot_index, sweep


@dataclass
class _Offsets:
    """What a calibration by one number per level has in common: the numbers, and how they are added."""

    levels_: np.ndarray = field(init=False, repr=False)
    offset_: np.ndarray = field(init=False, repr=False)
    n_: int = field(init=False, repr=False)
    atoms_: np.ndarray = field(init=False, repr=False)  # of the calibration rows' y

    def predict(self, q: Array) -> np.ndarray:
        """Return calibrated quantiles of new rows, shape (n, m).

        Raises
        ------
        ConfigError
            Before `fit`.
        DataError
            Unless q has shape (n, m) and is finite.
        """
        levels, q = fitted_levels(self), finite("q", q, 2)
        if q.shape[1] != len(levels):
            raise DataError(f"q has {q.shape[1]} levels: expected the {len(levels)} of the calibration")
        out = settled(q + self.offset_, self.atoms_)
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
        check_flags(self)
        y, q, tau = calibration_rows(y, q, levels)
        self.levels_, self.n_, self.offset_ = tau, len(y), np.zeros(len(tau))
        self.atoms_ = atoms_of(y)
        for low, high in mirror_pairs(tau):
            if self.symmetric:
                score = np.maximum(q[:, low] - y, y - q[:, high])
                width = _smallest(score, upper_rank(1 - 2 * tau[low], len(y)))
                self.offset_[low], self.offset_[high] = -width, width
            else:
                self.offset_[low] = _smallest(y - q[:, low], lower_rank(tau[low], len(y)))
                self.offset_[high] = _smallest(y - q[:, high], upper_rank(tau[high], len(y)))
        warn_infinite(tau, self.offset_, len(y))
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
        return self.predict(q)[:, interval_ends(self.levels_, alpha)]


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
        y, q, tau = calibration_rows(y, q, levels)
        ranks = [(upper_rank if t > 0.5 - LEVEL_TOLERANCE else lower_rank)(t, len(y)) for t in tau]
        self.levels_, self.n_, self.atoms_ = tau, len(y), atoms_of(y)
        self.offset_ = np.array([_smallest(y - column, r) for column, r in zip(q.T, ranks)])
        warn_infinite(tau, self.offset_, len(y))
        return self


def _smallest(values: np.ndarray, rank: int) -> float:
    """Return the rank-th smallest value, counted from 1; infinite outside 1..n."""
    if rank < 1:
        return -np.inf
    return float(np.partition(values, rank - 1)[rank - 1]) if rank <= len(values) else np.inf
