"""Targets with atoms: what solvers and sums of products leave within rounding of an atom is that atom."""

import numpy as np
import pytest
from cases import some
from hypothesis import given
from hypothesis import strategies as st

from poise_quantagg import programs
from poise_quantagg.atoms import ROUNDING, atoms_of, settled
from poise_quantagg.base.linear import LinearRegressor
from poise_quantagg.components import Linear, QuantileForest
from poise_quantagg.conformal import CVPlus, OneSided, SplitCQR
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.grid import interpolate, mean_of_folds
from poise_quantagg.interior import solve
from poise_quantagg.stacker import QuantileStacker

pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")
LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
PLACES = [(0.0, 1.0), (3.7, 1.0), (1e6, 1.0), (0.0, 1e-6), (0.1, 1e3)]
places = pytest.mark.parametrize(("atom", "unit"), PLACES)


def counts(atom=0.0, unit=1.0, n=300, seed=0):
    """Return features and Poisson counts, 40 % of them replaced by 0, in a unit and moved to the atom."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    k = np.where(rng.random(n) < 0.4, 0, rng.poisson(np.exp(0.5 + 0.5 * X[:, 0])))
    return X, atom + unit * k


def almost(q, atom, unit):
    """Return which predictions are nearly the atom and not it: nearer than counts in this unit can be."""
    return (np.abs(q - atom) < 1e-7 * unit) & (q != atom)


@places
def test_linear_quantiles_of_counts_are_the_atom(atom, unit):
    X, y = counts(atom, unit)
    model = LinearRegressor(levels=LEVELS).fit(X, y)
    q = model.predict_quantiles(X)
    assert (q[:, :2] == atom).all() and not almost(q, atom, unit).any()


FOREST = QuantileForest(n_estimators=15, min_samples_leaf=20)
AGGREGATORS = ("qra", "fqra", "global_coarse", "global_medium", "global_fine")


@pytest.mark.parametrize(("aggregator", "place"), some(
    [*(("qra", place) for place in PLACES), *zip(AGGREGATORS[1:], PLACES),
     *zip(AGGREGATORS[1:], PLACES[::-1])], keep=[("qra", PLACES[0]), *zip(AGGREGATORS[1:], PLACES)]))
def test_an_ensemble_of_counts_reaches_the_atom(aggregator, place):
    (atom, unit), models = place, {"linear": Linear(), "forest": FOREST}
    X, y = counts(atom, unit)
    for names in (["linear"], ["forest"], ["linear", "forest"]):
        estimators = {name: models[name] for name in names}
        model = QuantileAggregatorRegressor(LEVELS, estimators, aggregator, cv=3).fit(X, y)
        q, interval = model.predict_quantiles(X), model.predict_interval(X)
        assert not almost(q, atom, unit).any() and not almost(interval, atom, unit).any()
        assert (q[:, 1] == atom).mean() > 0.4  # the level 0.25, with 47 % of y at the atom
        on = y == atom  # of these the raw interval held 1 % with linear models, none with forests
        assert ((q[on, 0] <= atom) & (atom <= q[on, -1])).mean() > 0.97
        assert (interval[on, 0] <= atom).mean() > 0.97


def test_a_gate_reaches_the_atom_of_the_models_and_keeps_it_in_its_file(tmp_path):
    X, y = counts(3.7)
    Z = np.where(np.arange(5) < 2, 3.7, y[:, None] + np.arange(5))[:, None].repeat(3, axis=1)
    small = {"max_steps": 20, "width": 8, "depth": 1}
    stacker = QuantileStacker("local_medium", LEVELS, n_iter=1, options=small)
    q = stacker.fit(Z, y, X).predict(Z, X)
    assert (q[:, :2] == 3.7).all()
    stacker.save(tmp_path / "gate")
    assert np.array_equal(QuantileStacker.load(tmp_path / "gate").predict(Z, X), q)


@pytest.mark.parametrize("aggregator", ["qra", "global_coarse"])
def test_a_saved_ensemble_of_counts_predicts_the_same(aggregator, tmp_path):
    X, y = counts(3.7)
    model = QuantileAggregatorRegressor(LEVELS, ["linear", "extra_trees"], aggregator, cv=3).fit(X, y)
    model.save(tmp_path)
    again = QuantileAggregatorRegressor.load(tmp_path)
    assert np.array_equal(again.predict_quantiles(X), model.predict_quantiles(X))
    assert np.array_equal(again.predict_interval(X), model.predict_interval(X))


@pytest.mark.parametrize("kind", [SplitCQR, OneSided, CVPlus])
@places
def test_calibrated_ends_that_meet_an_atom_are_it(kind, atom, unit):
    """Ends q - (q' - y) of counts and half counts: exact arithmetic puts most of them on a half count."""
    rng = np.random.default_rng(1)
    y = atom + unit * rng.poisson(2, size=120)
    q = atom + unit * 0.1 * np.sort(rng.integers(0, 60, size=(120, 5)), axis=1)
    fold = np.arange(120) % 3
    plus = kind is CVPlus
    fitted = kind().fit(y, q, fold, LEVELS) if plus else kind().fit(y, q, LEVELS)
    ends = fitted.predict(np.stack([q, q, q])) if plus else fitted.predict(q)
    ends = ends[:, [0, 1, 3, 4]]
    for value in atoms_of(y)[0]:
        assert not almost(ends, value, unit).any()
    assert np.isin(ends, y).any()


# ------------------------------------------------------------------ where rounding ends


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.sampled_from(PLACES),
       st.integers(0, 2**32 - 1))
