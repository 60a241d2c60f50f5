"""All aggregators: the contract, oracles, the theory of section 1.7, gates, bad input."""

import dataclasses
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise.registry import build
from poise_quantagg.aggregators import search
from poise_quantagg.aggregators.gates import FLOOR
from poise_quantagg.components import (
    FQRA,
    QRA,
    Average,
    Best,
    GlobalCoarse,
    GlobalFine,
    GlobalMedium,
    Greedy,
    LocalCoarse,
    LocalFine,
    LocalMedium,
    Median,
)
from poise_quantagg.monotone import isotonize
from poise_quantagg.scores import crossing_depth, crossing_rate, pinball

LEVELS = np.arange(1, 10) / 10
EXACT = (GlobalCoarse(), GlobalMedium(), GlobalFine())
SIMPLE = (Average(), Median(), Best(), Greedy(rounds=15), QRA(), FQRA())
SHORT = {"n_iter": 2, "max_steps": 20, "patience": 20}
SMALL = SHORT | {"width": 8, "depth": 2}
LOCAL = (LocalCoarse(**SMALL), LocalMedium(**SMALL), LocalFine(**SMALL))
GRADIENT = tuple(kind(solver="gradient", **SHORT) for kind in (GlobalCoarse, GlobalMedium, GlobalFine))
ALL = SIMPLE + EXACT + GRADIENT + LOCAL
name_of = lambda c: type(c).__name__ + ("" if getattr(c, "solver", "") != "gradient" else "-gradient")  # noqa: E731
everywhere = pytest.mark.parametrize("component", ALL, ids=name_of)
seeds = st.integers(0, 2**32 - 1)


def problem(seed, n=60, p=4, monotone=True):
    """Return (Z, y, X): p imperfect quantile predictions of one target, better or worse by feature."""
    rng = np.random.default_rng(seed)
    y, X = rng.normal(size=n), rng.normal(size=(n, 2))
    q = rng.normal(size=(n, p, len(LEVELS))) * rng.uniform(0.2, 2, size=(1, p, 1))
    q[:, 0] *= np.where(X[:, :1] > 0, 2.0, 0.3)  # the first model is good where the feature is negative
    Z = 0.7 * y[:, None, None] + (np.sort(q, axis=2) if monotone else q)
    return Z, y, X


def fit(component, Z, y, X=None, **options):
    return component.fit(Z, y, X, levels=LEVELS, **options)


def loss(fitted, Z, y, X=None):
    return pinball(y, fitted.predict(Z, X), LEVELS)


def summed(w, Z):
    """Return the weighted sum by the shape of the weights, n of them or one for all rows."""
    form = {(1, 0): "p,npm", (2, 0): "pm,npm", (3, 0): "pvm,npv",
            (1, 1): "np,npm", (2, 1): "npm,npm", (3, 1): "npvm,npv"}
    per_row = int(len(w) == len(Z) != Z.shape[1])
    return np.einsum(form[w.ndim - per_row, per_row] + "->nm", w, Z)


# ------------------------------------------------------------------ the contract


@everywhere
def test_shapes_weights_and_determinism(component):
    Z, y, X = problem(0)
    fitted, again = fit(component, Z, y, X), fit(component, Z, y, X)
    w, q = fitted.weights(X), fitted.predict(Z, X)
    shape = {"Medium": (4, 9), "Fine": (4, 9, 9)}
    kind = type(component).__name__
    plain = next((s for name, s in shape.items() if kind in ("Global" + name, "Local" + name)), (4,))
    plain = (4, 9) if kind in ("QRA", "FQRA") else plain
    assert w.shape == ((60, *plain) if component.needs_features else plain)
    assert q.shape == (60, 9) and np.isfinite(q).all()
    assert np.array_equal(q, again.predict(Z, X)) and np.array_equal(w, again.weights(X))
    if kind != "Median":
        intercept = getattr(fitted, "intercept", None)
        assert q == pytest.approx(summed(w, Z) + (0 if intercept is None else intercept))
    if kind not in ("QRA", "FQRA"):
        assert w.min() >= 0
        axes = tuple(range(-len(plain), 0))
        axes = {1: axes, 2: axes[:1], 3: axes[:2]}[len(plain)]
        assert w.sum(axis=axes) == pytest.approx(1)


