"""The paper's baselines say what the engine says, and keep, read and wait for what their names mean."""

from __future__ import annotations

import itertools
import shutil
import threading

import pytest
import torch
from cases import some
from moe_models import ids, saved

from poise.errors import ConfigError, FileError
from poise_edgemoe.baselines import BASELINES, open_baseline
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.store.reader import Reader
from poise_edgemoe.store.writer import convert

TRAINED = ("IO-FREE", "IO-EXP")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores of one model: experts as trained, and in 4 bits."""
    folder = tmp_path_factory.mktemp("baselines")
    model = saved(folder / "model", "olmoe", num_experts=8, num_experts_per_tok=2)
    return {bits: convert(model, folder / f"store{bits}", bits=bits, group=8) for bits in (32, 4)}


def fitting(stores, name):
    return stores[32 if name in TRAINED else 4]


def every(store):
    """Return the bytes of all experts."""
    return sum(size_of(m) for _, _, m in read_index(store).blobs())


@pytest.mark.parametrize("rows", some([1, 3], keep=[3]))
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_says_what_the_engine_says(name, rows, stores):
    store = fitting(stores, name)
    with Engine.open(store, context=64, batch=3) as engine, \
            open_baseline(name, store, context=64, batch=3) as other:
        assert torch.equal(other.logits(ids(rows, 40)), engine.logits(ids(rows, 40)))
        assert torch.equal(other.generate(ids(rows), 9), engine.generate(ids(rows), 9))


@pytest.mark.parametrize("name", ["IO-FREE", "IO-QFREE"])
def test_what_keeps_all_reads_each_once_before_the_first_token(name, stores):
    store = fitting(stores, name)
    with open_baseline(name, store, context=64) as engine:
        assert engine.reader.bytes_read == every(store)
        engine.generate(ids(), 5)
        said = engine.stats()
        assert said["hit_rate"] == 1 and said["bytes_read"] == every(store) and said["misses"] == 0


@pytest.mark.parametrize("name", ["IO-EXP", "IO-QEXP"])
def test_what_is_loaded_on_demand_keeps_no_expert_until_the_next_token(name, stores):
    """Room for as many as a token uses in a layer: the next layer's take it."""
    store = fitting(stores, name)
    with open_baseline(name, store, context=64) as engine:
        list(engine.stream(ids(), 6))
        steps = engine.statistics.steps
        assert [s.hits for s in steps] == [0] * 6
        size = every(store) // sum(len(layer.experts) for layer in engine.index.layers)
        assert all(s.bytes_read == 2 * len(engine.index.layers) * size for s in list(steps)[1:])


@pytest.mark.parametrize("name", ["IO-EXP", "IO-QEXP", "STI"])
def test_a_budget_is_used_and_kept(name, stores):
    store = fitting(stores, name)
    with open_baseline(name, store, context=64) as least, Engine.open(store, context=64) as engine:
        most, smallest = engine.budget.total, least.budget.total
    with open_baseline(name, store, memory=(most + smallest) // 2, context=64) as engine:
        list(engine.stream(ids(), 8))
        assert smallest < engine.budget.total <= (most + smallest) // 2
        assert (engine.stats()["hits"] > 0) == (name != "STI")
        assert engine.cache.mapped <= engine.cache.budget


def test_a_stream_reads_every_expert_in_order_for_every_token(stores, monkeypatch):
    real, order = Reader._read, []

    def watched(self, request):
        order.append(request.what)
        real(self, request)

    monkeypatch.setattr(Reader, "_read", watched)
    store = stores[4]
    with open_baseline("STI", store, context=64) as engine:
        list(engine.stream(ids(), 4))  # the prompt, and three tokens
        ahead = len(engine.cache._ahead)
        passed = 4 * sum(len(layer.experts) for layer in engine.index.layers)
    whole = [f"expert {e} in layer {n}" for n, e, _ in read_index(store).blobs()]
    assert ahead == 2 and len(order) in range(passed, passed + ahead + 1)
    assert order == list(itertools.islice(itertools.cycle(whole), len(order)))


def test_a_stream_reads_ahead_as_far_as_its_budget_and_lends_to_others(stores):
    store = stores[4]
    size = max(size_of(m) for _, _, m in read_index(store).blobs())
    with open_baseline("STI", store, context=64) as least:
        smallest = least.budget.total
    with open_baseline("STI", store, memory=smallest + 3 * size, context=64) as engine:
        engine.generate(ids(), 3)
        cache = engine.cache
        assert len(cache._ahead) == 5 and not cache._empty
        with cache.lent(2 * size):
            assert len(cache._ahead) + len(cache._empty) == 3
            with cache.layer(0, [1]) as get:
                get(1, "down")
            assert len(cache._ahead) + len(cache._empty) == 3
        want = Engine.open(store, context=64)
        assert torch.equal(engine.generate(ids(), 9), want.generate(ids(), 9))
        want.close()


def test_a_stream_tells_of_an_altered_expert_and_goes_on(stores, tmp_path):
    store = shutil.copytree(stores[4], tmp_path / "store")
    bytes_ = bytearray((store / EXPERTS).read_bytes())
    at = read_index(store).layers[0].experts[3]["down"].offset
    bytes_[at] ^= 1
    (store / EXPERTS).write_bytes(bytes_)
    with open_baseline("STI", store, context=64) as engine:
        for _ in range(2):
            with pytest.raises(FileError, match="down of expert 3 in layer 0"):
                engine.generate(ids(1, 30), 2)
        bytes_[at] ^= 1
        (store / EXPERTS).write_bytes(bytes_)
        with open_baseline("STI", store, context=64) as other:
            assert torch.equal(engine.generate(ids(1, 30), 3), other.generate(ids(1, 30), 3))
    assert not any(t.name == "poise expert reader" for t in threading.enumerate())


def test_what_does_not_fit_is_refused(stores):
    for name, bits, options, said in (
        ("IO-FULL", 4, {}, r"baseline='IO-FULL' is not allowed: it must be one of IO-FREE"),
        ("IO-FREE", 4, {}, r"IO-FREE does not fit .* as trained \(convert with bits=16\)"),
        ("IO-QEXP", 32, {}, r"IO-QEXP does not fit .* needs experts quantized"),
        ("IO-QFREE", 4, {"memory": "1GB"}, r"memory=1GB has no effect: IO-QFREE keeps all experts"),
        ("STI", 4, {"memory": "1kB"}, r"memory=1kB is too small: the smallest workable value is \d+MB"),
        ("IO-EXP", 32, {"memory": "much"}, r"'much' is no number of bytes"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_baseline(name, stores[bits], context=64, **options)
