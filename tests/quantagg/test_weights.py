"""Row weights: a row of weight 0 is as good as not given, wherever weights go; others are warned of."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold, KFold, PredefinedSplit, TimeSeriesSplit, check_cv

from poise.errors import ConfigError, DataError
from poise.registry import entries
from poise_quantagg.adapters import wrap
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.components import (
    ExtraTrees,
    HistBoosting,
    LightGBM,
    Linear,
    MultiQuantileNet,
    QuantileForest,
    XGBoost,
)
from poise_quantagg.crossfit import cross_fit
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.scores import pinball
from poise_quantagg.stacker import QuantileStacker

pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")
LEVELS = [0.1, 0.5, 0.9]
MODELS = {
    "linear": Linear(), "trees": ExtraTrees(n_estimators=4), "forest": QuantileForest(n_estimators=4),
    "boosted": LightGBM(n_estimators=5), "net": MultiQuantileNet(n_iter=1, max_steps=100),
    "histograms": HistBoosting(max_iter=2, min_samples_leaf=5), "xgboost": XGBoost(n_estimators=5),
}


def spoiled(n=160, seed=0):
    """Return rows a quarter of which have the weight 0, and a target and features out of all bounds."""
    rng = np.random.default_rng(seed)
    X, weight = rng.normal(size=(n, 2)), np.ones(n)
    y = X[:, 0] + rng.normal(size=n)
    bad = rng.permutation(n)[: n // 4]
    weight[bad], y[bad], X[bad] = 0, 1e6, -1e6
    return X, y, weight


def kept(weight, *arrays):
    return [array[weight > 0] for array in arrays]


def both(fit, X, y, weight):
    """Return what `fit(X, y, weight)` gives, and what it gives without the rows of weight 0."""
    return fit(X, y, weight), fit(*kept(weight, X, y, weight))


@pytest.mark.parametrize("refit", ["all", "bag"])
@pytest.mark.parametrize("conformal", ["cv+", "nested", "split"])
def test_an_ensemble_is_that_of_the_rows_that_weigh(conformal, refit):
    X, y, weight = spoiled()
    new = np.random.default_rng(1).normal(size=(20, 2))
    usual = {"estimators": {k: MODELS[k] for k in ("linear", "forest")}, "levels": LEVELS, "cv": 3}
    one, other = both(lambda *rows: QuantileAggregatorRegressor(
        conformal=conformal, refit=refit, **usual).fit(*rows), X, y, weight)
    assert one.predict_quantiles(new) == pytest.approx(other.predict_quantiles(new), rel=1e-9)
    assert one.predict_interval(new) == pytest.approx(other.predict_interval(new), rel=1e-9)
    assert np.diff(one.predict_interval(new)).mean() < 4  # 2.6 for a standard normal
    assert [row["model"] for row in one.leaderboard_] == [row["model"] for row in other.leaderboard_]
    assert [row["oof_pinball"] for row in one.leaderboard_] == pytest.approx(
        [row["oof_pinball"] for row in other.leaderboard_], rel=1e-9)


def test_the_default_models_are_chosen_by_the_rows_that_weigh():
    X, y, weight = spoiled(150)  # 113 weigh: few rows have few and small models
    one, other = both(lambda *rows: QuantileAggregatorRegressor(levels=LEVELS).fit(*rows), X, y, weight)
    assert one.model_names_ == other.model_names_ == ["linear", "extra_trees"]


@pytest.mark.parametrize("name", MODELS)
def test_a_base_model_is_that_of_the_rows_that_weigh(name):
    """Scales, leaves, bootstraps, and the rows that stop a training or choose a configuration."""
    X, y, weight = spoiled()
    new = np.random.default_rng(1).normal(size=(20, 2))
    one, other = both(lambda *rows: MODELS[name].build().fit(*rows), X, y, weight)
    assert np.array_equal(one.predict_quantiles(new), other.predict_quantiles(new))


@pytest.mark.parametrize("name", MODELS)
def test_equal_weights_beside_zeros_are_no_weights(name):
    """A library given equal weights may draw, bin or sum in another way than without: to the bit."""
    X, y, weight = spoiled()
    X_kept, y_kept = kept(weight, X, y)
    plain = MODELS[name].build().fit(X_kept, y_kept).predict_quantiles(X_kept)
    assert np.array_equal(MODELS[name].build().fit(X, y, 0.1 * weight).predict_quantiles(X_kept), plain)
    one = cross_fit({name: MODELS[name]}, X, y, LEVELS, folds=3, sample_weight=0.1 * weight)
    other = cross_fit({name: MODELS[name]}, X_kept, y_kept, LEVELS, folds=3)
    assert np.array_equal(one.Z[weight > 0], other.Z)


class WithoutWeights:
    """An estimator of one's own whose `fit` knows no weights."""

    def fit(self, X, y):
        self.q = np.quantile(y, LEVELS)
        return self

    def predict_quantiles(self, X, levels):
        return np.tile(np.interp(levels, LEVELS, self.q), (len(X), 1))


