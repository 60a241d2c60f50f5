"""Crossing penalties for training: all level pairs, without an m x m array per row.

rho(g) = mean over rows of sum over tau < tau' of (g_tau - g_tau' + delta_{tau,tau'})+, divided by the
m(m - 1)/2 pairs (arXiv 2103.00083, eq 19; the division is the authors' code). The hinge is linear where
it is active, so value and gradient follow from counts: with c_k the active pairs in which k is the lower
level minus those in which it is the upper one, the sum is <c, g> + sum of delta over active pairs, and
its gradient is c. `g` has shape (..., m); margins and g have the unit of y, which the paper takes to be
standardised. At a tie (g_tau + delta = g_tau') the subgradient is 0, as for `torch.relu`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import check_levels, finite, row_blocks, same_rows
from poise_quantagg.monotone import pivot_index

DISTANCE_UNIT = 0.01  # the authors' code multiplies its "vec" margins by it
REDUCTIONS = ("mean", "none")
COUNT_PAIRS = 1 << 21  # level pairs of the rows counted at a time, about four for each byte in use
FIRST, FACTOR = 17, 2  # distances 1 to 16 are compared first, then 17 to 33, 34 to 67, ...; FACTOR >= 2
COMPARED = 512  # levels up to which pairs are compared; beyond, merging sorted halves is cheaper
LEAF = 16  # levels whose pairs are compared before halves are merged


def constant(g: Tensor, delta: float | Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the penalty with the same margin delta for every pair ("CrossPenalty").

    The paper draws delta from 1e-4 ... 9.9e-3 for a target of unit variance. Above `COMPARED` levels
    pairs are counted by merging sorted halves on any device, O(m log^2 m) steps and O(m) numbers a row.
    Up to `COMPARED`, where that is faster, pairs are compared: on the CPU by distance, one byte each, up
    to about the largest distance at which any is active, elsewhere as m x m booleans a row. On the CPU
    only rows that cross are touched. delta = 0 is one sort, O(m log m), as for `adaptive`.

    Parameters
    ----------
    g : tensor, shape (..., m)
    delta : float or tensor
        Margin >= 0; a tensor must broadcast to the leading axes of g, as (C, 1) does for one margin per
        configuration and g of shape (C, B, m). It gets no gradient.
    reduction : {"mean", "none"}
        Mean over all leading axes, shape (), or one value per row, shape (...).

    Raises
    ------
    ConfigError
        For a negative margin or an unknown reduction.
    DataError
        For g without levels, or a delta that does not broadcast.
    """
    _check(g, reduction)
    if isinstance(delta, (int, float)) and delta == 0:
        return _reduce(_ranked(g), reduction)
    return _Hinge.apply(g, _margin(delta, g), reduction == "mean")


def adaptive(g: Tensor, margins: Tensor | np.ndarray, *, reduction: str = "mean") -> Tensor:
    """Return the penalty with delta_{tau,tau'} = margins[tau'] - margins[tau] (eq 21, "AdaptCrossPenalty").

    A margin of this form moves into g: with a = g - margins the sum is that of (a_tau - a_tau')+, which
    is <rank(a) - index, a>, and its gradient rank(a) - index. So one stable sort does it, O(m log m).

    Parameters
    ----------
    g : tensor, shape (..., m)
    margins : tensor or array, shape (m,) or any that broadcasts to g
        Non-decreasing: delta_0 * `adaptive_margins(Z, y, levels)`; the paper's code draws delta_0 from
        1e-4 ... 1e-1. It gets no gradient.
    reduction : {"mean", "none"}
        As for `constant`.

    Raises
    ------
    ConfigError
        For margins that fall, or an unknown reduction.
    DataError
        For g without levels, or margins that do not broadcast.
    """
    _check(g, reduction)
    h = torch.as_tensor(margins, dtype=g.dtype, device=g.device).detach()
    if h.ndim == 0 or h.shape[-1] != g.shape[-1]:
        raise DataError(f"margins have shape {tuple(h.shape)}: the last axis must hold {g.shape[-1]}")
    if bool((h[..., 1:] < h[..., :-1]).any()):
        raise ConfigError("margins fall somewhere: allowed are non-decreasing ones, one a level")
    return _reduce(_ranked(g - h), reduction)


