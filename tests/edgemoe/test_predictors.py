"""Predictors from recorded routing: tables are counts, chances are calibrated, and nothing is made up."""

from __future__ import annotations

import dataclasses
import os
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import ids

from poise.errors import ConfigError, DataError, FileError
from poise.files import load_arrays, save_arrays
from poise_edgemoe import predictors
from poise_edgemoe.cache import Belady, RoutingTrace, read_trace, simulate
from poise_edgemoe.cache.traces import tokens_of
from poise_edgemoe.predictors.blocks import SMOOTHED, Factored, Usual
from poise_edgemoe.predictors.past import BEFORE, Past, replayed
from poise_edgemoe.predictors.tables import PathTable
from poise_edgemoe.prefetch import Seen

LAYERS, EXPERTS = 3, 6
needs_data = pytest.mark.skipif(not os.environ.get("POISE_DATA"), reason="POISE_DATA is not set")
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def tokens(draw, k=None, least=1):
    k = draw(st.integers(1, 3)) if k is None else k
    layer = st.lists(st.integers(0, EXPERTS - 1), min_size=k, max_size=k, unique=True).map(sorted)
    token = st.lists(layer, min_size=LAYERS, max_size=LAYERS)
    return draw(st.lists(token, min_size=least, max_size=12))


def trace(found, layers=LAYERS, experts=EXPERTS):
    uses = tuple((n, e) for token in found for n, used in enumerate(token) for e in used)
    return RoutingTrace(layers, experts, (1,) * layers, (), uses)


def chain(length, experts=8, layers=4, seed=0):
    """Tokens whose every expert follows from the layer before, the first layer's from the token before."""
    draw = np.random.default_rng(seed)
    follow = [draw.permutation(experts) for _ in range(layers)]
    found, now = [], 0
    for t in range(length):
        token = []
        for n in range(layers):
            now = int(follow[n][now]) if (t, n) != (0, 0) else 0
            token.append([now])
        found.append(token)
    return found


def counted(make, traces, k=1.0):
    """Return a block of that kind, which has gone through the traces, and the shares behind it."""
    usual = Usual(np.full(LAYERS, float(k)), EXPERTS)
    block = make(usual)
    for found in traces:
        past = Past(LAYERS, EXPERTS)
        for n, used in replayed(found, past):
            block.learn(n, used, past)
            usual.learn(n, used, past)
    return block, usual


def walked(predictor, found):
    """Yield (position, layer, experts used, chances) of every layer, as an engine would ask."""
    running = predictor.started()
    for at, (n, used) in enumerate((n, used) for token in found for n, used in enumerate(token)):
        yield at, n, used, running.chances(n, running.past)
        running.note(n, used)


def recall(predictor, found, m, ahead=1):
    hit, all_, running = 0, 0, predictor.started()
    for at, (n, used) in enumerate((n, used) for token in found for n, used in enumerate(token)):
        if at >= 2 * len(found[0]):  # before, nothing is known
            chances = running.chances(n, running.past, ahead)
            hit += len(set(np.argsort(-chances, kind="stable")[:m]) & set(used))
            all_ += len(used)
        running.note(n, used)
    return hit / all_


# ------------------------------------------------------------------ tables


@few
@given(st.data())
def test_probabilities_of_a_key_sum_to_how_many_are_used(data):
    k = data.draw(st.integers(1, 3))
    found = [data.draw(tokens(k)) for _ in range(2)]
    table, _ = counted(PathTable, found, k)
    keys = [tuple(sorted(data.draw(st.sets(st.integers(0, 5), min_size=k, max_size=k)))) for _ in range(2)]
    for n in range(LAYERS):
        for ahead, first, second in ((1, *keys), *((key[0], key[2], key[3]) for key in table.counts)):
            p = table.inclusion(n, first, second, ahead)
            assert p.sum() == pytest.approx(k, abs=1e-6) and (p >= 0).all() and (p <= 1 + 1e-12).all()


