"""Recorded routing in an engine is used as it was recorded, and its hits are the simulator's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from moe_models import ids, saved

from poise.errors import ConfigError
from poise.testing.families import tiny
from poise_edgemoe.cache import RoutingTrace, read_trace, simulate
from poise_edgemoe.engine import Engine
from poise_edgemoe.replay import Recorded, Replay, mapped, replay
from poise_edgemoe.store.writer import convert

# 4 layers of 6 experts: a prompt, and three tokens
TRACE = RoutingTrace(4, 6, (10, 20, 30, 40), tuple((n, e) for n in range(4) for e in range(6)), (
    (0, 1), (0, 4), (1, 0), (1, 5), (2, 2), (2, 3), (3, 0), (3, 3),
    (0, 0), (0, 2), (1, 1), (1, 2), (2, 2), (2, 5), (3, 4), (3, 5),
    (0, 3), (0, 5), (1, 3), (1, 4), (2, 0), (2, 1), (3, 1), (3, 2)))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    return convert(saved(folder / "model", "qwen3_moe", num_hidden_layers=2), folder / "store", bits=32)


def opened(store, experts, policy="expected", **options):
    from test_engine import opened

    return opened(store, experts, policy=policy, **options)


def test_a_trace_is_mapped_onto_other_layers_and_experts():
    small = mapped(TRACE, 2, 4)  # layers 0 and 2; experts 4 and 5 are 0 and 1
    assert (small.layers, small.experts, small.layer_bytes) == (2, 4, (10, 30))
    assert small.prompt == tuple((n, e) for n in range(2) for e in range(4))
    assert small.decode == ((0, 0), (0, 1), (1, 2), (1, 3), (0, 0), (0, 2), (1, 1), (1, 2),
                            (0, 1), (0, 3), (1, 0), (1, 1))
    large = mapped(TRACE, 8, 6)
    assert [e for m, e in large.decode[:16]] == [1, 4, 1, 4, 0, 5, 0, 5, 2, 3, 2, 3, 0, 3, 0, 3]
    assert mapped(TRACE, 4, 6) == TRACE
    assert mapped(TRACE, 1, 6).decode == ((0, 1), (0, 4), (0, 0), (0, 2), (0, 3), (0, 5))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("length", [2, 3, 9])
@pytest.mark.parametrize("experts", [2, 4])
def test_the_engine_uses_what_was_recorded(experts, rows, length, store):
    with opened(store, experts, context=64) as engine, replay(engine, TRACE) as state:
        engine.cache.recorded = []
        engine.generate(ids(rows, length), 5)  # the last token is not fed: four are
        want = state.trace.prompt + state.trace.decode + state.trace.decode[:4]
        assert state.tokens == 4 and len(engine.cache.recorded) == len(want)
        if experts == 4:  # room for a layer
            assert tuple(engine.cache.recorded) == want
        assert sorted(engine.cache.recorded) == sorted(want)


def test_experts_of_a_token_weigh_the_same(tmp_path):
    model = tiny("mixtral")
    with torch.no_grad():  # experts of a layer that are all the same: weights sum to 1, whoever is chosen
        for block in model.model.layers:
            for p in block.mlp.experts.parameters():
                p.copy_(p[:1].expand_as(p))
    store = convert(model, tmp_path / "store", bits=32)
    with opened(store, None) as engine:
        plain = engine.logits(ids(2, 9))
        with replay(engine, TRACE):
            assert torch.allclose(engine.logits(ids(2, 9)), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["expected", "lru", "lfu", "fld_lru", "paper_intent"])
@pytest.mark.parametrize("experts", [1, 3, 4, 5, 8])
def test_engine_and_simulator_count_the_same_hits_on_a_replayed_trace(policy, experts, store):
    with opened(store, experts, policy=policy) as engine, replay(engine, TRACE) as state:
        engine.cache.recorded = []
        engine.generate(ids(), 4)
        trace = state.trace.prompt + state.trace.decode if experts >= 4 else engine.cache.recorded
        found = simulate(trace, experts, policy, pins=True)
        assert (engine.stats()["hits"], engine.stats()["misses"]) == (found.hits, found.misses)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen", "gemma", "gptoss"])
def test_real_traces_hit_as_simulated(name, tmp_path):
    if not os.environ.get("POISE_DATA"):
        pytest.skip("POISE_DATA is not set")
    trace = read_trace(Path(os.environ["POISE_DATA"], "traces", f"{name}.route.csv.gz"))
    model = tiny("olmoe", num_hidden_layers=3, num_experts=16, num_experts_per_tok=4,
                 max_position_embeddings=256)
    store = convert(model, tmp_path / "store", bits=4, group=8)
    with opened(store, 20, context=160, batch=1) as engine, replay(engine, trace) as state:
        done = engine.generate(ids(1, 24), 41)
        assert done.shape[1] == 24 + 41 and state.tokens == 40
        decode = state.trace.decode
        ends = [i for i in range(1, len(decode)) if decode[i][0] < decode[i - 1][0]]
        found = simulate(state.trace.prompt + decode[: ends[39]], 20, pins=True)
        stats = engine.stats()
        assert (stats["hits"], stats["misses"]) == (found.hits, found.misses) and 0 < found.hit_rate < 1


def test_after_a_replay_the_routers_speak_again(store):
    with opened(store, None) as engine:
        want = engine.logits(ids())
        with pytest.raises(RuntimeError, match="stop"), replay(engine, TRACE):
            assert not torch.equal(engine.logits(ids()), want)
            raise RuntimeError("stop")
        assert torch.equal(engine.logits(ids()), want)


def test_what_cannot_be_replayed_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="layers=0 is not allowed"):
        mapped(TRACE, 0, 4)
    nothing = RoutingTrace(4, 6, (1,) * 4, TRACE.prompt, ())
    with opened(store, None) as engine, pytest.raises(ConfigError, match="no decoded tokens"), \
            replay(engine, nothing):
        pass
    switch = convert(tiny("switch_transformers"), tmp_path / "switch", bits=32)
    with Engine.open(switch) as engine, pytest.raises(ConfigError, match="is an encoder-decoder"), \
            replay(engine, TRACE):
        pass


def test_routers_say_what_was_recorded_of_them_and_are_asked_all_the_same():
    looked = (((), (3,)), ((), (1,)))
    state = Replay(RoutingTrace(2, 4, (1, 1), (), ((0, 0), (1, 1), (0, 2), (1, 3)), looked=looked), 2, 4)
    asked = []

    class Entrance:
        def chosen(self, hidden):
            asked.append(hidden)
            return torch.zeros(2, 1)

    for said in (3, 1, 3):  # after the last token the first follows
        state.begin(1)
        assert Recorded(Entrance(), state, 1).chosen(torch.zeros(1)).tolist() == [[said], [said]]
    assert len(asked) == 3 and Replay(state.trace, 3, 4).trace.looked == ()
