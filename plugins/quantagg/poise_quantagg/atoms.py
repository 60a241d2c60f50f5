"""Atoms of the target, values that it takes again and again (a count of 0), and predictions that mean them.

A sum of products leaves 2e-16 or 3.7000000000000006 where the exact result is the atom; whether y <= q is
then a matter of the last digit. Predictions that are an atom but for rounding are that atom.
"""

from __future__ import annotations

import numpy as np

from poise_quantagg.checks import row_blocks

ROUNDING = 1e-12  # of an atom and the target's mean size: some thousand units in the last place


def atoms_of(y: np.ndarray) -> np.ndarray:
    """Return the k values that y (n,) takes more than once, and how near counts as each, shape (2, k)."""
    values, counts = np.unique(y, return_counts=True)
    values = values[counts > 1]
    return np.stack([values, ROUNDING * (np.abs(values) + np.abs(y).mean())])


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
