"""What theory promises of the coverage."""

from __future__ import annotations

from poise.errors import ConfigError, require
from poise_quantagg.conformal.parts import upper_rank


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