@pytest.mark.parametrize("name", [
    "average", "median", "best", "greedy", "qra", "fqra", "global_coarse", "global_medium",
    "global_fine", "local_coarse", "local_medium", "local_fine",
])
def test_the_registry_builds_them(name):
    Z, y, X = problem(1)
    options = SMALL if name.startswith("local") else {}
    assert build("aggregator", name, **options).fit(Z, y, X, levels=LEVELS).predict(Z, X).shape == (60, 9)


def test_without_levels_an_even_grid_is_meant():
    Z, y, _ = problem(2)
    assert np.array_equal(GlobalCoarse().fit(Z, y).weights(), fit(GlobalCoarse(), Z, y).weights())


@everywhere
def test_one_model_one_row_or_a_constant_target_are_no_special_case(component):
    Z, y, X = problem(3)
    for rows in ((Z[:, :1], y, X), (Z[:1], y[:1], X[:1]), (Z, np.full(60, 2.0), X),
                 (np.full_like(Z, 2.0), np.full(60, 2.0), np.zeros_like(X))):
        q = fit(component, *rows).predict(rows[0], rows[2])
        assert q.shape == rows[0].shape[::2] and np.isfinite(q).all()


# ------------------------------------------------------------------ oracles


def test_average_and_median_by_hand():
    Z = np.array([[[0.0], [1.0], [5.0]]])
    assert Average().fit(Z, [0.0]).predict(Z).item() == pytest.approx(2)
    median = Median().fit(Z, [0.0])
    assert median.predict(Z).item() == 1
    assert not median.linear


def test_best_is_the_model_of_least_loss_on_the_validation_rows_if_there_are_any():
    Z, y, _ = problem(4)
    own = [pinball(y, Z[:, j], LEVELS) for j in range(4)]
    assert fit(Best(), Z, y).weights() == pytest.approx(np.eye(4)[int(np.argmin(own))])
    for j in range(4):
        held = Z.copy()
        held[:, j] = y[:, None]
        assert fit(Best(), Z, y, validation=(held, y)).weights() == pytest.approx(np.eye(4)[j])
    tied = np.concatenate([Z, Z], axis=1)
    assert fit(Best(), tied, y).weights() == pytest.approx(np.tile(fit(Best(), Z, y).weights(), 2) / 2)


