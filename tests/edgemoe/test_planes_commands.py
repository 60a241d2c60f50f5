"""Planes and bases from the command line and in runs: what is said of every answer, what is refused."""

from __future__ import annotations

import csv

import pytest
from test_generate_run import SHORT
from test_moe_flags import call, limit, place  # noqa: F401 (fixtures)

import poise
from poise.errors import ConfigError
from poise.interfaces import Parts
from poise.runs.context import RunContext
from poise_edgemoe import EdgeMoEStore
from poise_edgemoe.store.index import read_index

TINY = {"layers": 2, "experts": 8, "hidden": 64, "inner": 64, "steps": 2, "length": 64, "batch_size": 2}
PLANES = {"byte_moe": TINY, "bits": 4, "hot": "raw", "context": 64, "planes": 2}


def test_it_converts_serves_and_says_what_bases_have_served(call, place, tmp_path):  # noqa: F811
    store = tmp_path / "planes"
    code, out, err = call("convert", "model", str(store), "--group", "8", "--planes", "2")
    assert code == 0 and out.strip() == str(store), err
    assert read_index(store).planes == 2
    code, out, _ = call("inspect", str(store))
    assert code == 0 and "gate_up_low, 4 bits, affine, group 8, 2 planes" in out
    words = ["--prompt", "On ", "--context", "64", "--max-new-tokens", "12", "--kernel", "reference"]
    told = {}
    for share in (None, "0", "0.25", "1"):
        more = [] if share is None else ["--base-share", share]
        code, told[share], err = call("generate", str(store), *words, "--memory", limit(store, 3), *more)
        last = err.strip().splitlines()[-1]
        assert code == 0 and "uses of experts" in last and last.endswith("were served from bases")
        served = float(last.split("(")[1].split(" %")[0])
        assert served == 0 if share in (None, "0") else 0 < served <= 100 * float(share)
    assert told[None] == told["0"]
    code, _, err = call("generate", "store", *words)
    assert code == 0 and "bases" not in err


@pytest.mark.parametrize(("words", "told"), [
    (["--planes", "3"], "planes"), (["--planes", "two"], "planes"),
    (["--planes", "2", "--bits", "2"], "planes=2 does not fit bits=2: it takes codes of 4 or 8 bits"),
    (["--planes", "2", "--bits", "16"], "planes=2 does not fit bits=16"),
    (["--planes", "2", "--scheme", "q4_0"], "planes=2 does not fit scheme=q4_0"),
    (["--planes", "2", "--layout", "ggml"], "planes=2 does not fit layout=ggml"),
    (["--planes", "2", "--plan", "half.json", "--bits", "32"], "planes=2 does not fit bits=32"),
])
def test_what_has_no_planes_is_refused(words, told, call):  # noqa: F811
    code, out, err = call("convert", "model", "new", *words)
    assert code == 2 and not out and told in err and err.count("\n") == 1


@pytest.mark.parametrize(("share", "told"), [
    ("0.5", "base_share=0.5 has no effect: the store has no bases; convert it with planes=2"),
    ("1.5", "base-share"), ("-1", "base-share"), ("nan", "base-share"), ("much", "base-share"),
])
def test_a_share_that_cannot_be_had_is_refused(share, told, call):  # noqa: F811
    code, out, err = call("generate", "store", "--prompt", "On ", f"--base-share={share}")
    assert code == 2 and not out and err.count("\n") == 1
    assert told in err or told.replace("-", "_") in err


@pytest.mark.parametrize(("options", "told"), [
    ({"planes": 3}, "planes"), ({"planes": 2, "bits": 2}, "planes=2 does not fit bits=2"),
    ({"planes": 2, "scheme": "q4_k"}, "planes=2 does not fit scheme=q4_k"),
    ({"base_share": 0.1}, "base_share=0.1 has no effect: the store has no bases"),
    ({"planes": 2, "base_share": 1.1}, "base_share"),
    ({"planes": 2, "store": "there"}, "planes=2 has no effect beside store=there"),
])
def test_a_component_refuses_the_same(options, told):
    with pytest.raises(ConfigError, match=told):
        EdgeMoEStore(**options)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_run_says_of_every_answer_what_bases_have_served(share, tmp_path, monkeypatch):
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    memory = limit(EdgeMoEStore(**PLANES).folder(), 6)
    model = EdgeMoEStore(**PLANES, memory=memory, base_share=share)
    context, data = RunContext(tmp_path / "run", quiet=True), poise.build("data", "sotu")
    metrics = SHORT.run(Parts(data=data, model=model), context)
    with open(tmp_path / "run" / "steps.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    answers = context.records.notes["served from bases"]
    tokens = [r for r in rows if r["part"] == "token"]
    for said in answers:
        own = [r for r in tokens if int(r["prompt"]) == said["prompt"]]
        assert said["uses"] == sum(int(r["hits"]) + int(r["misses"]) for r in own)
        assert said["from_base"] == sum(int(r["from_base"]) for r in own) <= share * said["uses"]
    assert metrics["base_share"] == sum(a["from_base"] for a in answers) / sum(a["uses"] for a in answers)
    assert (metrics["base_share"] > 0) == (share > 0)
    assert metrics["loss"] > 0
