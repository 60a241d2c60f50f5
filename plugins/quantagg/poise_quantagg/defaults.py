"""The base models of the default ensemble, by the number of rows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from poise_quantagg import components as c

SMALL = 120
WIDE = 50  # features above which a linear model of few rows takes longer than it is worth


def default_models(n: int, d: int, random_state: int = 0) -> dict[str, Any]:
    """Return base models for n rows of d features.

    Linear, trees and networks: ensembles gain where models differ. Up to `SMALL` rows everything
    together takes less than a second. What is not installed (torch, CatBoost) is left out, and so is the
    linear model where there are more than `WIDE` features and fewer than three rows for each.
    """
    seed = random_state % 2**32
    scarce = d * 3 > n
    linear = {} if scarce and d > WIDE else {"linear": c.Linear(alpha=0.01 if scarce else 0.0)}
    if n <= SMALL:
        few: dict[str, Any] = {"n_estimators": 20, "min_samples_leaf": 3, "random_state": seed,
                               "max_features": min(1.0, 300 / d)}
        forest = {} if linear else {"quantile_forest": c.QuantileForest(**few)}
        return {**linear, "extra_trees": c.ExtraTrees(**few), **forest}
    models: dict[str, Any] = {
        **linear,
        "extra_trees": c.ExtraTrees(min_samples_leaf=4, random_state=seed),
        "lightgbm": c.LightGBM(grid=11, n_estimators=500, num_leaves=15, learning_rate=0.05,
                               random_state=seed),
    }
    if find_spec("catboost"):
        models["catboost"] = c.CatBoost(grid=11, iterations=500, learning_rate=0.08, random_state=seed)
    if find_spec("torch"):
        models["gaussian_net"] = c.GaussianNet(n_iter=2, max_steps=6000, random_state=seed)
        models["multi_quantile_net"] = c.MultiQuantileNet(n_iter=2, max_steps=6000, random_state=seed)
    return models
