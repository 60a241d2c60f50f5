"""Scores and sorting: the paper's identities and propositions (T1 to T4)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise_quantagg import sort
from poise_quantagg.scores import (
    coverage,
    crossing_rate,
    interval_coverage,
    interval_score,
    pinball,
    wis,
)

LEVELS = np.arange(1, 20) / 20
SYMMETRIC = LEVELS[LEVELS != 0.5]


def rows(seed, n=200, m=19):
    """Return targets (n,) and crossing predictions (n, m) of mixed scales."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 3, size=(n, 1))
    return rng.normal(size=n) * scale[:, 0], rng.normal(size=(n, m)) * scale


seeds = st.integers(0, 2**32 - 1)


# ------------------------------------------------------------------ pinball


def test_pinball_by_hand():
    assert pinball([3.0, -1.0], [[1.0, 1.0], [1.0, 1.0]], [0.1, 0.9]) == pytest.approx(
        np.array([[0.2, 1.8], [1.8, 0.2]])
    )


@given(seeds, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_t1_the_sample_quantile_minimises_the_mean_pinball_loss(seed, level):
    y = np.random.default_rng(seed).normal(size=51)
    loss = [pinball(y, np.full((51, 1), c), [level]).mean() for c in np.sort(y)]
    best = np.quantile(y, level, method="inverted_cdf")
    assert pinball(y, np.full((51, 1), best), [level]).mean() == pytest.approx(min(loss))


# ------------------------------------------------------------------ WIS


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_t2_wis_is_the_weighted_sum_of_interval_scores(seed):
    y, q = rows(seed, m=len(SYMMETRIC))
    half = len(SYMMETRIC) // 2
    total = sum(
        2 * SYMMETRIC[k] * interval_score(y, q[:, k], q[:, -1 - k], 2 * SYMMETRIC[k])
        for k in range(half)
    )
    assert wis(y, q, SYMMETRIC, convention="sum") == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_the_median_counts_half_of_a_degenerate_interval():
    y, q = rows(0, m=1)
    assert wis(y, q, [0.5], convention="sum") == pytest.approx(np.abs(y - q[:, 0]))
    degenerate = interval_score(y, q[:, 0], q[:, 0], 1.0)
    assert degenerate == pytest.approx(2 * wis(y, q, [0.5], convention="sum"))


def test_the_three_conventions_differ_by_known_factors():
    y, q = rows(1)
    by = {c: wis(y, q, LEVELS, convention=c) for c in ("sum", "mean", "pinball_mean")}
    assert by["sum"] == pytest.approx(len(LEVELS) * by["mean"])
    assert by["mean"] == pytest.approx(2 * by["pinball_mean"])


def test_mean_wis_tends_to_the_crps_of_a_normal():
    from scipy.stats import norm

    y, levels = np.array([-1.3, 0.0, 0.4, 2.5]), (np.arange(4000) + 0.5) / 4000
    q = np.tile(norm.ppf(levels), (len(y), 1))
    crps = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
    assert wis(y, q, levels, convention="mean") == pytest.approx(crps, abs=1e-5)


@given(seeds, st.floats(-100, 100), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_t13_wis_scales_with_the_unit_of_the_target(seed, shift, factor):
    y, q = rows(seed)
    moved = wis(shift + factor * y, shift + factor * q, LEVELS, convention="sum")
    expected = factor * wis(y, q, LEVELS, convention="sum")
    assert moved == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_an_unknown_or_missing_convention_is_refused():
    y, q = rows(0)
    with pytest.raises(ConfigError, match="pinball_mean"):
        wis(y, q, LEVELS, convention="bracher")
    with pytest.raises(TypeError):
        wis(y, q, LEVELS)


# ------------------------------------------------------------------ coverage and crossing


def test_coverage_by_hand():
    y, q = [1.0, 2.0, 3.0, 4.0], [[1.0, 3.0]] * 4
    assert coverage(y, q).tolist() == [0.25, 0.75]
    assert interval_coverage(y, q, [0.1, 0.9], 0.8) == 0.75


def test_interval_levels_are_found_in_spite_of_rounding():
    levels = [1 - 0.9, 0.5, 0.3 * 3]
    assert interval_coverage([0.0], [[-1.0, 0.0, 1.0]], levels, 0.8) == 1.0
    with pytest.raises(ConfigError, match=r"level 0\.05 is not among"):
        interval_coverage([0.0], [[-1.0, 0.0, 1.0]], levels, 0.9)


def test_crossing_rate_counts_neighbours_that_fall():
    assert crossing_rate([[1, 2, 3], [3, 2, 1]]) == 0.5
    assert crossing_rate([[1, 1, 2]]) == 0
    assert crossing_rate([[5.0]]) == 0
    assert crossing_rate(sort(rows(3)[1])) == 0


# ------------------------------------------------------------------ sorting


@given(seeds, st.sampled_from([1, 2, 4, np.inf]))
@settings(max_examples=60, deadline=None)
def test_t3_sorting_brings_no_row_farther_from_a_monotone_truth(seed, order):
    _, q = rows(seed)
    truth = np.sort(rows(seed + 1)[1], axis=1)
    before = np.linalg.norm(q - truth, ord=order, axis=1)
    after = np.linalg.norm(sort(q) - truth, ord=order, axis=1)
    assert np.all(after <= before * (1 + 1e-12))


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_t4_sorting_never_raises_wis_and_the_gain_does_not_depend_on_y(seed):
    y, q = rows(seed)
    gain = pinball(y, q, LEVELS).sum(axis=1) - pinball(y, sort(q), LEVELS).sum(axis=1)
    size = np.abs(y) + np.abs(q).max(axis=1)
    assert np.all(gain >= -1e-12 * size)
    assert np.all(np.abs(gain - (sort(q) - q) @ LEVELS) <= 1e-12 * size)
    assert np.all(gain[(np.diff(q, axis=1) < 0).any(axis=1)] > 0)


def test_t4_needs_equal_level_weights():
    weights, levels, g = np.array([10.0, 1.0]), [0.1, 0.2], np.array([[1.0, 0.0]])
    before, after = (pinball([2.0], q, levels)[0] @ weights for q in (g, sort(g)))
    assert (before, after) == (pytest.approx(1.4), pytest.approx(2.2))


def test_sort_leaves_its_input_alone():
    q = np.array([[2.0, 1.0]])
    assert sort(q).tolist() == [[1.0, 2.0]]
    assert q.tolist() == [[2.0, 1.0]]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("levels", [
    [0.5, 0.1], [0.1, 0.1], [0.0, 0.5], [0.5, 1.0], [np.nan, 0.5], [], [0.5], [0.1, 0.5, 0.9],
    [[0.1, 0.5]],
])
def test_bad_levels_are_refused_in_one_line(levels):
    with pytest.raises(ConfigError) as caught:
        pinball([0.0], [[0.0, 1.0]], levels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("y", "q"), [
    ([0.0, 1.0], [[0.0, 1.0]]),
    ([np.nan], [[0.0, 1.0]]),
    ([0.0], [[0.0, np.inf]]),
    ([0.0], [0.0, 1.0]),
    ([[0.0]], [[0.0, 1.0]]),
    ([], np.empty((0, 2))),
    (["a"], [[0.0, 1.0]]),
])
def test_bad_arrays_are_refused_in_one_line(y, q):
    for score in (lambda: pinball(y, q, [0.1, 0.9]), lambda: coverage(y, q)):
        with pytest.raises(DataError) as caught:
            score()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.1, np.nan])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        interval_score([0.0], [0.0], [1.0], alpha)
