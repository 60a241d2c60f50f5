"""Out-of-fold predictions (eq 15): what an aggregator must be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, require
from poise_quantagg.checks import check_levels, finite, same_rows


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold predictions, and the models fitted on all rows.

    Parameters
    ----------
    Z : array, shape (n, p, m)
        Z[i, j] comes from model j fitted without the fold of row i; in the unit of y.
    fold : array, shape (n,), int
        The fold of each row.
    levels : array, shape (m,)
    models : dict of name to fitted regressor
        Fitted on all n rows, for new rows; in the order of Z's second axis.
    """

    Z: np.ndarray
    fold: np.ndarray
    levels: np.ndarray
    models: dict[str, Any]

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the predictions of the models fitted on all rows, shape (len(X), p, m).

        Raises
        ------
        DataError
            When a model returns another shape, or values that are not finite.
        """
        return np.stack(
            [_quantiles(name, f, X, self.levels) for name, f in self.models.items()], axis=1
        )


def cross_fit(
    models: Mapping[str, Any],
    X: np.ndarray,
    y: np.ndarray,
    levels: Sequence[float] | np.ndarray,
    *,
    folds: int = 5,
    seed: int = 0,
    n_jobs: int = 1,
    progress: Callable[[str], None] | None = None,
) -> CrossFit:
    """Predict every row once by models that have not seen it, then fit on all rows.

    Parameters
    ----------
    models : mapping of name to component
        Quantile models; an option `levels` is set to `levels`.
    X : array, shape (n, d)
    y : array, shape (n,)
    levels : sequence of float, shape (m,)
        Increasing, in (0, 1).
    folds : int
        Parts of nearly equal size, 2..n; rows are shuffled first (the paper: K = 5).
    seed : int
        Decides the folds, and nothing else.
    n_jobs : int
        Processes of joblib; its backend can be chosen by `joblib.parallel_config`. The result
        does not depend on it.
    progress : callable, optional
        Called with "model, fold k/K" or "model, all rows" after each of the p (folds + 1) fits.

    Raises
    ------
    ConfigError
        Without models; for ill-formed levels; for folds out of range.
    DataError
        For shapes that do not fit, or values that are not finite, in the input or a prediction.
    """
    X, y, tau = finite("X", X, 2), finite("y", y, 1), check_levels(levels)
    same_rows("X", X, len(y))
    if not models:
        raise ConfigError("no models to cross-fit: give at least one")
    fold = assign_folds(len(y), folds, seed)
    models = {name: _with_levels(model, tau) for name, model in models.items()}
    jobs = [(name, k) for name in models for k in (*range(folds), None)]
    joblib = require("joblib", "quantagg")
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(_fit)((name, models[name]), X, y, tau, None if k is None else fold == k)
        for name, k in jobs
    )
    Z, fitted = np.full((len(y), len(models), len(tau)), np.nan), {}
    column = {name: j for j, name in enumerate(models)}
    for (name, k), result in zip(jobs, results):
        if k is None:
            fitted[name] = result
        else:
            Z[fold == k, column[name]] = result
        if progress:
            progress(f"{name}, " + ("all rows" if k is None else f"fold {k + 1}/{folds}"))
    return CrossFit(Z, fold, tau, fitted)


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


def _with_levels(model: Any, levels: np.ndarray) -> Any:
    if any(f.name == "levels" for f in dataclasses.fields(model)):
        return dataclasses.replace(model, levels=levels.tolist())
    return model


def _fit(job, X, y, levels, held_out):
    """Return out-of-fold predictions, or without `held_out` the model fitted on all rows."""
    name, model = job
    # one thread per process: many small fits side by side beat a few wide ones
    with require("threadpoolctl", "quantagg").threadpool_limits(1):
        if held_out is None:
            return model.build().fit(X, y)
        fitted = model.build().fit(X[~held_out], y[~held_out])
        return _quantiles(name, fitted, X[held_out], levels)


def _quantiles(name: str, fitted: Any, X: np.ndarray, levels: np.ndarray) -> np.ndarray:
    q = finite(f"prediction of {name}", fitted.predict_quantiles(X, levels), 2)
    if q.shape != (len(X), len(levels)):
        raise DataError(f"{name} predicts shape {q.shape}, not {(len(X), len(levels))}")
    return q
