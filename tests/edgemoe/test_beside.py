"""A model that somebody alters in place: tokens are what altered modules make of them, as prompts are."""

from __future__ import annotations

import pytest
import torch
from test_fast import _compiler, decoded, opened, store_of  # noqa: F401 - a fixture for every test
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from poise_edgemoe.beside import Beside


class Negative(torch.nn.Module):
    def forward(self, weight):
        return -weight


def _norm(first):
    first.input_layernorm.weight.data.mul_(1.5)


def _moved_norm(first):
    first.post_attention_layernorm.weight.data = 1.5 * first.post_attention_layernorm.weight.data


def _norm_of_queries(first):
    first.self_attn.q_norm.weight.data.mul_(3)


def _no_norm_of_queries(first):
    first.self_attn.q_norm = torch.nn.Identity()


def _moved(first):
    first.self_attn.o_proj.weight.data = -2 * first.self_attn.o_proj.weight.data


def _another_parameter(first):
    first.self_attn.v_proj.weight = torch.nn.Parameter(-2 * first.self_attn.v_proj.weight.data)


def _parametrized(first):
    parametrize.register_parametrization(first.self_attn.o_proj, "weight", Negative())


def _router(first):
    first.mlp.gate.weight = torch.nn.Parameter(-first.mlp.gate.weight.data)


def _fewer_experts(first):
    first.mlp.gate.top_k = 1


def _flat_scores(first):
    first.self_attn._plain[0].scaling = 0.01


def _large_eps(first):
    first.input_layernorm._plain[0].variance_epsilon = 10.0


def _another_forward(first):
    real = first.self_attn.o_proj.forward
    first.self_attn.o_proj.forward = lambda x: 0 * real(x)


def _other_experts(first):
    real = first.mlp.experts.forward
    first.mlp.experts.forward = lambda *given: 0 * real(*given)


def _half_of_all_weights(first):
    for p in first.parameters():
        p.data = p.data / 2


ALTERED = [_norm, _moved_norm, _norm_of_queries, _no_norm_of_queries, _moved, _another_parameter,
           _parametrized, _router, _fewer_experts, _flat_scores, _large_eps, _another_forward,
           _other_experts, _half_of_all_weights]


def through_modules(engine):
    """Take all that is ours out of the way of tokens."""
    for module in engine.model.modules():
        if isinstance(module, Beside):
            module.forward = module._plain[0].forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_model_is_computed_as_it_is(alter, dtype, tmp_path):
    store, found = store_of(tmp_path, "qwen3_moe", dtype), []
    for plain in (False, True):
        with opened(store, 2) as engine:
            before = decoded(engine)
            if plain:
                through_modules(engine)
            alter(engine.model.model.layers[0])
            found.append(decoded(engine, new=3))
    got, want = found
    assert (got - want).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2) * want.abs().max()
    assert (got - before[:, :3]).abs().max() > 2 * (got - want).abs().max()


def test_a_model_that_is_cast_is_computed_in_its_type(tmp_path):
    store, found = store_of(tmp_path, "qwen3_moe"), []
    for plain in (False, True):
        with opened(store, 2) as engine:
            if plain:
                through_modules(engine)
            engine.model.bfloat16()
            found.append(decoded(engine, new=3))
    assert found[0].dtype == torch.bfloat16 and torch.equal(*found)


def test_what_is_put_back_is_fast_again(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        want, gate = decoded(engine), engine.model.model.layers[0].mlp.gate
        gate.top_k = 1
        assert not torch.equal(decoded(engine), want)
        gate.top_k = 2
        assert torch.equal(decoded(engine), want) and engine.model.model.layers[0]._same


def test_who_listens_to_all_modules_hears_of_those_that_are_replaced(tmp_path):
    with opened(store_of(tmp_path, "qwen3_moe"), 2) as engine:
        heard, module = [], engine.model.model.layers[0].self_attn.o_proj
        hook = register_module_forward_hook(lambda m, *given: heard.append(1) if m is module else None)
        try:
            decoded(engine)
        finally:
            hook.remove()
        assert len(heard) == 11  # the prompt, and ten tokens


def test_an_engine_that_was_opened_in_inference_mode_serves_outside_of_it(tmp_path):
    store = store_of(tmp_path, "qwen3_moe", torch.bfloat16)
    with opened(store, 2) as engine:
        want = decoded(engine)
    with torch.inference_mode():
        engine = opened(store, 2)
        assert torch.equal(decoded(engine), want)
    with engine:
        assert torch.equal(decoded(engine), want)
