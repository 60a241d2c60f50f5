"""Reading ahead changes no bit of what an engine says, and what became of every guess is counted."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
import torch
from moe_models import ids, reference
from test_engine import decoder, opened, store_of

from poise.errors import ConfigError, DataError
from poise.testing.families import tiny
from poise_edgemoe.ahead import CORE, LEAST, SURE, WINDOW, Restraint, following
from poise_edgemoe.cache import RoutingTrace
from poise_edgemoe.cache.counts import Counts
from poise_edgemoe.cache.traces import tokens_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.prefetch import START, LookAhead, Oracle, Seen, entrances, source_of
from poise_edgemoe.replay import mapped, replay
from poise_edgemoe.store.index import read_index
from poise_edgemoe.store.reader import Reader
from poise_edgemoe.store.writer import convert

EXPERTS = {"olmoe": "num_experts", "qwen2_moe": "num_experts", "gpt_oss": "num_local_experts",
           "deepseek_v3": "n_routed_experts", "switch_transformers": "num_experts"}
LONG = [family for family in EXPERTS if family != "olmoe"]
NEW = 10


class Wrong:
    """Is sure of experts that are not used: it knows which are."""

    def __init__(self, store, trace):
        self.tokens = tokens_of(trace.decode, trace.layers)
        self.experts = [range(len(layer.experts)) for layer in read_index(store).layers]

    def candidates(self, layer, seen):
        used = self.tokens[seen.token % len(self.tokens)][layer]
        return [(e, 1.0) for e in self.experts[layer] if e not in used]


def recorded(store, prompt, new=NEW, **options):
    """Return what an engine says, greedily, and the routing of it."""
    with opened(store, None, **options) as engine:
        uses = engine.cache.recorded = []
        split = []
        engine.model.register_forward_hook(lambda *_: split.append(len(uses)))
        said = engine.generate(prompt, new)
        layers, experts = len(engine.index.layers), len(engine.index.layers[0].experts)
        at = split[0]
        return said, RoutingTrace(layers, experts, (1,) * layers, tuple(uses[:at]), tuple(uses[at:]))


def unused(engine):
    """Return how many experts that were read ahead are there and have not been asked for."""
    return sum(held.guessed for held in engine.cache.resident.values())


def check_counts(engine):
    """Every place is free or somebody's, and every guess has one end."""
    cache, counts = engine.cache, engine.cache.counts
    held = [len(r.place) for r in cache.resident.values()]
    free = sum(size * len(places) for size, places in cache._free.items())
    assert sum(held) == sum(cache._taken.values())
    assert sum(held) + free == cache.mapped <= max(0, cache.budget)
    assert set(cache.policy.resident()) == set(cache.resident)
    said = engine.stats()["prefetch"]
    assert said["prefetched"] == said["used"] + said["wasted"] + unused(engine)
    for name in ("used", "wasted", "late", "prefetched", "wasted_bytes"):
        assert said[name] == sum(layer[name] for layer in engine.stats()["layers"])
    assert (counts.late <= counts.used).all() and (counts.used <= counts.hits).all()


# ------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("source", ["none", "lookahead", "oracle", "wrong"])
@pytest.mark.parametrize("family", ["olmoe", *(pytest.param(f, marks=pytest.mark.slow) for f in LONG)])
def test_output_depends_on_no_source_size_or_delay(family, source, rows, tmp_path, monkeypatch):
    store, model = store_of(tmp_path, family, **{EXPERTS[family]: 8}, num_hidden_layers=3,
                            **({"num_decoder_layers": 4, "num_sparse_decoder_layers": 2}
                               if family == "switch_transformers" else {"num_key_value_heads": 2}))
    prompt, plain = ids(rows, 5), reference(model)
    want, trace = recorded(store, prompt)
    assert torch.equal(want, plain.generate(prompt, NEW))
    if source == "oracle" and family == "switch_transformers":
        return  # its traces are no decoder's
    draw, real = random.Random(0), Reader._read

    def late(self, request):
        time.sleep(draw.choice((0, 0, 0, 0, 0, 0.0005)))
        real(self, request)

    monkeypatch.setattr(Reader, "_read", late)
    for experts in (2, 5, 9, 24):
        made = Wrong(store, trace) if source == "wrong" else source
        options = {"trace": trace} if source == "oracle" else {}
        with opened(store, experts, prefetch=made, **options) as engine:
            assert torch.equal(engine.generate(prompt, NEW), want)
            check_counts(engine)
            more = decoder(family, rows)
            assert torch.equal(engine.logits(ids(rows), *more), plain.logits(ids(rows), *more))


