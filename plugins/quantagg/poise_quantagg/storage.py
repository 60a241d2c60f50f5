"""Fitted base models as arrays and plain values; nothing in a file is code.

A model that can be stored has `tensors()`, which returns (arrays, plain values), and a class method
`from_tensors(arrays, values)`. A file says which of the classes below its model is of, and names no other.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from poise.errors import ConfigError, FileError, MissingExtra, PoiseError
from poise_quantagg import saved
from poise_quantagg.checks import check_levels

_HOMES = {
    "NetRegressor": "nets", "LinearRegressor": "linear", "LightGBMRegressor": "boosting",
    "XGBoostRegressor": "boosting", "CatBoostRegressor": "boosting", "ForestRegressor": "forest",
}


def storable(model: Any) -> bool:
    """Return whether a fitted base model has a form without pickle, and is of a class that files name."""
    return type(model).__name__ in _HOMES and hasattr(model, "tensors")


def dump(name: str, model: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a fitted base model as arrays and plain values.

    Raises
    ------
    ConfigError
        For a model that has no such form, by its name in the ensemble.
    """
    from poise_quantagg.base.regressor import JoinedLevels, Later

    if isinstance(model, Later):
        return dump(name, model.model())
    if isinstance(model, JoinedLevels):
        parts = [dump(name, part) for part in model.parts]
        arrays = {f"{i}.{k}": v for i, (a, _) in enumerate(parts) for k, v in a.items()}
        return arrays, {"class": "JoinedLevels", "parts": [meta for _, meta in parts]}
    if not storable(model):
        raise ConfigError(f"{name} ({type(model).__name__}) has no form without pickle: leave it out of "
                          f"the ensemble, or keep the whole estimator with joblib.dump")
    arrays, meta = model.tensors()
    return arrays, {"class": type(model).__name__, **meta}


def undump(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Any:
    """Rebuild what `dump` returned.

    Raises
    ------
    FileError
        For a class that is unknown, and for values that make no such model.
    """
    name = meta.get("class")
    if name != "JoinedLevels" and name not in list(_HOMES):
        raise FileError(f"unknown kind of saved model: {name!r}")
    try:
        if name == "JoinedLevels":
            return _joined(arrays, meta["parts"])
        cls = getattr(importlib.import_module(f"poise_quantagg.base.{_HOMES[name]}"), name)
        model = cls.from_tensors(arrays, {k: v for k, v in meta.items() if k != "class"})
        check_levels(model.levels_)
        saved.number(vars(model), "n_features_in_", 1)
        return model
    except MissingExtra:
        raise
    except PoiseError as error:
        raise FileError(f"a saved {name} is damaged: {error}") from None
    except Exception as error:  # whatever a peer library makes of its own text
        raise FileError(f"a saved {name} is damaged: {type(error).__name__}: {error}") from None


def _joined(arrays: dict[str, np.ndarray], parts: list[dict[str, Any]]) -> Any:
    from poise_quantagg.base.regressor import JoinedLevels

    models = [undump({k.removeprefix(f"{i}."): v for k, v in arrays.items() if k.startswith(f"{i}.")}, part)
              for i, part in enumerate(parts)]
    joined = JoinedLevels(models)
    check_levels(joined.levels_)
    return joined
