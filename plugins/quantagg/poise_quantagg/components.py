"""The components of the plugin: options with defaults and ranges, heavy imports inside methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from poise.errors import ConfigError
from poise.options import check_options, option

if TYPE_CHECKING:
    import numpy as np

    from poise.interfaces import FittedAggregator, Parts
    from poise_quantagg.checks import FitRows

LEVELS = [k / 100 for k in range(1, 100)]  # the paper's grid
PENALTIES = ("constant", "adaptive", "distance")
ISOTONIZERS = ("sort", "pava", "minmax")
_LEVELS = "quantile levels, increasing"
_GRID = "levels that are trained, evenly spread, the others interpolated; null: all"


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

    needs_features: ClassVar[bool] = False
    streams: ClassVar[bool] = False  # looks at a block of rows at a time: a float32 Z stays as it is

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
        X : array, shape (n, d), optional
            Features; needed by local weights, ignored by others.
        levels : array, shape (m,), optional
            Increasing, in (0, 1); without them k / (m + 1).
        validation : (Z, y) or (Z, y, X), optional
            Rows that choose among configurations and stop training; without them a fifth of the rows
            is held out where that is needed.
        sample_weight : array, shape (n,), optional
            Non-negative, not all zero.

        Raises
        ------
        ConfigError
            For ill-formed levels, or options that exclude each other.
        DataError
            For wrong shapes, values that are not finite, negative or all-zero weights, features that
            are needed and missing.
        """
        from poise_quantagg.checks import fit_rows

        return self._solve(fit_rows(Z, y, X, levels, validation, sample_weight, self.needs_features,
                                    keep_float32=self.streams))

    def _solve(self, rows: FitRows) -> FittedAggregator:
        raise NotImplementedError


@dataclass(frozen=True)
class Average(_Aggregator):
    """Mean over models, level by level (section 1.4 "simple aggregators"); nothing is learnt."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import average

        return average(rows.Z)


@dataclass(frozen=True)
class Median(_Aggregator):
    """Median over models, level by level; not linear in Z (see `FittedMedian`)."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import median

        return median(rows.Z)


@dataclass(frozen=True)
class Best(_Aggregator):
    """The one model of least pinball loss, on the validation rows when there are some."""

    streams: ClassVar[bool] = True

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import best

        if rows.validation is not None:
            Z, y, _ = rows.validation
            return best(Z, y, rows.levels, y * 0 + 1)
        return best(rows.Z, rows.y, rows.levels, rows.s)


@dataclass(frozen=True)
class Greedy(_Aggregator):
    """Forward selection with replacement (Caruana et al. 2004), one weight per model, as AutoGluon's."""

    streams: ClassVar[bool] = True
    rounds: int = option(50, "models added, repeats included", low=1)

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import greedy

        return greedy(rows.Z, rows.y, rows.levels, rows.s, self.rounds)


@dataclass(frozen=True)
class QRA(_Aggregator):
    """Quantile regression averaging: y on the models' predictions, level by level, exact."""

    intercept: bool = option(True, "add an intercept to each level")
    simplex: bool = option(False, "weights non-negative with sum 1")

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import qra

        return qra(rows.Z, rows.y, rows.levels, rows.s, intercept=self.intercept, simplex=self.simplex)


@dataclass(frozen=True)
class FQRA(_Aggregator):
    """Factor QRA: y on the leading principal components of the models' predictions, exact."""

    factors: int | None = option(None, "components; null: chosen by `choose`", low=1)
    choose: str = option("bic", "how the number of factors is chosen", choices=("bic", "variance"))
    variance: float = option(0.95, "share to explain with choose=variance", above=0, high=1)

    def _solve(self, rows):
        from poise_quantagg.aggregators.simple import fqra

        return fqra(rows.Z, rows.y, rows.levels, rows.s, factors=self.factors, choose=self.choose,
                    variance=self.variance)


