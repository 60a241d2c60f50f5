"""A fitted ensemble as a directory of safetensors and JSON; nothing in it is code.

| file | content |
|---|---|
| `ensemble` | parameters, levels, names, calibration rows |
| `stacker` | the aggregator |
| `nested_K` | the aggregator without fold K, with nested CV+ |
| `model_J_K` | model J of fold K (the last K: fitted on all rows, when there is one) |

Each is a bundle with checksums (`poise.files`). `ensemble.json` is removed first and written last, and
holds the checksums of all the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import FileError, MissingExtra
from poise.files import checksum, load_arrays, remove_bundle, save_arrays
from poise_quantagg.calibration import Calibration
from poise_quantagg.checks import is_number
from poise_quantagg.crossfit import CrossFit
from poise_quantagg.stacker import QuantileStacker
from poise_quantagg.storage import dump, undump

KIND, VERSION = "quantile_ensemble", 3


@dataclass(frozen=True)
class Ensemble:
    """All that a fitted ensemble predicts by.

    Parameters
    ----------
    params : dict
        Of the estimator, plain values; `levels` are those of the fit.
    n_features : int
    feature_names : list of str
        Empty where the features have no names.
    cross_fit : CrossFit
        Its out-of-fold predictions are not kept.
    stacker : QuantileStacker
    nested : list of QuantileStacker
        One per fold with nested CV+, otherwise empty.
    calibration : Calibration or None
    leaderboard : list of dict
    """

    params: dict[str, Any]
    n_features: int
    feature_names: list[str]
    cross_fit: CrossFit
    stacker: QuantileStacker
    nested: list[QuantileStacker]
    calibration: Calibration | None
    leaderboard: list[dict[str, Any]]

    def save(self, path: Path | str) -> None:
        """Write the directory; what has no form without pickle is refused before anything is written.

        Raises
        ------
        ConfigError
            Naming the base model, or the aggregator, that has no such form.
        """
        folder, parts = Path(path), self._parts()
        remove_bundle(folder / "ensemble")  # until it is written again, the folder holds no ensemble
        for part, (arrays, meta) in parts.items():
            save_arrays(folder / part, arrays, meta)
        _forget_others(folder, parts)
        fits = self.cross_fit
        arrays = {"fold": fits.fold, **(self.calibration.tensors() if self.calibration else {})}
        save_arrays(folder / "ensemble", arrays, {
            "kind": KIND, "version": VERSION, "params": self.params, "models": list(fits.models),
            "parts": {part: checksum(folder / f"{part}.json") for part in parts},
            "folds": len(next(iter(fits.models.values()))), "whole": bool(fits.whole),
            "n_features": self.n_features, "leaderboard": self.leaderboard,
            "features": self.feature_names, "nested": len(self.nested),
        })

    def _parts(self) -> dict[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Return arrays and plain values of all files but `ensemble`."""
        fits = self.cross_fit
        models = {
            f"model_{j}_{k}": dump(name, model)
            for j, (name, folds) in enumerate(fits.models.items())
            for k, model in enumerate([*folds, *([fits.whole[name]] if fits.whole else [])])
        }
        nested = {f"nested_{i}": stacker.tensors() for i, stacker in enumerate(self.nested)}
        return {**models, "stacker": self.stacker.tensors(), **nested}

    @classmethod
    def load(cls, path: Path | str) -> Ensemble:
        """Read what `save` wrote.

        Raises
        ------
        FileError
            For files that are missing, torn, altered, of something else, or do not belong together.
        """
        folder = Path(path)
        arrays, meta = load_arrays(folder / "ensemble")
        if meta.get("kind") != KIND or meta.get("version") != VERSION:
            raise FileError(f"{folder} holds {meta.get('kind')!r} of version {meta.get('version')!r}, not "
                            f"a {KIND} of version {VERSION}")
        try:
            for part, expected in meta["parts"].items():
                if checksum(folder / f"{part}.json") != expected:
                    raise FileError(f"{folder / part}.json is altered, or of another ensemble: save it "
                                    f"again")
            return cls._read(folder, arrays, meta)
        except FileNotFoundError as error:
            raise FileError(f"{error.filename} is missing") from None
        except MissingExtra:  # what the models need is not installed: the files are sound
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FileError(f"{folder} is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def _read(cls, folder: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Ensemble:
        levels = np.asarray(meta["params"]["levels"], dtype=float)
        count = meta["folds"] + meta["whole"]
        columns = {name: [undump(*load_arrays(folder / f"model_{j}_{k}")) for k in range(count)]
                   for j, name in enumerate(meta["models"])}
        whole = {name: models.pop() for name, models in columns.items()} if meta["whole"] else {}
        nothing = np.empty((0, len(columns), len(levels)))
        return cls(
            params=meta["params"], n_features=int(meta["n_features"]), feature_names=list(meta["features"]),
            cross_fit=CrossFit(nothing, arrays["fold"], levels, columns, whole),
            stacker=QuantileStacker.load(folder / "stacker"),
            nested=[QuantileStacker.load(folder / f"nested_{i}") for i in range(meta["nested"])],
            calibration=Calibration.from_tensors(arrays, levels) if "calibration.y" in arrays else None,
            leaderboard=meta["leaderboard"],
        )


def plain_params(params: Mapping[str, Any], levels: np.ndarray) -> dict[str, Any]:
    """Return an estimator's parameters as plain values; what is none (models, splitters) as the default."""
    plain = {**params, "cache": None, "levels": levels.tolist()}
    names = [params["estimators"]] if isinstance(params["estimators"], str) else params["estimators"]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        plain["estimators"] = "auto"
    if not is_number(params["cv"]):
        plain["cv"] = 5
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in plain.items()}


def _forget_others(folder: Path, parts: Iterable[str]) -> None:
    """Remove what a larger ensemble had left in the folder."""
    stems = {file.stem for pattern in ("model_*_*.json", "nested_*.json") for file in folder.glob(pattern)}
    for stem in stems - set(parts):
        remove_bundle(folder / stem)
