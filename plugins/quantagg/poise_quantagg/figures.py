"""The figures of one split of the recipe `quantile`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from poise_quantagg import plots, scores
from poise_quantagg.monotone import sort
from poise_quantagg.splits import Outcome, Predicted, Split

WEIGHT_ROWS = 400  # test rows whose local weights are drawn


def draw(
    outcomes: Mapping[str, Outcome], split: Split, found: Predicted, target: str, folder: Path
) -> list[str]:
    """Draw the figures of one split; the fan is that of the best aggregator, in the unit of `target`."""
    mean, std = split.scale
    y, levels, models = split.test.y, found.levels, found.models
    panels: dict[str, dict[str, np.ndarray]] = {}
    for name, outcome in outcomes.items():
        panels.setdefault({"model": "base models", "aggregator": "aggregators"}[outcome.kind],
                          {})[name] = sort(outcome.raw)
    aggregated = panels.get("aggregators") or panels["base models"]
    last = min(aggregated, key=lambda name: scores.wis(y, aggregated[name], levels, "hub"))
    files = [plots.reliability(folder / "figures/reliability.png", y, panels, levels,
                               title=f"Calibration on {len(y)} test rows, after sorting"),
             plots.fan(folder / "figures/fan.png", mean + std * y, mean + std * aggregated[last], levels,
                       title=f"Predictions of {last}", unit=target)]
    for name, outcome in outcomes.items():
        if outcome.fitted is None:
            continue
        if outcome.local:
            rows = np.linspace(0, len(y) - 1, min(len(y), WEIGHT_ROWS)).astype(int)
            x = split.test.x[rows]
            files.append(plots.weights_by_feature(
                folder / f"figures/weights_{name}.png", x, _per_model(outcome.fitted, x), models,
                split.columns, title=f"Weights of {name}"))
        elif np.asarray(outcome.fitted.weights()).ndim == 2:
            files.append(plots.weights_by_level(folder / f"figures/weights_{name}.png",
                                                outcome.fitted.weights(), models, levels,
                                                title=f"Weights of {name}"))
    return [f"figures/{Path(file).name}" for file in files]


def _per_model(fitted: Any, X: np.ndarray) -> np.ndarray:
    """Return the total weight of each model at rows X, averaged over output levels, (n, p)."""
    parts = []
    for block in np.array_split(np.arange(len(X)), max(1, len(X) // 50)):
        w = fitted.weights(X[block])
        parts.append(w if w.ndim == 2 else w.mean(axis=2) if w.ndim == 3 else w.sum(axis=2).mean(axis=2))
    return np.concatenate(parts)
