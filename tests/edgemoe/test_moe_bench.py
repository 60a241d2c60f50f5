"""Hits that are simulated, expected, and counted by an engine; what `bench` and `plan` print."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
import torch
from cases import some
from moe_models import saved
from test_moe_flags import limit
from test_traces import COLUMNS, HEAD, ROWS, write

from poise.cli.main import main
from poise.models.tokenizers import ByteTokenizer
from poise_edgemoe import Engine, convert
from poise_edgemoe.bench import record
from poise_edgemoe.cache import RoutingTrace, make_policy, read_frequencies, read_trace, simulate
from poise_edgemoe.cache.hits import RECORDED, SHARES, hits_of, hits_of_all, likely_hits, slots_at
from poise_edgemoe.store.index import read_index

PROMPT = "My fellow Americans, "
NAMES = ["expected", "fld_lru", "lru", "layer_lru", "lfu", "layer_lfu", "static", "paper_literal",
         "paper_intent", "belady"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return convert(saved(folder / "model", "qwen3_moe"), folder / "store", bits=32)


@pytest.fixture
def moe(capsys, tmp_path, monkeypatch):
    """Return a function from words to stdout and stderr of `poise moe`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        assert main(["moe", *map(str, words)]) == 0
        return capsys.readouterr()

    return call


def table(text):
    """Return the rows of a printed table: policy to cells, the best one's mark left on."""
    rows = [line.split() for line in text.splitlines() if line]
    return {row[0]: row[1:] for row in rows if row[0] in NAMES}


# ------------------------------------------------------------------ a store


@pytest.mark.parametrize("experts", some([3, 5], keep=[3]))
@pytest.mark.parametrize("policy", ["expected", "lru", "lfu", "fld_lru", "paper_intent"])
def test_what_is_simulated_is_what_the_engine_counts(policy, experts, store):
    """T21 through the front door: the routing is recorded under another policy, at the same limit."""
    memory, text = limit(store, experts), PROMPT
    trace = record(str(store), read_index(store), [memory], text, 24, 64)
    rule = make_policy(policy, layers=2, experts=4)
    with Engine.open(store, memory=memory, context=64, policy=rule) as engine:
        made = engine.stream(torch.tensor([ByteTokenizer().encode(text)]), 24, do_sample=True, seed=0)
        next(made)
        before = engine.stats()["hits"]
        list(made)
        counted = engine.stats()["hits"] - before
    found = simulate(trace.prompt + trace.decode, experts, policy, warm=len(trace.prompt), pins=True)
    assert found.hits == counted and found.hits + found.misses == len(trace.decode) > 40


def test_the_table_of_a_store(store, moe, tmp_path):
    said = moe("bench", store, "--simulate", "--context", 64, "--max-new-tokens", 16, "--prompt", PROMPT,
               "--frequencies-out", "uses.json", "--out", "hits.png")
    assert "recording the routing of" in said.err and "give --memory" in said.out
    rows = table(said.out)
    assert list(rows) == [n for n in NAMES if n != "static"]
    trace = record(str(store), read_index(store), [], PROMPT, 16, 64)
    for n, share in enumerate(range(10, 100, 10)):
        column = {name: cells[n] for name, cells in rows.items()}
        slots = slots_at(trace, share / 100)
        assert column["lru"].rstrip("*") == f"{100 * hits_of(trace, slots, 'lru'):.1f}"
        rates = {k: float(v.rstrip("*")) for k, v in column.items() if v != "-" and k != "belady"}
        assert [k for k, v in column.items() if v.endswith("*")] == [max(rates, key=rates.__getitem__)]
        # equal shares stream experts past the cache, which this optimum does not
        assert max(v for k, v in rates.items() if "layer_" not in k) <= float(column["belady"])
    assert rows["layer_lru"][0] == "-"  # one place for two layers
    assert (tmp_path / "hits.png").read_bytes()[:4] == b"\x89PNG"
    uses = read_frequencies(tmp_path / "uses.json")
    assert sum(uses.values()) == pytest.approx(len(trace.decode) / 15)  # the first token is the prompt's


def test_what_to_take_under_a_limit(store, moe):
    moe("bench", store, "--simulate", "--context", 64, "--max-new-tokens", 16, "--prompt", PROMPT,
        "--frequencies-out", "uses.json")
    limits = [limit(store, 3), limit(store, 5)]
    said = moe("bench", store, "--simulate", "--context", 64, "--max-new-tokens", 16, "--prompt", PROMPT,
               "--memory", limits[0], "--memory", limits[1], "--frequencies", "uses.json")
    rows = table(said.out)
    assert list(rows) == NAMES and all(len(cells) == 2 for cells in rows.values())
    assert said.out.splitlines()[3].split() == ["experts", "kept", "3", "5"]
    for n, name in enumerate(limits):
        (best,) = (k for k, cells in rows.items() if cells[n].endswith("*"))
        assert f"{name}: take --policy {best}, {rows[best][n].rstrip('*')} % of hits" in said.out
    used = moe("generate", store, "--prompt", PROMPT, "--context", 64, "--memory", limits[0], "--policy",
               "static", "--frequencies", "uses.json", "--max-new-tokens", 4)
    assert used.out.startswith(PROMPT)