@few
@given(tokens(k=1, least=3), st.integers(1, 2))
def test_one_expert_a_token_is_counted_as_by_hand(found, ahead):
    table, usual = counted(PathTable, [found])
    line = [e for token in found for (e,) in token]
    none = np.array([[sum(t[n] == [e] for t in found) for e in range(EXPERTS)] for n in range(LAYERS)])
    none = (none + SMOOTHED / EXPERTS) / (len(found) + SMOOTHED)
    np.testing.assert_allclose([usual.share(n) for n in range(LAYERS)], none)
    for at in range(ahead + 1, len(line)):
        n, one, two = at % LAYERS, line[at - ahead], line[at - ahead - 1]
        same = [b for b in range(n, len(line), LAYERS) if b >= ahead and line[b - ahead] == one]
        both = [b for b in same if b > ahead and line[b - ahead - 1] == two]
        p = none[n]
        for visits in (same, both):
            counts = np.bincount([line[b] for b in visits], minlength=EXPERTS)
            p = (counts + SMOOTHED * p) / (len(visits) + SMOOTHED)
        np.testing.assert_allclose(table.inclusion(n, (one,), (two,), ahead), p)


def test_keys_that_were_never_seen_are_shorter_ones():
    table, usual = counted(PathTable, [[[[0], [1], [2]]] * 3])
    assert (table.inclusion(1, (5,), (5,)) == usual.share(1)).all()
    assert (table.inclusion(1, (0,), (5,)) == table.inclusion(1, (0,), (4,))).all()
    empty = PathTable(Usual(np.ones(LAYERS), EXPERTS))
    assert np.allclose(empty.inclusion(0, (1,), (2,)), 1 / EXPERTS)


@few
@given(st.data())
def test_factored_ratios_are_counts_too(data):
    found = data.draw(tokens(least=3))
    block, usual = counted(Factored, [found])
    n, s = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, BEFORE))
    a, b = data.draw(st.integers(0, EXPERTS - 1)), data.draw(st.integers(0, EXPERTS - 1))
    flat = [used for token in found for used in token]
    back = (1, 2, 3, LAYERS)[s]
    pairs = [(flat[i - back], flat[i]) for i in range(n, len(flat), LAYERS) if i >= back]
    visits, both = sum(a in x for x, _ in pairs), sum(a in x and b in y for x, y in pairs)
    p = usual.share(n)[b]
    past = Past(LAYERS, EXPERTS)
    past.used[(n - back) % LAYERS] = (a,)
    said = block.of(n, past, 1)[s, b] if back != LAYERS or s == BEFORE else block.of(n, past, 1)[BEFORE, b]
    want = (both + SMOOTHED * p) / (visits + SMOOTHED) / p
    assert np.exp(said) == pytest.approx(want, rel=1e-4)


def test_of_layers_between_nothing_is_known_two_layers_ahead():
    past = Past(4, EXPERTS)
    for n in range(4):
        past.note(n, [n])
    assert past.before(3) == [(2,), (1,), (0,), (3,)] and past.before(3, 2) == [(), (1,), (0,), (3,)]
    block = Factored(Usual(np.ones(4), EXPERTS))
    block.learn(3, [5], past)
    near, far = block.of(3, past, 1), block.of(3, past, 2)
    assert near[0, 5] > 0 and not far[0].any() and (near[1:] == far[1:]).all()


# ------------------------------------------------------------------ what they predict


@pytest.mark.parametrize("method", ["table", "factored", "auto"])
def test_what_follows_for_sure_is_predicted_for_sure(method):
    predictor = predictors.fit([trace(chain(200), 4, 8)], method)
    assert recall(predictor, chain(60), 1) == recall(predictor, chain(60), 1, 2) == 1.0


@pytest.mark.parametrize("method", ["table", "factored"])
def test_from_what_is_drawn_at_random_nothing_is_learned(method):
    draw = np.random.default_rng(0)
    found = [[sorted(draw.choice(16, 2, replace=False).tolist()) for _ in range(3)] for _ in range(1200)]
    predictor = predictors.fit([trace(found[:600], 3, 16)], method)
    for m in (2, 4, 8):
        assert recall(predictor, found[600:], m) == pytest.approx(m / 16, abs=0.03)
    for at, _, _, chances in walked(predictor, found[600:800]):
        if at >= 200:  # before, how often experts are used of late is not known
            assert chances.sum() == pytest.approx(2, abs=1.2) and chances.max() < 0.45


