"""Gradient boosting with the quantile loss, one model per level; quantiles may cross."""

from __future__ import annotations

from poise.errors import require
from poise_quantagg.base.regressor import PerLevelRegressor


class LightGBMRegressor(PerLevelRegressor):
    """LightGBM, single thread and deterministic."""

    def __init__(
        self, *, levels, n_estimators, learning_rate, num_leaves, min_child_samples, reg_lambda,
        random_state,
    ):
        self.levels = levels
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.min_child_samples = min_child_samples
        self.reg_lambda = reg_lambda
        self.random_state = random_state

    def _estimator(self, level):
        options = self.get_params()
        del options["levels"]
        return require("lightgbm", "quantagg").LGBMRegressor(
            **options, objective="quantile", alpha=level,
            n_jobs=1, deterministic=True, force_row_wise=True, verbose=-1,
        )


class HistBoostingRegressor(PerLevelRegressor):
    """scikit-learn's `HistGradientBoostingRegressor`, without early stopping."""

    def __init__(
        self, *, levels, max_iter, learning_rate, max_leaf_nodes, min_samples_leaf,
        l2_regularization, random_state,
    ):
        self.levels = levels
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.l2_regularization = l2_regularization
        self.random_state = random_state

    def _estimator(self, level):
        options = self.get_params()
        del options["levels"]
        ensemble = require("sklearn.ensemble", "quantagg")
        return ensemble.HistGradientBoostingRegressor(
            **options, loss="quantile", quantile=level, early_stopping=False
        )
