"""Base models: the contract, weights, units, grids, files, and what is particular to each."""

import copy
import json
import os
import pickle
import warnings
from statistics import NormalDist

import joblib
import numpy as np
import pytest

from poise.errors import ConfigError, DataError, FileError
from poise.registry import build
from poise_bone import Bone
from poise_compander import WeightCompander
from poise_quantagg.base.forest import ForestRegressor
from poise_quantagg.base.nets import draw
from poise_quantagg.base.regressor import JoinedLevels
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.components import (
    CatBoost,
    ExtraTrees,
    GaussianNet,
    HistBoosting,
    LightGBM,
    Linear,
    MultiQuantileNet,
    QuantileForest,
    SimultaneousNet,
    XGBoost,
)
from poise_quantagg.scores import pinball
from poise_quantagg.storage import dump, storable, undump

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
NET = {"n_iter": 1, "width": 16, "depth": 2, "dropout": 0.0, "lr": 0.01, "max_steps": 300}
SMALL = {
    "quantile_forest": {"n_estimators": 10},
    "extra_trees": {"n_estimators": 10},
    "lightgbm": {"n_estimators": 15},
    "hist_boosting": {"max_iter": 15},
    "linear": {},
    "xgboost": {"n_estimators": 20, "max_depth": 3},
    "catboost": {"iterations": 80, "depth": 4, "learning_rate": 0.1},
    "gaussian_net": NET,
    "simultaneous_net": NET,
    "multi_quantile_net": NET,
}
NETS = (GaussianNet, SimultaneousNet, MultiQuantileNet)
everywhere = pytest.mark.parametrize("name", SMALL)


def table(n=200):
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x[:n], y[:n]


def made(name, levels=LEVELS, **options):
    return build("model", name, levels=levels, **SMALL[name] | options)


# ------------------------------------------------------------------ what all share


@everywhere
def test_a_base_model_keeps_the_contract(name):
    x, y = table()
    model = made(name)
    fitted = model.build({"input_shape": (10,)}).fit(x, y)
    q = fitted.predict_quantiles(x)
    assert q.shape == (200, 5) and q.dtype == np.float64 and np.isfinite(q).all()
    assert np.array_equal(q, model.build().fit(x, y).predict_quantiles(x))
    assert fitted.predict_quantiles(x, [0.1, 0.9]) == pytest.approx(q[:, [0, 4]], rel=1e-12)
    assert fitted.predict_quantiles(x[:1], [0.5]).shape == (1, 1)
    assert ((y[:, None] <= q).mean(axis=0) == pytest.approx(LEVELS, abs=0.15))
    flat = np.tile(np.quantile(y, LEVELS), (200, 1))
    assert pinball(y, np.sort(q, axis=1), LEVELS) < 0.9 * pinball(y, flat, LEVELS)


@everywhere
def test_a_base_model_honours_sample_weights(name):
    x, y = table()
    component = made(name, [0.5])
    q = component.build().fit(x, y, sample_weight=np.ones(200)).predict_quantiles(x)
    if name not in ("quantile_forest", "hist_boosting", "xgboost"):  # these take another path with weights
        assert np.array_equal(q, component.build().fit(x, y).predict_quantiles(x))
    weight = np.where(y > np.median(y), 20.0, 1.0)
    higher = component.build().fit(x, y, sample_weight=weight).predict_quantiles(x)
    if name == "extra_trees":  # weights shape its splits only, as its card says
        assert not np.array_equal(q, higher)
    else:
        assert higher.mean() > q.mean()
    assert np.array_equal(  # only ratios matter
        higher, component.build().fit(x, y, sample_weight=4 * weight).predict_quantiles(x))
    with pytest.raises(DataError, match="sample_weight"):
        component.build().fit(x, y, sample_weight=np.ones(3))
    with pytest.raises(DataError, match="sample_weight"):
        component.build().fit(x, y, sample_weight=np.zeros(200))


@everywhere
def test_a_constant_target_is_predicted(name):
    x, _ = table(60)
    q = made(name).build().fit(x, np.full(60, 7.5)).predict_quantiles(x)
    wide = 0.5 if "net" in name else 1e-6  # a network learns that there is no spread
    assert q == pytest.approx(np.full((60, 5), 7.5), abs=wide)


