"""Importing, listing and describing stay light; nothing needs torch."""

import json
import subprocess
import sys

import pytest
from cases import some

import poise_quantagg

HEAVY = ("torch", "sklearn", "hydra", "omegaconf", "matplotlib", "lightgbm", "scipy", "joblib", "pandas")

ABSENT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{}":
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", [
    "poise_quantagg", "poise_quantagg.plugin", "poise_quantagg.components", "poise_quantagg.defaults",
])
def test_import_is_light(module):
    loaded = json.loads(run(f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"))
    assert not {"numpy", *HEAVY} & set(loaded)


@pytest.mark.parametrize("what", ["scores", "monotone", "conformal", "scores, monotone, conformal"])
def test_scores_monotone_and_conformal_need_numpy_only(what):
    loaded = json.loads(run(
        f"import sys, json; from poise_quantagg import {what}; print(json.dumps(list(sys.modules)))"
    ))
    assert not set(HEAVY) & set(loaded) and "numpy" in loaded


def test_they_compute_with_numpy_only():
    loaded = json.loads(run("""
import sys, json
import numpy as np
from poise_quantagg import conformal, monotone, scores
levels = [0.1, 0.5, 0.9]
y, q = np.arange(30.0), np.arange(30.0)[:, None] + [1.0, -1.0, 2.0]
for mend in (monotone.sort, monotone.pava, lambda q: monotone.minmax(q, levels)):
    assert (np.diff(mend(q)) >= 0).all()
assert scores.wis(y, q, levels, convention="paper") == 6 * scores.pinball(y, q, levels)
fitted = conformal.SplitCQR().fit(y, monotone.sort(q), levels)
assert fitted.predict_interval(monotone.sort(q), 0.2).shape == (30, 2)
conformal.CVPlus().fit(y, monotone.sort(q), np.arange(30) % 3, levels)
print(json.dumps(list(sys.modules)))
"""))
    assert not set(HEAVY) & set(loaded)


ALL = '["linear", "extra_trees", "quantile_forest", "lightgbm"]'


@pytest.mark.parametrize("pairs", some(
    [f'("cv+", {ALL}), ("split", "auto")',
     f'("cv+", "auto"), ("nested", "auto"), ("nested", {ALL}), ("split", {ALL})'],
    keep=[f'("cv+", {ALL}), ("split", "auto")']), ids=["some", "rest"])
def test_everything_that_is_not_neural_works_without_torch(pairs, tmp_path):
    out = run(f"""
{ABSENT.format("torch")}
import warnings
import numpy as np
from poise_quantagg.estimator import QuantileAggregatorRegressor
from poise_quantagg.stacker import QuantileStacker
warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
X = rng.normal(size=(60, 2))
y = X[:, 0] + rng.normal(size=60)
Z = X[:, :1, None] + np.sort(rng.normal(size=(60, 3, 5)), axis=2)
for name in ("average median best greedy qra fqra global_coarse global_medium global_fine").split():
    stacker = QuantileStacker(name, isotonize="sort").fit(Z, y)
    stacker.save({str(tmp_path / "stacker")!r})
    back = QuantileStacker.load({str(tmp_path / "stacker")!r})
    assert np.array_equal(back.predict(Z), stacker.predict(Z))
for conformal, estimators in ({pairs}):
    fitted = QuantileAggregatorRegressor([0.1, 0.5, 0.9], estimators, cv=3, conformal=conformal)
    fitted.fit(X, y)
    assert np.isfinite(fitted.predict_interval(X)).all()
    fitted.save({str(tmp_path / "ensemble")!r})
    back = QuantileAggregatorRegressor.load({str(tmp_path / "ensemble")!r})
    assert np.array_equal(back.predict_quantiles(X), fitted.predict_quantiles(X))
assert "torch" not in sys.modules
from poise.errors import MissingExtra
for fit in (lambda: QuantileStacker("local_coarse").fit(Z, y, X),
            lambda: QuantileStacker("global_coarse", solver="gradient").fit(Z, y),
            lambda: QuantileAggregatorRegressor(estimators=["gaussian_net"]).fit(X, y)):
    try:
        fit()
    except MissingExtra as error:
        print(error)
""")
    assert len(out.splitlines()) == 3 and out.count("torch") == 3


def test_public_names():
    from poise_quantagg import (  # noqa: F401
        QuantileAggregatorRegressor,
        QuantileStacker,
        conformal,
        monotone,
        scores,
    )

    assert len(poise_quantagg.__all__) <= 12
    for name in poise_quantagg.__all__:
        assert getattr(poise_quantagg, name) is not None
    assert {"QuantileAggregatorRegressor", "QuantileStacker"} <= set(poise_quantagg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        poise_quantagg.nothing  # noqa: B018


def test_a_submodule_never_shadows_a_public_name():
    run("""
import importlib, pkgutil, poise_quantagg as q
before = {name: getattr(q, name) for name in q.__all__}
for module in pkgutil.iter_modules(q.__path__):
    importlib.import_module(f"poise_quantagg.{module.name}")
assert all(getattr(q, name) is value for name, value in before.items())
""")


@pytest.mark.parametrize("module", some(["lightgbm", "quantile_forest"], keep=["lightgbm"]))
def test_a_missing_extra_is_named(module):
    out = run(f"""
{ABSENT.format(module)}
import poise
from poise.errors import MissingExtra
try:
    poise.build("model", {module!r}).build().fit([[0.0], [1.0]], [0.0, 1.0])
except MissingExtra as error:
    print(error)
""")
    assert "pip install 'poise[quantagg]'" in out
