"""Fitted base models as arrays and plain values; nothing in a file is code.

A model that can be stored has `tensors()`, which returns (arrays, plain values), and a class method
`from_tensors(arrays, values)`. A file says which of the classes below its model is of, and names no other.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from poise.errors import ConfigError, FileError, PoiseError

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
    from poise_quantagg.base.regressor import JoinedLevels

    if meta.get("class") == "JoinedLevels":
        return JoinedLevels([
            undump({k.removeprefix(f"{i}."): v for k, v in arrays.items() if k.startswith(f"{i}.")}, part)
            for i, part in enumerate(meta["parts"])
        ])
    name, values = meta.get("class"), {k: v for k, v in meta.items() if k != "class"}
    if name not in _HOMES:
        raise FileError(f"unknown kind of saved model: {name!r}")
    cls = getattr(importlib.import_module(f"poise_quantagg.base.{_HOMES[name]}"), name)
    try:
        return cls.from_tensors(arrays, values)
    except PoiseError:
        raise
    except Exception as error:  # whatever a peer library makes of its own text
        raise FileError(f"a saved {name} is damaged: {type(error).__name__}: {error}") from None