@everywhere
def test_a_fitted_model_survives_copies_pickles_and_mapped_files(name, tmp_path):
    x, y = table(100)
    fitted = made(name).build().fit(x, y)
    q = fitted.predict_quantiles(x)
    joblib.dump(fitted, tmp_path / "model")
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted)),
                  joblib.load(tmp_path / "model"), joblib.load(tmp_path / "model", mmap_mode="r")):
        assert np.array_equal(other.predict_quantiles(x), q)
    assert np.array_equal(fitted.predict_quantiles(x), q)
    assert not hasattr(pickle.loads(pickle.dumps(made(name).build())), "levels_")


@everywhere
def test_a_fitted_model_is_stored_without_pickle(name):
    x, y = table(100)
    fitted = made(name).build().fit(x, y)
    if name == "hist_boosting":
        assert not storable(fitted)
        with pytest.raises(ConfigError, match=r"mine \(HistBoostingRegressor\) has no form without pickle"):
            dump("mine", fitted)
        return
    arrays, meta = dump("mine", fitted)
    assert all(type(a) is np.ndarray and a.dtype != object for a in arrays.values())
    back = undump(arrays, json.loads(json.dumps(meta)))
    assert np.array_equal(back.predict_quantiles(x), fitted.predict_quantiles(x))
    some = [0.25, 0.4]
    assert np.array_equal(back.predict_quantiles(x, some), fitted.predict_quantiles(x, some))
    with pytest.raises(DataError, match="X has 3 features; fitted on 10"):
        back.predict_quantiles(x[:, :3])
    again = undump(*dump("mine", back))
    assert np.array_equal(again.predict_quantiles(x), fitted.predict_quantiles(x))


@everywhere
def test_a_stored_model_with_a_part_missing_is_named(name):
    if name == "hist_boosting":
        return
    x, y = table(60)
    fitted = made(name).build().fit(x, y)
    kind = type(fitted).__name__
    arrays, meta = dump("mine", fitted)
    for key in arrays:
        if not key.startswith(("W", "b")):
            with pytest.raises(FileError, match=f"a saved {kind} is damaged"):
                undump({k: v for k, v in arrays.items() if k != key}, meta)
    for key in meta.keys() - {"class"}:
        with pytest.raises(FileError, match=f"a saved {kind} is damaged"):
            undump(arrays, {k: v for k, v in meta.items() if k != key})
    with pytest.raises(FileError, match="unknown kind of saved model: 'os'"):
        undump(arrays, meta | {"class": "os"})


def test_base_models_refuse_what_they_cannot_use():
    x, y = table()
    with pytest.raises(ConfigError, match="not fitted"):
        Linear().build().predict_quantiles(x)
    with pytest.raises(DataError, match="X has 9 features; fitted on 10"):
        Linear(levels=[0.5]).build().fit(x, y).predict_quantiles(x[:, :9])
    with pytest.raises(DataError, match="y has 199"):
        Linear().build().fit(x, y[:-1])
    with pytest.raises(ConfigError, match="increasing"):
        Linear(levels=[0.5, 0.1])
    with pytest.raises(ConfigError, match="levels"):
        HistBoosting(levels=[0.0])
    broken = x.copy()
    broken[[3, 7], 1] = np.nan
    with pytest.raises(DataError, match=r"X has NaN or Inf in 2 rows, first rows 3, 7"):
        Linear().build().fit(broken, y)


# ------------------------------------------------------------------ levels that were not trained


def test_forests_and_two_networks_predict_any_level():
    x, y = table()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind, options in ((QuantileForest, {"n_estimators": 5}), (GaussianNet, NET),
                              (SimultaneousNet, NET)):
            fitted = kind(levels=[0.5], **options).build().fit(x, y)
            q = fitted.predict_quantiles(x, [0.05, 0.29, 0.57, 0.95])
            assert q.shape == (200, 4) and (np.diff(q.mean(axis=0)) > 0).all()


@pytest.mark.parametrize("name", ["linear", "lightgbm", "hist_boosting", "xgboost", "catboost",
                                  "multi_quantile_net"])
