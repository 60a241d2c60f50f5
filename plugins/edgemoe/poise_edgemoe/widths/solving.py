"""Which width each expert gets: choices with costs and damages, under a budget of one of them.

A table has a row per expert and a column per width, narrowest first: costs rise, damages fall. `hull`
takes upgrades by damage removed per cost added, `exact` is a dynamic program, `bound` what no choice can
beat. Source: specification of EdgeMoE's allocation, beyond the paper (arXiv 2308.14352 bisects over how
many experts are narrow).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from poise.errors import ConfigError

MOST_CELLS = 1 << 28  # of the dynamic program's table
ROUNDS = 200  # of bisection for the bound


@dataclass(frozen=True)
class Table:
    """Costs and damages of experts by width.

    Parameters
    ----------
    cost : int array, (experts, widths)
        Bytes, or bytes read in a million tokens: rising with the width.
    damage : float array, (experts, widths)
        Of the model's loss; never negative.
    """

    cost: np.ndarray
    damage: np.ndarray

    def __post_init__(self) -> None:
        if self.cost.shape != self.damage.shape or self.cost.ndim != 2 or not self.cost.size:
            raise ConfigError(f"costs {self.cost.shape} and damages {self.damage.shape} are not one table "
                              f"of experts and widths")
        if not np.isfinite(self.damage).all() or (self.damage < 0).any() or (self.cost < 0).any():
            raise ConfigError("a cost or damage is negative or not finite")

    def total(self, chosen: np.ndarray) -> tuple[int, float]:
        """Return cost and damage of a choice, a column for each expert."""
        at = np.arange(len(chosen)), chosen
        return int(self.cost[at].sum()), float(self.damage[at].sum())

    @property
    def least(self) -> np.ndarray:
        """The cheapest choice."""
        return self.cost.argmin(1)


@dataclass(frozen=True)
class Upgrade:
    """A step of one expert to a wider width on its hull."""

    expert: int
    to: int
    cost: int
    damage: float

    @property
    def worth(self) -> float:
        """Damage removed per cost added."""
        return self.damage / self.cost


def hull_of(cost: np.ndarray, damage: np.ndarray) -> list[int]:
    """Return the columns on the lower convex hull of one expert's (cost, damage), cheapest first."""
    order = sorted(range(len(cost)), key=lambda b: (cost[b], damage[b]))
    kept: list[int] = []
    for b in order:
        if kept and damage[b] >= damage[kept[-1]]:
            continue  # dearer, and no better
        while len(kept) > 1 and _above(kept[-2], kept[-1], b, cost, damage):
            kept.pop()
        kept.append(b)
    return kept


def _above(a: int, b: int, c: int, cost: np.ndarray, damage: np.ndarray) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return (damage[a] - damage[b]) * (cost[c] - cost[a]) <= (damage[a] - damage[c]) * (cost[b] - cost[a])


def upgrades(table: Table) -> tuple[np.ndarray, list[Upgrade]]:
    """Return the cheapest choice on the hulls, and all steps from there, the most worth first.

    Of equal worth the lower expert's comes first. An expert's steps are worth less and less, so that they
    come in their order.
    """
    start, steps = np.empty(len(table.cost), dtype=int), []
    for x, (cost, damage) in enumerate(zip(table.cost, table.damage, strict=True)):
        on = hull_of(cost, damage)
        start[x] = on[0]
        steps += [Upgrade(x, b, int(cost[b] - cost[a]), float(damage[a] - damage[b]))
                  for a, b in pairwise(on)]
    return start, sorted(steps, key=lambda s: -s.worth)


def hull(table: Table, budget: float, *, fill: bool = False) -> np.ndarray:
    """Return a choice within a budget of cost: upgrades in their order up to the first that does not fit.

    Choices of larger budgets then hold those of smaller ones. With `fill` what does not fit is left out.
    """
    chosen, steps = upgrades(table)
    spent = _affordable(table, chosen, budget)
    stopped: set[int] = set()
    for step in steps:
        if step.expert in stopped:
            continue
        if spent + step.cost > budget:
            if not fill:
                break
            stopped.add(step.expert)
            continue
        spent += step.cost
        chosen[step.expert] = step.to
    return chosen