@pytest.mark.parametrize("source", ["lookahead", "wrong"])
def test_a_sure_source_is_read_however_wrong_and_changes_nothing(source, tmp_path, monkeypatch):
    """Without restraint: every guess there is room for, in every order."""
    monkeypatch.setattr(Restraint, "chance", lambda *_: 1.0)
    monkeypatch.setattr("poise_edgemoe.cache.policies.Expected.yields", lambda *_: True)
    store, _ = store_of(tmp_path, "olmoe", num_experts=12, num_hidden_layers=3)
    want, trace = recorded(store, ids(), 24)
    for experts in (3, 5, 8, 20):
        made = Wrong(store, trace) if source == "wrong" else source
        with opened(store, experts, prefetch=made) as engine:
            always_ask(engine)
            assert torch.equal(engine.generate(ids(), 24), want)
            check_counts(engine)
            said = engine.stats()["prefetch"]
            assert said["prefetched"] > (20 if source == "wrong" else 0)


def test_mixed_widths_and_prompts_that_borrow_room(tmp_path):
    plan = {f"model.layers.*.experts.{e}.*": (2, 8, 32)[e % 3] for e in range(9)}
    model = tiny("olmoe", num_experts=9)
    store = convert(model, tmp_path / "store", bits=4, group=8, plan=plan, hot="raw")
    want, trace = recorded(store, ids(2, 9))
    for made in ("lookahead", Wrong(store, trace)):
        with opened(store, 5, prefetch=made) as engine:
            assert torch.equal(engine.generate(ids(2, 9), NEW), want)
            check_counts(engine)
            with engine.cache.lent(3 * engine.cache.budget // 4):
                check_counts(engine)
            check_counts(engine)
            assert torch.equal(engine.generate(ids(2, 9), NEW), want)


# ------------------------------------------------------------------ sources


def always_ask(engine):
    """Experts of some kilobytes are read sooner than anybody is asked about them."""
    engine.ahead.restraint.asked = lambda *_: None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("experts", [8, 12, 20])
def test_an_oracle_that_has_heard_it_before_wastes_nothing(experts, rows, tmp_path):
    store, _ = store_of(tmp_path, "qwen3_moe", num_experts=12, num_hidden_layers=3)
    want, trace = recorded(store, ids(rows), 30)
    with opened(store, experts, prefetch="oracle", trace=trace) as engine:
        always_ask(engine)
        assert torch.equal(engine.generate(ids(rows), 30), want)
        check_counts(engine)
        said = engine.stats()["prefetch"]
        assert said["used"] > 20 and said["wasted"] == said["wasted_bytes"] == unused(engine) == 0
        assert said["precision"] == 1 and said["recall"] > 0.5 and said["off"] == []


def test_an_oracle_follows_a_replayed_trace(tmp_path):
    from test_replay import TRACE

    store, _ = store_of(tmp_path, "qwen3_moe", num_hidden_layers=2)
    trace = mapped(TRACE, 2, 4)
    with opened(store, 4, prefetch="oracle", trace=trace) as engine:
        always_ask(engine)
        engine.generate(ids(), 3)  # not the trace's: what comes is not known
        before = engine.stats()["prefetch"]
        with replay(engine, TRACE):
            engine.generate(ids(), 4)
            after = engine.stats()["prefetch"]
        assert after["used"] - before["used"] >= after["prefetched"] - before["prefetched"] > 0
        check_counts(engine)


def test_an_oracle_says_what_is_used_next_and_nothing_beyond_the_end():
    oracle = Oracle(RoutingTrace(2, 4, (1, 1), (), ((0, 1), (0, 3), (1, 2), (0, 0), (1, 1), (1, 3))))
    said = [list(oracle.candidates(layer, Seen(token, at, (), None)))
            for layer, token, at in ((1, 0, 0), (0, 1, 1), (1, 1, 0), (0, 2, 1), (1, 2, 0))]
    assert said == [[(2, 1.0)], [(0, 1.0)], [(1, 1.0), (3, 1.0)], [], [(2, 1.0)]]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe"])
def test_a_look_ahead_asks_the_next_router_about_what_enters_this_block(family, tmp_path):
    store, _ = store_of(tmp_path, family, num_hidden_layers=3)
    with opened(store) as engine:
        found, entered, chosen, heard = entrances(engine.model, engine.index), [], [], []
        for entrance in found:
            entrance.norm.register_forward_hook(lambda m, given, out: entered.append((given[0], out)))
            entrance.router.register_forward_hook(lambda m, given, out: chosen.append(out[-1]))
        engine.generate(ids(2), 2)
        n = len(engine.index.layers)
        for (hidden, _), index, entrance in zip(entered, chosen, found * 2, strict=True):
            assert torch.equal(entrance.chosen(hidden), index)  # of its own layer: what the router chose
        source, hidden = LookAhead(found), entered[n][0]
        want = [set(row) for row in found[1].chosen(hidden).tolist()]
        said = dict(source.candidates(1, Seen(0, 0, (0,), hidden)))
        assert said == {e: min(1.0, START * sum(e in row for row in want)) for e in set.union(*want)}
        assert not heard and source.candidates(0, Seen(1, n - 1, (0,), hidden)) == []


def test_a_look_ahead_learns_how_often_each_rank_is_right(tmp_path):
    store, _ = store_of(tmp_path, "mixtral", num_hidden_layers=3)
    with opened(store) as engine:
        source = LookAhead(entrances(engine.model, engine.index))
        hidden = torch.ones(1, 1, 16)
        first, second = source.found[1].chosen(hidden)[0].tolist()
        for _ in range(400):
            source.candidates(1, Seen(0, 0, (), hidden))
            source.candidates(2, Seen(0, 1, (first,), hidden))
        said = dict(source.candidates(1, Seen(0, 0, (), hidden)))
        assert said[first] == pytest.approx(1, abs=0.02) and said[second] == pytest.approx(0, abs=0.02)


def test_what_enters_is_shown_to_any_source_and_layers_go_round(tmp_path):
    shown = []

    class Looks:
        def candidates(self, layer, seen):
            shown.append((layer, seen))
            return []

    store, _ = store_of(tmp_path, "olmoe")
    with opened(store, 3, prefetch=Looks()) as engine:
        engine.generate(ids(2), 4)
    assert [(layer, s.layer, s.token) for layer, s in shown] == [
        (1, 0, 0), (0, 1, 1), (1, 0, 1), (0, 1, 2), (1, 0, 2), (0, 1, 3)]
    assert all(s.hidden.shape == (2, 1, 16) and len(s.experts) in (2, 3, 4) for _, s in shown)
    assert following([True, True, False, False, False]) == [1, 2, 3, 4, 2] and following([False]) == [0]


# ------------------------------------------------------------------ restraint


def test_guesses_are_read_where_the_odds_are_with_them():
    counts = Counts(2)
    rule = Restraint(counts)
    assert [rule.chance(0, q) for q in (0.5, 0.55, 0.56, 1.0)] == [0, 0, 0.56, 1]  # 1.25 : 1
    counts.demands[:] = 5, 4
    counts.blocked[:] = 0, 1
    rule.token_done(1.0, 0.0)
    assert rule.rho == pytest.approx(0.2) and rule.chance(0, 0.32) and not rule.chance(0, 0.31)
    rule.rho = math.inf
    assert not rule.chance(0, 1.0)  # a threshold of 1: nothing is read
    rule.rho = 0.0
    for _ in range(60):
        rule.known(0, [(3, 1.0)], [1, 2])  # sure, and wrong
        rule.known(1, [(1, 1.0), (2, 1.0)], [1, 2])
    assert not rule.chance(0, 1.0) and rule.chance(1, 1.0) == 1
    assert CORE == 0.25 and rule.off == set()


def test_a_layer_is_left_alone_when_its_wrong_bytes_cost_more_than_the_right_ones_give():
    counts, per_byte = Counts(3), 1e-3
    rule = Restraint(counts)
    for token in range(LEAST):
        assert rule.off == set()
        counts.needed_bytes += [100, 100, 200]  # 0.4 s of reading beside 0.2 s of computing
        counts.wasted_bytes += [51, 50, 0] if token < LEAST - 1 else [51, 49, 0]
        rule.token_done(0.2, per_byte)
    assert rule.off == {0}
    for _ in range(WINDOW):  # what lies farther back counts no more
        counts.needed_bytes += 100
        rule.token_done(0.2, per_byte)
    assert rule._sum[0].tolist() == [0, 0, 0] and rule.off == {0}


def test_a_layer_is_not_asked_about_while_asking_takes_longer_than_reading():
    counts, per_byte = Counts(3), 1e-3
    rule = Restraint(counts)
    counts.needed_bytes += 10**6
    rule.prompt_done()  # which is no token
    for _ in range(SURE):
        assert rule.idle == set()
        counts.needed_bytes += [100, 100, 0]  # 0.1 s, of which guesses may hide a half
        rule.asked(np.array([0.06, 0.04, 0.01]), per_byte)
        rule.token_done(1.0, per_byte)
    assert rule.idle == {0, 2} and rule.off == set() and rule.left() == ([], [0, 2])
    for _ in range(40):  # what it needs is known without asking
        counts.needed_bytes += [400, 100, 0]
        rule.asked(np.array([0.0, 0.04, 0.0]), per_byte)
        rule.token_done(1.0, per_byte)
    assert rule.idle == {2}


def test_a_source_that_is_not_worth_asking_is_not_asked_and_one_that_always_wants_it_is(tmp_path):
    store, _ = store_of(tmp_path, "qwen3_moe", num_experts=12, num_hidden_layers=3)
    want, trace = recorded(store, ids(), 40)
    for always in (False, True):
        made = Counting(store, trace)
        made.always = always
        with opened(store, 20, prefetch=made) as engine:
            engine.ahead.restraint.asked = lambda *_: engine.ahead.restraint.idle.update(range(3))
            assert torch.equal(engine.generate(ids(), 40), want)
        assert made.last >= 38 if always else made.last <= 1


class Counting(Wrong):
    last = 0  # token that it was asked about

    def candidates(self, layer, seen):
        self.last = seen.token
        return super().candidates(layer, seen)


def test_nothing_is_read_ahead_beyond_a_threshold_of_one(tmp_path):
    store, _ = store_of(tmp_path, "olmoe", num_experts=12)
    want, trace = recorded(store, ids())
    with opened(store, 6, prefetch="oracle", trace=trace) as engine:
        engine.ahead.restraint.token_done = lambda *_: None
        engine.ahead.restraint.rho = math.inf
        assert torch.equal(engine.generate(ids(), NEW), want)
        assert engine.stats()["prefetch"]["prefetched"] == 0


def test_who_is_always_wrong_is_soon_not_listened_to(tmp_path):
    store, _ = store_of(tmp_path, "olmoe", num_experts=12, max_position_embeddings=256)
    want, trace = recorded(store, ids(), 150, context=256)
    plain = []
    for made in ("none", Wrong(store, trace)):
        with opened(store, 6, prefetch=made, context=256) as engine:
            assert torch.equal(engine.generate(ids(), 150), want)
            plain.append(engine.stats())
    assert plain[1]["prefetch"]["prefetched"] <= 24
    assert plain[1]["misses"] <= plain[0]["misses"] + 24


def test_who_is_read_and_always_wrong_is_left_alone(tmp_path, monkeypatch):
    """As where computing takes no time beside reading: whatever is wrong costs."""
    real = Restraint.token_done
    store, _ = store_of(tmp_path, "olmoe", num_experts=12, max_position_embeddings=256)
    want, trace = recorded(store, ids(), LEAST + 60, context=256)
    monkeypatch.setattr(Restraint, "chance", lambda *_: 1.0)
    monkeypatch.setattr("poise_edgemoe.cache.policies.Expected.yields", lambda *_: True)
    monkeypatch.setattr(Restraint, "token_done", lambda self, _, per_byte: real(self, 0.0, per_byte))
    with opened(store, 6, prefetch=Wrong(store, trace), context=256) as engine:
        made = engine.stream(ids(), LEAST + 60)
        said = [next(made).item() for _ in range(LEAST + 1)]
        before = engine.stats()["prefetch"]
        assert before["off"] == [0, 1] and before["wasted"] > 20
        said += [token.item() for token in made]
        after = engine.stats()["prefetch"]
        assert said == want[0, 9:].tolist() and after["prefetched"] == before["prefetched"]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("options", "words"), [
    ({"prefetch": "lookahed"}, "prefetch='lookahed' is none of none, lookahead, oracle.*did you mean"),
    ({"prefetch": 3}, r"prefetch=3 is not allowed: it must be one of .*method candidates\(layer, seen\)"),
    ({"prefetch": "oracle"}, "prefetch=oracle needs a trace: give trace=FILE"),
    ({"trace": "some.csv.gz"}, "trace=some.csv.gz has no effect: only prefetch=oracle listens to it"),
    ({"prefetch": "lookahead", "trace": "some.csv.gz"}, "has no effect: only prefetch=oracle listens"),
    ({"prefetch": "oracle", "trace": 7}, "trace=7 is not allowed: give a file or a RoutingTrace"),
])
def test_a_source_that_is_none_or_lacks_its_trace_is_refused(options, words, tmp_path):
    store, _ = store_of(tmp_path)
    with pytest.raises(ConfigError, match=words):
        Engine.open(store, **options)


