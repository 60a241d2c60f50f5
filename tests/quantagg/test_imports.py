"""Importing, listing and describing stay light; nothing needs torch."""

import json
import subprocess
import sys

import pytest

import poise_quantagg

HEAVY = ("torch", "sklearn", "hydra", "omegaconf", "matplotlib", "lightgbm", "scipy", "joblib")

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
    "poise_quantagg", "poise_quantagg.plugin", "poise_quantagg.components",
])
def test_import_is_light(module):
    loaded = json.loads(run(f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"))
    assert not {"numpy", *HEAVY} & set(loaded)


def test_scores_need_numpy_only():
    loaded = json.loads(run(
        "import sys, json; from poise_quantagg import *; print(json.dumps(list(sys.modules)))"
    ))
    assert not set(HEAVY) & set(loaded)


def test_the_plugin_works_without_torch(tmp_path):
    run(f"""
{ABSENT.format("torch")}
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_crossfit import Diabetes, Notebook, Parts, QuantileEnsemble
recipe = QuantileEnsemble(base=["linear"], levels=[0.1, 0.5, 0.9], folds=2)
print(recipe.run(Parts(data=Diabetes()), Notebook({str(tmp_path)!r})))
""")


def test_public_names():
    assert len(poise_quantagg.__all__) <= 12
    for name in poise_quantagg.__all__:
        assert callable(getattr(poise_quantagg, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        poise_quantagg.nothing  # noqa: B018


def test_a_submodule_never_shadows_a_public_name():
    run("import poise_quantagg.crossfit, poise_quantagg as q; assert callable(q.cross_fit)")


@pytest.mark.parametrize("module", ["lightgbm", "quantile_forest"])
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