def distance(
    g: Tensor, levels: np.ndarray | Tensor, delta0: float | Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Return the penalty with delta_{tau,tau'} = delta0 * 0.01 * (tau' - tau) (authors' code, "vec").

    Parameters
    ----------
    g : tensor, shape (..., m)
    levels : array, shape (m,)
    delta0 : float or tensor
        Scale >= 0; a tensor must broadcast to the leading axes of g.
    reduction : {"mean", "none"}
        As for `constant`.

    Raises
    ------
    ConfigError, DataError
        As for `adaptive`, and for ill-formed levels.
    """
    _check(g, reduction)
    if isinstance(levels, Tensor):
        levels = levels.detach().cpu().numpy()
    tau = torch.as_tensor(check_levels(levels, g.shape[-1]), dtype=g.dtype, device=g.device)
    scale = torch.as_tensor(delta0, dtype=g.dtype, device=g.device).detach()
    return adaptive(g, DISTANCE_UNIT * scale[..., None] * tau, reduction=reduction)


def all_pairs(g: Tensor, delta: float | Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the penalty by its definition, with a (..., m, m) array: the oracle of the fast forms.

    Parameters
    ----------
    g : tensor, shape (..., m)
    delta : float or tensor, broadcastable to (..., m, m)
        Margin of the pair (tau, tau') at [tau, tau']; only tau < tau' is read.
    reduction : {"mean", "none"}
        As for `constant`.
    """
    _check(g, reduction)
    m = g.shape[-1]
    pair = torch.ones(m, m, dtype=torch.bool, device=g.device).triu(1)
    margin = torch.as_tensor(delta, dtype=g.dtype, device=g.device)
    margin = torch.where(pair, margin, -torch.inf)
    hinge = torch.relu(g[..., :, None] - g[..., None, :] + margin)
    return _reduce(hinge.sum((-2, -1)) / _pairs(m), reduction)


def adaptive_margins(Z: np.ndarray, y: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return Q_tau(R), the quantiles of R = y - pilot median, shape (m,), in the unit of y (eq 21).

    The pilot median of a row is the median over models of their predictions at the level nearest to
    0.5 (the authors' code), so Z should hold out-of-fold predictions: in-sample ones make R too small.

    Parameters
    ----------
    Z : array, shape (n, p, m)
    y : array, shape (n,)
    levels : array, shape (m,)

    Raises
    ------
    ConfigError, DataError
        For ill-formed levels, shapes that do not fit, or values that are not finite.
    """
    Z, y = finite("Z", Z, 3, keep_float32=True), finite("y", y, 1)
    same_rows("Z", Z, len(y))
    tau = check_levels(levels, Z.shape[2])
    return np.quantile(y - np.median(Z[:, :, pivot_index(tau)], axis=1), tau)


# ------------------------------------------------------------------ parts


def _check(g: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(f"reduction={reduction!r}: allowed is one of {', '.join(REDUCTIONS)}")
    if g.ndim == 0 or g.numel() == 0 or not g.is_floating_point():
        raise DataError(f"g is a {g.dtype} tensor of shape {tuple(g.shape)}: allowed are floating point "
                        "tensors (..., m), none empty")


def _pairs(m: int) -> int:
    return max(m * (m - 1) // 2, 1)


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    return rows.mean() if reduction == "mean" else rows


def _margin(delta: float | Tensor, g: Tensor) -> np.ndarray:
    """Return a margin per row as an array of the leading axes of g."""
    value = delta.detach().cpu().numpy() if isinstance(delta, Tensor) else np.asarray(delta)
    try:
        margin = np.broadcast_to(value.astype(_numpy_type(g)), g.shape[:-1])
    except ValueError:
        raise DataError(f"delta has shape {value.shape}: it must broadcast to {tuple(g.shape[:-1])}, the "
                        "leading axes of g") from None
    if not (value >= 0).all():
        raise ConfigError(f"delta={delta!r}: allowed is a margin >= 0".replace("\n", " "))
    return margin


def _numpy_type(g: Tensor) -> type[np.floating]:
    return np.float64 if g.dtype == torch.float64 else np.float32


def _ranked(a: Tensor) -> Tensor:
    """Return the mean over pairs i < j of (a_i - a_j)+, shape (...), as <rank - index, a> / pairs.

    In stable order i has before it those j < i that are not larger and those j > i that are smaller:
    rank_i = i - #(j < i, a_j > a_i) + #(j > i, a_j < a_i). Ties, kept in place, add nothing.
    """
    m = a.shape[-1]
    order = a.detach().sort(dim=-1, stable=True).indices
    index = torch.arange(m, device=a.device)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
    net = (rank - index).to(a.dtype) / _pairs(m)
    centre = a[..., m // 2, None].detach()  # counts sum to 0: this changes nothing but rounding
    return ((a - centre) * net).sum(-1)


class _Hinge(torch.autograd.Function):
    """Mean over pairs i < j of (g_i - g_j + delta)+ per row or over rows, with its gradient."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, margin: np.ndarray, mean: bool) -> Tensor:
        count = _hinge_on_cpu if g.device.type == "cpu" else _hinge_elsewhere
        value, net = count(g.detach(), margin)
        ctx.save_for_backward(net / margin.size if mean else net)
        ctx.mean = mean
        return value.mean() if mean else value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (net,) = ctx.saved_tensors
        return (grads[0] if ctx.mean else grads[0].unsqueeze(-1)) * net, None, None


def _hinge_on_cpu(g: Tensor, margin: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the row values, shape (...), and gradients, shape (..., m)."""
    m, kind = g.shape[-1], _numpy_type(g)
    flat = g.reshape(-1, m)
    rows, deltas = (flat if flat.dtype == torch.float64 else flat.float()).numpy(), margin.reshape(-1)
    value, net = np.zeros(len(rows), dtype=kind), np.zeros(rows.shape, dtype=kind)
    crossing = ~np.all(rows[:, 1:] >= rows[:, :-1] + deltas[:, None], axis=1)  # NaN counts as crossing
    by_pairs = m <= COMPARED
    for at in row_blocks(len(rows), m * m if by_pairs else 16 * m, COUNT_PAIRS):
        here = np.flatnonzero(crossing[at])
        pick = at if len(here) == at.stop - at.start else at.start + here
        if not len(here):
            continue
        if by_pairs:
            value[pick], net[pick] = _hinge_sums(np.ascontiguousarray(rows[pick].T), deltas[pick])
        else:
            found = _hinge_by_merging(*(torch.from_numpy(np.array(a[pick])) for a in (rows, deltas)))
            value[pick], net[pick] = (t.numpy() for t in found)
    value, net = value.reshape(g.shape[:-1]), net.reshape(g.shape)
    return torch.from_numpy(value).to(g.dtype), torch.from_numpy(net).to(g.dtype)


def _hinge_sums(g: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values (rows,) and gradients (rows, m) of g (m, rows)."""
    lower, upper = _pair_counts(g, delta)
    net = np.subtract(lower, upper, dtype=g.dtype)
    net /= _pairs(len(g))
    active = np.add.reduce(lower, axis=0, dtype=np.uint32) / _pairs(len(g))
    return np.einsum("mr,mr->r", g - g[len(g) // 2], net) + delta * active, net.T


def _pair_counts(g: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the active pairs in which a level is the lower and the upper one; g (m, rows).

    Pairs are compared by their distance j - i, those from s to t - 1 at once: g continued by inf, seen
    through windows that move down one level a time, against all of g + delta, so that inner loops are
    long. If none of these is active, no pair farther apart is, given t >= 2s: from an active (i, j) at
    distance t or more, (i, i + a) being inactive makes (i + a, j) active, since g_j < g_i + delta <=
    g_{i+a}; a can be chosen so often that a distance from s to t - 1 is reached.
    """
    m, n = g.shape
    kind = np.uint8 if m <= 256 else np.uint32
    lower, upper = np.zeros((m, n), dtype=kind), np.zeros((m, n), dtype=kind)
    reach, longer = g + delta, np.concatenate([g, np.full((m, n), np.inf, dtype=g.dtype)])
    s = 1
    while s < m:
        t = min(FIRST if s == 1 else FACTOR * s, m)
        rows = m - s + 1  # one row of inf below, which the skewed sum runs into
        pairs = np.less(_windows(longer[s:], t - s, rows, 1), reach[:rows])
        active = pairs.view(np.uint8)
        count = np.add.reduce(active, axis=0, dtype=kind)
        if not count.any():
            break
        lower[:rows] += count
        skewed = _windows(active.reshape(-1, n), t - s, rows - 1, rows - 1)  # [r, j]: (j - s - r, j)
        upper[s:] += np.add.reduce(skewed, axis=0, dtype=kind)
        s = t
    return lower, upper


def _windows(a: np.ndarray, count: int, rows: int, step: int) -> np.ndarray:
    """Return the view (count, rows, n) whose k-th window is a[k * step : k * step + rows]."""
    line, item = a.strides
    return np.lib.stride_tricks.as_strided(a, (count, rows, a.shape[1]), (step * line, line, item))


def _hinge_elsewhere(g: Tensor, margin: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return what `_hinge_on_cpu` does, on any device."""
    delta = torch.from_numpy(np.array(margin)).to(g)
    return (_hinge_by_comparing if g.shape[-1] <= COMPARED else _hinge_by_merging)(g, delta)


def _hinge_by_comparing(g: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return row values (...) and gradients (..., m) from m x m booleans a row."""
    active = (g[..., None, :] < (g + delta[..., None])[..., :, None]).triu(1)
    return _from_counts(g, delta, active.sum(-1), active.sum(-2))


def _hinge_by_merging(g: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from a merge tree: in each node, halves find each other by binary search."""
    flat = g.reshape(-1, g.shape[-1])
    lower, upper = _merge_counts(flat, delta.reshape(-1))
    return _from_counts(g, delta, lower.view(g.shape), upper.view(g.shape))


def _from_counts(g: Tensor, delta: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    m = g.shape[-1]
    net = (lower - upper).to(g.dtype) / _pairs(m)
    centred = g - g[..., m // 2, None]
    return (centred * net).sum(-1) + delta * lower.sum(-1) / _pairs(m), net


def _merge_counts(g: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Count the active pairs in which a level is the lower and the upper one; g (rows, m).

    A pair lies in two halves of exactly one node of the tree. There both halves are sorted, adding delta
    keeps the left one sorted, and each member's partners are a stretch of the other half.
    """
    rows, m = g.shape
    depth = max(0, math.ceil(math.log2(m / LEAF)))
    h = -(-m >> depth)  # levels of a leaf; the last ones are filled up by inf, which no pair reaches
    a = torch.nn.functional.pad(g, (0, (h << depth) - m), value=torch.inf).view(rows, -1, h)
    delta = delta[:, None, None]
    active = (a[..., None, :] < (a + delta)[..., :, None]).to(g.dtype)  # numbers: booleans sum slowly
    active *= torch.ones(h, h, dtype=g.dtype, device=g.device).triu(1)
    lower, upper = (active.sum(axis).to(torch.int64).view(rows, -1) for axis in (-1, -2))
    order = torch.arange(h << depth, device=g.device).expand(rows, -1)
    for _ in range(depth):
        a, place = a.view(rows, -1, h).sort(dim=-1)
        order = order.reshape(a.shape).gather(-1, place)
        left, right = a[:, 0::2] + delta, a[:, 1::2].contiguous()
        beyond = torch.searchsorted(right, left)  # how many of the right half are below left + delta
        short = h - torch.searchsorted(left, right, right=True)  # how many of left + delta are above
        lower.scatter_add_(1, order[:, 0::2].reshape(rows, -1), beyond.view(rows, -1))
        upper.scatter_add_(1, order[:, 1::2].reshape(rows, -1), short.view(rows, -1))
        h *= 2
    return lower[:, :m], upper[:, :m]
