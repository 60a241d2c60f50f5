"""Scores of quantile predictions: pinball, WIS, CRPS, coverage, PIT, crossing, paired comparisons.

`n` rows, `m` levels; losses and lengths have the unit of y. Rows may cross unless a function says
otherwise. Equation numbers refer to arXiv 2103.00083.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise.errors import ConfigError
from poise_quantagg.checks import (
    LEVEL_TOLERANCE,
    check_levels,
    finite,
    level_index,
    open_unit,
    row_blocks,
    row_weights,
    same_rows,
)
from poise_quantagg.comparison import Relative, relative_bootstrap  # noqa: F401 - scores have them too

Array = np.ndarray | Sequence

CONVENTIONS = ("paper", "hub", "mean")


# ------------------------------------------------------------------ pinball


def pinball(
    y: Array, q: Array, levels: Array, *, huber: float = 0.0, sample_weight: Array | None = None
) -> float:
    """Return the mean pinball loss over rows and levels, (1 / nm) sum psi (eq 3).

    Parameters
    ----------
    y, q, levels, huber
        As for `pinball_loss`.
    sample_weight : array, shape (n,), optional
        Weights >= 0 of the rows; only their ratios matter.

    Raises
    ------
    ConfigError, DataError
        As for `pinball_loss`, and for ill-formed weights.
    """
    y, q, tau = _checked(y, q, levels)
    weight = row_weights(sample_weight, len(y))
    return float(np.mean(weight * _row_sums(y, q, tau, _width(huber)))) / tau.size


def pinball_loss(y: Array, q: Array, levels: Array, huber: float = 0.0) -> np.ndarray:
    """Return the pinball loss of each row at each level, shape (n, m) (eq 3).

    psi_tau(u) = max(tau u, (tau - 1) u) with u = y - q; its mean over Y is smallest at the
    tau-quantile of Y. With a half-width a = `huber` > 0, |u| becomes u^2 / 2a for |u| < a and
    |u| - a/2 beyond (the authors' code; the paper has a = 0), which moves the minimiser.

    Parameters
    ----------
    y : array, shape (n,)
    q : array, shape (n, m)
        Predicted quantiles; they may cross.
    levels : array, shape (m,)
        Increasing, in (0, 1).
    huber : float
        Half-width of the quadratic part, in the unit of y; 0 for none.

    Raises
    ------
    ConfigError
        For ill-formed levels or a negative half-width.
    DataError
        For shapes that do not fit, or values that are not finite.
    """
    y, q, tau = _checked(y, q, levels)
    return _psi(y, q, tau, _width(huber))


def _checked(y: Array, q: Array, levels: Array | None, infinite: bool = False) -> tuple[np.ndarray, ...]:
    y, q = finite("y", y, 1), finite("q", q, 2, infinite=infinite)
    same_rows("q", q, len(y))
    return y, q, check_levels(levels, q.shape[1])


def _width(huber: float) -> float:
    if not isinstance(huber, (int, float, np.integer, np.floating)) or not 0 <= huber < np.inf:
        raise ConfigError(f"huber={huber!r}: allowed is a half-width >= 0, in the unit of y")
    return float(huber)


def _psi(y: np.ndarray, q: np.ndarray, tau: np.ndarray, huber: float = 0.0) -> np.ndarray:
    u = y[:, None] - q
    if huber == 0:
        return np.maximum(tau * u, (tau - 1) * u)
    size = np.abs(u)
    size = np.where(size < huber, size * size / (2 * huber), size - huber / 2)
    return np.where(u >= 0, tau, 1 - tau) * size


def _row_sums(y: np.ndarray, q: np.ndarray, tau: np.ndarray, huber: float = 0.0) -> np.ndarray:
    """Sum the losses over levels, shape (n,), without an (n, m) temporary."""
    blocks = row_blocks(len(y), tau.size)
    return np.concatenate([_psi(y[b], q[b], tau, huber).sum(axis=1) for b in blocks])


# ------------------------------------------------------------------ weighted interval score


def wis(y: Array, q: Array, levels: Array, convention: str) -> float:
    """Return the weighted interval score, the mean of `wis_rows` over rows (eqs 7 and 8).

    Parameters, errors and the three conventions are those of `wis_rows`.
    """
    return float(wis_rows(y, q, levels, convention).mean())


def wis_rows(y: Array, q: Array, levels: Array, convention: str) -> np.ndarray:
    """Return the weighted interval score of each row, shape (n,) (eqs 7 and 8).

    Published numbers differ by a factor of up to 2m, so the convention has no default:

    * "paper": 2 * sum of pinball over levels, eq 8;
    * "hub": (2 / m) * sum, Bracher et al. 2021 and `scoringutils`; tends to the CRPS as the levels
      get dense;
    * "mean": (1 / m) * sum, the mean pinball loss that the authors' code optimises.

    For symmetric levels without the median, "paper" equals the sum over central intervals of
    alpha * `interval_score`. The median counts once, as 2 psi_.5 = |y - median|: half of what the
    degenerate interval alpha = 1 would count. All levels weigh the same, which is what makes sorting
    never harmful (Prop 2).

    Parameters
    ----------
    y, q, levels
        As for `pinball_loss`.
    convention : {"paper", "hub", "mean"}

    Raises
    ------
    ConfigError, DataError
        As for `pinball_loss`; for an unknown convention.
    """
    factor = _factor(convention)
    y, q, tau = _checked(y, q, levels)
    return factor(tau.size) * _row_sums(y, q, tau)


def _factor(convention: str):
    factors = {"paper": lambda m: 2.0, "hub": lambda m: 2 / m, "mean": lambda m: 1 / m}
    if convention not in CONVENTIONS:
        raise ConfigError(f"convention={convention!r}: allowed is one of {', '.join(CONVENTIONS)}")
    return factors[convention]


def wis_decomposition(y: Array, q: Array, levels: Array, convention: str) -> dict[str, float]:
    """Split the WIS into width, and misses on either side; the three parts sum to `wis`.

    The levels alpha/2 and 1 - alpha/2 form the central interval [l, u], and their two losses are
    2 (psi_{alpha/2} + psi_{1 - alpha/2}) = alpha (u - l) + 2 (l - y)+ + 2 (y - u)+. The first term is
    dispersion, the second overprediction (y below the interval), the third underprediction. The
    median has no width: |y - median| is over- or underprediction. Source: Bracher et al. 2021.

    Parameters
    ----------
    y, q, levels, convention
        As for `wis_rows`. `levels` must be mirror pairs around 0.5, with or without 0.5. Where the
        ends of an interval cross, its dispersion is negative; the sum still holds.

    Returns
    -------
    dict
        "dispersion", "under" and "over", means over rows in the unit of y.

    Raises
    ------
    ConfigError, DataError
        As for `wis_rows`; for levels that are not mirror pairs.
    """
    factor = _factor(convention)
    y, q, tau = _checked(y, q, levels)
    if np.abs(tau + tau[::-1] - 1).max() > LEVEL_TOLERANCE:
        raise ConfigError(f"levels={np.round(tau, 6).tolist()}: allowed are mirror pairs around 0.5")
    m = tau.size
    half, middle = m // 2, m // 2 if m % 2 else None
    low, high, column = q[:, :half], q[:, ::-1][:, :half], y[:, None]
    dispersion = (2 * tau[:half] * (high - low)).sum(axis=1)
    over = 2 * np.maximum(low - column, 0).sum(axis=1)
    under = 2 * np.maximum(column - high, 0).sum(axis=1)
    if middle is not None:
        over = over + np.maximum(q[:, middle] - y, 0)
        under = under + np.maximum(y - q[:, middle], 0)
    scale = factor(m) / 2
    parts = {"dispersion": dispersion, "under": under, "over": over}
    return {name: float(scale * part.mean()) for name, part in parts.items()}


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
    if not isinstance(alpha, (int, float, np.integer, np.floating)) or not 0 < alpha <= 1:
        raise ConfigError(f"alpha={alpha!r}: allowed is > 0 and <= 1")
    y, lower, upper = finite("y", y, 1), finite("lower", lower, 1), finite("upper", upper, 1)
    same_rows("lower", lower, len(y))
    same_rows("upper", upper, len(y))
    outside = np.maximum(lower - y, 0) + np.maximum(y - upper, 0)
    return (upper - lower) + 2 / alpha * outside


# ------------------------------------------------------------------ CRPS


def crps_grid(y: Array, q: Array, levels: Array) -> np.ndarray:
    """Return the CRPS of each row from quantiles on any grid of levels, shape (n,) (eqs 5 and 6).

    CRPS = 2 * integral over (0, 1) of psi_tau(y - F^-1(tau)), by the trapezoid rule over the levels
    0, tau_1, ..., tau_m, 1, with the outer quantiles carried to the ends (F^-1 is flat below tau_1 and
    above tau_m). Exact when all quantiles of a row are equal: then it is |y - q|.

    Parameters, errors
        As for `pinball_loss`.
    """
    y, q, tau = _checked(y, q, levels)
    grid = np.concatenate([[0.0], tau, [1.0]])
    weight = np.convolve(np.diff(grid), [1.0, 1.0])  # twice the trapezoid weights
    inner = _psi(y, q, tau) @ weight[1:-1]
    below, above = np.maximum(q[:, 0] - y, 0), np.maximum(y - q[:, -1], 0)  # psi_0 and psi_1
    return inner + weight[0] * below + weight[-1] * above


def crps_samples(y: Array, samples: Array) -> np.ndarray:
    """Return the CRPS of each row against the empirical distribution of its samples, shape (n,).

    mean |x_i - y| - (1/2) mean |x_i - x_j|, the second mean over all s^2 pairs (the V-statistic: the
    exact CRPS of the step function, not the unbiased estimate for the law behind the samples). Sorting
    gives it in O(s log s): sum_ij |x_i - x_j| = 2 sum_k (2k - s - 1) x_(k).

    Parameters
    ----------
    y : array, shape (n,)
    samples : array, shape (n, s)

    Raises
    ------
    DataError
        For shapes that do not fit, or values that are not finite.
    """
    y, samples = finite("y", y, 1), finite("samples", samples, 2)
    same_rows("samples", samples, len(y))
    s = samples.shape[1]
    rank = 2 * np.arange(1, s + 1) - s - 1
    out = np.empty(len(y))
    for block in row_blocks(len(y), s):
        x = np.sort(samples[block] - y[block, None], axis=1)
        out[block] = np.abs(x).mean(axis=1) - (x @ rank) / s**2
    return out


# ------------------------------------------------------------------ calibration


def coverage(y: Array, q: Array) -> np.ndarray:
    """Return the share of rows with y <= q at each level, shape (m,); calibrated: the levels.

    Infinite quantiles, as of a conformal interval with too few rows, are allowed.

    Raises
    ------
    DataError
        For shapes that do not fit, a y that is not finite, or NaN.
    """
    y, q, _ = _checked(y, q, None, infinite=True)
    counts = [(y[b, None] <= q[b]).sum(axis=0) for b in row_blocks(*q.shape)]
    return np.sum(counts, axis=0) / len(y)


def interval_coverage(y: Array, q: Array, levels: Array, nominal: float) -> float:
    """Return the share of rows inside the central interval, ends included.

    Parameters
    ----------
    y, q, levels
        As for `pinball_loss`; `levels` must hold (1 - nominal) / 2 and its mirror image. Infinite
        quantiles are allowed.
    nominal : float
        In (0, 1), for example 0.8 for the levels 0.1 and 0.9.

    Raises
    ------
    ConfigError
        When a level of the interval is missing, or nominal is out of range.
    """
    y, q, tau = _checked(y, q, levels, infinite=True)
    low, high = _ends(tau, nominal)
    return float(((q[:, low] <= y) & (y <= q[:, high])).mean())


def interval_length(q: Array, levels: Array, nominal: float) -> float:
    """Return the mean length u - l of the central interval, in the unit of y.

    Negative parts of rows whose ends cross count as they are. Infinite ends give inf.

    Parameters, errors
        As for `interval_coverage`.
    """
    q = finite("q", q, 2, infinite=True)
    low, high = _ends(check_levels(levels, q.shape[1]), nominal)
    return float((q[:, high] - q[:, low]).mean())


def _ends(tau: np.ndarray, nominal: float) -> np.ndarray:
    nominal = open_unit("nominal", nominal)
    return level_index(tau, [(1 - nominal) / 2, (1 + nominal) / 2])


def pit(y: Array, q: Array, levels: Array) -> np.ndarray:
    """Return the probability integral transform F(y) of each row, shape (n,), in [0, 1].

    Rows are sorted first. Between two quantiles F is linear. Beyond the outer ones it goes on with
    the slope of the outer segment, clipped to [0, tau_1] below and [tau_m, 1] above; with one level
    there is no slope, and the middle of that range is returned. A y equal to several quantiles gets
    the middle of their levels. Calibrated: uniform.

    Parameters, errors
        As for `pinball_loss`.
    """
    y, q, tau = _checked(y, q, levels)
    q, column = np.sort(q, axis=1), y[:, None]
    below, upto = (q < column).sum(axis=1), (q <= column).sum(axis=1)
    rows, m = np.arange(len(y)), tau.size
    tied = (tau[np.minimum(below, m - 1)] + tau[np.maximum(upto - 1, 0)]) / 2
    if m == 1:
        free = np.where(below == 0, tau[0] / 2, (1 + tau[0]) / 2)
        return np.where(upto > below, tied, free)
    k = np.clip(below, 1, m - 1)  # the segment from k - 1 to k
    rise, run = tau[k] - tau[k - 1], q[rows, k] - q[rows, k - 1]
    base = np.where(below >= m, k, k - 1)  # continue from the end that is nearer to y
    gap = y - q[rows, base]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step = np.where(run > 0, gap * (rise / run), np.sign(gap) * np.inf)
    low = np.where(below == 0, 0.0, tau[np.maximum(below - 1, 0)])
    high = np.where(below >= m, 1.0, tau[np.minimum(below, m - 1)])
    return np.where(upto > below, tied, np.clip(tau[base] + step, low, high))


# ------------------------------------------------------------------ crossing


def crossing_rate(q: Array) -> float:
    """Return the share of neighbouring level pairs, over all rows, with q_k > q_{k+1}.

    One level cannot cross: 0. Ties do not count.

    Raises
    ------
    DataError
        Unless q has shape (n, m) and is finite.
    """
    return _pair_mean(q, lambda step: step < 0)


def crossing_depth(q: Array) -> float:
    """Return the mean of (q_k - q_{k+1})+ over neighbouring level pairs and rows, in the unit of y.

    Raises
    ------
    DataError
        Unless q has shape (n, m) and is finite.
    """
    return _pair_mean(q, lambda step: np.maximum(-step, 0.0))


def _pair_mean(q: Array, value) -> float:
    q = finite("q", q, 2)
    n, m = q.shape
    if m == 1:
        return 0.0
    total = sum(float(value(np.diff(q[b], axis=1)).sum()) for b in row_blocks(n, m))
    return total / (n * (m - 1))