def test_a_trace_that_the_oracle_cannot_follow_is_refused(tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    other = RoutingTrace(2, 6, (1, 1), (), ((0, 1),))
    words = "has 2 layers of 6 experts, the store 2 of 4; record the store's own, or map it"
    with pytest.raises(DataError, match=f"the trace is of another model: it {words}"):
        Engine.open(store, prefetch="oracle", trace=other)
    with pytest.raises(DataError, match="the trace has no decoded tokens: the oracle"):
        Engine.open(store, prefetch="oracle", trace=RoutingTrace(2, 4, (1, 1), ((0, 1),), ()))
    with pytest.raises(DataError, match="cannot be read as a routing trace"):
        Engine.open(store, prefetch="oracle", trace=tmp_path / "none.csv.gz")
    one = convert(tiny("olmoe", num_hidden_layers=1), tmp_path / "one", bits=32)
    with pytest.raises(DataError, match="is of one layer: no token's end can be told"):
        Engine.open(one, prefetch="oracle", trace=RoutingTrace(1, 4, (1,), (), ((0, 1),)))
    switch = convert(tiny("switch_transformers"), tmp_path / "switch", bits=32)
    with pytest.raises(ConfigError, match="switch_transformers is an encoder-decoder"):
        Engine.open(switch, prefetch="oracle", trace=other)


def test_a_family_whose_routers_are_not_found_has_no_look_ahead(tmp_path):
    store, _ = store_of(tmp_path)
    with opened(store) as engine:
        del engine.model.model.layers[1].post_attention_layernorm
        assert entrances(engine.model, engine.index) is None
    with pytest.raises(ConfigError, match="norms and routers of mixtral are not found; take prefetch=none"):
        source_of("lookahead", None, None, "mixtral")
