"""Choices of widths keep their budget, are monotone in it, and near the best that brute force finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError
from poise_edgemoe.widths.solving import (
    Table,
    bound,
    exact,
    exact_for,
    hull,
    hull_for,
    hull_of,
    upgrades,
)

some = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def tables(draw, most_experts=5, most_widths=4, whole=False):
    """Costs that rise with the width, damages that fall or not: measured ones are noisy."""
    n, b = draw(st.integers(1, most_experts)), draw(st.integers(1, most_widths))
    steps = st.lists(st.integers(1, 9), min_size=b, max_size=b)
    damages = st.lists(st.integers(0, 40), min_size=b, max_size=b)
    cost = np.array([np.cumsum(draw(steps)) for _ in range(n)])
    return Table(cost * draw(st.sampled_from([1, 4096])), np.array([draw(damages) for _ in range(n)]) / 8)


def budgets(table):
    least, most = int(table.cost.min(1).sum()), int(table.cost.max(1).sum())
    return st.integers(least, most + 1)


def choices(table):
    return map(np.array, np.ndindex(*[table.cost.shape[1]] * len(table.cost)))


def best(table, budget):
    return min(table.total(c)[1] for c in choices(table) if table.total(c)[0] <= budget)


@some
@given(st.data())
def test_the_program_is_brute_force_and_no_choice_is_below_the_bound(data):
    table = data.draw(tables())
    budget = data.draw(budgets(table))
    cost, damage = table.total(exact(table, budget))
    assert cost <= budget and damage == pytest.approx(best(table, budget), abs=1e-12)
    assert bound(table, budget) <= damage + 1e-9


@some
@given(st.data())
def test_the_hull_is_within_one_upgrade_of_the_best(data):
    table = data.draw(tables())
    budget = data.draw(budgets(table))
    chosen, filled = hull(table, budget), hull(table, budget, fill=True)
    assert table.total(chosen)[0] <= budget and table.total(filled)[0] <= budget
    assert table.total(filled)[1] <= table.total(chosen)[1]
    _, steps = upgrades(table)
    misfit, spent = 0.0, table.total(upgrades(table)[0])[0]
    for step in steps:
        spent += step.cost
        if spent > budget:
            misfit = step.damage
            break
    assert table.total(chosen)[1] <= best(table, budget) + misfit + 1e-9


@some
@given(st.data())
def test_a_larger_budget_never_harms(data):
    table = data.draw(tables())
    small, large = sorted(data.draw(st.tuples(budgets(table), budgets(table))))
    for solve in (hull, exact):
        assert table.total(solve(table, large))[1] <= table.total(solve(table, small))[1] + 1e-12
    widths = hull(table, small), hull(table, large)
    costs = [table.cost[np.arange(len(w)), w] for w in widths]
    assert (costs[0] <= costs[1]).all()  # nested


@some
@given(st.data())
def test_a_limit_of_damage_is_kept_at_the_least_cost(data):
    table = data.draw(tables())
    least = float(table.damage.min(1).sum())
    limit = data.draw(st.floats(least, least + 20))
    wanted = min(table.total(c)[0] for c in choices(table) if table.total(c)[1] <= limit + 1e-12)
    cost, damage = table.total(exact_for(table, limit + 1e-12))
    assert damage <= limit + 1e-9 and cost == wanted
    nearly, kept = table.total(hull_for(table, limit + 1e-12))
    assert kept <= limit + 1e-9 and nearly >= wanted


@some
@given(st.data())
def test_experts_in_another_order_get_the_same(data):
    """Where no two steps are worth the same."""
    table = data.draw(tables())
    worth = [round(s.worth, 12) for s in upgrades(table)[1]]
    if len(set(worth)) < len(worth):
        return
    order = np.array(data.draw(st.permutations(range(len(table.cost)))))
    budget = data.draw(budgets(table))
    other = Table(table.cost[order], table.damage[order])
    assert (hull(other, budget) == hull(table, budget)[order]).all()


def test_identical_experts_take_two_neighbouring_widths_at_most_and_the_first_take_more():
    table = Table(np.tile([2, 3, 4, 8], (7, 1)), np.tile([9.0, 4.0, 1.0, 0.0], (7, 1)))
    for budget in range(14, 57):
        chosen = hull(table, budget)
        assert sorted(chosen, reverse=True) == chosen.tolist() and chosen.max() - chosen.min() <= 1


def test_what_lies_above_the_hull_is_not_taken():
    cost, damage = np.array([1, 2, 3, 4]), np.array([10.0, 9.0, 2.0, 3.0])
    assert hull_of(cost, damage) == [0, 2]
    assert hull_of(cost, np.array([5.0, 5.0, 5.0, 5.0])) == [0]


@pytest.mark.parametrize("solve", [hull, exact])
def test_a_budget_that_is_too_small_says_the_least(solve):
    table = Table(np.array([[10, 20], [10, 30]]), np.ones((2, 2)))
    with pytest.raises(ConfigError, match="the narrowest widths take 20, the widest 50"):
        solve(table, 19)


@pytest.mark.parametrize("solve", [hull_for, exact_for])
def test_a_loss_that_cannot_be_reached_says_the_least(solve):
    table = Table(np.array([[10, 20]]), np.array([[3.0, 1.5]]))
    with pytest.raises(ConfigError, match=r"a loss of 1 cannot be reached: the .* 1\.5"):
        solve(table, 1.0)


@pytest.mark.parametrize("damage", [np.nan, np.inf, -1.0])
def test_a_damage_that_is_none_is_refused(damage):
    with pytest.raises(ConfigError, match="negative or not finite"):
        Table(np.array([[1, 2]]), np.array([[damage, 0.0]]))


def test_many_experts_are_chosen_exactly_in_units_of_their_common_divisor():
    draw = np.random.default_rng(0)
    cost = np.tile(np.array([5, 7, 9, 16]) * 4096, (300, 1))
    damage = np.sort(draw.exponential(size=(300, 4)), axis=1)[:, ::-1].copy()
    table = Table(cost, damage)
    budget = int(0.6 * cost.max(1).sum())
    found, by_hull = exact(table, budget), hull(table, budget)
    assert table.total(found)[0] <= budget
    assert bound(table, budget) <= table.total(found)[1] + 1e-9 <= table.total(by_hull)[1] + 2e-9


@some
@given(st.data())
def test_budgets_and_limits_are_kept_in_larger_units_too(data):
    """Where the program's table would be too large."""
    table = data.draw(tables())
    budget, widest = data.draw(budgets(table)), float(table.damage.min(1).sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("poise_edgemoe.widths.solving.MOST_CELLS", data.draw(st.integers(8, 64)))
        chosen = table.total(exact(table, budget))
        assert chosen[0] <= budget and chosen[1] >= best(table, budget) - 1e-12
        assert table.total(exact_for(table, widest + 1e-12))[1] <= widest + 1e-9
