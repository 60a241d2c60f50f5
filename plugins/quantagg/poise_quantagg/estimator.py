"""`QuantileAggregatorRegressor`: from rows to an ensemble's quantiles, behind scikit-learn's interface."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, require
from poise_quantagg.checks import (
    LEVEL_TOLERANCE,
    QuantileWarning,
    check_levels,
    finite,
    is_number,
    open_unit,
)
from poise_quantagg.folds import bound_to_rows
from poise_quantagg.grid import interpolate
from poise_quantagg.scores import pinball
from poise_quantagg.stacker import CROSSING, QuantileStacker, warn_crossing

_base = require("sklearn.base", "quantagg")

CONFORMAL = ("cv+", "nested", "split")
FITTED = ("stacker_", "cross_fit_", "oof_quantiles_", "model_names_", "leaderboard_", "nested_",
          "calibration_", "conformal_")


@dataclass(frozen=True)
class Calibration:
    """Rows that calibrate: targets (n,), the ensemble's quantiles (n, m) that have not seen them, and
    their fold (n,), None for rows held out of all fitting."""

    y: np.ndarray
    q: np.ndarray
    fold: np.ndarray | None


LEVELS = [k / 100 for k in range(1, 100)]


def _refuse_not_finite(**arrays: Any) -> None:
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


class QuantileAggregatorRegressor(_base.RegressorMixin, _base.BaseEstimator):
    """Cross-fit quantile models, learn their weights, predict calibrated quantiles.

    Parameters
    ----------
    levels : sequence of float, shape (m,), optional
        Increasing, in (0, 1); default 0.01, 0.02, ..., 0.99.
    estimators : "auto", sequence of names, or mapping of name to model
        "auto" chooses by the number of rows (`default_models`). Names are registered quantile models.
        A model is a component (`poise_quantagg.components`), or anything with `fit(X, y)` that
        `poise_quantagg.adapters.wrap` understands: `predict(X, quantiles=)`, `predict_quantiles`, or a
        distribution with `ppf`.
    aggregator : str
        As for `QuantileStacker`.
    cv : int, a splitter of scikit-learn, or (training rows, held-out rows) of each fold
        Folds of the cross-fitting; fewer rows than folds is an error.
    isotonize : None, "sort", "pava" or "minmax"
    conformal : None, "cv+", "nested" or "split"
        How `predict_interval` is calibrated. "cv+" treats the weights as given (they are fitted on the
        same out-of-fold rows: p numbers or p per level, from n); "nested" fits them anew for every fold
        from K(K - 1)/2 pair-deleted fits, and has the guarantee of CV+ in full; "split" keeps a fifth of
        the rows, drawn at random, away from all fitting (not with a splitter that names rows by their
        place, such as TimeSeriesSplit). None: the quantiles as they are.
    penalty, n_iter, solver, options
        As for `QuantileStacker`.
    refit : {"bag", "all"}
        Predict new rows by the mean over the folds' models, or by models fitted on all rows.
    n_jobs : int
        Processes of joblib; the result does not depend on it.
    cache : path, optional
        Directory of finished fits; an interrupted fit goes on where it was.
    verbose : int
        1: say what is done.
    random_state : int

    Attributes
    ----------
    levels_ : array, shape (m,)
    stacker_ : QuantileStacker
    oof_quantiles_ : array, shape (n, p, m)
        Out-of-fold predictions; NaN for rows that no fold held out.
    model_names_ : list of str
        In the order of the weights.
    leaderboard_ : list of dict
        Out-of-fold mean pinball loss of every model and of the ensemble, best first.
    """

    def __init__(
        self,
        levels: Sequence[float] | None = None,
        estimators: str | Sequence[str] | Mapping[str, Any] = "auto",
        aggregator: str = "qra",
        cv: Any = 5,
        isotonize: str | None = "sort",
        conformal: str | None = "cv+",
        penalty: str | None = None,
        n_iter: int = 20,
        solver: str = "auto",
        options: Mapping[str, Any] | None = None,
        refit: str = "all",
        n_jobs: int = 1,
        cache: str | Path | None = None,
        verbose: int = 0,
        random_state: int = 0,
    ) -> None:
        self.levels = levels
        self.estimators = estimators
        self.aggregator = aggregator
        self.cv = cv
        self.isotonize = isotonize
        self.conformal = conformal
        self.penalty = penalty
        self.n_iter = n_iter
        self.solver = solver
        self.options = options
        self.refit = refit
        self.n_jobs = n_jobs
        self.cache = cache
        self.verbose = verbose
        self.random_state = random_state

    # -------------------------------------------------------------- fitting

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, groups: Any = None):
        """Fit base models, weights and calibration.

        Parameters
        ----------
        X : array or frame, shape (n, d)
        y : array or series, shape (n,)
        sample_weight : array, shape (n,), optional
            Weights of rows in the base models, the weights' program and the leaderboard. Folds, bootstraps
            and conformal ranks do not know them: a weight of 2 is not the same as a row given twice.
        groups : array, shape (n,), optional
            Rows of one group stay in one fold.

        Raises
        ------
        ConfigError
            For options that cannot be used, among them more folds than rows.
        DataError, ValueError
            For rows that cannot be used.
        """
        validation = require("sklearn.utils.validation", "quantagg")
        for name in FITTED:  # a fit that fails leaves nothing of the one before
            self.__dict__.pop(name, None)
        _refuse_not_finite(X=X, y=y)
        X, y = validation.validate_data(self, X, y, y_numeric=True, dtype=np.float64, ensure_min_samples=2)
        if sample_weight is not None:
            sample_weight = validation._check_sample_weight(sample_weight, X, dtype=np.float64,
                                                            ensure_non_negative=True)
        y = np.asarray(y, dtype=np.float64)
        self.levels_ = check_levels(LEVELS if self.levels is None else self.levels)
        self._check_options(len(y))
        if self.conformal == "split":
            held, rest = self._held_out(len(y), groups)
            self._fit_rows(*(None if part is None else np.asarray(part)[rest]
                             for part in (X, y, sample_weight, groups)))
            self._keep_calibration(Calibration(y[held], self._quantiles(X[held]), None))
            return self
        self._fit_rows(X, y, sample_weight, groups)
        if self.conformal is not None:
            self._calibrate(X, y, sample_weight)
        return self

    def _check_options(self, n: int) -> None:
        if self.conformal is not None and self.conformal not in CONFORMAL:
            raise ConfigError(f"conformal={self.conformal!r}: allowed is one of {', '.join(CONFORMAL)} "
                              f"or None")
        if not is_number(self.cv) and (isinstance(self.cv, (str, float, bool)) or not (
                hasattr(self.cv, "split") or isinstance(self.cv, Iterable))):
            raise ConfigError(f"cv={self.cv!r}: allowed is a number of folds, a splitter with "
                              f"split(X, y, groups), or (training rows, held-out rows) of each fold")
        if self.conformal == "split" and not is_number(self.cv) and bound_to_rows(self.cv):
            raise ConfigError(f"conformal='split' keeps rows drawn at random away from all fitting, and "
                              f"cv={type(self.cv).__name__} names rows by their place: use "
                              f"conformal='cv+', or a number of folds")
        if not is_number(self.random_state) or self.random_state < 0:
            raise ConfigError(f"random_state={self.random_state!r}: allowed is a whole number >= 0")
        if self.n_jobs is not None and (not is_number(self.n_jobs) or self.n_jobs == 0):
            raise ConfigError(f"n_jobs={self.n_jobs!r}: allowed is a number of processes; -1: all cores")
        if not isinstance(self.cache, (str, Path, type(None))):
            raise ConfigError(f"cache={self.cache!r}: allowed is a directory, or None")
        if not isinstance(self.verbose, (bool, int, np.integer)):
            raise ConfigError(f"verbose={self.verbose!r}: allowed is 0 or 1")
        self._stacker().component()  # before hours of base models
        if self.conformal == "nested" and is_number(self.cv) and self.cv < 3:
            raise ConfigError(f"conformal='nested' needs at least 3 folds, not cv={self.cv}")
        if is_number(self.cv) and not 2 <= self.cv <= n:
            raise ConfigError(f"cv={self.cv} with {n} rows (n_samples={n}): allowed is 2 <= cv <= rows; "
                              f"give more rows or fewer folds")

    def _fit_rows(self, X, y, sample_weight, groups) -> None:
        from poise_quantagg.crossfit import cross_fit

        models = self._models(len(y), X.shape[1])
        say = (lambda what: print(f"[quantagg] {what}", flush=True)) if self.verbose else None
        self.cross_fit_ = cross_fit(
            models, X, y, self.levels_, folds=self.cv, seed=self.random_state, n_jobs=self.n_jobs,
            sample_weight=sample_weight, groups=groups, refit=self.refit, cache=self.cache, progress=say,
        )
        self.oof_quantiles_, self.model_names_ = self.cross_fit_.Z, list(self.cross_fit_.models)
        self.stacker_ = self._stack(self.cross_fit_.Z, y, X, sample_weight, self.cross_fit_.covered)
        self.leaderboard_ = self._leaderboard(X, y)

    def _stacker(self) -> QuantileStacker:
        return QuantileStacker(
            aggregator=self.aggregator, levels=self.levels_.tolist(), solver=self.solver,
            isotonize=self.isotonize, penalty=self.penalty, n_iter=self.n_iter, options=self.options,
            random_state=self.random_state,
        )

    def _stack(self, Z, y, X, sample_weight, rows) -> QuantileStacker:
        stacker = self._stacker()
        Z = Z if rows.all() else Z[rows]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", CROSSING, QuantileWarning)  # said with the models' names
            stacker.fit(Z, y[rows], X[rows],
                        sample_weight=None if sample_weight is None else sample_weight[rows])
        warn_crossing(Z, self.model_names_, stacklevel=5, mended=self.isotonize is not None)
        return stacker

    def _models(self, n: int, d: int) -> dict[str, Any]:
        from poise.registry import build
        from poise_quantagg.adapters import wrap
        from poise_quantagg.defaults import default_models

        given = self.estimators
        if isinstance(given, str) and given == "auto":
            return default_models(n, d, self.random_state)
        if isinstance(given, str):
            given = [given]
        if isinstance(given, Mapping):
            models = {str(name): wrap(model, self.levels_) for name, model in given.items()}
        elif not isinstance(given, Sequence):
            raise ConfigError(f"estimators={given!r}: allowed is 'auto', names, or a mapping of name to "
                              f"model")
        else:
            models = {}
            for item in given:
                if not isinstance(item, (str, tuple)):
                    raise ConfigError(f"estimators={given!r}: {item!r} is neither the name of a model nor "
                                      f"(name, model)")
                name, model = item if isinstance(item, tuple) else (item, build("model", item))
                if name in models:
                    raise ConfigError(f"estimators: {name!r} is given twice; name them apart by a mapping")
                models[name] = wrap(model, self.levels_)
        if not models:
            raise ConfigError("estimators is empty: name at least one model, or write 'auto'")
        return models

    def _leaderboard(self, X, y) -> list[dict[str, Any]]:
        rows = self.cross_fit_.covered
        Z = self.cross_fit_.Z[rows]
        own = self.stacker_.predict(Z, X[rows])
        table = [{"model": name, "oof_pinball": pinball(y[rows], np.sort(Z[:, j], axis=1), self.levels_)}
                 for j, name in enumerate(self.model_names_)]
        # its weights have seen these rows; for the few numbers that they are, that flatters little
        table.append({"model": "ensemble (in sample)", "oof_pinball": pinball(y[rows], own, self.levels_)})
        return sorted(table, key=lambda row: row["oof_pinball"])

    # -------------------------------------------------------------- calibration

    def _calibrate(self, X, y, sample_weight) -> None:
        """Keep what CV+ needs: the ensemble's out-of-fold quantiles."""
        rows = self.cross_fit_.covered
        if self.conformal == "nested":
            oof, self.nested_ = self._nested(X, y, sample_weight)
        else:
            oof = self.stacker_.predict(self.cross_fit_.Z[rows], X[rows])
        self._keep_calibration(Calibration(y[rows], oof, self.cross_fit_.fold[rows]))

    def _keep_calibration(self, calibration: Calibration) -> None:
        self.calibration_ = calibration
        pairs = self._mirrored()
        self.conformal_ = self._calibrated(self.levels_[pairs]) if len(pairs) else None

    def _calibrated(self, levels: np.ndarray) -> Any:
        """Return the fitted calibration of mirrored levels."""
        from poise_quantagg.conformal import CVPlus, SplitCQR

        rows = self.calibration_
        with warnings.catch_warnings():
            # 49 pairs with few rows: what is infinite is said when an interval is asked for
            warnings.simplefilter("ignore", QuantileWarning)
            q = interpolate(rows.q, self.levels_, levels)
            if rows.fold is None:
                return SplitCQR().fit(rows.y, q, levels)
            return CVPlus().fit(rows.y, q, rows.fold, levels)

    def _nested(self, X, y, sample_weight):
        """Return out-of-fold quantiles by weights that saw no row of the fold, and those weights."""
        from poise_quantagg.conformal import nested_fold_arrays
        from poise_quantagg.crossfit import pair_predictions

        fold = self.cross_fit_.fold
        if (fold < 0).any() or fold.max() < 2:
            raise ConfigError("conformal='nested' needs at least 3 folds that hold out every row")
        models = {n: m for n, m in self._models(len(y), X.shape[1]).items() if n in self.model_names_}
        pairs = pair_predictions(models, X, y, self.levels_, fold, n_jobs=self.n_jobs,
                                 sample_weight=sample_weight, cache=self.cache)
        oof, stackers = np.empty((len(y), len(self.levels_))), []
        for k, (rows, Z) in enumerate(nested_fold_arrays(pairs, fold)):
            weight = None if sample_weight is None else sample_weight[rows]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QuantileWarning)
                stackers.append(self._stack(Z, y[rows], X[rows], weight, np.ones(len(rows), dtype=bool)))
            held = fold == k
            oof[held] = stackers[k].predict(self.cross_fit_.Z[held], X[held])
        return oof, stackers

    def _held_out(self, n: int, groups: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return a fifth of the rows, or as many whole groups as it takes, and the other rows.

        Raises
        ------
        ConfigError
            When too little is left to fit.
        """
        from poise_quantagg.folds import check_groups

        rng, count = np.random.default_rng([self.random_state, 3]), max(1, n // 5)
        if groups is None:
            order = rng.permutation(n)
            held, rest = np.sort(order[:count]), np.sort(order[count:])
        else:
            names, index = check_groups(groups, n)
            rank = rng.permutation(len(names))[index]
            last = np.sort(rank)[count - 1]
            held, rest = np.flatnonzero(rank <= last), np.flatnonzero(rank > last)
        if not len(rest):
            raise ConfigError("conformal='split' keeps whole groups for calibration, and of one group "
                              "nothing is left to fit: give more groups, or groups=None")
        if is_number(self.cv) and self.cv > len(rest):
            raise ConfigError(f"cv={self.cv} with {len(rest)} rows left beside the calibration rows: give "
                              f"more rows or fewer folds")
        return held, rest

    def _mirrored(self) -> np.ndarray:
        """Return the positions of levels whose mirror image is a level too."""
        there = np.abs(self.levels_[:, None] + self.levels_[None] - 1).min(axis=1) < 1e-9
        keep = np.flatnonzero(there)
        return keep if len(keep) > 1 else keep[:0]

    # -------------------------------------------------------------- predicting

    def predict_quantiles(self, X: Any, levels: Sequence[float] | None = None) -> Any:
        """Return quantiles at `levels`, shape (n, m); by default those of the fit.

        Levels between those of the fit are interpolated, linearly in their normal score; beyond them
        the outermost quantile is repeated, with one `QuantileWarning`. A frame indexed like X when
        pandas output is chosen (`set_output(transform="pandas")`).
        """
        rows = self._validated(X)
        wanted = self.levels_ if levels is None else check_levels(levels)
        return self._framed(interpolate(self._quantiles(rows), self.levels_, wanted), X, wanted)

    def predict(self, X: Any) -> np.ndarray:
        """Return the median, shape (n,); with one `QuantileWarning` where 0.5 lies beyond the levels."""
        rows = self._validated(X)
        return interpolate(self._quantiles(rows), self.levels_, np.array([0.5]))[:, 0]

    def predict_interval(self, X: Any, alpha: float = 0.2) -> Any:
        """Return central (1 - alpha) intervals, shape (n, 2), calibrated as `conformal` says.

        At alpha / 2 among the levels, all intervals are nested in one another. For any other alpha the
        quantiles are interpolated and this pair is calibrated by itself: the same guarantee.

        Raises
        ------
        ConfigError
            For alpha out of (0, 1).

        Warns
        -----
        QuantileWarning
            Once, when there are too few rows for alpha: the interval is infinite then.
        """
        rows = self._validated(X)
        alpha = open_unit("alpha", alpha)
        ends = np.array([alpha / 2, 1 - alpha / 2])
        if self.conformal is None:
            return self._framed(interpolate(self._quantiles(rows), self.levels_, ends), X, ends)
        if not hasattr(self, "calibration_"):
            raise ConfigError(f"conformal={self.conformal!r} was chosen after a fit with conformal=None, "
                              f"which keeps no rows to calibrate with: fit again")
        return self._framed(self._interval(rows, alpha, ends), X, ends)

    def _interval(self, rows, alpha: float, ends: np.ndarray) -> np.ndarray:
        """Return calibrated intervals: swept with all pairs at fitted levels, else this pair alone."""
        levels = self.levels_[self._mirrored()]
        known = len(levels) and all(np.abs(levels - end).min() < LEVEL_TOLERANCE for end in ends)
        levels = levels if known else ends
        calibrated: Any = self.conformal_ if known else self._calibrated(ends)
        if self.calibration_.fold is None:
            q = interpolate(self._quantiles(rows), self.levels_, levels, stacklevel=4)
        else:
            folds = self._fold_quantiles(rows)
            flat = interpolate(folds.reshape(-1, folds.shape[2]), self.levels_, levels, stacklevel=4)
            q = flat.reshape(len(folds), len(rows), len(levels))
        out = calibrated.predict_interval(q, alpha)
        if np.isinf(out).any():
            warnings.warn(
                f"{calibrated.n_} calibration rows are too few for alpha={alpha:g}: the interval is "
                f"infinite; give more rows or a larger alpha", QuantileWarning, stacklevel=3)
        return out

    def _quantiles(self, X: np.ndarray) -> np.ndarray:
        return self.stacker_.predict(self.cross_fit_.predict(X), X)

    def _fold_quantiles(self, X: np.ndarray) -> np.ndarray:
        """Return the ensemble's quantiles by the models (and weights) of each fold, (K, n, m)."""
        folds = self.cross_fit_.predict_folds(X)
        stackers = getattr(self, "nested_", None) or [self.stacker_] * len(folds)
        return np.stack([s.predict(Z, X) for s, Z in zip(stackers, folds)])

    def weights_(self, X: Any = None) -> np.ndarray:
        """Return the ensemble's weights, models in the order of `model_names_`."""
        require("sklearn.utils.validation", "quantagg").check_is_fitted(self, "stacker_")
        return self.stacker_.weights(None if X is None else self._validated(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R^2 of the median, as scikit-learn's regressors do; `pinball_score` is the better one."""
        return super().score(X, y, sample_weight)

    def pinball_score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return minus the mean pinball loss over rows and levels; larger is better."""
        q = np.asarray(self._quantiles(self._validated(X)))
        return -pinball(np.asarray(y, float), q, self.levels_, sample_weight=sample_weight)

    def set_output(self, *, transform: str | None = None):
        """Choose "default" or "pandas" for what `predict_quantiles` and `predict_interval` return."""
        if transform not in (None, "default", "pandas"):
            raise ConfigError(f"transform={transform!r}: allowed is 'default' or 'pandas'")
        if transform is not None:
            self._sklearn_output_config = {"transform": transform}  # what scikit-learn's clone keeps
        return self

    def _validated(self, X: Any) -> np.ndarray:
        validation = require("sklearn.utils.validation", "quantagg")
        validation.check_is_fitted(self, "stacker_")
        _refuse_not_finite(X=X)
        return validation.validate_data(self, X, reset=False, dtype=np.float64)

    def _framed(self, q: np.ndarray, X: Any, levels: np.ndarray) -> Any:
        if getattr(self, "_sklearn_output_config", {}).get("transform") != "pandas":
            return q
        pandas = require("pandas", "tabular")
        return pandas.DataFrame(q, index=getattr(X, "index", None), columns=np.round(levels, 10))

    # -------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write the fitted ensemble into the directory `path`: safetensors and JSON, no pickle.

        Parameters are kept, so that the loaded ensemble can be fitted again, but for models and splitters
        of your own: there `estimators` is "auto" and `cv` 5 after loading. Out-of-fold predictions are not.

        Raises
        ------
        ConfigError
            Naming the base models that have no form without pickle (scikit-learn's boosting, models of
            your own): leave them out, or keep the whole estimator with joblib.
        """
        from poise_quantagg.storage import save_ensemble

        save_ensemble(self, path)

    @classmethod
    def load(cls, path: str | Path) -> QuantileAggregatorRegressor:
        """Read what `save` wrote; every byte is checked.

        Raises
        ------
        FileError
            For files that are missing, torn, altered, or of something else.
        """
        from poise_quantagg.storage import load_ensemble

        return load_ensemble(cls, path)

