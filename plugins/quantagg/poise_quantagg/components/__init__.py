"""The components of the plugin: aggregators, base models and the recipe, each a frozen dataclass."""

from __future__ import annotations

from poise_quantagg.components.aggregators import (
    FQRA,
    QRA,
    Average,
    Best,
    GlobalCoarse,
    GlobalFine,
    GlobalMedium,
    Greedy,
    LocalCoarse,
    LocalFine,
    LocalMedium,
    Median,
)
from poise_quantagg.components.models import (
    CatBoost,
    ExtraTrees,
    GaussianNet,
    HistBoosting,
    LightGBM,
    Linear,
    MultiQuantileNet,
    QuantileForest,
    SimultaneousNet,
    XGBoost,
)
from poise_quantagg.components.recipe import QuantileEnsemble

__all__ = [
    "FQRA", "QRA", "Average", "Best", "CatBoost", "ExtraTrees", "GaussianNet", "GlobalCoarse", "GlobalFine",
    "GlobalMedium", "Greedy", "HistBoosting", "LightGBM", "Linear", "LocalCoarse", "LocalFine",
    "LocalMedium", "Median", "MultiQuantileNet", "QuantileEnsemble", "QuantileForest", "SimultaneousNet",
    "XGBoost",
]