def test_other_models_interpolate_and_warn_beyond_their_levels(name):
    x, y = table(100)
    fitted = made(name, [0.2, 0.8]).build().fit(x, y)
    q = fitted.predict_quantiles(x)
    assert fitted.predict_quantiles(x, [0.5])[:, 0] == pytest.approx(q.mean(axis=1))  # symmetric scores
    with pytest.warns(QuantileWarning, match=r"levels \[0.1\] lie beyond the grid 0.2 to 0.8") as caught:
        beyond = fitted.predict_quantiles(x, [0.1, 0.2])
    assert len(caught) == 1 and np.array_equal(beyond, q[:, [0, 0]])


@pytest.mark.parametrize(("component", "options"), [
    (LightGBM, {"n_estimators": 10}), (HistBoosting, {"max_iter": 10})])
def test_a_grid_trains_some_levels_and_interpolates_the_others(component, options):
    x, y = table()
    levels = [k / 20 for k in range(1, 20)]
    whole = component(levels=levels, **options).build().fit(x, y).predict_quantiles(x)
    fitted = component(levels=levels, grid=7, **options).build().fit(x, y)
    q = fitted.predict_quantiles(x)
    assert len(fitted.estimators_) == 7
    trained = np.isin(levels, fitted.trained_)
    assert trained[0] and trained[-1] and trained.sum() == 7  # the ends are exact
    assert np.array_equal(q[:, trained], whole[:, trained])
    assert not np.array_equal(q, whole)
    assert pinball(y, np.sort(q), levels) == pytest.approx(pinball(y, np.sort(whole), levels), rel=0.03)


@pytest.mark.parametrize("component", [XGBoost(levels=LEVELS, n_estimators=10, grid=2),
                                       CatBoost(levels=LEVELS, iterations=20, grid=2)])
def test_a_vector_booster_trains_a_grid_too(component):
    x, y = table(100)
    fitted = component.build().fit(x, y)
    assert fitted.trained_.tolist() == [0.1, 0.9] and fitted.predict_quantiles(x).shape == (100, 5)


def test_joined_levels_are_one_model():
    x, y = table(100)
    parts = [Linear(levels=levels).build().fit(x, y) for levels in ([0.1, 0.25], [0.5], [0.75, 0.9])]
    joined, whole = JoinedLevels(parts), Linear(levels=LEVELS).build().fit(x, y)
    assert joined.predict_quantiles(x) == pytest.approx(whole.predict_quantiles(x), rel=1e-5)
    assert joined.predict_quantiles(x, [0.3, 0.9]).shape == (100, 2)
    back = undump(*dump("mine", joined))
    assert np.array_equal(back.predict_quantiles(x), joined.predict_quantiles(x))


# ------------------------------------------------------------------ linear


def test_the_linear_model_does_not_depend_on_the_units_of_the_features():
    x, y = table()
    units = 10.0 ** np.arange(-5, 5)
    model = Linear(levels=[0.2, 0.8])
    here, there = (model.build().fit(a, y).predict_quantiles(a) for a in (x, x * units))
    assert there == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_linear_model_minimises_what_scikit_learns_does(alpha):
    from sklearn.linear_model import QuantileRegressor
    from sklearn.preprocessing import StandardScaler

    x, y = table(120)
    x = StandardScaler().fit_transform(x)
    fitted = Linear(levels=[0.2, 0.7], alpha=alpha).build().fit(x, y)
    for k, level in enumerate((0.2, 0.7)):
        peer = QuantileRegressor(quantile=level, alpha=alpha, solver="highs").fit(x, y)

        def objective(slope, q, level=level):
            return np.mean(np.maximum(level * (y - q), (level - 1) * (y - q))) + alpha * np.abs(slope).sum()

        ours = objective(fitted.coef_[:, k], fitted.predict_quantiles(x)[:, k])
        assert ours <= objective(peer.coef_, peer.predict(x)) * (1 + 1e-7)


# ------------------------------------------------------------------ forests


def test_forest_quantiles_are_those_of_meinshausens_weights():
    x, y = table()
    fitted = ExtraTrees(n_estimators=20).build().fit(x[:150], y[:150])
    seen, new = (fitted.forest_.apply(part) for part in (x[:150], x[150:]))
    same = (new[:, None] == seen[None]).astype(float)  # (new rows, training rows, trees)
    weight = (same / same.sum(axis=1, keepdims=True)).mean(axis=2)
    order = np.argsort(y[:150])
    cumulative = np.cumsum(weight[:, order], axis=1)
    for level in (0.1, 0.29, 0.5, 0.9):
        exact = y[:150][order][(cumulative >= level - 1e-12).argmax(axis=1)]
        # the package interpolates between neighbouring targets, hence not equal
        error = fitted.predict_quantiles(x[150:], [level])[:, 0] - exact
        assert np.abs(error).mean() < 0.005 * np.ptp(y)


