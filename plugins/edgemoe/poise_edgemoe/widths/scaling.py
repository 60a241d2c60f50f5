"""From errors of experts to what they add to a model's badness.

An error of an expert's output is no loss: how much it matters differs from layer to layer. One run for each
layer, all its experts at the narrowest width, says how far its errors move what the model says; each expert
gets its share. The sum is what the model loses when all experts are that narrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise_edgemoe.widths.damages import Row

LEAST_SHARE = 0.01  # of what its output's error says; below it a measured increase is taken for noise


def damages_of(
    rows: list[Row], damage: str, low: int, measured: Mapping[str, Any],
    increases: Mapping[str, tuple[float, float]],
) -> dict[str, dict[int, float]]:
    """Return what each row adds to the badness, by width.

    Parameters
    ----------
    damage : "weight", "output" or "loss"
    low : int
        The width of the measured increases.
    increases : mapping
        Name to measured increase and its standard error, for "loss".
    """
    errors = {r.name: r.weight_error if damage == "weight" else r.output_error for r in rows}
    factors = layer_factors(rows, errors, measured["layers"])
    scaled = {r.name: {b: e * factors[r.layer] for b, e in errors[r.name].items()} for r in rows}
    worth = _worth(sum(min(one.items())[1] for one in scaled.values()), measured["calibration"])
    scaled = {name: {b: e * worth for b, e in one.items()} for name, one in scaled.items()}
    if damage != "loss":
        return scaled
    found = {}
    for r in rows:
        own = scaled[r.name]
        at_low = max(increases[r.name][0], LEAST_SHARE * own[low])
        found[r.name] = {b: at_low * (e / own[low] if own[low] else 0.0) for b, e in own.items()}
    return found


def layer_factors(
    rows: list[Row], errors: Mapping[str, Mapping[int, float]], moved: list[float]
) -> list[float]:
    """Return for each layer how far the model moves per error, never 0.

    A layer that moves nothing takes the least of the others.
    """
    low = min(next(iter(errors.values())))
    sums = [sum(errors[r.name][low] for r in rows if r.layer == n) for n in range(len(moved))]
    seen = [m / s for m, s in zip(moved, sums, strict=True) if m > 0 and s > 0]
    return [m / s if m > 0 and s > 0 else min(seen, default=1.0) for m, s in zip(moved, sums, strict=True)]


def _worth(total: float, calibration: Mapping[str, Any]) -> float:
    """Return what stands between the sum at the narrowest width and the badness that it adds; 1 where none
    was seen."""
    low = min((b for b in calibration if b != "reference"), key=int)
    added = calibration[low]["badness"] - calibration["reference"]["badness"]
    return added / total if added > 0 and total > 0 else 1.0