def test_an_estimator_that_knows_no_weights_takes_equal_ones():
    X, y, weight = spoiled()
    one, other = both(lambda X, y, s: cross_fit(
        {"own": wrap(WithoutWeights())}, X, y, LEVELS, folds=3, sample_weight=s), X, y, 2 * weight)
    assert np.array_equal(one.Z[weight > 0], other.Z)
    with pytest.raises(ConfigError, match="takes no sample_weight"):
        cross_fit({"own": wrap(WithoutWeights())}, X, y, LEVELS, folds=3, sample_weight=weight + (y > 0))


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored")
@pytest.mark.parametrize("splitter", [
    KFold(4), KFold(4, shuffle=True, random_state=1), TimeSeriesSplit(3), GroupKFold(3),
], ids=["in order", "shuffled", "time", "groups"])
def test_a_splitter_deals_out_the_rows_that_weigh(splitter):
    X, y, weight = spoiled()
    groups = np.arange(160) // 4
    usual = {"models": {"linear": Linear()}, "levels": LEVELS, "folds": splitter}
    one = cross_fit(X=X, y=y, sample_weight=weight, groups=groups, **usual)
    X, y, groups = kept(weight, X, y, groups)
    other = cross_fit(X=X, y=y, groups=groups, **usual)
    assert np.array_equal(one.fold[weight > 0], other.fold) and (one.fold[weight == 0] == -1).all()
    assert np.array_equal(one.Z[weight > 0], other.Z, equal_nan=True)


@pytest.mark.parametrize("wrapped", [PredefinedSplit(np.arange(160) % 3), check_cv(
    [(np.arange(80), np.arange(80, 160)), (np.arange(80, 160), np.arange(80))])], ids=["fold", "list"])
def test_lists_of_rows_name_them_among_all(wrapped):
    X, y, weight = spoiled()
    found = cross_fit({"linear": Linear()}, X, y, LEVELS, folds=wrapped, sample_weight=weight)
    for k, (_, held) in enumerate(wrapped.split(X, y)):
        assert np.array_equal(np.flatnonzero(found.fold == k), held[weight[held] > 0])


def test_the_networks_of_many_parts_are_those_of_the_rows_that_weigh():
    X, y, weight = spoiled()
    parts = [np.arange(100), np.arange(60, 160)]
    one = MODELS["net"].build().fit_many(X, y, weight, parts)
    other = MODELS["net"].build().fit_many(X, y, weight, [rows[weight[rows] > 0] for rows in parts])
    clean = spoiled()[0][weight > 0]
    for a, b in zip(one, other):
        assert np.array_equal(a.predict_quantiles(clean), b.predict_quantiles(clean))
        assert np.abs(a.predict_quantiles(clean)).max() < 100


OPTIONS = {"n_iter": 1, "max_steps": 100}


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in entries("aggregator")
                                   if e.plugin == "quantagg"])
