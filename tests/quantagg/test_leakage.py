"""Nobody learns from rows that it is judged by; calibrated figures are those of a split done by hand."""

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest

from poise.interfaces import Arrays, Parts, Splits
from poise_quantagg.aggregators.search import _parts, _Rows
from poise_quantagg.aggregators.simple import greedy
from poise_quantagg.base.nets import Config, NetRegressor, _Search
from poise_quantagg.components import Linear, LocalCoarse, QuantileEnsemble, QuantileForest
from poise_quantagg.conformal import CVPlus, nested_fold_arrays, nested_pairs
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.experiment import _fit
from poise_quantagg.folds import assign_folds
from poise_quantagg.programs import coarse
from poise_quantagg.scores import pinball
from poise_quantagg.splits import standardised
from poise_quantagg.stacker import QuantileStacker

pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")
LEVELS = [0.1, 0.5, 0.9]


@dataclass(frozen=True)
class Table:
    """Rows in order, 60 to train, 20 to validate, the others to test, which may be moved or left out."""

    shift: float = 0.0
    far: float = 0.0
    end: int = 120

    def load(self, seed=0):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(120, 2))
        y = X[:, 0] + (0.5 + np.abs(X[:, 1])) * rng.normal(size=120)
        y[80:] += self.shift
        X[100:] += self.far
        parts = [Arrays(X[s], y[s]) for s in (slice(60), slice(60, 80), slice(80, self.end))]
        return Splits(*parts, {"source": "made"}, {"target": "y"})


class Notes:
    """A context that keeps what it is told."""

    device, seed = "cpu", 0

    def __init__(self, directory):
        self.directory, self.logged, self.notes = directory, [], {}

    def log(self, step, values):
        self.logged.append(values)

    def note(self, key, value):
        self.notes[key] = value

    @contextlib.contextmanager
    def progress(self, total, label):
        yield self

    def advance(self, n=1, note=""):
        pass


USUAL = {"base": ["linear", "quantile_forest"], "base_options": {"quantile_forest": {"n_estimators": 5}},
         "aggregators": ["best", "qra", "greedy"], "levels": LEVELS, "folds": 4, "figures": False}


def ran(folder, data, **options):
    """Run the recipe; return what it publishes by method."""
    notes = Notes(folder)
    QuantileEnsemble(**USUAL | options).run(Parts(data=data), notes)
    return {row["name"]: row for row in notes.notes["by_split"]["rows"]}, notes.notes


# ------------------------------------------------------------------ the recipe's test rows


@pytest.mark.parametrize("refit", ["all", "bag"])
def test_nothing_that_is_learnt_depends_on_the_tests_targets(refit, tmp_path):
    one, notes = ran(tmp_path / "one", Table(), refit=refit)
    two, others = ran(tmp_path / "two", Table(shift=50.0), refit=refit)
    assert notes["weights"] == others["weights"] and set(notes["weights"]) == {"best", "greedy"}
    for name, row in one.items():
        for key in ("length_80", "length_80_cv", "crossing_raw"):  # of predictions alone
            assert row[key] == two[name][key], (name, key)
        assert two[name]["wis_hub"] > row["wis_hub"] + 10  # and the targets are those that are scored


def test_nothing_that_is_predicted_depends_on_the_other_test_rows(tmp_path):
    """Scales that took test rows in, or a fit that did, would move with the last twenty rows' features."""
    settings, found = QuantileEnsemble(**USUAL)._settings(), []
    for number, data in enumerate((Table(end=100), Table(), Table(far=1e4))):
        split, notes = standardised(data.load()), Notes(tmp_path)
        found.append(_fit(settings, Parts(data=data), 0, split, tmp_path / str(number), notes)[1])
        assert len(split.train.y) == 80
        assert split.train.x.mean(axis=0) == pytest.approx(0, abs=1e-12)
        assert (split.train.y.mean(), split.train.y.std()) == pytest.approx((0, 1), abs=1e-12)
    for name, alone in found[0].items():
        for other in found[1:]:
            assert np.array_equal(other[name].raw[:20], alone.raw)
            assert np.array_equal(other[name].interval[:20], alone.interval)


