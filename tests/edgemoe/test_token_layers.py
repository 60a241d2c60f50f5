"""A layer as one token goes through it in C: what transformers makes of it, or left alone."""

from __future__ import annotations

import pytest
import torch
from moe_models import ids
from test_fast import _compiler, decoded, opened, store_of  # noqa: F401 - a fixture for every test

from poise.quantizers.kernel import kernel
from poise_edgemoe import body, fused, layer_parts, layers
from poise_edgemoe.cache.traces import RoutingTrace
from poise_edgemoe.prefetch import Modules
from poise_edgemoe.replay import replay

OURS = {"mixtral": 2, "olmoe": 2, "qwen3_moe": 2, "granitemoe": 2, "gpt_oss": 1}  # of two layers


def ours(engine):
    return [m for m in engine.model.modules() if isinstance(m, layers.Layer)]


def through_modules(engine):
    inner = engine.model.model
    engine.model.model = inner._plain[0] if isinstance(inner, body.Body) else inner
    for layer in ours(engine):
        layer._takes = lambda *given: False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", OURS)
def test_a_token_is_what_the_modules_make_of_it(family, dtype, tmp_path):
    store = store_of(tmp_path, family, dtype)
    with opened(store, 2) as engine, opened(store, 2) as plain:
        assert len(ours(engine)) == OURS[family]
        assert isinstance(engine.model.model, body.Body) == (family != "gpt_oss")
        through_modules(plain)
        got, want = decoded(engine), decoded(plain)
        if dtype == torch.float32:
            assert (got - want).abs().max() < 1e-5 * want.abs().max()
            assert engine.stats()["hits"] == plain.stats()["hits"]
        assert (got - want)[:, :2].abs().max() < 3e-2 * want.abs().max()
        assert torch.equal(decoded(engine), got)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "phimoe"])
def test_a_layer_of_other_parts_is_left(family, tmp_path):
    with opened(store_of(tmp_path, family), 2) as engine:
        assert not ours(engine)


def test_hot_weights_in_few_bits_go_through_it_too(tmp_path):
    from moe_models import saved

    from poise_edgemoe import convert

    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    source = saved(tmp_path / "model", "qwen3_moe", torch.float32, **wide)
    store = convert(source, tmp_path / "store", bits=4, group=64, hot=8)
    with opened(store, 2) as engine, opened(store, 2, kernel="reference") as exact:
        assert len(ours(engine)) == 2 and not ours(exact) and isinstance(engine.model.model, body.Body)
        got, want = decoded(engine), decoded(exact)
        assert (got - want).abs().float().mean() < 2e-2 * want.abs().float().mean()  # bfloat16, as saved


def _shared(layer, block):
    real = type(block).forward
    block.forward = lambda x: real(block, x) + 0.1 * x


def _scaled(layer, block):
    real = type(layer).forward
    layer.forward = lambda hidden_states, **more: 0.9 * real(layer, hidden_states=hidden_states, **more)


def _other_router(layer, block):
    real = type(block.gate).forward

    def biased(x):  # experts are chosen by other numbers than those that weigh them
        logits, _, _ = real(block.gate, x)
        index = (logits + torch.linspace(0, 1, logits.shape[1])).topk(block.gate.top_k).indices
        return logits, logits.softmax(-1).gather(1, index), index

    block.gate.forward = biased


def _sigmoid_router(layer, block):
    real = type(block.gate).forward

    def sigmoid(x):
        logits, _, index = real(block.gate, x)
        return logits, logits.sigmoid().gather(1, index), index

    block.gate.forward = sigmoid


def _other_gate(layer, block):
    (like,) = block.experts._like
    like._apply_gate = lambda x: torch.nn.functional.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]


def _a_module_more(layer, block):
    block.shared_expert = torch.nn.Linear(64, 64)


@pytest.mark.parametrize("change", [None, _shared, _scaled, _other_router, _sigmoid_router, _other_gate,
                                    _a_module_more])
