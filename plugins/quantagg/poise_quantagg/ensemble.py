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

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import FileError, MissingExtra, PoiseError
from poise.files import checksum, load_arrays, remove_bundle, save_arrays
from poise_quantagg import saved
from poise_quantagg.calibration import Calibration
from poise_quantagg.checks import QuantileWarning, check_levels, finite, is_number
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
            "folds": self._folds, "whole": int(bool(fits.whole)),
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
            found = cls._read(folder, arrays, meta)
            found.check()
            return found
        except MissingExtra:  # what the models need is not installed: the files are sound
            raise
        except PoiseError as error:
            raise FileError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
        except Exception as error:  # checksums say that bytes are whole, not who wrote them
            raise FileError(f"{folder} is damaged: {type(error).__name__}: {error}") from None

    @classmethod
    def _read(cls, folder: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Ensemble:
        levels, names = check_levels(meta["params"]["levels"]), saved.words(meta, "models")
        folds, whole = saved.number(meta, "folds", 1), saved.number(meta, "whole", 0, 1)
        nested = saved.number(meta, "nested", 0, folds)
        if nested not in (0, folds):
            raise FileError(f"there are {nested} nested weights for {folds} folds: expected 0 or {folds}")
        _check_parts(folder, meta["parts"], len(names), folds + whole, nested)
        columns = {name: [_model(folder / f"model_{j}_{k}") for k in range(folds + whole)]
                   for j, name in enumerate(names)}
        at_end = {name: models.pop() for name, models in columns.items()} if whole else {}
        nothing = np.empty((0, len(columns), len(levels)))
        fold = saved.array(arrays, "fold", (None,), "i")
        calibrated = any(name.startswith("calibration.") for name in arrays)
        return cls(
            params=meta["params"], n_features=saved.number(meta, "n_features", 1),
            feature_names=saved.words(meta, "features"),
            cross_fit=CrossFit(nothing, fold, levels, columns, at_end),
            stacker=QuantileStacker.load(folder / "stacker"),
            nested=[QuantileStacker.load(folder / f"nested_{i}") for i in range(nested)],
            calibration=Calibration.from_tensors(arrays, levels) if calibrated else None,
            leaderboard=_board(meta["leaderboard"]),
        )

    def check(self) -> None:
        """Predict one row in every way, which fails where parts do not fit one another.

        Raises
        ------
        FileError, DataError
            For parts of other models, levels or features; for predictions that are not finite.
        """
        fits, X = self.cross_fit, np.zeros((1, self.n_features))
        if self.feature_names and len(self.feature_names) != self.n_features:
            raise FileError(f"{len(self.feature_names)} names are given for {self.n_features} features")
        if any(not np.array_equal(s.levels_, fits.levels) for s in (self.stacker, *self.nested)):
            raise FileError("the levels of the weights are not those of the ensemble")
        finite("a prediction", self.stacker.predict(fits.predict(X), X), 2)
        if self.calibration is None:
            return
        folds, stackers = fits.predict_folds(X), self.nested or [self.stacker] * self._folds
        q = np.stack([s.predict(Z, X) for s, Z in zip(stackers, folds)])
        if (fold := self.calibration.fold) is None:
            q = q[0]
        elif fold.max() != self._folds - 1:
            raise FileError(f"calibration rows are of {fold.max() + 1} folds, and there are {self._folds}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantileWarning)
            self.calibration.interval(q, 2 * min(fits.levels[0], 0.4))

    @property
    def _folds(self) -> int:
        return len(next(iter(self.cross_fit.models.values())))


def _check_parts(folder: Path, parts: Mapping[str, Any], models: int, fits: int, nested: int) -> None:
    """Raise `FileError` unless these are the files of so many models, fits of each and nested weights."""
    if not models or len(parts) != models * fits + 1 + nested:  # first: they may be said to be billions
        raise FileError(f"{folder}/ensemble.json names {len(parts)} parts, {models} models, {fits} fits of "
                        f"each and {nested} nested weights: they do not belong together")
    own = {f"model_{j}_{k}" for j in range(models) for k in range(fits)}
    if odd := sorted(parts.keys() ^ (own | {"stacker"} | {f"nested_{i}" for i in range(nested)})):
        raise FileError(f"{folder}/ensemble.json: {odd[0]} is missing, or no part of an ensemble")
    for part, expected in parts.items():
        if _checksum(folder / f"{part}.json") != expected:
            raise FileError(f"{folder / part}.json is altered, or of another ensemble: save it again")


def _checksum(path: Path) -> str:
    """Return the checksum of a file of the ensemble; `FileError` for what is none."""
    if not path.is_file():
        raise FileError(f"{path} is no regular file" if path.exists() else f"{path} is missing")
    return checksum(path)


def _model(stem: Path) -> Any:
    try:
        return undump(*load_arrays(stem))
    except FileError as error:
        raise FileError(str(error) if str(stem) in str(error) else f"{stem}: {error}") from None


def _board(rows: Any) -> list[dict[str, Any]]:
    for row in rows:
        if set(row) != {"model", "oof_pinball"} or not isinstance(row["oof_pinball"], (int, float)):
            raise FileError(f"the leaderboard has the row {str(row)[:60]}: expected a model and its loss")
    return rows


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