def by_hand(split, fold, K):
    """Return the linear model's out-of-fold quantiles, and those of each fold's model for test rows."""
    fits = [Linear(levels=LEVELS).build().fit(split.train.x[fold != k], split.train.y[fold != k])
            for k in range(K)]
    oof = np.stack([fits[k].predict_quantiles(split.train.x[i : i + 1])[0] for i, k in enumerate(fold)])
    return oof, np.stack([fit.predict_quantiles(split.test.x) for fit in fits])


def plus_by_hand(y, oof, folds, fold, alpha):
    """Return CV+ intervals row by row and residual by residual (eq 29)."""
    n, out = len(y), []
    low, high = np.sort(oof, axis=1)[:, [0, -1]].T
    r = np.maximum(low - y, y - high)
    for q in np.sort(folds, axis=2).swapaxes(0, 1):
        below = np.sort([q[fold[i], 0] - r[i] for i in range(n)])
        above = np.sort([q[fold[i], -1] + r[i] for i in range(n)])
        out.append((below[int(alpha * (n + 1)) - 1], above[int(np.ceil((1 - alpha) * (n + 1))) - 1]))
    return np.array(out)


def test_the_recipes_calibrated_figures_are_those_of_cv_plus_by_hand(tmp_path):
    rows, _ = ran(tmp_path, Table(), base=["linear"], aggregators=["qra"])
    split = standardised(Table().load(0))
    fold = assign_folds(80, 4, seed=0)
    oof, folds = by_hand(split, fold, 4)
    y, new = split.train.y, split.test.y
    qra = QuantileStacker("qra", LEVELS).fit(oof[:, None], y)
    weighed = (qra.predict(oof[:, None]), np.stack([qra.predict(q[:, None]) for q in folds]))
    for name, (own, of_folds) in {"linear": (oof, folds), "qra": weighed}.items():
        ends = plus_by_hand(y, own, of_folds, fold, 0.2)
        inside = (ends[:, 0] <= new) & (new <= ends[:, 1])
        assert rows[name]["length_80_cv"] == pytest.approx(np.diff(ends).mean(), rel=1e-9)
        assert rows[name]["coverage_80_cv"] == pytest.approx(inside.mean())
        backwards = plus_by_hand(y, own, of_folds[::-1], fold, 0.2)  # as it would be with folds mixed up
        assert abs(np.diff(backwards).mean() / np.diff(ends).mean() - 1) > 1e-5


# ------------------------------------------------------------------ the estimator


def sample(n=72):
    rng = np.random.default_rng(3)
    X = rng.normal(size=(n, 2))
    return X, X[:, 0] + (0.5 + np.abs(X[:, 1])) * rng.normal(size=n)


MODELS = {"linear": Linear(), "forest": QuantileForest(n_estimators=4)}


def at(component, X, y):
    return type(component)(**vars(component) | {"levels": LEVELS}).build().fit(X, y)


def test_nested_intervals_are_cv_plus_of_weights_that_saw_no_row_of_the_fold():
    X, y = sample()
    new = np.random.default_rng(4).normal(size=(30, 2))
    model = QuantileAggregatorRegressor(LEVELS, MODELS, "qra", cv=3, conformal="nested").fit(X, y)
    fold = model.cross_fit_.fold

    def fitted(keep, rows):
        return np.stack([at(m, X[keep], y[keep]).predict_quantiles(rows) for m in MODELS.values()], axis=1)

    pairs = {(k, l): fitted((fold != k) & (fold != l), X[(fold == k) | (fold == l)])
             for k, l in nested_pairs(3)}
    weights = [QuantileStacker("qra", LEVELS, isotonize="sort").fit(Z, y[rows])
               for rows, Z in nested_fold_arrays(pairs, fold)]
    oof = np.empty((len(y), 3))
    for k, stacker in enumerate(weights):
        oof[fold == k] = stacker.predict(fitted(fold != k, X[fold == k]))
    folds = np.stack([stacker.predict(fitted(fold != k, new)) for k, stacker in enumerate(weights)])
    expected = CVPlus().fit(y, oof, fold, LEVELS).predict_interval(folds, 0.2)
    assert model.predict_interval(new) == pytest.approx(expected, rel=1e-9)
    plain = np.stack([model.stacker_.predict(Z, new) for Z in model.cross_fit_.predict_folds(new)])
    assert not np.allclose(CVPlus().fit(y, oof, fold, LEVELS).predict_interval(plain, 0.2), expected)


