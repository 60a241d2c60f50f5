"""Out-of-fold predictions (eq 15): what an aggregator must be trained on.

Models x folds x blocks of levels are independent jobs (`jobs.py`), run by joblib (choose another backend
with `joblib.parallel_config`). With a cache directory (`cache.py`) an interrupted fit goes on where it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, RunError, require
from poise_quantagg.cache import key_of, load, save
from poise_quantagg.checks import (
    QuantileWarning,
    check_levels,
    differing,
    finite,
    same_rows,
    weighing_rows,
)
from poise_quantagg.folds import folds_of_weighed
from poise_quantagg.grid import interpolate, mean_of_folds
from poise_quantagg.jobs import Job, Result, Work, fit, jobs_of, label, quantiles_of
from poise_quantagg.scores import pinball

REFITS = ("bag", "all")


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold predictions, and the models of the folds.

    Parameters
    ----------
    Z : array, shape (n, p, m)
        Z[i, j] comes from model j fitted without the fold of row i; in the unit of y. NaN for rows
        that no fold held out (`fold` -1: early rows of time splits, rows of weight 0).
    fold : array, shape (n,), int
    levels : array, shape (m,)
    models : dict of name to fitted regressors, one per fold
        In the order of Z's second axis.
    whole : dict of name to fitted regressor
        Fitted on all rows, with refit="all"; empty otherwise.
    extra : array, shape (n', p, m), optional
        Predictions for the rows given as `extra`.
    failures : dict of name to reason
        Models that were left out.
    """

    Z: np.ndarray
    fold: np.ndarray
    levels: np.ndarray
    models: dict[str, list[Any]]
    whole: dict[str, Any] = field(default_factory=dict)
    extra: np.ndarray | None = None
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def covered(self) -> np.ndarray:
        """Which rows have out-of-fold predictions, shape (n,), bool."""
        return self.fold >= 0

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return predictions for new rows, shape (len(X), p, m).

        The models fitted on all rows where there are such, otherwise the mean over the models of the
        folds (bagging).

        Raises
        ------
        DataError
            When a model returns another shape, or values that are not finite.
        """
        if self.whole:
            return np.stack([quantiles_of(n, f, X, self.levels) for n, f in self.whole.items()], axis=1)
        return mean_of_folds(self.predict_folds(X))

    def predict_folds(self, X: np.ndarray) -> np.ndarray:
        """Return the predictions of each fold's models, shape (K, len(X), p, m)."""
        return np.stack([
            np.stack([quantiles_of(name, f, X, self.levels) for f in fits])
            for name, fits in self.models.items()
        ], axis=2)