def test_a_prediction_moves_by_rounding_at_most_and_only_to_an_atom(numbers, place, seed):
    atom, unit = place
    y, rng = atom + unit * np.array(numbers), np.random.default_rng(seed)
    found = atoms_of(y)
    values, times = np.unique(y, return_counts=True)
    if times.max() == 1:
        assert found.shape == (2, 0) and settled(y, found) is y
        return
    assert np.array_equal(found[0], values[times > 1])
    away = 10.0 ** rng.uniform(-16, 0, size=(40, 3)) * rng.choice([-1, 1], size=(40, 3))
    q = rng.choice(values, size=(40, 3)) + away * (np.abs(values).max() + unit)
    out = settled(q, found)
    moved = out != q
    assert np.isin(out[moved], found[0]).all()
    sizes = np.abs(y)
    usual = np.median(sizes[sizes > 0]) if sizes.any() else 0.0
    assert (np.abs(out - q) <= 1.01 * ROUNDING * (np.abs(out) + usual + sizes.mean())).all()
    for value in found[0]:
        near = np.abs(q - value) < 0.99 * ROUNDING * (abs(value) + usual)
        assert (out[near] == value).all()
    assert np.array_equal(settled(out, found), out)


def test_continuous_predictions_beside_an_atom_stay_where_they_are():
    q = 3.7 + np.array([[-1e-9, 1e-10, 1e-9, np.inf, -np.inf]])
    assert np.array_equal(settled(q, atoms_of(np.array([3.7, 3.7, 1.0]))), q)


def with_outlier(size, n=240):
    X, y = counts(n=n)
    y[5] = size
    return X, y


@pytest.mark.parametrize("size", [1e3, 1e9, 1e15, -1e15])
def test_one_outlier_pulls_nothing_to_an_atom(size):
    """At 1e15 among 240 rows all within 4.2 of 0 were 0: of counts nearly everything."""
    y = with_outlier(size)[1]
    q = np.array([[-0.5, 1e-5, 0.5, 2 - 1e-5, 2.5, 3.3]])
    assert np.array_equal(settled(q, atoms_of(y)), q)
    assert np.array_equal(settled(q * 1e-13, atoms_of(y)), 0 * q)  # what rounding leaves is still none
    Z = np.random.default_rng(4).uniform(0.05, 4, size=(240, 2, 5))
    stacker = QuantileStacker("average", LEVELS).fit(Z, y)
    assert np.array_equal(stacker.predict(Z), Z.mean(axis=1))


@pytest.mark.parametrize("size", [1e6, 1e9, -1e9])
def test_an_outlier_does_not_cost_an_ensemble_its_atom(size):
    X, y = with_outlier(size)
    for models in ({"linear": Linear()}, {"forest": FOREST}):
        q = QuantileAggregatorRegressor(LEVELS, models, "qra", cv=3).fit(X, y).predict_quantiles(X)
        assert not almost(q, 0.0, 1.0).any() and (q[:, 1] == 0).mean() > 0.4


# ------------------------------------------------------------------ the vertex


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_solution_passes_through_as_many_rows_as_it_has_free_weights(simplex, scale):
    rng = np.random.default_rng(2)
    Z = scale * rng.normal(size=(200, 3, 5))
    y = Z @ np.ones(5) @ np.array([0.5, 0.3, 0.2]) / 5 + scale * rng.normal(size=200)
    found = programs.medium(Z, y, LEVELS, np.ones(200), simplex=simplex)
    r = np.abs(y[:, None] - np.einsum("npm,pm->nm", Z, found.w))
    free = (found.w != 0).sum(axis=0) - simplex
    assert ((r < 1e-13 * scale).sum(axis=0) == free).all()  # it stopped about 1e-9 away
    assert (np.abs(found.w.sum(axis=0) - 1).max() < 1e-14) if simplex else True
    assert 0 <= found.gap <= 1e-9 * found.objective


def test_the_vertex_is_no_worse_and_rows_that_are_merely_near_do_not_move_it():
    """Residuals of 1e-9 that no weights can take away together: the solution stays as it was."""
    rng = np.random.default_rng(3)
    n = 400
    A = np.linalg.qr(rng.normal(size=(n, 2)))[0].T[None]
    exact = A[0].T @ [3.0, -1.0]
    y = exact + 1e-9 * rng.normal(size=n) + np.where(rng.random(n) < 0.3, rng.normal(size=n), 0.0)
    for tau in (0.3, 0.5, 0.7):
        found = solve(A, y, np.ones(n), np.full((1, 1), tau), np.zeros(2, dtype=bool))
        r = y - found.w[0] @ A[0]
        value = np.maximum(tau * r, (tau - 1) * r).sum()
        assert found.objective[0] == pytest.approx(value, rel=1e-12)
        assert found.bound[0] <= value <= found.bound[0] * (1 + 1e-7)


def test_equal_neighbours_and_equal_folds_give_their_value_to_the_bit():
    a = 10.0 ** np.arange(-8, 9) / 3
    q = np.repeat(a[:, None], 3, axis=1)
    between = interpolate(q, np.array([0.1, 0.5, 0.9]), np.array([0.17, 0.3, 0.63, 0.9]))
    assert (between == a[:, None]).all()
    assert np.array_equal(mean_of_folds(np.stack([a] * 5)), a)
    assert mean_of_folds(np.array([[1.0], [2.0], [6.0]])) == pytest.approx(3.0)
