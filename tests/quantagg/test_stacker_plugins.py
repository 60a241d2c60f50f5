"""An aggregator of another distribution, found by its entry point and used by its name."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from poise import registry
from poise.errors import ConfigError, FileError
from poise.files import load_arrays, save_arrays
from poise.interfaces import Arrays, Parts, Splits
from poise.runs.context import RunContext
from poise.testing import check_aggregator
from poise_quantagg import QuantileAggregatorRegressor, QuantileStacker
from poise_quantagg.components import QuantileEnsemble

LEVELS = [0.1, 0.3, 0.5, 0.7, 0.9]
pytestmark = pytest.mark.filterwarnings("ignore:base predictions cross")

CODE = '''
"""Weights that fall with the loss: one number per model."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from poise.options import check_options, option
from poise_quantagg.aggregators.fitted import LinearFit
from poise_quantagg.checks import fit_rows


@dataclass(frozen=True)
class Fit:
    w: np.ndarray
    m: int
    linear = True

    def predict(self, Z, X=None):
        return LinearFit(self.w, self.m).predict(Z)

    def weights(self, X=None):
        return self.w.copy()

    def tensors(self):
        return {"w": self.w}, {"levels": self.m}


@dataclass(frozen=True)
class Softened:
    """Weights by the softmax of minus the loss of each model."""

    sharpness: float = option(5.0, "how much the best model gets", low=0)
    solver: str = option("direct", "ours, none of those that the stacker knows", choices=("direct", "slow"))

    def __post_init__(self):
        check_options(self)

    def fit(self, Z, y, X=None, *, levels=None, validation=None, sample_weight=None):
        rows = fit_rows(Z, y, X, levels, validation, sample_weight, False)
        u = rows.y[:, None, None] - rows.Z
        loss = np.einsum("n,npm->p", rows.s, np.maximum(rows.levels * u, (rows.levels - 1) * u))
        w = np.exp(-self.sharpness * loss / loss.mean())
        return Fit(w / w.sum(), Z.shape[2])

    @classmethod
    def from_tensors(cls, arrays, values):
        return Fit(arrays["w"], values["levels"])


class Opaque:
    def __init__(self, fit):
        self.predict, self.weights = fit.predict, fit.weights


@dataclass(frozen=True)
class Unsaved(Softened):
    """The same without a form for files."""

    def fit(self, Z, y, X=None, **rows):
        return Opaque(super().fit(Z, y, X, **rows))


class ByFeatures(Fit):
    linear = False

    def predict(self, Z, X=None):
        if X is None:
            raise TypeError("features are needed")
        return super().predict(Z)

    def weights(self, X=None):
        return np.broadcast_to(self.w, (len(X), len(self.w)))


@dataclass(frozen=True)
class Local(Softened):
    """One that asks for features, and does not say how many."""

    needs_features: ClassVar[bool] = True

    def fit(self, Z, y, X=None, **rows):
        fit = super().fit(Z, y, X, **rows)
        return ByFeatures(fit.w, fit.m)

    @classmethod
    def from_tensors(cls, arrays, values):
        return ByFeatures(arrays["w"], values["levels"])


def register(registry):
    for name, component in (("softened", "Softened"), ("unsaved", "Unsaved"), ("theirs_local", "Local")):
        registry.add("aggregator", name, f"softened_weights:{component}", "weights by the loss")
