"""What calibrates the intervals of an ensemble: rows that its quantiles have not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from poise_quantagg import saved
from poise_quantagg.checks import LEVEL_TOLERANCE, QuantileWarning
from poise_quantagg.conformal import CVPlus, SplitCQR
from poise_quantagg.grid import interpolate


@dataclass(frozen=True)
class Calibration:
    """Rows that calibrate.

    Parameters
    ----------
    y : array, shape (n,)
    q : array, shape (n, m)
        The ensemble's quantiles for these rows, which it has not seen.
    fold : array, shape (n,), or None
        The fold of each row; None for rows held out of all fitting.
    levels : array, shape (m,)
    """

    y: np.ndarray
    q: np.ndarray
    fold: np.ndarray | None
    levels: np.ndarray

    @cached_property
    def pairs(self) -> CVPlus | SplitCQR | None:
        """The calibration of all levels whose mirror image is a level too; None without such."""
        levels = self._mirrored()
        return self._at(levels) if len(levels) else None

    def interval(self, q: np.ndarray, alpha: float) -> np.ndarray:
        """Return calibrated central (1 - alpha) intervals of new rows, shape (n, 2).

        At fitted levels all pairs are swept; any other pair is interpolated and calibrated by itself.

        Parameters
        ----------
        q : array, shape (n, m), or (K, n, m) by the models of each fold where rows have a fold
        alpha : float, in (0, 1)

        Warns
        -----
        QuantileWarning
            Once, when there are too few rows for alpha: the interval is infinite then.
        """
        ends, levels = np.array([alpha / 2, 1 - alpha / 2]), self._mirrored()
        known = len(levels) > 0 and all(np.abs(levels - end).min() < LEVEL_TOLERANCE for end in ends)
        calibrated = self.pairs if known else None
        if calibrated is None:
            levels, calibrated = ends, self._at(ends)
        flat = interpolate(q.reshape(-1, q.shape[-1]), self.levels, levels, stacklevel=4)
        out = calibrated.predict_interval(flat.reshape(*q.shape[:-1], len(levels)), alpha)
        if np.isinf(out).any():
            warnings.warn(
                f"{calibrated.n_} calibration rows are too few for alpha={alpha:g}: the interval is "
                f"infinite; give more rows or a larger alpha", QuantileWarning, stacklevel=3)
        return out

    def _at(self, levels: np.ndarray) -> CVPlus | SplitCQR:
        """Return the fitted calibration of mirrored levels."""
        with warnings.catch_warnings():
            # 49 pairs with few rows: what is infinite is said when an interval is asked for
            warnings.simplefilter("ignore", QuantileWarning)
            q = interpolate(self.q, self.levels, levels)
            if self.fold is None:
                return SplitCQR().fit(self.y, q, levels)
            return CVPlus().fit(self.y, q, self.fold, levels)

    def _mirrored(self) -> np.ndarray:
        """Return the levels whose mirror image is a level too; none where that is the median alone."""
        there = np.abs(self.levels[:, None] + self.levels[None] - 1).min(axis=1) < LEVEL_TOLERANCE
        return self.levels[there] if there.sum() > 1 else self.levels[:0]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return what `from_tensors` needs beside the levels."""
        arrays = {"calibration.y": self.y, "calibration.q": self.q}
        return arrays if self.fold is None else arrays | {"calibration.fold": self.fold}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], levels: np.ndarray) -> Calibration:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError, DataError
            For arrays that calibrate nothing.
        """
        y, fold = saved.array(arrays, "calibration.y", (None,)), None
        if "calibration.fold" in arrays:
            fold = saved.array(arrays, "calibration.fold", y.shape, "i")
        found = cls(y, saved.array(arrays, "calibration.q", (len(y), len(levels))), fold, levels)
        _ = found.pairs
        return found


def warn_ranks(sample_weight: np.ndarray | None) -> None:
    """Say that calibration counts rows once, where their weights differ.

    Weighted ranks (Tibshirani et al. 2019) need the weight of each new row, which nobody gives here, and
    carry no guarantee for CV+.

    Warns
    -----
    QuantileWarning
        For positive weights that are not all equal.
    """
    if sample_weight is None or len(np.unique(sample_weight[sample_weight > 0])) < 2:
        return
    warnings.warn("sample_weight differs between rows, and calibration counts every row of positive weight "
                  "once: intervals cover new rows like those given, not rows drawn in proportion to the "
                  "weights", QuantileWarning, stacklevel=3)
