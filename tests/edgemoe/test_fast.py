"""The engine on kernels that read packed bytes: the reference's numbers to a stated error."""

from __future__ import annotations

import warnings

import pytest
import torch
from loads import absent
from moe_models import FAMILIES, ids, saved

from poise.errors import ConfigError
from poise.native import compiler_at_hand
from poise.quantizers import kernel as core_kernel
from poise_edgemoe import Engine, convert, fused

CAUSAL = [f for f in FAMILIES if f != "switch_transformers"]
CLOSE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}  # on average, of a logit's average, after two layers


def opened(*given, **options):
    from test_engine import opened

    return opened(*given, **{"kernel": "auto"} | options)


@pytest.fixture(autouse=True)
def _compiler():
    try:
        compiler_at_hand()
    except RuntimeError:
        pytest.skip("there is no compiler")


def store_of(tmp_path, family, dtype=torch.float32, *, bits=4, **config):
    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    heads = {} if family.startswith("deepseek") else {"head_dim": 32}
    source = saved(tmp_path / "model", family, dtype, **wide | heads | config)
    return convert(source, tmp_path / "store", bits=bits, group=64, hot="raw")


def decoded(engine, rows=1, new=10):
    """Return the logits of a prompt's end and of every token after it, each token greedily chosen."""
    found = []
    prompt, step = engine._start(ids(rows))
    logits = step(prompt)
    for _ in range(new):
        found.append(logits)
        logits = step(logits.argmax(-1, keepdim=True))
    return torch.stack(found, 1)


def near(got, want):
    """Return whether logits are: another expert, of two that are as good, is seen in some of them."""
    return (got - want).abs().float().mean() < CLOSE[want.dtype] * want.abs().float().mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen3_moe"])
def test_it_agrees_with_the_reference(family, dtype, bits, tmp_path):
    store = store_of(tmp_path, family, dtype, bits=bits)
    for rows in (1, 3):
        with opened(store, 2, kernel="reference") as exact, opened(store, 2) as fast:
            assert fast.cache.forms.fast and not exact.cache.forms.fast
            want, got = decoded(exact, rows), decoded(fast, rows)
            first = slice(0, 1 if dtype == torch.bfloat16 else 10)  # tokens may part where logits are near
            assert near(got[:, first], want[:, first])
            assert near(fast.logits(ids(rows)), exact.logits(ids(rows)))


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_runs_and_gives_the_same_bits_at_every_size_of_the_cache(family, tmp_path):
    store, found = store_of(tmp_path, family), []
    for experts in (1, 3, None):
        with opened(store, experts) as engine:
            found += [(decoded(engine), decoded(engine, 3), engine.logits(ids(2))), ]
            again = decoded(engine)
        assert torch.equal(again, found[-1][0])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    with opened(store, 2, kernel="reference") as exact:
        assert near(found[0][0][:, :1], decoded(exact)[:, :1])


def test_experts_are_the_reference_s_where_the_margin_is_larger_than_the_error(tmp_path):
    store, chosen = store_of(tmp_path, "olmoe"), {}
    for kernel in ("reference", "auto"):
        with opened(store, None, kernel=kernel) as engine:
            used = chosen[kernel] = []
            for module in engine.experts:
                module.register_forward_pre_hook(
                    lambda _, given, used=used: used.append(given[1].sort(-1).values))
            decoded(engine, new=20)
            assert len(used) == 21 * len(engine.index.layers)
    same = [torch.equal(a, b) for a, b in zip(*chosen.values(), strict=True)]
    assert all(same)  # of random weights margins are a thousand times the error


def test_switch_transformers_run_on_it_too(tmp_path):
    source = saved(tmp_path / "model", "switch_transformers", d_model=64, d_ff=64)
    store = convert(source, tmp_path / "store", bits=4, group=64, hot="raw")
    with opened(store, 2, kernel="reference") as exact, opened(store, 2) as fast:
        assert fast.cache.forms.fast
        a, b = (e.logits(ids(2), ids(2, 5, 1)) for e in (exact, fast))
        assert 0 < (a - b).abs().max() < 2e-4 * a.abs().max()


def test_what_is_stored_raw_stays_exact(tmp_path):
    store = store_of(tmp_path, "olmoe", bits=32)
    with opened(store, 2, kernel="reference") as exact, opened(store, 2) as engine:
        assert not engine.cache.forms.fast and torch.equal(decoded(exact), decoded(engine))
        assert not any(isinstance(m, fused.Norm | fused.Attention) for m in engine.model.modules())


