"""Conformal calibration: ranks, infinite ends, nesting, coverage (T11), parity with MAPIE, bad input."""

import warnings
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.conformal import (
    CVPlus,
    NestedCVPlus,
    OneSided,
    SplitCQR,
    beta_band,
    cv_plus_bound,
    lower_rank,
    nested_fold_arrays,
    nested_pairs,
    split_bounds,
    upper_rank,
)
from poise_quantagg.scores import coverage, interval_coverage

LEVELS = np.arange(1, 20) / 20
PAIRS = [(k, 18 - k) for k in range(9)]
seeds = st.integers(0, 2**32 - 1)


def quantiles(seed, n, m=19):
    """Return targets (n,) and monotone but miscalibrated predictions (n, m)."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(n, 1))
    spread = np.sort(rng.normal(size=(n, m)), axis=1) * rng.uniform(0.2, 2, size=(n, 1))
    return centre[:, 0] + rng.normal(size=n), centre + spread


def folds_of(n, k=5):
    return np.arange(n) * k // n


def cv_sample(seed, n=60, n_new=8, k=5):
    """Return y, q_oof, fold, and predictions of new rows by every fold model (K, n_new, m)."""
    y, oof = quantiles(seed, n)
    base = quantiles(seed + 1, n_new)[1]
    rng = np.random.default_rng(seed + 2)
    return y, oof, folds_of(n, k), base + 0.2 * rng.normal(size=(k, n_new, 1))


# ------------------------------------------------------------------ ranks


@given(st.integers(1, 999), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_ranks_are_those_of_exact_arithmetic(thousandths, n):
    exact = Fraction(thousandths, 1000) * (n + 1)
    assert upper_rank(thousandths / 1000, n) == ceil(exact)
    assert lower_rank(thousandths / 1000, n) == floor(exact)
    assert upper_rank(1 - (1 - thousandths / 1000), n) == ceil(exact)


# ------------------------------------------------------------------ split


def by_hand(y, q, low, high, alpha):
    score = np.sort(np.maximum(q[:, low] - y, y - q[:, high]))
    rank = ceil(Fraction(alpha).limit_denominator(1000) * -1 * (len(y) + 1) + len(y) + 1)
    return score[rank - 1] if rank <= len(y) else np.inf


@given(seeds, st.sampled_from([39, 40, 100, 137]))
@settings(max_examples=20, deadline=None)
def test_split_cqr_adds_the_order_statistic_of_eq_27(seed, n):
    y, q = quantiles(seed, n)
    new = quantiles(seed + 1, 5)[1]
    model = SplitCQR(sweep=False).fit(y, q, LEVELS)
    out = model.predict(new)
    for low, high in PAIRS:
        width = by_hand(y, q, low, high, 2 * LEVELS[low])
        assert out[:, low] == pytest.approx(new[:, low] - width)
        assert out[:, high] == pytest.approx(new[:, high] + width)
        pair = model.predict_interval(new, 2 * LEVELS[low])
        assert np.array_equal(pair, out[:, [low, high]])
    assert np.array_equal(out[:, 9], new[:, 9])


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_on_the_calibration_rows_coverage_is_the_rank(seed):
    y, q = quantiles(seed, 99)
    model = SplitCQR(sweep=False).fit(y, q, LEVELS)
    for low, high in PAIRS:
        nominal = LEVELS[high] - LEVELS[low]
        assert interval_coverage(y, model.predict(q), LEVELS, nominal) == pytest.approx(
            upper_rank(nominal, 99) / 99)


@given(seeds, st.sampled_from([39, 58, 99, 100]))
@settings(max_examples=20, deadline=None)
def test_asymmetric_cqr_is_the_one_sided_calibration_of_each_end(seed, n):
    y, q = quantiles(seed, n)
    both = SplitCQR(symmetric=False, sweep=False).fit(y, q, LEVELS).offset_
    each = OneSided(sweep=False).fit(y, q, LEVELS).offset_
    assert np.array_equal(np.delete(both, 9), np.delete(each, 9))
    for k, (low, high) in enumerate(PAIRS):  # the same by upper ranks of q_lo - y and y - q_hi
        rank = upper_rank(1 - LEVELS[low], n)
        assert both[low] == pytest.approx(-np.sort(q[:, low] - y)[rank - 1]), k
        assert both[high] == pytest.approx(np.sort(y - q[:, high])[rank - 1]), k


def test_one_sided_calibration_takes_any_levels():
    y, q = quantiles(0, 99, m=3)
    levels = [0.1, 0.25, 0.9]
    covered = coverage(y, OneSided(sweep=False).fit(y, q, levels).predict(q))
    assert covered == pytest.approx([10 / 99, 25 / 99, 90 / 99])
    with pytest.raises(ConfigError, match="OneSided"):
        SplitCQR().fit(y, q, levels)


# ------------------------------------------------------------------ infinite ends


@pytest.mark.parametrize(("fit", "infinite"), [
    (lambda y, q, t: SplitCQR(sweep=False).fit(y, q, t), [0, 6]),
    (lambda y, q, t: SplitCQR().fit(y, q, t), [0, 6]),
    (lambda y, q, t: SplitCQR(symmetric=False).fit(y, q, t), [0, 1, 5, 6]),
    (lambda y, q, t: OneSided().fit(y, q, t), [0, 1, 5, 6]),
])
def test_too_few_rows_give_infinite_ends_and_exactly_one_warning(fit, infinite):
    levels = np.array([0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99])  # pairs need 49, 9, 2 rows; ends 99, 19, 4
    y, q = quantiles(0, 15, m=7)
    with pytest.warns(QuantileWarning) as caught:
        model = fit(y, q, levels)
    assert len(caught) == 1
    named = ", ".join(f"{levels[k]:g}" for k in infinite)
    assert f"15 calibration rows are too few for the levels {named}:" in str(caught[0].message)
    out = model.predict(q)
    assert np.flatnonzero(np.isinf(out).all(axis=0)).tolist() == infinite
    assert np.all(out[:, 0] == -np.inf) and np.all(out[:, -1] == np.inf)


def test_the_smallest_number_of_rows_with_finite_ends():
    levels = [0.1, 0.5, 0.9]
    for n, finite_ends in [(4, True), (3, False)]:
        y, q = quantiles(1, n, m=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert np.isfinite(SplitCQR().fit(y, q, levels).offset_).all() == finite_ends
            plus = CVPlus(sweep=False).fit(y, q, np.arange(n), levels).predict(np.zeros((n, 1, 3)))
        assert np.isfinite(plus).all() == finite_ends
        assert len(caught) == (0 if finite_ends else 2)


# ------------------------------------------------------------------ the sweep


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", [LEVELS, np.delete(LEVELS, 9)])
@given(seeds)
@settings(max_examples=15, deadline=None)
def test_the_sweep_nests_the_intervals_and_can_only_enlarge_them(symmetric, levels, seed):
    m = len(levels)
    y, q = quantiles(seed, 40, m)
    new = quantiles(seed + 1, 30, m)[1]
    fold = folds_of(40)
    shift = np.random.default_rng(seed).normal(size=(5, 1, m))
    for kept, swept in [
        (SplitCQR(symmetric, sweep=False).fit(y, q, levels).predict(new),
         SplitCQR(symmetric).fit(y, q, levels).predict(new)),
        (CVPlus(symmetric, sweep=False).fit(y, q, fold, levels).predict(new + shift),
         CVPlus(symmetric).fit(y, q, fold, levels).predict(new + shift)),
        (OneSided(False).fit(y, q, levels).predict(new), OneSided().fit(y, q, levels).predict(new)),
    ]:
        half = m // 2
        assert np.all(np.diff(swept, axis=1) >= 0)
        assert np.all(swept[:, :half] <= kept[:, :half])
        assert np.all(swept[:, m - half :] >= kept[:, m - half :])


def test_calibrated_pairs_do_unnest_without_the_sweep():
    y, q = quantiles(3, 40)
    assert (np.diff(SplitCQR(sweep=False).fit(y, q, LEVELS).predict(q), axis=1) < 0).any()


# ------------------------------------------------------------------ CV+


@given(seeds, st.sampled_from([45, 59, 60]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_cv_plus_takes_quantiles_of_the_sums_of_eq_29(seed, n, symmetric):
    y, oof, fold, new = cv_sample(seed, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        model = CVPlus(symmetric, sweep=False).fit(y, oof, fold, LEVELS)
    out = model.predict(new)
    for low, high in PAIRS:
        below, above = oof[:, low] - y, y - oof[:, high]
        if symmetric:
            below = above = np.maximum(below, above)
        alpha = Fraction(low + 1, 10 if symmetric else 20)
        for row in range(new.shape[1]):
            down = np.sort([new[fold[i], row, low] - below[i] for i in range(n)])
            up = np.sort([new[fold[i], row, high] + above[i] for i in range(n)])
            r, s = floor(alpha * (n + 1)), ceil((1 - alpha) * (n + 1))
            assert out[row, low] == pytest.approx(down[r - 1] if r else -np.inf)
            assert out[row, high] == pytest.approx(up[s - 1] if s <= n else np.inf)
        pair = model.predict_interval(new, 2 * LEVELS[low])
        assert np.array_equal(pair, out[:, [low, high]])


def test_cv_plus_of_equal_fold_models_is_split_cqr():
    y, oof, fold, new = cv_sample(0)
    same = np.repeat(new[:1], 5, axis=0)
    plus = CVPlus(sweep=False).fit(y, oof, fold, LEVELS).predict(same)
    split = SplitCQR(sweep=False).fit(y, oof, LEVELS).predict(new[0])
    assert plus == pytest.approx(split, abs=1e-12)  # floor(alpha (n + 1)) mirrors ceil((1 - alpha)(n + 1))


def test_the_median_of_cv_plus_is_the_mean_over_folds_or_what_is_given():
    y, oof, fold, new = cv_sample(0)
    model = CVPlus().fit(y, oof, fold, LEVELS)
    assert model.predict(new)[:, 9] == pytest.approx(new[:, :, 9].mean(axis=0))
    assert np.array_equal(model.predict(new, median=np.zeros(8))[:, 9], np.zeros(8))


def test_blocks_of_new_rows_give_what_single_rows_give():
    y, oof, fold, new = cv_sample(2, n=300, n_new=900)
    model = CVPlus().fit(y, oof, fold, LEVELS)
    some = [0, 435, 436, 437, 899]
    assert np.array_equal(model.predict(new)[some], model.predict(new[:, some]))


# ------------------------------------------------------------------ nested CV+


def test_nested_pairs_are_every_pair_once():
    assert nested_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(nested_pairs(5)) == 10
    with pytest.raises(ConfigError, match="at least 3"):
        nested_pairs(2)


def test_nested_arrays_come_from_models_that_saw_neither_fold():
    rng = np.random.default_rng(0)
    fold = rng.permutation(np.arange(23) % 4)

    def stamp(k, l):
        rows = np.flatnonzero((fold == k) | (fold == l))
        return np.stack([[[row, k, l]] * 2 for row in rows]).astype(float)  # (rows, p=2, m=3)

    arrays = list(nested_fold_arrays({pair: stamp(*pair) for pair in nested_pairs(4)}, fold))
    assert len(arrays) == 4
    for k, (rows, Z) in enumerate(arrays):
        assert np.array_equal(rows, np.flatnonzero(fold != k))
        assert np.array_equal(Z[:, 0, 0], rows)
        left_out = np.sort(np.column_stack([np.full(len(rows), k), fold[rows]]), axis=1)
        assert np.array_equal(Z[:, 1, 1:], left_out)


@pytest.mark.parametrize(("change", "match"), [
    (lambda p: p.pop((0, 2)), r"\[0, 2\] is missing"),
    (lambda p: p.update({(0, 1): np.zeros((3, 2, 3))}), "have 4"),
    (lambda p: p.update({(0, 1): np.zeros((4, 1, 3))}), "must be equal"),
    (lambda p: p.update({(0, 1): np.full((4, 2, 3), np.nan)}), "NaN"),
])
def test_pair_predictions_that_do_not_fit_are_refused(change, match):
    pairs = {pair: np.zeros((4, 2, 3)) for pair in nested_pairs(3)}
    change(pairs)
    with pytest.raises(DataError, match=match):
        nested_fold_arrays(pairs, np.array([0, 0, 1, 1, 2, 2]))


# ------------------------------------------------------------------ T11: coverage


def draw(rng, n):
    """Return heteroscedastic rows: features (n, 3) and target (n,)."""
    x = rng.normal(size=(n, 3))
    return x, x[:, 0] + 0.5 * x[:, 1] + (0.5 + np.abs(x[:, 2])) * rng.standard_t(4, size=n)


def linear(x, y, columns=(0, 1, 2)):
    """Fit least squares on some features, with constant residual quantiles; return a predictor."""
    design = np.column_stack([np.ones(len(x)), x[:, columns]])
    beta = np.linalg.lstsq(design, y, rcond=None)[0]
    spread = np.quantile(y - design @ beta, [0.1, 0.5, 0.9])
    return lambda z: (np.column_stack([np.ones(len(z)), z[:, columns]]) @ beta)[:, None] + 0.7 * spread


def split_coverage(rng, n, symmetric):
    predict = linear(*draw(rng, 60))
    x, y = draw(rng, n)
    model = SplitCQR(symmetric, sweep=False).fit(y, predict(x), [0.1, 0.5, 0.9])
    x, y = draw(rng, 400)
    ends = model.predict_interval(predict(x), 0.2)
    return np.mean((ends[:, 0] <= y) & (y <= ends[:, 1]))


def plus_coverage(rng, n, folds=5):
    x, y = draw(rng, n)
    fold = rng.permutation(folds_of(n, folds))
    fits = [linear(x[fold != k], y[fold != k]) for k in range(folds)]
    oof = np.stack([fits[k](x[i : i + 1])[0] for i, k in enumerate(fold)])
    model = CVPlus(sweep=False).fit(y, oof, fold, [0.1, 0.5, 0.9])
    x, y = draw(rng, 100)
    ends = model.predict_interval(np.stack([f(x) for f in fits]), 0.2)
    return np.mean((ends[:, 0] <= y) & (y <= ends[:, 1]))


BASES = [(0,), (0, 1), (0, 1, 2)]


def best_weights(Z, y):
    """Return the weight on the first of two models that minimises the mean pinball loss, of 11."""
    from poise_quantagg.scores import pinball

    grid = np.linspace(0, 1, 11)
    return grid[np.argmin([pinball(y, w * Z[:, 0] + (1 - w) * Z[:, -1], [0.1, 0.5, 0.9]) for w in grid])]


def nested_coverage(rng, n, folds=4):
    x, y = draw(rng, n)
    fold = rng.permutation(folds_of(n, folds))

    def stack(keep):
        fits = [linear(x[keep], y[keep], c) for c in BASES]
        return lambda z: np.stack([f(z) for f in fits], axis=1)

    pairs = {(k, l): stack((fold != k) & (fold != l))(x[(fold == k) | (fold == l)])
             for k, l in nested_pairs(folds)}
    single = [stack(fold != k) for k in range(folds)]
    weights = [best_weights(Z, y[rows]) for rows, Z in nested_fold_arrays(pairs, fold)]

    def aggregate(k, z):
        Z = single[k](z)
        return weights[k] * Z[:, 0] + (1 - weights[k]) * Z[:, -1]

    oof = np.empty((n, 3))
    for k in range(folds):
        oof[fold == k] = aggregate(k, x[fold == k])
    model = NestedCVPlus().fit(y, oof, fold, [0.1, 0.5, 0.9])
    x, y = draw(rng, 100)
    ends = model.predict_interval(np.stack([aggregate(k, x) for k in range(folds)]), 0.2)
    return np.mean((ends[:, 0] <= y) & (y <= ends[:, 1]))


def check_split(repetitions, n, seed):
    rng = np.random.default_rng(seed)
    covered = np.array([split_coverage(rng, n, True) for _ in range(repetitions)])
    low, high = beta_band(n, 0.2, level=0.999, n_test=400)
    assert np.mean((low <= covered) & (covered <= high)) >= 1 - 4 / repetitions
    lower, upper = split_bounds(n, 0.2)
    margin = 4 * covered.std() / np.sqrt(repetitions)
    assert lower - margin <= covered.mean() <= upper + margin
    assert np.mean([split_coverage(rng, n, False) for _ in range(repetitions)]) >= lower - margin


def check_plus(one, repetitions, n, folds):
    rng = np.random.default_rng(7)
    covered = np.array([one(rng, n, folds) for _ in range(repetitions)])
    margin = 4 * covered.std() / np.sqrt(repetitions)
    assert covered.mean() >= cv_plus_bound(n, folds, 0.2) - margin
    assert abs(covered.mean() - 0.8) < 0.05 + margin  # in practice it is near the nominal level


@pytest.mark.parametrize("n", [24, 100])
def test_t11_split_coverage_is_in_its_bounds_and_band(n):
    check_split(50, n, seed=n)


@pytest.mark.parametrize(("one", "folds"), [(plus_coverage, 5), (nested_coverage, 4)])
def test_t11_cv_plus_keeps_its_bound(one, folds):
    check_plus(one, 50, 80, folds)


@pytest.mark.slow
@pytest.mark.parametrize("n", [9, 49, 100, 333])
def test_t11_split_coverage_is_in_its_bounds_and_band_long(n):
    check_split(1000, n, seed=n)


@pytest.mark.slow
@pytest.mark.parametrize(("one", "folds"), [(plus_coverage, 5), (plus_coverage, 10), (nested_coverage, 4)])
@pytest.mark.parametrize("n", [40, 120])
def test_t11_cv_plus_keeps_its_bound_long(one, folds, n):
    check_plus(one, 600, n, folds)


# ------------------------------------------------------------------ bounds


def test_bounds_by_hand():
    assert split_bounds(99, 0.2) == pytest.approx((0.8, 0.81))
    assert split_bounds(3, 0.1) == (0.9, 1.0)
    assert cv_plus_bound(100, 5, 0.1) == pytest.approx(0.8 - min(1.6 / 21, 0.95 / 6))
    assert cv_plus_bound(10, 10, 0.1) == pytest.approx(0.8 - 0)  # the jackknife+ loses nothing more
    assert cv_plus_bound(4, 2, 0.45) == 0
    for n in (10, 50, 1000):
        for k in (2, 5, 10):
            assert cv_plus_bound(n, k, 0.1) >= max(0, 0.8 - np.sqrt(2 / n)) - 1e-12


def test_the_beta_band_holds_the_mean_and_narrows():
    wide, narrow = beta_band(50, 0.2), beta_band(5000, 0.2)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]
    counted = beta_band(50, 0.2, n_test=100)
    assert counted[0] <= wide[0] and counted[1] >= wide[1]
    assert beta_band(3, 0.1) == (1.0, 1.0)


# ------------------------------------------------------------------ parity with MAPIE 1.6

ALPHAS, SIZES = [0.1, 0.2, 0.5], [60, 99, 137]


@pytest.fixture(scope="module")
def linear_models():
    from sklearn.linear_model import QuantileRegressor

    rng = np.random.default_rng(0)

    def fit(x, y, alpha):
        levels = [alpha / 2, 0.5, 1 - alpha / 2]
        fits = [QuantileRegressor(quantile=t, alpha=0, solver="highs").fit(x, y) for t in levels]
        return fits, lambda z: np.column_stack([f.predict(z) for f in fits])

    return rng, fit


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_split_cqr_is_mapies(linear_models, alpha, n, symmetric):
    from mapie.regression import ConformalizedQuantileRegressor

    rng, fit = linear_models
    fits, predict = fit(*draw(rng, 80), alpha)
    (x, y), new = draw(rng, n), draw(rng, 30)[0]
    theirs = ConformalizedQuantileRegressor([fits[0], fits[2], fits[1]], 1 - alpha, prefit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.conformalize(x, y)
        interval = theirs.predict_interval(new, symmetric_correction=symmetric)[1][:, :, 0]
    own = SplitCQR(symmetric, sweep=False).fit(y, predict(x), [alpha / 2, 0.5, 1 - alpha / 2])
    assert np.abs(own.predict_interval(predict(new), alpha) - interval).max() <= 1e-12


def mapie_cv_plus(rng, fit, alpha, n, symmetric):
    """Return MAPIE's CV+ intervals of 30 new rows and ours from the same five fold models."""
    from mapie.conformity_scores.bounds.quantile import (
        AbsoluteQuantileRegressionScore,
        QuantileRegressionScore,
    )
    from mapie.regression.quantile_regression import CrossConformalizedQuantileRegressor
    from sklearn.linear_model import QuantileRegressor
    from sklearn.model_selection import KFold

    (x, y), new = draw(rng, n), draw(rng, 30)[0]
    theirs = CrossConformalizedQuantileRegressor(
        QuantileRegressor(alpha=0, solver="highs"), confidence_level=1 - alpha, cv=KFold(5), method="plus",
        conformity_score=AbsoluteQuantileRegressionScore if symmetric else QuantileRegressionScore)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interval = theirs.fit_conformalize(x, y).predict_interval(new)[1][:, :, 0]
    fold, oof, folds = np.empty(n, dtype=int), np.empty((n, 3)), np.empty((5, 30, 3))
    for k, (train, test) in enumerate(KFold(5).split(x)):
        predict = fit(x[train], y[train], alpha)[1]
        fold[test], oof[test], folds[k] = k, predict(x[test]), predict(new)
    own = CVPlus(symmetric, sweep=False).fit(y, oof, fold, [alpha / 2, 0.5, 1 - alpha / 2])
    return interval, own.predict_interval(folds, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_cv_plus_is_mapies(linear_models, alpha, n, symmetric):
    theirs, own = mapie_cv_plus(*linear_models, alpha, n, symmetric)
    assert np.abs(own - theirs).max() <= 1e-12


def test_where_rounding_hits_an_integer_rank_mapies_lower_end_is_one_rank_too_low(linear_models):
    # alpha (n + 1) is exactly 4, but MAPIE forms 1 - alpha as (1 - 2 alpha) + alpha = 0.96 + 1e-16 and
    # takes ceil(96.00000000000001) = 97 from above, the 3rd smallest; eq 29 asks for the 4th
    theirs, own = mapie_cv_plus(*linear_models, 0.04, 99, True)
    assert np.ceil(((1 - 2 * 0.04) + 0.04) * 100) == 97 and lower_rank(0.04, 99) == 4
    assert np.abs(own[:, 1] - theirs[:, 1]).max() <= 1e-12
    assert np.all(theirs[:, 0] < own[:, 0])


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("error", "call"), [
    (DataError, lambda y, q: SplitCQR().fit(y[:-1], q, LEVELS)),
    (DataError, lambda y, q: SplitCQR().fit(y, np.where(q > 1, np.nan, q), LEVELS)),
    (DataError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict(q[:, :-1])),
    (DataError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict(q[0])),
    (DataError, lambda y, q: CVPlus().fit(y, q, np.zeros(40, dtype=int), LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, np.arange(40) % 5 + 1, LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, 2 * (np.arange(40) % 5), LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, np.arange(40) % 5 * 1.0, LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, np.arange(39) % 5, LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, folds_of(40), LEVELS).predict(np.zeros((4, 2, 19)))),
    (DataError, lambda y, q: CVPlus().fit(y, q, folds_of(40), LEVELS).predict(np.zeros((5, 2, 18)))),
    (ConfigError, lambda y, q: SplitCQR().fit(y, q, np.arange(1, 20) / 21)),
    (ConfigError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict_interval(q, 0.25)),
    (ConfigError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict_interval(q, 0.0)),
    (DataError, lambda y, q: CVPlus().fit(y, q, np.arange(40) % 5 - 1, LEVELS)),
    (DataError, lambda y, q: CVPlus().fit(y, q, folds_of(40), LEVELS).predict(np.zeros((5, 2, 19)), [0.0])),
    (ConfigError, lambda y, q: SplitCQR().predict(q)),
    (ConfigError, lambda y, q: SplitCQR().predict_interval(q, 0.1)),
    (ConfigError, lambda y, q: OneSided().predict(q)),
    (ConfigError, lambda y, q: CVPlus().predict(q[None])),
    (ConfigError, lambda y, q: CVPlus().predict_interval(q[None], 0.1)),
    (ConfigError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict_interval(q, "0.1")),
    (ConfigError, lambda y, q: SplitCQR().fit(y, q, LEVELS).predict_interval(q, None)),
    (ConfigError, lambda y, q: split_bounds(0, 0.1)),
    (ConfigError, lambda y, q: cv_plus_bound(10, 11, 0.1)),
    (ConfigError, lambda y, q: beta_band(10, 1.0)),
    (ConfigError, lambda y, q: beta_band(10, 0.1, level=0)),
])
def test_bad_input_is_refused_in_one_line(error, call):
    with pytest.raises(error) as caught:
        call(*quantiles(0, 40))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [SplitCQR, CVPlus])
def test_options_that_are_no_truth_values_are_refused(kind):
    y, q = np.zeros(20), np.tile([-1.0, 1.0], (20, 1))
    more = () if kind is SplitCQR else (np.arange(20) % 2,)
    for options in ({"symmetric": "no"}, {"sweep": 2}):
        with pytest.raises(ConfigError, match="allowed is True or False"):
            kind(**options).fit(y, q, *more, [0.25, 0.75])


def test_fold_numbers_of_any_size_are_refused_at_once():
    y, q, fold = np.zeros(20), np.tile([-1.0, 1.0], (20, 1)), np.arange(20) % 2
    fold[-1] = 10**12
    with pytest.raises(DataError, match="3 folds, the last is number 1000000000000"):
        CVPlus().fit(y, q, fold, [0.25, 0.75])
