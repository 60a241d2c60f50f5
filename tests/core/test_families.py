"""In eleven families each expert and each router is met once, under one name, whatever is done to it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from poise import open_weights
from poise.errors import ConfigError, FileError
from poise.quantizers import AbsMax, quantize_model, resolve
from poise.testing.families import FAMILIES, MOE_BLOCKS, logits, tiny
from poise.testing.lowrank import LowRank
from poise.walk import FAMILIES as TABLE
from poise.walk import checkpoint, replace, weights
from poise.walk.experts import Experts
from poise_bone import Bone
from poise_edgemoe.widths.plans import experts as experts_of

every = pytest.mark.parametrize("family", FAMILIES)


def facts(found):
    return {w.name: (w.role, w.shape, w.expert, w.index, w.state_key, w.dtype) for w in found}


def test_the_table_has_a_row_for_each():
    assert set(FAMILIES) <= set(TABLE)


@every
def test_each_expert_and_each_router_is_met_once_under_one_name(family):
    found = list(weights(tiny(family)))
    routed = [w.expert for w in found if w.role == "expert"]
    parts = ("wi", "wo") if family == "switch_transformers" else ("gate_up", "down")
    n = 3 if family == "switch_transformers" else 4
    assert sorted((e.layer, e.number, e.part) for e in routed) == sorted(
        (b, e, p) for b in MOE_BLOCKS[family] for e in range(n) for p in parts)
    assert all(w.name.endswith(f".experts.{w.expert.number}.{w.expert.part}") for w in found if w.expert)
    routers = [w for w in found if w.role == "router"]
    assert len(routers) == len(MOE_BLOCKS[family]) == len({w.name for w in routers})
    assert all(w.shape == (n, 16) for w in routers)
    assert all(w.expert is None for w in found if w.role != "expert")


def test_shared_experts_and_their_gate_are_linears():
    for family, names in (("qwen2_moe", ("shared_expert.up_proj", "shared_expert_gate")),
                          ("deepseek_v2", ("shared_experts.down_proj",))):
        found = {w.name: w for w in weights(tiny(family))}
        hits = [w for n, w in found.items() if n.endswith(names)]
        assert len(hits) >= len(names) and {w.role for w in hits} == {"linear"}


@every
def test_packing_changes_what_is_stored_and_nothing_else(family):
    model = tiny(family)
    before = facts(weights(model))
    report = quantize_model(model, AbsMax(8, 8))
    after = list(weights(model))
    assert facts(after) == before and [w.name for w in after] == list(before)
    assert {w.name for w in after if w.stored is not None} == set(report["quantized"]) == {
        w.name for w in after if w.role in ("linear", "expert") and not w.tied_with}
    assert torch.isfinite(logits(model)).all()
    again = quantize_model(model, AbsMax(4, 8), dict.fromkeys(report["quantized"], 4))
    assert again["quantized"].keys() == report["quantized"].keys()
    assert {w.stored.bits for w in weights(model) if w.stored is not None} == {4}
    assert len(experts_of(model)) == len(MOE_BLOCKS[family]) * (3 if "switch" in family else 4)


@every
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_adapting_changes_nothing_that_the_walk_sees(family, packed):
    model = tiny(family)
    if packed:
        quantize_model(model, AbsMax(8, 8))
    before, kept = facts(weights(model)), {w.name: w.read().clone() for w in weights(model)}
    attached = LowRank().attach(model)
    adapted = {w.name for w in weights(model) if w.adapters == ("default",)}
    assert facts(weights(model)) == before and set(attached.layers) == adapted
    assert adapted == {w.name for w in weights(model) if w.role in ("linear", "expert")
                       and not w.name.endswith("lm_head")}
    assert all(torch.equal(w.read(), kept[w.name]) for w in weights(model))


@every
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_an_adapters_change_reaches_every_experts_product(family, packed):
    """The model with the changed weights written into it computes what the adapted one does."""
    model, reference = tiny(family), tiny(family)
    if packed:
        quantize_model(model, AbsMax(8, 8))
    objects = dict(model.named_parameters())
    untouched = logits(model)
    attached = LowRank(r=3).attach(model)
    assert torch.allclose(logits(model), untouched, atol=1e-6)
    for layer in attached.layers.values():
        layer.B.data.copy_(0.3 * torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(3)))
    adapted = logits(model)
    assert not torch.allclose(adapted, untouched, atol=1e-3)
    reference.load_state_dict(attached.folded_state_dict())
    assert torch.allclose(logits(reference), adapted, atol=1e-5)
    attached.detach()
    assert torch.equal(logits(model), untouched)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in objects.items()}


@every
def test_undoing_a_replacement_returns_the_same_objects(family):
    model = tiny(family)
    before = list(model.named_parameters())
    modules = [type(m) for m in model.modules()]
    untouched = logits(model)
    calls = []

    class Watched(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            calls.append(x.shape[-1])
            return self.base(x)

        def held_weights(self, path):
            from poise.walk import held

            yield from held(self.base, path)

    undo = [replace(w, Watched(w.layer)) for w in weights(model) if w.role == "expert"]
    assert torch.allclose(logits(model), untouched, atol=1e-6) and calls
    for one in undo:
        one()
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in before]
    assert [type(m) for m in model.modules()] == modules
    assert torch.equal(logits(model), untouched)


@pytest.mark.parametrize("misuse", [
    lambda held, x: torch.einsum("etd,edf->etf", x, held), lambda held, x: torch.cat([held, held]),
    lambda held, x: x @ held.transpose(1, 2), torch.bmm])
def test_what_experts_in_place_of_a_parameter_cannot_do_is_said_in_one_line(misuse):
    model = tiny("llama4_text")
    LowRank().attach(model)
    held = model.model.layers[0].feed_forward.experts.gate_up_proj
    assert held.shape == (4, 16, 48)
    with pytest.raises((ConfigError, AttributeError), match=(
            r"^Llama4TextExperts.gate_up_proj: experts that are packed or adapted .* not (in|by) .*"
            r"exclude_modules=..experts\.\*..$")):
        misuse(held, torch.zeros(4, 3, 16))


def test_a_batched_product_of_packed_experts_is_each_experts_own():
    model = tiny("llama4_text")
    block = model.model.layers[0].feed_forward.experts
    quantize_model(model, AbsMax(8, 8))
    found = [w for w in weights(model) if w.state_key == "model.layers.0.feed_forward.experts.down_proj"]
    x = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0))
    want = torch.stack([x[w.index] @ w.read().T for w in found])
    for y in (torch.bmm(x, block.down_proj), torch.bmm(x, mat2=block.down_proj), x @ block.down_proj):
        assert torch.allclose(y, want, atol=1e-6)


def test_an_expert_without_held_weights_is_refused():
    model = tiny("mixtral")
    w = next(w for w in weights(model) if w.role == "expert")
    with pytest.raises(ConfigError, match=r"Linear cannot take the place of .*: it has no held_weights"):
        replace(w, nn.Linear(*w.shape[::-1]))
    assert not any(isinstance(m, Experts) for m in model.modules())


def test_undoing_out_of_order_is_refused():
    model = tiny("mixtral")
    w = next(w for w in weights(model) if w.role == "expert")
    undo = replace(w, LowRank().attach(tiny("mixtral")).layers[w.name])
    again = replace(w, LowRank().attach(tiny("mixtral")).layers[w.name])
    with pytest.raises(ConfigError, match="another layer has been put over this one"):
        undo()
    again()
    undo()
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)


@every
def test_routers_are_left_alone_unless_they_are_named(family):
    model = tiny(family)
    routers = {w.name for w in weights(model) if w.role == "router"}
    report = quantize_model(tiny(family), AbsMax(8, 8), {"*": 8})
    assert not routers & set(report["quantized"])
    assert not routers & set(Bone(r=2).attach(tiny(family)).layers)
    wide = Bone(r=2, target_modules=["*"]).attach(tiny(family))
    assert not routers & set(wide.layers) and len(wide.layers) > 8
    name = next(iter(routers))
    if family == "switch_transformers":
        assert set(quantize_model(model, AbsMax(8, 8), {name: 8})["quantized"]) == {name}
        assert set(Bone(r=2, target_modules=["router.*"]).attach(tiny(family)).layers) == routers
    else:
        with pytest.raises(ConfigError, match=f"plan: {name} takes part in its module's own arithmetic"):
            quantize_model(model, AbsMax(8, 8), {name: 8})
        with pytest.raises(ConfigError, match=f"{name} takes part in its module's own arithmetic"):
            Bone(r=2, target_modules=[name]).attach(model)


# ------------------------------------------------------------------ files


@every
@pytest.mark.parametrize("shard", ["50GB", "8KB"], ids=["one file", "shards"])
def test_a_directory_gives_the_weights_of_the_loaded_model_bit_for_bit(family, shard, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = {w.name: w for w in weights(type(model).from_pretrained(tmp_path))}
    read = {w.name: w for w in open_weights(tmp_path)}
    assert facts(read.values()) == facts(loaded.values())
    for name, w in read.items():
        live = loaded[name]
        assert torch.equal(w.read(), live.read())
        assert torch.equal(w.read(slice(1, 3)), live.read()[1:3])
        assert torch.equal(w.read(slice(None, None, 2)), live.read()[::2])
        assert set(w.tied_with) == set(live.tied_with) and w.replaceable == live.replaceable
        assert w.module is None
    with pytest.raises(ConfigError, match="files are read only"):
        w.write(w.read())
    with pytest.raises(ConfigError, match="lies in a file"):
        next(x for x in read.values() if x.replaceable).layer  # noqa: B018


@every
def test_a_plan_is_resolved_from_files_as_on_the_model(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    for plan in (None, {"*": 4, "experts.0.*": 2}):
        here = resolve(weights(model), AbsMax(8, 8), plan)
        there = resolve(open_weights(tmp_path), AbsMax(8, 8), plan)
        assert {w.name: q for w, q in here} == {w.name: q for w, q in there}
        assert all(q.layout(w.shape, w.dtype)["codes"][0][0] == w.shape[0] for w, q in there)


@every
def test_the_checkpoint_is_the_plain_state(family):
    model = tiny(family)
    state, streamed = model.state_dict(), list(checkpoint(model))
    assert [k for k, _ in streamed] == list(state)
    assert all(torch.equal(state[k], t) for k, t in streamed)


def test_a_checkpoint_in_bfloat16_keeps_its_type(tmp_path):
    tiny("olmoe").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {w.dtype for w in open_weights(tmp_path)} == {torch.bfloat16}


def save(tmp_path, family="mixtral"):
    tiny(family).save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


def test_a_torn_file_is_named(tmp_path):
    file = sorted(save(tmp_path).glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FileError, match=f"{file.name} is missing or torn"):
        list(open_weights(tmp_path))
    file.unlink()
    with pytest.raises(FileError, match=f"{file.name} is missing or torn"):
        list(open_weights(tmp_path))


@pytest.mark.parametrize(("index", "words"), [
    ("{}", "has no weight_map"), ('["weight_map"]', "has no weight_map"), ("null", "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "names 3: only safetensors files beside"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "only safetensors files beside"),
    ('{"weight_map": {"a": "b.bin"}}', "only safetensors files beside"), ("{", "is not valid JSON"),
])
def test_an_index_from_a_stranger_is_checked(index, words, tmp_path):
    (save(tmp_path) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileError, match=words):
        list(open_weights(tmp_path))


def test_a_directory_without_files_or_config_is_named(tmp_path):
    with pytest.raises(FileError, match="is no directory"):
        list(open_weights(tmp_path / "nowhere"))
    with pytest.raises(FileError, match="has no safetensors files"):
        list(open_weights(tmp_path))


def test_a_foreign_format_is_named(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    save_file({"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)},
              tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"format with scales of its own \(MXFP4, FP8\)"):
        list(open_weights(tmp_path))


def test_gpt2_is_read_transposed(tmp_path):
    from poise.models.components import CausalLM

    model = CausalLM(architecture="GPT2LMHeadModel", hidden_size=16, layers=1).build()
    model.save_pretrained(tmp_path)
    live, read = ({w.name: w for w in found} for found in (weights(model), open_weights(tmp_path)))
    name = "transformer.h.0.attn.c_attn"
    assert read[name].shape == live[name].shape == (48, 16)
    assert torch.equal(read[name].read(), live[name].read())


def test_a_family_of_no_row_is_recognised_by_what_is_called_experts():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(2))
            self.router = nn.Linear(4, 2)

    model = nn.Sequential(Block(), nn.ModuleDict({"router": nn.Linear(4, 2)}))
    assert {w.name: (w.role, w.expert and dataclasses.astuple(w.expert)) for w in weights(model)} == {
        "0.experts.0.w1": ("expert", (0, 0, "w1")), "0.experts.1.w1": ("expert", (0, 1, "w1")),
        "0.router": ("router", None), "1.router": ("linear", None)}


def test_a_table_among_experts_is_no_expert():
    model = nn.ModuleDict({"experts": nn.ModuleDict({"0": nn.ModuleDict({
        "up": nn.Linear(4, 4), "table": nn.Embedding(3, 4), "conv": nn.Conv1d(4, 4, 2)})})})
    assert {w.name: w.role for w in weights(model)} == {
        "experts.0.up": "expert", "experts.0.table": "embedding", "experts.0.conv": "conv"}


def rewritten(tmp_path, change):
    """Save a Mixtral in one file, with its tensors changed."""
    from safetensors.torch import load_file, save_file

    tiny("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(change(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(("lost", "words"), [
    ("experts.1.w3.weight", r"experts.1.gate_up is not whole: only .*experts.1.w1.weight is there"),
    ("experts.1.", "expert 1 of model.layers.0.mlp is missing"),
])
def test_what_is_missing_of_an_expert_is_named(lost, words, tmp_path):
    """A half was read as a whole of another shape, and the others went on counting without it."""
    directory = rewritten(tmp_path, lambda t: {k: v for k, v in t.items() if lost not in k})
    with pytest.raises(FileError, match=words):
        list(open_weights(directory))


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    index = save(tmp_path) / "model.safetensors.index.json"
    mapped = json.loads(index.read_text())
    mapped["weight_map"]["model.layers.9.extra.weight"] = next(iter(mapped["weight_map"].values()))
    index.write_text(json.dumps(mapped))
    with pytest.raises(FileError, match=r"no shard holds model.layers.9.extra.weight"):
        list(open_weights(tmp_path))


def test_files_are_read_as_from_pretrained_reads_them(tmp_path):
    """In the type that the configuration names; the one file before an index; and no stranger beside it."""
    from safetensors.torch import save_file

    model = tiny("olmoe")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    tiny("olmoe", seed=1).save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
    save_file({"foo.weight": torch.ones(2, 2)}, tmp_path / "zz_adapter.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    loaded = {w.name: w for w in weights(type(model).from_pretrained(tmp_path))}
    read = {w.name: w for w in open_weights(tmp_path)}
    assert read.keys() == loaded.keys()
    assert all(torch.equal(w.read(), loaded[n].read()) for n, w in read.items())
    assert {w.dtype for w in read.values()} == {torch.bfloat16}


@pytest.mark.parametrize("config", ["[]", '{"model_type": ["mixtral"]}', '"mixtral"'])
def test_a_configuration_of_odd_types_is_named(config, tmp_path):
    (save(tmp_path) / "config.json").write_text(config)
    with pytest.raises(FileError, match=r"config\.json is no model's configuration"):
        list(open_weights(tmp_path))
