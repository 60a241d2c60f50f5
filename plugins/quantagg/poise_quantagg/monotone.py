"""Making quantiles monotone in the level, row by row: sort, l2 projection, min-max sweep.

Every operator works on the last axis, for any number of axes before it; a 1-D array is one row. NumPy
arrays give NumPy arrays and are checked; torch tensors give tensors of the same dtype and device with
exact gradients and, being used inside training loops, are checked for shape only (NaN stays NaN).
Torch is imported only when a tensor comes in. `m` levels; values have the unit of y. Equation and
proposition numbers refer to arXiv 2103.00083.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import QuantileWarning, check_levels, finite

OPERATORS = ("sort", "pava", "minmax")


def sort(q: Any) -> Any:
    """Return each row in ascending order (eq 12), as a new array, shape (..., m).

    Guarantees. Prop 1: no farther than q from any monotone row, in every l_p norm, p >= 1. Prop 2: the
    sum of the pinball losses over *equally weighted* levels never grows, whatever y is, and falls if q
    crosses; the gain is <tau, sort(q) - q>, so it does not even depend on y. With unequal level
    weights this is false: use `pava` with those weights. Gradient: the transposed permutation.

    Raises
    ------
    DataError
        Unless q has at least one axis, is not empty and (NumPy) has no NaN; infinities are allowed.
    """
    if _is_tensor(q):
        return _tensor_rows(q).sort(dim=-1, stable=True).values
    return np.sort(_rows(q), axis=-1)


def pava(q: Any, weights: Any = None) -> Any:
    """Return the nearest monotone row in weighted l2, by pooling adjacent violators (eq 13).

    Guarantees. Equal weights: Prop 1 and Prop 2 hold, as for `sort`. Weights w: the sum of w_k times
    the pinball loss at level k never grows, whatever y is. Gradient: the weighted block average,
    d out_j / d q_k = w_k / (sum of w over the block) inside a block and 0 across; `weights` are
    constants. A row that does not cross comes back bit for bit.

    Parameters
    ----------
    q : array or tensor, shape (..., m)
        Finite. A tensor off the CPU takes a round trip over it.
    weights : array, shape (m,) or that of q, optional
        Positive level weights; equal by default.

    Raises
    ------
    DataError
        For a wrong shape, weights that are not positive, or (NumPy) values that are not finite.
    """
    if _is_tensor(q):
        q = _tensor_rows(q)
        w = _weights(weights, tuple(q.shape))
        return _pava_function().apply(q, w)
    out = finite("q", q, None)
    mean, size = _pool(out.reshape(-1, out.shape[-1]), _weights(weights, out.shape))
    return np.repeat(mean, size).reshape(out.shape)


def minmax(q: Any, levels: Sequence[float] | np.ndarray) -> Any:
    """Return rows swept outwards from the median: running max above, running min below (eq 23).

    The pivot keeps its value. It is the level 0.5 or, if that is absent, the level nearest to it (the
    lower of two equally near ones). Every central interval around the pivot can only grow, so a
    conformal guarantee survives. **No** guarantee for scores: Props 1 and 2 fail, the WIS of a row may
    rise. Gradient: each output selects one input.

    Parameters
    ----------
    q : array or tensor, shape (..., m)
        Infinities are allowed.
    levels : array, shape (m,)

    Raises
    ------
    ConfigError
        For ill-formed levels or another number than m.
    DataError
        As for `sort`.
    """
    q = _tensor_rows(q) if _is_tensor(q) else _rows(q)
    pivot = pivot_index(check_levels(levels, q.shape[-1]))
    if _is_tensor(q):
        import torch

        down = q[..., : pivot + 1].flip(-1).cummin(dim=-1).values.flip(-1)
        return torch.cat([down[..., :-1], q[..., pivot:].cummax(dim=-1).values], dim=-1)
    return sweep(q, pivot)


def sweep(q: np.ndarray, pivot: int) -> np.ndarray:
    """Return `minmax` of a NumPy array around the position `pivot`, unchecked, shape (..., m)."""
    out = np.array(q)
    out[..., pivot:] = np.maximum.accumulate(q[..., pivot:], axis=-1)
    out[..., pivot::-1] = np.minimum.accumulate(q[..., pivot::-1], axis=-1)
    return out


def pivot_index(levels: np.ndarray) -> int:
    """Return the position of the level nearest to 0.5, the lower of two equally near ones."""
    return int(np.argmin(np.round(np.abs(levels - 0.5), 9)))


def isotonize(
    q: Any, how: str | None, levels: Sequence[float] | np.ndarray, level_weights: Any = None
) -> Any:
    """Return q made monotone by the operator of that name; None leaves it as it is.

    Parameters
    ----------
    q : array or tensor, shape (..., m)
    how : {None, "sort", "pava", "minmax"}
    levels : array, shape (m,)
    level_weights : array, shape (m,) or that of q, optional
        Positive weights that the loss gives to levels. "pava" projects with them; "sort" has no
        guarantee unless they are equal.

    Raises
    ------
    ConfigError
        For another name, or ill-formed levels.
    DataError
        As for the operator.

    Warns
    -----
    QuantileWarning
        Once, for "sort" with unequal level weights.
    """
    if how is not None and how not in OPERATORS:
        raise ConfigError(f"isotonize={how!r}: allowed is None or one of {', '.join(OPERATORS)}")
    if how is None:
        return q
    if how == "minmax":
        return minmax(q, levels)
    check_levels(levels, np.shape(q)[-1] if np.ndim(q) else None)
    if how == "pava":
        return pava(q, level_weights)
    if level_weights is not None:
        _warn_unequal(_weights(level_weights, tuple(np.shape(q))))
    return sort(q)


def _warn_unequal(weights: np.ndarray | None) -> None:
    if weights is not None and np.any(np.ptp(weights, axis=-1) > 1e-12 * weights.max(axis=-1)):
        warnings.warn(
            "isotonize='sort' with unequal level weights: sorting may raise the weighted loss; use 'pava',"
            " which projects with these weights and never does", QuantileWarning, stacklevel=3)


# ------------------------------------------------------------------ input


def _is_tensor(q: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(q, torch.Tensor)


def _rows(q: Any) -> np.ndarray:
    return finite("q", q, None, infinite=True, keep_float32=True)


def _tensor_rows(q: Any) -> Any:
    if q.ndim == 0 or q.numel() == 0 or not q.is_floating_point():
        raise DataError(f"q is a {q.dtype} tensor of shape {tuple(q.shape)}: allowed are floating point "
                        "tensors of 1 axis or more, none empty")
    return q


def _weights(weights: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return positive weights, shape (m,) or (rows, m); None stands for equal ones."""
    if weights is None:
        return None
    if _is_tensor(weights):
        weights = weights.detach().cpu().numpy()
    out = finite("weights", weights, None)
    if out.shape not in (shape[-1:], shape):
        raise DataError(f"weights have shape {out.shape}: allowed are {shape[-1:]} and {shape}")
    if out.min() <= 0:
        raise DataError(f"weights hold {out.min():g}: allowed are weights > 0")
    return out if out.ndim == 1 else out.reshape(-1, shape[-1])


