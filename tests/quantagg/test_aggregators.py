"""Average, median and global_coarse: the contract, and the theory of section 1.7."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise.registry import build
from poise_quantagg.components import Average, GlobalCoarse, Median
from poise_quantagg.scores import crossing_rate, pinball

LEVELS = np.arange(1, 10) / 10
ALL = (Average(), Median(), GlobalCoarse())
seeds = st.integers(0, 2**32 - 1)


def problem(seed, n=60, p=4, monotone=True):
    """Return (Z, y): p imperfect quantile predictions of one target."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n)
    q = rng.normal(size=(n, p, len(LEVELS))) * rng.uniform(0.2, 2, size=(1, p, 1))
    Z = 0.7 * y[:, None, None] + (np.sort(q, axis=2) if monotone else q)
    return Z, y


def loss(fitted, Z, y):
    return pinball(y, fitted.predict(Z), LEVELS).mean()


def fit(component, Z, y, **options):
    return component.fit(Z, y, levels=LEVELS, **options)


def primal(Z, y, weight=None):
    """Solve the textbook primal, one residual split per (row, level): an independent path."""
    from scipy import sparse
    from scipy.optimize import linprog

    n, p, m = Z.shape
    A = Z.transpose(0, 2, 1).reshape(n * m, p)
    s = np.repeat(np.ones(n) if weight is None else weight, m)
    tau, eye = np.tile(LEVELS, n), sparse.eye_array(n * m)
    equal = sparse.vstack([
        sparse.hstack([sparse.csr_array(A), eye, -eye]),
        sparse.csr_array(np.r_[np.ones(p), np.zeros(2 * n * m)][None]),
    ])
    answer = linprog(np.r_[np.zeros(p), s * tau, s * (1 - tau)], A_eq=equal,
                     b_eq=np.r_[np.repeat(y, m), 1.0], method="highs-ipm")
    return answer.fun / s.sum()


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize("component", ALL)
def test_shapes_weights_and_determinism(component):
    Z, y = problem(0)
    fitted, again = fit(component, Z, y), fit(component, Z, y)
    w = fitted.weights()
    assert fitted.predict(Z).shape == (60, 9)
    assert w.shape == (4,) and w.sum() == pytest.approx(1) and w.min() >= 0
    assert np.array_equal(fitted.predict(Z), again.predict(Z))
    if fitted.linear:
        assert fitted.predict(Z) == pytest.approx(np.einsum("npm,p->nm", Z, w))


def test_average_and_median_by_hand():
    Z = np.array([[[0.0], [1.0], [5.0]]])
    assert Average().fit(Z, [0.0]).predict(Z).item() == pytest.approx(2)
    median = Median().fit(Z, [0.0])
    assert median.predict(Z).item() == 1
    assert not median.linear


@pytest.mark.parametrize("name", ["average", "median", "global_coarse"])
def test_the_registry_builds_them(name):
    Z, y = problem(1)
    assert build("aggregator", name).fit(Z, y, levels=LEVELS).predict(Z).shape == (60, 9)


def test_without_levels_an_even_grid_is_meant():
    Z, y = problem(2)
    assert np.array_equal(GlobalCoarse().fit(Z, y).weights(), fit(GlobalCoarse(), Z, y).weights())


# ------------------------------------------------------------------ exactness


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_the_program_agrees_with_the_textbook_primal(seed):
    Z, y = problem(seed, n=30, monotone=False)
    weight = np.random.default_rng(seed).integers(0, 4, size=30).astype(float)
    weight[0] = 1.0
    for s in (None, weight):
        fitted = fit(GlobalCoarse(), Z, y, sample_weight=s)
        assert fitted.objective == pytest.approx(primal(Z, y, s), rel=1e-6)
    plain = fit(GlobalCoarse(), Z, y)
    assert plain.objective == pytest.approx(loss(plain, Z, y))


def test_two_models_against_a_fine_grid():
    Z, y = problem(5, p=2)
    grid = np.linspace(0, 1, 2001)
    losses = [pinball(y, a * Z[:, 0] + (1 - a) * Z[:, 1], LEVELS).mean() for a in grid]
    fitted = fit(GlobalCoarse(), Z, y)
    assert fitted.objective <= min(losses) + 1e-12
    assert fitted.weights()[0] == pytest.approx(grid[int(np.argmin(losses))], abs=1e-3)


