"""Orthonormal bases of the columns of a program, a batch of programs at a time."""

from __future__ import annotations

import numpy as np

# squared relative length below which a direction is dropped: models that differ by rounding (a copy in
# float32, say) would otherwise get weights of a million that cancel on these rows and on no others
DEPENDENT = 1e-12
_SQUARING = 1e-8


def basis(
    A: np.ndarray, intercept: bool = False, dependent: float = DEPENDENT
) -> tuple[np.ndarray, np.ndarray]:
    """Return an orthonormal basis Q of the rows of A, and T with Q = T'A.

    Dependent directions become zero rows of Q, so that collinear, duplicated or constant columns
    need no special case: T then picks the shortest coefficients.

    Parameters
    ----------
    A : array, shape (b, p, N)
    intercept : bool
        Put a row of ones first; the others are centred, which keeps their differences exact.
    dependent : float
        Squared length, relative to the longest, below which a direction is dropped.

    Returns
    -------
    Q : array, shape (b, q, N), q = p (+ 1)
    T : array, shape (b, q, q)
    """
    b, p, n = A.shape
    mean = A.mean(axis=2)
    X = A - mean[:, :, None]
    length = np.sqrt(np.einsum("bpn,bpn->bp", X, X))
    size = np.abs(A).max(axis=2) * np.sqrt(n)
    length = np.where(length > 1e-14 * size, length, 0.0 if intercept else size)
    inverse = np.where(length > 0, 1 / np.where(length > 0, length, 1.0), 0.0)
    X *= inverse[:, :, None]
    T = np.zeros((b, p, p))
    np.einsum("bjj->bj", T)[:] = inverse
    if not intercept:
        X, T = _one_location(X, T, mean * inverse)
    for _ in range(2):  # the second pass removes the rounding of the first
        value, vector = np.linalg.eigh(np.matmul(X, X.swapaxes(1, 2)))
        if (value < _SQUARING * value[:, -1:]).any():
            # squaring loses half of the digits: take the singular values of X itself
            _, size, right = np.linalg.svd(np.linalg.qr(X.swapaxes(1, 2), mode="r"))
            value, vector = size[:, ::-1] ** 2, right[:, ::-1].swapaxes(1, 2)
            value = np.concatenate([np.zeros((b, p - value.shape[1])), value], axis=1)
        whole = value > dependent * value[:, -1:]
        step = vector * np.where(whole, 1 / np.sqrt(np.where(whole, value, 1.0)), 0.0)[:, None]
        X, T = np.matmul(step.swapaxes(1, 2), X), np.matmul(T, step)
    if not intercept:
        return X, T
    Q = np.concatenate([np.full((b, 1, n), n**-0.5), X], axis=1)
    whole = np.zeros((b, p + 1, p + 1))
    whole[:, 0, 0] = n**-0.5
    whole[:, 0, 1:] = -np.matmul(mean[:, None], T)[:, 0]
    whole[:, 1:, 1:] = T
    return Q, whole


def _one_location(X: np.ndarray, T: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn centred rows X (b, p, N) so that one of them alone carries their means (b, p).

    Rows far from zero all point the same way, and what distinguishes them would be lost beside it. A
    reflection of the p coefficients gathers the means in the first row; the others stay centred.
    """
    location = np.linalg.norm(mean, axis=1)
    normal = mean.copy()
    sign = np.where(mean[:, 0] < 0, -1.0, 1.0)
    normal[:, 0] += sign * location
    square = np.einsum("bp,bp->b", normal, normal)
    factor = np.where(square > 0, 2 / np.where(square > 0, square, 1.0), 0.0)
    mirror = np.eye(mean.shape[1]) - factor[:, None, None] * normal[:, :, None] * normal[:, None]
    X, T = np.matmul(mirror, X), np.matmul(T, mirror)
    X[:, 0] -= (sign * location)[:, None]
    first = np.linalg.norm(X[:, 0], axis=1)
    scale = np.where(first > 0, 1 / np.where(first > 0, first, 1.0), 0.0)
    X[:, 0] *= scale[:, None]
    T[:, :, 0] *= scale[:, None]
    return X, T


def mean_weights(A: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return weights (b, p) that take the means of A (b, p, N) to that of y (b, N); 0 where A has none.

    What is left to solve for is then of the size of deviations: a weight's last digit, times a mean of a
    million deviations, is a visible error.
    """
    mean, spread = A.mean(axis=2), A.std(axis=2)
    far = (np.abs(mean) > spread).all(axis=1)
    ratio = np.where(far[:, None], 1 / np.where(mean == 0, 1.0, mean), 0.0)
    return ratio * y.mean(axis=1, keepdims=True) / mean.shape[1]