def test_an_aggregator_is_that_of_the_rows_that_weigh(entry):
    X, y, weight = spoiled()
    rng = np.random.default_rng(2)
    Z = np.where(weight > 0, y, 0.0)[:, None, None] * 0.5 + np.sort(rng.normal(size=(len(y), 3, 3)), axis=2)
    Z[weight == 0] *= 1e3
    have = {f for f in OPTIONS if f in getattr(entry.load(), "__dataclass_fields__", {})}
    stacker = QuantileStacker(entry.name, LEVELS, options={k: OPTIONS[k] for k in have})
    one = stacker.fit(Z, y, X, sample_weight=weight).predict(Z, X)[weight > 0]
    Z, y, X, weight = kept(weight, Z, y, X, weight)
    other = stacker.fit(Z, y, X, sample_weight=weight).predict(Z, X)
    assert one == pytest.approx(other, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("folds", [4, KFold(4), list(KFold(4).split(np.zeros(160)))],
                         ids=["number", "splitter", "list"])
def test_rows_of_weight_zero_are_in_no_fold(folds):
    X, y, weight = spoiled()
    found = cross_fit({"linear": Linear()}, X, y, LEVELS, folds=folds, sample_weight=weight)
    assert np.array_equal(found.fold < 0, weight == 0)
    assert np.array_equal(np.isnan(found.Z).all(axis=(1, 2)), weight == 0)
    assert np.abs(found.Z[weight > 0]).max() < 10
    if folds == 4:
        assert np.ptp(np.bincount(found.fold[weight > 0])) <= 1  # dealt out evenly


def test_folds_of_rows_of_weight_zero_are_left_out_or_refused():
    X, y, weight = spoiled()
    light, heavy = np.flatnonzero(weight == 0), np.flatnonzero(weight > 0)
    parts = [(heavy[:60], heavy[60:]), (heavy, light), (heavy[60:], heavy[:60])]
    found = cross_fit({"linear": Linear()}, X, y, LEVELS, folds=parts, sample_weight=weight)
    assert set(found.fold) == {-1, 0, 1} and np.array_equal(found.fold < 0, weight == 0)
    with pytest.raises(ConfigError, match="weight 0 alone"):
        cross_fit({"linear": Linear()}, X, y, LEVELS, folds=[(light, heavy)], sample_weight=weight)


def test_groups_go_with_their_rows():
    X, y, weight = spoiled()
    groups = np.arange(160) // 5
    found = cross_fit({"linear": Linear()}, X, y, LEVELS, groups=groups, sample_weight=weight)
    for group in range(32):
        assert len(set(found.fold[(groups == group) & (weight > 0)])) <= 1
    with pytest.raises(DataError, match="one group per row"):
        cross_fit({"linear": Linear()}, X, y, LEVELS, groups=groups[:-1], sample_weight=weight)
    for conformal in ("cv+", "split"):
        model = QuantileAggregatorRegressor(LEVELS, ["linear"], conformal=conformal)
        assert np.diff(model.fit(X, y, weight, groups=groups).predict_interval(X[weight > 0])).max() < 5
        with pytest.raises(DataError, match="one group per row"):
            model.fit(X, y, weight, groups=groups[:-1])


def test_too_few_rows_that_weigh_are_too_few_rows():
    X, y = np.arange(20.0)[:, None], np.arange(20.0)
    model = QuantileAggregatorRegressor(LEVELS, ["linear"])
    with pytest.raises(ConfigError, match="cv=5 with 4 rows"):
        model.fit(X, y, np.r_[np.ones(4), np.zeros(16)])
    with pytest.raises(ValueError, match="at least one non-zero"):
        model.fit(X, y, np.zeros(20))


def test_the_leaderboard_weighs_rows():
    X, y, _ = spoiled()
    y = np.random.default_rng(3).normal(size=len(X))
    weight = np.where(y > 0, 5.0, 1.0)
    with pytest.warns(QuantileWarning, match="every row of positive weight once"):
        model = QuantileAggregatorRegressor(LEVELS, ["linear"], cv=3).fit(X, y, weight)
    board = {row["model"]: row["oof_pinball"] for row in model.leaderboard_}
    Z = model.oof_quantiles_
    assert board["linear"] == pytest.approx(
        pinball(y, np.sort(Z[:, 0], axis=1), LEVELS, sample_weight=weight), rel=1e-12)
    ensemble = model.stacker_.predict(Z, X)
    assert board["ensemble (in sample)"] == pytest.approx(
        pinball(y, ensemble, LEVELS, sample_weight=weight), rel=1e-12)
    assert abs(board["linear"] / pinball(y, np.sort(Z[:, 0], axis=1), LEVELS) - 1) > 0.05


@pytest.mark.parametrize("conformal", ["cv+", "nested", "split"])
def test_weights_that_differ_are_warned_of_once_where_intervals_are_calibrated(conformal):
    X, y, weight = spoiled()
    X, y = np.where(weight[:, None] > 0, X, 0), np.where(weight > 0, y, 0)
    model = QuantileAggregatorRegressor(LEVELS, ["linear"], cv=3, conformal=conformal)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(X, y, np.where(y > 0, 2.0, 1.0))
    said = [w for w in said if "sample_weight" in str(w.message)]
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sample_weight differs")
        model.fit(X, y, 3 * weight)  # 0 and 3: rows that are there, and rows that are not
        model.set_params(conformal=None).fit(X, y, np.where(y > 0, 2.0, 1.0))
