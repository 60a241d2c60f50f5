"""Which rows train and which are held out: shuffled parts, whole groups, or a splitter of scikit-learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, require
from poise_quantagg.checks import is_number


def assign_folds(n: int, folds: int, seed: int) -> np.ndarray:
    """Return a shuffled fold index per row, shape (n,); sizes differ by at most one.

    Raises
    ------
    ConfigError
        Unless 2 <= folds <= n.
    """
    if not 2 <= folds <= n:
        raise ConfigError(f"folds={folds}: allowed is 2 <= folds <= {n} rows")
    fold = np.empty(n, dtype=np.int64)
    fold[np.random.default_rng(seed).permutation(n)] = np.arange(n) % folds
    return fold


def make_folds(
    X: np.ndarray, y: np.ndarray, folds: Any, seed: int, groups: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (training rows, held-out rows) of each fold.

    Raises
    ------
    ConfigError
        For a number of folds that rows or groups do not allow, or a splitter whose parts overlap.
    """
    if not is_number(folds) and not isinstance(folds, (str, float, bool)):
        if hasattr(folds, "split"):
            return _checked(folds.split(X, y, groups), len(y))
        if isinstance(folds, Iterable):
            return _checked(folds, len(y))
    if not is_number(folds):
        raise ConfigError(f"folds={folds!r}: allowed is a number, a splitter with split(X, y, groups), or "
                          f"(training rows, held-out rows) of each fold")
    if groups is None:
        fold = assign_folds(len(y), int(folds), seed)
    else:
        fold = _group_folds(np.asarray(groups), len(y), int(folds), seed)
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(int(folds))]


