"""Other people's quantile models behind the contract.

`wrap(model)` takes a component as it is, and clones anything else that has `fit(X, y)`:

* `predict(X, quantiles=[...])`: quantile-forest, TabPFN, skpro and alike;
* `predict_quantiles(X, levels)`;
* a predictive distribution with `ppf(level)`, from `pred_dist(X)` (NGBoost) or `predict(X)`;
* a regressor of one level: `per_level(estimator, parameter="quantile")`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError, require

_HOW = ("allowed are components, and estimators with fit(X, y) and one of predict(X, quantiles=...), "
        "predict_quantiles(X, levels), or predict/pred_dist that returns a distribution with ppf; for a "
        "regressor of one level write poise_quantagg.adapters.per_level(estimator, 'quantile')")


def wrap(model: Any) -> Any:
    """Return a component for anything that predicts quantiles.

    Raises
    ------
    ConfigError
        For what is neither a component nor an estimator of a known kind.
    """
    if hasattr(model, "build") and not isinstance(model, type):
        return model
    if not hasattr(model, "fit") or isinstance(model, type):
        raise ConfigError(f"{model!r} is no quantile model: {_HOW}")
    return Wrapped(model)


def per_level(estimator: Any, parameter: str) -> PerLevel:
    """Return a component that fits one clone per level, the level set by `parameter`.

    For example `per_level(GradientBoostingRegressor(loss="quantile"), "alpha")`. An estimator whose loss
    does not look at the parameter predicts the same at all levels: its fit is refused with a `ConfigError`.

    Raises
    ------
    ConfigError
        When the estimator has no such parameter.
    """
    if parameter not in estimator.get_params():
        raise ConfigError(f"{type(estimator).__name__} has no parameter {parameter!r} "
                          f"(parameters: {', '.join(estimator.get_params())})")
    return PerLevel(estimator, parameter)


@dataclass(frozen=True)
class Wrapped:
    """A component around an estimator; `build` clones it."""

    estimator: Any
    levels: Sequence[float] = ()  # those that a fit is checked at; cross-fitting sets them

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return an unfitted `WrappedRegressor`."""
        clone = require("sklearn.base", "quantagg").clone(self.estimator, safe=False)
        return WrappedRegressor(clone, self.levels)


@dataclass(frozen=True)
class PerLevel:
    """A component of one clone per level."""

    estimator: Any
    parameter: str
    levels: Sequence[float] = (0.5,)
    grid: int | None = None
    per_level = True

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return an unfitted `PerLevelClones`."""
        from poise_quantagg.base.clones import PerLevelClones

        return PerLevelClones(levels=list(self.levels), estimator=self.estimator, parameter=self.parameter,
                              grid=self.grid)


class WrappedRegressor:
    """Fits the estimator and asks it for quantiles in the way it understands."""

    def __init__(self, estimator: Any, levels: Sequence[float] = ()) -> None:
        self.estimator, self.levels = estimator, levels

    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None):
        """Fit; sample weights are passed on when the estimator takes them.

        Raises
        ------
        ConfigError
            When weights are given to an estimator that takes none; when it predicts the same at all levels.
        """
        if sample_weight is None:
            self.estimator.fit(X, y)
        elif _takes(self.estimator.fit, "sample_weight"):
            self.estimator.fit(X, y, sample_weight=sample_weight)
        else:
            raise ConfigError(f"{type(self.estimator).__name__}.fit takes no sample_weight: fit without")
        self._check(X, y)
        return self

    def _check(self, X: np.ndarray, y: np.ndarray) -> None:
        from poise_quantagg.base.clones import checked_rows, same_at_all_levels

        if len(self.levels) < 2:
            return
        rows = checked_rows(len(y))
        q = self.predict_quantiles(X[rows], self.levels)
        if q.shape != (len(rows), len(self.levels)) or not np.isfinite(q).all():
            return  # said with the model's name when it predicts
        if same_at_all_levels(q, y[rows], np.asarray(self.levels)):
            raise ConfigError(f"{type(self.estimator).__name__} predicts the same at every level from "
                              f"{self.levels[0]:g} to {self.levels[-1]:g}: it does not look at the "
                              f"levels that it is asked for; set its option for quantiles, or leave it out")

    def predict_quantiles(self, X: np.ndarray, levels: Sequence[float]) -> np.ndarray:
        """Return quantiles, shape (n, m).

        Raises
        ------
        DataError
            When the estimator's predictions are no quantiles.
        """
        wanted = [float(t) for t in levels]
        model = self.estimator
        if hasattr(model, "predict_quantiles"):
            return _shaped(model.predict_quantiles(X, wanted), X, wanted)
        if _takes(getattr(model, "predict", None), "quantiles"):
            return _shaped(model.predict(X, quantiles=wanted), X, wanted)
        found = (model.pred_dist if hasattr(model, "pred_dist") else model.predict)(X)
        if not hasattr(found, "ppf"):
            raise DataError(f"{type(model).__name__} predicts no quantiles: {_HOW}")
        return np.column_stack([np.broadcast_to(found.ppf(t), len(X)) for t in wanted])


def _takes(function: Any, name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _shaped(q: Any, X: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    if isinstance(q, list) and not isinstance(q[0], list):  # arrays of levels; lists are those of rows
        q = np.stack(q, axis=-1)
    q = np.asarray(q, dtype=float)
    return q.reshape(len(X), -1) if q.ndim == 1 and len(levels) == 1 else q

