"""Atoms of the target, values that it takes again and again (a count of 0), and predictions that mean them.

A sum of products leaves 2e-16 or 3.7000000000000006 where the exact result is the atom; whether y <= q is
then a matter of the last digit. Predictions that are an atom but for rounding are that atom.
"""

from __future__ import annotations

import numpy as np

from poise_quantagg.checks import row_blocks

ROUNDING = 1e-12  # of the numbers that are added up: some thousand units in the last place
SOLVED = 16 * np.finfo(float).eps  # of the mean size of y, the unit in which the solvers work; at most
MOST = 1e-6  # of the usual size of y


def atoms_of(y: np.ndarray) -> np.ndarray:
    """Return the k values that y (n,) takes more than once, and how near counts as each, shape (2, k).

    Sums are of numbers of the atom's own size and of the usual one, the median of y's sizes other than 0.
    Unlike the mean that is not the size of one outlier, which counts for the digits it costs the solvers.
    """
    values, counts = np.unique(y, return_counts=True)
    values, sizes = values[counts > 1], np.abs(y)
    usual = np.median(sizes[sizes > 0]) if sizes.any() else 0.0
    solved = min(SOLVED * sizes.mean(), MOST * usual)
    return np.stack([values, ROUNDING * (np.abs(values) + usual) + solved])


def settled(q: np.ndarray, atoms: np.ndarray | None) -> np.ndarray:
    """Return q (n, ...) with atoms in the place of what is one but for rounding; q itself without atoms."""
    if atoms is None or not atoms.size:
        return q
    out, (values, near) = np.array(q), atoms
    for block in row_blocks(len(out), out[0].size if len(out) else 1):
        part = out[block]
        right = np.searchsorted(values, part)
        for at in (np.maximum(right - 1, 0), np.minimum(right, len(values) - 1)):
            np.copyto(part, values[at], where=np.abs(part - values[at]) <= near[at])
    return out