'''


@pytest.fixture(autouse=True)
def installed(tmp_path_factory, monkeypatch):
    """Install a distribution with an entry point; returns a function that takes it away again."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "softened_weights.py").write_text(CODE)
    info = folder / "softened_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: softened-weights\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[poise.plugins]\nsoftened = softened_weights:register\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(registry, "_installed", None)
    importlib.invalidate_caches()

    def remove():
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(folder)])
        monkeypatch.setattr(registry, "_installed", None)
        importlib.invalidate_caches()

    yield remove
    sys.modules.pop("softened_weights", None)


def problem(n=80, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2))
    y = X[:, 0] + rng.normal(size=n)
    noise = np.sort(rng.normal(size=(n, 3, 5)), axis=2)
    return X[:, :1, None] + np.arange(3)[:, None] * 0.5 + noise, y, X


def test_it_keeps_the_contract():
    check_aggregator(registry.build("aggregator", "softened"))


def test_the_stacker_takes_it_by_its_name():
    Z, y, _ = problem()
    stacker = QuantileStacker("softened", LEVELS, isotonize="sort").fit(Z, y)
    fitted = registry.build("aggregator", "softened").fit(Z, y, levels=LEVELS)
    assert np.array_equal(stacker.weights(), fitted.weights())
    assert np.array_equal(stacker.predict(Z), np.sort(fitted.predict(Z)))
    even = QuantileStacker("softened", LEVELS, options={"sharpness": 0.0}).fit(Z, y)
    assert even.weights() == pytest.approx(1 / 3)


@pytest.mark.parametrize(("options", "words"), [
    ({"options": {"sharpnes": 1.0}}, "did you mean 'sharpness'"),
    ({"options": {"sharpness": -1.0}}, "aggregator=softened: Softened.sharpness=-1.0 is not allowed"),
    ({"penalty": "constant"}, "aggregator=softened takes no penalty"),
    ({"solver": "exact"}, r"Softened.solver='exact' is not allowed: it must be one of direct, slow"),
    ({"aggregator": "softend"}, "did you mean 'softened'"),
    ({"aggregator": "theirs_local", "solver": "highs"}, "solver='highs'"),
])
def test_its_options_are_checked(options, words):
    Z, y, _ = problem()
    with pytest.raises(ConfigError, match=words) as caught:
        QuantileStacker(**{"aggregator": "softened", "levels": LEVELS} | options).fit(Z, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("aggregator", ["softened", "theirs_local"])
def test_a_saved_stacker_predicts_the_same_to_the_bit(aggregator, tmp_path):
    Z, y, X = problem()
    stacker = QuantileStacker(aggregator, LEVELS, options={"sharpness": 2.0}).fit(Z, y, X)
    stacker.save(tmp_path / "it")
    back = QuantileStacker.load(tmp_path / "it")
    assert np.array_equal(back.predict(Z, X), stacker.predict(Z, X))
    assert np.array_equal(back.weights(X), stacker.weights(X)) and back.get_params() == stacker.get_params()
    assert np.array_equal(back.fit(Z, y, X).weights(X), stacker.weights(X))


def test_what_was_fitted_is_saved_whatever_the_parameters_say_by_now(tmp_path):
    Z, y, _ = problem()
    stacker = QuantileStacker("softened", LEVELS).fit(Z, y).set_params(aggregator="median")
    stacker.save(tmp_path / "it")
    assert np.array_equal(QuantileStacker.load(tmp_path / "it").predict(Z), stacker.predict(Z))


def test_without_a_form_for_files_saving_is_refused_in_words(tmp_path):
    Z, y, _ = problem()
    stacker = QuantileStacker("unsaved", LEVELS).fit(Z, y)
    words = r"aggregator=unsaved has no form without pickle: give Opaque tensors\(\) and its component from"
    with pytest.raises(ConfigError, match=words) as caught:
        stacker.save(tmp_path / "it")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_file_of_an_aggregator_that_is_not_installed_says_so(tmp_path, installed):
    Z, y, _ = problem()
    QuantileStacker("softened", LEVELS).fit(Z, y).save(tmp_path / "it")
    installed()
    with pytest.raises(FileError, match=r"it: it was made by .* not there: aggregator='softened'"):
        QuantileStacker.load(tmp_path / "it")


@pytest.mark.parametrize("change", [
    lambda arrays, meta: arrays.update(w=arrays["w"][:2]), lambda arrays, meta: arrays.pop("w"),
    lambda arrays, meta: meta.update(aggregator="average"),
    lambda arrays, meta: meta.update(aggregator="os"), lambda arrays, meta: meta["fitted"].clear(),
], ids=range(5))
def test_a_file_that_does_not_fit_is_refused(change, tmp_path):
    Z, y, _ = problem()
    QuantileStacker("softened", LEVELS).fit(Z, y).save(tmp_path / "it")
    arrays, meta = load_arrays(tmp_path / "it")
    change(arrays, meta)
    save_arrays(tmp_path / "it", arrays or {"none": np.zeros(0)}, meta)
    with pytest.raises(FileError):
        QuantileStacker.load(tmp_path / "it")


def made(aggregator):
    return QuantileAggregatorRegressor(LEVELS, ["linear"], aggregator, cv=3)


@pytest.mark.parametrize("aggregator", ["softened", "theirs_local"])
def test_the_whole_ensemble_takes_it_by_its_name(aggregator, tmp_path):
    _, y, X = problem()
    ensemble = made(aggregator).fit(X, y)
    assert (ensemble.weights_(X) == 1).all()
    ensemble.save(tmp_path / "it")
    back = QuantileAggregatorRegressor.load(tmp_path / "it")
    assert np.array_equal(back.predict_quantiles(X), ensemble.predict_quantiles(X))
    assert np.array_equal(back.predict_interval(X), ensemble.predict_interval(X))


def test_the_recipe_takes_it_by_its_name_and_draws_its_weights(tmp_path):
    _, y, X = problem(100)
    splits = Splits(Arrays(X[:60], y[:60]), Arrays(X[60:80], y[60:80]), Arrays(X[80:], y[80:]), {})
    recipe = QuantileEnsemble(base=["linear"], aggregators=["softened", "theirs_local"], folds=2,
                              levels=LEVELS)
    context = RunContext(tmp_path, 0, quiet=True)
    scores = recipe.run(Parts(data=SimpleNamespace(load=lambda seed: splits)), context)
    assert {"wis_hub/softened", "wis_hub/theirs_local"} <= set(scores)
    assert (tmp_path / "figures/weights_theirs_local.png").is_file()


def test_an_ensemble_that_cannot_be_saved_leaves_the_one_before_it(tmp_path):
    _, y, X = problem()
    before = made("softened").fit(X, y)
    before.save(tmp_path / "it")
    with pytest.raises(ConfigError, match="aggregator=unsaved has no form without pickle"):
        made("unsaved").fit(X, y).save(tmp_path / "it")
    back = QuantileAggregatorRegressor.load(tmp_path / "it")
    assert np.array_equal(back.predict(X), before.predict(X))
