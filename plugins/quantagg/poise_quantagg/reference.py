"""The same programs for HiGHS: slow, independent, the oracle of `programs` and of its benchmark."""

from __future__ import annotations

import numpy as np

from poise.errors import RunError, require


def pinball_program(
    A: np.ndarray, y: np.ndarray, s: np.ndarray, tau: np.ndarray, *, simplex: bool, shift: bool = False
) -> tuple[np.ndarray, float]:
    """Minimise sum_i s_i psi_{tau_i}(y_i - a_i'w) over free or simplex weights.

    With `shift` simplex weights come with a free intercept; free ones take a column of ones in A.

    The bounded dual is what is solved: q rows and N boxed unknowns, instead of N rows and 2N + q
    unknowns. The weights are the multipliers of its rows.

    Parameters
    ----------
    A : array, shape (N, q)
    y, s, tau : arrays, shape (N,)

    Returns
    -------
    w : array, shape (q,)
    objective : float

    Raises
    ------
    RunError
        When HiGHS stops without an optimum.
    """
    optimize, sparse = require("scipy.optimize", "quantagg"), require("scipy.sparse", "quantagg")
    n, q = A.shape
    if simplex:  # the same residuals, wherever zero is
        A, y = A - y[:, None], np.zeros(n)
    # HiGHS' tolerances are absolute
    size = np.abs(A if simplex else y - np.median(y))
    unit = float(np.median(size)) or float(size.max()) or 1.0
    A, y = A / unit, y / unit
    bounds = np.column_stack([-s * (1 - tau), s * tau])
    if not simplex:
        answer = optimize.linprog(-y, A_eq=sparse.csr_array(A.T), b_eq=np.zeros(q), bounds=bounds,
                                  method="highs")
        _solved(answer)
        return -answer.eqlin.marginals, -answer.fun * unit
    columns = sparse.csr_array(np.hstack([A.T, -np.ones((q, 1))]))
    answer = optimize.linprog(
        np.r_[-y, 1.0], A_ub=columns, b_ub=np.zeros(q),
        A_eq=np.r_[np.ones(n), 0.0][None] if shift else None, b_eq=[0.0] if shift else None,
        bounds=np.vstack([bounds, [-np.inf, np.inf]]), method="highs",
    )
    _solved(answer)
    w = np.maximum(-answer.ineqlin.marginals, 0)
    return w / w.sum(), -answer.fun * unit


def _solved(answer) -> None:
    if answer.status != 0:
        raise RunError(f"HiGHS stopped without an optimum: {answer.message}")
