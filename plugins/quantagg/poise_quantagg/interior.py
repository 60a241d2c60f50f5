"""A batched interior-point method for weighted quantile programs with few unknowns.

One problem of the batch is

    min_w  sum_i s_i psi_{tau_i}(y_i - a_i'w),     w free, or some of its entries on the simplex.

With r = y - Aw = u - v, u, v >= 0, its dual has one multiplier d_i per row in a box:

    max_d  y'd - max_j (A'd)_j [simplex columns],   (A'd)_j = 0 [free columns],
    -s_i (1 - tau_i) <= d_i <= s_i tau_i.

d = 0 is strictly feasible, so are equal weights, and Newton's system is q x q for q unknowns:
everything else is elementwise over rows (Portnoy and Koenker 1997, "The Gaussian hare and the
Laplacian tortoise"; Mehrotra's predictor and corrector). Both objective values are recomputed from
feasible points, so the reported gap is a certificate and not an estimate.

Cost of one iteration on (b, q, N): about b N q (q + 6) multiply-adds and 40 passes over b x N
numbers. Problems retire as their own gap closes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from poise_quantagg.vertex import vertex

TOLERANCE = 1e-9  # relative gap at which a problem is done; the certificate asked for is 1e-7
ITERATIONS = 120
_STEP = 0.9995  # share of the way to the boundary
_RIDGE = 1e-14
_FLOOR = 1e-5
_TINY = 1e-100  # keeps what is positive from vanishing
_STALL = 12  # iterations without a better certificate
_CHUNK = 40_000  # rows x problems worked on together: temporaries then stay in the cache


@dataclass(frozen=True)
class Solution:
    """Solutions of a batch of b problems.

    Parameters
    ----------
    w : array, shape (b, q)
    d : array, shape (b, N)
        Feasible multipliers of the rows.
    objective, bound : array, shape (b,)
        Primal value at w and dual value at d; the optimum lies between them.
    iterations : array, shape (b,), int
    """

    w: np.ndarray
    d: np.ndarray
    objective: np.ndarray
    bound: np.ndarray
    iterations: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """Primal minus dual value, shape (b,); never negative but for rounding."""
        return self.objective - self.bound


@dataclass
class _Problem:
    """A batch in solver coordinates: A (b, q, N), y, s, tau (b, N), simplex mask (q,)."""

    A: np.ndarray
    y: np.ndarray
    s: np.ndarray
    tau: np.ndarray
    simplex: np.ndarray

    def rows(self, keep: np.ndarray | slice) -> _Problem:
        """Return the problems of the batch that `keep` selects."""
        return _Problem(self.A[keep], self.y[keep], self.s[keep], self.tau[keep], self.simplex)

    def times(self, w: np.ndarray) -> np.ndarray:
        """Return A w, shape (b, N)."""
        return np.matmul(w[:, None], self.A)[:, 0]

    def transposed(self, d: np.ndarray) -> np.ndarray:
        """Return A'd, shape (b, q)."""
        return np.matmul(self.A, d[:, :, None])[:, :, 0]

    def value(self, r: np.ndarray) -> np.ndarray:
        """Return sum_i s_i psi_{tau_i}(r_i), shape (b,)."""
        return np.einsum("bn,bn->b", self.s, np.maximum(self.tau * r, (self.tau - 1) * r))


