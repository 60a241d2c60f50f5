"""Aggregators whose weights do not depend on the features (section 1.4 "global")."""

from __future__ import annotations

import numpy as np

from poise_quantagg.aggregators.fitted import CoarseFit
from poise_quantagg.programs import coarse_weights


def coarse(
    Z: np.ndarray, y: np.ndarray, levels: np.ndarray, sample_weight: np.ndarray
) -> CoarseFit:
    """Return the exact minimiser of the pinball loss over one simplex; see `coarse_weights`.

    It contains the average and every single model, so on the rows of the fit it is never worse
    than any of them.
    """
    w, objective = coarse_weights(Z, y, levels, sample_weight)
    return CoarseFit(w, Z.shape[2], objective)
