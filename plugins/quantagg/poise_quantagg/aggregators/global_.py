"""Aggregators whose weights do not depend on the features, solved exactly (section 1.4 "global")."""

from __future__ import annotations

import numpy as np

from poise_quantagg import programs
from poise_quantagg.aggregators.fitted import LinearFit


def exact(resolution: str, Z: np.ndarray, y: np.ndarray, levels: np.ndarray, s: np.ndarray,
          simplex: bool = True) -> LinearFit:
    """Return the minimiser of the mean pinball loss over the weights of one resolution.

    Coarse contains the average and every single model, medium contains coarse, fine contains medium:
    on the rows of the fit each is at least as good as the one before.
    """
    found = getattr(programs, resolution)(Z, y, levels, s, simplex=simplex)
    return LinearFit(found.w, Z.shape[2], None, found.objective, found.gap)