# ------------------------------------------------------------------ pool adjacent violators


def _pool(q: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the values and sizes of all blocks, row after row, of rows (n, m)."""
    n, m = q.shape
    crossing = np.flatnonzero((q[:, 1:] < q[:, :-1]).any(axis=1))
    if crossing.size == 0:
        return q.reshape(-1), np.ones(n * m, dtype=np.intp)
    w = None if weights is None else np.broadcast_to(weights, q.shape)[crossing]
    mean, size = np.array(q), np.ones((n, m), dtype=np.intp)
    mean[crossing], size[crossing] = _pool_crossing(q[crossing], w)
    kept = size.reshape(-1) > 0
    return mean.reshape(-1)[kept], size.reshape(-1)[kept]


def _pool_crossing(q: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Pool all rows at once: a stack of blocks per row, kept in the first columns; size 0 is empty.

    Level k is pushed on every stack; then the stacks whose two top blocks are out of order merge
    them, until none is. A row makes at most m - 1 merges in all.
    """
    n, m = q.shape
    mean, mass, size = np.empty(n * m), np.empty(n * m), np.zeros(n * m, dtype=np.intp)
    top = np.arange(n) * m - 1  # flat position of the last block of each row
    first = top + 1
    for k in range(m):
        top += 1
        mean[top], mass[top], size[top] = q[:, k], 1.0 if w is None else w[:, k], 1
        rows = np.flatnonzero((top > first) & (mean[top - 1] > q[:, k]))
        while rows.size:
            at = top[rows]
            under, total = at - 1, mass[at - 1] + mass[at]
            mean[under] += (mean[at] - mean[under]) * (mass[at] / total)
            mass[under] = total
            size[under] += size[at]
            size[at] = 0
            top[rows] = under
            rows = rows[under > first[rows]]
            at = top[rows]
            rows = rows[mean[at - 1] > mean[at]]
    return mean.reshape(n, m), size.reshape(n, m)


@cache
def _pava_function() -> Any:
    """Return the autograd function of `pava`, made when the first tensor comes."""
    import torch

    class Pava(torch.autograd.Function):
        """Forward on the CPU in float64; backward averages the gradient over each block."""

        @staticmethod
        def forward(ctx: Any, q: Any, weights: np.ndarray | None) -> Any:
            rows = q.detach().cpu().double().numpy().reshape(-1, q.shape[-1])
            mean, size = _pool(rows, weights)
            block = torch.from_numpy(np.repeat(np.arange(size.size), size)).to(q.device)
            w = np.ones(rows.size) if weights is None else np.broadcast_to(weights, rows.shape).reshape(-1)
            mass = np.bincount(np.repeat(np.arange(size.size), size), w)
            share = torch.from_numpy(w / np.repeat(mass, size)).to(q)
            ctx.save_for_backward(block, share)
            ctx.n_blocks = size.size
            return torch.from_numpy(np.repeat(mean, size).reshape(q.shape)).to(q)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            block, share = ctx.saved_tensors
            flat = grads[0].reshape(-1)
            total = flat.new_zeros(ctx.n_blocks).index_add(0, block, flat)
            return (share * total[block]).reshape(grads[0].shape), None

    return Pava
