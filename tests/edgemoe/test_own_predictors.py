"""Predictors of one's own: what they say is looked at, and what they are shown is theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from moe_models import ids, reference
from test_engine import opened, store_of

from poise.errors import ConfigError
from poise_edgemoe.engine import Engine


class Says:
    def __init__(self, said):
        self.said = said

    def candidates(self, layer, seen):
        return self.said


@pytest.mark.parametrize("guess", [
    (4, 0.5), (-1, 0.5), (0, 1.5), (0, math.nan), (0, math.inf), (1.0, 0.5), ("1", 0.5), (0, "likely"),
    (0, None), (0, 1.0, 2), 3, "ab", None])
def test_what_names_no_expert_is_refused_and_the_engine_goes_on(guess, tmp_path):
    store, model = store_of(tmp_path, "olmoe")
    source = Says([guess])
    with opened(store, 3, prefetch=source) as engine:
        with pytest.raises(ConfigError, match="an expert, 0 to 3, and a chance, 0 to 1"):
            engine.generate(ids(), 4)
        assert engine.cache._pinned == set()
        source.said = []
        assert torch.equal(engine.generate(ids(), 4), reference(model).generate(ids(), 4))


def test_what_is_no_list_is_refused(tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    with opened(store, 3, prefetch=Says(None)) as engine, pytest.raises(ConfigError, match="must be pairs"):
        engine.generate(ids(), 4)


@pytest.mark.parametrize("said", [
    [(True, 1.0)], [(torch.tensor(1), torch.tensor(0.9))], [(np.int64(1), np.float32(0.9))],
    {1: 1.0}.items()])
def test_an_expert_is_a_number_of_whatever_kind(said, tmp_path):
    store, model = store_of(tmp_path, "olmoe")
    with opened(store, 5, prefetch=Says(said)) as engine:
        assert torch.equal(engine.generate(ids(), 12), reference(model).generate(ids(), 12))
        assert all(type(n) is int for key in engine.cache.resident for n in key)
        assert engine.cache.counts.guesses.sum()


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_what_it_is_shown_is_its_own(family, tmp_path):
    class Spoils:
        def candidates(self, layer, seen):
            seen.hidden.neg_()
            return []

    store, model = store_of(tmp_path, family)
    with opened(store, 5, prefetch=Spoils()) as engine:
        assert torch.equal(engine.generate(ids(), 12), reference(model).generate(ids(), 12))


@pytest.mark.parametrize("given", [Says, type("Named", (), {"candidates": 3})()])
def test_what_cannot_be_asked_is_refused(given, tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    with pytest.raises(ConfigError, match="or an object with a method candidates"):
        Engine.open(store, prefetch=given)


class Farsighted(Says):
    """Is asked for some layers, and keeps what it was asked."""

    def __init__(self, depth, said=()):
        self.said, self.depth, self.asked = said, depth, []

    def candidates(self, layer, seen):
        self.asked.append((seen.token, seen.layer, layer))
        return self.said


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_a_source_is_asked_for_as_many_layers_as_it_says(depth, tmp_path):
    """The nearest first, those of the next token as its own; a token's layers once at most."""
    store, model = store_of(tmp_path, "olmoe", num_hidden_layers=3)
    source = Farsighted(depth)
    with opened(store, 5, prefetch=source) as engine:
        assert torch.equal(engine.generate(ids(), 3), reference(model).generate(ids(), 3))
    far = [[(t + (n + d) // 3, n, (n + d) % 3) for d in range(1, min(depth, 3) + 1)]
           for t in range(2) for n in range(3)]
    assert source.asked == [one for layer in far for one in layer]


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("experts", [3, 6, 11])
def test_guesses_of_several_layers_change_nothing(depth, experts, tmp_path):
    from test_prefetch import check_counts

    store, model = store_of(tmp_path, "olmoe", num_hidden_layers=3)
    want = reference(model).generate(ids(), 20)
    for said in ([(0, 1.0)], [(0, 1.0), (1, 1.0), (3, 1.0)], [(2, 0.7), (1, 0.6)]):
        with opened(store, experts, prefetch=Farsighted(depth, said)) as engine:
            assert torch.equal(engine.generate(ids(), 20), want)
            check_counts(engine)


def test_a_prompt_ends_guesses_for_all_layers(tmp_path):
    store, _ = store_of(tmp_path, "olmoe", num_hidden_layers=3)
    with opened(store, 6, prefetch=Farsighted(2, [(0, 1.0), (1, 1.0)])) as engine:
        engine.generate(ids(), 6)
        assert {layer for layer, _ in engine.cache._guesses} == {0, 1}
        held, real = [], engine.cache._ask
        engine.cache._ask = lambda *given: held.append(len(engine.cache._guesses)) or real(*given)
        engine.logits(ids())
        assert held and not any(held)


def test_what_is_sure_and_asked_for_is_not_asked_again(tmp_path):
    store, _ = store_of(tmp_path, "olmoe", num_hidden_layers=3)
    source = Farsighted(2, [(0, 1.0), (1, 1.0)])
    with opened(store, None, prefetch=source) as engine:
        engine.generate(ids(), 6)
    first, *later = source.asked
    assert first == (0, 0, 1) and all((layer - n) % 3 == 2 for _, n, layer in later)


@pytest.mark.parametrize("depth", [0, -1, True, 1.5, "2", None])
def test_a_depth_that_is_none_is_refused(depth, tmp_path):
    store, _ = store_of(tmp_path, "olmoe")
    with pytest.raises(ConfigError, match="a whole number >= 1, of layers after"):
        Engine.open(store, prefetch=Farsighted(depth))