@pytest.mark.parametrize("method", ["table", "factored", "auto"])
def test_chances_are_how_often_it_happens(method):
    """Half of the experts follow from the layer before, half are drawn."""
    draw = np.random.default_rng(1)
    found = [[sorted({(7 * (n + t) + 3) % 12, int(draw.integers(12))}) for n in range(4)]
             for t in range(900)]
    predictor = predictors.fit([trace(found[:600], 4, 12)], method)
    said, happened = [], []
    for _, _, used, chances in walked(predictor, found[600:]):
        said.append(chances)
        happened.append(np.isin(np.arange(12), used))
    said, happened = np.concatenate(said[40:]), np.concatenate(happened[40:])
    groups = [(said >= low) & (said < low + 0.1) for low in np.arange(0, 1.1, 0.1)]
    off = [of.mean() * abs(said[of].mean() - happened[of].mean()) for of in groups if of.any()]
    assert sum(off) < 0.05
    usual = happened.mean()
    surprise = -(happened * np.log(said) + ~happened * np.log1p(-said)).mean()
    assert surprise < 0.9 * -(usual * np.log(usual) + (1 - usual) * np.log1p(-usual))


@few
@given(st.data())
def test_c_counts_and_says_what_numpy_does(data):
    """Also where somebody has looked, and where experts are used twice or not at all."""
    layers, experts = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 9))
    layer = st.sets(st.integers(0, experts - 1), min_size=1, max_size=4).map(sorted)
    found = data.draw(st.lists(st.lists(layer, min_size=layers, max_size=layers), min_size=3, max_size=9))
    seen = trace(found, layers, experts)
    looked = tuple(tuple(tuple(reversed(used)) for used in token) for token in found)
    predictor = predictors.fit([dataclasses.replace(seen, looked=looked)],
                               data.draw(st.sampled_from(["factored", "combined", "lookahead"])), depth=1)
    c, numpy = predictor.started(), predictor.started()
    if c._fast is None:
        pytest.skip("no compiler")
    numpy._fast, numpy.look, c.look = None, None, None
    for token in found:
        for n, used in enumerate(token):
            ask = Seen(0, (n - 1) % layers, (), None)
            mine, theirs = dict(c.candidates(n, ask)), dict(numpy.candidates(n, ask))
            assert mine.keys() == theirs.keys()
            assert mine == pytest.approx(theirs, rel=1e-4)
            c.note(n, used)
            numpy.note(n, used)
    for name, block in c.blocks.items():
        for key, counts in block.tensors().items():
            np.testing.assert_array_equal(counts, numpy.blocks[name].tensors()[key])
    np.testing.assert_allclose(c.past.rate, numpy.past.rate, rtol=1e-12)
    assert c.past.used == numpy.past.used


def test_the_next_router_is_listened_to():
    """An expert that it names, the likeliest, is always used: nothing else tells."""
    draw = np.random.default_rng(3)
    found = [[sorted(draw.choice(8, 2, replace=False).tolist()) for _ in range(3)] for _ in range(150)]
    looked = tuple(((), *((used[0], (used[1] + 1) % 8) for used in token[1:])) for token in found)
    for method in ("lookahead", "combined", "auto"):
        p = predictors.fit([dataclasses.replace(trace(found, 3, 8), looked=looked)], method).started()
        p.look = SimpleNamespace(found=[Says([[5, 1]])] * 3)
        said = dict(p.candidates(1, Seen(0, 0, (), torch.zeros(1, 1, 4))))
        assert max(said, key=said.get) == 5 and said[5] > 0.8
        p._fast = None
        assert dict(p.candidates(1, Seen(0, 0, (), torch.zeros(1, 1, 4)))) == pytest.approx(said, rel=1e-4)


class Says:
    def __init__(self, rows):
        self.rows = rows

    def chosen(self, hidden):
        return torch.tensor(self.rows)


# ------------------------------------------------------------------ in an engine


