"""The paper's allocation: the least important experts at the lower of two neighbouring widths.

Source: EdgeMoE section III-B, and the caption of Fig. 7: a scan over uniform widths brackets the loss,
experts are put in order of importance, and as many of the least important as the loss allows get the lower
width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from poise.errors import ConfigError
from poise_edgemoe.widths.choice import Choice
from poise_edgemoe.widths.profile_file import Profile

PAPER_WIDTHS = (2, 4, 8, 16)
AFTER = 3  # more K than bisection ends at are looked at


class Measures(Protocol):
    """Says what a choice of widths loses."""

    def percent(self, bits: dict[tuple[int, int, str], int]) -> float:
        """Return the loss in percent of the model as trained."""
        ...


def importance(profile: Profile, choice: Choice, low: int) -> np.ndarray:
    """Return rows, the least important first: by measured increase of the loss, else by damage at `low`."""
    worth = [one.damage[low] if one.loss_increase is None else one.loss_increase for one in choice.entries]
    return np.array(sorted(range(len(worth)), key=lambda x: (worth[x], x)))


def first_low(choice: Choice, order: np.ndarray, k: int, low: int, high: int) -> np.ndarray:
    """Return the choice of the first k of an order at one column, and the others at another."""
    chosen = np.full(len(order), high)
    chosen[order[:k]] = low
    return chosen


def by_loss(
    profile: Profile, choice: Choice, percent: float, measure: Measures
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the choice with the most narrow experts whose measured loss is at most `percent`.

    Returns
    -------
    array, dict
        Columns; and the scan, the two widths, every measured (K, loss), whether losses fell where K rose.

    Raises
    ------
    ConfigError
        When no uniform width keeps the loss, with the range that is reachable.
    """
    columns = choice.table.cost.shape[1]
    names = [int(choice.widths[:, c].min()) for c in range(columns)]
    rows = len(choice.entries)
    scan = [measure.percent(choice.bits(np.full(rows, c))) for c in range(columns)]
    said: dict[str, Any] = {"scan": [[b, loss] for b, loss in zip(names, scan, strict=True)]}
    kept = [c for c in range(columns) if scan[c] <= percent]
    if not kept:
        raise ConfigError(f"loss={percent:g}% cannot be reached: uniform widths have {min(scan):.4g}% to "
                          f"{max(scan):.4g}%")
    high = kept[0]
    if high == 0:  # all at the narrowest
        said |= {"widths": [names[0], names[0]], "K": rows, "measured": [[rows, scan[0]]],
                 "not_monotone": []}
        return np.zeros(rows, dtype=int), said
    order = importance(profile, choice, names[high - 1])
    losses = {0: scan[high], rows: scan[high - 1]}
    k = _most(losses, rows, percent, lambda n: measure.percent(
        choice.bits(first_low(choice, order, n, high - 1, high))))
    pairs = sorted(losses.items())
    bumps = [[a, b] for (a, x), (b, y) in pairwise(pairs) if y < x]
    said |= {"widths": [names[high - 1], names[high]], "K": k, "measured": [list(p) for p in pairs],
             "not_monotone": bumps}
    return first_low(choice, order, k, high - 1, high), said


def _most(losses: dict[int, float], rows: int, percent: float, measure: Any) -> int:
    """Return the largest K that was found to keep the loss: bisection, then the next three.

    Losses that are noisy may fall where K rises; hence the look beyond.
    """
    def at(k: int) -> float:
        if k not in losses:
            losses[k] = measure(k)
        return losses[k]

    low, high = 0, rows
    while low < high:
        k = (low + high + 1) // 2
        low, high = (k, high) if at(k) <= percent else (low, k - 1)
    for k in range(low + 1, min(low + AFTER, rows) + 1):
        at(k)
    return max(k for k, loss in losses.items() if loss <= percent)


def by_budget(profile: Profile, choice: Choice, budget: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the choice with the fewest narrow experts within a budget of cost: the paper's, turned round.

    Raises
    ------
    ConfigError
        When the narrowest widths take more.
    """
    rows, columns = choice.table.cost.shape
    totals = choice.table.cost.sum(0)
    fit = [c for c in range(columns) if totals[c] <= budget]
    if not fit:
        raise ConfigError(f"a budget of {budget // choice.unit} is too small: reachable are "
                          f"{totals[0] // choice.unit} to {totals[-1] // choice.unit} bytes {choice.what}")
    low, high = fit[-1], min(fit[-1] + 1, columns - 1)
    names = [int(choice.widths[:, c].min()) for c in (low, high)]
    order = importance(profile, choice, names[0])
    for k in range(rows + 1):
        chosen = first_low(choice, order, k, low, high)
        if choice.table.total(chosen)[0] <= budget:
            break
    return chosen, {"widths": names, "K": k}
