"""Linear quantile regression (Koenker and Bassett 1978), all levels in one batch, exact."""

from __future__ import annotations

import numpy as np

from poise_quantagg import saved
from poise_quantagg.atoms import atoms_of, settled
from poise_quantagg.base.regressor import QuantileRegressor
from poise_quantagg.checks import check_levels
from poise_quantagg.grid import interpolate


class LinearRegressor(QuantileRegressor):
    """Linear quantiles of standardised features, by the exact solver of the aggregators.

    Minimises mean pinball + alpha * sum |slope|, as scikit-learn's `QuantileRegressor` does.
    """

    _arrays = ("coef_", "intercept_", "mean_", "scale_", "atoms_")

    def __init__(self, *, levels, alpha=0.0):
        self.levels = levels
        self.alpha = alpha

    def _fit(self, X, y, sample_weight) -> None:
        from poise_quantagg.programs import linear

        self.atoms_ = atoms_of(y)
        self.mean_, scale = X.mean(axis=0), X.std(axis=0)
        self.scale_ = np.where(scale > 1e-12 * np.abs(self.mean_), scale, np.inf)
        s = np.ones(len(y)) if sample_weight is None else sample_weight
        self.coef_, self.intercept_ = linear(self._standard(X), y, self.levels_, s, self.alpha)

    def _standard(self, X) -> np.ndarray:
        return (X - self.mean_) / self.scale_

    def _predict(self, X, levels):
        q = settled(self._standard(X) @ self.coef_ + self.intercept_, self.atoms_)
        return interpolate(q, self.levels_, levels)

    def tensors(self):
        """Return what `from_tensors` needs: arrays, and plain values."""
        arrays = {k: getattr(self, k) for k in self._arrays}
        return arrays, {"alpha": self.alpha, "levels": self.levels_.tolist()}

    @classmethod
    def from_tensors(cls, arrays, meta) -> LinearRegressor:
        """Rebuild what `tensors` returned.

        Raises
        ------
        FileError
            For arrays that make no linear model.
        """
        model = cls(levels=meta["levels"], alpha=meta["alpha"])
        model.levels_ = check_levels(meta["levels"])
        d, m = len(saved.array(arrays, "mean_", (None,))), len(model.levels_)
        shapes = {"coef_": (d, m), "intercept_": (m,), "mean_": (d,), "scale_": (d,)}
        for name, shape in shapes.items():  # a constant feature has an infinite scale
            setattr(model, name, saved.array(arrays, name, shape, infinite=name == "scale_"))
        model.n_features_in_, model.atoms_ = d, saved.atoms(arrays, "atoms_")
        return model
