"""What the base regressors share: levels, checks, one estimator per level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, require
from poise_quantagg.checks import check_levels, differing, finite, same_rows, weighing_rows
from poise_quantagg.grid import coarse_grid, interpolate


class QuantileRegressor(require("sklearn.base", "quantagg").BaseEstimator):
    """Base of the regressors; a subclass has `_fit(X, y, sample_weight)` and `_predict(X, levels)`.

    Follows scikit-learn: options are constructor arguments, fitting sets attributes that end in
    an underscore.
    """

    levels: Sequence[float]

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None):
        """Fit on features (n, d) and targets (n,); rows of weight 0 leave at once.

        They would count in scales, leaves, bootstraps and the rows that stop a training. Weights that are
        equal then are no weights.

        Raises
        ------
        DataError
            For shapes that do not fit, values that are not finite, unusable weights.
        """
        X, y = finite("X", X, 2), finite("y", y, 1)
        same_rows("X", X, len(y))
        if sample_weight is not None:
            used, sample_weight = weighing_rows(sample_weight, len(y))
            sample_weight = differing(sample_weight)
            if not used.all():
                X, y = X[used], y[used]
        self.levels_ = check_levels(self.levels)
        self.n_features_in_ = X.shape[1]
        self._fit(X, y, sample_weight)
        return self

    def predict_quantiles(
        self, X: np.ndarray, levels: Sequence[float] | None = None
    ) -> np.ndarray:
        """Return quantiles, shape (n, m), at `levels` (default: those of the constructor).

        A model that was trained level by level interpolates others (`grid.interpolate`).

        Raises
        ------
        ConfigError
            Before `fit`; for ill-formed levels.
        DataError
            For another number of features, or values that are not finite.
        """
        if not hasattr(self, "levels_"):
            raise ConfigError(f"{type(self).__name__} is not fitted: call fit(X, y) first")
        X = finite("X", X, 2)
        if X.shape[1] != self.n_features_in_:
            raise DataError(f"X has {X.shape[1]} features; fitted on {self.n_features_in_}")
        return self._predict(X, self.levels_ if levels is None else check_levels(levels))

    def _fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None) -> None:
        raise NotImplementedError

    def _predict(self, X: np.ndarray, levels: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class PerLevelRegressor(QuantileRegressor):
    """One single-quantile estimator per level; a subclass has `_estimator(level)`.

    With an option `grid`, only so many of the levels are trained and the others interpolated.
    """

    grid: int | None = None

    def _estimator(self, level: float) -> Any:
        raise NotImplementedError

    def _fit(self, X, y, sample_weight) -> None:
        self.trained_ = coarse_grid(self.levels_, self.grid)
        weight = {} if sample_weight is None else {"sample_weight": sample_weight}  # not all take one
        self.estimators_ = [self._estimator(float(level)).fit(X, y, **weight) for level in self.trained_]

    def _predict(self, X, levels) -> np.ndarray:
        q = np.column_stack([estimator.predict(X) for estimator in self.estimators_])
        return interpolate(q, self.trained_, levels)


class JoinedLevels:
    """Several regressors that were trained at different levels, as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.levels_ = np.concatenate([np.asarray(part.levels_) for part in self.parts])

    def predict_quantiles(self, X: np.ndarray, levels: Sequence[float] | None = None) -> np.ndarray:
        """Return quantiles, shape (n, m), at `levels` (default: all that were trained)."""
        q = np.concatenate([part.predict_quantiles(X) for part in self.parts], axis=1)
        return q if levels is None else interpolate(q, self.levels_, check_levels(levels))


class Later:
    """A fitted model that is fetched when it is first asked for; pickles as that model.

    Parameters
    ----------
    fetch : callable
        Returns the model, the same one at every call.
    levels : array, shape (m,)
        Those that the model was fitted at.
    """

    def __init__(self, fetch: Callable[[], Any], levels: np.ndarray) -> None:
        self.model, self.levels_ = fetch, levels

    def predict_quantiles(self, X: np.ndarray, levels: Sequence[float] | None = None) -> np.ndarray:
        """Return quantiles, shape (n, m)."""
        return self.model().predict_quantiles(X, self.levels_ if levels is None else levels)

    def __reduce__(self):
        return _itself, (self.model(),)


def _itself(model: Any) -> Any:
    return model
