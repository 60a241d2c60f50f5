"""The walk meets every weight of a model exactly once, under a name that a person can read."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from poise.errors import ConfigError
from poise.models.components import CausalLM
from poise.quantizers import Affine, quantize_model
from poise.walk import (
    count,
    held,
    matches,
    path_of,
    refuse_tied,
    replace,
    replace_module,
    select,
    weights,
)
from poise_bone import Bone
from poise_compander import WeightCompander

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])
MIXTURES = [
    "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM", "GraniteMoeForCausalLM",
    "GptOssForCausalLM", "SwitchTransformersForConditionalGeneration",
]
OTHERS = ["LlamaForCausalLM", "GPT2LMHeadModel", "resnet", "convolutions", "embeddings"]


def build(name):
    torch.manual_seed(0)
    if name.startswith("Switch"):
        return transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                vocab_size=257, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_experts=3,
                num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
                num_sparse_decoder_layers=1, decoder_start_token_id=0,
            )).eval()
    if name == "resnet":
        from poise.models.components import ResNet20

        return ResNet20(in_channels=2, classes=3, width=2).build().eval()
    if name == "convolutions":
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4, padding=1),
            nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(6, 6, 2, groups=3),
        ).eval()
    if name == "embeddings":
        return nn.Sequential(nn.Embedding(257, 8), nn.Linear(8, 4)).eval()
    return CausalLM(architecture=name, hidden_size=16, layers=2).build().eval()


def forward(name, model):
    with torch.no_grad():
        if name.startswith("Switch"):
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
        if name == "resnet":
            return model(torch.linspace(-1, 1, 128).view(1, 2, 8, 8))
        if name == "convolutions":
            return model(torch.linspace(-1, 1, 50).view(1, 2, 5, 5))
        if name == "embeddings":
            return model(IDS)
        return model(input_ids=IDS).logits


def matrices(model):
    """The unique parameters that hold weights."""
    return {id(p): p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("bias")}


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_every_weight_is_met_exactly_once(name):
    model = build(name)
    met = list(weights(model))
    assert sum(w.numel for w in met) == sum(p.numel() for p in matrices(model).values())
    assert len({w.name for w in met}) == len(met) == len({w.key for w in met})
    assert all(tuple(w.read().shape) == w.shape for w in met)
    everything = torch.cat([w.read().flatten() for w in met]).sort().values
    held = torch.cat([p.detach().flatten() for p in matrices(model).values()]).sort().values
    assert torch.equal(everything, held)


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_what_is_written_is_read_and_some_rows_are_the_rows_of_all(name):
    model = build(name)
    for w in weights(model):
        new = torch.arange(w.numel, dtype=torch.float32).reshape(w.shape) / w.numel
        w.write(new)
        assert torch.equal(w.read(), new), w.name
        for rows in (slice(0, 1), slice(1, None, 2), slice(-2, None)):
            assert torch.equal(w.read(rows), new[rows]), w.name
        assert not w.read().requires_grad


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_writing_back_what_was_read_changes_nothing(name):
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for w in weights(model):
        w.write(w.read().clone())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_written_values_are_the_ones_the_model_computes_with(name):
    """Halving all of a role changes the output; undoing it restores the output bit for bit."""
    model = build(name)
    before = forward(name, model)
    for role in sorted({w.role for w in weights(model)}):
        kept = {w.name: w.read().clone() for w in weights(model) if w.role == role}
        for w in weights(model):
            if w.name in kept:
                w.write(0.5 * w.read())
        assert not torch.equal(forward(name, model), before), role
        for w in weights(model):
            if w.name in kept:
                w.write(kept[w.name])
        assert torch.equal(forward(name, model), before), role


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_each_expert_is_its_own_weight(name):
    """With all tokens routed everywhere, changing any one expert changes the output."""
    torch.manual_seed(0)
    model = CausalLM(architecture=name, hidden_size=16, layers=1, experts=3,
                     experts_per_token=3).build().eval()
    before = forward(name, model)
    experts = [w for w in weights(model) if w.role == "expert"]
    assert len(experts) == 6
    for w in experts:
        kept = w.read().clone()
        w.write(kept.flip(0))
        assert not torch.equal(forward(name, model), before), w.name
        w.write(kept)
    assert torch.equal(forward(name, model), before)


@pytest.mark.parametrize(("name", "transposed"), [
    ("MixtralForCausalLM", False), ("GptOssForCausalLM", True)])
def test_an_expert_is_seen_as_out_in(name, transposed):
    model = build(name)
    experts = model.model.layers[1].mlp.experts
    found = {w.name: w for w in weights(model)}
    up, down = (found[f"model.layers.1.mlp.experts.2.{n}"] for n in ("gate_up", "down"))
    hidden, inner = 16, 32
    assert up.shape == (2 * inner, hidden) and down.shape == (hidden, inner)
    stored = experts.gate_up_proj[2]
    assert torch.equal(up.read(), stored.T if transposed else stored)
    assert (up.index, up.expert.number, up.expert.layer) == (2, 2, 1)
    assert up.parameter == "gate_up_proj" and up.module is experts


@pytest.mark.parametrize("name", MIXTURES)
def test_names_are_readable(name):
    model = build(name)
    names = [w.name for w in weights(model)]
    assert all(re.fullmatch(r"[a-zA-Z][\w]*(\.\w+)*", n) for n in names)
    assert not any("weight" in n.rsplit(".", 1)[-1] and n.endswith(".weight") for n in names)
    experts = [w for w in weights(model) if w.role == "expert"]
    assert all(re.search(r"\.experts\.\d+\.\w+$", w.name) for w in experts)


def test_the_names_of_a_mixture():
    names = {w.name: w.role for w in weights(build("MixtralForCausalLM"))}
    for name, role in (
        ("model.layers.0.mlp.experts.1.gate_up", "expert"),
        ("model.layers.1.mlp.experts.3.down", "expert"),
        ("model.layers.0.self_attn.q_proj", "linear"), ("model.layers.0.mlp.gate", "router"),
        ("model.embed_tokens", "embedding"), ("lm_head", "linear"),
    ):
        assert names[name] == role


# ------------------------------------------------------------------ ties


def tied_llama():
    return CausalLM(architecture="LlamaForCausalLM", hidden_size=16,
                    overrides={"tie_word_embeddings": True}).build().eval()


def test_a_tied_weight_is_met_once_under_its_first_name():
    model = tied_llama()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = [w for w in weights(model) if w.tied_with]
    assert [(w.name, w.tied_with) for w in tied] == [("model.embed_tokens", ("lm_head",))]
    assert "lm_head" not in {w.name for w in weights(model)}
    with pytest.raises(ConfigError, match=r"bone: model.embed_tokens is tied with lm_head.*untie"):
        refuse_tied(list(weights(model)), "bone")
    refuse_tied([w for w in weights(model) if not w.tied_with], "bone")


def test_a_module_that_is_used_twice_is_one_weight():
    layer = nn.Linear(4, 4)
    (only,) = weights(nn.Sequential(layer, nn.Tanh(), layer))
    assert (only.name, only.tied_with) == ("0", ("2",))


# ------------------------------------------------------------------ each kind of layer


def test_gpt2s_conv1d_is_seen_transposed():
    model = build("GPT2LMHeadModel")
    w = next(w for w in weights(model) if w.name == "transformer.h.0.attn.c_attn")
    assert (w.role, w.shape) == ("linear", (48, 16))
    assert torch.equal(w.read(), w.module.weight.T)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    w.write(torch.eye(48, 16))
    assert torch.equal(w.module(x)[:, :16], x)


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Conv1d(3, 5, 4), (5, 12)), (nn.Conv2d(3, 5, (2, 4)), (5, 24)), (nn.Conv3d(2, 3, 2), (3, 16)),
    (nn.Conv2d(6, 6, 3, groups=6), (6, 9)), (nn.Conv2d(4, 6, 3, groups=2), (6, 18)),
])
def test_a_convolution_is_a_row_per_filter(layer, shape):
    (w,) = weights(layer)
    assert (w.role, w.shape) == ("conv", shape)
    assert torch.equal(w.read()[2], layer.weight[2].flatten())


@pytest.mark.parametrize("layer", [nn.ConvTranspose1d(3, 5, 4), nn.ConvTranspose2d(3, 5, 2)])
def test_a_transposed_convolution_is_a_row_per_output_channel(layer):
    (w,) = weights(layer)
    assert w.shape == (5, 3 * layer.weight[0, 0].numel())
    assert torch.equal(w.read()[4], layer.weight[:, 4].flatten())
    new = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    w.write(new)
    assert torch.equal(layer.weight[:, 4].flatten(), new[4])


def test_norms_and_biases_are_no_weights():
    assert list(weights(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(3)))) == []
    assert [w.name for w in weights(build("GptOssForCausalLM")) if "bias" in w.name] == []


def test_a_parametrized_weight_is_seen_as_the_model_sees_it():
    class Double(nn.Module):
        def forward(self, v):
            return 2 * v

        def right_inverse(self, w):
            return w / 2

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    parametrize.register_parametrization(model[0], "weight", Double())
    assert [(w.name, w.role) for w in weights(model)] == [("0", "linear"), ("1", "linear")]
    w = next(weights(model))
    w.write(torch.ones(3, 4))
    assert torch.equal(model[0].weight, torch.ones(3, 4))
    assert torch.equal(model[0].parametrizations.weight.original, 0.5 * torch.ones(3, 4))


def test_a_weight_of_two_originals_is_met_once():
    """Weight normalization keeps two tensors for one weight."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert [(w.name, w.shape) for w in weights(model)] == [("0", (3, 4)), ("1", (2, 3))]


