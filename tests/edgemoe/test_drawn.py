"""Stores that are drawn open as those that are converted, and drawn routing reuses as it was asked to."""

from __future__ import annotations

import pytest
import torch
from moe_models import ids

from poise.errors import ConfigError, FileError
from poise.testing.families import tiny
from poise_edgemoe import Engine
from poise_edgemoe.drawn import drawn_trace, reuse, write_drawn_store
from poise_edgemoe.replay import replay
from poise_edgemoe.store.index import read_index

CAUSAL = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "phimoe")


@pytest.mark.parametrize("family", CAUSAL)
def test_a_drawn_store_opens_and_decodes(family, tmp_path):
    config = tiny(family).config
    store = write_drawn_store(tmp_path / "store", config, group=16)
    index = read_index(store)
    assert index.family == config.model_type and index.dtype == "bfloat16" and index.hot["packed"]
    with Engine.open(store, context=64, kernel="reference") as engine:
        logits = engine.logits(ids(1))
        assert logits.isfinite().all() and logits.float().std() > 0
        assert engine.generate(ids(1), 6).shape[1] > 9
    again = write_drawn_store(tmp_path / "again", config, group=16)
    assert (again / "experts.bin").read_bytes() == (store / "experts.bin").read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_drawn_store(store, config)
    assert not list(tmp_path.glob("*.partial"))


def test_a_drawn_store_in_planes_is_the_same_store(tmp_path):
    found = []
    for planes in (1, 2):
        store = write_drawn_store(tmp_path / f"{planes}", tiny("gpt_oss").config, group=16, planes=planes)
        assert read_index(store).planes == planes
        with Engine.open(store, context=64, kernel="reference") as engine:
            found.append(engine.logits(ids(1)))
    assert torch.equal(*found)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_drawn_routing_reuses_experts_as_often_as_asked(share):
    trace = drawn_trace(6, 64, 8, 60, share, seed=3)
    assert abs(reuse(trace) - share) < 0.04 and len(trace.decode) == 6 * 8 * 60
    assert all(0 <= e < 64 for _, e in trace.decode) and trace == drawn_trace(6, 64, 8, 60, share, seed=3)
    with pytest.raises(ConfigError, match="not allowed"):
        drawn_trace(6, 4, 8, 60, share)


def test_an_oracle_of_drawn_routing_is_never_wrong(tmp_path):
    store = write_drawn_store(tmp_path / "store", tiny("qwen3_moe").config, group=16)
    layers = len(read_index(store).layers)
    trace = drawn_trace(layers, 4, 2, 12, 0.3)
    torch.manual_seed(0)
    with Engine.open(store, context=64, prefetch="oracle", trace=trace) as engine, replay(engine, trace):
        engine.generate(ids(1), 10)
        assert engine.stats()["prefetch"]["wasted"] == 0


def test_a_model_without_experts_is_refused(tmp_path):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="has no routed experts"):
        write_drawn_store(tmp_path / "store", transformers.LlamaConfig(num_hidden_layers=1, **sizes))


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    config = tiny("mixtral").config

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poise_edgemoe.drawn.finish", full)
    with pytest.raises(FileError, match="No space left on device"):
        write_drawn_store(tmp_path / "store", config, group=16)
    assert not list(tmp_path.iterdir())


def test_a_drawn_store_has_the_widths_of_a_plan(tmp_path):
    config = tiny("mixtral").config
    whole = read_index(write_drawn_store(tmp_path / "whole", config, bits=4, group=16))
    names = [(n, e, part) for n, e, parts in whole.blobs() for part in parts]
    widths = {key: (2, 3, 16)[i % 3] for i, key in enumerate(names)}
    plan = {f"{whole.layers[n].path}.{e}.{part}": b for (n, e, part), b in widths.items()}
    store = write_drawn_store(tmp_path / "store", config, scheme="sym_channel", plan=plan)
    index = read_index(store)
    bits = {(n, e, part): index.quantizers[m.form]["bits"] for n, e, parts in index.blobs()
            for part, m in parts.items()}
    assert bits == widths
    with Engine.open(store, context=64, kernel="reference") as engine:
        assert engine.logits(ids(1)).isfinite().all()
    plan.popitem()
    with pytest.raises(ConfigError, match="the plan does not name"):
        write_drawn_store(tmp_path / "other", config, plan=plan)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.partial"))
