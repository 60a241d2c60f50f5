"""Statistics of a few values, and numbers as a person would write them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation (n - 1 in its denominator), or the one value."""
    if not values:
        return "-"
    if len(set(values)) == 1:
        return number(values[0])
    if not all(map(math.isfinite, values)):
        return "nan"  # statistics has no mean and sd of what is not a number
    return f"{number(statistics.fmean(values))} ± {number(statistics.stdev(values), 2)}"


def difference(values: Sequence[float]) -> str:
    """Return mean ± standard deviation of paired differences, and t = mean / (sd / sqrt(n))."""
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "nan"
    mean = statistics.fmean(values)
    if abs(mean) < 1e-12 * max(map(abs, values), default=0.0):
        mean = 0.0  # what is left of a sum that cancels
    if len(values) == 1:
        return f"{mean:+.4g}"
    if not any(values):
        return "0"
    sd = statistics.stdev(values)
    t = mean / (sd / math.sqrt(len(values))) if sd > 0 else math.copysign(math.inf, mean)
    return f"{mean:+.4g} ± {number(sd, 2)} (t={t:.1f})"


def number(value: float, digits: int = 4) -> str:
    """Return a number the way a person would write it."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"