def solve(
    A: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, simplex: np.ndarray,
    tolerance: float = TOLERANCE,
) -> Solution:
    """Solve a batch, in chunks small enough for the cache.

    Parameters
    ----------
    A : array, shape (b, q, N)
        Free columns are orthonormal within each problem (see `orthonormal.basis`), or zero.
    y, s, tau : arrays that broadcast to (b, N)
        s > 0 weights of rows; tau in (0, 1).
    simplex : array of bool, shape (q,)
        Which unknowns are non-negative with sum 1; the others are free.
    tolerance : float
        Relative gap, with respect to the objective, at which a problem is done.
    """
    b, _, n = A.shape
    y, s, tau = (np.broadcast_to(part, (b, n)) for part in (y, s, tau))
    whole, size = _Problem(A, y, s, tau, simplex), max(1, _CHUNK // n)
    parts = [_solve(whole.rows(slice(i, i + size)), tolerance) for i in range(0, b, size)]
    if len(parts) == 1:
        return parts[0]
    names = ("w", "d", "objective", "bound", "iterations")
    return Solution(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass
class _State:
    """Iterates: u, v, d (b, N), w, z (b, q), lam (b,), and the residuals r = y - Aw (b, N)."""

    u: np.ndarray
    v: np.ndarray
    d: np.ndarray
    w: np.ndarray
    z: np.ndarray
    lam: np.ndarray
    r: np.ndarray

    def rows(self, keep: np.ndarray) -> _State:
        return _State(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))


def _solve(problem: _Problem, tolerance: float) -> Solution:
    b, _, n = problem.A.shape
    scale = _start_scale(problem)
    problem = _Problem(np.where(problem.simplex[None, :, None], problem.A / scale[:, None, None],
                                problem.A), problem.y / scale[:, None], problem.s, problem.tau,
                       problem.simplex)
    whole, state = problem, _start(problem)
    best = Solution(state.w.copy(), np.zeros((b, n)), problem.value(state.r), np.full(b, -np.inf),
                    np.zeros(b, dtype=np.int64))
    # a perfect fit has the objective 0: rounding at the start's scale is all one can ask for
    floor = _FLOOR * np.maximum(best.objective, np.finfo(float).tiny)
    alive, stalled = np.arange(b), np.zeros(b, dtype=np.int64)
    for iteration in range(1, ITERATIONS + 1):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is retired below
            _iterate(problem, state)
        better = _certify(problem, state, best, alive)
        best.iterations[alive] = iteration
        stalled[alive] = np.where(better, 0, stalled[alive] + 1)
        gap = best.objective[alive] - best.bound[alive]
        going = gap > tolerance * np.maximum(best.objective[alive], floor[alive])
        going &= stalled[alive] < _STALL
        going &= np.isfinite(state.w).all(axis=1)
        if not going.all():
            problem, state, alive = problem.rows(going), state.rows(going), alive[going]
        if not alive.size:
            break
    w = _vertices(whole, best.w)
    best = replace(best, objective=np.minimum(best.objective, whole.value(whole.y - whole.times(w))))
    w = np.where(whole.simplex, w, w * scale[:, None])
    return Solution(w, best.d, best.objective * scale, best.bound * scale, best.iterations)


def _vertices(problem: _Problem, w: np.ndarray) -> np.ndarray:
    parts = zip(problem.A, problem.y, problem.s, np.broadcast_to(problem.tau, problem.y.shape), w)
    return np.stack([vertex(A, y, s, tau, problem.simplex, at) for A, y, s, tau, at in parts])


def _start_scale(problem: _Problem) -> np.ndarray:
    """Return a typical size of residuals at the starting point, shape (b,)."""
    count = max(1, problem.simplex.sum())
    r = np.abs(problem.y - problem.times(np.broadcast_to(
        problem.simplex / count, (len(problem.A), problem.A.shape[1]))))
    size = np.median(r, axis=1)
    size = np.where(size > 1e-6 * r.mean(axis=1), size, r.mean(axis=1))
    return np.where(size > 0, size, 1.0)


def _start(problem: _Problem) -> _State:
    """Return a strictly feasible point: equal weights, d = 0."""
    b, q, n = problem.A.shape
    simplex = problem.simplex
    w = np.broadcast_to(simplex / max(1, simplex.sum()), (b, q)).copy()
    r = problem.y - problem.times(w)
    shift = 0.1 + np.abs(r).mean(axis=1, keepdims=True) * 0.01
    u, v = np.maximum(r, 0) + shift, np.maximum(-r, 0) + shift
    weight = (problem.s * (problem.tau * u + (1 - problem.tau) * v)).sum(axis=1)
    mu = weight / (2 * n)
    z = np.where(simplex, mu[:, None] * max(1, simplex.sum()), 0.0)
    return _State(u, v, np.zeros((b, n)), w, z, -z.max(axis=1), r)


def _iterate(problem: _Problem, state: _State) -> None:
    """Take one predictor-corrector step, in place."""
    A, s, tau, simplex = problem.A, problem.s, problem.tau, problem.simplex
    # multipliers of u >= 0 and v >= 0
    up, down = np.maximum(s * tau - state.d, _TINY), np.maximum(s * (1 - tau) + state.d, _TINY)
    inverse_up, inverse_down = 1 / up, 1 / down
    theta = 1 / (state.u * inverse_up + state.v * inverse_down)
    H = np.matmul(A * theta[:, None], A.swapaxes(1, 2))
    diagonal = np.einsum("bjj->bj", H)
    curvature = np.where(simplex, state.z / np.where(simplex, state.w, 1.0), 0.0)
    diagonal += curvature
    diagonal *= 1 + _RIDGE  # relative to each column: columns may differ by many orders of size
    diagonal += diagonal == 0
    lack = state.r - (state.u - state.v)
    dual_lack = -problem.transposed(state.d) - state.z - np.where(simplex, state.lam[:, None], 0)
    count = 2 * A.shape[2] + simplex.sum()
    su, sv, sw = state.u * up, state.v * down, state.w * state.z
    mu = (su.sum(axis=1) + sv.sum(axis=1) + sw.sum(axis=1)) / count

    def direction(tu, tv, tw):
        """Solve Newton's equations for the targets of u*up, v*down and w*z."""
        g = lack - tu * inverse_up + tv * inverse_down
        rhs = problem.transposed(theta * g) - dual_lack
        rhs += np.where(simplex, tw / np.where(simplex, state.w, 1.0), 0.0)
        dw, dlam = _bordered(H, rhs, simplex, 1 - state.w[:, simplex].sum(axis=1))
        dd = theta * (g - problem.times(dw))
        du = (tu + state.u * dd) * inverse_up
        dv = (tv - state.v * dd) * inverse_down
        dz = np.where(simplex, (tw - state.z * dw) / np.where(simplex, state.w, 1.0), 0.0)
        return du, dv, dd, dw, dz, dlam

    du, dv, dd, dw, dz, _ = direction(-su, -sv, -sw)
    primal, dual = _steps(state, up, down, du, dv, dd, dw, dz, simplex, 1.0)
    after = ((state.u + primal * du) * (up - dual * dd)).sum(axis=1)
    after += ((state.v + primal * dv) * (down + dual * dd)).sum(axis=1)
    after += ((state.w + primal * dw) * (state.z + dual * dz))[:, simplex].sum(axis=1)
    target = (np.clip(after / count / mu, 0, 1) ** 3 * mu)[:, None]
    du, dv, dd, dw, dz, dlam = direction(
        target - su + du * dd, target - sv - dv * dd,
        np.where(simplex, target - sw - dw * dz, 0.0),
    )
    primal, dual = _steps(state, up, down, du, dv, dd, dw, dz, simplex, _STEP)
    state.u += primal * du
    state.v += primal * dv
    state.w += primal * dw
    state.d += dual * dd
    state.z += dual * dz
    state.lam += dual[:, 0] * dlam
    state.r = problem.y - problem.times(state.w)


def _bordered(
    H: np.ndarray, rhs: np.ndarray, simplex: np.ndarray, lack: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solve H dw - e dlam = rhs, e'dw = lack, with e the simplex columns (none: no border)."""
    if not simplex.any():
        return _solve_spd(H, rhs[:, :, None])[:, :, 0], np.zeros(len(H))
    e = simplex.astype(float)
    both = _solve_spd(H, np.stack([rhs, np.broadcast_to(e, rhs.shape)], axis=2))
    x, t = both[:, :, 0], both[:, :, 1]
    dlam = (lack - x @ e) / (t @ e)
    return x + dlam[:, None] * t, dlam


def _solve_spd(H: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solve symmetric positive definite systems after scaling their diagonals to one."""
    half = 1 / np.sqrt(np.einsum("bjj->bj", H))
    scaled = H * half[:, :, None] * half[:, None, :]
    try:
        x = np.linalg.solve(scaled, half[:, :, None] * rhs)
    except np.linalg.LinAlgError:
        x = np.linalg.pinv(scaled, rcond=1e-15, hermitian=True) @ (half[:, :, None] * rhs)
    return half[:, :, None] * x


def _steps(state, up, down, du, dv, dd, dw, dz, simplex, share) -> tuple[np.ndarray, np.ndarray]:
    """Return primal and dual step lengths, shape (b, 1), that keep everything positive."""
    primal = np.maximum(_rate(du, state.u), _rate(dv, state.v))
    # the multipliers of u and v move by -dd and +dd
    dual = np.maximum((dd / up).max(axis=1), (-dd / down).max(axis=1))
    if simplex.any():
        primal = np.maximum(primal, _rate(dw[:, simplex], state.w[:, simplex]))
        dual = np.maximum(dual, _rate(dz[:, simplex], state.z[:, simplex]))
    return tuple((share / np.maximum(rate, share))[:, None] for rate in (primal, dual))


def _rate(change: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the largest share of the distance to zero that a full step would go, shape (b,)."""
    return -(change / value).min(axis=1)


def _certify(problem: _Problem, state: _State, best: Solution, alive: np.ndarray) -> np.ndarray:
    """Update the best feasible values; return which problems of the batch improved."""
    simplex = problem.simplex
    w, r = state.w, state.r
    if simplex.any():
        total = w[:, simplex].sum(axis=1, keepdims=True)
        exact = np.where(simplex, w / total, w)
        if np.abs(total - 1).max() > 1e-15:
            r = problem.y - problem.times(exact)
        w = exact
    value = problem.value(r)
    bound, d = _dual_value(problem, state.d)
    lower, higher = value < best.objective[alive], bound > best.bound[alive]
    best.objective[alive[lower]], best.w[alive[lower]] = value[lower], w[lower]
    best.bound[alive[higher]], best.d[alive[higher]] = bound[higher], d[higher]
    return lower | higher


def _dual_value(problem: _Problem, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the dual value at the nearest feasible multipliers, and those multipliers."""
    simplex = problem.simplex
    if not simplex.all():
        free = problem.A[:, ~simplex]
        d = d - np.matmul(np.matmul(free, d[:, :, None]).swapaxes(1, 2), free)[:, 0]
        # zero is feasible and the box convex: shrinking keeps the equations and enters the box
        beyond = np.maximum(d / (problem.s * problem.tau), -d / (problem.s * (1 - problem.tau)))
        d = d / np.maximum(beyond.max(axis=1, keepdims=True), 1.0)
    value = np.einsum("bn,bn->b", problem.y, d)
    if simplex.any():
        value -= problem.transposed(d)[:, simplex].max(axis=1)
    return value, d
