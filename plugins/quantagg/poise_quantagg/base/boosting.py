"""Gradient boosting with the quantile loss; quantiles may cross.

LightGBM and scikit-learn train one model per level; XGBoost and CatBoost one for all levels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import require
from poise_quantagg.base.regressor import PerLevelRegressor, QuantileRegressor
from poise_quantagg.grid import coarse_grid, interpolate


class LightGBMRegressor(PerLevelRegressor):
    """LightGBM, single thread and deterministic; the binned rows are shared by all levels."""

    def __init__(
        self, *, levels, n_estimators, learning_rate, num_leaves, min_child_samples, reg_lambda,
        random_state, grid=None,
    ):
        self.levels = levels
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.min_child_samples = min_child_samples
        self.reg_lambda = reg_lambda
        self.random_state = random_state
        self.grid = grid

    def _fit(self, X, y, sample_weight) -> None:
        lightgbm = require("lightgbm", "quantagg")
        self.trained_ = coarse_grid(self.levels_, self.grid)
        bins = {"verbose": -1, "feature_pre_filter": False}
        rows = lightgbm.Dataset(X, y, weight=sample_weight, params=bins, free_raw_data=False)
        common = {
            "objective": "quantile", "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves, "min_data_in_leaf": self.min_child_samples,
            "lambda_l2": self.reg_lambda, "seed": self.random_state % 2**31, "num_threads": 1,
            "deterministic": True, "force_row_wise": True, **bins,
        }
        self.estimators_ = [
            lightgbm.train({**common, "alpha": float(level)}, rows, self.n_estimators)
            for level in self.trained_
        ]

    def _predict(self, X, levels) -> np.ndarray:
        q = np.column_stack([model.predict(X, num_threads=1) for model in self.estimators_])
        return interpolate(q, self.trained_, levels)

    def tensors(self):
        """Return what `from_tensors` needs: arrays, and plain values (LightGBM's own text)."""
        texts = [model.model_to_string() for model in self.estimators_]
        return {"trained": self.trained_}, {**_plain_options(self), "boosters": texts}

    @classmethod
    def from_tensors(cls, arrays, meta) -> LightGBMRegressor:
        """Rebuild what `tensors` returned."""
        lightgbm = require("lightgbm", "quantagg")
        model = _with_options(cls, arrays, meta)
        model.estimators_ = [lightgbm.Booster(model_str=text) for text in meta["boosters"]]
        return model


class HistBoostingRegressor(PerLevelRegressor):
    """scikit-learn's `HistGradientBoostingRegressor`, without early stopping."""

    def __init__(
        self, *, levels, max_iter, learning_rate, max_leaf_nodes, min_samples_leaf,
        l2_regularization, random_state, grid=None,
    ):
        self.levels = levels
        self.max_iter = max_iter
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.l2_regularization = l2_regularization
        self.random_state = random_state
        self.grid = grid

    def _estimator(self, level):
        options = self.get_params()
        del options["levels"], options["grid"]
        ensemble = require("sklearn.ensemble", "quantagg")
        return ensemble.HistGradientBoostingRegressor(
            **options, loss="quantile", quantile=level, early_stopping=False
        )


class XGBoostRegressor(QuantileRegressor):
    """XGBoost with a vector of quantiles: one booster, one tree per level and round."""

    def __init__(self, *, levels, n_estimators, learning_rate, max_depth, random_state, grid=None):
        self.levels = levels
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.max_depth = max_depth
        self.random_state = random_state
        self.grid = grid

    def _fit(self, X, y, sample_weight) -> None:
        xgboost = require("xgboost", "boosters")
        self.trained_ = coarse_grid(self.levels_, self.grid)
        self.model_ = xgboost.XGBRegressor(
            objective="reg:quantileerror", quantile_alpha=self.trained_, tree_method="hist",
            n_estimators=self.n_estimators, learning_rate=self.learning_rate,
            max_depth=self.max_depth, random_state=self.random_state, n_jobs=1,
        ).fit(X, y, sample_weight=sample_weight)

    def _predict(self, X, levels) -> np.ndarray:
        q = np.asarray(self.model_.predict(X), dtype=float).reshape(len(X), -1)
        return interpolate(q, self.trained_, levels)

    def tensors(self):
        """Return what `from_tensors` needs: arrays, and plain values (XGBoost's own JSON)."""
        text = bytes(self.model_.get_booster().save_raw("json")).decode()
        return {"trained": self.trained_}, {**_plain_options(self), "model": text}

    @classmethod
    def from_tensors(cls, arrays, meta) -> XGBoostRegressor:
        """Rebuild what `tensors` returned."""
        model = _with_options(cls, arrays, meta)
        model.model_ = require("xgboost", "boosters").XGBRegressor(n_jobs=1)
        model.model_.load_model(bytearray(meta["model"].encode()))
        return model


class CatBoostRegressor(QuantileRegressor):
    """CatBoost's MultiQuantile loss: one model whose trees hold all levels."""

    def __init__(self, *, levels, iterations, learning_rate, depth, random_state, grid=None):
        self.levels = levels
        self.iterations = iterations
        self.learning_rate = learning_rate
        self.depth = depth
        self.random_state = random_state
        self.grid = grid

    def _fit(self, X, y, sample_weight) -> None:
        catboost = require("catboost", "boosters")
        self.trained_ = coarse_grid(self.levels_, self.grid)
        if np.ptp(y) == 0:  # CatBoost refuses a constant target
            self.model_, self.constant_ = None, float(y[0])
            return
        trained = np.repeat(self.trained_, 2 if len(self.trained_) == 1 else 1)
        # a single level is given twice: the loss of one level leaves row weights out of its leaf values
        alphas = ",".join(f"{level:.10g}" for level in trained)
        self.model_ = catboost.CatBoostRegressor(
            loss_function=f"MultiQuantile:alpha={alphas}", iterations=self.iterations,
            learning_rate=self.learning_rate, depth=self.depth, random_seed=self.random_state,
            thread_count=1, verbose=False, allow_writing_files=False,
        ).fit(X, y, sample_weight=sample_weight)

    def _predict(self, X, levels) -> np.ndarray:
        if self.model_ is None:
            return np.full((len(X), len(levels)), self.constant_)
        q = np.asarray(self.model_.predict(X, thread_count=1), dtype=float).reshape(len(X), -1)
        q = q[:, : len(self.trained_)]
        return interpolate(q, self.trained_, levels)

    def tensors(self):
        """Return what `from_tensors` needs: arrays (CatBoost's bytes; its JSON rounds), plain values."""
        arrays = {"trained": self.trained_}
        if self.model_ is None:
            return arrays, {**_plain_options(self), "constant": self.constant_}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model")
            self.model_.save_model(str(file), format="cbm")
            arrays["model"] = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        return arrays, _plain_options(self)

    @classmethod
    def from_tensors(cls, arrays, meta) -> CatBoostRegressor:
        """Rebuild what `tensors` returned."""
        model = _with_options(cls, arrays, meta)
        if "constant" in meta:
            model.model_, model.constant_ = None, float(meta["constant"])
            return model
        model.model_ = require("catboost", "boosters").CatBoostRegressor()
        model.model_.load_model(blob=arrays["model"].tobytes())
        return model


def _plain_options(model: QuantileRegressor) -> dict[str, Any]:
    return {"options": model.get_params(deep=False) | {"levels": model.levels_.tolist()},
            "n_features": model.n_features_in_}


def _with_options(cls: Any, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Any:
    """Return a regressor with all but its fitted model."""
    model = cls(**meta["options"])
    model.levels_, model.trained_ = np.asarray(meta["options"]["levels"]), arrays["trained"]
    model.n_features_in_ = int(meta["n_features"])
    return model
