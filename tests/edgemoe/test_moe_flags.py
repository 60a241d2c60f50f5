"""A flag that changes nothing in the case at hand is refused in one line: what, why, what to do."""

from __future__ import annotations

import bisect
import json

import pytest
import torch
from moe_models import ids, reference, saved

from poise.cli.main import main
from poise.errors import ConfigError, DataError, FileError
from poise_edgemoe import Engine, convert
from poise_edgemoe.budget import plan_memory
from poise_edgemoe.cache import make_policy, policy_for, read_frequencies, write_frequencies
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.store.index import read_index


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of 2 layers of 4 experts, its store in full precision, plans, frequencies."""
    folder = tmp_path_factory.mktemp("flags")
    source = saved(folder / "model", "qwen3_moe")
    convert(source, folder / "store", bits=32)
    (folder / "all.json").write_text(json.dumps({"*.experts.*": 8}))
    (folder / "half.json").write_text(json.dumps({"*.down": 8}))
    (folder / "empty.json").write_text("{}")
    write_frequencies(folder / "uses.json", {(0, 1): 0.5, (1, 3): 0.25})
    return folder


@pytest.fixture
def call(place, capsys, monkeypatch):
    """Return a function from words to exit code, stdout and stderr of `poise moe` in that folder."""
    monkeypatch.chdir(place)

    def moe(*words):
        code = main(["moe", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return moe


def limit(store, experts):
    """Return the least limit that leaves room for that many experts, in a context of 64."""
    largest = max(size_of(m) for _, _, m in read_index(store).blobs())

    def room(memory):
        try:
            budget = plan_memory(store, memory=memory, context=64)
        except ConfigError:
            return -1
        return (budget.experts - budget.staging) // largest

    return f"{bisect.bisect_left(range(10**7), experts, key=room)}B"


CONVERT = [
    (["--bits", "32", "--group", "8"], "group=8 has no effect: 16 and 32 bits are not quantized"),
    (["--bits", "16", "--scheme", "sym_group"], "scheme=sym_group has no effect: 16 and 32 bits are not"),
    (["--scheme", "sym_channel", "--group", "8"], "group=8 has no effect: scheme sym_channel does not"),
    (["--scheme", "absmax", "--group", "8"], "group=8 has no effect: scheme absmax does not take it"),
    (["--bits", "32", "--hot", "bf16"], "hot=bf16 has no effect: with 32 bits the rest keeps the model's"),
    (["--plan", "empty.json"], "plan has no effect: it names nothing"),
    (["--plan", "all.json", "--bits", "4"], "bits=4 has no effect: the plan names every expert's matrices"),
]


@pytest.mark.parametrize(("words", "told"), CONVERT)
def test_of_a_conversion(words, told, call):
    code, out, err = call("convert", "model", "new", *words)
    assert code == 2 and not out and told in err and err.count("\n") == 1 and "leave" in err


@pytest.mark.parametrize("words", [
    ["--bits", "32"], ["--bits", "32", "--hot", "raw"], ["--bits", "16", "--hot", "bf16"],
    ["--plan", "half.json", "--bits", "16", "--group", "8"], ["--plan", "all.json", "--bits", "32"],
    ["--scheme", "asym_group", "--group", "8"],
])
def test_what_has_an_effect_is_taken(words, call, place, tmp_path):
    code, _, err = call("convert", "model", str(tmp_path / "new"), *words)
    assert code == 0, err


LIMIT = object()  # stands for a limit that leaves room for 3 of 8 experts
GENERATE = [
    (["--policy", "lru"], "policy=lru has no effect, as all experts stay in memory: leave it out"),
    (["--policy", "expected"], "policy=expected has no effect, as all experts stay in memory"),
    (["--policy", "static", "--frequencies", "uses.json"], "policy=static has no effect, as all experts"),
    ([LIMIT, "--frequencies", "uses.json"], "policy 'expected' has no option 'frequencies'"),
    ([LIMIT, "--policy", "lru", "--freq-source", "online"], "policy 'lru' has no option 'freq_source'"),
    ([LIMIT, "--policy", "static", "--frequencies", "uses.json", "--freq-source", "mixed"],
     "policy 'static' has no option 'freq_source': it has frequencies; leave it out, or take paper_"),
    ([LIMIT, "--policy", "paper_intent", "--frequencies", "uses.json", "--freq-source", "online"],
     "frequencies have no effect with freq_source=online"),
    ([LIMIT, "--policy", "paper_intent", "--freq-source", "offline"], "needs frequencies"),
    ([LIMIT, "--policy", "static"], "policy 'static' needs frequencies"),
    (["--prefetch", "oracle"], "prefetch=oracle needs a trace"),
    (["--trace", "t.csv.gz"], "trace=t.csv.gz has no effect: only prefetch=oracle listens to it"),
    (["--prefetch", "predictor"], "prefetch=predictor needs a predictor: give predictor=FILE.json"),
    ([LIMIT, "--policy", "predicted"], "policy=predicted needs a predictor"),
    (["--predictor", "p.json", "--prefetch", "none"], "has no effect: neither prefetch=none nor policy="),
    (["--temperature", "1"], "--temperature 1.0 has no effect without --do-sample"),
    (["--top-k", "3"], "--top-k 3 has no effect without --do-sample"),
    (["--top-p", "0.5"], "--top-p 0.5 has no effect without --do-sample"),
    (["--seed", "3"], "--seed 3 has no effect without --do-sample"),
]


@pytest.mark.parametrize(("words", "told"), GENERATE)
def test_of_a_generation(words, told, call, place):
    given = [w for word in words
             for w in (["--memory", limit(place / "store", 3)] if word is LIMIT else [word])]
    code, out, err = call("generate", "store", "--prompt", "On ", "--context", "64", *given)
    assert code == 2 and not out and told in err and err.count("\n") == 1


BENCH = [
    (["store", "--simulate", "--out", "h.pdf"], "--out h.pdf is no picture"),
    (["store", "--simulate", "--memory", "9GB"], "--memory 9GB has no effect, as all experts stay in"),
    (["gone.csv.gz", "--simulate", "--prompt", "x"], "--prompt has no effect on a recording"),
    (["gone.csv.gz", "--simulate", "--max-new-tokens", "3"], "--max-new-tokens has no effect on a"),
    (["gone.csv.gz", "--simulate", "--context", "30"], "--context has no effect on a recording"),
    (["gone.csv.gz", "--simulate"], "gone.csv.gz cannot be read as a routing trace"),
]


@pytest.mark.parametrize(("words", "told"), BENCH)
def test_of_a_simulation(words, told, call):
    code, out, err = call("bench", *words)
    assert code in (1, 2) and not out and told in err and err.count("\n") == 1


def test_of_a_plan(call):
    code, out, err = call("plan", "store", "--trace", "t.csv.gz")
    assert code == 2 and not out and "--trace t.csv.gz has no effect, as all experts stay in memory" in err


def test_more_memory_than_everything_takes_is_allowed_and_said(call, place):
    code, out, _ = call("plan", "store", "--memory", "9GB")
    assert code == 0 and "all experts stay in memory" in out and "hits to expect: all" in out
    with Engine.open(place / "store", memory="9GB") as engine:
        assert "(all kept)" in engine.opening()


# ------------------------------------------------------------------ policies that were made


def test_a_policy_that_was_made_serves_one_engine(place):
    index = read_index(place / "store")
    uses = read_frequencies(place / "uses.json")
    assert uses == {(0, 1): 0.5, (1, 3): 0.25}
    rule = policy_for(index, "static", frequencies=uses)
    given = {"memory": limit(place / "store", 3), "context": 64, "policy": rule}
    with Engine.open(place / "store", **given) as engine:
        assert torch.equal(engine.generate(ids(), 12), reference(place / "model").generate(ids(), 12))
        assert {(0, 1), (1, 3)} & set(engine.cache.resident) and engine.cache.policy is rule
    with pytest.raises(ConfigError, match="'static' is, or was, another engine's: make a new one"):
        Engine.open(place / "store", **given)
    with pytest.raises(ConfigError, match="the policy is for 3 layers of 4 experts, the store has 2 of 4"):
        Engine.open(place / "store", policy=make_policy("lru", layers=3, experts=4))


def test_a_library_call_with_a_policy_that_has_no_effect(place):
    Engine.open(place / "store", policy="expected").close()  # the default: nobody can tell
    with pytest.raises(ConfigError, match="policy=lru has no effect, as all experts stay in memory"):
        Engine.open(place / "store", policy="lru")


@pytest.mark.parametrize(("text", "told"), [
    ("[1]", "holds no frequencies"), ("{}", "holds no frequencies"),
    ('{"a": 1}', "'a' names no expert"), ('{"1": 1}', "'1' names no expert"),
    ('{"0,-1": 1}', "'0,-1' names no expert"), ('{"0,1": -1}', "'0,1' has -1 uses per token"),
    ('{"0,1": true}', "has True uses"), ('{"0,1": "x"}', "has 'x' uses"),
    ('{"0,1": Infinity}', "has inf uses"),
])
def test_what_holds_no_frequencies_is_told(text, told, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises((DataError, FileError)) as caught:
        read_frequencies(tmp_path / "f.json")
    assert told in str(caught.value) and "f.json" in str(caught.value)


def test_frequencies_of_experts_that_there_are_not(place):
    with pytest.raises(ConfigError, match=r"frequencies name \(2, 0\): there are 2 x 4 experts"):
        policy_for(read_index(place / "store"), "static", frequencies={(2, 0): 1.0})


# ------------------------------------------------------------------ the rest of a model


@pytest.mark.parametrize(("bits", "hot", "dtype"), [
    (32, None, "float32"), (32, "bf16", "float32"), (32, 8, "bfloat16"), (4, None, "bfloat16"),
    (16, "bf16", "bfloat16"), (16, "raw", "float32")])
def test_what_the_rest_is_stored_as(bits, hot, dtype, place, tmp_path):
    given = {} if hot is None else {"hot": hot}
    store = convert(place / "model", tmp_path / "store", bits=bits, **given)
    assert read_index(store).dtype == dtype


def test_the_default_is_what_the_signature_says():
    import inspect

    assert inspect.signature(convert).parameters["hot"].default == "bf16"
    assert inspect.signature(Engine.open).parameters["policy"].default == "expected"
