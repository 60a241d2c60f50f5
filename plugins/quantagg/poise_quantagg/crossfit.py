"""Out-of-fold predictions (eq 15): what an aggregator must be trained on.

Models x folds x blocks of levels are independent jobs, run by joblib (choose another backend with
`joblib.parallel_config`), one thread each. With a cache directory every finished job is on disk under
a key of its content (model, data, rows, levels), so an interrupted fit goes on where it was. Nothing
is pickled: cached are predictions, and the models that have a form of arrays and plain values. Another
model that was not fitted in this process is fitted again, the same, should new rows ask for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, PoiseError, RunError, require
from poise_quantagg.checks import QuantileWarning, check_levels, finite, row_weights, same_rows

REFITS = ("bag", "all")
LEVELS_OF_A_JOB = 25
CACHE_VERSION = 1


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold predictions, and the models of the folds.

    Parameters
    ----------
    Z : array, shape (n, p, m)
        Z[i, j] comes from model j fitted without the fold of row i; in the unit of y. NaN for rows
        that no fold held out (`fold` -1, early rows of time splits).
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
            return np.stack([_quantiles(n, f, X, self.levels) for n, f in self.whole.items()], axis=1)
        return np.mean(self.predict_folds(X), axis=0)

    def predict_folds(self, X: np.ndarray) -> np.ndarray:
        """Return the predictions of each fold's models, shape (K, len(X), p, m)."""
        return np.stack([
            np.stack([_quantiles(name, f, X, self.levels) for f in fits])
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
    folds : int, or a splitter of scikit-learn
        Parts of nearly equal size, 2..n, of shuffled rows (the paper: K = 5); whole groups with
        `groups`. A splitter with `split(X, y, groups)`, such as TimeSeriesSplit, decides itself; its
        test parts may not overlap.
    seed : int
        Decides the folds, and nothing else.
    n_jobs : int
        Processes of joblib. The result does not depend on it.
    sample_weight, groups : array, shape (n,), optional
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
    weight = None if sample_weight is None else row_weights(sample_weight, len(y))
    if not models:
        raise ConfigError("no models to cross-fit: give at least one")
    if refit not in REFITS:
        raise ConfigError(f"refit={refit!r}: allowed is one of {', '.join(REFITS)}")
    parts = make_folds(X, y, folds, seed, groups)
    train = [np.asarray(rows) for rows, _ in parts]
    if refit == "all":
        train.append(np.arange(len(y)))
    held = [np.asarray(rows) for _, rows in parts]
    if extra is not None:
        extra = finite("extra", extra, 2)
    work = _Work(X, y, weight, tau, train, held, extra, None if cache is None else Path(cache))
    results = _run([job for name, model in models.items() for job in _jobs(name, model, work)],
                   work, n_jobs, progress)
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
    work = _Work(X, y, sample_weight, levels, train, held, None, None if cache is None else Path(cache))
    results = _run([job for name, model in models.items() for job in _jobs(name, model, work)], work,
                   n_jobs, progress)
    if failures := _failures(results, work):
        raise RunError("a model failed on a pair of folds: "
                       + "; ".join(f"{name} ({why})" for name, why in failures.items()))
    return {
        pair: np.stack([
            _at_levels([r for r in results if r[0].name == name], k, "held", levels) for name in models
        ], axis=1)
        for k, pair in enumerate(pairs)
    }


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
    if hasattr(folds, "split") and not isinstance(folds, str):
        parts = [(np.asarray(a), np.asarray(b)) for a, b in folds.split(X, y, groups)]
        seen = np.concatenate([b for _, b in parts])
        if len(np.unique(seen)) != len(seen):
            raise ConfigError("the splitter holds out some rows twice: use one without repetition")
        return parts
    if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)):
        raise ConfigError(f"folds={folds!r}: allowed is a number or a splitter with split(X, y, groups)")
    if groups is None:
        fold = assign_folds(len(y), int(folds), seed)
    else:
        fold = _group_folds(np.asarray(groups), len(y), int(folds), seed)
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(int(folds))]


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


# ------------------------------------------------------------------ jobs