@pytest.fixture(scope="module")
def forest():
    x, y = table(80)
    return QuantileForest(n_estimators=3, min_samples_leaf=5).build().fit(x, y).tensors()


def test_a_stored_forest_is_small(forest):
    arrays, _ = forest
    assert arrays["counts"].sum() == 3 * 80  # each tree's leaves hold the rows of one bootstrap
    assert sum(a.nbytes for a in arrays.values()) < 20_000


def with_value(key, at, value):
    def change(arrays):
        changed = arrays[key].copy()
        changed[at] = value
        return {**arrays, key: changed}

    return change


@pytest.mark.parametrize("change", [
    pytest.param(with_value("left_child", 0, 10**6), id="child beyond the tree"),
    pytest.param(with_value("left_child", 0, 0), id="a cycle"),
    pytest.param(with_value("right_child", 0, -7), id="child before the tree"),
    pytest.param(with_value("right_child", 0, -1), id="half a leaf"),
    pytest.param(with_value("feature", 0, 10), id="feature that is not there"),
    pytest.param(with_value("feature", 0, -3), id="negative feature"),
    pytest.param(with_value("threshold", 0, np.nan), id="threshold NaN"),
    pytest.param(with_value("sizes", 0, 1), id="tree sizes"),
    pytest.param(with_value("sizes", 0, -5), id="negative size"),
    pytest.param(with_value("counts", 0, 3), id="more rows than there are"),
    pytest.param(with_value("counts", 0, -1), id="negative count"),
    pytest.param(with_value("rows", 0, 81), id="row beyond the targets"),
    pytest.param(with_value("rows", 0, 0), id="row 0"),
    pytest.param(lambda a: {**a, "threshold": a["threshold"][:-1]}, id="short threshold"),
    pytest.param(lambda a: {**a, "depths": a["depths"][:-1]}, id="short depths"),
    pytest.param(lambda a: {**a, "targets": a["targets"][:, None]}, id="targets with two axes"),
    pytest.param(lambda a: {**a, "targets": a["targets"].astype(np.float32)}, id="targets of another type"),
    pytest.param(lambda a: {**a, "left_child": a["left_child"].astype(float)}, id="float children"),
    pytest.param(lambda a: {k: v[:0] for k, v in a.items()}, id="nothing"),
])
def test_a_damaged_forest_is_refused_before_it_is_used(change, forest):
    arrays, meta = forest
    with pytest.raises(FileError, match="a saved forest is damaged"):
        ForestRegressor.from_tensors(change(arrays), meta)


# ------------------------------------------------------------------ networks


def test_the_gaussian_network_predicts_normal_quantiles_that_never_cross():
    x, y = table()
    fitted = GaussianNet(**NET).build().fit(x, y)
    levels = np.array([1e-6, 0.01, 0.2, 0.5, 0.9, 0.999999])
    q = fitted.predict_quantiles(x, levels)
    z = np.array([NormalDist().inv_cdf(t) for t in levels])
    mean, sigma = q[:, 3], (q[:, 4] - q[:, 3]) / z[4]
    assert q == pytest.approx(mean[:, None] + sigma[:, None] * z, rel=1e-9)
    assert (np.diff(fitted.predict_quantiles(1e3 * x, levels)) > 0).all()


@pytest.mark.parametrize("kind", NETS)
def test_a_prediction_does_not_depend_on_the_rows_beside_it(kind):
    x, y = table()
    fitted = kind(levels=LEVELS, **NET).build().fit(x, y)
    together = fitted.predict_quantiles(x)
    alone = np.concatenate([fitted.predict_quantiles(row[None]) for row in x])
    assert together.dtype == np.float64
    assert together == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("kind", NETS)