def test_the_leaderboards_scores_are_out_of_fold():
    X, y = sample()
    models = {"linear": Linear(), "heart": QuantileForest(n_estimators=30, min_samples_leaf=1)}
    model = QuantileAggregatorRegressor(LEVELS, models, cv=3).fit(X, y)
    fold, board = model.cross_fit_.fold, {r["model"]: r["oof_pinball"] for r in model.leaderboard_}
    for name, component in models.items():
        oof = np.empty((len(y), 3))
        for k in range(3):
            oof[fold == k] = at(component, X[fold != k], y[fold != k]).predict_quantiles(X[fold == k])
        assert board[name] == pytest.approx(pinball(y, np.sort(oof, axis=1), LEVELS), rel=1e-12)
        inside = pinball(y, at(component, X, y).predict_quantiles(X), LEVELS)
        assert board[name] > 1.02 * inside  # a forest that knows its rows by heart: 1.9 times
    assert model.leaderboard_ == sorted(model.leaderboard_, key=lambda row: row["oof_pinball"])


# ------------------------------------------------------------------ rows that stop a training


@pytest.mark.parametrize("n", [2, 5, 30, 400, 6000])
def test_rows_that_stop_a_network_do_not_train_it(n):
    X = np.arange(2.0 * n).reshape(n, 2)
    parts = [np.arange(n), np.arange(0, n, 2)]
    model = NetRegressor(levels=LEVELS, kind="multi")
    search = _Search(model, [Config(4, 2, 0.0, 1e-3, 0.0)], X, X[:, 0], None, parts, np.array(LEVELS))
    task, members, _ = search.problem([(0, 0), (0, 1)])
    for k, part in enumerate(parts):
        train = set(members.rows[k].tolist())
        held = set(task.held[k][task.counts[k] > 0].tolist())
        if len(part) > 1:
            assert train and held and not train & held
        assert train | held == set(part.tolist()) or len(held) == 1000  # of many rows a thousand are scored
        assert len(held) <= max(1, len(part) // 5)


@pytest.mark.parametrize("n", [2, 7, 50])
def test_rows_that_choose_a_gate_do_not_train_it(n):
    y = np.arange(float(n))
    rows = _Rows(y[:, None, None], y, y[:, None], np.ones(n))
    train, held = _parts(rows, None, seed=1)
    assert not set(train.y) & set(held.y) and set(train.y) | set(held.y) == set(y)
    for part in (train, held):
        assert np.array_equal(part.Z[:, 0, 0], part.y) and np.array_equal(part.X[:, 0], part.y)
    given = (y[:, None, None] + 1000, y + 1000, y[:, None])
    train, held = _parts(rows, given, seed=1)
    assert np.array_equal(train.y, y) and np.array_equal(held.y, y + 1000)


# ------------------------------------------------------------------ choices


def test_greedy_returns_its_best_round_and_not_its_last():
    """Two models of errors 1 and -1.2: their mean misses by 0.1, and with one more by 0.27 or more."""
    Z, y = np.array([[[1.0], [-1.2]]] * 4), np.zeros(4)
    for rounds in (2, 3, 5):
        found = greedy(Z, y, np.array([0.5]), np.ones(4), rounds)
        assert found.w == pytest.approx([0.5, 0.5]) and found.objective == pytest.approx(0.05)
    assert greedy(Z, y, np.array([0.5]), np.ones(4), 1).w == pytest.approx([1, 0])


def test_a_gate_that_learnt_nothing_falls_back_to_the_weights_of_all_rows():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(60, 3, 3))
    y = Z.mean(axis=2) @ [0.5, 0.3, 0.2] + 0.3 * rng.normal(size=60)
    X = rng.normal(size=(60, 2))
    gate = LocalCoarse(n_iter=1, max_steps=1, width=4, depth=1).fit(Z, y, X, levels=np.array(LEVELS))
    whole = coarse(Z, y, np.array(LEVELS), np.ones(60)).w
    rows = _Rows(Z, y, X, np.ones(60))
    halves = [coarse(part.Z, part.y, np.array(LEVELS), np.ones(len(part.y))).w
              for part in _parts(rows, None, 0)]
    assert gate.weights(X) == pytest.approx(np.tile(whole, (60, 1)), abs=1e-9)
    assert all(np.abs(half - whole).max() > 1e-3 for half in halves)
