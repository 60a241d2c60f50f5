"""Predictors in files: arrays and plain metadata, checked before anything of them is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from poise.errors import FileError
from poise.files import load_arrays, save_arrays
from poise_edgemoe.predictors.blocks import flattened
from poise_edgemoe.predictors.past import HALF_LIVES
from poise_edgemoe.predictors.routing import AHEAD, METHODS, ORDER, FromRouting, blocks_for

KIND, VERSION = "poise predictor of experts", 1


def save(predictor: FromRouting, path: Path | str) -> None:
    """Write PATH.safetensors and PATH.json, the latter last."""
    arrays = {"k": predictor.usual.k, "again": predictor.again}
    for ahead, (weights, curve) in enumerate(zip(predictor.weights, predictor.curves)):
        arrays |= {f"curve.{ahead}.{part}": a for part, a in zip(("scores", "chances"), curve)}
        arrays |= {f"weights.{ahead}.{n}": w for n, w in enumerate(weights)}
    for name, block in predictor.blocks.items():
        arrays |= flattened(f"block.{name}", block)
    said = {"kind": KIND, "version": VERSION, "half_lives": list(HALF_LIVES), "experts": predictor.experts,
            "methods": [list(by_layer) for by_layer in predictor.methods], "model": predictor.model}
    save_arrays(stem_of(Path(path)), arrays, said)


def load(path: Path | str) -> FromRouting:
    """Read a predictor that was saved at PATH (with or without its suffix).

    Raises
    ------
    FileError
        For a file that is missing, torn, altered, of another version, or holds no predictor.
    """
    stem = stem_of(Path(path))
    arrays, said = load_arrays(stem)
    known = {"kind": KIND, "version": VERSION, "half_lives": list(HALF_LIVES)}
    if any(said.get(key) != value for key, value in known.items()):
        raise FileError(f"{stem}.json holds no predictor of this version: fit one (poise moe fit)")
    try:
        return _made(arrays, said)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"{stem} is no predictor: {type(error).__name__} {error}; fit one again (poise moe "
                        f"fit)") from None


def stem_of(path: Path) -> Path:
    """Return a path without the suffix of either of its files."""
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


def _made(arrays: dict[str, np.ndarray], said: dict[str, Any]) -> FromRouting:
    k, experts, methods = arrays["k"], said["experts"], said["methods"]
    layers, model = len(k), said["model"]
    _check(k.ndim == 1 and k.dtype == float and layers > 0 and isinstance(experts, int) and experts > 0,
           "sizes")
    _check(1 <= len(methods) <= AHEAD and all(len(m) == layers for m in methods), "methods")
    _check(model is None or isinstance(model, str), "model")
    names = {name for m in methods for one in m for name in METHODS[one]}
    blocks = blocks_for(names, k, experts)
    for name, block in blocks.items():
        own = {key: arrays[f"block.{name}.{key}"] for key in block.tensors()}
        for key, like in block.tensors().items():
            _check(_alike(own[key], like, name == "path"), f"{name}.{key}")
        if name == "path":
            rows = len(own["keys"])
            _check(own["visits"].shape == (rows,) and own["counts"].shape == (rows, experts), "path")
        block.read(own)
    weights = [[_of(arrays[f"weights.{a}.{n}"], 1 + sum(blocks[b].features for b in METHODS[m]))
                for n, m in enumerate(by_layer)] for a, by_layer in enumerate(methods)]
    curves = [(arrays[f"curve.{a}.scores"], arrays[f"curve.{a}.chances"]) for a in range(len(methods))]
    for scores, chances in curves:
        _check(scores.dtype == chances.dtype == float and scores.ndim == chances.ndim == 1
               and len(scores) == len(chances) > 0 and bool((np.diff(scores) > 0).all())
               and bool(((chances >= 0) & (chances <= 1)).all()), "curve")
    again = _of(arrays["again"], 1 + blocks["usual"].features)
    return FromRouting({n: blocks[n] for n in ORDER if n in blocks}, methods, weights, curves, again, model)


def _alike(array: np.ndarray, like: np.ndarray, free: bool) -> bool:
    """Return whether counts are of a block's kind; of a table there may be as many as there were keys."""
    shaped = array.ndim == like.ndim if free else array.shape == like.shape
    return shaped and array.dtype == like.dtype and bool((np.isfinite(array) & (array >= -free)).all())


def _of(array: np.ndarray, length: int) -> np.ndarray:
    _check(array.shape == (length,) and array.dtype == float and bool(np.isfinite(array).all()), "weights")
    return array


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} are not what they must be")
