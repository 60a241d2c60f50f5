"""Finished jobs on disk, under a key of all that decides their predictions.

Nothing is pickled: kept are predictions, and the models that have a form of arrays and plain values.
Another model that was not fitted in this process is fitted again, the same, should new rows ask for it.
Every file says the key that it was written under: one that was moved, torn or altered is done again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import FileError, PoiseError, RunError
from poise.files import load_arrays, plain, read_json, save_arrays, write_json
from poise.version import __version__
from poise_quantagg.jobs import Job, Result, Work, fit
from poise_quantagg.storage import dump, storable, undump

CACHE_VERSION = 2
TRAINERS = ("scikit-learn", "quantile-forest", "lightgbm", "catboost", "xgboost-cpu", "xgboost", "torch")


class Again:
    """The models of a job whose predictions came from the cache: read, or fitted again, when asked for."""

    def __init__(self, job: Job, work: Work, folder: Path, key: str) -> None:
        self.job, self.work, self.folder, self.key = job, work, folder, key
        self.found: list[Any] = []

    def model(self, position: int) -> Any:
        """Return the model of one of the job's folds.

        Raises
        ------
        RunError
            When fitting again fails.
        """
        if not self.found:
            self.found = self._read() or self._fitted()
        return self.found[position]

    def _read(self) -> list[Any]:
        try:
            return [self._one(i) for i in range(len(self.job.folds))]
        except PoiseError:  # not there, damaged, or of another job
            return []

    def _one(self, part: int) -> Any:
        arrays, meta = load_arrays(self.folder / f"{self.key}_{part}")
        if (meta.pop("key", None), meta.pop("part", None)) != (self.key, part):
            raise FileError(f"{self.folder / self.key}_{part} was written under another name")
        return undump(arrays, meta)

    def _fitted(self) -> list[Any]:
        work = self.work
        result = fit(self.job, work.X, work.y, work.weight, work.train, work.held, None)
        if result.error:
            raise RunError(f"{self.job.name} failed when fitted again: {result.error}")
        return result.fitted


def key_of(job: Job, work: Work) -> str:
    """Return a digest of all that decides a job's predictions, the versions of the libraries included.

    An estimator of your own is known by its name and options: after changing its code, use another folder.
    """
    kind = f"{CACHE_VERSION} {__version__} {_libraries()} {type(job.model).__qualname__}"
    digest = hashlib.sha256(kind.encode())
    digest.update(json.dumps(plain(_described(vars(job.model) if hasattr(job.model, "__dict__") else {})),
                             sort_keys=True, default=repr).encode())
    arrays = [work.X, work.y, work.weight, job.levels, *(work.train[k] for k in job.folds),
              *(work.held[k] for k in job.folds if k < len(work.held)), work.extra]
    for array in arrays:
        if array is not None:
            digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:40]


@functools.lru_cache(maxsize=1)
def _libraries() -> str:
    """Return the versions of what trains base models, as far as it is installed."""
    found = []
    for name in TRAINERS:
        try:
            found.append(f"{name}={version(name)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)


def _described(value: Any) -> Any:
    """Return what tells an options apart; the `repr` of estimators and arrays leaves things out."""
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "get_params") and not isinstance(value, type):
        return [name, _described(value.get_params(deep=False))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [name, _described(vars(value))]
    return value


def save(folder: Path, key: str, result: Result) -> None:
    """Write a finished job: its models first, so that one whose key is there is whole."""
    for i, model in enumerate(result.fitted):
        if storable(model):
            arrays, meta = dump(key, model)
            save_arrays(folder / f"{key}_{i}", arrays, {**meta, "key": key, "part": i})
    arrays = {f"held_{i}": a for i, a in enumerate(result.held) if a is not None}
    arrays |= {f"extra_{i}": a for i, a in enumerate(result.extra) if a is not None}
    save_arrays(folder / key, arrays, {"key": key})


def load(folder: Path, key: str, job: Job, work: Work) -> Result | None:
    """Return a finished job, or None when it is not there, damaged, or another one: it is done again."""
    from poise_quantagg.base.regressor import Later

    try:
        arrays, meta = load_arrays(folder / key)
    except PoiseError:
        return None
    if meta != {"key": key} or {k: a.shape for k, a in arrays.items()} != _shapes(job, work) \
            or not all(a.dtype == np.float64 and np.isfinite(a).all() for a in arrays.values()):
        return None
    parts, again = range(len(job.folds)), Again(job, work, folder, key)
    return Result([arrays.get(f"held_{i}") for i in parts], [arrays.get(f"extra_{i}") for i in parts],
                   [Later(functools.partial(again.model, i), job.levels) for i in parts])


def _shapes(job: Job, work: Work) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of the arrays that `save` writes of a job."""
    m = len(job.levels)
    held = {f"held_{i}": (len(work.held[k]), m) for i, k in enumerate(job.folds) if k < len(work.held)}
    if work.extra is None:
        return held
    return held | {f"extra_{i}": (len(work.extra), m) for i in range(len(job.folds))}


# ------------------------------------------------------------------ plain values


def keep(path: Path, key: str, value: Any) -> None:
    """Write plain values under a key, with a checksum of both."""
    value = plain(value)
    write_json(path, {"key": key, "value": value, "sha256": _digest(key, value)})


def kept(path: Path, key: str) -> Any:
    """Return what `keep` wrote under this key; None when it is not there, damaged, or another one."""
    try:
        found = read_json(path)
    except PoiseError:
        return None
    if not isinstance(found, dict) or set(found) != {"key", "value", "sha256"} or found["key"] != key:
        return None
    return found["value"] if found["sha256"] == _digest(key, found["value"]) else None


def _digest(key: str, value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value], sort_keys=True).encode()).hexdigest()
