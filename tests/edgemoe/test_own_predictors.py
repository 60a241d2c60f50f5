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
