"""What an engine says over many tokens, at several sizes of its cache, and beside another engine."""

from __future__ import annotations

import threading

import pytest
import torch
from moe_models import RAW, ids, reference, saved

from poise_edgemoe.store.writer import convert


def opened(*given, **options):
    from test_engine import opened

    return opened(*given, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize("tokens", [32, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_transformers_at_every_size_of_the_cache(family, dtype, tokens, tmp_path):
    length = {"max_position_embeddings": 512, "eos_token_id": None}
    source = saved(tmp_path / "model", family, dtype, **length)
    store = convert(source, tmp_path / "store", bits=RAW[dtype])
    want = reference(source, dtype, context=512).generate(ids(2), tokens)
    assert want.shape[1] == ids().shape[1] + tokens and len(set(want[0].tolist())) > 8
    for experts in (1, 4, None):
        with opened(store, experts, context=512) as engine:
            assert torch.equal(engine.generate(ids(2), tokens), want), experts


@pytest.mark.parametrize("tokens", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_two_engines_on_one_store_at_once(tokens, tmp_path):
    source = saved(tmp_path / "model", "olmoe", max_position_embeddings=512, eos_token_id=None)
    store = convert(source, tmp_path / "store", bits=32)
    plain = reference(source, context=512)
    want = {seed: plain.generate(ids(1, 9, seed), tokens) for seed in range(2)}
    got, start = {}, threading.Barrier(2)

    def talk(seed):
        with opened(store, 2 + seed, direct=bool(seed), context=512) as engine:
            start.wait(60)
            got[seed] = engine.generate(ids(1, 9, seed), tokens)

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[seed], want[seed]) for seed in range(2))


def test_a_text_ends_where_the_generation_configuration_says(tmp_path):
    import json

    source = saved(tmp_path / "model", "olmoe", eos_token_id=None)
    said = source / "generation_config.json"
    end = reference(source).generate(ids(), 12)[0, 9 + 3]
    said.write_text(json.dumps({**json.loads(said.read_text()), "eos_token_id": [int(end), 256]}))
    want = reference(source).generate(ids(), 12)
    with opened(convert(source, tmp_path / "store", bits=32), None) as engine:
        assert want.shape[1] < 9 + 12 and torch.equal(engine.generate(ids(), 12), want)