@dataclass(frozen=True)
class _Trained(_Aggregator):
    """Options of weights that are trained by gradient."""

    penalty: str | None = option(None, "crossing penalty: constant, adaptive, distance; null: none")
    penalty_weight: float | None = option(None, "its weight; null: searched", above=0)
    margin: float | None = option(None, "its margin, for y of unit variance; null: searched", low=0)
    loss_isotonize: str | None = option(
        None, "sort, pava or minmax inside the training loss; null: none")
    start: str = option("exact", "weights that training starts from: the exact global solution, or "
                        "equal ones as in the paper", choices=("exact", "uniform"))
    n_iter: int = option(20, "configurations tried", low=1)
    max_steps: int | None = option(None, "optimizer steps at most; null: by the number of rows", low=1)
    patience: int | None = option(
        None, "steps without a better validation score before stopping; null: by the rows", low=1)
    random_state: int = _seed()

    resolution: ClassVar[str] = ""
    local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("penalty", PENALTIES), ("loss_isotonize", ISOTONIZERS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"{type(self).__name__}.{name}={value!r} is not allowed: it must be "
                                  f"one of {', '.join(allowed)} or null")

    def _search(self, rows, **more):
        import numpy as np

        from poise_quantagg.aggregators.search import SearchOptions, search

        names = ("penalty", "penalty_weight", "margin", "loss_isotonize", "start", "n_iter",
                 "max_steps", "patience", "random_state")
        options = SearchOptions(self.resolution, self.local, **{k: getattr(self, k) for k in names}, **more)
        Z = np.asarray(rows.Z, dtype=float)
        return search(options, Z, rows.y, rows.X, rows.levels, rows.s, rows.validation)


@dataclass(frozen=True)
class _Global(_Trained):
    """Weights that do not depend on the features (eq 16).

    The paper minimises by SGD over a softmax; `solver=exact` solves the same problem as a linear
    program with a certified gap: no step size, no stopping rule, no seed.
    """

    solver: str = option("auto", "auto: exact unless there is a penalty or loss_isotonize",
                         choices=("auto", "exact", "gradient"))
    simplex: bool = option(True, "weights non-negative with sum 1; false: free, exact solver only")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = [k for k in ("penalty", "loss_isotonize") if getattr(self, k) is not None]
        if self.solver == "exact" and needs:
            raise ConfigError(f"{type(self).__name__}: solver=exact takes no {needs[0]}: use "
                              f"solver=gradient or auto")
        if not self.simplex and (needs or self.solver == "gradient"):
            raise ConfigError(f"{type(self).__name__}: simplex=false is for the exact solver: drop "
                              f"{needs[0] if needs else 'solver=gradient'}")

    def _solve(self, rows):
        from poise_quantagg.aggregators.global_ import exact

        by_gradient = self.penalty is not None or self.loss_isotonize is not None
        if self.solver == "gradient" or (self.solver == "auto" and by_gradient):
            return self._search(rows)
        return exact(self.resolution, rows.Z, rows.y, rows.levels, rows.s, self.simplex)


@dataclass(frozen=True)
class GlobalCoarse(_Global):
    """One weight per model, shared by all levels."""

    resolution: ClassVar[str] = "coarse"
    streams: ClassVar[bool] = True


@dataclass(frozen=True)
class GlobalMedium(_Global):
    """One weight per model and level."""

    resolution: ClassVar[str] = "medium"


@dataclass(frozen=True)
class GlobalFine(_Global):
    """One weight per model, input level and output level."""

    resolution: ClassVar[str] = "fine"


@dataclass(frozen=True)
class _Local(_Trained):
    """Weights that a network computes from the features (eq 17)."""

    width: int | None = option(None, "hidden units of a layer; null: searched", low=1)
    depth: int | None = option(None, "hidden layers; null: searched", low=1)

    resolution: ClassVar[str] = ""
    local: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True

    def _solve(self, rows):
        return self._search(rows, width=self.width, depth=self.depth)


@dataclass(frozen=True)
class LocalCoarse(_Local):
    """One weight per model, by a network from the features."""

    resolution: ClassVar[str] = "coarse"


@dataclass(frozen=True)
class LocalMedium(_Local):
    """One weight per model and level, by a network from the features."""

    resolution: ClassVar[str] = "medium"


@dataclass(frozen=True)
class LocalFine(_Local):
    """One weight per model, input level and output level, by a network from the features (DQA).

    `rank` and `band` are approximations: the first puts a bottleneck before the logits, the second
    lets a level look only at levels near it. Both train faster and hold fewer numbers.
    """

    rank: int | None = option(None, "units of a last hidden layer before the logits; null: none", low=1)
    band: int | None = option(None, "input levels on each side of the output level; null: all", low=0)

    resolution: ClassVar[str] = "fine"

    def _solve(self, rows):
        return self._search(rows, width=self.width, depth=self.depth, rank=self.rank, band=self.band)


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
    grid: int | None = option(None, _GRID, low=2)
    random_state: int = _seed()

    per_level: ClassVar[bool] = True

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
    grid: int | None = option(None, _GRID, low=2)
    random_state: int = _seed()

    per_level: ClassVar[bool] = True

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


@dataclass(frozen=True)
class XGBoost(_Checked):
    """XGBoost with a vector of quantiles: one model for all levels; its quantiles may cross."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    n_estimators: int = option(100, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    max_depth: int = option(6, "deepest level of a tree", low=1)
    grid: int | None = option(19, _GRID, low=2)
    random_state: int = _seed()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `XGBoostRegressor`."""
        from poise_quantagg.base.boosting import XGBoostRegressor

        return XGBoostRegressor(**vars(self))


