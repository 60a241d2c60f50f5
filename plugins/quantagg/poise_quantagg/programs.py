"""The programs behind the global aggregators and quantile regression averaging, solved exactly.

Each function minimises the weighted mean pinball loss over one set of weights (eqs 15 and 16) and
returns a `Program` whose `gap` certifies the answer: the distance between the objective and a lower
bound on it. The solver is `interior.solve`; `reference.py` states the same programs for HiGHS.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from poise_quantagg.interior import TOLERANCE, Solution, solve
from poise_quantagg.orthonormal import DEPENDENT, basis, mean_weights

STREAM = 100_000  # residuals above which global coarse works on those near zero only
_KEPT = 20_000  # fewest of these
_PASSES = 30
_CERTIFIED = 1e-7  # relative gap above which free fine weights are asked of HiGHS too
_NEW_COLUMNS = 8
_ROUNDS = 60
_BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class Program:
    """A solved program.

    Parameters
    ----------
    w : array, shape (p,), (p, m) or (p, m, m)
    intercept : array, shape (m,), or scalar for coarse; zeros without one
        In the unit of y.
    objective : float
        Weighted mean pinball loss over rows and levels at w, in the unit of y.
    gap : float
        The objective is at most this much above the optimum; same unit.
    """

    w: np.ndarray
    intercept: np.ndarray
    objective: float
    gap: float


def coarse(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, *,
           simplex: bool = True) -> Program:
    """One weight per model: nm residuals, p unknowns.

    Parameters
    ----------
    Z : array, shape (n, p, m)
    y, s : array, shape (n,)
        Targets, and weights of rows with mean 1.
    levels : array, shape (m,)
    simplex : bool
        Weights non-negative with sum 1; otherwise free.
    """
    n, p, m = Z.shape
    if simplex and n * m > STREAM:
        return _coarse_streamed(Z, y, levels, s)
    keep = s > 0
    rows = int(keep.sum())
    target = np.repeat(y[keep], m)[None]
    A = np.asarray(Z[keep].transpose(1, 0, 2).reshape(1, p, rows * m), dtype=float)
    weight, tau = np.repeat(s[keep], m)[None], np.tile(levels, rows)[None]
    found, w, _ = _general(A, target, weight, tau, simplex=simplex, intercept=False)
    return _program(w[0], np.zeros(()), found, s, m)


def medium(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, *,
           simplex: bool = True, intercept: bool = False, dependent: float = DEPENDENT) -> Program:
    """One weight per model and level: m programs with n residuals and p (+ 1) unknowns each.

    With free weights and an intercept this is quantile regression averaging (Nowotarski and Weron
    2015). Parameters as for `coarse`, and `dependent` as for `basis`.
    """
    _, p, m = Z.shape
    keep = s > 0
    target, weight = y[keep], s[keep]
    size = max(1, _BLOCK_BYTES // (8 * p * max(1, len(target))))
    parts = []
    for i in range(0, m, size):
        block = slice(i, min(m, i + size))
        A = np.ascontiguousarray(Z[:, :, block][keep].transpose(2, 1, 0))
        parts.append(_general(A, target, weight, levels[block, None], simplex=simplex,
                              intercept=intercept, dependent=dependent))
    w = np.concatenate([part[1] for part in parts]).T
    shift = np.concatenate([part[2] for part in parts])
    return _program(w, shift, _joined([part[0] for part in parts]), s, m)


def fine(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, *,
         simplex: bool = True) -> Program:
    """One weight per model, input level and output level: m programs with pm unknowns each.

    On the simplex an optimal solution has few positive weights, so each program is solved by
    column generation: a program over a handful of columns gives multipliers d, and Z'd prices all
    pm columns at once. The lower bound is taken over all columns, so the gap is that of the whole
    program. Parameters as for `coarse`.
    """
    n, p, m = Z.shape
    keep = s > 0
    if keep.all():
        flat, target, weight = Z.reshape(n, p * m), y, s
    else:
        flat, target, weight = Z[keep].reshape(-1, p * m), y[keep], s[keep]
    if not simplex:
        return _fine_free(flat, target, weight, levels, s, p)
    w = np.zeros((m, p * m))
    found = []
    size = max(1, 8 * _BLOCK_BYTES // (8 * 64 * max(1, len(target))))
    for i in range(0, m, size):
        block = np.arange(i, min(m, i + size))
        start = (np.arange(p)[None] * m + block[:, None]) if p > 1 else _near(block, m)
        part, w[block] = _by_columns(flat, target, weight, levels[block], start)
        found.append(part)
    return _program(w.reshape(m, p, m).transpose(1, 2, 0), np.zeros(m), _joined(found), s, m)


def _near(block: np.ndarray, m: int) -> np.ndarray:
    """Return a few neighbouring input levels to start from, distinct per row."""
    width = min(m, 3)
    first = np.clip(block - 1, 0, m - width)
    return first[:, None] + np.arange(width)[None]


def _program(w: np.ndarray, intercept: np.ndarray, found: Solution, s: np.ndarray, m: int) -> Program:
    cells = s.sum() * m
    return Program(w, intercept, float(found.objective.sum() / cells),
                   float(np.maximum(found.gap, 0).sum() / cells))


def _joined(parts: list[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    empty = np.empty((0, 0))
    return Solution(empty, empty, *(np.concatenate([getattr(p, name) for p in parts])
                                    for name in ("objective", "bound", "iterations")))


def linear(
    X: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, alpha: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise weighted mean pinball + alpha * sum |slope| over linear functions, level by level.

    Parameters
    ----------
    X : array, shape (n, d)
    y, s : array, shape (n,)
    levels : array, shape (m,)

    Returns
    -------
    slopes : array, shape (d, m)
    intercepts : array, shape (m,)
    """
    keep = s > 0
    X, y, s = X[keep], y[keep], s[keep]
    n, d = X.shape
    A = np.concatenate([np.ones((1, n)), X.T])
    tau = np.repeat(levels[:, None], n, axis=1)
    if alpha > 0:
        # |slope| is the pinball loss at level 1/2 of a row with target 0, times 2
        A = np.concatenate([A, np.concatenate([np.zeros((1, d)), np.eye(d)])], axis=1)
        y, s = np.r_[y, np.zeros(d)], np.r_[s, np.full(d, 2 * alpha * s.sum())]
        tau = np.concatenate([tau, np.full((len(levels), d), 0.5)], axis=1)
    Q, T = basis(A[None])
    start = Q[0] @ y
    size = max(1, 2 * _BLOCK_BYTES // (8 * Q[0].size))
    w = []
    for i in range(0, len(levels), size):
        part = tau[i : i + size]
        shared = np.broadcast_to(Q, (len(part), *Q.shape[1:]))
        found = solve(shared, y - start @ Q[0], s, part, np.zeros(d + 1, dtype=bool))
        w.append((found.w + start) @ T[0].T)
    slopes = np.concatenate(w).T
    return slopes[1:], slopes[0]


# ------------------------------------------------------------------ one batch


def _general(
    A: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, *, simplex: bool, intercept: bool,
    dependent: float = DEPENDENT,
) -> tuple[Solution, np.ndarray, np.ndarray]:
    """Solve on columns A (b, p, N); return the solution, weights (b, p) and intercepts (b,)."""
    b, p, n = A.shape
    y = np.broadcast_to(y, (b, n))
    if simplex:
        # on the simplex, y - Zw = -(Z - y)w: deviations do not depend on where zero is
        columns, mask = A - y[:, None], np.ones(p, dtype=bool)
        target = np.zeros((b, n))
        if intercept:
            columns = np.concatenate([np.full((b, 1, n), n**-0.5), columns], axis=1)
            mask = np.r_[False, mask]
        found = solve(columns, target, s, tau, mask)
        shift = found.w[:, 0] * n**-0.5 if intercept else np.zeros(b)
        return found, found.w[:, -p:], shift
    Q, T = basis(A, intercept, dependent)
    about = np.zeros((b, Q.shape[1])) if intercept else mean_weights(A, y)
    rest = y if intercept else y - np.matmul(about[:, None], A)[:, 0]
    start = np.matmul(Q, rest[:, :, None])  # least squares
    rest = rest - np.matmul(start.swapaxes(1, 2), Q)[:, 0]
    found = solve(Q, rest, s, tau, np.zeros(Q.shape[1], dtype=bool))
    w = about + np.matmul(T, found.w[:, :, None] + start)[:, :, 0]
    shift = w[:, 0] if intercept else np.zeros(b)
    # what the weights themselves achieve, rounding of T included
    r = y - np.matmul(w[:, None, -p:], A)[:, 0] - shift[:, None]
    value = np.einsum("bn,bn->b", np.broadcast_to(s, (b, n)), np.maximum(tau * r, (tau - 1) * r))
    found = dataclasses.replace(found, objective=np.maximum(value, found.bound))
    return found, w[:, -p:], shift


# ------------------------------------------------------------------ fine


def _by_columns(
    flat: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, chosen: np.ndarray
) -> tuple[Solution, np.ndarray]:
    """Solve b programs over all columns of flat (n, P); return them and their weights (b, P)."""
    b, P = len(tau), flat.shape[1]
    w, objective = np.zeros((b, P)), np.full(b, np.inf)
    bound, iterations = np.full(b, -np.inf), np.zeros(b, dtype=np.int64)
    alive = np.arange(b)
    for _ in range(_ROUNDS):
        A = np.ascontiguousarray((flat[:, chosen] - y[:, None, None]).transpose(1, 2, 0))
        found = solve(A, np.zeros(len(y)), s, tau[alive, None], np.ones(chosen.shape[1], bool))
        price = found.d @ flat - (found.d @ y)[:, None]
        better = found.objective < objective[alive]
        objective[alive[better]] = found.objective[better]
        w[alive[better]] = 0
        at, column = np.nonzero(better[:, None] & (found.w > 0))
        np.add.at(w, (alive[at], chosen[at, column]), found.w[at, column])
        bound[alive] = np.maximum(bound[alive], -price.max(axis=1))
        iterations[alive] += found.iterations
        # half of what certifies: the rest is left to the restricted program
        going = objective[alive] - bound[alive] > 10 * TOLERANCE * np.abs(objective[alive])
        if not going.any():
            break
        more = min(_NEW_COLUMNS, P - chosen.shape[1])
        if more <= 0:
            break
        np.put_along_axis(price, chosen, -np.inf, axis=1)
        new = np.argpartition(-price, more - 1, axis=1)[:, :more]
        chosen, alive = np.concatenate([chosen, new], axis=1)[going], alive[going]
    empty = np.empty((0, 0))
    return Solution(empty, empty, objective, bound, iterations), w


def _fine_free(flat, y, s, levels, all_s, p: int) -> Program:
    """Solve with free weights on an orthonormal basis that all output levels share."""
    m = len(levels)
    # A row divided by c with c times its weight is the same program. Without it a row of 1e6 decides what
    # is dependent: levels of one model then differ too little beside it, and directions would be lost.
    size = np.maximum(np.abs(flat).max(axis=1), np.abs(y))
    usual = np.median(size)
    c = np.maximum(1.0, size / usual) if usual > 0 else np.ones(len(size))
    flat, y, s = flat / c[:, None], y / c, s * c
    Q, T = basis(flat.T[None])
    whole = np.einsum("qn,qn->q", Q[0], Q[0]) > 0.5
    Q, T = Q[:, whole], T[:, :, whole]
    about = mean_weights(flat.T[None], y[None])[0]
    rest = y - flat @ about
    start = Q[0] @ rest
    rest = rest - start @ Q[0]
    found, w = [], np.empty((m, p * m))
    for k in range(m):
        one = solve(Q, rest, s, levels[k : k + 1, None], np.zeros(Q.shape[1], dtype=bool))
        if one.gap[0] > _CERTIFIED * one.objective[0]:
            one = _by_highs(one, Q[0], rest, s, np.full(len(s), levels[k]))
        w[k] = about + T[0] @ (one.w[0] + start)
        # what the weights themselves achieve, rounding of T included
        r = y - flat @ w[k]
        value = s @ np.maximum(levels[k] * r, (levels[k] - 1) * r)
        found.append(dataclasses.replace(one, objective=np.maximum(value, one.bound)))
    return _program(w.reshape(m, p, m).transpose(1, 2, 0), np.zeros(m), _joined(found), all_s, m)


def _by_highs(one: Solution, Q: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray) -> Solution:
    """Return the better of a solution that stalled and HiGHS' one, with the bound that was certified.

    Free weights of a million can reach targets of a million; the box of the multipliers is then as wide
    for some rows as it is narrow for others, and their equations lose the digits that a bound needs.
    """
    from poise_quantagg.reference import pinball_program

    w = pinball_program(Q.T, y, s, tau, simplex=False)[0]
    r = y - w @ Q
    value = s @ np.maximum(tau * r, (tau - 1) * r)
    if value >= one.objective[0]:
        return one
    return dataclasses.replace(one, w=w[None], objective=np.array([value]))


# ------------------------------------------------------------------ coarse, without a copy of Z


def _coarse_streamed(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray) -> Program:
    """Solve global coarse by the residuals near zero only (Portnoy and Koenker's preprocessing).

    A residual whose sign is known enters the loss linearly, and all such together as two rows. From
    a solution on a sample, the residuals nearest to zero are kept and the others summed; the loss
    over all residuals and the bound of the reduced program, which is one for the whole, tell how
    good the answer is. Memory beyond Z: 4 bytes per residual and the reduced program.
    """
    n, p, m = Z.shape
    kept = first = max(_KEPT, int(2 * (p * n * m) ** (2 / 3)))  # their rate: the error of the sample
    w = _pilot(Z, y, levels, s, kept)
    best, bound = (np.inf, w), -np.inf
    for _ in range(_PASSES):
        size, value = _sizes(Z, y, levels, s, w)
        worse = value > best[0]
        if not worse:
            best = (value, w)
        if best[0] - bound <= 10 * TOLERANCE * best[0]:
            break
        if worse:
            # too far: signs changed that were taken as known. The way there goes down at first
            w, kept = (best[1] + w) / 2, min(2 * kept, 8 * first)
            continue
        cut = np.partition(size, kept, axis=None)[kept] if kept < size.size else np.inf
        A, target, weight, tau = _reduced(Z, y, levels, s, w, size < cut)
        del size
        found, candidate, _ = _general(A, target, weight, tau, simplex=True, intercept=False)
        del A
        w, bound = candidate[0], max(bound, float(found.bound[0]))
    cells = float(s.sum() * m)
    return Program(best[1], np.zeros(()), best[0] / cells, (best[0] - bound) / cells)


def _pilot(Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray, count: int) -> np.ndarray:
    """Return weights (p,) from about `count` residuals: many rows tell more than a row's many levels."""
    p, m = Z.shape[1:]
    rows = np.flatnonzero(s > 0)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64)]
    level = np.random.default_rng(0).integers(m, size=(len(rows), max(1, min(m, count // len(rows)))))
    row = np.broadcast_to(rows[:, None], level.shape).ravel()
    level = level.ravel()
    A = (Z[row, :, level] - y[row, None]).T[None]  # float64, as y is
    found = solve(A, np.zeros(A.shape[2]), s[row], levels[level], np.ones(p, dtype=bool), 1e-6)
    return found.w[0]


def _blocks(Z: np.ndarray):
    """Yield slices of rows whose part of Z is about 32 MiB."""
    size = max(1, _BLOCK_BYTES // (8 * Z.shape[1] * Z.shape[2]))
    for i in range(0, len(Z), size):
        yield slice(i, min(len(Z), i + size))


def _residuals(Z, y, w, block: slice) -> np.ndarray:
    return y[block, None] - np.matmul(w, Z[block])


def _sizes(Z, y, levels, s, w) -> tuple[np.ndarray, float]:
    """Return |residuals| as float32 (n, m), and the weighted loss over all of them."""
    size, value = np.empty((len(Z), Z.shape[2]), dtype=np.float32), 0.0
    for block in _blocks(Z):
        r = _residuals(Z, y, w, block)
        value += float(s[block] @ np.maximum(levels * r, (levels - 1) * r).sum(axis=1))
        np.abs(r, out=r)
        size[block] = r
        size[block][s[block] == 0] = np.inf
    return size, value


def _reduced(Z, y, levels, s, w, near: np.ndarray):
    """Return the program over the residuals `near` zero and the sums of the others, by sign."""
    p = Z.shape[1]
    columns, targets, weights, taus = [], [], [], []
    sums, sum_y = np.zeros((2, p)), np.zeros(2)
    for block in _blocks(Z):
        r, close = _residuals(Z, y, w, block), near[block]
        at, level = np.nonzero(close)
        part = Z[block]
        columns.append(part[at, :, level].T)
        targets.append(y[block][at])
        weights.append(s[block][at])
        taus.append(levels[level])
        for sign, far in enumerate((~close & (r > 0), ~close & (r <= 0))):
            share = far * (levels if sign == 0 else 1 - levels) * s[block, None]
            sums[sign] += np.einsum("nm,npm->p", share, part)
            sum_y[sign] += float(share.sum(axis=1) @ y[block])
    A = np.concatenate([*columns, sums.T], axis=1)[None]
    # a sum of one sign is its own loss; of the other sign it gets less than its residuals would: then
    # the reduced loss is nowhere above the whole one, and its bound a bound
    little = min(levels[0], 1 - levels[-1]) / 2
    weight = np.r_[np.concatenate(weights), np.full(2, 1 / (1 - little))]
    tau = np.r_[np.concatenate(taus), 1 - little, little]
    # on the simplex Z - y is used, and for a sum that is sums - sum_y: the same form
    return A, np.r_[np.concatenate(targets), sum_y][None], weight[None], tau[None]