def folds_of_weighed(
    X: np.ndarray, y: np.ndarray, folds: Any, seed: int, groups: np.ndarray | None, used: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the parts of `make_folds` over the rows `used`, shape (n,), as if there were no others.

    A number deals out those rows alone, and a splitter sees no others. Lists of rows, which name them by
    their place among all, lose those that are not used.

    Raises
    ------
    ConfigError
        As `make_folds`; for a fold whose training rows are none that are used.
    """
    if used.all():
        return make_folds(X, y, folds, seed, groups)
    if not _names_rows(folds):
        rows = np.flatnonzero(used)
        if groups is not None:
            check_groups(groups, len(y))
            groups = np.asarray(groups)[rows]
        parts = make_folds(X[rows], y[rows], folds, seed, groups)
        return [(rows[train], rows[held]) for train, held in parts]
    parts = [tuple(rows[used[rows]] for rows in part) for part in make_folds(X, y, folds, seed, groups)]
    parts = [(train, held) for train, held in parts if len(held)]
    if not parts or not all(len(train) for train, _ in parts):
        raise ConfigError("a fold of cv has rows of weight 0 alone: give other folds, or weights")
    return parts


def check_cv(cv: Any, n: int, apart: bool = False) -> None:
    """Raise `ConfigError` for what makes no folds of n rows, some of which may be set apart at random."""
    if not is_number(cv):
        if isinstance(cv, (str, float, bool)) or not (hasattr(cv, "split") or isinstance(cv, Iterable)):
            raise ConfigError(f"cv={cv!r}: allowed is a number of folds, a splitter with "
                              f"split(X, y, groups), or (training rows, held-out rows) of each fold")
        if apart and bound_to_rows(cv):
            raise ConfigError(f"conformal='split' keeps rows drawn at random away from all fitting, and "
                              f"cv={type(cv).__name__} names rows by their place: use conformal='cv+', "
                              f"or a number of folds")
    elif not 2 <= cv <= n:
        raise ConfigError(f"cv={cv} with {n} rows (n_samples={n}): allowed is 2 <= cv <= rows; "
                          f"give more rows or fewer folds")


def bound_to_rows(splitter: Any) -> bool:
    """Return whether a splitter, or list of splits, names rows by their place: then none may be missing."""
    selection = require("sklearn.model_selection", "quantagg")
    return _names_rows(splitter) or isinstance(splitter, selection.TimeSeriesSplit)


def _names_rows(splitter: Any) -> bool:
    """Return whether folds are lists of rows, on their own or as scikit-learn wraps them."""
    if is_number(splitter) or isinstance(splitter, (str, float, bool)):
        return False
    selection = require("sklearn.model_selection", "quantagg")
    return not hasattr(splitter, "split") or isinstance(splitter, selection.PredefinedSplit) \
        or isinstance(getattr(splitter, "cv", None), list)  # what `check_cv` makes of a list


def _checked(splits: Any, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the parts of a splitter once they can be used.

    Raises
    ------
    ConfigError
        For parts that are no pairs, are empty, name rows that do not exist, hold out a row twice, or train
        on rows that they hold out.
    """
    parts = []
    for split in splits:
        try:
            train, held = (np.asarray(rows) for rows in split)
        except (TypeError, ValueError):
            raise ConfigError("a fold must be (training rows, held-out rows)") from None
        for rows in (train, held):
            if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu" or rows.min() < 0 \
                    or rows.max() >= n:
                raise ConfigError(f"a fold has rows that are no places in 0 to {n - 1}, or none at all: "
                                  f"give whole numbers for both of its parts")
        if len(np.intersect1d(train, held)):
            raise ConfigError("a fold trains on rows that it holds out: their predictions would know y")
        parts.append((train, held))
    if not parts:
        raise ConfigError("the splitter makes no fold: give at least two")
    seen = np.concatenate([held for _, held in parts])
    if len(np.unique(seen)) != len(seen):
        raise ConfigError("the splitter holds out some rows twice: use one without repetition")
    return parts


def check_groups(groups: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the names of the groups in ascending order, and the place of each row's group in them.

    Raises
    ------
    DataError
        For another length than n, or groups that have no order.
    """
    given = np.asarray(groups)
    if given.shape != (n,):
        raise DataError(f"groups has shape {given.shape}, y has {n} rows: one group per row")
    try:
        return np.unique(given, return_inverse=True)
    except TypeError as error:
        raise DataError(f"groups cannot be told apart ({error}): give numbers, or strings") from None


def hold_out(
    n: int, count: int, seed: Any, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` rows drawn at random, or as many whole groups as it takes, and the other rows."""
    rng = np.random.default_rng(seed)
    if groups is None:
        order = rng.permutation(n)
        return np.sort(order[:count]), np.sort(order[count:])
    names, index = check_groups(groups, n)
    rank = rng.permutation(len(names))[index]
    last = np.sort(rank)[count - 1]
    return np.flatnonzero(rank <= last), np.flatnonzero(rank > last)


def calibration_rows(
    n: int, cv: Any, seed: int, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return a fifth of the rows, or as many whole groups as it takes, and the other rows.

    Raises
    ------
    ConfigError
        When too little is left to fit.
    """
    held, rest = hold_out(n, max(1, n // 5), [seed, 3], groups)
    if not len(rest):
        raise ConfigError("conformal='split' keeps whole groups for calibration, and of one group "
                          "nothing is left to fit: give more groups, or groups=None")
    if is_number(cv) and cv > len(rest):
        raise ConfigError(f"cv={cv} with {len(rest)} rows left beside the calibration rows: give "
                          f"more rows or fewer folds")
    return held, rest


def _group_folds(groups: np.ndarray, n: int, folds: int, seed: int) -> np.ndarray:
    """Give whole groups to folds, large ones first, each to the smallest fold so far."""
    names, index = check_groups(groups, n)
    sizes = np.bincount(index)
    if not 2 <= folds <= len(names):
        raise ConfigError(f"folds={folds}: allowed is 2 <= folds <= {len(names)} groups")
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of, filled = np.empty(len(names), dtype=np.int64), np.zeros(folds)
    for g in order:
        fold_of[g] = np.argmin(filled)
        filled[fold_of[g]] += sizes[g]
    return fold_of[index]
