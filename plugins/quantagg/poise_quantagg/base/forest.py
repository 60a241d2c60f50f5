"""Quantile forests: trees grown for the mean, quantiles from the rows that share a leaf."""

from __future__ import annotations

import numpy as np

from poise.errors import require
from poise_quantagg.base.regressor import QuantileRegressor


class ForestRegressor(QuantileRegressor):
    """Random forest or extra trees with Meinshausen weights, over the quantile-forest package.

    Every row of a leaf is kept (the package keeps one at random by default) and counts one over
    the leaf's size, as in Meinshausen 2006. Any level can be asked for. Sample weights shape the
    trees (splits, and with recent scikit-learn the bootstrap), not the quantiles within leaves.
    """

    def __init__(
        self, *, levels, n_estimators, min_samples_leaf, max_depth, max_features, random_state,
        kind,
    ):
        self.levels = levels
        self.n_estimators = n_estimators
        self.min_samples_leaf = min_samples_leaf
        self.max_depth = max_depth
        self.max_features = max_features
        self.random_state = random_state
        self.kind = kind

    def _fit(self, X, y, sample_weight) -> None:
        package = require("quantile_forest", "quantagg")
        classes = {
            "random": package.RandomForestQuantileRegressor,
            "extra": package.ExtraTreesQuantileRegressor,
        }
        options = self.get_params()
        del options["levels"]
        forest = classes[options.pop("kind")](**options, max_samples_leaf=None, n_jobs=1)
        self.forest_ = forest.fit(X, y, sample_weight=sample_weight)

    def _predict(self, X, levels) -> np.ndarray:
        q = self.forest_.predict(X, quantiles=levels.tolist(), weighted_leaves=True)
        return np.reshape(q, (len(X), len(levels)))  # one level comes back as (n,)
