"""Linear quantile regression (Koenker and Bassett 1978), one exact program per level."""

from __future__ import annotations

from poise.errors import require
from poise_quantagg.base.regressor import PerLevelRegressor


class LinearRegressor(PerLevelRegressor):
    """scikit-learn's `QuantileRegressor` by HiGHS, on features of mean 0 and variance 1."""

    def __init__(self, *, levels, alpha):
        self.levels = levels
        self.alpha = alpha

    def _fit(self, X, y, sample_weight) -> None:
        self.scaler_ = require("sklearn.preprocessing", "quantagg").StandardScaler().fit(X)
        super()._fit(self.scaler_.transform(X), y, sample_weight)

    def _predict(self, X, levels):
        return super()._predict(self.scaler_.transform(X), levels)

    def _estimator(self, level):
        linear_model = require("sklearn.linear_model", "quantagg")
        return linear_model.QuantileRegressor(quantile=level, alpha=self.alpha, solver="highs")
