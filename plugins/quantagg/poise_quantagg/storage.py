"""A fitted ensemble as a directory of safetensors and JSON; nothing in it is code.

| file | content |
|---|---|
| `ensemble` | parameters, levels, names, calibration rows |
| `stacker` | the aggregator |
| `model_J_K` | model J of fold K (the last K: fitted on all rows, when there is one) |

Each is a bundle with checksums (`poise.files`). `ensemble.json` is removed first and written last, and
holds the checksums of all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import ConfigError, FileError, PoiseError
from poise_quantagg.checks import is_number

KIND, VERSION = "quantile_ensemble", 2


def save_ensemble(estimator: Any, path: Path | str) -> None:
    """Write a fitted `QuantileAggregatorRegressor`; see its `save`."""
    from poise.files import checksum, remove_bundle, save_arrays

    if not hasattr(estimator, "stacker_"):
        raise ConfigError("QuantileAggregatorRegressor is not fitted: call fit(X, y) first")
    folder, fits = Path(path), estimator.cross_fit_
    columns = {name: [*models, *([fits.whole[name]] if fits.whole else [])]
               for name, models in fits.models.items()}
    dumped = {name: [dump(name, model) for model in models] for name, models in columns.items()}
    remove_bundle(folder / "ensemble")  # until it is written again, the folder holds no ensemble
    for j, models in enumerate(dumped.values()):
        for k, (arrays, meta) in enumerate(models):
            save_arrays(folder / f"model_{j}_{k}", arrays, meta)
    estimator.stacker_.save(folder / "stacker")
    for i, nested in enumerate(getattr(estimator, "nested_", [])):
        nested.save(folder / f"nested_{i}")
    parts = ["stacker", *(f"model_{j}_{k}" for j, models in enumerate(dumped.values())
                          for k in range(len(models))),
             *(f"nested_{i}" for i in range(len(getattr(estimator, "nested_", []))))]
    _forget_others(folder, parts)
    arrays = {"fold": fits.fold, **_calibration(estimator)}
    save_arrays(folder / "ensemble", arrays, {
        "kind": KIND, "version": VERSION, "params": _params(estimator), "models": list(columns),
        "parts": {part: checksum(folder / f"{part}.json") for part in parts},
        "folds": len(next(iter(fits.models.values()))), "whole": bool(fits.whole),
        "n_features": int(estimator.n_features_in_), "leaderboard": estimator.leaderboard_,
        "features": getattr(estimator, "feature_names_in_", np.array([])).tolist(),
        "nested": len(getattr(estimator, "nested_", [])),
    })


def _params(estimator: Any) -> dict[str, Any]:
    """Return the parameters as plain values; what is none (models, splitters) as the default."""
    params = estimator.get_params(deep=False) | {"cache": None, "levels": estimator.levels_.tolist()}
    given = params["estimators"]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        params["estimators"] = "auto"
    if not is_number(params["cv"]):
        params["cv"] = 5
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in params.items()}


def _forget_others(folder: Path, parts: Sequence[str]) -> None:
    """Remove what a larger ensemble had left in the folder."""
    from poise.files import remove_bundle

    stems = {file.stem for pattern in ("model_*_*.json", "nested_*.json") for file in folder.glob(pattern)}
    for stem in stems - set(parts):
        remove_bundle(folder / stem)


def load_ensemble(cls: type, path: Path | str) -> Any:
    """Read what `save_ensemble` wrote.

    Raises
    ------
    FileError
        For files that are missing, torn, altered, of something else, or do not belong together.
    """
    from poise.files import checksum, load_arrays

    folder = Path(path)
    arrays, meta = load_arrays(folder / "ensemble")
    if meta.get("kind") != KIND or meta.get("version") != VERSION:
        raise FileError(f"{folder} holds {meta.get('kind')!r} of version {meta.get('version')!r}, not a "
                        f"{KIND} of version {VERSION}")
    try:
        for part, expected in meta["parts"].items():
            if checksum(folder / f"{part}.json") != expected:
                raise FileError(f"{folder / part}.json is altered, or of another ensemble: save it again")
        return _loaded(cls, folder, arrays, meta)
    except FileNotFoundError as error:
        raise FileError(f"{error.filename} is missing") from None
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FileError(f"{folder} is damaged: {type(error).__name__}: {error}") from None


def _loaded(cls: type, folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Any:
    from poise.files import load_arrays
    from poise_quantagg.crossfit import CrossFit
    from poise_quantagg.stacker import QuantileStacker

    estimator = cls(**meta["params"])
    estimator.levels_ = np.asarray(meta["params"]["levels"], dtype=float)
    estimator.n_features_in_ = int(meta["n_features"])
    if meta["features"]:
        estimator.feature_names_in_ = np.array(meta["features"], dtype=object)
    estimator.stacker_ = QuantileStacker.load(folder / "stacker")
    count = meta["folds"] + meta["whole"]
    columns = {name: [undump(*load_arrays(folder / f"model_{j}_{k}")) for k in range(count)]
               for j, name in enumerate(meta["models"])}
    whole = {name: models.pop() for name, models in columns.items()} if meta["whole"] else {}
    nothing = np.empty((0, len(columns), len(estimator.levels_)))
    estimator.cross_fit_ = CrossFit(nothing, arrays["fold"], estimator.levels_, columns, whole)
    estimator.model_names_, estimator.leaderboard_ = list(columns), meta["leaderboard"]
    if meta["nested"]:
        estimator.nested_ = [QuantileStacker.load(folder / f"nested_{i}") for i in range(meta["nested"])]
    if estimator.conformal is not None:
        _calibrate(estimator, arrays)
    return estimator


def storable(model: Any) -> bool:
    """Return whether a fitted base model has a form without pickle, and is of a class that files name."""
    return type(model).__name__ in _classes() and hasattr(model, "tensors")


def dump(name: str, model: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a fitted base model as arrays and plain values.

    Raises
    ------
    ConfigError
        For a model that has no such form, by its name in the ensemble.
    """
    from poise_quantagg.base.regressor import JoinedLevels
    from poise_quantagg.cache import Later

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
    classes = _classes()
    if meta.get("class") not in classes:
        raise FileError(f"unknown kind of saved model: {meta.get('class')!r}")
    cls, values = classes[meta["class"]](), {k: v for k, v in meta.items() if k != "class"}
    try:
        return cls.from_tensors(arrays, values)
    except PoiseError:
        raise
    except Exception as error:  # whatever a peer library makes of its own text
        raise FileError(f"a saved {meta['class']} is damaged: {type(error).__name__}: {error}") from None


def _classes() -> dict[str, Any]:
    """Return the classes that a file may name, loaded only when one does."""
    def of(module: str, name: str):
        import importlib

        return lambda: getattr(importlib.import_module(f"poise_quantagg.base.{module}"), name)

    return {"NetRegressor": of("nets", "NetRegressor"), "LinearRegressor": of("linear", "LinearRegressor"),
            "LightGBMRegressor": of("boosting", "LightGBMRegressor"),
            "XGBoostRegressor": of("boosting", "XGBoostRegressor"),
            "CatBoostRegressor": of("boosting", "CatBoostRegressor"),
            "ForestRegressor": of("forest", "ForestRegressor")}


def _calibration(estimator: Any) -> dict[str, np.ndarray]:
    rows = getattr(estimator, "calibration_", None)
    if rows is None:
        return {}
    arrays = {"calibration.y": rows.y, "calibration.q": rows.q}
    return arrays if rows.fold is None else arrays | {"calibration.fold": rows.fold}


def _calibrate(estimator: Any, arrays: dict[str, np.ndarray]) -> None:
    from poise_quantagg.estimator import Calibration

    estimator._keep_calibration(Calibration(
        arrays["calibration.y"], arrays["calibration.q"], arrays.get("calibration.fold")))