@dataclass(frozen=True)
class _Work:
    """What all jobs share; `train` may have one part more than `held` (all rows)."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None
    levels: np.ndarray
    train: list[np.ndarray]
    held: list[np.ndarray]
    extra: np.ndarray | None
    cache: Path | None


@dataclass(frozen=True)
class _Job:
    """One model on some folds at some levels."""

    name: str
    model: Any
    folds: tuple[int, ...]
    levels: np.ndarray


@dataclass(frozen=True)
class _Result:
    """Predictions by fold: held-out rows (None for the fit on all rows), extra rows, and the model."""

    held: list[np.ndarray | None]
    extra: list[np.ndarray | None]
    fitted: list[Any]
    error: str = ""


def _jobs(name: str, model: Any, work: _Work) -> list[_Job]:
    """Split a model into jobs: all folds at once where it trains so, else fold by fold."""
    model = _with(model, levels=work.levels.tolist())
    everything = tuple(range(len(work.train)))
    if getattr(model, "fits_many", False):
        return [_Job(name, model, everything, work.levels)]
    if getattr(model, "per_level", False):
        from poise_quantagg.grid import coarse_grid

        trained = coarse_grid(work.levels, getattr(model, "grid", None))
        blocks = np.array_split(trained, -(-len(trained) // LEVELS_OF_A_JOB))
        return [_Job(name, _with(model, levels=block.tolist(), grid=None), (k,), block)
                for k in everything for block in blocks]
    return [_Job(name, model, (k,), work.levels) for k in everything]


def _with(model: Any, **options: Any) -> Any:
    """Return a component with some options changed, those it has."""
    if not dataclasses.is_dataclass(model):
        return model
    have = {f.name for f in dataclasses.fields(model)}
    return dataclasses.replace(model, **{k: v for k, v in options.items() if k in have})  # type: ignore


def _run(jobs: list[_Job], work: _Work, n_jobs: int, progress) -> list[tuple[_Job, _Result]]:
    """Run the jobs that are not cached; failures come back as results."""
    keys = [_key(job, work) for job in jobs] if work.cache else [""] * len(jobs)
    found: dict[int, _Result] = {}
    for i, key in enumerate(keys):
        cached = _load(work, jobs[i], key) if work.cache else None
        if cached is not None:
            found[i] = cached
            if progress:
                progress(f"{_label(jobs[i], work)} (cached)")
    joblib = require("joblib", "quantagg")
    missing = [i for i in range(len(jobs)) if i not in found]
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(
        joblib.delayed(_fit)(jobs[i], work.X, work.y, work.weight, work.train, work.held, work.extra)
        for i in missing
    )
    for i, result in zip(missing, results):
        found[i] = result
        if work.cache and not result.error:
            _save(work, keys[i], result)
        if progress:
            progress(_label(jobs[i], work))
    return [(jobs[i], found[i]) for i in range(len(jobs))]


def _label(job: _Job, work: _Work) -> str:
    K = len(work.held)
    first, *others = job.folds
    if others:
        return f"{job.name}, {len(job.folds)} folds"
    where = "all rows" if first >= K else f"fold {first + 1}/{K}"
    some = "" if len(job.levels) == len(work.levels) else f", levels {job.levels[0]:g}..{job.levels[-1]:g}"
    return f"{job.name}, {where}{some}"


def _fit(job: _Job, X, y, weight, train, held, extra) -> _Result:
    """Fit one job on one thread and predict its held-out and extra rows."""
    with require("threadpoolctl", "quantagg").threadpool_limits(1), _one_torch_thread():
        try:
            parts = [train[k] for k in job.folds]
            if getattr(job.model, "fits_many", False):
                fitted = job.model.build().fit_many(X, y, weight, parts)
            else:
                options = {} if weight is None else {"sample_weight": weight[parts[0]]}
                fitted = [job.model.build().fit(X[parts[0]], y[parts[0]], **options)]
            return _Result(
                [_quantiles(job.name, f, X[held[k]], job.levels) if k < len(held) else None
                 for k, f in zip(job.folds, fitted)],
                [None if extra is None else _quantiles(job.name, f, extra, job.levels) for f in fitted],
                list(fitted),
            )
        except Exception as error:  # any library may stand behind a model; which one is reported
            if isinstance(error, ConfigError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return _Result([], [], [], reason)


class _one_torch_thread:  # noqa: N801 - reads as a statement
    """Run a block on one torch thread, when torch is there at all."""

    def __enter__(self) -> None:
        import sys

        self.torch = sys.modules.get("torch")
        self.before = self.torch.get_num_threads() if self.torch else 1
        if self.torch:
            self.torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.torch:
            self.torch.set_num_threads(self.before)


def _quantiles(name: str, fitted: Any, X: np.ndarray, levels: np.ndarray) -> np.ndarray:
    q = finite(f"prediction of {name}", fitted.predict_quantiles(X, levels), 2)
    if q.shape != (len(X), len(levels)):
        raise DataError(f"{name} predicts shape {q.shape}, not {(len(X), len(levels))}")
    return q


# ------------------------------------------------------------------ gathering


def _gathered(
    models: Iterable[str], results: list[tuple[_Job, _Result]], work: _Work, refit: str
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
            extras.append(np.mean([_at_levels(own, k, "extra", work.levels) for k in last], axis=0))
        fitted[name] = [_joined(own, k) for k in range(len(work.train))]
    whole = {name: fits.pop() for name, fits in fitted.items()} if refit == "all" else {}
    return CrossFit(Z, fold, work.levels, fitted, whole,
                    None if extras is None else np.stack(extras, axis=1), failures)


def _failures(results: list[tuple[_Job, _Result]], work: _Work) -> dict[str, str]:
    failures: dict[str, str] = {}
    for job, result in results:
        if result.error and job.name not in failures:
            where = _label(job, work).partition(", ")[2]
            failures[job.name] = f"{where}: {result.error}"
    return failures


def _at_levels(own, k: int, what: str, levels: np.ndarray) -> np.ndarray:
    from poise_quantagg.grid import interpolate

    blocks = [getattr(result, what)[job.folds.index(k)] for job, result in own if k in job.folds]
    trained = np.concatenate([job.levels for job, _ in own if k in job.folds])
    return interpolate(np.concatenate(blocks, axis=1), trained, levels)


def _joined(own, k: int) -> Any:
    from poise_quantagg.base.regressor import JoinedLevels

    parts = [result.fitted[job.folds.index(k)] for job, result in own if k in job.folds]
    return parts[0] if len(parts) == 1 else JoinedLevels(parts)


# ------------------------------------------------------------------ cache


class _Again:
    """The models of a job whose predictions came from the cache: read, or fitted again, when asked for."""

    def __init__(self, job: _Job, work: _Work, key: str) -> None:
        self.job, self.work, self.key = job, work, key
        self.found: list[Any] = []

    def models(self) -> list[Any]:
        """Return the models, one per fold of the job.

        Raises
        ------
        RunError
            When fitting again fails.
        """
        if not self.found:
            self.found = self._read() or self._fit()
        return self.found

    def _read(self) -> list[Any]:
        from poise.files import load_arrays
        from poise_quantagg.storage import undump

        assert self.work.cache is not None
        try:
            return [undump(*load_arrays(self.work.cache / f"{self.key}_{i}"))
                    for i in range(len(self.job.folds))]
        except PoiseError:  # not there, or damaged
            return []

    def _fit(self) -> list[Any]:
        work = self.work
        result = _fit(self.job, work.X, work.y, work.weight, work.train, work.held, None)
        if result.error:
            raise RunError(f"{self.job.name} failed when fitted again: {result.error}")
        return result.fitted


class _Later:
    """One of the models of `_Again`; pickles as the model itself, without the data."""

    def __init__(self, again: _Again, position: int) -> None:
        self.again, self.position = again, position
        self.levels_ = again.job.levels

    def model(self) -> Any:
        """Return the fitted model."""
        return self.again.models()[self.position]

    def predict_quantiles(self, X: np.ndarray, levels: Sequence[float] | None = None) -> np.ndarray:
        """Return quantiles, shape (n, m)."""
        return self.model().predict_quantiles(X, self.levels_ if levels is None else levels)

    def __reduce__(self):
        return _itself, (self.model(),)


def _itself(model: Any) -> Any:
    return model


def _key(job: _Job, work: _Work) -> str:
    """Return a digest of all that decides a job's predictions."""
    from poise.files import plain
    from poise.version import __version__

    digest = hashlib.sha256(f"{CACHE_VERSION} {__version__} {type(job.model).__qualname__}".encode())
    digest.update(json.dumps(plain(_described(vars(job.model) if hasattr(job.model, "__dict__") else {})),
                             sort_keys=True, default=repr).encode())
    arrays = [work.X, work.y, work.weight, job.levels, *(work.train[k] for k in job.folds),
              *(work.held[k] for k in job.folds if k < len(work.held)), work.extra]
    for array in arrays:
        if array is not None:
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:40]


