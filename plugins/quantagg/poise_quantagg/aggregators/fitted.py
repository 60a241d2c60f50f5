"""What fitted aggregators share: the shapes they were fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from poise.errors import DataError
from poise_quantagg.checks import finite


def check_predictions(Z: np.ndarray, p: int, m: int) -> np.ndarray:
    """Return finite predictions, shape (n, p, m).

    Raises
    ------
    DataError
        When p or m differ from those of the fit, or a value is not finite.
    """
    Z = finite("Z", Z, 3)
    if Z.shape[1:] != (p, m):
        raise DataError(
            f"Z has {Z.shape[1]} models and {Z.shape[2]} levels; fitted on {p} and {m}"
        )
    return Z


@dataclass(frozen=True)
class CoarseFit:
    """A weighted sum over models, the same at every level.

    Parameters
    ----------
    w : array, shape (p,)
        Non-negative, sum 1; so rows that do not cross are combined into one that does not.
    m : int
        Levels at the fit.
    objective : float or None
        Mean pinball loss on the rows of the fit, where it was minimised; in the unit of y.
    """

    w: np.ndarray
    m: int
    objective: float | None = None
    linear = True

    def predict(self, Z: np.ndarray, X: np.ndarray | None = None) -> np.ndarray:
        """Return sum_j w_j Z[:, j, :], shape (n, m).

        Raises
        ------
        DataError
            When Z does not fit the weights.
        """
        return np.einsum("npm,p->nm", check_predictions(Z, len(self.w), self.m), self.w)

    def weights(self, X: np.ndarray | None = None) -> np.ndarray:
        """Return the weights, shape (p,), as a copy."""
        return self.w.copy()
