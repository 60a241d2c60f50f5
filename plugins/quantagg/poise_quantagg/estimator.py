"""`QuantileAggregatorRegressor`: from rows to an ensemble's quantiles, behind scikit-learn's interface."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, FileError, PoiseError, require
from poise_quantagg.calibration import Calibration, warn_ranks
from poise_quantagg.checks import (
    QuantileWarning,
    check_levels,
    is_number,
    open_unit,
    refuse_not_finite,
    row_weights,
)
from poise_quantagg.components.checked import LEVELS
from poise_quantagg.conformal import nested_fold_arrays
from poise_quantagg.crossfit import cross_fit, leaderboard, pair_predictions
from poise_quantagg.defaults import choose_models
from poise_quantagg.ensemble import Ensemble, plain_params
from poise_quantagg.folds import calibration_rows, check_cv, check_groups
from poise_quantagg.grid import interpolate
from poise_quantagg.scores import pinball
from poise_quantagg.stacker import CROSSING, QuantileStacker, warn_crossing

_base = require("sklearn.base", "quantagg")

CONFORMAL = ("cv+", "nested", "split")
FITTED = ("stacker_", "cross_fit_", "oof_quantiles_", "model_names_", "leaderboard_", "nested_",
          "calibration_", "conformal_")


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
        Out-of-fold predictions; NaN for rows that no fold held out, and those of weight 0.
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
            Weights of rows in the base models, the weights' program and the leaderboard. A row of weight 0
            is as good as not given. Folds, bootstraps and conformal ranks do not know other weights: one
            of 2 is not the same as a row given twice.
        groups : array, shape (n,), optional
            Rows of one group stay in one fold.

        Raises
        ------
        ConfigError
            For options that cannot be used, among them more folds than rows.
        DataError, ValueError
            For rows that cannot be used.

        Warns
        -----
        QuantileWarning
            Once, where intervals are calibrated though positive weights differ.
        """
        validation = require("sklearn.utils.validation", "quantagg")
        for name in FITTED:  # a fit that fails leaves nothing of the one before
            self.__dict__.pop(name, None)
        refuse_not_finite(X=X, y=y)
        X, y = validation.validate_data(self, X, y, y_numeric=True, dtype=np.float64, ensure_min_samples=2)
        if sample_weight is not None:
            sample_weight = validation._check_sample_weight(sample_weight, X, dtype=np.float64,
                                                            ensure_non_negative=True)
        y = np.asarray(y, dtype=np.float64)
        used = np.flatnonzero(row_weights(sample_weight, len(y)) > 0)
        self.levels_ = check_levels(LEVELS if self.levels is None else self.levels)
        self._check_options(len(used))
        if self.conformal is not None:
            warn_ranks(sample_weight)
        if self.conformal == "split":
            groups = None if groups is None else check_groups(groups, len(y))[1]
            parts = calibration_rows(len(used), self.cv, self.random_state, _at(groups, used))
            held, rest = (used[part] for part in parts)
            self._fit_rows(X[rest], y[rest], _at(sample_weight, rest), _at(groups, rest))
            self._calibrate(y[held], self._quantiles(X[held]), None)
            return self
        self._fit_rows(X, y, sample_weight, groups)
        if self.conformal is not None:
            rows = self.cross_fit_.covered
            self._calibrate(y[rows], self._unseen(X, y, sample_weight), self.cross_fit_.fold[rows])
        return self

    def _check_options(self, n: int) -> None:
        if self.conformal is not None and self.conformal not in CONFORMAL:
            raise ConfigError(f"conformal={self.conformal!r}: allowed is one of {', '.join(CONFORMAL)} "
                              f"or None")
        check_cv(self.cv, n, apart=self.conformal == "split")
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

    def _models(self, X: np.ndarray, sample_weight: np.ndarray | None) -> dict[str, Any]:
        n = len(X) if sample_weight is None else int(np.count_nonzero(sample_weight))
        return choose_models(self.estimators, n, X.shape[1], self.random_state)

    def _fit_rows(self, X, y, sample_weight, groups) -> None:
        models = self._models(X, sample_weight)
        say = (lambda what: print(f"[quantagg] {what}", flush=True)) if self.verbose else None
        self.cross_fit_ = cross_fit(
            models, X, y, self.levels_, folds=self.cv, seed=self.random_state, n_jobs=self.n_jobs,
            sample_weight=sample_weight, groups=groups, refit=self.refit, cache=self.cache, progress=say,
        )
        self.oof_quantiles_, self.model_names_ = self.cross_fit_.Z, list(self.cross_fit_.models)
        self.stacker_ = self._stack(self.cross_fit_.Z, y, X, sample_weight, self.cross_fit_.covered)
        rows = self.cross_fit_.covered
        Z = self.cross_fit_.Z[rows]
        self.leaderboard_ = leaderboard(y[rows], Z, self.stacker_.predict(Z, X[rows]), self.model_names_,
                                        self.levels_, _at(sample_weight, rows))

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
            stacker.fit(Z, y[rows], X[rows], sample_weight=_at(sample_weight, rows))
        warn_crossing(Z, self.model_names_, stacklevel=5, mended=self.isotonize is not None)
        return stacker

    def _calibrate(self, y: np.ndarray, q: np.ndarray, fold: np.ndarray | None) -> None:
        self.calibration_ = Calibration(y, q, fold, self.levels_)
        self.conformal_ = self.calibration_.pairs

    def _unseen(self, X, y, sample_weight) -> np.ndarray:
        """Return the ensemble's out-of-fold quantiles, which CV+ needs; keeps the weights of nested CV+."""
        if self.conformal == "nested":
            oof, self.nested_ = self._nested(X, y, sample_weight)
            return oof
        rows = self.cross_fit_.covered
        return self.stacker_.predict(self.cross_fit_.Z[rows], X[rows])

    def _nested(self, X, y, sample_weight):
        """Return out-of-fold quantiles by weights that saw no row of the fold, and those weights."""
        models = {n: m for n, m in self._models(X, sample_weight).items() if n in self.model_names_}
        rows = slice(None) if sample_weight is None else sample_weight > 0
        X, y, fold, Z_oof = X[rows], y[rows], self.cross_fit_.fold[rows], self.cross_fit_.Z[rows]
        sample_weight = _at(sample_weight, rows)
        if (fold < 0).any() or fold.max() < 2:
            raise ConfigError("conformal='nested' needs at least 3 folds that hold out every row")
        pairs = pair_predictions(models, X, y, self.levels_, fold, n_jobs=self.n_jobs,
                                 sample_weight=sample_weight, cache=self.cache)
        oof, stackers = np.empty((len(y), len(self.levels_))), []
        for k, (rows, Z) in enumerate(nested_fold_arrays(pairs, fold)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", QuantileWarning)
                stackers.append(self._stack(Z, y[rows], X[rows], _at(sample_weight, rows),
                                            np.ones(len(rows), dtype=bool)))
            held = fold == k
            oof[held] = stackers[k].predict(Z_oof[held], X[held])
        return oof, stackers

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
        q = self._quantiles(rows) if self.calibration_.fold is None else self._fold_quantiles(rows)
        return self._framed(self.calibration_.interval(q, alpha), X, ends)

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
        refuse_not_finite(X=X)
        return validation.validate_data(self, X, reset=False, dtype=np.float64)

    def _framed(self, q: np.ndarray, X: Any, levels: np.ndarray) -> Any:
        if getattr(self, "_sklearn_output_config", {}).get("transform") != "pandas":
            return q
        pandas = require("pandas", "tabular")
        return pandas.DataFrame(q, index=getattr(X, "index", None), columns=np.round(levels, 10))

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
        if not hasattr(self, "stacker_"):
            raise ConfigError("QuantileAggregatorRegressor is not fitted: call fit(X, y) first")
        names = list(getattr(self, "feature_names_in_", []))
        Ensemble(
            plain_params(self.get_params(deep=False), self.levels_), int(self.n_features_in_), names,
            self.cross_fit_, self.stacker_, getattr(self, "nested_", []),
            getattr(self, "calibration_", None), self.leaderboard_,
        ).save(path)

    @classmethod
    def load(cls, path: str | Path) -> QuantileAggregatorRegressor:
        """Read what `save` wrote; every byte is checked.

        Raises
        ------
        FileError
            For files that are missing, torn, altered, or of something else.
        """
        saved = Ensemble.load(path)
        try:
            estimator = cls(**saved.params)
            estimator._restore(saved)
            estimator._check_options(sys.maxsize)  # the number of rows is not kept
            return estimator
        except (TypeError, PoiseError) as error:
            raise FileError(f"{path} is damaged: {error}") from None

    def _restore(self, saved: Ensemble) -> None:
        self.levels_, self.n_features_in_ = saved.cross_fit.levels, saved.n_features
        if saved.feature_names:
            self.feature_names_in_ = np.array(saved.feature_names, dtype=object)
        self.cross_fit_, self.stacker_ = saved.cross_fit, saved.stacker
        self.model_names_, self.leaderboard_ = list(saved.cross_fit.models), saved.leaderboard
        if saved.nested:
            self.nested_ = saved.nested
        if saved.calibration is not None:
            self.calibration_, self.conformal_ = saved.calibration, saved.calibration.pairs


def _at(array: np.ndarray | None, rows: Any) -> np.ndarray | None:
    return None if array is None else array[rows]