@given(seeds, st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_greedy_is_the_search_by_hand(seed, rounds):
    Z, y, _ = problem(seed, n=12, p=3)
    chosen, paths = [], []
    for _ in range(rounds):
        trials = [pinball(y, Z[:, [*chosen, j]].mean(axis=1), LEVELS) for j in range(3)]
        chosen = [*chosen, int(np.argmin(trials))]
        paths.append((min(trials), np.bincount(chosen, minlength=3) / len(chosen)))
    score, weights = min(paths, key=lambda path: path[0])
    fitted = fit(Greedy(rounds=rounds), Z, y)
    assert fitted.objective == pytest.approx(score) == loss(fitted, Z, y)
    assert fitted.weights() == pytest.approx(weights)


def test_greedy_with_many_rounds_nears_the_exact_weights():
    Z, y, _ = problem(5)
    exact = fit(GlobalCoarse(), Z, y)
    assert exact.objective <= fit(Greedy(rounds=200), Z, y).objective <= exact.objective * 1.001


@given(seeds)
@settings(max_examples=15, deadline=None)
def test_all_factors_span_what_the_models_span(seed):
    Z, y, _ = problem(seed)
    qra = fit(QRA(), Z, y)
    assert fit(FQRA(factors=4), Z, y).objective == pytest.approx(qra.objective, rel=1e-6)
    fewer = [fit(FQRA(factors=r), Z, y).objective for r in (1, 2, 3)]
    assert min(fewer) >= qra.objective * (1 - 1e-6)


def test_factors_are_chosen_by_either_rule():
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    Z = y[:, None, None] + 0.001 * rng.normal(size=(300, 5, 9))  # one factor, and rounding
    y = y + 0.3 * rng.normal(size=300)
    one = fit(FQRA(factors=1), Z, y).weights()
    for rule in (FQRA(), FQRA(choose="variance", variance=0.95)):
        assert fit(rule, Z, y).weights() == pytest.approx(one)
    assert not np.allclose(fit(FQRA(choose="variance", variance=1.0), Z, y).weights(), one)


def test_the_options_of_qra_are_the_global_medium_program():
    Z, y, _ = problem(6)
    assert fit(QRA(intercept=False, simplex=True), Z, y).objective == pytest.approx(
        fit(GlobalMedium(), Z, y).objective)
    free, shifted = fit(GlobalMedium(simplex=False), Z, y), fit(QRA(), Z, y)
    assert free.objective == pytest.approx(fit(QRA(intercept=False), Z, y).objective)
    assert shifted.objective <= free.objective <= fit(GlobalMedium(), Z, y).objective


def test_two_models_against_a_fine_grid():
    Z, y, _ = problem(5, p=2)
    grid = np.linspace(0, 1, 2001)
    losses = [pinball(y, a * Z[:, 0] + (1 - a) * Z[:, 1], LEVELS) for a in grid]
    fitted = fit(GlobalCoarse(), Z, y)
    assert fitted.objective <= min(losses) + 1e-12
    assert fitted.weights()[0] == pytest.approx(grid[int(np.argmin(losses))], abs=1e-3)


@pytest.mark.parametrize("component", (*EXACT, QRA(), FQRA(factors=2), Greedy(), Best()), ids=name_of)
def test_integer_sample_weights_mean_repeated_rows(component):
    Z, y, _ = problem(7)
    times = np.random.default_rng(7).integers(0, 3, size=60)
    weighted = fit(component, Z, y, sample_weight=times)
    repeated = fit(component, np.repeat(Z, times, axis=0), np.repeat(y, times))
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)


# ------------------------------------------------------------------ T9: crossing


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_t9_coarse_weights_on_monotone_inputs_never_cross(seed):
    Z, y, _ = problem(seed)
    new = np.sort(np.random.default_rng(seed).normal(size=Z.shape), axis=2)
    for component in (Average(), Median(), Best(), Greedy(rounds=5), GlobalCoarse()):
        q = fit(component, Z, y).predict(new)
        # rounding of a weighted sum may turn a tie into a fall of one unit in the last place
        assert np.all(np.diff(q, axis=1) >= -1e-13)
    assert crossing_rate(fit(Median(), Z, y).predict(new)) == 0


def test_t9_nor_do_local_coarse_ones():
    Z, y, X = problem(8)
    new = np.sort(np.random.default_rng(8).normal(size=Z.shape), axis=2)
    assert np.all(np.diff(fit(LOCAL[0], Z, y, X).predict(new, X), axis=1) >= -1e-13)


@pytest.mark.parametrize("component", [GlobalMedium(), GlobalFine()], ids=name_of)
def test_t9_weights_by_level_can_cross_though_no_model_does(component):
    """y is x - 1 or x + 1: one model knows the lower level, the other the upper one, and x differs."""
    x = np.repeat(np.linspace(-3, 3, 21), 2)
    far = 20 + 5 * np.random.default_rng(0).random(42)
    Z = np.stack([np.stack([x - 1, x + far], 1), np.stack([x - far, x + 1], 1)], axis=1)
    fitted = component.fit(Z, x + np.tile([-1, 1], 21), levels=[0.4, 0.6])
    new = np.array([[[5.0, 9.0], [1.0, 2.0]]])
    assert crossing_rate(new[:, 0]) == crossing_rate(new[:, 1]) == 0
    assert fitted.predict(new) == pytest.approx(np.array([[5.0, 2.0]]), abs=1e-6)


