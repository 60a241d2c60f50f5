"""Aggregators that learn nothing: average and median over models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise_quantagg.aggregators.fitted import CoarseFit, check_predictions


def average(Z: np.ndarray) -> CoarseFit:
    """Return equal weights for predictions of shape (n, p, m)."""
    p, m = Z.shape[1:]
    return CoarseFit(np.full(p, 1 / p), m)


@dataclass(frozen=True)
class FittedMedian:
    """The median over models at each level.

    It is the weighted median with equal weights, and monotone inputs give monotone outputs; but
    it is not linear in Z: no fixed weighted sum gives its predictions, hence `linear = False`.
    """

    p: int
    m: int
    linear = False

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return the median over models, shape (n, m).

        Raises
        ------
        DataError
            When Z has other numbers of models or levels than at the fit.
        """
        return np.median(check_predictions(Z, self.p, self.m), axis=1)

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return each model's vote in the weighted median, shape (p,): equal.

        These are not coefficients of a sum (see the class).
        """
        return np.full(self.p, 1 / self.p)
