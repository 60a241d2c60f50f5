"""The components of the plugin: options with defaults and ranges, heavy imports inside methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError
from poise.options import check_options, option

if TYPE_CHECKING:
    import numpy as np

    from poise.interfaces import FittedAggregator, Parts

LEVELS = [round(0.05 * k, 2) for k in range(1, 20)]
_LEVELS = "quantile levels, increasing"


def _seed() -> Any:
    return option(0, "seed of the model's own randomness", low=0, high=2**32 - 1)


class _Checked:
    """Check the options, and that levels increase, when a component is made."""

    def __post_init__(self) -> None:
        check_options(self)
        levels = getattr(self, "levels", None)
        if levels is not None and (not levels or any(a >= b for a, b in pairwise(levels))):
            raise ConfigError(
                f"{type(self).__name__}.levels={levels!r} is not allowed: give at least one level, "
                f"in increasing order"
            )


# ------------------------------------------------------------------ aggregators


class _Aggregator(_Checked):
    """Shared signature; `_solve` gets checked arrays."""

    def fit(
        self,
        Z: np.ndarray,
        y: np.ndarray,
        X: np.ndarray | None = None,
        *,
        levels: np.ndarray | None = None,
        validation: tuple[np.ndarray, ...] | None = None,
        sample_weight: np.ndarray | None = None,
    ) -> FittedAggregator:
        """Fit on out-of-fold predictions; see `poise.interfaces.Aggregator`.

        Parameters
        ----------
        Z : array, shape (n, p, m)
            Predictions of p models at m levels, in the unit of y.
        y : array, shape (n,)
        X : ignored; global weights do not depend on features.
        levels : array, shape (m,), optional
            Increasing, in (0, 1); without them k / (m + 1).
        validation : ignored; nothing is tuned or stopped early.
        sample_weight : array, shape (n,), optional
            Non-negative, not all zero.

        Raises
        ------
        ConfigError
            For ill-formed levels.
        DataError
            For wrong shapes, values that are not finite, negative or all-zero weights.
        """
        from poise_quantagg.checks import fit_arrays

        return self._solve(*fit_arrays(Z, y, levels, sample_weight))

    def _solve(self, Z, y, levels, sample_weight) -> FittedAggregator:
        raise NotImplementedError


@dataclass(frozen=True)
class Average(_Aggregator):
    """Mean over models, level by level (section 1.4 "simple aggregators"); nothing is learnt."""

    def _solve(self, Z, y, levels, sample_weight):
        from poise_quantagg.aggregators.simple import average

        return average(Z)


@dataclass(frozen=True)
class Median(_Aggregator):
    """Median over models, level by level; not linear in Z (see `FittedMedian`)."""

    def _solve(self, Z, y, levels, sample_weight):
        from poise_quantagg.aggregators.simple import FittedMedian

        return FittedMedian(*Z.shape[1:])


@dataclass(frozen=True)
class GlobalCoarse(_Aggregator):
    """One weight per model, on the simplex, shared by all levels (eq 16 of the paper).

    The paper minimises by SGD over a softmax; this solves the same problem exactly, as a linear
    program, so there is no step size, no stopping rule and no seed.
    """

    def _solve(self, Z, y, levels, sample_weight):
        from poise_quantagg.aggregators.global_ import coarse

        return coarse(Z, y, levels, sample_weight)


# ------------------------------------------------------------------ base models


@dataclass(frozen=True)
class _Forest(_Checked):
    """Options that both kinds of forest share."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    n_estimators: int = option(100, "trees", low=1)
    min_samples_leaf: int = option(8, "fewest rows in a leaf", low=1, unit="rows")
    max_depth: int | None = option(None, "deepest level; null: no limit", low=1)
    max_features: float = option(
        1.0, "share of the features tried at each split", above=0, high=1
    )
    random_state: int = _seed()


@dataclass(frozen=True)
class QuantileForest(_Forest):
    """Random forest with Meinshausen weights; predicts any level in (0, 1)."""

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `ForestRegressor`, with bootstrap."""
        from poise_quantagg.base.forest import ForestRegressor

        return ForestRegressor(**vars(self), kind="random")


@dataclass(frozen=True)
class ExtraTrees(_Forest):
    """Extremely randomised trees with Meinshausen weights, no bootstrap; predicts any level."""

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `ForestRegressor`, with random cuts."""
        from poise_quantagg.base.forest import ForestRegressor

        return ForestRegressor(**vars(self), kind="extra")


@dataclass(frozen=True)
class LightGBM(_Checked):
    """Gradient boosting with LightGBM's quantile objective, one model per level."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    n_estimators: int = option(50, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    num_leaves: int = option(31, "leaves of a tree", low=2)
    min_child_samples: int = option(9, "fewest rows in a leaf", low=1, unit="rows")
    reg_lambda: float = option(0.1, "L2 penalty on leaf values", low=0)
    random_state: int = _seed()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `LightGBMRegressor`."""
        from poise_quantagg.base.boosting import LightGBMRegressor

        return LightGBMRegressor(**vars(self))


@dataclass(frozen=True)
class HistBoosting(_Checked):
    """scikit-learn's histogram gradient boosting, one model per level."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    max_iter: int = option(100, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    max_leaf_nodes: int = option(15, "leaves of a tree", low=2)
    min_samples_leaf: int = option(9, "fewest rows in a leaf", low=1, unit="rows")
    l2_regularization: float = option(0.1, "L2 penalty on leaf values", low=0)
    random_state: int = _seed()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `HistBoostingRegressor`."""
        from poise_quantagg.base.boosting import HistBoostingRegressor

        return HistBoostingRegressor(**vars(self))


@dataclass(frozen=True)
class Linear(_Checked):
    """Linear quantile regression on standardised features, one exact program per level."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    alpha: float = option(0.0, "L1 penalty on the slopes", low=0)

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `LinearRegressor`."""
        from poise_quantagg.base.linear import LinearRegressor

        return LinearRegressor(**vars(self))


# ------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class QuantileEnsemble(_Checked):
    """Cross-fit quantile models, aggregate them, score everything on the test rows.

    A model given to the run (`model=...`) joins `base`; an aggregator given to it joins
    `aggregators`.
    """

    base: list[str] = option(
        ["quantile_forest", "extra_trees", "lightgbm", "hist_boosting", "linear"],
        "registered quantile models",
    )
    base_options: dict[str, Any] = option({}, "options by model name: {lightgbm: {num_leaves: 7}}")
    aggregators: list[str] = option(
        ["average", "median", "global_coarse"], "registered aggregators, default options"
    )
    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    folds: int = option(5, "parts of the cross-fitting", low=2)
    n_jobs: int = option(1, "processes for models x folds", low=1)
    figures: bool = option(True, "draw reliability.png and fan.png")

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Run and return the test scores; see `poise_quantagg.experiment.run`."""
        from poise_quantagg.experiment import run

        return run(self, parts, context)
