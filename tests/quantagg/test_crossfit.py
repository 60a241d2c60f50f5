"""Base models, cross-fitting and the recipe, on a real table."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from poise.errors import ConfigError, DataError
from poise.interfaces import Arrays, Parts, Splits
from poise.registry import build
from poise_quantagg import GlobalCoarse, cross_fit
from poise_quantagg.components import (
    ExtraTrees,
    HistBoosting,
    Linear,
    QuantileEnsemble,
    QuantileForest,
)
from poise_quantagg.crossfit import assign_folds

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]
SMALL = {
    "quantile_forest": {"n_estimators": 10},
    "extra_trees": {"n_estimators": 10},
    "lightgbm": {"n_estimators": 15},
    "hist_boosting": {"max_iter": 15},
    "linear": {},
}


def table(n=200):
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return x[:n], y[:n]


@dataclass(frozen=True)
class Diabetes:
    """scikit-learn's table behind the data contract."""

    rows: int = 200

    def load(self, seed=0):
        x, y = table(self.rows)
        order = np.random.default_rng(seed).permutation(len(y))
        cuts = [int(0.6 * len(y)), int(0.8 * len(y))]
        parts = [Arrays(x[i], y[i]) for i in np.split(order, cuts)]
        return Splits(*parts, {"source": "scikit-learn load_diabetes"}, {"target": "progression"})


class Notebook:
    """A context that keeps what it is told."""

    device = "cpu"

    def __init__(self, directory, seed=0):
        self.directory, self.seed = Path(directory), seed
        self.logged, self.notes, self.advanced = [], {}, 0

    def log(self, step, values):
        self.logged.append((step, dict(values)))

    def note(self, key, value):
        self.notes[key] = json.loads(json.dumps(value, allow_nan=False))

    def seed_for(self, purpose):
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @contextlib.contextmanager
    def progress(self, total, label):
        self.total = total
        yield self

    def advance(self, n=1, note=""):
        self.advanced += n


# ------------------------------------------------------------------ base models


@pytest.mark.parametrize("name", SMALL)
def test_a_base_model_keeps_the_contract(name):
    x, y = table()
    model = build("model", name, levels=LEVELS, **SMALL[name])
    fitted = model.build({"input_shape": (10,)}).fit(x, y)
    q = fitted.predict_quantiles(x)
    assert q.shape == (200, 5) and np.isfinite(q).all()
    assert np.array_equal(q, model.build().fit(x, y).predict_quantiles(x))
    assert np.array_equal(fitted.predict_quantiles(x, [0.1, 0.9]), q[:, [0, 4]])
    assert fitted.predict_quantiles(x[:1], [0.5]).shape == (1, 1)
    assert ((y[:, None] <= q).mean(axis=0) == pytest.approx(LEVELS, abs=0.15))


@pytest.mark.parametrize("name", SMALL)
def test_a_base_model_honours_sample_weights(name):
    x, y = table()
    component = build("model", name, levels=[0.5], **SMALL[name])
    q = component.build().fit(x, y, sample_weight=np.ones(200)).predict_quantiles(x)
    weight = np.where(y > np.median(y), 20.0, 1.0)
    higher = component.build().fit(x, y, sample_weight=weight).predict_quantiles(x)
    if name == "extra_trees":  # weights shape its splits only, as its card says
        assert not np.array_equal(q, higher)
    else:
        assert higher.mean() > q.mean()
    with pytest.raises(DataError, match="sample_weight"):
        component.build().fit(x, y, sample_weight=np.ones(3))


def test_forests_predict_levels_they_were_not_given_and_others_refuse():
    x, y = table()
    forest = QuantileForest(levels=[0.5], n_estimators=5).build().fit(x, y)
    assert forest.predict_quantiles(x, [0.29, 0.57]).shape == (200, 2)
    linear = Linear(levels=[0.5]).build().fit(x, y)
    with pytest.raises(ConfigError, match=r"level 0\.3 is not among \[0\.5\]"):
        linear.predict_quantiles(x, [0.3])


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


def test_the_linear_model_does_not_depend_on_the_units_of_the_features():
    x, y = table()
    units = 10.0 ** np.arange(-5, 5)
    model = Linear(levels=[0.2, 0.8])
    here, there = (model.build().fit(a, y).predict_quantiles(a) for a in (x, x * units))
    assert there == pytest.approx(here, rel=1e-6)


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


# ------------------------------------------------------------------ cross-fitting


@dataclass(frozen=True)
class Parrot:
    """Predicts the target of the nearest row it has seen, so a leak shows as a perfect hit."""

    def build(self, spec=None):
        return FittedParrot()


class FittedParrot:
    def fit(self, X, y, sample_weight=None):
        self.x, self.y = X[:, 0], y
        return self

    def predict_quantiles(self, X, levels=None):
        nearest = np.abs(X[:, :1] - self.x).argmin(axis=1)
        return np.repeat(self.y[nearest][:, None], len(levels), axis=1)


