"""One clone of any single-level regressor per level."""

from __future__ import annotations

from poise.errors import require
from poise_quantagg.base.regressor import PerLevelRegressor


class PerLevelClones(PerLevelRegressor):
    """Clones `estimator` for each level and sets its `parameter` to it."""

    def __init__(self, *, levels, estimator, parameter, grid=None):
        self.levels = levels
        self.estimator = estimator
        self.parameter = parameter
        self.grid = grid

    def _estimator(self, level):
        clone = require("sklearn.base", "quantagg").clone(self.estimator)
        return clone.set_params(**{self.parameter: level})
