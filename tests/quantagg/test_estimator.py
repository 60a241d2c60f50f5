"""`QuantileAggregatorRegressor`: scikit-learn's checks, shapes, levels, frames, files, calibration."""

import pickle
import time
import warnings

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    PredefinedSplit,
    TimeSeriesSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from poise.errors import ConfigError, DataError, FileError, RunError
from poise_quantagg.adapters import per_level, wrap
from poise_quantagg.checks import QuantileWarning
from poise_quantagg.components import ExtraTrees, HistBoosting, LightGBM, Linear, MultiQuantileNet
from poise_quantagg.conformal import beta_band
from poise_quantagg.defaults import default_models
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.scores import interval_coverage, pinball

# linear quantiles cross out of fold, which is said once by every fit; one test looks at that
pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")
LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
TREES = ExtraTrees(n_estimators=8, min_samples_leaf=4)


def made(estimators=("linear",), **options):
    usual = {"levels": LEVELS, "estimators": estimators, "cv": 3, "refit": "bag"}
    return QuantileAggregatorRegressor(**{"aggregator": "global_medium"} | usual | options)


def rows(n=90, seed=0):
    """Return features and a target with noise that grows with one of them."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    return X, X[:, 0] + (0.5 + np.abs(X[:, 1])) * rng.normal(size=n)


def quiet(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


# ------------------------------------------------------------------ scikit-learn


@parametrize_with_checks([made()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([QuantileAggregatorRegressor()])
def test_scikit_learns_checks_of_the_default(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 8, 40, 80, 200, 1000])
def test_a_default_fit_of_a_hundred_rows_takes_at_most_a_second(d):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(100, d)), rng.normal(size=100)
    QuantileAggregatorRegressor().fit(X, y)  # imports
    start = time.process_time()
    QuantileAggregatorRegressor().fit(X, y)
    assert time.process_time() - start <= 1


@pytest.mark.parametrize(("n", "d", "has"), [(100, 50, True), (100, 51, False), (153, 51, True),
                                             (152, 51, False), (500, 400, False)])
def test_the_default_leaves_the_linear_model_out_of_wide_tables(n, d, has):
    assert ("linear" in default_models(n, d)) == has
    assert len(default_models(n, d)) >= 2


def test_it_works_in_a_pipeline_a_grid_search_and_cross_validation():
    X, y = rows()
    pipe = make_pipeline(StandardScaler(), made(["linear"])).fit(X, y)
    assert pipe.predict(X) == pytest.approx(made(["linear"]).fit(X, y).predict(X), rel=1e-5)
    search = GridSearchCV(made({"linear": Linear(), "trees": TREES}, conformal=None),
                          {"aggregator": ["average", "global_coarse"]}, cv=2).fit(X, y)
    assert search.best_params_["aggregator"] in ("average", "global_coarse")
    assert search.best_estimator_.predict_quantiles(X).shape == (90, 5)
    scores = cross_val_score(made(conformal=None), X, y, cv=2, scoring="neg_mean_absolute_error")
    assert scores.shape == (2,) and (scores < 0).all()
    assert made().fit(X, y).score(X, y) > 0.2


def test_clone_keeps_options_and_nothing_else():
    given = {"trees": TREES}
    estimator = made(given, aggregator="average", random_state=3).set_output(transform="pandas")
    copy = clone(estimator.fit(*rows()))
    assert copy.get_params(deep=False) | {"estimators": given} == estimator.get_params(deep=False)
    assert not hasattr(copy, "stacker_")
    assert isinstance(copy.fit(*rows()).predict_quantiles(rows()[0]), pd.DataFrame)


# ------------------------------------------------------------------ shapes, levels, attributes


def test_names_and_shapes():
    X, y = rows()
    estimator = made({"linear": Linear(), "trees": TREES})
    assert estimator.fit(X, y) is estimator
    assert estimator.predict_quantiles(X).shape == (90, 5)
    assert estimator.predict_quantiles(X[:1], levels=[0.5]).shape == (1, 1)
    assert estimator.predict_interval(X).shape == (90, 2)
    assert estimator.predict(X).shape == (90,)
    assert np.array_equal(estimator.predict(X), estimator.predict_quantiles(X)[:, 2])
    assert estimator.oof_quantiles_.shape == (90, 2, 5)
    assert estimator.model_names_ == ["linear", "trees"] and estimator.weights_().shape == (2, 5)
    assert estimator.weights_().sum(axis=0) == pytest.approx(1)
    board = estimator.leaderboard_
    assert sorted(row["model"] for row in board) == ["ensemble (in sample)", "linear", "trees"]
    assert [row["oof_pinball"] for row in board] == sorted(row["oof_pinball"] for row in board)
    assert estimator.pinball_score(X, y) == pytest.approx(
        -pinball(y, estimator.predict_quantiles(X), LEVELS))


def test_the_default_levels_are_the_percentiles():
    X, y = rows(60)
    estimator = QuantileAggregatorRegressor(estimators=["linear"], cv=2).fit(X, y)
    assert estimator.levels_ == pytest.approx(np.arange(1, 100) / 100)
    q = estimator.predict_quantiles(X)
    assert q.shape == (60, 99) and (np.diff(q) >= 0).all()
    assert np.array_equal(estimator.predict_quantiles(X, [0.1, 0.5]), q[:, [9, 49]])


def test_levels_between_are_interpolated_and_beyond_repeated_with_one_warning():
    X, y = rows()
    estimator = made().fit(X, y)
    q = estimator.predict_quantiles(X)
    between = quiet(estimator.predict_quantiles, X, [0.25, 0.3, 0.4, 0.5])
    assert (np.diff(between) >= 0).all()
    share = norm.ppf(0.3) / norm.ppf(0.25)  # linear in the normal score, the median at 0
    assert between[:, 1] == pytest.approx(share * q[:, 1] + (1 - share) * q[:, 2])
    with pytest.warns(QuantileWarning, match=r"levels \[0.01, 0.99\] lie beyond the grid 0.1") as caught:
        beyond = estimator.predict_quantiles(X, [0.01, 0.5, 0.99])
    assert len(caught) == 1 and np.array_equal(beyond, q[:, [0, 2, 4]])
    for levels in ([0.5, 0.1], [0.0], [0.5, 0.5]):
        with pytest.raises(ConfigError, match="levels="):
            estimator.predict_quantiles(X, levels)


@pytest.mark.parametrize("levels", [[0.5], [0.2], [0.3, 0.6]])
def test_few_or_lopsided_levels_are_enough_and_intervals_beyond_them_warn_once(levels):
    X, y = rows()
    estimator = made(levels=levels).fit(X, y)
    if levels[0] <= 0.5 <= levels[-1]:
        assert quiet(estimator.predict, X).shape == (90,)
    else:
        with pytest.warns(QuantileWarning, match=r"levels \[0.5\] lie beyond the grid") as caught:
            assert estimator.predict(X).shape == (90,)
        assert len(caught) == 1 and caught[0].filename == __file__
    assert estimator.predict_quantiles(X).shape == (90, len(levels))
    with pytest.warns(QuantileWarning, match="lie beyond the grid") as caught:
        low, high = estimator.predict_interval(X).T
    # what the outermost quantiles lack, the calibration adds
    assert len(caught) == 1 and np.mean((low <= y) & (y <= high)) >= 0.75


@pytest.mark.parametrize("before", ["nested", "split", None])
@pytest.mark.parametrize("after", ["cv+", None])
def test_a_second_fit_knows_nothing_of_the_first(before, after):
    X, y = rows()
    estimator = made(conformal=before).fit(X, y).set_params(conformal=after, cv=4).fit(X, y + 1000)
    fresh = made(conformal=after, cv=4).fit(X, y + 1000)
    assert np.array_equal(estimator.predict_interval(X), fresh.predict_interval(X))
    assert vars(estimator).keys() == vars(fresh).keys()


@pytest.mark.parametrize("conformal", [None, "cv+", "split"])
def test_crossing_is_said_once_and_points_at_the_line_that_fits(conformal):
    X, y = rows(40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantileWarning)
        made({"linear": Linear()}, conformal=conformal, cv=2).fit(np.c_[X, X**2, X**3], y)
    said = [w for w in caught if "base predictions cross" in str(w.message)]
    assert len(said) == 1 and said[0].filename == __file__


def test_a_fit_that_fails_leaves_nothing_of_the_one_before():
    X, y = rows()
    estimator = made().fit(X, y).set_params(cv=1)
    with pytest.raises(ConfigError):
        estimator.fit(X[:, :2], y)
    with pytest.raises(NotFittedError):
        estimator.predict(X)


def test_calibration_that_was_not_fitted_is_not_there():
    X, y = rows()
    estimator = made(conformal=None).fit(X, y).set_params(conformal="cv+")
    with pytest.raises(ConfigError, match="conformal='cv\\+' was chosen after a fit with conformal=None"):
        estimator.predict_interval(X)


def test_folds_may_be_given_as_pairs_of_rows():
    X, y = rows()
    splitter = KFold(3, shuffle=True, random_state=0)
    pairs = list(splitter.split(X))
    by_pairs, by_splitter = made(cv=pairs).fit(X, y), made(cv=splitter).fit(X, y)
    assert np.array_equal(by_pairs.predict_interval(X), by_splitter.predict_interval(X))


def test_rows_that_are_not_finite_are_named_in_frames_of_several_types():
    X, y = rows()
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "c": X[:, 2] > 0})
    frame.loc[7, "b"] = np.nan
    for given in (frame, frame.astype(object), frame.astype({"b": object})):
        with pytest.raises(DataError, match=r"NaN or Inf in 1 row, 7"):
            made().fit(given, y)


def test_intervals_at_levels_between_those_of_the_fit_are_calibrated_too():
    X, y = rows()
    estimator = made().fit(X, y)
    for alpha in (0.3, 0.4):
        low, high = quiet(estimator.predict_interval, X, alpha).T
        assert np.mean((low <= y) & (y <= high)) >= 1 - alpha - 0.02
    wide, narrow = (quiet(estimator.predict_interval, X, alpha) for alpha in (0.3, 0.4))
    assert np.mean(wide[:, 1] - wide[:, 0]) > np.mean(narrow[:, 1] - narrow[:, 0])


@pytest.mark.parametrize("aggregator", ["median", "qra", "global_fine", "local_coarse"])
def test_other_aggregators_and_isotonizers(aggregator):
    X, y = rows()
    options = {"width": 8, "depth": 2, "max_steps": 40} if aggregator == "local_coarse" else None
    models = {"linear": Linear(), "trees": TREES}
    for how in ("pava", "minmax", None):
        estimator = made(models, aggregator=aggregator, isotonize=how, options=options, n_iter=1).fit(X, y)
        q = estimator.predict_quantiles(X)
        assert np.isfinite(q).all() and (how is None or (np.diff(q) >= -1e-12).all())
        assert np.isfinite(estimator.predict_interval(X)).all()
    assert estimator.weights_(X).shape[-1] in (2, 5)


def test_new_rows_may_be_predicted_by_models_of_all_rows():
    X, y = rows()
    bag, whole = (made(refit=refit).fit(X, y) for refit in ("bag", "all"))
    assert not np.allclose(bag.predict(X), whole.predict(X))
    assert np.array_equal(bag.predict_interval(X), whole.predict_interval(X))  # CV+ uses the folds' models


def test_sample_weights_reach_models_weights_and_leaderboard():
    X, y = rows(120)
    weight = np.where(y > np.median(y), 5.0, 1.0)
    plain, ones, heavy = (made().fit(X, y, sample_weight=w) for w in (None, np.ones(120), weight))
    assert ones.predict_quantiles(X) == pytest.approx(plain.predict_quantiles(X), abs=1e-6)
    assert heavy.predict(X).mean() > plain.predict(X).mean() + 0.1
    heavier = made().fit(X, y, sample_weight=3 * weight)
    assert heavier.predict(X) == pytest.approx(heavy.predict(X), abs=1e-6)
    for bad in (-np.ones(120), np.ones(119), np.full(120, np.nan)):
        with pytest.raises(ValueError, match=r"[Ww]eight"):
            made().fit(X, y, sample_weight=bad)


# ------------------------------------------------------------------ estimators of every kind


class Normal(RegressorMixin, BaseEstimator):
    """A regressor whose prediction is a distribution."""

    def fit(self, X, y):
        self.mean_ = LinearRegression().fit(X, y)
        self.sigma_ = np.std(y - self.mean_.predict(X))
        return self

    def predict(self, X):
        return norm(self.mean_.predict(X), self.sigma_)


class Distributions(Normal):
    """The same behind `pred_dist`, as NGBoost has it."""

    def pred_dist(self, X):
        return super().predict(X)

    def predict(self, X):
        return self.mean_.predict(X)


class Asked(Normal):
    """The same behind `predict_quantiles`."""

    def predict_quantiles(self, X, levels):
        return super().predict(X).ppf(np.array(levels)[:, None]).T


class OnlyDistributions(BaseEstimator):
    """`pred_dist` and no `predict`."""

    def fit(self, X, y):
        self.inner_ = Normal().fit(X, y)
        return self

    def pred_dist(self, X):
        return self.inner_.predict(X)


class Rows(Asked):
    """Quantiles as a list of a list for each row."""

    def predict_quantiles(self, X, levels):
        return super().predict_quantiles(X, levels).tolist()


class Columns(Asked):
    """Quantiles as a list of an array for each level."""

    def predict_quantiles(self, X, levels):
        return list(super().predict_quantiles(X, levels).T)


class Weighted(Asked):
    def fit(self, X, y, sample_weight=None):
        self.mean_ = LinearRegression().fit(X, y, sample_weight)
        self.sigma_ = np.std(y - self.mean_.predict(X))
        return self


def test_estimators_are_names_or_pairs_or_a_mapping():
    X, y = rows()
    one = made("linear").fit(X, y)
    same = [made(["linear"]), made({"linear": Linear()}), made([("linear", Linear())])]
    for other in same:
        assert np.array_equal(other.fit(X, y).predict_quantiles(X), one.predict_quantiles(X))
        assert other.model_names_ == ["linear"]
    mixed = made(["linear", ("more", TREES)]).fit(X, y)
    assert mixed.model_names_ == ["linear", "more"]


@pytest.mark.parametrize("kind", [Normal, Distributions, Asked, OnlyDistributions, Rows, Columns])
def test_distributions_and_quantile_estimators_are_wrapped(kind):
    X, y = rows()
    estimator = made({"it": kind()}).fit(X, y)
    held = estimator.cross_fit_.fold == 1
    alone = Normal().fit(X[~held], y[~held]).predict(X[held])
    want = np.column_stack([alone.ppf(t) for t in LEVELS])
    assert estimator.oof_quantiles_[held, 0] == pytest.approx(want)
    assert np.isfinite(estimator.predict_interval(X)).all()
    assert not hasattr(estimator.estimators["it"], "mean_")  # a clone was fitted


def test_quantile_forests_of_the_package_are_wrapped():
    from quantile_forest import RandomForestQuantileRegressor

    X, y = rows()
    forest = RandomForestQuantileRegressor(n_estimators=5, random_state=0)
    estimator = made({"forest": forest, "linear": Linear()}).fit(X, y)
    held = estimator.cross_fit_.fold == 0
    alone = clone(forest).fit(X[~held], y[~held]).predict(X[held], quantiles=LEVELS)
    assert np.array_equal(estimator.oof_quantiles_[held, 0], alone)
    assert made({"forest": forest}, levels=[0.5]).fit(X, y).predict(X).shape == (90,)


def test_single_level_regressors_are_fitted_once_per_level():
    X, y = rows()
    booster = GradientBoostingRegressor(loss="quantile", n_estimators=5, random_state=0)
    estimator = made({"it": per_level(booster, "alpha")}, isotonize=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        estimator.fit(X, y)
    held = estimator.cross_fit_.fold == 2
    for k, level in enumerate(LEVELS):
        alone = clone(booster).set_params(alpha=level).fit(X[~held], y[~held])
        assert np.array_equal(estimator.oof_quantiles_[held, 0, k], alone.predict(X[held]))
    with pytest.raises(ConfigError, match="LinearRegression has no parameter 'alpha'"):
        per_level(LinearRegression(), "alpha")


def test_weights_are_passed_to_estimators_that_take_them():
    X, y = rows()
    weight = np.where(y > 0, 9.0, 1.0)
    heavy, plain = (made({"it": Weighted()}).fit(X, y, sample_weight=w).predict(X) for w in (weight, None))
    assert heavy.mean() > plain.mean()
    with pytest.raises(ConfigError, match=r"Asked\.fit takes no sample_weight"):
        made({"it": Asked()}).fit(X, y, sample_weight=weight)


class Faulty(Asked):
    """Fails where the training rows lack one value."""

    def __init__(self, without=None):
        self.without = without

    def fit(self, X, y):
        if self.without not in X[:, 0]:
            raise ZeroDivisionError("no such row")
        return super().fit(X, y)


def test_a_model_that_fails_in_one_fold_is_named_once_and_the_others_kept():
    X, y = rows()
    with pytest.warns(QuantileWarning, match=r"broken \(fold \d/3: ZeroDivision.*no such row\)") as caught:
        estimator = made({"normal": Normal(), "broken": Faulty(X[0, 0])}).fit(X, y)
    assert len(caught) == 1 and estimator.model_names_ == ["normal"]
    assert np.array_equal(estimator.predict(X), made({"normal": Normal()}).fit(X, y).predict(X))
    with pytest.raises(RunError, match=r"every model failed: a: fold 1/3: Zero.*; b: fold 1/3: Zero"):
        made({"a": Faulty(), "b": Faulty()}).fit(X, y)


def test_crossing_models_are_named_in_exactly_one_warning():
    X, y = rows()
    with pytest.warns(QuantileWarning, match=r"base predictions cross.*boosted \(\d") as caught:
        estimator = made({"normal": Normal(), "boosted": LightGBM(n_estimators=20, min_child_samples=2)},
                         conformal="nested").fit(X, y)
    assert len(caught) == 1 and caught[0].filename == __file__ and "normal" not in str(caught[0].message)
    assert (np.diff(quiet(estimator.predict_quantiles, X)) >= 0).all()
    assert (np.diff(quiet(estimator.predict_interval, X)) >= 0).all()


@pytest.mark.parametrize(("estimators", "words"), [
    ([], "estimators is empty"), ({}, "estimators is empty"), (["linaer"], "did you mean 'linear'"),
    (["linear", "linear"], "'linear' is given twice"), ({"it": 3}, "3 is no quantile model: allowed are"),
    ({"it": LinearRegression}, "is no quantile model"), (None, "estimators=None"),
    ({"it": LightGBM}, "is no quantile model"), ("nothing", "no model named 'nothing'"),
], ids=str)
def test_estimators_that_are_none_are_refused(estimators, words):
    with pytest.raises(ConfigError, match=words):
        made(estimators).fit(*rows())


def test_an_estimator_that_predicts_no_quantiles_is_told_how():
    with pytest.raises(RunError, match=r"LinearRegression predicts no quantiles: .*per_level\(estimator"):
        made({"it": LinearRegression()}).fit(*rows())
    with pytest.raises(ConfigError, match="is no quantile model"):
        wrap("linear")


def test_options_are_checked_before_a_model_is_fitted():
    class Never(Normal):
        def fit(self, X, y):
            raise AssertionError("fitted")

    for options in ({"aggregator": "globl_fine"}, {"isotonize": "up"}, {"options": {"widht": 3}}):
        with pytest.raises(ConfigError):
            made({"it": Never()}, **options).fit(*rows())


@pytest.mark.parametrize("conformal", [None, "cv+", "split"])
def test_levels_beyond_the_grid_warn_where_they_are_asked_for(conformal):
    X, y = rows()
    estimator = made({"it": Normal()}, conformal=conformal, levels=[0.3, 0.5, 0.7]).fit(X, y)
    with pytest.warns(QuantileWarning, match="beyond the grid") as caught:
        estimator.predict_interval(X, 0.2)
    assert len(caught) == 1 and caught[0].filename == __file__


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("options", "words"), [
    ({"cv": 91}, r"cv=91 with 90 rows \(n_samples=90\): allowed is 2 <= cv <= rows"), ({"cv": 1}, "cv=1"),
    ({"cv": "five"}, "cv='five'"), ({"cv": 2.5}, r"cv=2\.5"),
    ({"cv": []}, "makes no fold"), ({"cv": [0, 1]}, r"must be \(training rows, held-out rows\)"),
    ({"cv": [([0, 1], [1, 2])]}, "trains on rows that it holds out"), ({"cv": [([0, 1], [90])]}, "0 to 89"),
    ({"cv": [([0, 1], [2]), ([0, 1], [2])]}, "twice"), ({"cv": [([], [2])]}, "none at all"),
    ({"cv": TimeSeriesSplit(3), "conformal": "split"}, "cv=TimeSeriesSplit names rows by their place"),
    ({"cv": PredefinedSplit([0, 1] * 45), "conformal": "split"}, "cv=PredefinedSplit"),
    ({"n_jobs": 0}, "n_jobs=0"), ({"n_jobs": "a"}, "n_jobs='a'"), ({"cache": 5}, "cache=5"),
    ({"random_state": "a"}, "random_state='a'"), ({"random_state": 1.5}, "random_state=1.5"),
    ({"verbose": "a"}, "verbose='a'"), ({"n_iter": 0}, "n_iter=0"),
    ({"estimators": [["linear"]]}, r"\['linear'\] is neither"),
    ({"random_state": -1}, "random_state=-1"),
    ({"conformal": "cv"}, "conformal='cv': allowed is one of cv"),
    ({"levels": [0.9, 0.1]}, "levels"), ({"levels": [0.5, 1.0]}, "levels"), ({"levels": []}, "levels"),
    ({"aggregator": "globl_fine"}, "did you mean 'global_fine'"), ({"isotonize": "up"}, "isotonize='up'"),
    ({"refit": "none"}, "refit='none'"), ({"penalty": "l1"}, "penalty='l1'"),
    ({"aggregator": "qra", "penalty": "constant"}, "qra takes no penalty"),
    ({"solver": "lp"}, "solver='lp'"),
    ({"options": {"widht": 3}}, "widht"), ({"conformal": "split", "cv": 80}, "cv=80 with 72 rows left"),
    ({"conformal": "nested", "cv": 2}, "at least 3 folds"),
    ({"conformal": "nested", "cv": TimeSeriesSplit(3)}, "at least 3 folds that hold out every row"),
], ids=str)
def test_options_that_cannot_be_used_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        made().set_params(**options).fit(*rows())
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_used_are_refused():
    X, y = rows(20)
    for bad in (np.nan, np.inf):
        for which in (0, 1):
            broken = [X.copy(), y.copy()]
            broken[which][3] = bad
            with pytest.raises(DataError, match=rf"^{'Xy'[which]} ?.*{bad}.* in 1 row, 3:"):
                made().fit(*broken)
    estimator = made().fit(X, y)
    with pytest.raises(DataError, match="X has NaN or Inf in 2 rows, first rows 0, 1"):
        estimator.predict_quantiles(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="expecting 3 features"):
        estimator.predict_interval(X[:, :2])
    with pytest.raises(ValueError, match="minimum of 2"):
        made().fit(X[:1], y[:1])
    with pytest.raises(ConfigError, match=r"cv=3 with 2 rows"):
        made().fit(X[:2], y[:2])
    with pytest.raises(NotFittedError):
        made().weights_()
    for conformal in ("cv+", "split"):
        with pytest.raises(DataError, match="one group per row"):
            made(conformal=conformal).fit(X, y, groups=[1, 2])
        with pytest.raises(DataError, match="groups cannot be told apart"):
            made(conformal=conformal).fit(X, y, groups=np.array([None, "a", "b", "c"] * 5, dtype=object))
    with pytest.raises(ConfigError, match="of one group nothing is left to fit"):
        made(conformal="split").fit(X, y, groups=np.zeros(20))
    for alpha in (0, 1, -1, 2, np.nan, "0.2", None, [0.1, 0.2]):
        with pytest.raises(ConfigError, match="alpha="):
            estimator.predict_interval(X, alpha)


@pytest.mark.parametrize("estimators", ["auto", ["linear"], {"boosted": HistBoosting(max_iter=3)}], ids=str)
@pytest.mark.parametrize("conformal", [None, "cv+", "nested", "split"])
def test_a_constant_target_is_predicted(estimators, conformal):
    X, _ = rows(60)
    estimator = made(estimators, conformal=conformal).fit(X, np.full(60, 4.25))
    for q in (estimator.predict_quantiles(X), estimator.predict_interval(X), estimator.predict(X)):
        assert q == pytest.approx(np.full_like(q, 4.25), abs=1e-6)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_few_rows_are_enough_for_as_many_folds(n):
    X, y = rows(n)
    estimator = made("auto", cv=min(n, 3)).fit(X, y)
    assert np.isfinite(estimator.predict_quantiles(X)).all()


# ------------------------------------------------------------------ frames


def test_frames_go_in_and_come_out():
    X, y = rows()
    index = pd.Index([f"row{i}" for i in range(90)])
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=index)
    estimator = made().fit(frame, pd.Series(y, index=index, name="target"))
    plain = made().fit(X, y)
    assert estimator.feature_names_in_.tolist() == ["a", "b", "c"]
    assert np.array_equal(estimator.predict_quantiles(frame), plain.predict_quantiles(X))
    estimator.set_output(transform="pandas")
    q = estimator.predict_quantiles(frame)
    assert isinstance(q, pd.DataFrame) and q.index.equals(index) and q.columns.tolist() == LEVELS
    assert np.array_equal(q.to_numpy(), plain.predict_quantiles(X))
    interval = estimator.predict_interval(frame, alpha=0.5)
    assert interval.columns.tolist() == [0.25, 0.75] and interval.index.equals(index)
    with pytest.raises(ValueError, match="feature names"):
        estimator.predict(frame[["b", "a", "c"]])
    estimator.set_output(transform="default")
    assert isinstance(estimator.predict_quantiles(frame), np.ndarray)
    with pytest.raises(ConfigError, match="transform='polars': allowed is 'default' or 'pandas'"):
        estimator.set_output(transform="polars")


def test_weights_and_groups_may_be_series():
    X, y = rows()
    groups = pd.Series(np.arange(90) // 10)
    estimator = made(conformal="split").fit(X, pd.Series(y), pd.Series(np.ones(90)), groups=groups)
    assert estimator.predict(X).shape == (90,)


# ------------------------------------------------------------------ folds, jobs, the cache


def test_groups_stay_together():
    X, y = rows()
    groups = np.arange(90) % 9
    for options in ({}, {"cv": GroupKFold(3)}):
        estimator = made(**options).fit(X, y, groups=groups)
        fold = estimator.cross_fit_.fold
        assert all(len(set(fold[groups == g])) == 1 for g in range(9))
        assert np.isfinite(estimator.predict_interval(X)).all()


def test_split_calibration_keeps_groups_together():
    X, y = rows()
    groups = np.arange(90) % 9
    estimator = made(conformal="split").fit(X, y, groups=groups)
    assert estimator.conformal_.n_ == 20 and len(estimator.cross_fit_.fold) == 70  # two groups of ten


def test_time_splits_use_the_rows_that_they_hold_out():
    X, y = rows()
    estimator = made(cv=TimeSeriesSplit(4)).fit(X, y)
    oof = estimator.oof_quantiles_
    assert np.isnan(oof[:18]).all() and np.isfinite(oof[18:]).all()
    assert estimator.conformal_.n_ == 72
    assert np.isfinite(estimator.predict_interval(X)).all()
    assert np.isfinite(estimator.predict_quantiles(X)).all()


def test_processes_and_the_cache_change_nothing(tmp_path, capsys):
    X, y = rows()
    models = {"linear": Linear(), "trees": TREES}
    plain = made(models, conformal="nested").fit(X, y)
    for options in ({"n_jobs": 2}, {"cache": tmp_path}, {"cache": tmp_path, "verbose": 1}):
        other = made(models, conformal="nested", **options).fit(X, y)
        assert np.array_equal(other.predict_quantiles(X), plain.predict_quantiles(X))
        assert np.array_equal(other.predict_interval(X), plain.predict_interval(X))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[quantagg] linear, fold 1/3 (cached)"
    assert all(line.endswith("(cached)") for line in said) and len(said) == 6
    other.save(tmp_path / "saved")  # models that came from the cache
    back = QuantileAggregatorRegressor.load(tmp_path / "saved")
    assert np.array_equal(back.predict_quantiles(X), plain.predict_quantiles(X))


def test_the_random_state_decides_the_folds():
    X, y = rows()
    one, same, other = (made(random_state=s).fit(X, y) for s in (0, 0, 1))
    assert np.array_equal(one.predict_quantiles(X), same.predict_quantiles(X))
    assert not np.array_equal(one.cross_fit_.fold, other.cross_fit_.fold)


# ------------------------------------------------------------------ files


SAVED = {
    "cv+": {"estimators": {"linear": Linear(), "trees": TREES, "boosted": LightGBM(n_estimators=3)}},
    "nested": {"estimators": {"linear": Linear(), "trees": TREES}, "conformal": "nested"},
    "split": {"conformal": "split", "aggregator": "median"},
    "none": {"conformal": None, "refit": "all", "isotonize": "pava"},
    "net": {"estimators": {"net": MultiQuantileNet(n_iter=1, width=8, depth=2, max_steps=40)}, "cv": 2},
    "local": {"estimators": {"linear": Linear(), "trees": TREES}, "aggregator": "local_medium", "n_iter": 1,
              "options": {"width": 8, "depth": 2, "max_steps": 40}},
    "one level": {"levels": [0.5]},
    "time": {"cv": TimeSeriesSplit(3)},
    "blocks": {"estimators": {"boosted": LightGBM(n_estimators=2)}, "cv": 2,
               "levels": [k / 41 for k in range(1, 41)]},
}


@pytest.fixture(scope="module", params=SAVED)
def fitted(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantileWarning)
        return made(**SAVED[request.param]).fit(*rows())


def same(one, two, X):
    calls = [lambda e: e.predict_quantiles(X), lambda e: e.predict(X), lambda e: e.weights_(X)]
    if len(one.levels_) == 5:
        calls += [lambda e: e.predict_interval(X), lambda e: e.predict_interval(X, 0.5)]
    return all(np.array_equal(call(one), call(two)) for call in calls)


def test_a_saved_ensemble_predicts_the_same_to_the_bit(fitted, tmp_path):
    X, _ = rows(seed=1)
    fitted.save(tmp_path / "it")
    back = QuantileAggregatorRegressor.load(tmp_path / "it")
    assert same(back, fitted, X)
    assert back.model_names_ == fitted.model_names_ and back.leaderboard_ == fitted.leaderboard_
    assert {f.suffix for f in (tmp_path / "it").iterdir()} == {".json", ".safetensors"}
    back.save(tmp_path / "again")
    for file in (tmp_path / "it").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_pickled_ensemble_predicts_the_same_to_the_bit(fitted, tmp_path):
    X, _ = rows(seed=1)
    joblib.dump(fitted, tmp_path / "it")
    for back in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "it"),
                 joblib.load(tmp_path / "it", mmap_mode="r")):
        assert same(back, fitted, X)


def test_feature_names_are_saved(tmp_path):
    X, y = rows()
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    made().fit(frame, y).save(tmp_path / "it")
    back = QuantileAggregatorRegressor.load(tmp_path / "it")
    assert back.feature_names_in_.tolist() == ["a", "b", "c"] and quiet(back.predict, frame).shape == (90,)


def test_every_file_is_checked(tmp_path):
    made({"linear": Linear(), "trees": TREES}, cv=2).fit(*rows()).save(tmp_path / "it")
    files = sorted((tmp_path / "it").iterdir())
    assert len(files) == 12  # ensemble, stacker, two models of two folds
    for file in files:
        data = file.read_bytes()
        for damaged in (data[: len(data) // 2], data[:8] + bytes([data[8] ^ 1]) + data[9:], None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            with pytest.raises(FileError, match=file.name):
                QuantileAggregatorRegressor.load(tmp_path / "it")
        file.write_bytes(data)
    assert QuantileAggregatorRegressor.load(tmp_path / "it").predict(rows()[0]).shape == (90,)


def test_an_interrupted_save_leaves_no_ensemble_and_not_a_mixture(tmp_path, monkeypatch):
    import poise.files

    X, y = rows()
    first, second = made(conformal="nested").fit(X, y), made().fit(X, y + 1000)
    first.save(tmp_path / "it")
    write, left = poise.files.write_bytes, [2, 5]  # the second and the fifth file

    def failing(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(path, data)

    for count in left[:]:
        left[0] = count
        monkeypatch.setattr(poise.files, "write_bytes", failing)
        with pytest.raises(KeyboardInterrupt):
            second.save(tmp_path / "it")
        monkeypatch.setattr(poise.files, "write_bytes", write)
        with pytest.raises(FileError):
            QuantileAggregatorRegressor.load(tmp_path / "it")
    second.save(tmp_path / "it")
    assert QuantileAggregatorRegressor.load(tmp_path / "it").predict(X) == pytest.approx(second.predict(X))
    assert not list((tmp_path / "it").glob("nested_*"))  # nor anything of the larger one before it


def test_parts_of_another_ensemble_are_refused(tmp_path):
    X, y = rows()
    for name, shift in (("it", 0), ("other", 1000)):
        made().fit(X, y + shift).save(tmp_path / name)
    for part in ("stacker", "model_0_0"):
        for suffix in (".json", ".safetensors"):
            raw = (tmp_path / "other" / (part + suffix)).read_bytes()
            (tmp_path / "it" / (part + suffix)).write_bytes(raw)
        with pytest.raises(FileError, match=f"{part}.json is altered, or of another ensemble"):
            QuantileAggregatorRegressor.load(tmp_path / "it")
        made().fit(X, y).save(tmp_path / "it")


def test_parameters_survive_saving(tmp_path):
    X, y = rows()
    made(cv=np.int64(4), conformal=None).fit(X, y).save(tmp_path / "it")
    loaded = QuantileAggregatorRegressor.load(tmp_path / "it")
    assert loaded.cv == 4 and loaded.estimators == ["linear"]
    again = made(cv=4, conformal=None).fit(X, y)
    assert loaded.fit(X, y).predict(X) == pytest.approx(again.predict(X))


def test_what_does_not_belong_together_is_refused(tmp_path):
    from poise.files import load_arrays, save_arrays

    made().fit(*rows()).save(tmp_path / "it")
    arrays, meta = load_arrays(tmp_path / "it" / "ensemble")
    for change in ({"kind": "other"}, {"version": 1}, {"models": ["linear", "more"]}, {"folds": 4},
                   {"params": {**meta["params"], "code": 1}}, {"n_features": None, "features": 3}):
        save_arrays(tmp_path / "it" / "ensemble", arrays, meta | change)
        with pytest.raises(FileError):
            QuantileAggregatorRegressor.load(tmp_path / "it")
    with pytest.raises(FileError, match="cannot read"):
        QuantileAggregatorRegressor.load(tmp_path / "nowhere")


def test_what_has_no_form_without_pickle_is_named_before_anything_is_written(tmp_path):
    X, y = rows()
    for name, model in (("hist", HistBoosting(max_iter=2)), ("theirs", Asked())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantileWarning)
            estimator = made({"linear": Linear(), name: model}).fit(X, y)
        with pytest.raises(ConfigError, match=rf"{name} \(.*\) has no form without pickle: leave it out"):
            estimator.save(tmp_path / "it")
        assert not (tmp_path / "it").exists()
    with pytest.raises(ConfigError, match=r"not fitted: call fit\(X, y\) first"):
        made().save(tmp_path / "it")


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("conformal", ["cv+", "nested", "split"])
def test_intervals_cover_what_they_promise(conformal):
    found = []
    for seed in range(12):
        X, y = rows(100, seed)
        new, target = rows(400, 1000 + seed)
        estimator = made(conformal=conformal, random_state=seed).fit(X, y)
        interval = quiet(estimator.predict_interval, new)
        found.append(interval_coverage(target, interval, [0.1, 0.9], 0.8))
    if conformal == "split":  # 20 rows calibrate
        low, high = beta_band(20, 0.2, 0.999)
        assert all(low <= c <= high for c in found)
    assert 0.77 < np.mean(found) < 0.90


def test_uncalibrated_intervals_are_the_quantiles():
    X, y = rows()
    estimator = made(conformal=None).fit(X, y)
    assert np.array_equal(estimator.predict_interval(X), estimator.predict_quantiles(X)[:, [0, 4]])
    assert np.array_equal(estimator.predict_interval(X, 0.5), estimator.predict_quantiles(X)[:, [1, 3]])
    assert quiet(estimator.predict_interval, X, 0.4).shape == (90, 2)


@pytest.mark.parametrize("conformal", ["cv+", "nested", "split"])
def test_intervals_are_nested(conformal):
    X, y = rows(200)
    estimator = made(conformal=conformal).fit(X, y)
    wide, narrow = estimator.predict_interval(X, 0.2), estimator.predict_interval(X, 0.5)
    assert (wide[:, 0] <= narrow[:, 0]).all() and (narrow[:, 1] <= wide[:, 1]).all()
    assert (narrow[:, 0] <= narrow[:, 1]).all()


@pytest.mark.parametrize("conformal", ["cv+", "nested", "split"])
def test_too_few_rows_give_infinite_intervals_and_exactly_one_warning(conformal):
    X, y = rows(40)
    levels = [0.01, 0.25, 0.5, 0.75, 0.99]
    estimator = quiet(made({"normal": Normal()}, levels=levels, conformal=conformal).fit, X, y)
    with pytest.warns(QuantileWarning, match=r"calibration rows are too few for alpha=0\.02") as caught:
        interval = estimator.predict_interval(X, 0.02)
    assert len(caught) == 1 and np.isinf(interval).all() and (interval[:, 0] < 0).all()
    assert np.isfinite(quiet(estimator.predict_interval, X, 0.5)).all()


def nested_oof(y, conformal="nested"):
    X, _ = rows()
    estimator = made({"linear": Linear(), "trees": TREES}, conformal=conformal).fit(X, y)
    oof = estimator.stacker_.predict(estimator.oof_quantiles_)
    return (estimator._nested(X, y, None)[0] if conformal == "nested" else oof), estimator


@pytest.mark.parametrize("k", range(3))
def test_nested_quantiles_of_a_fold_do_not_depend_on_its_targets(k):
    _, y = rows()
    oof, estimator = nested_oof(y)
    held = estimator.cross_fit_.fold == k
    other = np.where(held, 5 - 3 * y[::-1], y)
    moved, changed = nested_oof(other)
    assert np.array_equal(changed.cross_fit_.fold, estimator.cross_fit_.fold)
    assert np.array_equal(moved[held], oof[held])
    assert np.array_equal(changed.nested_[k].weights(), estimator.nested_[k].weights())
    assert not np.isclose(moved[~held], oof[~held]).all(axis=1).any()
    plain, with_change = (nested_oof(target, "cv+")[0] for target in (y, other))
    assert not np.allclose(plain[held], with_change[held])  # CV+ takes the weights as given