def test_kernels_that_cannot_be_used_are_errors_and_slow_ones_are_said(tmp_path, monkeypatch):
    packed = store_of(tmp_path / "a", "olmoe")
    raw = store_of(tmp_path / "b", "olmoe", bits=32)
    odd = convert(saved(tmp_path / "c", "olmoe"), tmp_path / "odd", bits=4, group=6)
    with pytest.raises(ConfigError, match="must be one of auto, reference, c, torch"):
        Engine.open(packed, kernel="cuda")
    with pytest.raises(ConfigError, match="kernel=c cannot be used with this store: down: its weights"):
        Engine.open(raw, kernel="c")
    with pytest.raises(ConfigError, match="groups of 6 columns"):
        Engine.open(odd, kernel="c")
    with pytest.warns(UserWarning, match="several times slower: groups of 6 columns"):
        Engine.open(odd).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for store in (packed, raw):
            Engine.open(store).close()
    monkeypatch.setattr(core_kernel, "_LOADED", absent("no compiler: install gcc"))
    with pytest.warns(UserWarning, match="no compiler: install gcc"):
        engine = Engine.open(packed)
    with engine, opened(packed, None, kernel="reference") as exact:
        assert torch.equal(engine.logits(ids(1)), exact.logits(ids(1)))


def test_torchs_kernel_by_name(tmp_path):
    store = store_of(tmp_path, "olmoe", torch.bfloat16)
    with opened(store, 2, kernel="reference") as exact, opened(store, 2, kernel="torch") as engine:
        a, b = decoded(exact, new=1), decoded(engine, new=1)
        assert 0 < (a - b).abs().max() < 0.1 * a.abs().max()


@pytest.mark.parametrize("family", [f for f in CAUSAL if not f.startswith("deepseek")])
def test_attention_and_norms_are_transformers_to_1e_5(family, tmp_path):
    store = store_of(tmp_path, family)
    with opened(store, None) as engine:
        mine = {type(m) for m in engine.model.modules() if isinstance(m, fused.Norm | fused.Attention)}
        assert fused.Attention in mine and (fused.Norm in mine or family == "phimoe")
        made = next(m for m in engine.model.modules() if isinstance(m, fused.Attention))
        calls, real = [], made._attend
        made._attend = lambda *given: calls.append(1) or real(*given)
        assert made.agrees(engine.model) and calls  # with other random numbers
        calls.clear()
        engine.generate(ids(3), 4)  # of one row, layers are ours as a whole
        assert calls


@pytest.mark.parametrize("what", ["scaling", "head_dim", "rotary", "q_norm", "clip"])
def test_a_module_that_computes_something_else_is_left(what, tmp_path):
    store = store_of(tmp_path, "qwen3_moe")
    with opened(store, None, kernel="reference") as engine:
        layer = engine.model.model.layers[0].self_attn
        if what == "clip":
            layer.config.clip_qkv = 1.0
        real = type(layer).forward

        def other(self, hidden_states, **more):
            out, weights = real(self, hidden_states=hidden_states, **more)
            return out * 1.01, weights

        if what != "clip":
            layer.forward = other.__get__(layer)
        made = fused._fused(layer, fused.library())
        assert not made.agrees(engine.model)


def test_opening_draws_no_numbers_and_any_default_type_will_do(tmp_path):
    store = store_of(tmp_path, "olmoe")
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    with opened(store, 2) as engine:
        assert torch.equal(torch.rand(1), want)
        texts = [engine.generate(ids(rows), 6) for rows in (1, 3)]
        torch.set_default_dtype(torch.float64)
        try:
            again = [engine.generate(ids(rows), 6) for rows in (1, 3)]
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(texts, again, strict=True))


def test_a_head_that_turns_in_part_is_left(tmp_path):
    store = store_of(tmp_path, "qwen3_moe")
    with opened(store, None, kernel="reference") as engine:
        made = fused._fused(engine.model.model.layers[0].self_attn, fused.library())
        assert made.agrees(engine.model)
        rotary = engine.model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq[:3]  # 6 of 32 numbers: C would read on behind them
        assert not made.agrees(engine.model)


def test_a_norm_refuses_rows_of_another_width_as_transformers_does(tmp_path):
    """Four rows of half the width are as many numbers as two whole rows."""
    store = convert(saved(tmp_path / "model", "qwen2_moe"), tmp_path / "store", bits=4, hot="raw")
    with Engine.open(store) as engine:
        norm = next(m for m in engine.model.modules() if isinstance(m, fused.Norm))
        with pytest.raises(RuntimeError, match="must match the size"):
            norm(torch.ones(4, len(norm.weight) // 2))