@pytest.mark.parametrize("method", ["table", "factored"])
def test_an_engine_says_the_same_and_guesses_from_its_own_recording(method, tmp_path):
    from test_engine import opened, store_of
    from test_prefetch import check_counts, recorded

    store, _ = store_of(tmp_path, "qwen3_moe", num_experts=12, num_hidden_layers=3)
    want, seen = recorded(store, ids(), 40)
    predictor = predictors.fit([seen], method)
    with opened(store, 12, prefetch=predictor) as engine:
        assert torch.equal(engine.generate(ids(), 40), want)
        check_counts(engine)
        assert engine.stats()["prefetch"]["prefetched"] > 0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("given_", "words"), [
    ({"method": "tables"}, "did you mean 'table'"), ({"method": None}, "is none of auto, table"),
    ({"depth": 0}, "must be 1 or 2"), ({"depth": 3}, "must be 1 or 2"), ({"depth": True}, "must be 1 or 2"),
    ({"method": "lookahead"}, "has not recorded what the next router said")])
def test_options_that_are_none_are_refused(given_, words):
    with pytest.raises(ConfigError, match=words):
        predictors.fit([trace(chain(9), 4, 8)], **given_)


@pytest.mark.parametrize(("traces", "words"), [
    ([], "traces are of nothing"), ([trace(chain(3), 4, 8), trace([[[0], [1], [2]]] * 3)], "of one model"),
    ([trace(chain(1), 4, 8)], "two tokens")])
def test_traces_that_teach_nothing_are_refused(traces, words):
    with pytest.raises(DataError, match=words):
        predictors.fit(traces)


# ------------------------------------------------------------------ in files


@pytest.mark.parametrize("method", ["table", "factored", "auto"])
def test_what_is_saved_predicts_the_same(method, tmp_path):
    predictor = predictors.fit([dataclasses.replace(trace(chain(80), 4, 8), model="c0ffee")], method)
    predictors.save(predictor, tmp_path / "p")
    again = predictors.load(tmp_path / "p.json")
    assert again.model == "c0ffee" and again.said() == predictor.said()
    for (_, _, _, one), (_, _, _, other) in zip(walked(predictor, chain(30)), walked(again, chain(30))):
        np.testing.assert_array_equal(one, other)
    predictors.save(again, str(tmp_path / "q.json"))
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "q.json").read_bytes()