def _described(value: Any) -> Any:
    """Return what tells an options apart; the `repr` of estimators and arrays leaves things out."""
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "get_params") and not isinstance(value, type):
        return [name, _described(value.get_params(deep=False))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [name, _described(vars(value))]
    return value


def _save(work: _Work, key: str, result: _Result) -> None:
    from poise.files import save_arrays
    from poise_quantagg.storage import dump, storable

    assert work.cache is not None
    for i, model in enumerate(result.fitted):
        if storable(model):
            save_arrays(work.cache / f"{key}_{i}", *dump(key, model))
    arrays = {f"held_{i}": a for i, a in enumerate(result.held) if a is not None}
    arrays |= {f"extra_{i}": a for i, a in enumerate(result.extra) if a is not None}
    save_arrays(work.cache / key, arrays, {"parts": len(result.held)})


def _load(work: _Work, job: _Job, key: str) -> _Result | None:
    """Return a finished job, or None when it is not there or damaged (then it is done again)."""
    from poise.files import load_arrays

    assert work.cache is not None
    if not (work.cache / f"{key}.json").exists():
        return None
    try:
        arrays, meta = load_arrays(work.cache / key)
    except PoiseError:
        return None
    parts, again = range(meta["parts"]), _Again(job, work, key)
    return _Result([arrays.get(f"held_{i}") for i in parts], [arrays.get(f"extra_{i}") for i in parts],
                   [_Later(again, i) for i in parts])