def test_without_a_prompt_the_packaged_speeches_are_taken(store):
    trace = record(str(store), read_index(store), [], None, None, 64)
    assert len(trace.decode) == 31 * 2 * 2 and trace.layers == 2 and trace.experts == 4


# ------------------------------------------------------------------ a recording


def test_the_table_of_a_recording(moe, tmp_path):
    path = write(tmp_path / "t.route.csv.gz", HEAD + COLUMNS + ROWS)
    said = moe("bench", path, "--simulate", "--memory", "60B")  # 3 experts of 20 bytes
    rows = table(said.out)
    (best,) = (cells[0] for cells in rows.values() if cells[0].endswith("*"))
    trace = read_trace(path)
    assert rows["lru"][0].rstrip("*") == f"{100 * hits_of(trace, 3, 'lru'):.1f}"
    assert float(best[:-1]) == max(float(v[0].rstrip("*")) for k, v in rows.items() if k != "belady")
    assert "of 5 uses of 2 x 8 experts" in said.out and "3 of 16 experts kept" in said.out


def test_a_recording_that_fits_leaves_nothing_to_choose(capsys, tmp_path):
    path = write(tmp_path / "t.route.csv.gz", HEAD + COLUMNS + ROWS)
    assert main(["moe", "bench", str(path), "--simulate", "--memory", "320B"]) == 2
    assert "--memory 320B has no effect, as all experts stay in memory" in capsys.readouterr().err


def test_layers_of_an_encoder_leave_first():
    """Layer 0 is an encoder's: `expected` that knows it never evicts a decoder's expert for it."""
    decode = [(1, token % 2) for token in range(12)]
    from poise_edgemoe.cache import RoutingTrace

    trace = RoutingTrace(2, 3, (1, 1), ((0, 0), (0, 1), (0, 2), (1, 0)), tuple(decode))
    plain, told = (hits_of_all(trace, [3], None, e)["expected"][0] for e in ((), (0,)))
    assert told == 11 / 12 >= plain


# ------------------------------------------------------------------ what is expected


def test_the_expected_hits_lie_between_random_routing_and_the_best_recording():
    for share in (0.0, 0.03, 0.1, 0.25, 0.5, 0.97, 1.0):
        least, most = likely_hits(share)
        assert least == share <= most <= 1
    for n, percent in enumerate(SHARES):
        best = max(row[n] for row in RECORDED.values()) / 100
        assert likely_hits(percent / 100)[1] == pytest.approx(best)


def test_a_plan_says_which_hits_to_expect(store, moe, tmp_path):
    path = write(tmp_path / "t.route.csv.gz", HEAD + COLUMNS + ROWS)
    given = ("plan", store, "--context", 64, "--memory", limit(store, 4))
    said = moe(*given).out
    assert "experts kept, 50%" in said
    assert "hits to expect: 50% if routing is random, up to 96% if it is as in the best of three" in said
    said = moe(*given, "--trace", path).out
    share = hits_of(read_trace(path), 8)
    assert f"hits to expect: {share:.0%} (simulated: 8 of the 16 experts in {path})" in said


@pytest.mark.shared
@pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
@pytest.mark.parametrize("every", some([10, 1], keep=[10]))
@pytest.mark.parametrize(("model", "name"), zip(RECORDED, ("qwen", "gemma", "gptoss")))
def test_the_recorded_hits_are_those_of_the_traces(model, name, every):
    trace = read_trace(Path(os.environ["POISE_DATA"], "traces", f"{name}.route.csv.gz"))
    assert re.match(name[:3], model.lower())
    for n in range(0, len(SHARES), every):
        found = 100 * hits_of(trace, slots_at(trace, SHARES[n] / 100))
        assert found == pytest.approx(RECORDED[model][n], abs=0.051), SHARES[n]


@pytest.mark.parametrize("seed", some(range(6), keep=[0]))
def test_no_policy_is_above_the_optimum_at_any_size(seed):
    """Policies pin and let pass; those that share by layer leave room unused: the optimum bounds all."""
    draw = random.Random(seed)
    uses = tuple((n, e) for _ in range(60) for n in range(3) for e in sorted(draw.sample(range(6), 2)))
    trace = RoutingTrace(3, 6, (1, 1, 1), uses[:12], uses[12:])
    found = hits_of_all(trace, range(1, 19))
    for n, most in enumerate(found["belady"]):
        assert all((rates[n] or 0) <= most + 1e-12 for rates in found.values())