def test_a_file_that_lies_is_refused(tmp_path):
    predictors.save(predictors.fit([trace(chain(40), 4, 8)], "table"), tmp_path / "p")
    arrays, said = load_arrays(tmp_path / "p")
    lies = {"again": np.zeros(3), "k": np.zeros((2, 2)), "weights.0.1": np.full(2, np.nan),
            "block.usual.counts": -np.ones((4, 8)),
            "block.path.visits": np.zeros(2, np.int32),
            "block.path.counts": np.zeros((2, 8), np.int32),
           
            "curve.0.scores": np.zeros(3), "block.usual.tokens": np.zeros(4, np.int32)}
    for name, lie in lies.items():
        save_arrays(tmp_path / "lie", {**arrays, name: lie}, said)
        with pytest.raises(FileError, match="is no predictor"):
            predictors.load(tmp_path / "lie")
    for name, lie in (("experts", 0), ("methods", []), ("methods", [["tables"] * 4]), ("model", 3)):
        save_arrays(tmp_path / "lie", arrays, {**said, name: lie})
        with pytest.raises(FileError, match="is no predictor"):
            predictors.load(tmp_path / "lie")
    save_arrays(tmp_path / "lie", arrays, {**said, "version": 99})
    with pytest.raises(FileError, match="of this version"):
        predictors.load(tmp_path / "lie")
    (tmp_path / "p.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:-1])
    with pytest.raises(FileError):
        predictors.load(tmp_path / "p")


def test_a_predictor_of_another_model_is_refused(tmp_path):
    from test_engine import store_of

    from poise_edgemoe import Engine

    store, _ = store_of(tmp_path / "one", "qwen3_moe", num_experts=12, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="4 layers of 8 experts, the store 3 of 12"):
        Engine.open(store, prefetch=predictors.fit([trace(chain(40), 4, 8)]))
    seen = trace(chain(40, 12, 3), 3, 12)
    with pytest.raises(ConfigError, match="routers differ"):
        Engine.open(store, prefetch=predictors.fit([dataclasses.replace(seen, model="c0ffee")]))
    with pytest.raises(DataError, match="different routers"):
        predictors.fit([dataclasses.replace(seen, model=m) for m in ("c0ffee", "decaf0")])
    with pytest.raises(ConfigError, match="policy=predicted asks a predictor"):
        Engine.open(store, policy="predicted")


# ------------------------------------------------------------------ who leaves


def halved(name):
    """A recorded trace up to the middle of its decoding, its uses, and how many those are."""
    found = recording(name)
    tokens = tokens_of(found.decode, found.layers)
    first = sum(len(used) for token in tokens[: len(tokens) // 2] for used in token)
    return (dataclasses.replace(found, decode=found.decode[:first]), found.prompt + found.decode,
            len(found.prompt) + first)


@needs_data
@pytest.mark.parametrize(("name", "mebibytes"), some(
    product(("qwen", "gemma"), (1500, 2000, 2500, 3000, 3500, 4000)), [("qwen", 1500), ("gemma", 2500)]))
def test_predicted_closes_a_quarter_of_the_distance_to_the_optimum(name, mebibytes):
    early, uses, warm = halved(name)
    slots = mebibytes * 2**20 // early.expert_bytes
    best = simulate(uses, slots, Belady(early.layers, early.experts, uses, bypass=True), warm).hits
    lru = simulate(uses, slots, "lru", warm, pins=True).hits
    ours = simulate(uses, slots, fitted(name).policy(), warm, pins=True).hits
    assert ours - lru >= 0.25 * (best - lru)


@needs_data
@pytest.mark.parametrize(("name", "share"), some(
    product(("qwen", "gemma", "gptoss"), (2, 10, 30, 60, 90)), [("qwen", 30), ("gptoss", 10)]))
def test_predicted_is_not_worse_than_expected(name, share):
    early, uses, warm = halved(name)
    slots = early.layers * early.experts * share // 100
    ours, expected = (simulate(uses, slots, p, warm, pins=True).hit_rate
                      for p in (fitted(name).policy(), "expected"))
    assert ours >= expected - 0.01


@cache
def recording(name):
    return read_trace(Path(os.environ["POISE_DATA"], "traces", f"{name}.route.csv.gz"))


@cache
def fitted(name):
    return predictors.fit([halved(name)[0]], "factored", depth=1)


@few
@given(tokens(k=2, least=3), st.integers(2, 12))
def test_predicted_learns_alike_one_by_one_and_together(found, slots):
    policy = predictors.fit([trace(found)], depth=1).policy
    one, together = policy(), policy()
    for token in found:
        for n, used in enumerate(token):
            for e in used:
                one.used((n, e))
            together.used_together(n, used)
            np.testing.assert_array_equal(one.scores(), together.scores())
        one.next_token()
        together.next_token()
    np.testing.assert_allclose(one._rate[:, 2], rate_by_hand(found, 16), rtol=1e-12)


def rate_by_hand(found, half_life):
    kept, rate = 0.5 ** (1 / half_life), np.zeros((LAYERS, EXPERTS))
    for token in found:
        for n, used in enumerate(token):
            rate[n, used] += 1 - kept
        rate *= kept
    return rate


def test_an_engine_evicts_as_the_simulator_does(tmp_path):
    from test_engine import opened, store_of
    from test_prefetch import recorded

    store, _ = store_of(tmp_path, "qwen3_moe", num_experts=12, num_hidden_layers=3)
    want, seen = recorded(store, ids(), 40)
    predictor = predictors.fit([seen])
    for ahead in ("none", predictor):
        with opened(store, 12, prefetch=ahead, policy=predictor.policy()) as engine:
            engine.cache.recorded = []
            assert torch.equal(engine.generate(ids(), 40), want)
            stats = engine.stats()
        if ahead == "none":
            uses = seen.prompt + seen.decode
            counted = simulate(uses, 12, predictor.policy(), pins=True)
            assert (stats["hits"], stats["misses"]) == (counted.hits, counted.misses)
