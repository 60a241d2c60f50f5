"""Predictors from recorded routing: tables are counts, chances are calibrated, and nothing is made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import ids

from poise.errors import ConfigError, DataError
from poise_edgemoe import predictors
from poise_edgemoe.cache import RoutingTrace
from poise_edgemoe.predictors.factored import factored
from poise_edgemoe.predictors.past import Past, replayed
from poise_edgemoe.predictors.tables import SMOOTHED, frequencies, path_table

LAYERS, EXPERTS = 3, 6
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


def recall(predictor, found, m):
    layers = len(found[0])
    past, hit, used_ = Past(layers, predictor.experts), 0, 0
    for at, (n, used) in enumerate(replayed(found, past)):
        if at >= layers:  # before, nothing is known
            hit += len(set(np.argsort(-predictor.chances(n, past), kind="stable")[:m]) & set(used))
            used_ += len(used)
    return hit / used_


# ------------------------------------------------------------------ tables


@few
@given(st.data())
def test_probabilities_of_a_key_sum_to_how_many_are_used(data):
    k = data.draw(st.integers(1, 3))
    found = [data.draw(tokens(k)) for _ in range(2)]
    table = path_table(found, LAYERS, EXPERTS)
    keys = [tuple(sorted(data.draw(st.sets(st.integers(0, 5), min_size=k, max_size=k)))) for _ in range(2)]
    for n in range(LAYERS):
        for first, second in ((keys[0], keys[1]), *((key[1], key[2]) for key in table.two)):
            p = table.inclusion(n, first, second)
            assert p.sum() == pytest.approx(k, abs=1e-6) and (p >= 0).all() and (p <= 1 + 1e-12).all()


@few
@given(tokens(k=1, least=3))
def test_one_expert_a_token_is_counted_as_by_hand(found):
    table = path_table([found], LAYERS, EXPERTS)
    line = [e for token in found for (e,) in token]
    none = np.array([[sum(t[n] == [e] for t in found) for e in range(EXPERTS)] for n in range(LAYERS)])
    none = (none + SMOOTHED / EXPERTS) / (len(found) + SMOOTHED)
    np.testing.assert_allclose(table.none, none)
    for at in range(2, len(line)):
        n = at % LAYERS
        same = [b for b in range(n, len(line), LAYERS) if b >= 1 and line[b - 1] == line[at - 1]]
        both = [b for b in same if b >= 2 and line[b - 2] == line[at - 2]]
        p = none[n]
        for visits in (same, both):
            counts = np.bincount([line[b] for b in visits], minlength=EXPERTS)
            p = (counts + SMOOTHED * p) / (len(visits) + SMOOTHED)
        np.testing.assert_allclose(table.inclusion(n, (line[at - 1],), (line[at - 2],)), p)


def test_keys_that_were_never_seen_are_shorter_ones():
    found = [[[0], [1], [2]]] * 3
    table = path_table([found], LAYERS, EXPERTS)
    assert (table.inclusion(1, (5,), (5,)) == table.none[1]).all()
    assert (table.inclusion(1, (0,), (5,)) == table.inclusion(1, (0,), (4,))).all()
    empty = path_table([[[[0], [1], [2]]]], LAYERS, EXPERTS)  # one token: what is before it is not known
    assert np.allclose(empty.inclusion(0, (1,), (2,)), frequencies([[[[0], [1], [2]]]], LAYERS, EXPERTS)[0])


@few
@given(st.data())
def test_factored_ratios_are_counts_too(data):
    found = data.draw(tokens(least=3))
    table = factored([found], LAYERS, EXPERTS)
    n, s = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, 2))
    a, b = data.draw(st.integers(0, EXPERTS - 1)), data.draw(st.integers(0, EXPERTS - 1))
    flat = [used for token in found for used in token]
    back = (1, 2, LAYERS)[s]
    pairs = [(flat[i - back], flat[i]) for i in range(n, len(flat), LAYERS) if i >= back]
    visits, both = sum(a in x for x, _ in pairs), sum(a in x and b in y for x, y in pairs)
    p = np.exp(table.base[n, b])
    want = (both + SMOOTHED * p) / (visits + SMOOTHED) / p
    assert np.exp(table.ratios[s, n, a, b]) == pytest.approx(want, rel=1e-4)


# ------------------------------------------------------------------ what they predict


@pytest.mark.parametrize("method", ["table", "factored", "auto"])
def test_what_follows_for_sure_is_predicted_for_sure(method):
    predictor = predictors.fit([trace(chain(200), 4, 8)], method)
    assert recall(predictor, chain(60), 1) == 1.0


@pytest.mark.parametrize("method", ["table", "factored"])
def test_from_what_is_drawn_at_random_nothing_is_learned(method):
    draw = np.random.default_rng(0)
    found = [[sorted(draw.choice(16, 2, replace=False).tolist()) for _ in range(3)] for _ in range(1200)]
    predictor = predictors.fit([trace(found[:600], 3, 16)], method)
    for m in (2, 4, 8):
        assert recall(predictor, found[600:], m) == pytest.approx(m / 16, abs=0.03)
    past = Past(3, 16)
    for at, (n, _) in enumerate(replayed(found[600:700], past)):
        chances = predictor.chances(n, past)
        if at < 30:  # how often experts are used of late is not known yet
            continue
        assert chances.sum() == pytest.approx(2, abs=1.2) and chances.max() < 0.45


@pytest.mark.parametrize("method", ["table", "factored", "auto"])
def test_chances_are_how_often_it_happens(method):
    """Half of the experts follow from the layer before, half are drawn."""
    draw = np.random.default_rng(1)
    found = [[sorted({(7 * (n + t) + 3) % 12, int(draw.integers(12))}) for n in range(4)]
             for t in range(900)]
    predictor = predictors.fit([trace(found[:600], 4, 12)], method)
    past, said, happened = Past(4, 12), [], []
    for n, used in replayed(found[600:], past):
        said.append(predictor.chances(n, past))
        happened.append(np.isin(np.arange(12), used))
    said, happened = np.concatenate(said[40:]), np.concatenate(happened[40:])
    groups = [(said >= low) & (said < low + 0.1) for low in np.arange(0, 1.1, 0.1)]
    off = [of.mean() * abs(said[of].mean() - happened[of].mean()) for of in groups if of.any()]
    assert sum(off) < 0.05
    usual = happened.mean()
    surprise = -(happened * np.log(said) + ~happened * np.log1p(-said)).mean()
    assert surprise < 0.9 * -(usual * np.log(usual) + (1 - usual) * np.log1p(-usual))


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
    ({"held_out": 0.0}, "a share between 0 and 1"), ({"held_out": 1}, "a share between 0 and 1"),
    ({"held_out": float("nan")}, "a share between 0 and 1")])
def test_options_that_are_none_are_refused(given_, words):
    with pytest.raises(ConfigError, match=words):
        predictors.fit([trace(chain(9), 4, 8)], **given_)


@pytest.mark.parametrize(("traces", "words"), [
    ([], "traces are of nothing"), ([trace(chain(3), 4, 8), trace([[[0], [1], [2]]] * 3)], "of one model"),
    ([trace(chain(1), 4, 8)], "two decoded tokens")])
def test_traces_that_teach_nothing_are_refused(traces, words):
    with pytest.raises(DataError, match=words):
        predictors.fit(traces)