def test_every_row_is_predicted_once_by_a_model_that_has_not_seen_it():
    x, y = np.arange(53.0)[:, None], np.arange(53.0) + 100
    done = []
    fits = cross_fit({"parrot": Parrot()}, x, y, LEVELS, folds=4, seed=1, progress=done.append)
    assert fits.Z.shape == (53, 1, 5) and np.isfinite(fits.Z).all()
    assert not np.any(fits.Z[:, 0, 0] == y)
    assert np.array_equal(fits.predict(x)[:, 0, 0], y)  # the final model has seen all
    assert done == ["parrot, fold 1/4", "parrot, fold 2/4", "parrot, fold 3/4",
                    "parrot, fold 4/4", "parrot, all rows"]


def test_folds_are_even_shuffled_and_decided_by_the_seed():
    fold = assign_folds(53, 5, seed=3)
    assert sorted(np.bincount(fold)) == [10, 10, 11, 11, 11]
    assert np.array_equal(fold, assign_folds(53, 5, seed=3))
    assert not np.array_equal(fold, assign_folds(53, 5, seed=4))
    assert np.any(np.diff(fold) < 0)


def test_the_result_does_not_depend_on_the_number_of_processes():
    x, y = table(100)
    models = {"linear": Linear(), "forest": QuantileForest(n_estimators=5)}
    one, two = (cross_fit(models, x, y, LEVELS, folds=3, n_jobs=j) for j in (1, 2))
    assert np.array_equal(one.Z, two.Z)
    assert np.array_equal(one.predict(x), two.predict(x))


def test_cross_fitting_refuses_what_it_cannot_use():
    x, y = table(20)
    for folds in (1, 21):
        with pytest.raises(ConfigError, match=f"folds={folds}"):
            cross_fit({"linear": Linear()}, x, y, LEVELS, folds=folds)
    with pytest.raises(ConfigError, match="no models"):
        cross_fit({}, x, y, LEVELS)
    with pytest.raises(DataError, match="y has 19"):
        cross_fit({"linear": Linear()}, x, y[:-1], LEVELS)


# ------------------------------------------------------------------ the recipe


def test_the_recipe_scores_every_model_and_aggregator(tmp_path):
    recipe = QuantileEnsemble(base=["linear", "quantile_forest"], levels=LEVELS, folds=3,
                              base_options={"quantile_forest": {"n_estimators": 10}})
    context = Notebook(tmp_path)
    parts = Parts(data=Diabetes(), model=HistBoosting(max_iter=10), aggregator=GlobalCoarse(),
                  names={"model": "boosted", "aggregator": "mine"})
    metrics = recipe.run(parts, context)
    names = {"linear", "quantile_forest", "boosted", "average", "median", "global_coarse", "mine"}
    assert set(metrics) == {f"{key}/{name}" for name in names
                            for key in ("wis_mean", "coverage_80", "crossing_raw")}
    assert metrics["wis_mean/mine"] == metrics["wis_mean/global_coarse"]
    # standardised target: always predicting the marginal quantiles scores about 0.56
    assert 0.2 < metrics["wis_mean/global_coarse"] < 0.56
    assert context.advanced == context.total == 3 * 4
    assert {row["name"] for row in context.notes["scores"]} == names
    assert sum(context.notes["weights"]["mine"].values()) == pytest.approx(1)
    for file in context.notes["figures"]:
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


def test_the_recipe_is_decided_by_the_seed(tmp_path):
    recipe = QuantileEnsemble(base=["quantile_forest"], levels=LEVELS, folds=2, figures=False,
                              base_options={"quantile_forest": {"n_estimators": 5}})
    first, again, other = (
        recipe.run(Parts(data=Diabetes()), Notebook(tmp_path, s)) for s in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(("options", "parts", "message"), [
    ({"base": ["lightgmb"]}, {}, "did you mean 'lightgbm'"),
    ({"base": []}, {}, "at least one model"),
    ({"base_options": {"linaer": {}}}, {}, "did you mean 'linear'"),
    ({"base_options": {"linear": {"alhpa": 1.0}}}, {}, "did you mean 'alpha'"),
    ({"aggregators": ["mean"]}, {}, "no aggregator named 'mean'"),
    ({"levels": [0.1, 0.5]}, {}, "level 0.9"),
    ({}, {"adapter": object()}, "takes no adapter"),
    ({}, {"data": None}, "needs data"),
])
def test_a_bad_choice_is_refused_before_data_is_loaded(tmp_path, options, parts, message):
    class Untouched:
        def load(self, seed=0):
            raise AssertionError("data was loaded")

    recipe = QuantileEnsemble(**options)
    with pytest.raises(ConfigError, match=message):
        recipe.run(Parts(**{"data": Untouched(), **parts}), Notebook(tmp_path))


def test_a_constant_target_is_refused(tmp_path):
    class Constant:
        def load(self, seed=0):
            part = Arrays(np.arange(8.0)[:, None], np.ones(8))
            return Splits(part, part, part, {})

    with pytest.raises(DataError, match="constant"):
        QuantileEnsemble(base=["linear"]).run(Parts(data=Constant()), Notebook(tmp_path))
