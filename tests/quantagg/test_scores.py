"""Scores: identities, propositions on averages (T1, T2, T6 to T8, T13), oracles, bad input."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import laplace, norm

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import finite, row_blocks
from poise_quantagg.scores import (
    CONVENTIONS,
    coverage,
    crossing_depth,
    crossing_rate,
    crps_grid,
    crps_samples,
    interval_coverage,
    interval_length,
    interval_score,
    pinball,
    pinball_loss,
    pit,
    relative_bootstrap,
    wis,
    wis_decomposition,
    wis_rows,
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
    y, q = [3.0, -1.0], [[1.0, 1.0], [1.0, 1.0]]
    assert pinball_loss(y, q, [0.1, 0.9]) == pytest.approx(np.array([[0.2, 1.8], [1.8, 0.2]]))
    assert pinball(y, q, [0.1, 0.9]) == pytest.approx(1.0)
    assert pinball(y, q, [0.1, 0.9], sample_weight=[1.0, 0.0]) == pytest.approx(1.0)


@given(seeds, st.sampled_from([0.1, 0.25, 0.5, 0.9]))
@settings(max_examples=40, deadline=None)
def test_t1_the_sample_quantile_minimises_the_mean_pinball_loss(seed, level):
    y = np.random.default_rng(seed).normal(size=51)
    loss = [pinball(y, np.full((51, 1), c), [level]) for c in np.sort(y)]
    best = np.quantile(y, level, method="inverted_cdf")
    assert pinball(y, np.full((51, 1), best), [level]) == pytest.approx(min(loss))


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_the_mean_loss_is_the_mean_of_the_elements_and_weights_repeat_rows(seed):
    y, q = rows(seed, n=30)
    times = np.random.default_rng(seed).integers(0, 4, size=30)
    times[0] = 1
    assert pinball(y, q, LEVELS) == pytest.approx(pinball_loss(y, q, LEVELS).mean())
    repeated = pinball(np.repeat(y, times), np.repeat(q, times, axis=0), LEVELS)
    assert pinball(y, q, LEVELS, sample_weight=times) == pytest.approx(repeated)


def test_the_huberised_loss_is_quadratic_inside_and_half_a_width_lower_outside():
    y, q, a = np.array([0.3, -0.3, 2.0, -2.0]), np.zeros((4, 1)), 0.5
    expected = [0.8 * 0.09, 0.2 * 0.09, 0.8 * 1.75, 0.2 * 1.75]
    assert pinball_loss(y, q, [0.8], huber=a)[:, 0] == pytest.approx(expected)
    y, q = rows(2)
    assert pinball(y, q, LEVELS, huber=1e-12) == pytest.approx(pinball(y, q, LEVELS), rel=1e-9)
    assert np.all(pinball_loss(y, q, LEVELS, 0.1) <= pinball_loss(y, q, LEVELS) + 1e-15)


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
    assert wis_rows(y, q, SYMMETRIC, "paper") == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_the_median_counts_half_of_a_degenerate_interval():
    y, q = rows(0, m=1)
    assert wis_rows(y, q, [0.5], "paper") == pytest.approx(np.abs(y - q[:, 0]))
    degenerate = interval_score(y, q[:, 0], q[:, 0], 1.0)
    assert degenerate == pytest.approx(2 * wis_rows(y, q, [0.5], "paper"))


def test_the_three_conventions_differ_by_known_factors():
    y, q = rows(1)
    by = {c: wis(y, q, LEVELS, c) for c in CONVENTIONS}
    assert by["paper"] == pytest.approx(len(LEVELS) * by["hub"])
    assert by["hub"] == pytest.approx(2 * by["mean"])
    assert by["mean"] == pytest.approx(pinball(y, q, LEVELS))
    assert all(by[c] == pytest.approx(wis_rows(y, q, LEVELS, c).mean()) for c in CONVENTIONS)


def test_hub_wis_tends_to_the_crps_of_a_normal():
    y, levels = np.array([-1.3, 0.0, 0.4, 2.5]), (np.arange(4000) + 0.5) / 4000
    q = np.tile(norm.ppf(levels), (len(y), 1))
    crps = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
    assert wis_rows(y, q, levels, "hub") == pytest.approx(crps, abs=1e-5)
    assert crps_grid(y, q, levels) == pytest.approx(crps, abs=1e-5)


@given(seeds, st.floats(-100, 100), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_t13_wis_scales_with_the_unit_of_the_target(seed, shift, factor):
    y, q = rows(seed)
    moved = wis(shift + factor * y, shift + factor * q, LEVELS, "paper")
    assert moved == pytest.approx(factor * wis(y, q, LEVELS, "paper"), rel=1e-9, abs=1e-9)


def test_an_unknown_or_missing_convention_is_refused():
    y, q = rows(0)
    for score in (wis, wis_rows, wis_decomposition):
        with pytest.raises(ConfigError, match="paper, hub, mean"):
            score(y, q, LEVELS, "sum")
        with pytest.raises(TypeError):
            score(y, q, LEVELS)


@given(seeds, st.sampled_from(CONVENTIONS), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_parts_of_the_wis_sum_to_it(seed, convention, median):
    levels = LEVELS if median else SYMMETRIC
    y, q = rows(seed, m=len(levels))
    parts = wis_decomposition(y, q, levels, convention)
    assert sum(parts.values()) == pytest.approx(wis(y, q, levels, convention), rel=1e-11)
    parts = wis_decomposition(y, np.sort(q), levels, convention)
    assert min(parts.values()) >= 0


def test_the_parts_of_the_wis_by_hand():
    levels, q = [0.1, 0.5, 0.9], [[0.0, 1.0, 4.0]]
    assert wis_decomposition([5.0], q, levels, "paper") == pytest.approx(
        {"dispersion": 0.8, "under": 2.0 + 4.0, "over": 0.0})
    assert wis_decomposition([0.5], q, levels, "paper") == pytest.approx(
        {"dispersion": 0.8, "under": 0.0, "over": 0.5})
    with pytest.raises(ConfigError, match="mirror pairs"):
        wis_decomposition([0.5], q, [0.1, 0.5, 0.8], "paper")


# ------------------------------------------------------------------ CRPS


@given(seeds, st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_crps_of_samples_is_the_double_sum(seed, s):
    y, x = rows(seed, n=20, m=s)
    x[:, : s // 2] = x[:, :1]  # ties
    double = np.abs(x - y[:, None]).mean(1) - 0.5 * np.abs(x[:, :, None] - x[:, None]).mean((1, 2))
    assert np.all(np.abs(crps_samples(y, x) - double) <= 1e-13 * (np.abs(x).max(1) + np.abs(y)))


def test_crps_of_samples_is_twice_the_integrated_pinball_loss_of_the_step_function():
    y, x = rows(5, n=10, m=7)
    levels = (np.arange(7000) + 0.5) / 7000  # the midpoint rule is exact on each step
    q = np.repeat(np.sort(x), 1000, axis=1)
    assert crps_samples(y, x) == pytest.approx(wis_rows(y, q, levels, "hub"), rel=1e-12)


@given(seeds, st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_crps_on_a_grid_is_exact_for_a_point_mass(seed, m):
    rng = np.random.default_rng(seed)
    levels, y, point = np.sort(rng.uniform(0.001, 0.999, m)), rng.normal(size=5), rng.normal(size=5)
    q = np.repeat(point[:, None], m, axis=1)
    assert crps_grid(y, q, levels) == pytest.approx(np.abs(y - point), rel=1e-12)


# ------------------------------------------------------------------ averages of distributions (T6 to T8)

MEANS, SDS, WEIGHTS = np.array([-1.0, 2.0]), np.array([0.5, 1.5]), np.array([0.5, 0.5])


def test_t6_quantile_averages_stay_in_a_location_scale_family():
    tau = np.arange(1, 100) / 100
    average = WEIGHTS @ (MEANS[:, None] + SDS[:, None] * norm.ppf(tau))
    assert average == pytest.approx(WEIGHTS @ MEANS + (WEIGHTS @ SDS) * norm.ppf(tau), abs=1e-12)
    mixture = WEIGHTS @ norm.cdf(average[None], MEANS[:, None], SDS[:, None])
    assert np.abs(mixture - tau).max() > 0.05  # the probability average is another distribution


def test_t7_quantile_averages_have_the_mean_of_the_mixture_and_smaller_central_moments():
    v, wide = np.linspace(-15, 18, 200_001), WEIGHTS @ SDS
    mixture = WEIGHTS @ norm.pdf(v[None], MEANS[:, None], SDS[:, None])
    average = norm.pdf(v, WEIGHTS @ MEANS, wide)
    moments = [[np.trapezoid(f * (v - c) ** k, v) for k, c in ((1, 0), (2, 0.5), (4, 0.5))]
               for f in (average, mixture)]
    assert moments[0] == pytest.approx([0.5, 1.0, 3.0], abs=1e-8)
    assert moments[1] == pytest.approx([0.5, 3.5, 29.625], abs=1e-8)


def test_t8_the_tail_of_a_quantile_average_is_thinner_than_its_heaviest_member():
    tail, w = np.array([1e-2, 1e-5, 1e-10, 1e-20, 1e-40, 1e-80]), 0.5
    v = w * laplace.isf(tail) + w * norm.isf(tail)  # F_1 Laplace is log-concave, F_2 normal is thinner
    slope = w / laplace.pdf(laplace.isf(tail)) + w / norm.pdf(norm.isf(tail))
    ratio = 1 / (slope * laplace.pdf(v))
    assert np.all(np.diff(ratio) < 0) and ratio[-1] < 1e-20
    mixture = (w * laplace.pdf(v) + w * norm.pdf(v)) / laplace.pdf(v)
    assert mixture[-1] == pytest.approx(w)


# ------------------------------------------------------------------ calibration


def test_coverage_by_hand():
    y, q = [1.0, 2.0, 3.0, 4.0], [[1.0, 3.0]] * 4
    assert coverage(y, q).tolist() == [0.25, 0.75]
    assert interval_coverage(y, q, [0.1, 0.9], 0.8) == 0.75
    assert interval_length(q, [0.1, 0.9], 0.8) == 2.0


def test_infinite_ends_cover_everything():
    q = [[-np.inf, 0.0, np.inf]] * 2
    assert coverage([1.0, 2.0], q).tolist() == [0, 0, 1]
    assert interval_coverage([1.0, 2.0], q, [0.1, 0.5, 0.9], 0.8) == 1
    assert interval_length(q, [0.1, 0.5, 0.9], 0.8) == np.inf
    with pytest.raises(DataError, match="no value may be NaN"):
        coverage([1.0], [[np.nan, 1.0]])


def test_interval_levels_are_found_in_spite_of_rounding():
    levels = [1 - 0.9, 0.5, 0.3 * 3]
    assert interval_coverage([0.0], [[-1.0, 0.0, 1.0]], levels, 0.8) == 1.0
    with pytest.raises(ConfigError, match=r"level 0\.05 is not among"):
        interval_coverage([0.0], [[-1.0, 0.0, 1.0]], levels, 0.9)


def test_pit_by_hand():
    y = [-10.0, -0.25, 0.0, 0.5, 1.0, 1.5, 2.0, 2.25, 10.0]
    q, levels = np.tile([0.0, 1.0, 1.0, 2.0], (9, 1)), [0.1, 0.3, 0.7, 0.9]
    expected = [0.0, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 1.0]
    assert pit(y, q, levels) == pytest.approx(expected)
    assert pit(y, q[:, ::-1], levels) == pytest.approx(expected)
    assert pit([0.0, 1.0, 2.0], [[1.0]] * 3, [0.5]) == pytest.approx([0.25, 0.5, 0.75])
    assert pit([0.9, 1.1], [[1.0, 1.0]] * 2, [0.2, 0.8]) == pytest.approx([0.0, 1.0])


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_pit_stays_between_the_levels_around_y_and_is_uniform_under_the_truth(seed):
    rng = np.random.default_rng(seed)
    y, q = rng.normal(size=400), np.tile(norm.ppf(LEVELS), (400, 1))
    u = pit(y, q, LEVELS)
    k = (q < y[:, None]).sum(axis=1)
    edges = np.concatenate([[0], LEVELS, [1]])
    assert np.all((edges[k] <= u) & (u <= edges[k + 1]))
    inside = (k > 0) & (k < len(LEVELS))
    assert u[inside] == pytest.approx(norm.cdf(y[inside]), abs=0.01)


# ------------------------------------------------------------------ crossing


def test_crossing_rate_and_depth_by_hand():
    assert crossing_rate([[1, 2, 3], [3, 2, 1]]) == 0.5
    assert crossing_rate([[1, 1, 2]]) == 0
    assert crossing_rate([[5.0]]) == 0
    assert crossing_rate(np.sort(rows(3)[1])) == 0
    assert crossing_depth([[1, 2, 3], [3, 2.5, 1]]) == 0.5
    assert crossing_depth([[1, 1, 2]]) == crossing_depth([[5.0]]) == 0


# ------------------------------------------------------------------ comparisons


def test_a_constant_ratio_has_no_spread_because_pairs_stay_together():
    base = np.array([1.0, 10.0, 100.0])
    out = relative_bootstrap(1.2 * base, base)
    assert tuple(out) == pytest.approx((1.2, 1.2, 1.2))


def test_the_ratio_is_the_geometric_mean_over_sets_and_is_reciprocal():
    rng = np.random.default_rng(0)
    own = {"a": rng.uniform(1, 2, 5), "b": rng.uniform(10, 20, 7)}
    base = {"b": rng.uniform(10, 20, 7), "a": rng.uniform(1, 2, 5)}
    there, back = relative_bootstrap(own, base), relative_bootstrap(base, own, seed=1)
    ratio = np.sqrt(np.prod([own[k].mean() / base[k].mean() for k in own]))
    assert there.ratio == pytest.approx(ratio) and back.ratio == pytest.approx(1 / ratio)
    assert there.lower < there.ratio < there.upper
    assert back.lower == pytest.approx(1 / there.upper, rel=0.05)
    assert there == relative_bootstrap(own, base)


def test_the_bootstrap_interval_covers_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, hits = 1.1, 0
    for seed in range(100):
        noise = rng.uniform(0.5, 1.5, 30)
        out = relative_bootstrap(truth * noise * rng.uniform(0.8, 1.2, 30), noise, n_boot=300, seed=seed)
        hits += out.lower <= truth <= out.upper
    assert hits >= 85


@pytest.mark.parametrize(("error", "own", "base", "options"), [
    (DataError, [1.0, 2.0], [1.0], {}),
    (DataError, [1.0, 0.0], [1.0, 1.0], {}),
    (DataError, {"a": [1.0]}, {"b": [1.0]}, {}),
    (DataError, {"a": [1.0]}, [1.0], {}),
    (DataError, {}, {}, {}),
    (ConfigError, [1.0], [1.0], {"n_boot": 0}),
    (ConfigError, [1.0], [1.0], {"level": 1.0}),
])
def test_scores_that_cannot_be_paired_are_refused(error, own, base, options):
    with pytest.raises(error) as caught:
        relative_bootstrap(own, base, **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ checks and bad input


def test_bad_rows_are_named():
    Z = np.zeros((40, 2, 3))
    Z[[4, 17, 30, 39], 1, 2] = [np.nan, np.inf, np.nan, -np.inf]
    message = r"Z\[4, 1, 2\] is nan; Z has NaN or Inf in 4 rows, first rows 4, 17, 30: every"
    with pytest.raises(DataError, match=message):
        finite("Z", Z, 3)
    with pytest.raises(DataError, match=r"y\[1\] is inf; y has NaN or Inf in 1 row, 1: every"):
        finite("y", [0.0, np.inf], 1)
    with pytest.raises(DataError, match="real numbers"):
        finite("y", [1j], 1)


def test_checking_neither_copies_nor_needs_much_memory():
    Z = np.zeros((60_000, 6, 9))
    tracemalloc.start()
    assert finite("Z", Z, 3) is Z
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < Z.nbytes / 10
    single = np.zeros((3, 2), dtype=np.float32)
    assert finite("q", single, 2, keep_float32=True) is single
    assert finite("q", single, 2).dtype == np.float64


def test_row_blocks_cover_every_row_once():
    blocks = row_blocks(10, 3, numbers=7)
    assert [list(range(10))[b] for b in blocks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("levels", [
    [0.5, 0.1], [0.1, 0.1], [0.0, 0.5], [0.5, 1.0], [np.nan, 0.5], [], [0.5], [0.1, 0.5, 0.9],
    [[0.1, 0.5]],
])
def test_bad_levels_are_refused_in_one_line(levels):
    for score in (pinball, pinball_loss, crps_grid, pit):
        with pytest.raises(ConfigError) as caught:
            score([0.0], [[0.0, 1.0]], levels)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("y", "q"), [
    ([0.0, 1.0], [[0.0, 1.0]]),
    ([np.nan], [[0.0, 1.0]]),
    ([0.0], [[0.0, np.nan]]),
    ([0.0], [0.0, 1.0]),
    ([[0.0]], [[0.0, 1.0]]),
    ([], np.empty((0, 2))),
    (["a"], [[0.0, 1.0]]),
])
def test_bad_arrays_are_refused_in_one_line(y, q):
    levels = [0.1, 0.9]
    for score in (lambda: pinball(y, q, levels), lambda: coverage(y, q), lambda: wis(y, q, levels, "hub"),
                  lambda: crps_grid(y, q, levels), lambda: pit(y, q, levels), lambda: crps_samples(y, q)):
        with pytest.raises(DataError) as caught:
            score()
        assert "\n" not in str(caught.value)


def test_bad_choices_are_refused():
    for alpha in (0.0, -1.0, 1.1, np.nan, "0.1", None):
        with pytest.raises(ConfigError, match="alpha"):
            interval_score([0.0], [0.0], [1.0], alpha)
    for huber in (-1.0, np.nan, np.inf, "1", None):
        with pytest.raises(ConfigError, match="huber"):
            pinball([0.0], [[0.0]], [0.5], huber=huber)
    with pytest.raises(DataError, match="every value must be finite"):
        pinball([0.0], [[np.inf]], [0.5])
    with pytest.raises(DataError, match="sample_weight"):
        pinball([0.0], [[1.0]], [0.5], sample_weight=[-1.0])


def test_scores_and_operators_import_numpy_only():
    code = "import sys, json, poise_quantagg.{0}, numpy; print(json.dumps(list(sys.modules)))"
    for module in ("scores", "monotone", "conformal"):
        out = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, check=True)
        assert not {"torch", "scipy", "sklearn"} & set(json.loads(out.stdout))
