"""Flexible model aggregation for quantile regression (arXiv 2103.00083).

Public names, loaded on first use; neither torch nor scikit-learn is imported until it is needed.
(No submodule bears one of these names, so importing a submodule never shadows a function.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_quantagg.components import Average, GlobalCoarse, Median, QuantileEnsemble
    from poise_quantagg.crossfit import cross_fit
    from poise_quantagg.monotone import sort
    from poise_quantagg.scores import coverage, crossing_rate, interval_score, pinball, wis

_HOMES = {
    "Average": "components",
    "GlobalCoarse": "components",
    "Median": "components",
    "QuantileEnsemble": "components",
    "coverage": "scores",
    "cross_fit": "crossfit",
    "crossing_rate": "scores",
    "interval_score": "scores",
    "pinball": "scores",
    "sort": "monotone",
    "wis": "scores",
}

__all__ = [
    "Average", "GlobalCoarse", "Median", "QuantileEnsemble", "coverage", "cross_fit",
    "crossing_rate", "interval_score", "pinball", "sort", "wis",
]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_quantagg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"poise_quantagg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
