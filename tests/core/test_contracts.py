"""Every registered entry keeps its contract, is documented, and costs nothing to list."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from cases import some

import poise
from poise.options import default_of, option_fields
from poise.quantizers import ggml
from poise.registry import KINDS
from poise.testing import check_adapter, check_aggregator, check_data, check_model, check_quantizer

PLUGINS = ("poise_bone", "poise_compander", "poise_edgemoe", "poise_quantagg")
HYDRA = {"hydra", "omegaconf"}
HERE = ("digits", "gsm_symbolic", "mnist5k", "sotu", "tabular")  # sources that need no file of one's own
LARGE = ("smollm2",)  # what is particular to it is in test_models.py


def registered(*kinds):
    return [pytest.param(e, id=f"{e.kind}-{e.name}") for k in kinds for e in poise.entries(k)]


def example(entry):
    return poise.build(entry.kind, entry.name, **entry.example)


# ------------------------------------------------------------------ the kits


@pytest.mark.parametrize(("entry", "task"), [
    pytest.param(e, t, id=f"{e.name}-{t}", marks=[pytest.mark.slow] if e.name in LARGE else [])
    for e in poise.entries("model") for t in e.tasks
])
def test_every_model_keeps_its_contract(entry, task, monkeypatch, tmp_path):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    check_model(example(entry), task)


@pytest.mark.parametrize("entry", registered("quantizer"))
@pytest.mark.parametrize("shape", [(24, 40), (7, 13), (5, 3)])
def test_every_quantizer_keeps_its_contract(entry, shape):
    if getattr(example(entry), "searches", False) and ggml.library() is None:
        pytest.skip(ggml.status())
    check_quantizer(example(entry), shape)


@pytest.mark.parametrize("entry", registered("adapter"))
def test_every_adapter_keeps_its_contract(entry):
    check_adapter(example(entry))


@pytest.mark.parametrize("entry", registered("aggregator"))
@pytest.mark.parametrize("seed", some([0, 1, 2], keep=[0]))
def test_every_aggregator_keeps_its_contract(entry, seed):
    check_aggregator(example(entry), seed)


@pytest.mark.parametrize("entry", [e for e in registered("data") if e.values[0].name in HERE])
def test_every_source_of_data_keeps_its_contract(entry):
    check_data(example(entry))


@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA names no folder of larger files")
@pytest.mark.parametrize(
    "name", some(["cifar10", "gsm8k", "images", "text"], keep=["gsm8k", "text"]))
def test_every_source_of_larger_files_keeps_its_contract(name):
    check_data(poise.build("data", name))


def test_there_is_something_of_every_kind():
    assert {e.kind for e in poise.entries()} >= set(KINDS) - {"command"}


# ------------------------------------------------------------------ the documentation


@pytest.mark.parametrize("entry", registered(*KINDS))
def test_every_entry_says_what_it_is(entry):
    assert entry.summary and "\n" not in entry.summary and len(entry.summary) <= 100
    assert f"{entry.kind}={entry.name}: {entry.summary}" in poise.describe(entry.kind, entry.name)


@pytest.mark.parametrize("entry", registered(*[k for k in KINDS if k != "command"]))
def test_every_component_is_a_frozen_dataclass_with_documented_options(entry):
    component = entry.load()
    assert dataclasses.is_dataclass(component)
    assert component.__dataclass_params__.frozen
    assert component.__doc__ and not component.__doc__.startswith(f"{component.__name__}(")
    undocumented = [f.name for f in option_fields(component) if not f.metadata.get("help")]
    assert undocumented == []


@pytest.mark.parametrize("entry", registered(*[k for k in KINDS if k != "command"]))
def test_defaults_pass_their_own_checks(entry):
    component = entry.load()
    needed = {f.name for f in option_fields(component) if default_of(f) is dataclasses.MISSING}
    given = {k: v for k, v in entry.example.items() if k in needed}
    if entry.name in ("causal_lm", "images", "text", "gsm8k"):  # these need a path, or a class
        given = entry.example or {f.name: "somewhere" for f in option_fields(component)
                                  if f.name in ("path", "images", "labels", "folder")}
    made = poise.build(entry.kind, entry.name, **given)
    for field in option_fields(component):
        if field.name not in given:
            assert getattr(made, field.name) == default_of(field)


# ------------------------------------------------------------------ what importing costs


def modules_after(code):
    """Run code in a fresh interpreter and return what it has imported."""
    tail = "import json as _json, sys as _sys\nprint('\\n' + _json.dumps(list(_sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", ["poise", *PLUGINS])
def test_registering_and_describing_load_neither_torch_nor_numpy(package):
    modules = "poise.plugin, poise.models.components, poise.quantizers.components" \
        if package == "poise" else f"{package}, {package}.plugin, {package}.components"
    loaded = modules_after(f"import {modules}")
    assert not {"torch", "numpy", "transformers", *HYDRA} & loaded


def test_listing_loads_neither_torch_nor_hydra():
    loaded = modules_after("from poise.cli.main import main\nassert main(['list']) in (0, None)")
    assert not {"torch", "transformers", *HYDRA} & loaded


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_stands_alone(package):
    public = f"import {package}\nfor n in {package}.__all__: getattr({package}, n)"
    loaded = modules_after(public)
    assert not {"transformers", *HYDRA, *(set(PLUGINS) - {package})} & loaded
    if package == "poise_quantagg":
        assert "torch" not in loaded
