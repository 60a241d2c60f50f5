"""Options: a wrong one is named with its value and what is allowed; a right one is kept as it is."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.config import PARTS, RunConfig
from poise.errors import ConfigError, DataError, FileError, PoiseError, RunError, nearest
from poise.interfaces import Parts
from poise.options import allowed, check_options, default_of, fits, make, option, type_name
from poise.registry import KINDS

few = settings(max_examples=80, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Sample:
    """Something with one option of every sort."""

    must: int = option(help="has no default")
    rank: int = option(4, "a rank", low=1, high=9)
    rate: float = option(0.5, "a rate", above=0, below=1, unit="1/s")
    mode: str = option("slow", "a mode", choices=("slow", "fast"))
    limit: float | None = option(None, "a limit", above=0)
    widths: list[int] = option([8, 8], "widths", low=1)
    names: list[str] = option([], "names", choices=("x", "y"))
    extra: dict[str, Any] = option({}, "anything by name")
    flag: bool = option(True, "a flag")
    own: int = field(init=False, default=7)

    def __post_init__(self) -> None:
        check_options(self)


def test_defaults_and_right_values_are_kept():
    made = Sample(1)
    assert (made.rank, made.rate, made.widths, made.extra) == (4, 0.5, [8, 8], {})
    given = {"must": -3, "rank": 9, "rate": 0.999, "mode": "fast", "limit": 1e-9, "widths": [1],
             "names": ["y", "x"], "extra": {"a": [1, None]}, "flag": False}
    made = Sample(**given)
    assert {k: getattr(made, k) for k in given} == given
    assert Sample(1, widths=[]).widths == []


def test_lists_and_dicts_are_not_shared_between_instances():
    first, second = Sample(1), Sample(1)
    first.widths.append(3)
    first.extra["a"] = 1
    assert second.widths == [8, 8] and second.extra == {} and Sample(1).widths == [8, 8]


@pytest.mark.parametrize(("options", "words"), [
    ({"rank": 0}, "Sample.rank=0 is not allowed: it must be >= 1 and <= 9"),
    ({"rank": 10}, "Sample.rank=10 is not allowed: it must be >= 1 and <= 9"),
    ({"rank": 2.0}, "Sample.rank=2.0 has the wrong type: allowed is int"),
    ({"rank": True}, "Sample.rank=True has the wrong type: allowed is int"),
    ({"rank": "4"}, "Sample.rank='4' has the wrong type: allowed is int"),
    ({"rank": None}, "Sample.rank=None has the wrong type: allowed is int"),
    ({"rate": 0.0}, "Sample.rate=0.0 is not allowed: it must be > 0 and < 1"),
    ({"rate": 1}, "Sample.rate=1 is not allowed: it must be > 0 and < 1"),
    ({"rate": float("nan")}, "Sample.rate=nan is not allowed"),
    ({"rate": False}, "Sample.rate=False has the wrong type: allowed is float"),
    ({"mode": "sow"}, "Sample.mode='sow' is not allowed: it must be one of slow, fast"),
    ({"limit": -1.0}, "Sample.limit=-1.0 is not allowed: it must be > 0"),
    ({"limit": "no"}, "Sample.limit='no' has the wrong type: allowed is float or null"),
    ({"widths": [4, 0]}, r"Sample.widths=\[4, 0\] is not allowed: it must be >= 1"),
    ({"widths": [4, 1.5]}, r"Sample.widths=\[4, 1.5\] has the wrong type: allowed is list\[int\]"),
    ({"widths": 4}, r"Sample.widths=4 has the wrong type: allowed is list\[int\]"),
    ({"widths": (4,)}, r"Sample.widths=\(4,\) has the wrong type"),
    ({"names": ["x", "z"]}, r"Sample.names=\['x', 'z'\] is not allowed: it must be one of x, y"),
    ({"extra": {1: 2}}, r"Sample.extra=\{1: 2\} has the wrong type: allowed is dict\[str, Any\]"),
    ({"flag": 1}, "Sample.flag=1 has the wrong type: allowed is bool"),
])
def test_a_wrong_option_is_named_with_value_and_what_is_allowed(options, words):
    with pytest.raises(ConfigError, match=words):
        Sample(1, **options)
    with pytest.raises(ConfigError, match=f"^sample=it: {words}"):
        make(Sample, {"must": 1, **options}, "sample=it")


def test_unknown_and_missing_options_are_named():
    words = (r"^sample=it has no option 'rnak'; did you mean 'rank'\? \(options: extra, flag, limit, mode, "
             r"must, names, rank, rate, widths\)$")
    with pytest.raises(ConfigError, match=words):
        make(Sample, {"must": 1, "rnak": 3}, "sample=it")
    with pytest.raises(ConfigError, match="sample=it has no option 'own'"):
        make(Sample, {"must": 1, "own": 3}, "sample=it")
    with pytest.raises(ConfigError, match=r"^sample=it needs the option 'must': has no default$"):
        make(Sample, {}, "sample=it")
    assert make(Sample, {"must": 2, "rank": 3}, "sample=it") == Sample(2, rank=3)


def test_what_is_allowed_in_words():
    words = {f.name: allowed(f) for f in dataclasses.fields(Sample)}
    assert words == {"must": "", "rank": ">= 1 and <= 9", "rate": "> 0 and < 1",
                     "mode": "one of slow, fast", "limit": "> 0", "widths": ">= 1",
                     "names": "one of x, y", "extra": "", "flag": "", "own": ""}
    found = {f.name: default_of(f) for f in dataclasses.fields(Sample)}
    assert found["must"] is dataclasses.MISSING and found["widths"] == [8, 8] and found["limit"] is None


@few
@given(st.integers(-5, 15))
def test_an_integer_is_taken_exactly_in_its_range(value):
    if 1 <= value <= 9:
        assert Sample(1, rank=value).rank == value
    else:
        with pytest.raises(ConfigError, match=f"rank={value} "):
            Sample(1, rank=value)


@few
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_float_is_taken_exactly_in_its_range(value):
    if 0 < value < 1:
        assert Sample(1, rate=value).rate == value
    else:
        with pytest.raises(ConfigError):
            Sample(1, rate=value)


@pytest.mark.parametrize(("value", "hint", "holds"), [
    (3, float, True), (3, int, True), (3.0, int, False), (True, int, False), (True, bool, True),
    (None, int | None, True), ("x", int | None, False), ([1], list[int], True),
    ([1, "a"], list[int], False),
    ({"a": 1}, dict[str, int], True), ({"a": "b"}, dict[str, int], False), (object(), Any, True),
    ([], list[str], True), ([[1]], list[list[int]], True), (None, type(None), True),
])
def test_what_fits_a_type(value, hint, holds):
    assert fits(value, hint) is holds


def test_types_in_words():
    assert type_name(int | None) == "int or null" and type_name(list[int]) == "list[int]"
    assert type_name(dict[str, Any]) == "dict[str, Any]"


def test_the_nearest_word():
    assert nearest("afine", ["absmax", "affine"]) == "; did you mean 'affine'?"
    assert nearest("zzz", ["absmax", "affine"]) == "" and nearest("x", []) == ""


# ------------------------------------------------------------------ the configuration of a run


def plain(**replaced):
    return {**{p: {"entry": "none"} for p in PARTS}, "train": {"steps": 3}, **replaced}


def test_a_run_has_one_part_of_every_kind_but_commands():
    assert set(PARTS) == set(KINDS) - {"command"}
    assert set(PARTS) == {f.name for f in fields(Parts)} - {"train", "names"} | {"recipe", "tracker"}


def test_a_configuration_survives_being_plain():
    config = RunConfig.from_plain(plain(seed=4, adapter={"entry": "bone", "r": 8}))
    assert RunConfig.from_plain(config.plain()) == config
    assert config.component("model") is None and config.component("adapter") == {"entry": "bone", "r": 8}
    assert config.train.steps == 3 and config.train.batch_size == 64


@pytest.mark.parametrize(("replaced", "words"), [
    ({"sede": 1}, "no key 'sede'; did you mean 'seed'"), ({"seed": "x"}, "seed='x': allowed is int"),
    ({"seed": -1}, r"seed=-1: allowed is 0 <= seed < 2\*\*63"), ({"seed": 2**63}, "seed="),
    ({"threads": 0}, "threads=0: allowed is 1 to 1024"), ({"device": 3}, "device=3: allowed is str"),
    ({"model": "mlp"}, "model='mlp' is not a component: write model=NAME"),
    ({"model": {"hidden": 3}}, "is not a component"), ({"model": None}, "model=None is not a component"),
    ({"version": 99}, "version=99: .* another version of Poise; this one reads version 2"),
    ({"version": 1}, r"earlier Poise \(version 1\); .*target_modules and exclude_modules .*overrides"),
    ({"train": {"step": 3}}, "train has no option 'step'; did you mean 'steps'"),
    ({"train": {"lr": -1.0}}, "train: Train.lr=-1.0 is not allowed: it must be >= 0"),
    ({"train": {"schedule": "cos"}}, "must be one of constant, linear, cosine"),
])
def test_a_wrong_configuration_is_named(replaced, words):
    with pytest.raises(ConfigError, match=words) as caught:
        RunConfig.from_plain(plain(**replaced))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("train", [None, 3, [1]])
def test_a_train_that_is_no_mapping_is_refused(train):
    with pytest.raises(PoiseError):
        RunConfig.from_plain(plain(train=train))


@pytest.mark.parametrize("broken", ["a\nb", "a\r\nb", "a\u2028b\x85c", "a\x1cb\x0bc\x0cd"])
@pytest.mark.parametrize("kind", [ConfigError, DataError, FileError, RunError])
def test_an_error_is_one_line_whatever_it_quotes(kind, broken):
    said = str(kind(f"model={broken}: no such model"))
    assert len(said.splitlines()) == 1 and said.endswith(": no such model")
    assert said.encode().decode("unicode_escape").startswith("model=a")
    assert str(pickle.loads(pickle.dumps(kind(said)))) == said