def test_the_random_state_decides_the_network(kind):
    x, y = table(80)
    one, same, other = (kind(levels=LEVELS, **NET, random_state=s).build().fit(x, y).predict_quantiles(x)
                        for s in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("kind", NETS)
def test_a_network_does_not_depend_on_the_units_of_the_data(kind):
    x, y = table(100)
    model = kind(levels=LEVELS, **NET)
    here = model.build().fit(x, y).predict_quantiles(x)
    there = model.build().fit(64 * x + 8, 1024 * y).predict_quantiles(64 * x + 8)
    assert np.abs(there / 1024 - here).max() < 0.05 * y.std()  # float32 training rounds the units


def test_the_search_respects_what_is_fixed():
    fixed = {"width": 16, "lr": 0.02, "dropout": None}
    found = draw("multi", 1000, 0, fixed)
    assert len(set(found)) == len(found)
    assert {c.width for c in found} == {16} and {c.lr for c in found} == {0.02}
    assert {c.depth for c in found} == {2, 3} and {c.dropout for c in found} == {0.0, 0.05, 0.1}
    assert [len(draw(kind, 1000, 0, {})) for kind in ("gaussian", "multi", "simultaneous")] == [12, 96, 96]
    x, y = table(60)
    fitted = MultiQuantileNet(levels=LEVELS, n_iter=3, width=8, lr=0.02, huber=0.01, max_steps=60).build()
    best = fitted.fit(x, y).best_params_
    assert (best["width"], best["lr"], best["huber"]) == (8, 0.02, 0.01)


def test_networks_of_many_parts_are_those_of_each_part_alone():
    x, y = table(90)
    parts = [np.arange(60), np.arange(30, 90)]
    model = GaussianNet(levels=LEVELS, **NET)
    many = model.build().fit_many(x, y, None, parts)
    assert len(many) == 2 and all(m.n_features_in_ == 10 for m in many)
    again = model.build().fit_many(x, y, None, parts)
    changed = y.copy()
    changed[:30] += 100  # rows that the second part does not see
    moved = model.build().fit_many(x, changed, None, parts)
    q, q_again, q_moved = ([m.predict_quantiles(x) for m in ms] for ms in (many, again, moved))
    assert np.array_equal(q, q_again)
    assert not np.allclose(q[0], q_moved[0])
    assert q[1] == pytest.approx(q_moved[1], rel=1e-6)


def test_an_adapter_trains_the_same_network_unless_it_freezes_the_base():
    x, y = table(80)
    net = GaussianNet(levels=LEVELS, **NET | {"max_steps": 100}, adapter=WeightCompander())
    adapted = net.build().fit(x, y)
    q = adapted.predict_quantiles(x)
    assert np.isfinite(q).all() and (np.diff(q) > 0).all()
    flat = np.tile(np.quantile(y, LEVELS), (80, 1))
    assert pinball(y, q, LEVELS) < pinball(y, flat, LEVELS)
    back = undump(*dump("mine", adapted))
    assert np.array_equal(back.predict_quantiles(x), q)
    with pytest.raises(ConfigError, match=r"GaussianNet\.adapter=Bone freezes its base"):
        GaussianNet(adapter=Bone(r=2))


# ------------------------------------------------------------------ boosters in all sizes


def test_catboost_knows_one_level_many_levels_and_a_constant():
    x, y = table(60)
    for levels, target in (([0.5], y), (LEVELS, y), (LEVELS, np.ones(60))):
        fitted = CatBoost(levels=levels, iterations=20).build().fit(x, target)
        q = fitted.predict_quantiles(x)
        assert q.shape == (60, len(levels))
        assert np.array_equal(undump(*dump("mine", fitted)).predict_quantiles(x), q)


def test_xgboost_knows_one_level():
    x, y = table(60)
    fitted = XGBoost(levels=[0.3], n_estimators=20).build().fit(x, y)
    q = fitted.predict_quantiles(x)
    assert q.shape == (60, 1) and (y <= q[:, 0]).mean() == pytest.approx(0.3, abs=0.15)


@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
def test_base_models_learn_a_table_of_real_size():
    data = build("data", "tabular", name="yacht").load(0)
    x, y = data.train.x, data.train.y
    flat = np.tile(np.quantile(y, LEVELS), (len(data.test.y), 1))
    for name in ("quantile_forest", "lightgbm", "catboost", "gaussian_net"):
        q = made(name).build().fit(x, y).predict_quantiles(data.test.x)
        assert pinball(data.test.y, np.sort(q), LEVELS) < 0.5 * pinball(data.test.y, flat, LEVELS)