@dataclass(frozen=True)
class CatBoost(_Checked):
    """CatBoost's MultiQuantile loss: one model for all levels; its quantiles may cross."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    iterations: int = option(300, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    depth: int = option(6, "depth of a tree", low=1, high=16)
    grid: int | None = option(19, _GRID, low=2)
    random_state: int = _seed()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `CatBoostRegressor`."""
        from poise_quantagg.base.boosting import CatBoostRegressor

        return CatBoostRegressor(**vars(self))


@dataclass(frozen=True)
class _Net(_Checked):
    """Options of the neural base models; what is null is searched in the paper's space."""

    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    n_iter: int = option(4, "configurations tried (the paper: 20)", low=1)
    width: int | None = option(None, "hidden units of a layer; null: searched", low=1)
    depth: int | None = option(None, "hidden layers; null: searched", low=1)
    dropout: float | None = option(None, "before each hidden layer but the first; null: searched",
                                   low=0, below=1)
    lr: float | None = option(None, "learning rate of Adam; null: searched", above=0)
    weight_decay: float | None = option(None, "L2 decay; null: searched", low=0)
    max_steps: int | None = option(None, "optimizer steps at most; null: by the number of rows", low=1)
    patience: int | None = option(
        None, "steps without a better validation score before stopping; null: by the rows", low=1)
    random_state: int = _seed()
    adapter: Any = option(None, "an adapter that does not freeze its base; trains one by one then")

    kind: ClassVar[str] = ""
    fits_many: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self.adapter, "freezes_base", False):
            raise ConfigError(f"{type(self).__name__}.adapter={type(self.adapter).__name__} freezes its "
                              f"base, and these networks start untrained: use one that trains it")

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `NetRegressor`."""
        from poise_quantagg.base.nets import NetRegressor

        return NetRegressor(**vars(self), kind=self.kind)


@dataclass(frozen=True)
class GaussianNet(_Net):
    """A network for mean and variance of a normal distribution (CGN); any level, never crosses."""

    kind: ClassVar[str] = "gaussian"


@dataclass(frozen=True)
class SimultaneousNet(_Net):
    """A network that takes the level as an input (SQR); any level."""

    huber: float | None = option(None, "half-width of the Huberised loss; null: searched", low=0)

    kind: ClassVar[str] = "simultaneous"


@dataclass(frozen=True)
class MultiQuantileNet(_Net):
    """A network with one output per level (DQR)."""

    huber: float | None = option(None, "half-width of the Huberised loss; null: searched", low=0)

    kind: ClassVar[str] = "multi"


# ------------------------------------------------------------------ recipe


@dataclass(frozen=True)
class QuantileEnsemble(_Checked):
    """The paper's comparison (section 1.9): cross-fit models, aggregate them in every way, score all.

    A model given to the run (`model=...`) joins `base`; an aggregator given to it joins
    `aggregators`; an adapter goes to the neural base models.
    """

    base: list[str] = option(
        ["linear", "quantile_forest", "extra_trees", "lightgbm", "hist_boosting"],
        "registered quantile models",
    )
    base_options: dict[str, Any] = option({}, "options by model name: {lightgbm: {num_leaves: 7}}")
    aggregators: list[str] = option(
        ["average", "median", "best", "greedy", "qra", "fqra", "global_coarse", "global_medium"],
        "registered aggregators",
    )
    aggregator_options: dict[str, Any] = option({}, "options by aggregator name: {local_fine: {n_iter: 5}}")
    levels: list[float] = option(LEVELS, _LEVELS, above=0, below=1)
    splits: int = option(1, "random splits into training and test rows (the paper: 5)", low=1)
    folds: int = option(5, "parts of the cross-fitting", low=2)
    refit: str = option("all", "new rows by models fitted on all rows, or by the mean of the folds'",
                        choices=("all", "bag"))
    n_jobs: int = option(1, "processes for models x folds", low=1)
    figures: bool = option(True, "draw the figures of the first split")

    def check(self, parts: Parts) -> None:
        """Refuse names, options and parts that do not fit, before anything is loaded."""
        from poise_quantagg.experiment import check

        check(self, parts)

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Run and return the test scores; see `poise_quantagg.experiment.run`."""
        from poise_quantagg.experiment import run

        return run(self, parts, context)

    @staticmethod
    def report(runs: Any) -> tuple[list[Any], list[Any]]:
        """Return tables and figures over all runs of this recipe; see `poise_quantagg.reporting`."""
        from poise_quantagg.reporting import report

        return report(runs)
