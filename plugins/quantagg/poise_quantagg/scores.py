"""Scores of quantile predictions: pinball, WIS, interval score, coverage, crossing.

`n` rows, `m` levels; scores have the unit of y. Sections refer to arXiv 2103.00083.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise.errors import ConfigError
from poise_quantagg.checks import check_levels, finite, level_index, same_rows

Array = np.ndarray | Sequence

CONVENTIONS = ("sum", "mean", "pinball_mean")


def _checked(y: Array, q: Array, levels: Array | None) -> tuple[np.ndarray, ...]:
    y, q = finite("y", y, 1), finite("q", q, 2)
    same_rows("q", q, len(y))
    return y, q, check_levels(levels, q.shape[1])


def pinball(y: Array, q: Array, levels: Array) -> np.ndarray:
    """Return the pinball loss of each row at each level, shape (n, m) (eq 3).

    psi_tau(u) = max(tau u, (tau - 1) u) with u = y - q; its mean over Y is smallest at the
    tau-quantile of Y.

    Parameters
    ----------
    y : array, shape (n,)
    q : array, shape (n, m)
        Predicted quantiles; they may cross.
    levels : array, shape (m,)
        Increasing, in (0, 1).

    Raises
    ------
    ConfigError
        For ill-formed levels.
    DataError
        For shapes that do not fit, or values that are not finite.
    """
    y, q, tau = _checked(y, q, levels)
    u = y[:, None] - q
    return np.maximum(tau * u, (tau - 1) * u)


def wis(y: Array, q: Array, levels: Array, *, convention: str) -> np.ndarray:
    """Return the weighted interval score of each row, shape (n,) (eqs 7 and 8).

    Published numbers differ by a factor of up to 2m, so the convention has no default:

    * "sum": 2 * sum of pinball over levels, the paper's definition;
    * "mean": (2 / m) * sum, Bracher et al. 2021 and `scoringutils`; tends to the CRPS as the
      levels get dense;
    * "pinball_mean": (1 / m) * sum, what the authors' code optimises.

    For symmetric levels without the median, "sum" equals the sum over central intervals of
    alpha * `interval_score`. The median counts once, as 2 psi_.5 = |y - median|: half of what
    the degenerate interval alpha = 1 would count. With one quantile level per interval end, all
    levels weigh the same, which is what makes sorting never harmful (Prop 2).

    Parameters
    ----------
    y, q, levels
        As for `pinball`.
    convention : {"sum", "mean", "pinball_mean"}

    Raises
    ------
    ConfigError, DataError
        As for `pinball`; for an unknown convention.
    """
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r}: allowed is one of {', '.join(CONVENTIONS)}")
    psi = pinball(y, q, levels)
    if convention == "sum":
        return 2 * psi.sum(axis=1)
    return (2 if convention == "mean" else 1) * psi.mean(axis=1)


def interval_score(y: Array, lower: Array, upper: Array, alpha: float) -> np.ndarray:
    """Return the score of central (1 - alpha) intervals, shape (n,).

    IS_alpha = (u - l) + (2 / alpha) dist(y, [l, u]), in the unit of y; alpha * IS_alpha is
    2 (psi_{alpha/2}(y - l) + psi_{1 - alpha/2}(y - u)), which also holds when the ends cross.

    Parameters
    ----------
    y, lower, upper : array, shape (n,)
    alpha : float
        In (0, 1]: one minus the nominal coverage.

    Raises
    ------
    ConfigError
        For alpha out of range.
    DataError
        For shapes that do not fit, or values that are not finite.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha={alpha!r}: allowed is > 0 and <= 1")
    y, lower, upper = finite("y", y, 1), finite("lower", lower, 1), finite("upper", upper, 1)
    same_rows("lower", lower, len(y))
    same_rows("upper", upper, len(y))
    outside = np.maximum(lower - y, 0) + np.maximum(y - upper, 0)
    return (upper - lower) + 2 / alpha * outside


def coverage(y: Array, q: Array) -> np.ndarray:
    """Return the share of rows with y <= q at each level, shape (m,); calibrated: the levels.

    Raises
    ------
    DataError
        For shapes that do not fit, or values that are not finite.
    """
    y, q, _ = _checked(y, q, None)
    return (y[:, None] <= q).mean(axis=0)


def interval_coverage(y: Array, q: Array, levels: Array, nominal: float) -> float:
    """Return the share of rows inside the central interval, ends included.

    Parameters
    ----------
    y, q, levels
        As for `pinball`; `levels` must hold (1 - nominal) / 2 and its mirror image.
    nominal : float
        In (0, 1), for example 0.8 for the levels 0.1 and 0.9.

    Raises
    ------
    ConfigError
        When a level of the interval is missing, or nominal is out of range.
    """
    if not 0 < nominal < 1:
        raise ConfigError(f"nominal={nominal!r}: allowed is > 0 and < 1")
    y, q, tau = _checked(y, q, levels)
    low, high = level_index(tau, [(1 - nominal) / 2, (1 + nominal) / 2])
    return float(((q[:, low] <= y) & (y <= q[:, high])).mean())


def crossing_rate(q: Array) -> float:
    """Return the share of neighbouring level pairs, over all rows, with q_k > q_{k+1}.

    One level cannot cross: 0. Ties do not count.

    Raises
    ------
    DataError
        Unless q has shape (n, m) and is finite.
    """
    q = finite("q", q, 2)
    if q.shape[1] == 1:
        return 0.0
    return float((np.diff(q, axis=1) < 0).mean())
