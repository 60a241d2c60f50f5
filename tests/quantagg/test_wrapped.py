"""Other people's models: one that does not look at its level is refused, one that need not is not."""

import numpy as np
import pytest
from cases import slowly
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, QuantileRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from poise.errors import ConfigError
from poise_quantagg.adapters import per_level, wrap
from poise_quantagg.components import Linear
from poise_quantagg.estimator import QuantileAggregatorRegressor

pytestmark = pytest.mark.filterwarnings("ignore::poise_quantagg.checks.QuantileWarning")
LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]


def rows(n=120, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    return X, X[:, 0] + rng.normal(size=n)


def ensemble(model, levels=LEVELS):
    return QuantileAggregatorRegressor(levels, {"linear": Linear(), "it": model}, cv=3)


class Blind(RegressorMixin, BaseEstimator):
    """Takes quantiles, and returns the mean for each of them."""

    def fit(self, X, y):
        self.mean_ = LinearRegression().fit(X, y)
        return self

    def predict(self, X, quantiles=(0.5,)):
        return np.repeat(self.mean_.predict(X)[:, None], len(quantiles), axis=1)


class Small(BaseEstimator):
    """A regressor whose options have no loss among them."""

    def __init__(self, level=0.5):
        self.level = level

    def fit(self, X, y, sample_weight=None):
        self.value_ = float(np.mean(y))
        return self

    def predict(self, X):
        return np.full(len(X), self.value_)


@pytest.mark.parametrize(("model", "words"), [
    (per_level(GradientBoostingRegressor(n_estimators=5), "alpha"),
     r"GradientBoostingRegressor predicts the same .*'alpha'.*loss='squared_error'.*'quantile'"),
    (per_level(HistGradientBoostingRegressor(max_iter=5), "quantile"), "loss='squared_error'"),
    (per_level(make_pipeline(StandardScaler(), GradientBoostingRegressor(n_estimators=5)),
               "gradientboostingregressor__alpha"), "set gradientboostingregressor__loss to"),
    (per_level(Small(), "level"), "choose a regressor that minimises the quantile loss"),
    (Blind(), "Blind predicts the same .* set its option for quantiles"),
], ids=["boosting", "hist", "pipeline", "no loss", "wrapped"])
@pytest.mark.parametrize("levels", [LEVELS, [0.4, 0.6], np.arange(1, 60) / 60], ids=len)
def test_a_model_that_does_not_look_at_its_level_is_refused(model, words, levels):
    X, y = rows()
    with pytest.raises(ConfigError, match=words):
        ensemble(model, levels).fit(X, y)


@pytest.mark.parametrize("y", [
    np.full(120, 3.7), np.where(np.arange(120) % 20 == 0, 5.0, 0.0), *map(slowly, (
        np.repeat([0.0, 1e6], 60), 1e-6 * np.repeat([0.0, 1.0], 60), np.repeat([3.0, 3.0, 8.0], 40))),
], ids=["constant", "mostly zero", "two values", "small", "counts"])
@pytest.mark.parametrize("model", [
    per_level(GradientBoostingRegressor(loss="quantile", n_estimators=30), "alpha"),
    per_level(HistGradientBoostingRegressor(loss="quantile", max_iter=10), "quantile"),
    per_level(DummyRegressor(strategy="quantile"), "quantile"),
    per_level(make_pipeline(StandardScaler(), QuantileRegressor(alpha=0.0)), "quantileregressor__quantile"),
], ids=["boosting", "hist", "dummy", "linear"])
def test_targets_with_one_quantile_are_not_refused(model, y):
    X = np.random.default_rng(1).normal(size=(120, 2)) + (y[:, None] > y.mean())
    fitted = ensemble(model).fit(X, y)
    assert fitted.model_names_ == ["linear", "it"] and np.isfinite(fitted.predict_quantiles(X)).all()


def test_trees_that_learn_their_rows_by_heart_are_not_refused():
    X, y = rows(60)
    model = GradientBoostingRegressor(loss="quantile", n_estimators=30, max_depth=None, learning_rate=0.5)
    assert np.isfinite(ensemble(per_level(model, "alpha")).fit(X, y).predict_quantiles(X)).all()


@pytest.mark.parametrize("n", [6, 9, 20])
def test_few_rows_and_one_level_are_not_refused(n):
    X, y = rows(n)
    for levels in (LEVELS, [0.45, 0.5, 0.55]):
        for model in (per_level(GradientBoostingRegressor(loss="quantile", n_estimators=5), "alpha"),
                      per_level(DummyRegressor(strategy="quantile"), "quantile")):
            assert np.isfinite(ensemble(model, levels).fit(X, y).oof_quantiles_).all()
    ensemble(per_level(GradientBoostingRegressor(n_estimators=5), "alpha"), [0.5]).fit(X, y)
    wrap(Blind()).build().fit(X, y)  # no levels to check at