def test_a_layer_that_computes_something_else_is_left(change, tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        plain = ours(engine)[0]._plain[0]
        if change is not None:
            change(plain, plain.mlp)
        made = layers._layer(plain, fused.library(), kernel().multiplier, layer_parts.Scratch())
        way = None if made is None else made.way(engine.model)
        assert (way == layers.Way(of_all=True)) if change is None else way is None


def test_c_takes_a_token_through_all_layers_whose_experts_are_there(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), None) as engine:
        want, asked = decoded(engine), []  # every expert that is used has been
        for layer in ours(engine):
            real = layer._mixture
            layer._mixture = lambda x, real=real: asked.append(1) or real(x)
        inner, calls = engine.model.model, []
        through = inner._through
        inner._through = lambda *given: calls.append(1) or through(*given)
        before = engine.stats()["hits"]
        assert torch.equal(decoded(engine), want) and len(calls) == 10 and not asked
        assert engine.stats()["hits"] - before >= 10 * 2 * 2 and engine.stats()["misses"] <= 8


def test_c_knows_what_a_prompt_has_used(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), None) as engine:
        prompt, step = engine._start(torch.arange(48)[None])
        step(prompt)
        used = [held for held in engine.cache.resident.values() if held.matrices]
        assert len(used) >= 6 and all(held.told is not None for held in used)


def test_what_an_embedding_returns_is_not_written_to(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), None) as engine:
        want, kept = decoded(engine), []
        embedding = engine.model.model.embed_tokens
        embedding.register_forward_hook(lambda module, given, out: kept.append((given[0], out)))
        assert torch.equal(decoded(engine), want) and len(kept) == 11
        assert all(torch.equal(out, embedding.weight[ids_]) for ids_, out in kept)


def test_a_layer_that_is_left_keeps_its_kernels(tmp_path):
    from moe_models import saved

    from poise_edgemoe import convert

    wide = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    source = saved(tmp_path / "model", "qwen3_moe", torch.float32, **wide)
    with opened(convert(source, tmp_path / "store", bits=4, group=64, hot=8), 2) as engine:
        plain = ours(engine)[0]._plain[0]
        for name in "qkvo":
            getattr(plain.self_attn, f"{name}_proj").packed.kernel = "auto"
        _scaled(plain, plain.mlp)
        made = layers._layer(plain, fused.library(), kernel().multiplier, layer_parts.Scratch())
        assert made.way(engine.model) is None and plain.self_attn.q_proj.packed.kernel == "auto"


@pytest.mark.parametrize("what", [None, "embedding", "norm", "a part more", "a layer of another kind"])
def test_a_model_that_computes_something_else_around_its_layers_is_left(what, tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        inner = engine.model.model._plain[0]
        engine.model.model = inner
        if what == "embedding":
            real = inner.forward
            inner.forward = lambda input_ids, **more: real(
                inputs_embeds=2 * inner.embed_tokens(input_ids), **more)
        elif what == "norm":
            real = inner.forward

            def scaled(**more):
                out = real(**more)
                out.last_hidden_state *= 1.01
                return out

            inner.forward = scaled
        elif what == "a part more":
            inner.adapter = torch.nn.Linear(2, 2)
        elif what == "a layer of another kind":
            inner.layers[1] = inner.layers[1]._plain[0]
        body.put_body(engine.model)
        assert isinstance(engine.model.model, body.Body) == (what is None)


@pytest.mark.parametrize("name", ["", "embed_tokens", "norm", "rotary_emb", "layers.1"])
def test_who_listens_around_the_layers_hears_of_it(name, tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        want, heard = decoded(engine), []
        module = engine.model.model.get_submodule(name)
        hook = module.register_forward_hook(lambda *given: heard.append(1))
        assert (decoded(engine) - want).abs().max() < 1e-5 * want.abs().max()
        assert len(heard) == 11
        hook.remove()
        assert torch.equal(decoded(engine), want)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.q_norm",
                                  "mlp", "mlp.gate", "mlp.experts"])
