"""Checks of arrays at the border: each failure is one line with what was given and expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from poise.errors import ConfigError, DataError

LEVEL_TOLERANCE = 1e-9
BLOCK_NUMBERS = 1 << 17  # one megabyte of float64
SHOWN_ROWS = 3


class QuantileWarning(UserWarning):
    """A result that is computed as asked, but without the guarantee one might expect of it."""


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
        For levels that are no numbers, empty, out of range, not increasing or not m of them.
    """
    if levels is None:
        if m is None:
            raise ConfigError("levels are missing: give increasing numbers in (0, 1)")
        return np.arange(1, m + 1) / (m + 1)
    tau = _level_numbers(levels)
    # written so that NaN fails too
    if tau.ndim != 1 or tau.size == 0 or not (np.all(tau > 0) and np.all(tau < 1)):
        raise ConfigError(f"levels={tau.tolist()}: allowed are numbers in (0, 1)")
    if np.any(np.diff(tau) <= 0):
        raise ConfigError(f"levels={tau.tolist()}: allowed are strictly increasing numbers")
    if m is not None and tau.size != m:
        raise ConfigError(f"{tau.size} levels given for predictions at {m} levels")
    return tau


def _level_numbers(levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return float64; a float32 level is the decimal that it prints as: 0.1, not 0.10000000149."""
    try:
        given = np.atleast_1d(np.asarray(levels))
        if given.dtype.kind in "US":
            raise TypeError("text")
        if given.dtype.kind == "f" and given.dtype.itemsize < 8:
            return np.array([float(str(t)) for t in given.ravel()]).reshape(given.shape)
        return np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        raise ConfigError(f"levels={levels!r}: allowed are increasing numbers in (0, 1)") from None


def is_number(value: Any) -> TypeGuard[int]:
    """Return whether a value is a whole number; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def open_unit(name: str, value: float) -> float:
    """Return a number in (0, 1).

    Raises
    ------
    ConfigError
        For anything else.
    """
    if not isinstance(value, (int, float, np.integer, np.floating)) or not 0 < value < 1:
        raise ConfigError(f"{name}={value!r}: allowed is > 0 and < 1")
    return float(value)


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
            needed = ", ".join(f"{t:g}" for t in np.atleast_1d(wanted))
            raise ConfigError(f"level {value:g} is not among {np.round(levels, 6).tolist()}: {needed} "
                              f"{'are' if len(np.atleast_1d(wanted)) > 1 else 'is'} needed")
    return distance.argmin(axis=0)


def finite(
    name: str,
    array: np.ndarray | Sequence,
    ndim: int | None,
    *,
    infinite: bool = False,
    keep_float32: bool = False,
) -> np.ndarray:
    """Return a finite float64 array of `ndim` axes with at least one element.

    A float64 array comes back as it is, without a copy; the check looks at a block of rows at a
    time, so that an array of gigabytes needs about a megabyte more.

    Parameters
    ----------
    name : str
        What messages call the array.
    array : array or nested sequence of numbers
    ndim : int or None
        How many axes it must have; None allows any number but 0.
    infinite : bool
        Also allow -inf and inf, the ends of a conformal interval; NaN stays refused.
    keep_float32 : bool
        Leave a float32 array in float32, uncopied.

    Raises
    ------
    DataError
        Naming the array, what is wrong with it, the first bad position, and the bad rows.
    """
    out = _numbers(name, array, keep_float32)
    if (out.ndim != ndim if ndim is not None else out.ndim == 0) or out.size == 0:
        axes = f"{ndim} axes" if ndim is not None else "1 axis or more"
        raise DataError(f"{name} has shape {out.shape}: allowed are {axes}, none empty")
    bad = bad_rows(out, infinite)
    if bad.size:
        raise DataError(_not_finite(name, out, bad, infinite))
    return out


def finite_where_numbers(name: str, array: Any) -> None:
    """Raise `DataError` for NaN or Inf in features that are given though nobody needs them."""
    given = np.asarray(array)
    if given.dtype.kind == "f" and given.size:
        finite(name, given, None, keep_float32=True)


def refuse_not_finite(**arrays: Any) -> None:
    """Raise `DataError` with the rows that hold NaN or Inf; all else is for scikit-learn's checks."""
    for name, given in arrays.items():
        array = np.asarray(given)
        if array.dtype.kind == "O":  # frames of several types
            try:
                array = array.astype(float)
            except (TypeError, ValueError):
                continue
        if array.dtype.kind == "f" and array.size and array.ndim:
            finite(name, array, None, keep_float32=True)


def _numbers(name: str, array: np.ndarray | Sequence, keep_float32: bool) -> np.ndarray:
    try:
        if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
            raise TypeError("some values are masked")
        given = np.asarray(array)
        if given.dtype.kind in "cmM":
            raise TypeError("complex numbers" if given.dtype.kind == "c" else "dates or durations")
        return given if keep_float32 and given.dtype == np.float32 else np.asarray(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not an array of real numbers: {error}") from None


def bad_rows(array: np.ndarray, infinite: bool = False) -> np.ndarray:
    """Return the indices along the first axis of rows with NaN (or, unless allowed, infinity)."""
    bad = [
        block.start + np.flatnonzero(~_good(array[block], infinite).reshape(len(array[block]), -1).all(1))
        for block in row_blocks(len(array), array[0].size)
    ]
    return np.concatenate(bad)


def row_blocks(n: int, width: int, numbers: int = BLOCK_NUMBERS) -> list[slice]:
    """Return slices that cover n rows of `width` numbers, each about `numbers` numbers large."""
    step = max(1, numbers // max(width, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _good(array: np.ndarray, infinite: bool) -> np.ndarray:
    return ~np.isnan(array) if infinite else np.isfinite(array)


def _not_finite(name: str, array: np.ndarray, rows: np.ndarray, infinite: bool) -> str:
    row, what = array[rows[0]], "NaN" if infinite else "NaN or Inf"
    at = (int(rows[0]), *(int(i) for i in np.argwhere(~_good(row, infinite))[0]))
    shown = ", ".join(str(int(i)) for i in rows[:SHOWN_ROWS])
    count = f"1 row, {shown}" if rows.size == 1 else f"{rows.size} rows, first rows {shown}"
    allowed = "no value may be NaN" if infinite else "every value must be finite"
    return f"{name}{list(at)} is {array[at]}; {name} has {what} in {count}: {allowed}"


def same_rows(name: str, array: np.ndarray, n: int, of: str = "y") -> None:
    """Raise `DataError` unless the first axis has length n."""
    if len(array) != n:
        raise DataError(f"{name} has {len(array)} rows and {of} has {n}: they must be equal")


def row_weights(sample_weight: np.ndarray | Sequence | None, n: int) -> np.ndarray:
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
    with np.errstate(over="ignore"):
        if np.isinf(weight.sum()):
            weight = weight / weight.max()
    return np.ones(n) if weight.min() == weight.max() else weight / weight.mean()  # not 1 - 1e-16


def differing(weight: np.ndarray | None) -> np.ndarray | None:
    """Return positive weights where they differ, else None: equal ones say nothing.

    Many a library takes another path with weights than without them, and ends elsewhere.
    """
    return None if weight is None or weight.min() == weight.max() else weight


def weighing_rows(sample_weight: np.ndarray | Sequence, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows have a positive weight, (n,), bool, and those weights with mean 1.

    Raises
    ------
    DataError
        As `row_weights`.
    """
    used = row_weights(sample_weight, n) > 0
    return used, row_weights(np.asarray(sample_weight)[used], int(used.sum()))


@dataclass(frozen=True)
class FitRows:
    """Checked rows for fitting an aggregator, without those of weight 0.

    Parameters
    ----------
    Z : array, shape (n, p, m)
    y, s : array, shape (n,)
        Targets, and positive row weights with mean 1.
    X : array, shape (n, d), or None
    levels : array, shape (m,)
    validation : (Z, y, X) or None
    """

    Z: np.ndarray
    y: np.ndarray
    X: np.ndarray | None
    levels: np.ndarray
    s: np.ndarray
    validation: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None


def fit_rows(
    Z, y, X, levels, validation, sample_weight, needs_features: bool, *, keep_float32: bool = False
) -> FitRows:
    """Return the checked rows for fitting an aggregator, nothing copied that need not be.

    With `keep_float32` a float32 Z stays one; all else becomes float64. Rows of weight 0 leave here: they
    count in no mean, number of rows or choice of an aggregator.

    Raises
    ------
    ConfigError, DataError
        See `check_levels`, `finite`, `row_weights`; for features that are needed and missing.
    """
    Z, y, X = _rows("", Z, y, X, needs_features, keep_float32)
    tau = check_levels(levels, Z.shape[2])
    held = None
    if validation is not None:
        if not isinstance(validation, (tuple, list)) or len(validation) not in (2, 3):
            raise DataError("validation must be (Z, y) or (Z, y, X)")
        features = validation[2] if len(validation) == 3 else None
        held = _rows("validation ", validation[0], validation[1], features, needs_features)
        if held[0].shape[1:] != Z.shape[1:]:
            raise DataError(f"validation Z has shape {held[0].shape}, Z has {Z.shape}: models and levels "
                            f"must be the same")
        if X is not None and held[2] is not None and held[2].shape[1] != X.shape[1]:
            raise DataError(f"validation X has {held[2].shape[1]} features; X has {X.shape[1]}")
    if sample_weight is None:
        return FitRows(Z, y, X, tau, np.ones(len(y)), held)
    used, s = weighing_rows(sample_weight, len(y))
    if not used.all():
        Z, y, X = Z[used], y[used], None if X is None else X[used]
    return FitRows(Z, y, X, tau, s, held)


def _rows(what: str, Z, y, X, needs_features: bool, keep_float32: bool = False):
    Z, y = finite(f"{what}Z", Z, 3, keep_float32=keep_float32), finite(f"{what}y", y, 1)
    same_rows(f"{what}Z", Z, len(y), f"{what}y")
    if not needs_features:
        if X is not None:
            same_rows(f"{what}X", np.asarray(X), len(y), f"{what}y")
            finite_where_numbers(f"{what}X", X)
        return Z, y, None
    if X is None:
        raise DataError(f"weights that depend on the features need them: give {what}X, shape (n, d)")
    X = finite(f"{what}X", X, 2)
    same_rows(f"{what}X", X, len(y), f"{what}y")
    return Z, y, X
