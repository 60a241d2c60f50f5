"""Fitted aggregators whose weights are numbers, not functions of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from poise.errors import DataError, FileError
from poise_quantagg import saved
from poise_quantagg.atoms import settled
from poise_quantagg.checks import finite, row_blocks


def check_predictions(Z: np.ndarray, p: int, m: int) -> np.ndarray:
    """Return finite predictions, shape (n, p, m), without a copy.

    Raises
    ------
    DataError
        When p or m differ from those of the fit, or a value is not finite.
    """
    Z = finite("Z", Z, 3, keep_float32=True)
    if Z.shape[1:] != (p, m):
        raise DataError(
            f"Z has {Z.shape[1]} models and {Z.shape[2]} levels; fitted on {p} and {m}"
        )
    return Z


def check_kind(meta: Mapping[str, Any], kind: str) -> None:
    """Raise `FileError` unless saved values say that they are of this kind."""
    if meta.get("kind") != kind:
        raise FileError(f"a saved aggregator is of the kind {meta.get('kind')!r}, not {kind!r}")


@dataclass(frozen=True)
class LinearFit:
    """Weighted sums of predictions; coarse, medium or fine by the shape of the weights.

    Parameters
    ----------
    w : array, shape (p,), (p, m) or (p, m_in, m_out)
    m : int
        Levels at the fit.
    intercept : array, shape (m,), optional
        Added to each level, in the unit of y.
    objective, gap : float, optional
        Mean pinball loss on the rows of the fit where it was minimised, and how far at most it is
        above the optimum; in the unit of y.
    atoms : array, shape (2, k), optional
        Values that predictions take where they are those but for rounding (`atoms.atoms_of`).
    """

    w: np.ndarray
    m: int
    intercept: np.ndarray | None = None
    objective: float | None = None
    gap: float | None = None
    atoms: np.ndarray | None = None

    @property
    def linear(self) -> bool:
        """Whether a prediction is the weighted sum and nothing else, rounding aside."""
        return self.intercept is None

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weighted sums, shape (n, m), a block of rows at a time.

        Raises
        ------
        DataError
            When Z does not fit the weights.
        """
        Z = check_predictions(Z, self.w.shape[0], self.m)
        out = np.empty((len(Z), self.m))
        for block in row_blocks(len(Z), Z.shape[1] * Z.shape[2]):
            out[block] = self._sum(Z[block])
        return settled(out if self.intercept is None else out + self.intercept, self.atoms)

    def _sum(self, Z: np.ndarray) -> np.ndarray:
        if self.w.ndim == 1:
            return np.matmul(self.w, Z)
        if self.w.ndim == 2:
            return np.einsum("npm,pm->nm", Z, self.w)
        return Z.reshape(len(Z), -1) @ self.w.reshape(-1, self.m)

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights as a copy, shape (p,), (p, m) or (p, m_in, m_out)."""
        return self.w.copy()

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: arrays, and plain values."""
        arrays = {"w": self.w}
        if self.intercept is not None:
            arrays["intercept"] = np.asarray(self.intercept)
        if self.atoms is not None:
            arrays["atoms"] = self.atoms
        return arrays, {"kind": "linear", "m": self.m, "objective": self.objective, "gap": self.gap}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> LinearFit:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For what is saved of another kind, or makes no weights.
        """
        check_kind(meta, "linear")
        m = saved.number(meta, "m", 1)
        given = np.asarray(arrays.get("w"))
        w = saved.array(arrays, "w", (None, m, m)[: max(1, min(given.ndim, 3))])
        intercept = saved.array(arrays, "intercept", (m,)) if "intercept" in arrays else None
        return cls(w, m, intercept, meta["objective"], meta["gap"],
                   saved.atoms(arrays) if "atoms" in arrays else None)


@dataclass(frozen=True)
class FittedMedian:
    """The median over models at each level.

    It is the weighted median with equal weights, and monotone inputs give monotone outputs; but
    it is not linear in Z: no fixed weighted sum gives its predictions, hence `linear = False`.
    """

    p: int
    m: int
    linear = False

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return the median over models, shape (n, m).

        Raises
        ------
        DataError
            When Z has other numbers of models or levels than at the fit.
        """
        Z = check_predictions(Z, self.p, self.m)
        out = np.empty((len(Z), self.m))
        for block in row_blocks(len(Z), Z.shape[1] * Z.shape[2]):
            out[block] = np.median(Z[block], axis=1)
        return out

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return each model's vote in the weighted median, shape (p,): equal.

        These are not coefficients of a sum (see the class).
        """
        return np.full(self.p, 1 / self.p)

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return what `from_tensors` needs: an array, since a file holds one at least, and plain values."""
        return {"none": np.zeros(0)}, {"kind": "median", "p": self.p, "m": self.m}

    @classmethod
    def from_tensors(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> FittedMedian:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For what is saved of another kind.
        """
        check_kind(meta, "median")
        return cls(saved.number(meta, "p", 1), saved.number(meta, "m", 1))
