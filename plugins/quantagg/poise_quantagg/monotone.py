"""Making quantiles monotone in the level, row by row."""

from __future__ import annotations

import numpy as np

from poise_quantagg.checks import finite


def sort(q: np.ndarray) -> np.ndarray:
    """Return each row in ascending order (eq 12), as a new array, shape (n, m).

    Prop 1: no farther than q from any monotone row, in every l_p norm, p >= 1. Prop 2: the sum of
    the pinball losses over equally weighted levels never grows, whatever y is; the gain is
    <tau, sort(q) - q>, so it does not even depend on y.

    Raises
    ------
    DataError
        Unless q has shape (n, m) and is finite.
    """
    return np.sort(finite("q", q, 2), axis=1)
