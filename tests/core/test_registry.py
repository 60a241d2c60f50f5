"""The registry: installed means registered, twice is an error, broken is skipped by name."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

import poise
from poise.errors import ConfigError, MissingExtra, NameClash, require
from poise.quantizers import AbsMax
from poise.registry import KINDS, STRICT, Registry


def plugin(name, register):
    """An entry point as a distribution would declare it."""

    def load():
        if isinstance(register, Exception):
            raise register
        return register

    return SimpleNamespace(name=name, value=f"{name}.plugin:register", load=load)


@pytest.fixture
def installed(monkeypatch):
    """Return a function that reads a registry from the given plugins."""
    monkeypatch.delenv(STRICT, raising=False)

    def read(*points):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: list(points))
        registry = Registry()
        registry.load_plugins()
        return registry

    return read


def adds(*names, kind="adapter", then=None):
    def register(registry):
        for name in names:
            component = "poise.quantizers.components:AbsMax"
            registry.add(kind, name, component, f"the {name}", example={"bits": 3})
        if then:
            raise then

    return register


def names(registry, kind="adapter"):
    return [e.name for e in registry.entries(kind)]


def test_entries_are_sorted_and_know_their_plugin(installed):
    registry = installed(plugin("zeta", adds("b", "a")), plugin("core", adds("c")))
    assert [(e.name, e.plugin) for e in registry.entries("adapter")] == [
        ("a", "zeta"), ("b", "zeta"), ("c", "core")]
    assert registry.get("adapter", "a").example == {"bits": 3}
    both = installed(plugin("one", adds("x", kind="quantizer")), plugin("two", adds("x", kind="model")))
    assert [(e.kind, e.name) for e in both.entries()] == [("model", "x"), ("quantizer", "x")]


def test_two_plugins_that_claim_one_name_are_both_named(installed):
    with pytest.raises(NameClash, match="adapter=bone is claimed by two plugins, 'alpha' and 'beta'"):
        installed(plugin("beta", adds("bone")), plugin("alpha", adds("bone")))


def test_a_plugin_that_claims_its_own_name_twice_is_named_once(installed):
    with pytest.raises(NameClash, match="adapter=bone is added twice by plugin 'alpha'"):
        installed(plugin("alpha", adds("bone", "bone")))


def test_the_words_of_an_error_do_not_make_it_a_clash(installed, capsys):
    lookalike = ConfigError("adapter=a is claimed by two plugins")
    registry = installed(plugin("bad", adds("half", then=lookalike)), plugin("good", adds("a")))
    assert names(registry) == ["a"] and "plugin 'bad'" in capsys.readouterr().err


def test_of_a_plugin_that_clashes_nothing_is_taken_over():
    registry, other = Registry("one"), Registry("two")
    registry.add("adapter", "bone", "a:b")
    for name in ("first", "bone"):
        other.add("adapter", name, "a:b")
    other.add_conf("two.conf")
    other.add_finding("two", "two:finding")
    with pytest.raises(NameClash):
        registry.merge(other)
    assert [(e.name, e.plugin) for e in registry.entries()] == [("bone", "one")]
    assert registry.conf_packages == [] and registry.findings == {}


@pytest.mark.parametrize("broken", [
    ImportError("no such thing"), SyntaxError("bad"), ZeroDivisionError("oops"),
], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("when", ["at import", "half way"])
def test_a_broken_plugin_is_skipped_by_name_with_all_it_added(broken, when, installed, capsys):
    bad = plugin("bad", broken if when == "at import" else adds("half", then=broken))
    registry = installed(plugin("alpha", adds("a")), bad, plugin("zeta", adds("z")))
    assert names(registry) == ["a", "z"]
    err = capsys.readouterr().err
    assert err.startswith("poise: plugin 'bad' (bad.plugin:register) is skipped: ")
    assert f"{type(broken).__name__}: {broken}" in err and "POISE_STRICT=1" in err and err.count("\n") == 1


def test_of_a_broken_plugin_no_folder_and_no_finding_is_left(installed, capsys):
    def register(registry, name="bad"):
        registry.add_conf(f"{name}.conf")
        registry.add_finding(name, f"{name}.doctor:finding")

    def broken(registry):
        register(registry)
        raise ValueError

    registry = installed(plugin("bad", broken), plugin("good", lambda r: register(r, "good")))
    assert registry.conf_packages == ["pkg://good.conf"]
    assert registry.findings == {"good": "good.doctor:finding"}
    assert "'bad'" in capsys.readouterr().err


def test_strict_shows_the_traceback(installed, monkeypatch):
    monkeypatch.setenv(STRICT, "1")
    with pytest.raises(ZeroDivisionError, match="oops"):
        installed(plugin("bad", adds("half", then=ZeroDivisionError("oops"))))


@pytest.mark.parametrize(("kind", "name", "words"), [
    ("adaptor", "x", "no kind 'adaptor'; did you mean 'adapter'"),
    ("adapter", "Bone", "'Bone': a name is lower snake case"), ("adapter", "my-bone", "lower snake case"),
    ("adapter", "", "lower snake case"), ("adapter", "2nd", "lower snake case"),
])
def test_ill_formed_entries_are_refused(kind, name, words):
    with pytest.raises(ConfigError, match=words):
        Registry().add(kind, name, "a:b")


def test_unknown_names_and_kinds_suggest_the_nearest():
    words = r"no adapter named 'boen'; did you mean 'bone'\? \(have: bone, compander"
    with pytest.raises(ConfigError, match=words):
        poise.build("adapter", "boen")
    with pytest.raises(ConfigError, match="no kind 'adaptor'; did you mean 'adapter'"):
        poise.entries("adaptor")
    with pytest.raises(ConfigError, match="no adapter named 'zzz' "):
        poise.describe("adapter", "zzz")


def test_build_checks_options_and_names_the_component():
    assert poise.build("quantizer", "absmax", bits=3) == AbsMax(bits=3)
    with pytest.raises(ConfigError, match="quantizer=absmax has no option 'bit'; did you mean 'bits'"):
        poise.build("quantizer", "absmax", bit=3)
    with pytest.raises(ConfigError, match=r"quantizer=absmax: AbsMax\.bits=1 is not allowed"):
        poise.build("quantizer", "absmax", bits=1)


def test_options_may_be_called_kind_and_name():
    """`build` takes its own arguments by position, so that these stay free for components."""
    assert poise.build("data", "tabular", name="diabetes").name == "diabetes"


def test_build_from_a_configuration_leaves_it_as_it_was(installed):
    registry = installed(plugin("core", adds("absmax", kind="quantizer")))
    config = {"entry": "absmax", "bits": 5}
    assert registry.build_from("quantizer", config) == AbsMax(bits=5)
    assert config == {"entry": "absmax", "bits": 5}


@pytest.mark.parametrize(("component", "words"), [
    ("no_such_module:X", "No module named 'no_such_module'"), ("poise.version:Nothing", "Nothing"),
])
def test_a_component_that_does_not_load_names_its_entry_and_plugin(component, words, installed):
    registry = installed(plugin("ext", lambda r: r.add("model", "far", component)))
    full = rf"model=far of plugin 'ext' does not load \({component}\): .*{words}"
    with pytest.raises(ConfigError, match=full):
        registry.build("model", "far")


def test_describe_prints_what_a_component_says():
    text = poise.describe("quantizer", "absmax")
    for part in ("quantizer=absmax: symmetric", "plugin: core", "arXiv 2308.14352", "tasks:  any",
                 "bits: int = 4", "[>= 2 and <= 8; bits]", "group: int = 64"):
        assert part in text, part


def test_every_kind_is_asked_for_by_its_name():
    assert [e.kind for k in KINDS for e in poise.entries(k)] == [e.kind for e in poise.entries()]


def test_a_missing_module_names_the_extra_and_a_broken_one_its_own_fault(tmp_path, monkeypatch):
    with pytest.raises(MissingExtra, match=r"needs no_such_module, .*pip install 'poise\[bone\]'"):
        require("no_such_module.part", "bone")
    (tmp_path / "half_there.py").write_text("import its_own_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_dependency"):
        require("half_there", "bone")
    assert require("json", "bone").loads("1") == 1