def hull_for(table: Table, limit: float) -> np.ndarray:
    """Return a choice with a damage of at most `limit`: upgrades in their order until that is so."""
    chosen, steps = upgrades(table)
    for step in steps:
        if table.total(chosen)[1] <= limit:
            return chosen
        chosen[step.expert] = step.to
    if table.total(chosen)[1] > limit:
        raise ConfigError(f"a loss of {limit:.6g} cannot be reached: the widest widths have "
                          f"{table.total(chosen)[1]:.6g}")
    return chosen


def exact(table: Table, budget: float) -> np.ndarray:
    """Return the choice of least damage within a budget of cost; of equal ones the cheapest.

    Costs are counted in their common divisor, or, where the program's table would be too large, in larger
    units, rounded up: the budget is kept all the same.
    """
    _affordable(table, table.least, budget)
    units, unit = _units(table, min(budget, float(table.cost.max(1).sum())))
    least, came = _program(table, units, unit)
    return _back(came, unit_costs(table, unit), int(np.argmin(least)))


def exact_for(table: Table, limit: float) -> np.ndarray:
    """Return the cheapest choice with a damage of at most `limit`."""
    _, unit = _units(table, float(table.cost.max(1).sum()))
    units = int(unit_costs(table, unit).max(1).sum())  # the widest of all, however they are rounded
    least, came = _program(table, units, unit)
    enough = np.flatnonzero(least <= limit)
    if not len(enough):
        raise ConfigError(f"a loss of {limit:.6g} cannot be reached: the least is {least.min():.6g}")
    return _back(came, unit_costs(table, unit), int(enough[0]))


def unit_costs(table: Table, unit: int) -> np.ndarray:
    """Return costs beyond each expert's least, in units, rounded up."""
    beyond = table.cost - table.cost.min(1, keepdims=True)
    return -(-beyond // unit)


def _units(table: Table, budget: float) -> tuple[int, int]:
    """Return how many units a budget has beyond the least, and the unit: all differences' common divisor,
    or one so large that the table of the program fits."""
    beyond = table.cost - table.cost.min(1, keepdims=True)
    room = int(budget) - int(table.cost.min(1).sum())
    unit = math.gcd(*beyond.ravel().tolist()) or 1
    coarse = -(-room * len(table.cost) // MOST_CELLS)
    unit = max(unit, coarse)
    return room // unit, unit


def _program(table: Table, units: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least damage at every number of units, and the column that each expert has there."""
    costs = unit_costs(table, unit)
    least = np.zeros(units + 1)
    came = np.zeros((len(costs), units + 1), dtype=np.uint8)
    for x, damages in enumerate(table.damage):
        best = np.full(units + 1, np.inf)
        for b in np.argsort(costs[x], kind="stable"):
            c = int(costs[x, b])
            if c > units:
                continue
            with_b = np.full(units + 1, np.inf)
            with_b[c:] = least[: units + 1 - c] + damages[b]
            better = with_b < best
            best[better], came[x, better] = with_b[better], b
        least = best
    return least, came


def _back(came: np.ndarray, costs: np.ndarray, at: int) -> np.ndarray:
    chosen = np.empty(len(came), dtype=int)
    for x in reversed(range(len(came))):
        chosen[x] = came[x, at]
        at -= int(costs[x, chosen[x]])
    return chosen


def bound(table: Table, budget: float) -> float:
    """Return a damage that no choice within a budget of cost is below (Lagrange)."""
    low, high = 0.0, 1.0
    while _relaxed(table, high)[1] > budget and high < 1e300:
        high *= 2
    values = [_relaxed(table, 0.0)[0]]
    for _ in range(ROUNDS):
        price = (low + high) / 2
        value, cost = _relaxed(table, price)
        values.append(value - price * budget)
        low, high = (price, high) if cost > budget else (low, price)
    return max(values)


def _relaxed(table: Table, price: float) -> tuple[float, int]:
    """Return the least of damage plus price times cost, and the cost there."""
    both = table.damage + price * table.cost
    chosen = both.argmin(1)
    at = np.arange(len(chosen)), chosen
    return float(both[at].sum()), int(table.cost[at].sum())


def _affordable(table: Table, chosen: np.ndarray, budget: float) -> int:
    cost = table.total(chosen)[0]
    if not cost <= budget:
        raise ConfigError(f"a budget of {budget:.0f} is too small: the narrowest widths take {cost}, the "
                          f"widest {int(table.cost.max(1).sum())}")
    return cost
