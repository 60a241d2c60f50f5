"""Base models: options with defaults and ranges, heavy imports inside methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from poise.errors import ConfigError
from poise.options import option
from poise_quantagg.components.checked import LEVELS, LEVELS_HELP, Checked, seed_option

GRID_HELP = "levels that are trained, evenly spread, the others interpolated; null: all"


@dataclass(frozen=True)
class _Model(Checked):
    """What all base models share."""

    form: ClassVar[str] = "quantile"


@dataclass(frozen=True)
class _Forest(_Model):
    """Options that both kinds of forest share."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    n_estimators: int = option(100, "trees", low=1)
    min_samples_leaf: int = option(8, "fewest rows in a leaf", low=1, unit="rows")
    max_depth: int | None = option(None, "deepest level; null: no limit", low=1)
    max_features: float = option(
        1.0, "share of the features tried at each split", above=0, high=1
    )
    random_state: int = seed_option()


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
class LightGBM(_Model):
    """Gradient boosting with LightGBM's quantile objective, one model per level."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    n_estimators: int = option(50, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    num_leaves: int = option(31, "leaves of a tree", low=2)
    min_child_samples: int = option(9, "fewest rows in a leaf", low=1, unit="rows")
    reg_lambda: float = option(0.1, "L2 penalty on leaf values", low=0)
    grid: int | None = option(None, GRID_HELP, low=2)
    random_state: int = seed_option()

    per_level: ClassVar[bool] = True

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `LightGBMRegressor`."""
        from poise_quantagg.base.boosting import LightGBMRegressor

        return LightGBMRegressor(**vars(self))


@dataclass(frozen=True)
class HistBoosting(_Model):
    """scikit-learn's histogram gradient boosting, one model per level."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    max_iter: int = option(100, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    max_leaf_nodes: int = option(15, "leaves of a tree", low=2)
    min_samples_leaf: int = option(9, "fewest rows in a leaf", low=1, unit="rows")
    l2_regularization: float = option(0.1, "L2 penalty on leaf values", low=0)
    grid: int | None = option(None, GRID_HELP, low=2)
    random_state: int = seed_option()

    per_level: ClassVar[bool] = True

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `HistBoostingRegressor`."""
        from poise_quantagg.base.boosting import HistBoostingRegressor

        return HistBoostingRegressor(**vars(self))


@dataclass(frozen=True)
class Linear(_Model):
    """Linear quantile regression on standardised features, one exact program per level."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    alpha: float = option(0.0, "L1 penalty on the slopes", low=0)

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `LinearRegressor`."""
        from poise_quantagg.base.linear import LinearRegressor

        return LinearRegressor(**vars(self))


@dataclass(frozen=True)
class XGBoost(_Model):
    """XGBoost with a vector of quantiles: one model for all levels; its quantiles may cross."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    n_estimators: int = option(100, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    max_depth: int = option(6, "deepest level of a tree", low=1)
    grid: int | None = option(19, GRID_HELP, low=2)
    random_state: int = seed_option()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `XGBoostRegressor`."""
        from poise_quantagg.base.boosting import XGBoostRegressor

        return XGBoostRegressor(**vars(self))


@dataclass(frozen=True)
class CatBoost(_Model):
    """CatBoost's MultiQuantile loss: one model for all levels; its quantiles may cross."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
    iterations: int = option(300, "boosting rounds", low=1)
    learning_rate: float = option(0.1, "shrinkage", above=0)
    depth: int = option(6, "depth of a tree", low=1, high=16)
    grid: int | None = option(19, GRID_HELP, low=2)
    random_state: int = seed_option()

    def build(self, spec: Mapping[str, Any] | None = None):
        """Return the unfitted `CatBoostRegressor`."""
        from poise_quantagg.base.boosting import CatBoostRegressor

        return CatBoostRegressor(**vars(self))


@dataclass(frozen=True)
class _Net(_Model):
    """Options of the neural base models; what is null is searched in the paper's space."""

    levels: list[float] = option(LEVELS, LEVELS_HELP, above=0, below=1)
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
    random_state: int = seed_option()
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
