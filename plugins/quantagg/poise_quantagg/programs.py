"""The linear programs behind the global aggregators, solved exactly by HiGHS."""

from __future__ import annotations

import numpy as np

from poise.errors import RunError, require

GAP = 1e-6  # largest relative duality gap that counts as solved


def coarse_weights(
    Z: np.ndarray, y: np.ndarray, levels: np.ndarray, sample_weight: np.ndarray
) -> tuple[np.ndarray, float]:
    """Minimise sum_i s_i sum_k psi_k(y_i - sum_j w_j Z_ijk) over the simplex (eqs 15 and 16).

    Written with one residual split per (row, level), the primal has 2nm + p unknowns and nm rows.
    Its dual has nm boxed unknowns and only p rows, and is what is solved:

        max y'd + t   subject to   Z_j'd + t <= 0 for each model j,   -s (1 - tau) <= d <= s tau.

    The weights are the multipliers of its p rows. Both objective values are compared, so an
    answer is certified optimal or refused.

    Parameters
    ----------
    Z : array, shape (n, p, m)
    y : array, shape (n,)
    levels : array, shape (m,)
    sample_weight : array, shape (n,)
        Non-negative, mean 1.

    Returns
    -------
    weights : array, shape (p,)
        Non-negative, sum 1.
    objective : float
        The minimum divided by nm: weighted mean pinball loss, in the unit of y.

    Raises
    ------
    RunError
        When HiGHS does not reach the optimum.
    """
    # rows of weight zero have no influence; deviations from y on unit scale suit the tolerances
    keep = sample_weight > 0
    s = np.repeat(sample_weight[keep], len(levels))
    deviation = (Z[keep] - y[keep, None, None]).transpose(1, 0, 2).reshape(Z.shape[1], -1)
    scale = np.median(np.abs(deviation)) or np.abs(deviation).max() or 1.0
    tau = np.tile(levels, int(keep.sum()))
    weights, dual = _solve_dual(deviation / scale, s, tau)
    residual = -weights @ deviation
    primal = float(s @ np.maximum(tau * residual, (tau - 1) * residual))
    if abs(primal - scale * dual) > GAP * max(abs(primal), scale):
        raise RunError(f"global_coarse: duality gap {primal - scale * dual:.3g} at {primal:.3g}")
    return weights, primal / (len(y) * len(levels))


def _solve_dual(
    deviation: np.ndarray, s: np.ndarray, tau: np.ndarray
) -> tuple[np.ndarray, float]:
    """Solve for deviations Z - y, shape (p, nm): on the simplex that is the case y = 0."""
    optimize, sparse = require("scipy.optimize", "quantagg"), require("scipy.sparse", "quantagg")
    p, size = deviation.shape
    rows = sparse.csr_array(np.hstack([deviation, np.ones((p, 1))]))
    cost = np.zeros(size + 1)
    cost[-1] = -1.0
    bounds = np.empty((size + 1, 2))
    bounds[:-1, 0], bounds[:-1, 1], bounds[-1] = -s * (1 - tau), s * tau, (-np.inf, np.inf)
    answer = optimize.linprog(cost, A_ub=rows, b_ub=np.zeros(p), bounds=bounds, method="highs")
    if answer.status != 0:
        raise RunError(f"global_coarse: HiGHS stopped without an optimum: {answer.message}")
    weights = np.maximum(-answer.ineqlin.marginals, 0)
    return weights / weights.sum(), -answer.fun