def test_who_listens_to_a_module_hears_of_it(name, tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        want, heard = decoded(engine), []
        module = ours(engine)[0].get_submodule(name)
        hook = module.register_forward_hook(lambda *given: heard.append(1))
        assert (decoded(engine) - want).abs().max() < 1e-5 * want.abs().max()
        assert len(heard) == 11  # the prompt, and ten tokens
        hook.remove()
        assert torch.equal(decoded(engine), want)


def test_a_module_that_is_replaced_takes_effect(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        before = decoded(engine)
        for layer in ours(engine):
            layer.self_attn.o_proj = torch.nn.Linear(*reversed(layer.self_attn.o_proj.weight.shape))
        after = decoded(engine)
        through_modules(engine)
        assert torch.equal(decoded(engine), after) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_whom_its_router_would_choose(dtype, tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe", dtype), 2) as engine:
        for layer in ours(engine):
            parts = layer.parts
            x = torch.randn(50, 1, 64, dtype=dtype)
            want, got = Modules(parts.second, parts.router, False).chosen(x), layer.chosen(x)
            alike = (want == got).all(1).float().mean()
            assert got.shape == want.shape and alike > (0.99 if dtype == torch.float32 else 0.8)


def test_numbers_that_are_none_choose_experts_all_the_same(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        layer = ours(engine)[0]
        x = torch.full((1, 1, 64), torch.nan)
        assert layer.chosen(x).tolist() == [[0, 1]]
        engine.model.model.embed_tokens.weight.data[5] = torch.nan
        prompt, step = engine._start(ids())
        step(prompt)
        assert step(torch.tensor([[5]])).isnan().all()
        engine.model.model.embed_tokens.weight.data[5] = 0
        assert decoded(engine).isfinite().all()


def test_recorded_routing_takes_the_place_of_its_own(tmp_path):
    uses = tuple((layer, e) for token in range(4) for layer in range(2) for e in (token % 3, 3))
    trace = RoutingTrace(2, 4, (1, 1), (), uses)
    store = store_of(tmp_path, "qwen3_moe")
    with opened(store, 2) as engine, opened(store, 2) as plain:
        through_modules(plain)
        found = []
        for one in (engine, plain):
            one.cache.recorded = []
            with replay(one, trace):
                found.append((decoded(one, new=4), one.cache.recorded))
        assert found[0][1] == found[1][1]
        assert (found[0][0] - found[1][0]).abs().max() < 1e-5 * found[1][0].abs().max()


@pytest.mark.parametrize("experts", [0, 1, 3, None])
def test_c_knows_those_experts_that_are_in_memory_and_no_others(experts, tmp_path):
    store = store_of(tmp_path, "qwen3_moe")
    with opened(store, experts) as engine, opened(store, experts) as plain:
        through_modules(plain)
        prompt, step = engine._start(ids())
        _, other = plain._start(ids())
        logits, want = step(prompt), other(prompt)
        for _ in range(20):
            token = logits.argmax(-1, keepdim=True)
            logits, want = step(token), other(token)
            assert (logits - want).abs().max() < 1e-5 * want.abs().max()
            told = {key: held.told.address for key, held in engine.cache.resident.items() if held.told}
            known = {(layer.parts.experts.number, e): place for layer in ours(engine)
                     for e, place in enumerate(layer._there) if place}
            assert known == told
        assert known or not experts
        assert engine.stats()["hits"] == plain.stats()["hits"]


@pytest.mark.parametrize("name", ["STI", "IO-QEXP", "IO-QFREE"])
def test_baselines_go_through_it_too(name, tmp_path):
    from poise_edgemoe.baselines import open_baseline

    store = store_of(tmp_path, "qwen3_moe")
    with opened(store, None) as engine:
        want = decoded(engine)
    with open_baseline(name, store) as engine:
        assert ours(engine) and torch.equal(decoded(engine), want)


def test_a_failed_read_is_an_error_and_the_next_call_reads_again(tmp_path):
    from poise.errors import FileError

    with opened(store_of(tmp_path, "qwen3_moe"), 1) as engine:
        want = decoded(engine)
        prompt, step = engine._start(ids())
        step(prompt)
        real = engine.cache._matrix
        engine.cache._matrix = lambda held, part: (_ for _ in ()).throw(FileError("torn"))
        with pytest.raises(FileError, match="torn"):
            step(torch.tensor([[5]]))
        engine.cache._matrix = real
        assert torch.equal(decoded(engine), want)


def test_more_threads_change_nothing(tmp_path):
    store = store_of(tmp_path, "qwen3_moe", hidden_size=1024, moe_intermediate_size=1024)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with opened(store, 2) as engine:
                assert ours(engine)
                prompt, step = engine._start(ids())
                step(prompt[:, :1])
                found.append(step(prompt[:, 1:2]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
