"""Flexible model aggregation for quantile regression (arXiv 2103.00083).

Public names, loaded on first use; neither torch nor scikit-learn is imported until it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_quantagg import components, conformal, monotone, plots, scores
    from poise_quantagg.adapters import per_level
    from poise_quantagg.checks import QuantileWarning
    from poise_quantagg.crossfit import cross_fit
    from poise_quantagg.estimator import QuantileAggregatorRegressor
    from poise_quantagg.stacker import QuantileStacker

_HOMES = {
    "QuantileAggregatorRegressor": "estimator",
    "QuantileStacker": "stacker",
    "QuantileWarning": "checks",
    "cross_fit": "crossfit",
    "per_level": "adapters",
}
_MODULES = ("components", "conformal", "monotone", "plots", "scores")

__all__ = [
    "QuantileAggregatorRegressor", "QuantileStacker", "QuantileWarning", "components", "conformal",
    "cross_fit", "monotone", "per_level", "plots", "scores",
]


def __getattr__(name: str):
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"poise_quantagg.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'poise_quantagg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"poise_quantagg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
