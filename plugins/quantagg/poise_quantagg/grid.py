"""From the levels that a model was trained at to any others."""

from __future__ import annotations

import warnings
from statistics import NormalDist

import numpy as np

from poise_quantagg.checks import LEVEL_TOLERANCE, QuantileWarning


def interpolate(q: np.ndarray, trained: np.ndarray, wanted: np.ndarray, stacklevel: int = 3) -> np.ndarray:
    """Return quantiles (n, m') at the levels `wanted`, from those (n, m) at `trained`.

    Between two levels it is linear in the normal score of the level, which is exact for a normal
    distribution; monotone quantiles stay monotone. Beyond the ends there is nothing to go by: the
    outermost quantile is repeated, and one `QuantileWarning` says so.
    """
    trained, wanted = np.asarray(trained, float), np.asarray(wanted, float)
    if trained.shape == wanted.shape and np.allclose(trained, wanted, atol=LEVEL_TOLERANCE, rtol=0):
        return q
    low, high = trained[0] - LEVEL_TOLERANCE, trained[-1] + LEVEL_TOLERANCE
    beyond = wanted[(wanted < low) | (wanted > high)]
    if len(beyond):
        warnings.warn(
            f"levels {[float(f'{t:.9g}') for t in beyond]} lie beyond the grid {trained[0]:g} to "
            f"{trained[-1]:g}: the outermost quantile stands for them; fit with those levels instead",
            QuantileWarning, stacklevel=stacklevel,
        )
    if len(trained) == 1:
        return np.repeat(q, len(wanted), axis=1)
    scores = np.array([NormalDist().inv_cdf(t) for t in trained])
    at = np.array([NormalDist().inv_cdf(t) for t in wanted])
    right = np.clip(np.searchsorted(scores, at), 1, len(trained) - 1)
    share = np.clip((at - scores[right - 1]) / (scores[right] - scores[right - 1]), 0, 1)
    share = np.where(np.abs(share) < 1e-9, 0, np.where(np.abs(share - 1) < 1e-9, 1, share))
    low, high = q[:, right - 1], q[:, right]
    return np.where(share == 1, high, low + (high - low) * share)  # of two equal ones that value to the bit


def mean_of_folds(q: np.ndarray) -> np.ndarray:
    """Return the mean over the first axis; where all are equal, that value to the bit."""
    return q[0] + (q - q[0]).mean(axis=0)


def coarse_grid(levels: np.ndarray, count: int | None) -> np.ndarray:
    """Return `count` of the levels: both ends and evenly spread ones; all when None or enough."""
    if count is None or count >= len(levels):
        return levels
    if count < 2:
        return levels[[len(levels) // 2]]
    return levels[np.unique(np.linspace(0, len(levels) - 1, count).round().astype(int))]
