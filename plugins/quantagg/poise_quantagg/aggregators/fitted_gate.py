"""Fitted gates: weights that are a function of the features, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import DataError, FileError
from poise_quantagg import saved
from poise_quantagg.aggregators.fitted import check_kind, check_predictions
from poise_quantagg.atoms import settled
from poise_quantagg.checks import finite, row_blocks


def softmax(logits: np.ndarray, resolution: str, p: int, m: int) -> np.ndarray:
    """Return weights (..., p), (..., p, m) or (..., p, m_in, m_out) from logits (..., K)."""
    axis = -1 if resolution != "medium" else -2
    w = np.exp(logits - logits.max(axis=axis, keepdims=True))
    w /= w.sum(axis=axis, keepdims=True)
    if resolution != "fine":
        return w
    return np.moveaxis(w.reshape(*w.shape[:-1], p, m), -3, -1)


@dataclass(frozen=True)
class Features:
    """The units of the gate's inputs."""

    mean: np.ndarray
    scale: np.ndarray

    @staticmethod
    def of(X: np.ndarray) -> Features:
        """Learn means and scales from rows (n, d); a constant column has scale 1."""
        scale = X.std(axis=0)
        return Features(X.mean(axis=0), np.where(scale > 0, scale, 1.0))

    def __call__(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean) / self.scale


@dataclass(frozen=True)
class GateFit:
    """Weights that are a function of the features.

    Parameters
    ----------
    params : dict of arrays W0, b0, ...
    resolution : {"coarse", "medium", "fine"}
    p, m : int
    features : Features
    band : int or None
        For banded fine gates.
    score : float
        Mean pinball loss on the validation rows, sorted, in the unit of y.
    leaderboard : tuple of dict
        All configurations tried, best first.
    atoms : array, shape (2, k), optional
        As for `LinearFit`.
    """

    params: dict[str, np.ndarray]
    resolution: str
    p: int
    m: int
    features: Features
    band: int | None = None
    score: float | None = None
    leaderboard: tuple[dict[str, Any], ...] = ()
    atoms: np.ndarray | None = None
    linear = False
    needs_features = True

    @property
    def n_features(self) -> int:
        """How many features a row has."""
        return len(self.features.mean)

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weighted sums, shape (n, m).

        Raises
        ------
        DataError
            Without features, for shapes that differ from the fit, or values that are not finite.
        """
        Z, X = check_predictions(Z, self.p, self.m), self._checked(X, len(Z))
        out = np.empty((len(Z), self.m))
        for block in row_blocks(len(Z), self.params[f"b{len(self.params) // 2 - 1}"].size):
            w = self._weights(X[block])
            if w.ndim == 2:
                out[block] = np.einsum("np,npm->nm", w, Z[block])
            elif w.ndim == 3:
                out[block] = np.einsum("npm,npm->nm", w, Z[block])
            else:
                out[block] = np.einsum("npvm,npv->nm", w, Z[block], optimize=True)
        return settled(out, self.atoms)

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights at rows X: (n, p), (n, p, m) or (n, p, m_in, m_out).

        Fine weights of n rows take 8 n p m^2 bytes: 470 MB for 1,000 rows, 6 models and 99 levels.
        """
        return self._weights(self._checked(X, None))

    def _checked(self, X: np.ndarray | None, n: int | None) -> np.ndarray:
        if X is None:
            raise DataError("these weights depend on the features: give X")
        X = finite("X", X, 2)
        if n is not None and len(X) != n:
            raise DataError(f"X has {len(X)} rows and Z has {n}: they must be equal")
        if X.shape[1] != self.n_features:
            raise DataError(f"X has {X.shape[1]} features; fitted on {self.n_features}")
        return X

    def _weights(self, X: np.ndarray) -> np.ndarray:
        x = self.features(X)
        depth = len(self.params) // 2
        for k in range(depth):
            x = x @ self.params[f"W{k}"] + self.params[f"b{k}"]
            if k < depth - 1:
                x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        p, m = self.p, self.m
        if self.resolution == "coarse":
            return softmax(x, "coarse", p, m)
        if self.band is not None:
            return self._unwindowed(softmax(x.reshape(len(x), -1, m), "medium", p, m))
        if self.resolution == "medium":
            return softmax(x.reshape(len(x), p, m), "medium", p, m)
        return softmax(x.reshape(len(x), m, p * m), "fine", p, m)

    def _unwindowed(self, w: np.ndarray) -> np.ndarray:
        """Return banded weights (n, p (2b + 1), m) as fine ones (n, p, m_in, m_out)."""
        n, band, m = len(w), int(self.band or 0), self.m
        w = w.reshape(n, self.p, 2 * band + 1, m)
        full = np.zeros((n, self.p, m, m))
        for offset in range(2 * band + 1):
            near = np.clip(np.arange(m) + offset - band, 0, m - 1)
            for k in range(m):
                full[:, :, near[k], k] += w[:, :, offset, k]
        return full

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: arrays, and plain values."""
        arrays = {f"gate.{name}": array for name, array in self.params.items()}
        arrays |= {"features.mean": self.features.mean, "features.scale": self.features.scale}
        if self.atoms is not None:
            arrays["atoms"] = self.atoms
        meta = {name: getattr(self, name) for name in ("resolution", "p", "m", "band", "score")}
        return arrays, {"kind": "gate", **meta, "leaderboard": list(self.leaderboard)}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> GateFit:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For what is saved of another kind, or makes no gate.
        """
        check_kind(meta, "gate")
        p, m = (saved.number(meta, name, 1) for name in ("p", "m"))
        band = None if meta["band"] is None else saved.number(meta, "band", 0)
        resolution, outputs = meta["resolution"], {"coarse": p, "medium": p * m, "fine": p * m * m}
        if resolution not in outputs:
            raise FileError(f"a gate has the resolution {resolution!r}: allowed are {', '.join(outputs)}")
        features = Features(*(saved.array(arrays, f"features.{k}", (None,)) for k in ("mean", "scale")))
        size = outputs[resolution] if band is None else p * (2 * band + 1) * m
        params = _layers(arrays, len(features.mean), size)
        return cls(params, resolution, p, m, features, band, meta["score"], tuple(meta["leaderboard"]),
                   saved.atoms(arrays) if "atoms" in arrays else None)


def _layers(arrays: Mapping[str, np.ndarray], inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """Return the layers W0, b0, ... once each takes what the one before it gives."""
    names = [name for name in arrays if name.startswith("gate.")]
    params, width = {}, inputs
    for k in range(max(1, len(names) // 2)):
        params[f"W{k}"] = W = saved.array(arrays, f"gate.W{k}", (width, None))
        params[f"b{k}"] = saved.array(arrays, f"gate.b{k}", (W.shape[1],))
        width = W.shape[1]
    if width != outputs or len(names) != len(params):
        raise FileError(f"a gate has {len(names)} arrays and {width} outputs: expected {outputs} outputs")
    return params
