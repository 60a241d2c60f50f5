"""From the point where an interior-point method stops to the vertex beside it.

A quantile program has a solution that passes through as many rows as it has unknowns, or through all rows
of an atom. The method stops some 1e-8 away from it, which is nothing in the loss and everything for a row
that lies on the line: P(y <= q) of a target that is often 0 is another one with q = -1e-10 than with q = 0.
"""

from __future__ import annotations

import numpy as np

NEAR = (1e-6, 1e-8, 1e-10)  # residuals and weights that may be none, in units of the residuals
_ROUNDING = 1e-12


def vertex(A: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, simplex: np.ndarray,
           w: np.ndarray) -> np.ndarray:
    """Return the weights of the vertex near w, or w where there is none.

    Parameters
    ----------
    A : array, shape (q, N)
    y, s, tau : array, shape (N,)
        Such that residuals y - A'w are of the size 1.
    simplex : array of bool, shape (q,)
        Which weights are non-negative with sum 1.
    w : array, shape (q,)
        Nearly optimal.
    """
    limit = _value(A, y, s, tau, w)
    for near in NEAR:
        found = _passing(A, y, simplex, w, near)
        if found is not None and _value(A, y, s, tau, found) <= limit * (1 + _ROUNDING):
            return found
    return w


def _passing(A: np.ndarray, y: np.ndarray, simplex: np.ndarray, w: np.ndarray, near: float):
    """Return the nearest weights that pass through all rows near the present ones; None without such."""
    rows = np.abs(y - w @ A) <= near
    if not rows.any():
        return None
    free = ~simplex | (w > near)
    found = np.where(free, w, 0.0)
    B, lack = A[np.ix_(free, rows)].T, y[rows] - found @ A[:, rows]
    if simplex.any():
        B, lack = np.vstack([B, simplex[free]]), np.append(lack, 1 - found[simplex].sum())
    change = np.linalg.lstsq(B, lack, rcond=1e-10)[0]
    if np.abs(lack - B @ change).max() > _ROUNDING * max(1.0, np.abs(y[rows]).max()):
        return None
    found[free] += change
    return None if (found[simplex] < 0).any() else found


def _value(A: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, w: np.ndarray) -> float:
    r = y - w @ A
    return float(s @ np.maximum(tau * r, (tau - 1) * r))