# ------------------------------------------------------------------ T10, T12 to T14


@given(seeds, st.booleans())
@settings(max_examples=10, deadline=None)
def test_t10_in_sample_finer_weights_are_never_worse(seed, monotone):
    """Fine <= medium <= coarse <= the average and every model: the classes are nested."""
    Z, y, _ = problem(seed, monotone=monotone)
    coarse, medium, fine = (fit(c, Z, y) for c in EXACT)
    others = [loss(fit(c, Z, y), Z, y) for c in (Average(), Best(), Greedy(rounds=5))]
    others += [pinball(y, Z[:, j], LEVELS) for j in range(Z.shape[1])]
    ordered = [fine.objective, medium.objective, coarse.objective, min(others)]
    assert all(a <= b * (1 + 1e-7) for a, b in pairwise(ordered))
    for fitted in (coarse, medium, fine):
        assert fitted.objective == pytest.approx(loss(fitted, Z, y))


@given(seeds, st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_t12_an_exact_model_among_noise_gets_all_the_weight(seed, j):
    Z, y, _ = problem(seed)
    Z[:, j] = y[:, None]
    one = np.eye(4)[j]
    coarse, medium, fine = (fit(c, Z, y) for c in EXACT)
    assert coarse.weights() == pytest.approx(one, abs=1e-6)
    assert medium.weights() == pytest.approx(np.tile(one[:, None], 9), abs=1e-6)
    # which of its levels does not matter: they are equal
    assert fine.weights().sum(axis=1) == pytest.approx(np.tile(one[:, None], 9), abs=1e-6)
    assert max(f.objective for f in (coarse, medium, fine)) < 1e-7


@given(seeds, st.floats(-1e3, 1e3), st.sampled_from([1e-6, 0.1, 3.0, 1e6]))
@settings(max_examples=10, deadline=None)
def test_t13_weights_do_not_depend_on_the_unit_of_the_target(seed, shift, factor):
    Z, y, _ = problem(seed)
    shift *= factor
    for component in EXACT:
        here, there = fit(component, Z, y), fit(component, shift + factor * Z, shift + factor * y)
        assert there.objective == pytest.approx(factor * here.objective, rel=1e-6)
        # near the optimum several weights may be as good: those found are as good in either unit
        assert loss(dataclasses.replace(here, w=there.w), Z, y) == pytest.approx(here.objective, rel=1e-6)
    assert there.weights().sum() == pytest.approx(9)


@pytest.mark.parametrize("component", (*EXACT, *GRADIENT, *LOCAL), ids=name_of)
def test_t13_by_the_weights_themselves(component):
    Z, y, X = problem(10)
    here, there = fit(component, Z, y, X), fit(component, 5 + 4 * Z, 5 + 4 * y, X)
    assert there.weights(X) == pytest.approx(here.weights(X), abs=1e-4)


@given(seeds, st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_t14_permuting_models_permutes_weights(seed, order):
    Z, y, _ = problem(seed)
    for component in (*SIMPLE, GlobalCoarse()):
        plain, permuted = fit(component, Z, y), fit(component, Z[:, order], y)
        assert permuted.predict(Z[:, order]) == pytest.approx(plain.predict(Z), abs=1e-3)
        if not isinstance(component, (QRA, FQRA)):
            assert permuted.weights() == pytest.approx(plain.weights()[list(order)], abs=1e-4)
    for component in (GlobalMedium(), GlobalFine()):
        plain, permuted = fit(component, Z, y), fit(component, Z[:, order], y)
        assert permuted.objective == pytest.approx(plain.objective, rel=1e-7)
        back = dataclasses.replace(plain, w=permuted.w[np.argsort(order)])
        assert loss(back, Z, y) == pytest.approx(plain.objective, rel=1e-7)


@given(seeds, st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_t14_a_duplicated_model_changes_nothing_in_the_optimum(seed, j):
    Z, y, _ = problem(seed)
    more = np.concatenate([Z, Z[:, [j]]], axis=1)
    for component in (*EXACT, QRA(), GlobalMedium(simplex=False)):
        assert fit(component, more, y).objective == pytest.approx(
            fit(component, Z, y).objective, rel=1e-7)


# ------------------------------------------------------------------ trained weights


def sharp(kind, **options):
    return kind(n_iter=1, max_steps=600, patience=600, **options)


@pytest.mark.parametrize("kind", [GlobalCoarse, GlobalMedium])
def test_the_gradient_solver_finds_the_exact_solution_from_equal_weights(kind):
    Z, y, _ = problem(11)
    exact = fit(kind(), Z, y)
    found = fit(kind(solver="gradient", start="uniform", n_iter=2, max_steps=2000, patience=2000), Z, y,
                validation=(Z, y))
    assert loss(found, Z, y) <= exact.objective * 1.01
    assert loss(fit(Average(), Z, y), Z, y) > exact.objective * 1.02  # it did not start there


@pytest.mark.parametrize("kinds", [(LocalCoarse, GlobalCoarse), (LocalMedium, GlobalMedium)])
def test_a_gate_starts_at_the_floored_global_solution_and_ends_no_worse_than_it_or_the_solution(kinds):
    local, whole = kinds
    Z, y, X = problem(12)
    held = problem(13)
    train, _ = search._parts(search._Rows(Z, y, X, np.ones(60)), None, 0)
    w = fit(whole(), train.Z, train.y).weights()  # the rows that choose are not among those of the start
    floored = (1 - FLOOR) * w + FLOOR / 4
    first = fit(local(**SMALL | {"max_steps": 1}), Z, y, X)
    # one step of Adam at 1e-3 moves a logit by less than 0.01
    assert first.weights(X) == pytest.approx(np.broadcast_to(floored, (60, *w.shape)), abs=0.01)
    trained = fit(local(**SMALL | {"max_steps": 200}), Z, y, X, validation=held)
    known = fit(whole(), Z, y).weights()
    for start in ((1 - FLOOR) * known + FLOOR / 4, known):
        at_start = np.sort(summed(start, held[0]), axis=1)
        assert trained.score <= pinball(held[1], at_start, LEVELS) * (1 + 1e-6)
    own = np.sort(trained.predict(held[0], held[2]), axis=1)
    assert trained.score == pytest.approx(pinball(held[1], own, LEVELS), rel=1e-4)
    scores = [row["validation_pinball"] for row in trained.leaderboard]
    assert scores == sorted(scores) and scores[0] == trained.score


@pytest.mark.parametrize("kinds", [(LocalCoarse, GlobalCoarse), (LocalMedium, GlobalMedium),
                                   (LocalFine, GlobalMedium)], ids=lambda kinds: kinds[0].__name__)
def test_where_no_gate_is_better_the_global_solution_on_all_rows_is_what_is_left(kinds):
    local, whole = kinds
    Z, y, X = problem(12)
    Z[:, 2] = y[:, None]  # one model is exact: any floor is worse
    gate = fit(local(**SMALL | {"max_steps": 3}), Z, y, X)
    assert gate.predict(Z, X) == pytest.approx(fit(whole(), Z, y).predict(Z), abs=1e-12)
    assert np.ptp(gate.weights(X), axis=0).max() == 0
    assert gate.score < gate.leaderboard[0]["validation_pinball"]


def test_a_fine_gate_starts_at_the_medium_solution():
    Z, y, X = problem(12)
    train, _ = search._parts(search._Rows(Z, y, X, np.ones(60)), None, 0)
    w = fit(LocalFine(**SMALL | {"max_steps": 1}), Z, y, X).weights(X)
    floored = (1 - FLOOR) * fit(GlobalMedium(), train.Z, train.y).weights() + FLOOR / 36
    assert np.einsum("npkk->npk", w) == pytest.approx(np.broadcast_to(floored, (60, 4, 9)), abs=0.01)


def test_gates_learn_where_a_model_is_good():
    Z, y, X = problem(14, n=600)
    held = problem(15, n=300)
    gate = fit(sharp(LocalCoarse, width=16, depth=2), Z, y, X, validation=held)
    whole = fit(GlobalCoarse(), Z, y)
    new = problem(16, n=600)
    assert loss(gate, *new) < 0.95 * loss(whole, *new)
    first = gate.weights(new[2])[:, 0]
    assert first[new[2][:, 0] < 0].mean() > first[new[2][:, 0] > 0].mean() + 0.1


def test_a_band_of_nothing_is_medium_and_a_whole_band_is_fine():
    Z, y, X = problem(17)
    medium, banded = fit(LOCAL[1], Z, y, X), fit(LocalFine(**SMALL, band=0), Z, y, X)
    assert banded.predict(Z, X) == pytest.approx(medium.predict(Z, X), abs=1e-12)
    w = banded.weights(X)
    assert np.einsum("npkk->npk", w) == pytest.approx(medium.weights(X), abs=1e-12)
    assert np.abs(w * (1 - np.eye(9))).max() == 0
    near = fit(LocalFine(**SMALL, band=2), Z, y, X).weights(X)
    apart = np.abs(np.arange(9)[:, None] - np.arange(9)) > 2
    assert np.abs(near * apart).max() == 0 and near.sum(axis=(1, 2)) == pytest.approx(1)


def test_a_rank_is_a_bottleneck_before_the_logits():
    Z, y, X = problem(17)
    fitted = fit(LocalFine(**SMALL | {"max_steps": 60}, rank=2), Z, y, X)
    assert fitted.params["W3"].shape == (2, 9 * 4 * 9)
    logits = np.log(fitted.weights(X)).reshape(60, -1, 9)
    moved = (logits - logits.mean(axis=1, keepdims=True)).reshape(60, -1)
    assert np.linalg.matrix_rank(moved - moved.mean(axis=0), tol=1e-6 * np.abs(moved).max()) <= 2


@pytest.mark.parametrize("kind", [GlobalMedium, LocalMedium])
def test_a_penalty_lessens_crossing_a_lot_for_a_little_loss(kind):
    """From equal weights, which do not cross: early stopping sees pinball, and would stay at the start."""
    Z, y, X = problem(19, n=100)
    options = {"n_iter": 1, "max_steps": 300, "patience": 300, "start": "uniform"}
    options |= {"width": 8, "depth": 2} if kind is LocalMedium else {}
    solver = {} if kind is LocalMedium else {"solver": "gradient"}  # which a penalty implies
    plain = fit(kind(**options, **solver), Z, y, X, validation=(Z, y, X))
    assert crossing_depth(plain.predict(Z, X)) > 0
    for penalty in ("constant", "adaptive", "distance"):
        held = fit(kind(**options, penalty=penalty, penalty_weight=10.0, margin=0.01), Z, y, X,
                   validation=(Z, y, X))
        assert crossing_depth(held.predict(Z, X)) < 0.1 * crossing_depth(plain.predict(Z, X))
        assert loss(held, Z, y, X) < 1.02 * loss(plain, Z, y, X)


@pytest.mark.parametrize("kind", [GlobalMedium, LocalMedium, LocalFine])
@pytest.mark.parametrize("how", ["sort", "pava", "minmax"])
def test_isotonising_inside_the_loss_trains(kind, how):
    Z, y, X = problem(20, monotone=False)
    options = {} if kind is GlobalMedium else {"width": 8, "depth": 2}
    fitted = fit(kind(n_iter=1, max_steps=100, patience=100, start="uniform", loss_isotonize=how,
                      **options), Z, y, X, validation=(Z, y, X))
    # equal weights: of fine ones the mean over levels too
    before = Z.mean(axis=(1, 2) if kind is LocalFine else 1, keepdims=True)[:, 0] + np.zeros((60, 9))
    after = fitted.predict(Z, X)
    assert pinball(y, isotonize(after, how, LEVELS), LEVELS) < pinball(
        y, isotonize(before, how, LEVELS), LEVELS)


# ------------------------------------------------------------------ bad input


def broken(a, rows, value):
    """Return a copy of an array with `value` somewhere in each of the rows."""
    a = a.copy()
    a.reshape(len(a), -1)[rows, 0] = value
    return a


@everywhere
def test_bad_input_is_refused_in_one_line(component):
    Z, y, X = problem(4)
    fitted = fit(component, Z, y, X)
    calls = [
        (DataError, r"Z\[3, 0, 0\] is nan", lambda: fit(component, broken(Z, [3], np.nan), y, X)),
        (DataError, "3 rows, first rows 7, 9, 50",
         lambda: fit(component, broken(Z, [7, 9, 50], np.inf), y, X)),
        (DataError, r"y\[5\] is -inf.* 1 row, 5", lambda: fit(component, Z, broken(y, [5], -np.inf), X)),
        (DataError, "60 rows and y has 59", lambda: fit(component, Z, y[:-1], X)),
        (DataError, "3 axes", lambda: fit(component, Z[0], y, X)),
        (DataError, "none empty", lambda: fit(component, Z[:, :0], y, X)),
        (DataError, "real numbers", lambda: fit(component, Z.astype(str), np.full(60, "a"), X)),
        (DataError, "weights >= 0", lambda: fit(component, Z, y, X, sample_weight=-np.ones(60))),
        (DataError, "one > 0", lambda: fit(component, Z, y, X, sample_weight=np.zeros(60))),
        (DataError, "validation", lambda: fit(component, Z, y, X, validation=Z)),
        (DataError, "models and levels", lambda: fit(component, Z, y, X, validation=(Z[:, :2], y, X))),
        (DataError, r"validation y\[1\]", lambda: fit(component, Z, y, X,
                                                     validation=(Z, broken(y, [1], np.nan), X))),
        (ConfigError, "2 levels", lambda: component.fit(Z, y, X, levels=[0.1, 0.9])),
        (ConfigError, "increasing", lambda: component.fit(Z, y, X, levels=LEVELS[::-1])),
        (ConfigError, "increasing", lambda: component.fit(Z, y, X, levels=np.r_[0.1, LEVELS[:-1]])),
        (ConfigError, r"\(0, 1\)", lambda: component.fit(Z, y, X, levels=np.arange(9) / 9)),
        (ConfigError, r"\(0, 1\)", lambda: component.fit(Z, y, X, levels=np.arange(1, 10))),
        (DataError, "fitted on 4 and 9", lambda: fitted.predict(Z[:, :3], X)),
        (DataError, "fitted on 4 and 9", lambda: fitted.predict(Z[..., :3], X)),
        (DataError, r"Z\[2, 0, 0\] is nan", lambda: fitted.predict(broken(Z, [2], np.nan), X)),
    ]
    if component.needs_features:
        calls += [
            (DataError, "give X", lambda: fit(component, Z, y)),
            (DataError, r"X\[8, 0\] is nan", lambda: fit(component, Z, y, broken(X, [8], np.nan))),
            (DataError, "59 rows", lambda: fit(component, Z, y, X[1:])),
            (DataError, "give validation X", lambda: fit(component, Z, y, X, validation=(Z, y))),
            (DataError, "give X", lambda: fitted.predict(Z)),
            (DataError, "give X", fitted.weights),
            (DataError, "3 features; fitted on 2", lambda: fitted.predict(Z, np.ones((60, 3)))),
            (DataError, "X has 2 rows", lambda: fitted.predict(Z, X[:2])),
        ]
    for error, message, call in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "options"), [
    *product([GlobalCoarse, GlobalMedium, GlobalFine], [
        {"penalty": "constant", "solver": "exact"}, {"loss_isotonize": "sort", "solver": "exact"},
        {"simplex": False, "solver": "gradient"}, {"simplex": False, "penalty": "adaptive"},
        {"penalty": "sometimes"}, {"loss_isotonize": "soft"}, {"solver": "highs"}, {"n_iter": 0},
        {"margin": -1.0}, {"penalty_weight": 0.0}, {"start": "random"}, {"random_state": -1},
    ]),
    (LocalCoarse, {"width": 0}), (LocalMedium, {"depth": 0}), (LocalFine, {"rank": 0}),
    (LocalFine, {"band": -1}), (LocalFine, {"penalty": "sometimes"}), (Greedy, {"rounds": 0}),
    (FQRA, {"factors": 0}), (FQRA, {"choose": "aic"}), (FQRA, {"variance": 1.5}),
])
def test_options_that_make_no_sense_are_refused(kind, options):
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ models that hardly differ


@pytest.mark.parametrize("name", ["float32 copy", "noise of 1e-10", "noise of 1e-5"])
def test_models_that_hardly_differ_get_no_wild_weights(name):
    rng = np.random.default_rng(0)
    y = rng.normal(size=300)
    one = 0.5 * y[:, None, None] + np.sort(rng.normal(size=(300, 1, 9)), axis=2)
    noise = rng.normal(size=one.shape)
    other = {"float32 copy": one.astype(np.float32).astype(float), "noise of 1e-10": one + 1e-10 * noise,
             "noise of 1e-5": one + 1e-5 * noise}[name]
    levels = np.arange(1, 10) / 10
    both = QRA().fit(np.concatenate([one, other], axis=1), y, levels=levels)
    alone = QRA().fit(one, y, levels=levels)
    assert np.abs(both.weights()).max() < 100
    assert both.predict(np.concatenate([one, one], axis=1)) == pytest.approx(alone.predict(one), abs=0.05)


def test_the_objective_of_fqra_is_that_of_its_weights():
    rng = np.random.default_rng(0)
    Z, y = rng.normal(size=(2, 3, 5)), rng.normal(size=2)
    Z[:, 0] = Z[:1, 0]  # a model that says the same for every row
    levels = np.arange(1, 6) / 6
    fitted = FQRA().fit(Z, y, levels=levels)
    assert fitted.objective == pytest.approx(pinball(y, fitted.predict(Z), levels), abs=1e-9)
    assert np.abs(fitted.weights()).max() < 100


@pytest.mark.parametrize("name", ["average", "median", "best", "greedy", "global_coarse"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_float32_array_gives_what_its_float64_copy_gives_without_one(name, streamed, monkeypatch):
    """Bit for bit: whatever is computed is computed in float64, a block of rows at a time."""
    import tracemalloc

    from poise.registry import build
    from poise_quantagg import programs

    rng = np.random.default_rng(0)
    n = 40_000 if streamed else 300
    y = rng.normal(size=n)
    Z = np.sort(0.5 * y[:, None, None] + rng.normal(size=(n, 5, 9)), axis=2).astype(np.float32)
    monkeypatch.setattr(programs, "_KEPT", 2_000)
    fits, extra = [], []
    for array in (Z, Z.astype(float)):
        tracemalloc.start()
        fits.append(build("aggregator", name).fit(array, y))
        extra.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert np.array_equal(fits[0].predict(Z), fits[1].predict(Z.astype(float)))
    assert not streamed or extra[0] < extra[1] + 0.5 * Z.nbytes  # a float64 copy takes 2, and was not made