def cross_fit(
    models: Mapping[str, Any],
    X: np.ndarray,
    y: np.ndarray,
    levels: Sequence[float] | np.ndarray,
    *,
    folds: int | Any = 5,
    seed: int = 0,
    n_jobs: int = 1,
    sample_weight: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    refit: str = "bag",
    extra: np.ndarray | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> CrossFit:
    """Predict every row once by models that have not seen it.

    Parameters
    ----------
    models : mapping of name to component
        Quantile models; an option `levels` is set to `levels`.
    X : array, shape (n, d)
    y : array, shape (n,)
    levels : sequence of float, shape (m,)
        Increasing, in (0, 1).
    folds : int, a splitter of scikit-learn, or (training rows, held-out rows) of each fold
        Parts of nearly equal size, 2..n, of shuffled rows (the paper: K = 5); whole groups with
        `groups`. A splitter with `split(X, y, groups)`, such as TimeSeriesSplit, decides itself; its
        test parts may not overlap.
    seed : int
        Decides the folds, and nothing else.
    n_jobs : int
        Processes of joblib. The result does not depend on it.
    sample_weight, groups : array, shape (n,), optional
        A row of weight 0 is in no fold and trains no model, as if it were not there.
    refit : {"bag", "all"}
        New rows are predicted by the mean over the K models of the folds, or by one more model fitted
        on all rows.
    extra : array, shape (n', d), optional
        Rows to predict as well; with a cache this saves fitting again.
    cache : path, optional
        Directory of finished jobs.
    progress : callable, optional
        Called with "model, fold k/K" or the like after each job.

    Raises
    ------
    ConfigError
        Without models; for ill-formed levels; for folds that cannot be made.
    DataError
        For shapes that do not fit, or values that are not finite, in the input.
    RunError
        When every model fails. A model that fails in one fold is left out of all folds, with one
        `QuantileWarning` naming it, the fold and the reason: a column of Z must be whole.
    """
    X, y, tau = finite("X", X, 2), finite("y", y, 1), check_levels(levels)
    same_rows("X", X, len(y))
    used, weight = np.ones(len(y), dtype=bool), None
    if sample_weight is not None:
        used, positive = weighing_rows(sample_weight, len(y))
        if differing(positive) is not None:
            weight = np.zeros(len(y))
            weight[used] = positive
    if not models:
        raise ConfigError("no models to cross-fit: give at least one")
    if refit not in REFITS:
        raise ConfigError(f"refit={refit!r}: allowed is one of {', '.join(REFITS)}")
    parts = folds_of_weighed(X, y, folds, seed, groups, used)
    train = [np.asarray(rows) for rows, _ in parts]
    if refit == "all":
        train.append(np.flatnonzero(used))
    held = [np.asarray(rows) for _, rows in parts]
    if extra is not None:
        extra = finite("extra", extra, 2)
    work = Work(X, y, weight, tau, train, held, extra)
    results = _run(models, work, n_jobs, cache, progress)
    return _gathered(models, results, work, refit)


def pair_predictions(
    models: Mapping[str, Any], X: np.ndarray, y: np.ndarray, levels: np.ndarray, fold: np.ndarray, *,
    n_jobs: int = 1, sample_weight: np.ndarray | None = None, cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[tuple[int, int], np.ndarray]:
    """Return predictions of the rows of folds k and l by models fitted without both, for nested CV+.

    Since leaving out k then l is leaving out l then k, K(K - 1)/2 fits per model are enough.

    Parameters
    ----------
    fold : array of int, shape (n,)
        From 0 to K - 1.

    Returns
    -------
    dict of (k, l), k < l, to array, shape (rows of both folds, p, m)
        As `conformal.nested_fold_arrays` takes them.

    Raises
    ------
    RunError
        When a model fails, naming it.
    """
    from poise_quantagg.conformal import nested_pairs

    pairs = nested_pairs(int(fold.max()) + 1)
    held = [np.flatnonzero(np.isin(fold, pair)) for pair in pairs]
    train = [np.flatnonzero(~np.isin(fold, pair)) for pair in pairs]
    work = Work(X, y, differing(sample_weight), levels, train, held, None)
    results = _run(models, work, n_jobs, cache, progress)
    if failures := _failures(results, work):
        raise RunError("a model failed on a pair of folds: "
                       + "; ".join(f"{name} ({why})" for name, why in failures.items()))
    return {
        pair: np.stack([
            _at_levels([r for r in results if r[0].name == name], k, "held", levels) for name in models
        ], axis=1)
        for k, pair in enumerate(pairs)
    }


def leaderboard(
    y: np.ndarray, Z: np.ndarray, ensemble: np.ndarray, names: Sequence[str], levels: np.ndarray,
    sample_weight: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Return the mean pinball loss of every model's Z (n, p, m) and of the ensemble (n, m), best first."""
    # the ensemble's weights have seen these rows; for the few numbers that they are, that flatters little
    shown = [*((name, np.sort(Z[:, j], axis=1)) for j, name in enumerate(names)),
             ("ensemble (in sample)", ensemble)]
    table = [{"model": name, "oof_pinball": pinball(y, q, levels, sample_weight=sample_weight)}
             for name, q in shown]
    return sorted(table, key=lambda row: row["oof_pinball"])


def _run(
    models: Mapping[str, Any], work: Work, n_jobs: int, cache: str | Path | None, progress: Any
) -> list[tuple[Job, Result]]:
    """Run the jobs that are not cached; failures come back as results."""
    jobs = [job for name, model in models.items() for job in jobs_of(name, model, work)]
    folder = None if cache is None else Path(cache)
    keys = [key_of(job, work) if folder else "" for job in jobs]
    found: dict[int, Result] = {}
    for i, job in enumerate(jobs):
        cached = load(folder, keys[i], job, work) if folder else None
        if cached is not None:
            found[i] = cached
            if progress:
                progress(f"{label(job, work)} (cached)")
    joblib = require("joblib", "quantagg")
    missing = [i for i in range(len(jobs)) if i not in found]
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(fit)(jobs[i], work.X, work.y, work.weight, work.train, work.held, work.extra)
        for i in missing
    )
    for i, result in zip(missing, results):
        found[i] = result
        if folder and not result.error:
            save(folder, keys[i], result)
        if progress:
            progress(label(jobs[i], work))
    return [(jobs[i], found[i]) for i in range(len(jobs))]


# ------------------------------------------------------------------ gathering


def _gathered(
    models: Iterable[str], results: list[tuple[Job, Result]], work: Work, refit: str
) -> CrossFit:
    K, m = len(work.held), len(work.levels)
    failures = _failures(results, work)
    names = [name for name in models if name not in failures]
    if not names:
        raise RunError("every model failed: " + "; ".join(f"{n}: {why}" for n, why in failures.items()))
    if failures:
        warnings.warn(
            "left out of the ensemble, since an aggregator needs a prediction for every row: "
            + "; ".join(f"{name} ({why})" for name, why in failures.items()),
            QuantileWarning, stacklevel=3,
        )
    fold = np.full(len(work.y), -1, dtype=np.int64)
    for k, rows in enumerate(work.held):
        fold[rows] = k
    Z = np.full((len(work.y), len(names), m), np.nan)
    extras = [] if work.extra is not None else None
    fitted: dict[str, list[Any]] = {}
    for j, name in enumerate(names):
        own = [(job, result) for job, result in results if job.name == name]
        for k in range(K):
            Z[work.held[k], j] = _at_levels(own, k, "held", work.levels)
        if extras is not None:
            last = [K] if refit == "all" else range(K)
            extras.append(mean_of_folds(np.stack([_at_levels(own, k, "extra", work.levels) for k in last])))
        fitted[name] = [_joined(own, k) for k in range(len(work.train))]
    whole = {name: fits.pop() for name, fits in fitted.items()} if refit == "all" else {}
    return CrossFit(Z, fold, work.levels, fitted, whole,
                    None if extras is None else np.stack(extras, axis=1), failures)


def _failures(results: list[tuple[Job, Result]], work: Work) -> dict[str, str]:
    failures: dict[str, str] = {}
    for job, result in results:
        if result.error and job.name not in failures:
            where = label(job, work).partition(", ")[2]
            failures[job.name] = f"{where}: {result.error}"
    return failures


def _at_levels(own, k: int, what: str, levels: np.ndarray) -> np.ndarray:
    blocks = [getattr(result, what)[job.folds.index(k)] for job, result in own if k in job.folds]
    trained = np.concatenate([job.levels for job, _ in own if k in job.folds])
    return interpolate(np.concatenate(blocks, axis=1), trained, levels)


def _joined(own, k: int) -> Any:
    from poise_quantagg.base.regressor import JoinedLevels

    parts = [result.fitted[job.folds.index(k)] for job, result in own if k in job.folds]
    return parts[0] if len(parts) == 1 else JoinedLevels(parts)
