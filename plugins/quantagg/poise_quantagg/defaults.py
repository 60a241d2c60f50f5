"""The base models of an ensemble: those that are asked for, or the default ones by the number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from poise.errors import ConfigError
from poise_quantagg import components as c

SMALL = 120
WIDE = 50  # features above which a linear model of few rows takes longer than it is worth


def choose_models(given: Any, n: int, d: int, random_state: int = 0) -> dict[str, Any]:
    """Return base models by name: "auto", names, (name, model) pairs, or a mapping of name to model.

    Raises
    ------
    ConfigError
        For anything else, unknown names, a name given twice, and nothing at all.
    """
    from poise_quantagg.adapters import wrap

    if isinstance(given, str) and given == "auto":
        return default_models(n, d, random_state)
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        models = {str(name): wrap(model) for name, model in given.items()}
    elif isinstance(given, Sequence):
        models = {name: wrap(model) for name, model in _named(given).items()}
    else:
        raise ConfigError(f"estimators={given!r}: allowed is 'auto', names, or a mapping of name to model")
    if not models:
        raise ConfigError("estimators is empty: name at least one model, or write 'auto'")
    return models


def _named(given: Sequence[Any]) -> dict[str, Any]:
    from poise.registry import build

    models: dict[str, Any] = {}
    for item in given:
        if not isinstance(item, (str, tuple)):
            raise ConfigError(f"estimators={given!r}: {item!r} is neither the name of a model nor "
                              f"(name, model)")
        name, model = item if isinstance(item, tuple) else (item, build("model", item))
        if name in models:
            raise ConfigError(f"estimators: {name!r} is given twice; name them apart by a mapping")
        models[name] = model
    return models


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
