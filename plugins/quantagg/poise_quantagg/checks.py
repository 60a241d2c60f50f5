"""Checks of arrays at the border: each failure is one line with what was given and expected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from poise.errors import ConfigError, DataError

LEVEL_TOLERANCE = 1e-9


def check_levels(levels: Sequence[float] | np.ndarray | None, m: int | None = None) -> np.ndarray:
    """Return levels as float64, shape (m,).

    Parameters
    ----------
    levels : sequence of float or None
        Increasing, in (0, 1); None stands for k / (m + 1), k = 1..m.
    m : int, optional
        How many there must be.

    Raises
    ------
    ConfigError
        For levels that are empty, out of range, not increasing or not m of them.
    """
    if levels is None:
        if m is None:
            raise ConfigError("levels are missing: give increasing numbers in (0, 1)")
        return np.arange(1, m + 1) / (m + 1)
    tau = np.atleast_1d(np.asarray(levels, dtype=float))
    # written so that NaN fails too
    if tau.ndim != 1 or tau.size == 0 or not (np.all(tau > 0) and np.all(tau < 1)):
        raise ConfigError(f"levels={levels!r}: allowed are numbers in (0, 1)")
    if np.any(np.diff(tau) <= 0):
        raise ConfigError(f"levels={levels!r}: allowed are strictly increasing numbers")
    if m is not None and tau.size != m:
        raise ConfigError(f"{tau.size} levels given for predictions at {m} levels")
    return tau


def level_index(levels: np.ndarray, wanted: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the positions of `wanted` in `levels`, tolerant to rounding (0.1 + 0.2 is 0.3).

    Raises
    ------
    ConfigError
        For a level that is not there, with those that are.
    """
    distance = np.abs(levels[:, None] - np.atleast_1d(np.asarray(wanted, dtype=float))[None, :])
    for column, value in zip(distance.T, np.atleast_1d(wanted)):
        if column.min() > LEVEL_TOLERANCE:
            raise ConfigError(f"level {value:g} is not among {np.round(levels, 6).tolist()}")
    return distance.argmin(axis=0)


def finite(name: str, array: np.ndarray | Sequence, ndim: int) -> np.ndarray:
    """Return a finite float64 array of `ndim` axes with at least one element.

    Raises
    ------
    DataError
        Naming the array and what is wrong with it.
    """
    try:
        out = np.asarray(array, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not an array of numbers: {error}") from None
    if out.ndim != ndim or out.size == 0:
        raise DataError(f"{name} has shape {out.shape}: allowed are {ndim} axes, none empty")
    if not np.isfinite(out).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(out))[0])
        raise DataError(f"{name}{list(bad)} is {out[bad]}: every value must be finite")
    return out


def same_rows(name: str, array: np.ndarray, n: int) -> None:
    """Raise `DataError` unless the first axis has length n."""
    if len(array) != n:
        raise DataError(f"{name} has {len(array)} rows and y has {n}: they must be equal")


def row_weights(sample_weight: np.ndarray | None, n: int) -> np.ndarray:
    """Return non-negative row weights, shape (n,), with mean 1.

    Raises
    ------
    DataError
        For a wrong length, a negative weight, or no positive one.
    """
    if sample_weight is None:
        return np.ones(n)
    weight = finite("sample_weight", sample_weight, 1)
    same_rows("sample_weight", weight, n)
    if weight.min() < 0 or weight.max() == 0:
        raise DataError("sample_weight: allowed are weights >= 0 with at least one > 0")
    return weight / weight.mean()


def fit_arrays(Z, y, levels, sample_weight) -> tuple[np.ndarray, ...]:
    """Return checked (Z, y, levels, sample_weight) for fitting an aggregator.

    Raises
    ------
    ConfigError, DataError
        See `check_levels`, `finite`, `row_weights`.
    """
    Z, y = finite("Z", Z, 3), finite("y", y, 1)
    same_rows("Z", Z, len(y))
    return Z, y, check_levels(levels, Z.shape[2]), row_weights(sample_weight, len(y))
