"""Stores in ggml's formats: the bytes of GGUF files on disk, multiplied by ggml where it is installed."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import some
from loads import asked_again
from moe_models import ids, saved
from test_fast import decoded, near, opened

import poise
from poise.errors import ConfigError, MissingExtra
from poise.quantizers import ggml
from poise.quantizers.formats import FORMATS
from poise.walk import open_weights
from poise_edgemoe import Engine, convert
from poise_edgemoe.store.index import read_index

CLOSE = 2e-2  # of ggml's kernel, on average, of a logit's average, after two layers


def needs(kernel=False):
    if (ggml.kernel() if kernel else ggml.library()) is None:
        pytest.skip(ggml.status())


def source_of(tmp_path, family="olmoe", dtype=torch.float32):
    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    return saved(tmp_path / "model", family, dtype, **wide)


def store_of(tmp_path, scheme, *model, **more):
    return convert(source_of(tmp_path, *model), tmp_path / "store", scheme=scheme, **{"hot": "raw"} | more)


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_store_holds_ggml_s_bytes(scheme, tmp_path):
    if poise.build("quantizer", scheme).searches:
        needs()
    store = store_of(tmp_path, scheme, layout="plain")
    index = read_index(store)
    assert index.quantizers == [{"entry": scheme}]
    experts = {w.name: w for w in open_weights(tmp_path / "model") if w.role == "expert"}
    data, quantizer = (store / "experts.bin").read_bytes(), poise.build("quantizer", scheme)
    with opened(store, 2, kernel="reference") as engine:
        for layer, e, parts in index.blobs():
            for part, m in parts.items():
                want = quantizer.quantize(experts[f"{index.layers[layer].path}.{e}.{part}"].read())
                blob = data[m.offset : m.offset + m.nbytes]
                assert blob == want.blocks.numpy().tobytes()
                held, _ = engine.cache.forms.matrix((layer, e), part, memoryview(bytearray(blob)))
                assert torch.equal(held.dequantize(), want.dequantize())


@pytest.mark.parametrize(("family", "scheme"), some(
    itertools.product(["olmoe", "gpt_oss"], FORMATS),
    keep=[("gpt_oss", "q4_0"), ("olmoe", "q8_0"), ("olmoe", "q3_k")]))
def test_ggml_s_kernel_agrees_with_the_reference_at_every_size_of_the_cache(scheme, family, tmp_path):
    needs(kernel=True)
    store, found = store_of(tmp_path, scheme, family), []
    for experts in (1, 3, None):
        with opened(store, experts) as engine:
            assert engine.cache.forms.fast and not engine.cache.forms.slow
            found.append((decoded(engine), decoded(engine, 3), engine.logits(ids(2))))
            assert torch.equal(decoded(engine), found[-1][0])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with opened(store, 2, kernel="ggml") as named, opened(store, 2, kernel="reference") as exact:
        assert torch.equal(decoded(named), found[0][0])
        for got, want in zip(found[0], (decoded(exact), decoded(exact, 3), exact.logits(ids(2)))):
            off = (got - want)[:, :1].abs().mean() / want[:, :1].abs().mean()  # later tokens may be others
            assert 0 < off < CLOSE


def test_hot_weights_in_ggml_s_formats(tmp_path):
    store = store_of(tmp_path, "q4_0", "olmoe", torch.bfloat16, hot="q8_0")
    index = read_index(store)
    assert index.hot["quantizer"] == {"entry": "q8_0"} and any("q_proj" in n for n in index.hot["packed"])
    with opened(store, None, kernel="reference") as exact, opened(store, None) as engine:
        assert near(engine.logits(ids(1)), exact.logits(ids(1)))


def test_bits_follow_from_the_scheme_and_others_are_refused(tmp_path):
    source = source_of(tmp_path)
    for bits, scheme in ((4, "q8_0"), (8, "q4_0"), (4, "q3_k")):
        with pytest.raises(ConfigError, match=f"bits={bits} is not allowed: {scheme} has"):
            convert(source, tmp_path / "no", bits=bits, scheme=scheme)
    with pytest.raises(ConfigError, match="bits=2 is not allowed: q4_0 has 4 bits"):
        convert(source, tmp_path / "no", scheme="q4_0", plan={"*.down": 2})
    mixed = convert(source, tmp_path / "mixed", bits=8, scheme="q8_0", plan={"*.0.*": 16}, hot="raw")
    assert {q["entry"] for q in read_index(mixed).quantizers} == {"q8_0", "raw"}


def test_without_ggml_a_store_is_read_slowly_and_the_extra_is_named(tmp_path, monkeypatch):
    store = store_of(tmp_path, "q4_0")
    with opened(store, 2, kernel="reference") as exact:
        want = decoded(exact)
    for name in ("_LIBRARY", "_KERNEL"):
        monkeypatch.setattr(ggml, name, asked_again(getattr(ggml, name)))
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"several times slower: .*pip install 'poise\[ggml\]'"):
        engine = Engine.open(store)
    with engine:
        assert not engine.cache.forms.fast and torch.equal(decoded(engine), want)
    with pytest.raises(ConfigError, match="kernel=ggml cannot be used with this store: down: no ggml"):
        Engine.open(store, kernel="ggml")
    with pytest.raises(MissingExtra, match=r"q4_k is made by ggml.*poise\[ggml\]"):
        convert(tmp_path / "model", tmp_path / "no", scheme="q4_k")


def test_kernels_of_other_stores_are_refused_by_name(tmp_path):
    needs(kernel=True)
    blocks = store_of(tmp_path / "a", "q4_0")
    codes = convert(source_of(tmp_path / "b"), tmp_path / "codes", bits=4, hot="raw")
    with pytest.raises(ConfigError, match="down: interleaved blocks are multiplied by ggml; kernel=auto"):
        Engine.open(blocks, kernel="c")
    with pytest.raises(ConfigError, match="down: codes in groups are multiplied by c or torch; kernel"):
        Engine.open(codes, kernel="ggml")
