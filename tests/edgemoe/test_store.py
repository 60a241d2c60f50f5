"""A store holds what the model holds, or the model is refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from moe_models import FAMILIES, RAW, contents, ids, names, saved
from safetensors import safe_open

from poise.errors import ConfigError, DataError, FileError
from poise.testing.families import tiny
from poise.walk import open_weights
from poise_edgemoe.cache.slots import Forms
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.store.schemes import SCHEMES, Raw, read_quantizer, scheme_quantizer, written
from poise_edgemoe.store.writer import convert


def matrices(store):
    """Yield (layer, expert, part, stored matrix, bias) of a store, read plainly."""
    index, data = read_index(store), (store / EXPERTS).read_bytes()
    forms = Forms(index)
    for n, e, parts in index.blobs():
        for part, m in parts.items():
            buffer = memoryview(bytearray(data[m.offset:][: m.nbytes]))
            yield n, e, part, *forms.matrix((n, e), part, buffer)


# ------------------------------------------------------------------ what is in it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_raw_experts_come_back_bit_for_bit(family, dtype, tmp_path):
    source = saved(tmp_path / "model", family, dtype)
    store = convert(source, tmp_path / "store", bits=RAW[dtype])
    found = {w.name: w for w in open_weights(source) if w.role == "expert"}
    index, seen = read_index(store), 0
    for n, e, part, stored, _ in matrices(store):
        w = found[f"{index.layers[n].path}.{e}.{part}"]
        got = stored.dequantize()
        assert torch.equal(got.T if index.layers[n].transposed else got, w.read()) and got.dtype == dtype
        seen += 1
    assert seen == len(found)


def test_biases_of_experts_lie_beside_their_matrices(tmp_path):
    model = tiny("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj_bias.normal_()
    store = convert(model, tmp_path / "store", bits=32)
    for n, e, part, _, bias in matrices(store):
        if n == 0 and part == "down":
            assert torch.equal(bias, experts.down_proj_bias[e])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", [*SCHEMES, "absmax"])
def test_every_scheme_stores_what_its_quantizer_makes(scheme, bits, tmp_path):
    model = tiny("mixtral")
    store = convert(model, tmp_path / "store", bits=bits, scheme=scheme, group=8, hot="raw")
    quantizer = scheme_quantizer(scheme, bits, 8)
    gate_up = model.model.layers[1].mlp.experts.gate_up_proj
    for n, e, part, stored, _ in matrices(store):
        if n == 1 and part == "gate_up":
            assert torch.equal(stored.dequantize(), quantizer.quantize(gate_up[e].detach()).dequantize())


def test_a_plan_gives_matrices_bits_of_their_own(tmp_path):
    model = tiny("mixtral")
    plan = {"*.down": 8, "model.layers.1.mlp.experts.2.*": 2, "model.layers.0.mlp.experts.0.gate_up": 16,
            "model.layers.0.mlp.experts.1.gate_up": 32}
    index = read_index(convert(model, tmp_path / "store", bits=4, group=8, plan=plan))
    bits = {(n, e, part): index.quantizers[m.form]["bits"]
            for n, e, parts in index.blobs() for part, m in parts.items()}
    assert bits[0, 3, "gate_up"] == 4 and bits[0, 3, "down"] == 8
    assert bits[1, 2, "gate_up"] == bits[1, 2, "down"] == 2
    assert bits[0, 0, "gate_up"] == 16 and bits[0, 1, "gate_up"] == 32
    with pytest.raises(ConfigError, match="'attention' matches no weight"):
        convert(model, tmp_path / "other", plan={"attention": 4})


def test_each_matrix_begins_at_a_page_and_blobs_follow_one_another(tmp_path):
    index = read_index(convert(tiny("olmoe"), tmp_path / "store", bits=3, group=8))
    end = 0
    for _, _, parts in index.blobs():
        assert list(parts) == ["gate_up", "down"]
        for m in parts.values():
            assert m.offset == end and not m.offset % 4096
            end = m.offset + -(-m.nbytes // 4096) * 4096
    assert end == (tmp_path / "store" / EXPERTS).stat().st_size


def test_the_same_model_gives_the_same_bytes_from_files_shards_and_memory(tmp_path):
    source = saved(tmp_path / "model", "qwen3_moe")
    model = tiny("qwen3_moe")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(source / "poise_tokenizer.json", tmp_path / "shards")
    first = contents(convert(source, tmp_path / "a", group=8))
    assert contents(convert(source, tmp_path / "b", group=8)) == first
    assert contents(convert(tmp_path / "shards", tmp_path / "c", group=8)) == first
    live = contents(convert(model, tmp_path / "d", group=8))
    assert live[EXPERTS] == first[EXPERTS] and live["hot.safetensors"] == first["hot.safetensors"]


def test_scales_that_half_precision_does_not_hold_are_kept_in_full(tmp_path):
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1].mul_(1e7)
    index = read_index(convert(model, tmp_path / "store", bits=4, group=8, hot="raw"))
    form = index.quantizers[index.layers[0].experts[1]["down"].form]
    assert form["scale_dtype"] == "float32"
    assert index.quantizers[index.layers[0].experts[0]["down"].form]["scale_dtype"] == "float16"


def test_hot_weights_whose_scales_fp16_does_not_hold_are_packed_with_wider_ones(tmp_path):
    model = tiny("mixtral")
    projection = model.model.layers[1].self_attn.o_proj
    projection.weight.data *= 1e-9
    store = convert(model, tmp_path / "store", bits=4, group=8, hot=8)
    assert read_index(store).hot["quantizer"]["scale_dtype"] == "float32"
    own = projection.weight.detach().clone()
    with Engine.open(store, kernel="reference") as engine:
        kept = engine.model.model.layers[1].self_attn.o_proj.packed.get().dequantize()
    assert 0 < (kept - own).abs().max() < 0.01 * own.abs().max()


def test_what_is_written_of_a_quantizer_is_read_again():
    for quantizer in (Raw("bfloat16"), scheme_quantizer("asym_group", 3, 32)):
        assert read_quantizer(written(quantizer), "here") == quantizer
    for said in ({}, {"entry": "gone"}, {"entry": "affine", "bits": 99}, {"entry": "raw", "kind": "i8"}, 3):
        with pytest.raises(FileError):
            read_quantizer(said, "here")


# ------------------------------------------------------------------ refusals of a source


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 5}, "bits=5 is not allowed: it must be one of 2, 3, 4, 8, 16, 32"),
    ({"bits": True}, "bits=True is not allowed"),
    ({"scheme": "asym_grup"}, "scheme='asym_grup' is not allowed; did you mean 'asym_group'"),
    ({"group": 0}, "group=0 is not allowed in asym_group"),
    ({"group": "64"}, "group='64' is not allowed in asym_group"),
    ({"plan": [4]}, "a plan is a mapping of names or patterns to bits, not list"),
    ({"plan": {"*.down": 5}}, "bits=5 is not allowed"),
    ({"hot": 5}, "hot=5 is not allowed: it must be one of bf16, raw, 8, 4, q8_0, q4_0, q4_k, q3_k, q2_k "
                 "or a quantizer"),
])
def test_an_option_that_is_not_allowed_is_named(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        convert(tiny("mixtral"), tmp_path / "store", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_mixture_of_experts_is_refused(tmp_path):
    import transformers

    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32))
    llama.save_pretrained(tmp_path / "llama")
    for model in (llama, tmp_path / "llama", str(tmp_path / "llama")):
        with pytest.raises(ConfigError, match=r"'llama', which is not served \(known: mixtral, olmoe"):
            convert(model, tmp_path / "store")
    with pytest.raises(ConfigError, match="neither a directory nor a transformers model"):
        convert(torch.nn.Linear(2, 2), tmp_path / "store")
    with pytest.raises(FileError, match=r"has no config\.json"):
        convert(tmp_path, tmp_path / "store")
    (tmp_path / "taken").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("taken", "nowhere"):
        with pytest.raises(ConfigError, match=f"{name} exists: remove it first"):
            convert(llama, tmp_path / name)


def test_missing_shards_and_numbers_that_are_none_are_refused(tmp_path):
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(FileError, match="is missing or torn"):
        convert(tmp_path / "model", tmp_path / "store")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = float("nan")
    for bits in (4, 32):
        with pytest.raises(DataError, match=r"weight model.layers.1.mlp.experts.2.down .*NaN or Inf"):
            convert(model, tmp_path / f"store{bits}", bits=bits)
        assert not (tmp_path / f"store{bits}").exists()
    healthy = tiny("mixtral")
    with torch.no_grad():
        healthy.model.norm.weight[0] = float("inf")
    with pytest.raises(DataError, match=r"weight model.norm.weight holds NaN or Inf"):
        convert(healthy, tmp_path / "store")


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_biases_of_experts_that_are_no_numbers_are_refused(number, bits, tmp_path):
    model = tiny("gpt_oss")
    model.model.layers[1].mlp.experts.gate_up_proj_bias.data[2, 3] = number
    with pytest.raises(DataError, match=r"weight model.layers.1.mlp.experts.gate_up_proj_bias holds"):
        convert(model, tmp_path / "store", bits=bits)
    assert names(tmp_path) == {"store.partial"}


def test_a_hot_weight_that_cannot_be_packed_is_named(tmp_path):
    model = tiny("mixtral")
    model.model.layers[0].self_attn.q_proj.weight.data[0, :2] = torch.tensor([3e38, -3e38])
    with pytest.raises(DataError, match=r"weight model.layers.0.self_attn.q_proj.weight "):
        convert(model, tmp_path / "store", hot=4, bits=32)


def shared_part(model):
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj


def shared_module(model):
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts


def shared_memory(model):
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = torch.nn.Parameter(first.down_proj.data[:])


def untied_head(model):
    model.config.tie_word_embeddings = True


def without_norm(model):
    model.model.norm = torch.nn.Identity()


def one_more(model):
    model.model.register_buffer("mine", torch.zeros(3))


@pytest.mark.parametrize(("change", "words"), [
    (shared_part, r"layers.0.mlp.experts.0.down is one weight with model.layers.1.mlp.experts.0.down"),
    (shared_module, r"layers.0.mlp.experts.0.gate_up is one weight with model.layers.1.mlp.experts.0"),
    (shared_memory, r"layers.0.mlp.experts.0.down is one weight with model.layers.1.mlp.experts"),
    (lambda m: m.to(torch.float64), r"layers.0.mlp.experts.0.gate_up is float64, .*cast the model"),
    (lambda m: m.to("meta"), r"embed_tokens.weight lies on the meta device.*load the model's weights"),
    (untied_head, r"ties lm_head.weight with model.embed_tokens.weight, and the model's differ"),
    (without_norm, r"model.norm.weight is missing: a store is opened as the configuration says"),
    (one_more, r"model.mine is none of MixtralForCausalLM"),
])
def test_a_live_model_that_could_not_be_opened_again_is_refused(change, words, tmp_path):
    model = tiny("mixtral")
    change(model)
    with pytest.raises(ConfigError, match=words):
        convert(model, tmp_path / "store", bits=32)
    assert not names(tmp_path)


def tied_norms(model):
    first, second = model.model.layers
    first.input_layernorm.weight.data.uniform_(0.5, 1.5)
    second.input_layernorm.weight = first.input_layernorm.weight


def tied_head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def tied_head_as_configured(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


@pytest.mark.parametrize("tie", [tied_norms, tied_head, tied_head_as_configured])
def test_a_live_model_with_tied_weights_is_served_with_its_own_numbers(tie, tmp_path):
    model = tiny("mixtral").requires_grad_(False)
    tie(model)
    with Engine.open(convert(model, tmp_path / "store", bits=32), batch=2) as engine:
        assert torch.equal(engine.logits(ids(2)), model(input_ids=ids(2)).logits)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hot_weights_hold_no_experts_and_each_tensor_once(family, live, tmp_path):
    model = tiny(family)
    source = model if live else saved(tmp_path / "model", family)
    store = convert(source, tmp_path / "store", bits=32)
    with safe_open(store / "hot.safetensors", framework="pt") as f:
        keys = {*f.keys()}
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    tied = tied if family == "switch_transformers" else set()
    assert keys == {k for k in model.state_dict() if ".experts." not in k} - tied