def test_one_model_gets_all_the_weight():
    Z, y = problem(6, p=1)
    assert fit(GlobalCoarse(), Z, y).weights().tolist() == [1.0]


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_integer_sample_weights_mean_repeated_rows(seed):
    Z, y = problem(seed, n=25)
    times = np.random.default_rng(seed).integers(0, 3, size=25)
    times[0] = 2
    weighted = fit(GlobalCoarse(), Z, y, sample_weight=times.astype(float))
    repeated = fit(GlobalCoarse(), np.repeat(Z, times, axis=0), np.repeat(y, times))
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-7)


# ------------------------------------------------------------------ the theory


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_t9_coarse_weights_on_monotone_inputs_never_cross(seed):
    Z, y = problem(seed)
    for component in ALL:
        q = fit(component, Z, y).predict(Z)
        # rounding of a weighted sum may turn a tie into a fall of one unit in the last place
        assert np.all(np.diff(q, axis=1) >= -1e-13)
    assert crossing_rate(fit(Median(), Z, y).predict(Z)) == 0


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_t10_in_sample_no_model_and_no_average_beats_the_optimum(seed):
    Z, y = problem(seed, monotone=False)
    best = loss(fit(GlobalCoarse(), Z, y), Z, y)
    others = [loss(fit(Average(), Z, y), Z, y)]
    others += [pinball(y, Z[:, j], LEVELS).mean() for j in range(Z.shape[1])]
    assert best <= min(others) * (1 + 1e-9)


def test_t12_an_exact_model_among_noise_gets_all_the_weight():
    Z, y = problem(3)
    Z[:, 2] = y[:, None]
    fitted = fit(GlobalCoarse(), Z, y)
    assert fitted.weights() == pytest.approx([0, 0, 1, 0])
    assert fitted.objective == pytest.approx(0, abs=1e-12)


@given(seeds, st.floats(-1e3, 1e3), st.sampled_from([1e-6, 0.1, 3.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_t13_weights_do_not_depend_on_the_unit_of_the_target(seed, shift, factor):
    Z, y = problem(seed)
    shift *= factor
    here = fit(GlobalCoarse(), Z, y)
    there = fit(GlobalCoarse(), shift + factor * Z, shift + factor * y)
    assert there.objective == pytest.approx(factor * here.objective, rel=1e-6)
    assert there.weights() == pytest.approx(here.weights(), abs=1e-4)


@given(seeds, st.permutations(range(4)))
@settings(max_examples=25, deadline=None)
def test_t14_permuting_models_permutes_weights(seed, order):
    Z, y = problem(seed)
    for component in ALL:
        plain, permuted = fit(component, Z, y), fit(component, Z[:, order], y)
        assert permuted.weights() == pytest.approx(plain.weights()[list(order)], abs=1e-4)
        assert permuted.predict(Z[:, order]) == pytest.approx(plain.predict(Z), abs=1e-3)


@given(seeds, st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_t14_a_duplicated_model_changes_nothing_in_the_optimum(seed, j):
    Z, y = problem(seed)
    more = np.concatenate([Z, Z[:, [j]]], axis=1)
    assert fit(GlobalCoarse(), more, y).objective == pytest.approx(
        fit(GlobalCoarse(), Z, y).objective, rel=1e-7
    )


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("component", ALL)
def test_bad_input_is_refused_in_one_line(component):
    Z, y = problem(4)
    bad = Z.copy()
    bad[3, 1, 2] = np.nan
    calls = [
        (DataError, r"Z\[3, 1, 2\] is nan", lambda: fit(component, bad, y)),
        (DataError, "60 rows and y has 59", lambda: fit(component, Z, y[:-1])),
        (DataError, "3 axes", lambda: fit(component, Z[0], y)),
        (DataError, "weights >= 0", lambda: fit(component, Z, y, sample_weight=-np.ones(60))),
        (DataError, "one > 0", lambda: fit(component, Z, y, sample_weight=np.zeros(60))),
        (ConfigError, "2 levels", lambda: component.fit(Z, y, levels=[0.1, 0.9])),
        (DataError, "fitted on 4 and 9", lambda: fit(component, Z, y).predict(Z[:, :3])),
        (DataError, "fitted on 4 and 9", lambda: fit(component, Z, y).predict(Z[..., :3])),
    ]
    for error, message, call in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
