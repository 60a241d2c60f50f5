"""What the calibrations share: ranks, and checks of rows, levels and options."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from poise.errors import ConfigError
from poise_quantagg.checks import (
    LEVEL_TOLERANCE,
    QuantileWarning,
    check_levels,
    finite,
    level_index,
    open_unit,
    same_rows,
)

Array = np.ndarray | Sequence

RANK_TOLERANCE = 1e-9  # 0.7 * 10 is 7.000000000000001 or 6.999...: both mean the rank 7


def upper_rank(level: float, n: int) -> int:
    """Return ceil(level * (n + 1)), tolerant to rounding; more than n stands for infinity."""
    return math.ceil(level * (n + 1) - RANK_TOLERANCE)


def lower_rank(level: float, n: int) -> int:
    """Return floor(level * (n + 1)), tolerant to rounding; 0 stands for minus infinity."""
    return math.floor(level * (n + 1) + RANK_TOLERANCE)


def fitted_levels(calibration: Any) -> np.ndarray:
    if not hasattr(calibration, "levels_"):
        raise ConfigError(f"{type(calibration).__name__} is not fitted: call fit first")
    return calibration.levels_


def calibration_rows(y: Array, q: Array, levels: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, q = finite("y", y, 1), finite("q", q, 2)
    same_rows("q", q, len(y))
    return y, q, check_levels(levels, q.shape[1])


def check_flags(calibration: Any) -> None:
    """Raise `ConfigError` for options that are neither True nor False: any text would count as True."""
    for name in ("symmetric", "sweep"):
        value = getattr(calibration, name)
        if not isinstance(value, (bool, np.bool_)):
            raise ConfigError(f"{type(calibration).__name__}: {name}={value!r}: allowed is True or False")


def mirror_pairs(tau: np.ndarray) -> list[tuple[int, int]]:
    """Return positions (low, high) of tau and 1 - tau, outermost first."""
    if np.abs(tau + tau[::-1] - 1).max() > LEVEL_TOLERANCE:
        raise ConfigError(f"levels={np.round(tau, 6).tolist()}: allowed are mirror pairs around 0.5; "
                          "OneSided calibrates any levels")
    return [(k, len(tau) - 1 - k) for k in range(len(tau) // 2)]


def interval_ends(tau: np.ndarray, alpha: float) -> np.ndarray:
    alpha = open_unit("alpha", alpha)
    return level_index(tau, [alpha / 2, 1 - alpha / 2])


def warn_infinite(tau: np.ndarray, offset: np.ndarray, n: int) -> None:
    bad = tau[np.isinf(offset)]
    if bad.size:
        names = ", ".join(f"{t:g}" for t in bad)
        warnings.warn(f"{n} calibration rows are too few for the levels {names}: their ends are infinite; "
                      "give more rows or levels nearer to 0.5", QuantileWarning, stacklevel=3)
