"""One clone of any single-level regressor per level, and the check that its levels reach its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from poise.errors import ConfigError, require
from poise_quantagg.base.regressor import PerLevelRegressor

LOSSES = ("loss", "objective", "loss_function", "criterion")  # what libraries call the option
CHECKED_ROWS = 256
_ROUNDING = 1e-9  # of the largest value


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

    def _fit(self, X, y, sample_weight) -> None:
        super()._fit(X, y, sample_weight)
        rows = checked_rows(len(y))
        if same_at_all_levels(self._predict(X[rows], self.trained_), y[rows], self.trained_):
            first, last = self.trained_[[0, -1]]
            raise ConfigError(
                f"{type(self.estimator).__name__} predicts the same at every level from {first:g} to "
                f"{last:g}: its loss does not look at {self.parameter!r}; "
                f"{_loss_option(self.estimator.get_params(), self.parameter)}")


def checked_rows(n: int) -> np.ndarray:
    """Return places of at most `CHECKED_ROWS` of n rows, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, CHECKED_ROWS)).astype(int))


def same_at_all_levels(q: np.ndarray, y: np.ndarray, levels: np.ndarray) -> bool:
    """Return whether q (n, m), for training rows, is one number a row, and that no quantile of y (n,).

    One number may be the quantile at all of the levels: of a constant, of counts that are mostly zero, of
    rows that a tree has to itself. Then y is that number in a share of at least tau_m - tau_1 of the rows,
    because at most tau_1 of them lie below it and at most 1 - tau_m above; half of it is asked for here.
    """
    size = _ROUNDING * max(np.abs(q).max(), np.abs(y).max())
    if len(levels) < 2 or np.ptp(q, axis=1).max() > size:
        return False
    return bool((np.abs(y - q[:, 0]) <= size).mean() < (levels[-1] - levels[0]) / 2)


def _loss_option(params: Mapping[str, Any], parameter: str) -> str:
    """Return what to set: the option of the loss, in a pipeline that of the same step."""
    step = "".join(parameter.rpartition("__")[:2])
    for name in (step + loss for loss in LOSSES):
        if name in params:
            return (f"it has {name}={params[name]!r}: set {name} to its quantile loss (in scikit-learn and "
                    f"LightGBM {name}='quantile')")
    return "choose a regressor that minimises the quantile loss"
