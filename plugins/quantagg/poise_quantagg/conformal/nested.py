"""The folds of nested CV+: which pairs are left out, and what the weights of each fold are fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import finite
from poise_quantagg.conformal.parts import Array


def nested_pairs(n_folds: int) -> list[tuple[int, int]]:
    """Return the K(K - 1)/2 pairs of folds (k, l), k < l, that nested CV+ leaves out.

    Raises
    ------
    ConfigError
        For fewer than 3 folds: with 2, a model without both would have no rows.
    """
    if n_folds < 3:
        raise ConfigError(f"n_folds={n_folds!r}: nested CV+ needs at least 3")
    return list(combinations(range(n_folds), 2))


def nested_fold_arrays(
    pair_predictions: Mapping[tuple[int, int], Array], fold: Array
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each outer fold k the rows outside it and their predictions, for the aggregator w^{-k}.

    Parameters
    ----------
    pair_predictions : dict of (k, l) -> array, shape (rows of folds k and l, p, m)
        For every pair of `nested_pairs`; predictions of models fitted without both folds, for the rows
        of both, in the order of the rows.
    fold : array of int, shape (n,)
        From 0 to K - 1.

    Yields
    ------
    rows : array of int, shape (n_k,)
        Positions outside fold k, increasing.
    Z : array, shape (n_k, p, m)
        Row i predicted without folds k and fold[i].

    Raises
    ------
    ConfigError
        For fewer than 3 folds.
    DataError
        For a pair that is missing, shapes that do not fit, or values that are not finite.
    """
    where, n_folds = check_folds(fold, len(fold))
    pairs, shapes = {}, set()
    for k, l in nested_pairs(n_folds):
        name = f"pair_predictions[{k}, {l}]"
        if (k, l) not in pair_predictions:
            raise DataError(f"{name} is missing: give every pair k < l of {n_folds} folds")
        pairs[k, l] = finite(name, pair_predictions[k, l], 3, keep_float32=True)
        expected = int(np.isin(where, (k, l)).sum())
        if len(pairs[k, l]) != expected:
            raise DataError(f"{name} has {len(pairs[k, l])} rows: folds {k} and {l} have {expected}")
        shapes.add(pairs[k, l].shape[1:])
    if len(shapes) > 1:
        raise DataError(f"pair_predictions have models and levels {sorted(shapes)}: they must be equal")
    return _nested_arrays(pairs, where, n_folds)


def _nested_arrays(pairs, fold: np.ndarray, n_folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(n_folds):
        rows = np.flatnonzero(fold != k)
        first = next(iter(pairs.values()))
        Z = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for l in range(n_folds):
            if l != k:
                own = fold[np.isin(fold, (k, l))] == l
                Z[fold[rows] == l] = pairs[min(k, l), max(k, l)][own]
        yield rows, Z


def check_folds(fold: Array, n: int) -> tuple[np.ndarray, int]:
    """Return the fold of each row, shape (n,), int, and their number K >= 2.

    Raises
    ------
    DataError
        For another length, folds that are not 0..K-1, an empty one, or only one.
    """
    given = np.asarray(fold)
    if given.shape != (n,) or given.dtype.kind not in "iu" or given.min() != 0:
        lowest = f", smallest {given.min()}" if given.dtype.kind in "iu" and given.size else ""
        raise DataError(f"fold has shape {given.shape}, {given.dtype}{lowest}: allowed are {n} integers "
                        f"from 0 to K - 1")
    there = np.unique(given)
    if len(there) < 2 or there[-1] != len(there) - 1:
        raise DataError(f"there are {len(there)} folds, the last is number {there[-1]}: allowed are two or "
                        f"more from 0 to K - 1, none of them empty")
    return given.astype(np.intp), len(there)