def test_writing_another_shape_is_refused():
    (w,) = weights(nn.Linear(4, 3))
    with pytest.raises(ConfigError, match=r"has shape \(3, 4\), not \(4, 3\)"):
        w.write(torch.ones(4, 3))


# ------------------------------------------------------------------ packed, adapted


@pytest.mark.parametrize("name", [*MIXTURES[:5], "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_quantizing_changes_no_name(name):
    model = build(name)
    before = [(w.name, w.shape) for w in weights(model)]
    report = quantize_model(model, Affine(bits=8, group=8))
    after = {w.name: w for w in weights(model)}
    assert sorted(before) == sorted((n, w.shape) for n, w in after.items())
    assert {n for n, w in after.items() if w.stored is not None} == set(report["quantized"])
    for w in after.values():
        assert torch.equal(w.read(slice(1, 3)), w.read()[1:3])


def test_writing_to_a_packed_weight_quantizes_again():
    model = build("MixtralForCausalLM")
    quantize_model(model, Affine(bits=8, group=8))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.1.down"):
        w = next(w for w in weights(model) if w.name == name)
        new = torch.linspace(-1, 1, w.numel).reshape(w.shape)
        w.write(new)
        assert torch.equal(w.read(), Affine(bits=8, group=8).quantize(new).dequantize())
        assert (w.read() - new).abs().max() < 0.01


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("adapter", [Bone(r=4), WeightCompander()], ids=lambda a: type(a).__name__)
def test_attaching_changes_no_name_and_adds_no_weight(name, adapter):
    model = build(name)
    before = [(w.name, w.shape) for w in weights(model)]
    attached = adapter.attach(model)
    assert [(w.name, w.shape) for w in weights(model)] == before
    attached.fold()
    assert [(w.name, w.shape) for w in weights(model)] == before


def test_an_adapter_on_a_bare_layer_or_a_root_is_looked_through():
    from poise_bone.layers import BoneLayer

    root = BoneLayer(nn.Linear(8, 4), (2, 4))
    assert [w.shape for w in weights(root)] == [(4, 8)]
    (w,) = weights(nn.Sequential(BoneLayer(nn.Linear(8, 4), (2, 4))))
    assert (w.name, w.shape) == ("0", (4, 8))


def test_counts():
    model = build("embeddings")
    assert count(model) == {"parameters": 257 * 8 + 36, "trainable": 257 * 8 + 36,
                            "weights": 257 * 8 + 32}
    model[0].requires_grad_(False)
    assert count(model)["trainable"] == 36
    Bone(r=2).attach(model)
    assert count(model)["trainable"] == 8 and count(model)["weights"] == 257 * 8 + 32


# ------------------------------------------------------------------ selection


def test_patterns_cover_whole_names_or_their_last_parts():
    name = "model.layers.3.mlp.experts.5.gate_up"
    for pattern in (name, "gate_up", "experts.5.gate_up", "experts.*.gate_up", "*.experts.*",
                    "mlp.*", "model.layers.3.*", "gate_*"):
        assert matches(name, pattern), pattern
    for pattern in ("up", "gate", "experts", "layers.3", "experts.4.*", "Gate_up", "model"):
        assert not matches(name, pattern), pattern


def test_selection_includes_then_excludes():
    model = build("LlamaForCausalLM")
    q = select(model, ["q_proj", "k_proj"])
    assert [w.name for w in q] == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in ("q", "k")]
    assert [w.name for w in select(model, ["*_proj"], ["layers.1.*", "mlp.*"])] == [
        f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert [w.name for w in select(model, roles=("embedding",))] == ["model.embed_tokens"]
    assert len(select(model)) == len(list(weights(model)))


def test_a_pattern_that_matches_nothing_is_named_with_the_nearest():
    model = build("LlamaForCausalLM")
    for include, exclude in ((["q_prj"], None), (None, ["q_prj"])):
        with pytest.raises(ConfigError, match="'q_prj' matches no weight; did you mean 'q_proj'") as e:
            select(model, include, exclude)
        assert "down_proj" in str(e.value)


def test_an_empty_selection_is_an_error():
    with pytest.raises(ConfigError, match=r"no weight is selected .*'conv'.*\['linear'\]"):
        select(nn.Linear(2, 2), roles=("conv",))
    with pytest.raises(ConfigError, match="no weight is selected"):
        select(nn.Sequential(nn.Linear(2, 2)), ["0"], ["0"])


def test_modules_are_found_and_replaced_by_path():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    assert path_of(model, model[1][0]) == "1.0"
    new = nn.Linear(2, 5)
    replace_module(model, "1.0", new)
    assert model[1][0] is new


def test_a_layer_in_two_places_is_replaced_in_both_and_comes_back():
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def held_weights(self, path):
            yield from held(self.base, path)

        def forward(self, x):
            return 2 * self.base(x)

    layer, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4)
    model = nn.Sequential(layer, nn.Identity(), layer)
    before = model(x)
    (w,) = weights(model)
    undo = replace(w, Doubled(w.layer))
    assert model[0] is model[2] and torch.allclose(model(x), 4 * before)
    undo()
    assert model[0] is layer and model[2] is layer and torch.equal(model(x), before)
