"""Adapters on one model: in order, each on the weight as the earlier left it; merged, kept, read again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import poise
from poise import load_adapter, open_weights, save_adapter
from poise.errors import ConfigError, FileError, RunError
from poise.models.causal_lm import load, save_model
from poise.models.components import CausalLM
from poise.quantizers import Affine, PackedLinear, quantize_model
from poise.testing import check_adapter
from poise.testing.adapter import small_model
from poise.testing.families import FAMILIES, IDS, tiny
from poise.testing.lowrank import LowRank
from poise.walk import checkpoint, replace, weights
from poise_bone import Bone
from poise_compander import LrMatched, WeightCompander, WeightNorm

few = settings(max_examples=25, derandomize=True, deadline=None, database=None)


def randomize(attached, seed=0, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    for group in attached.trainable():
        for p in group["params"]:
            p.data.copy_(scale * torch.randn(p.shape, generator=generator))
    return attached


def dtype_of(model):
    return next(p.dtype for p in model.parameters())


def call(model, x=None):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 48).view(3, 16).to(dtype_of(model)) if x is None else x)


def gpt2(packed=False):
    torch.manual_seed(0)
    model = CausalLM(architecture="GPT2LMHeadModel", hidden_size=16, layers=1).build().eval()
    if packed:
        quantize_model(model, Affine(8, 8))
    return model


# ------------------------------------------------------------------ the kit's own adapter


@pytest.mark.parametrize("adapter", [LowRank(), LowRank(multiply=True)], ids=["sum", "product"])
def test_the_kits_own_adapter_keeps_the_contract(adapter):
    def packed():
        model = small_model()
        quantize_model(model, Affine(4, 8))
        return model

    check_adapter(adapter)
    check_adapter(adapter, packed, make_plain=small_model)


# one of each storage of experts: joined, with biases, transposed, in modules, beside shared ones
ON_EXPERTS = some(((kind, family) for kind in ("plain", "packed") for family in FAMILIES),
                  keep=[("plain", "gpt_oss"), ("plain", "switch_transformers"), ("plain", "deepseek_v2"),
                        ("packed", "mixtral"), ("packed", "llama4_text")])


@pytest.mark.parametrize(("kind", "family"), ON_EXPERTS)
def test_the_kits_own_adapter_keeps_the_contract_on_experts(kind, family):
    class Model(nn.Module):
        """Called with ids alone, encoder and decoder alike."""

        def __init__(self):
            super().__init__()
            self.inner = tiny(family)
            if kind == "packed":
                quantize_model(self.inner, Affine(8, 8))

        def forward(self, ids):
            both = {"decoder_input_ids": ids} if self.inner.config.is_encoder_decoder else {}
            return self.inner(input_ids=ids, **both).logits

    def plain():
        made = Model()
        made.inner = tiny(family)
        return made

    multiply = family in ("mixtral", "gpt_oss")  # the change that depends on the weight, on both layouts
    check_adapter(LowRank(multiply=multiply), Model, IDS, make_plain=plain if kind == "packed" else None)


# ------------------------------------------------------------------ order


@few
@given(st.permutations(["bone", "low_rank", "left"]), st.integers(0, 99))
def test_each_acts_on_the_weight_as_the_earlier_left_it(order, seed):
    made = {"bone": Bone(r=3), "low_rank": LowRank(r=2), "left": LowRank(r=2, multiply=True)}
    model, reference = small_model(torch.float64), small_model(torch.float64)
    for step, name in enumerate(order):
        randomize(made[name].attach(model, name), seed + step)
        one = randomize(made[name].attach(reference, name), seed + step)
        one.merge()  # the reference has it in its weights before the next is attached
        assert torch.allclose(call(model), call(reference), rtol=1e-10, atol=1e-12)
    assert [w.adapters for w in weights(model)] == [tuple(order)] * 2


def test_what_depends_on_the_weight_sees_the_earlier_change_come_and_go():
    model = small_model(torch.float64)
    first = randomize(Bone(r=4).attach(model, "first"))
    second = randomize(LowRank(r=2, multiply=True).attach(model, "second"), 1)
    both = call(model)
    layer = second.layers["0"]
    W, D = layer.weight_beneath.read(), first.layers["0"].D.detach()
    assert torch.allclose(layer.beneath(), W + D.T.repeat(1, 4), rtol=1e-12)
    with first.disable():
        assert torch.equal(layer.beneath(), W)
        assert not torch.allclose(call(model), both)
    assert torch.equal(call(model), both)


def three(dtype=torch.float64):
    model = small_model(dtype)
    made = [randomize(Bone(r=2).attach(model, n), i) for i, n in enumerate("abc")]
    return model, *made


def test_folding_and_merging_out_of_order_is_refused_with_the_order():
    model, a, b, c = three()
    before = call(model)
    for attached, verb, first in ((b, "fold", "a"), (c, "fold", "a"), (b, "merge", "a"), (c, "merge", "a")):
        words = rf"{attached.name}: '{first}' acts before .*: {verb} '{first}' first"
        with pytest.raises(ConfigError, match=words):
            getattr(attached, verb)()
    with pytest.raises(ConfigError, match="b: 'a' acts before it on the same weights: fold 'a' first"):
        b.folded_state_dict()
    a.fold()
    b.fold()
    assert torch.allclose(call(model), before, rtol=1e-12)
    with pytest.raises(ConfigError, match=r"a: 'b', attached later, is folded .*: unfold 'b' before"):
        a.unfold()
    with pytest.raises(ConfigError, match="c: it is not active, and fold would change the output"):
        c.active = False
        c.fold()
    c.active = True
    with pytest.raises(ConfigError, match="a: it is folded into the weights: unfold"):
        a.active = False
    b.unfold()
    a.unfold()
    assert torch.equal(call(model), before)


def test_an_inactive_adapter_does_not_wake_up_below_a_folded_one():
    _, a, b, _ = three()
    a.active = False
    b.fold()
    with pytest.raises(ConfigError, match="a: 'b', attached later, is folded into the same weights"):
        a.active = True
    b.unfold()
    a.active = True


def test_any_may_go_first_and_the_others_act_as_before():
    for gone in range(3):
        model, *made = three()
        reference, *others = three()
        made[gone].detach()
        randomize(others[gone], scale=0.0)
        assert torch.equal(call(model), call(reference))
        kept = [w.adapters for w in weights(model)]
        assert kept == [tuple(n for n in "abc" if n != "abc"[gone])] * 2


def test_merging_one_after_the_other_gives_the_plain_model():
    model, a, b, c = three()
    before = call(model)
    for attached in (a, b, c):
        attached.merge()
        assert torch.allclose(call(model), before, rtol=1e-12)
    assert [type(m) for m in model.modules()] == [type(m) for m in small_model().modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_requires_grad_returns_when_the_last_adapter_goes():
    model = small_model()
    model[1].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    first = Bone(r=2, target_modules=["0"]).attach(model, "first")
    second = LowRank(r=2, target_modules=["3"]).attach(model, "second")
    first.detach()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"3.A", "3.B"}
    second.merge()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_what_is_gone_says_so():
    _, a, b, _ = three()
    a.merge()
    b.detach()
    for one in (a, b):
        for action in (one.fold, one.unfold, one.merge, one.detach, one.folded_weights,
                       lambda one=one: one.load_state_dict({})):
            with pytest.raises(RunError, match="was merged or detached: attach again"):
                action()


def test_a_name_is_taken_once():
    model = small_model()
    Bone(r=2).attach(model)
    with pytest.raises(ConfigError, match=r"has an adapter named 'default' \(it has default\): attach"):
        LowRank().attach(model)
    LowRank().attach(model, "other")


def test_training_one_leaves_the_other_alone():
    model = small_model()
    first = randomize(Bone(r=2).attach(model, "first"))
    second = LowRank(r=2).attach(model, "second")
    kept = {k: v.clone() for k, v in first.state_dict().items()}
    optimizer = second.optimizer(torch.optim.Adam, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(kept[k], v) for k, v in first.state_dict().items())
    assert float(second.layers["0"].B.detach().abs().max()) > 0


# ------------------------------------------------------------------ with one that holds its weights alone


def test_a_compander_shares_its_weights_with_nobody():
    for path in ("fast", "reference"):
        model = small_model()
        attached = WeightCompander(path=path, target_modules=["0"]).attach(model)
        with pytest.raises(ConfigError, match=r"0 is (held by 'compander'|reparameterized)"):
            Bone(r=2).attach(model, "bone")
        with pytest.raises(ConfigError, match="bone: it freezes the base, and 'compander' trains it"):
            Bone(r=2, exclude_modules=["0"]).attach(model, "bone")
        attached.merge()
        bone = Bone(r=2, target_modules=["3"]).attach(model)
        with pytest.raises(ConfigError, match="compander: it trains the base, and an adapter on the"):
            WeightCompander(path=path, target_modules=["0"]).attach(model)
        bone.detach()
        assert all(p.requires_grad for p in model.parameters())


def test_a_compander_refuses_an_adapted_weight():
    model = small_model()
    Bone(r=2).attach(model, "mine")
    with pytest.raises(ConfigError, match="compander: 0 is adapted by 'mine': call merge"):
        WeightCompander().attach(model)
    with pytest.raises(ConfigError, match="0 is adapted by 'mine': quantize the model before attach"):
        quantize_model(model, Affine(4, 8))


# ------------------------------------------------------------------ merge


def test_tied_weights_stay_tied():
    model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16,
                     overrides={"tie_word_embeddings": True}).build().eval()
    randomize(Bone(r=4).attach(model)).merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_gpt2_merges_into_its_own_layers(packed, tmp_path):
    model = gpt2(packed)
    attached = randomize(Bone(r=4, target_modules=["c_attn", "c_fc"]).attach(model))
    before = call(model, IDS).logits
    folded = attached.folded_state_dict()
    assert folded.keys() == gpt2().state_dict().keys()
    assert folded["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    attached.merge()
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert isinstance(model.transformer.h[0].mlp.c_proj, PackedLinear) == packed
    assert torch.allclose(call(model, IDS).logits, before, atol=1e-5)
    assert all(torch.equal(t, folded[k]) for k, t in checkpoint(model))
    save_model(model, None, tmp_path, checkpoint(model))
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(call(again, IDS).logits, before, atol=1e-5)


def test_a_merged_model_saves_as_a_plain_one(tmp_path):
    """The fault of old: `q_proj.base.weight` and `q_proj.D` were written, and re-initialised when read."""
    torch.manual_seed(0)
    model = CausalLM(architecture="MixtralForCausalLM", hidden_size=16).build().eval()
    attached = randomize(LowRank().attach(model))
    before = call(model, IDS).logits
    attached.merge().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(call(again, IDS).logits, before, atol=1e-5)


def test_merging_keeps_a_fold():
    model = small_model()
    attached = randomize(Bone(r=4).attach(model))
    attached.fold()
    folded = call(model)
    assert torch.equal(call(attached.merge()), folded)


def test_an_adapter_acts_in_torchs_fused_encoder_too():
    """In evaluation it multiplies by `linear1.weight` itself, when that is a tensor."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    untouched = call(model, x)
    attached = randomize(Bone(r=4).attach(model))
    assert set(attached.layers) == {"linear1", "linear2"}  # attention multiplies by its own itself
    acting = call(model, x)
    assert not torch.allclose(acting, untouched, atol=1e-3)
    assert torch.allclose(call(attached.merge(), x), acting, atol=1e-5)
    quantize_model(model, Affine(8, 8))
    dense = copy.deepcopy(model)
    for name in ("linear1", "linear2"):
        setattr(dense, name, getattr(model, name).dense())
    assert torch.allclose(call(model, x), call(dense, x), atol=1e-5)


def test_a_layer_stands_in_for_a_linear_where_its_weight_is_asked_for():
    linear = nn.Linear(16, 4)
    model = nn.Sequential(linear)
    attached = randomize(Bone(r=2).attach(model))
    x = torch.randn(3, 16)
    layer = model[0]
    assert torch.allclose(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.allclose(nn.functional.linear(x, layer.weight), layer(x) - linear.bias, atol=1e-6)
    assert (layer.weight.shape, layer.weight.dtype, layer.in_features) == ((4, 16), torch.float32, 16)
    with pytest.raises(TypeError, match="takes part in its own product only, not in norm"):
        torch.norm(layer.weight)
    attached.detach()
    assert model[0] is linear


def test_a_layer_without_a_weight_is_given_one_that_stands_in():
    class Doubled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

        def held_weights(self, path):
            from poise.walk import held

            yield from held(self.base, path)

    model = nn.Sequential(nn.Linear(4, 4))
    (w,) = weights(model)
    undo = replace(w, Doubled(w.layer))
    assert model[0].weight.shape == (4, 4) and [w.name for w in weights(model)] == ["0"]
    undo()
    with pytest.raises(ConfigError, match="the model itself is the layer"):
        replace(next(weights(nn.Linear(4, 4))), nn.Identity())
    lstm = nn.Sequential(nn.LSTM(4, 3))
    assert {(w.role, w.replaceable) for w in weights(lstm)} == {("linear", False)}
    with pytest.raises(ConfigError, match="takes part in its module's own arithmetic"):
        replace(next(weights(lstm)), nn.Identity())


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_an_adapter_comes_back_from_its_folder(packed, tmp_path):
    def base():
        model = gpt2()
        if packed:
            quantize_model(model, Affine(8, 8))
        return model

    attached = randomize(Bone(r=4, target_modules=["c_attn"]).attach(base(), "mine"))
    want = call(attached.model, IDS).logits
    save_adapter(attached, tmp_path / "kept")
    again = load_adapter(base(), tmp_path / "kept")
    assert (again.name, again.adapter) == ("mine", Bone(r=4, target_modules=["c_attn"]))
    assert torch.equal(call(again.model, IDS).logits, want)
    assert load_adapter(base(), tmp_path / "kept", "yours").name == "yours"


def test_an_adapter_of_another_base_is_refused_and_nothing_is_attached(tmp_path):
    save_adapter(Bone(r=4).attach(small_model()), tmp_path)
    other = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    with pytest.raises(FileError, match="was trained on another base"):
        load_adapter(other, tmp_path)
    assert [type(m) for m in other] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(p.requires_grad for p in other.parameters())


def altered(path, change):
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def test_a_folder_that_is_not_whole_is_named(tmp_path):
    save_adapter(Bone(r=4).attach(small_model()), tmp_path)
    with pytest.raises(FileError, match="cannot read"):
        load_adapter(small_model(), tmp_path / "nowhere")
    file = tmp_path / "adapter.safetensors"
    data = file.read_bytes()
    for torn, words in ((data[:-4], "is torn"), (data[:-4] + b"oops", "is altered")):
        file.write_bytes(torn)
        with pytest.raises(FileError, match=words):
            load_adapter(small_model(), tmp_path)
    file.write_bytes(data)
    altered(tmp_path / "adapter.json", lambda m: m["meta"].update(entry="compander"))
    with pytest.raises(FileError, match="is altered"):
        load_adapter(small_model(), tmp_path)


@pytest.mark.parametrize(("meta", "words"), [
    ({"kind": "a cat"}, "holds no adapter of version 1"), ({"version": 2}, "holds no adapter of version 1"),
    ({"entry": "bones"}, "no adapter named 'bones'; did you mean 'bone'"),
    ({"options": {"r": 4, "depth": 3}}, "has no option 'depth'"), ({"options": {"r": 5}}, "D has shape"),
])
def test_a_folder_from_a_stranger_is_checked(meta, words, tmp_path):
    """With a checksum that fits: only the content is wrong. Nothing stays attached."""
    from poise.files import load_bundle, save_bundle

    save_adapter(Bone(r=4).attach(small_model()), tmp_path)
    tensors, kept = load_bundle(tmp_path / "adapter")
    save_bundle(tmp_path / "adapter", tensors, {**kept, **meta})
    model = small_model()
    with pytest.raises((FileError, ConfigError), match=words):
        load_adapter(model, tmp_path)
    assert [type(m) for m in model.modules()] == [type(m) for m in small_model().modules()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_component_of_no_entry_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"poise.testing.lowrank:LowRank is no registered adapter"):
        save_adapter(LowRank().attach(small_model()), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_runs_adapter_folder_loads(tmp_path):
    """What a run keeps is what `save_adapter` writes, and its folded directory what merge leaves."""
    base, text = tmp_path / "base", tmp_path / "text.txt"
    text.write_text("A weight on a balance. " * 200)
    component = CausalLM(architecture="LlamaForCausalLM", hidden_size=16)
    save_model(component.build(), component.tokenizer(), base)
    run = poise.run(["threads=1", "recipe=finetune", "model=causal_lm", f"model.path={base}", "data=text",
                     f"data.path={text}", "adapter=bone", "adapter.r=4", "train.steps=2",
                     "train.batch_size=2", "recipe.length=16",
                     "recipe.eval_examples=2", f"hydra.run.dir={tmp_path / 'run'}"])
    model = load(CausalLM(path=str(base)))
    attached = load_adapter(model, run.directory / "adapter")
    merged = dict(checkpoint(attached.merge()))
    for w in open_weights(run.directory / "folded"):
        assert torch.equal(w.read().reshape(merged[w.state_key].shape), merged[w.state_key]), w.name


# ------------------------------------------------------------------ what a trial from outside had found


def test_merging_over_a_folded_adapter_is_refused_not_undone_later():
    """The earlier one keeps a weight that knows nothing of the later change: its detach would erase it."""
    model, a, b, _ = three()
    a.fold()
    with pytest.raises(ConfigError, match="b: 'a' acts before it on the same weights: merge 'a' first"):
        b.merge()
    before = call(model)
    a.merge()
    b.merge()
    assert torch.allclose(call(model), before, rtol=1e-12)


def test_a_fold_is_whole_or_not_there():
    model = small_model()
    attached = randomize(Bone(r=4).attach(model))
    before, kept = call(model), [w.read().clone() for w in weights(model)]

    def fails(out, W, first):
        out.fill_(7.0)  # half of it is written
        raise MemoryError

    attached.layers["3"].change_into = fails
    for verb in ("fold", "merge"):
        with pytest.raises(MemoryError):
            getattr(attached, verb)()
        assert not attached.folded and torch.equal(call(model), before)
        assert all(torch.equal(w.read(), k) for w, k in zip(weights(model), kept))


def test_what_is_written_to_a_folded_weight_is_not_lost():
    model = small_model()
    attached = randomize(Bone(r=4).attach(model))
    attached.fold()
    w = next(weights(model))
    w.write(2 * w.read())
    for verb in ("unfold", "detach"):
        with pytest.raises(ConfigError, match=r"default: 0 was written to after fold\(\)"):
            getattr(attached, verb)()
    want = call(model)
    assert torch.equal(call(attached.merge()), want)


@pytest.mark.parametrize("moved", [lambda m: m.flip(0), lambda m: m.flip(1), lambda m: m.flip(0, 1)])
def test_values_that_change_places_under_a_fold_are_seen(moved):
    model = small_model()
    attached = randomize(Bone(r=4).attach(model))
    attached.fold()
    w = next(weights(model))
    w.write(moved(w.read()))
    with pytest.raises(ConfigError, match="was written to after fold"):
        attached.unfold()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_what_a_fold_keeps_is_cast_with_the_model(packed):
    model = small_model()
    if packed:
        quantize_model(model, Affine(8, 8))
    attached = randomize(Bone(r=4).attach(model))
    attached.fold()
    model.double()
    attached.unfold()
    assert {w.dtype for w in weights(model)} == {torch.float64}
    assert call(model).dtype == torch.float64


@pytest.mark.parametrize("plan", [{"experts.*": 4}, {"experts.0.*": 4}], ids=["all", "one"])
def test_experts_that_are_all_plain_again_are_one_parameter_again(plan, tmp_path):
    model = tiny("mixtral")
    quantize_model(model, Affine(8, 8), plan)
    attached = randomize(LowRank(target_modules=["experts.*"]).attach(model))
    before = call(model, IDS).logits
    attached.merge()
    assert model.state_dict().keys() == tiny("mixtral").state_dict().keys()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(call(again, IDS).logits, before, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("others", [0, 1])
def test_experts_that_are_one_parameter_again_train_as_they_did(trained, others):
    """Packed in part, adapted there, merged: the whole parameter is made anew, and was left frozen."""
    model = tiny("mixtral").requires_grad_(trained)
    quantize_model(model, Affine(8, 8), {"experts.3.down": 8})
    other = [LowRank(target_modules=["q_proj"]).attach(model, "other") for _ in range(others)]
    LowRank(target_modules=["experts.3.down"]).attach(model).merge()
    for one in other:
        assert not model.model.layers[0].mlp.experts.down_proj.requires_grad
        one.detach()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert set(flags.values()) == {trained}, flags


def test_experts_of_two_layers_train_as_each_did():
    """Equal shapes in two layers, of which one was frozen: each fused parameter goes by its own parts."""
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    quantize_model(model, Affine(8, 8), {"experts.3.down": 8})
    LowRank(target_modules=["experts.3.down"]).attach(model).merge()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize(("kind", "head"), [("bert", "cls.predictions.decoder"), ("llama", "lm_head")])
def test_the_output_head_is_known_by_the_model_not_by_its_name(kind, head):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    config = AutoConfig.for_model(kind, vocab_size=32, hidden_size=16, intermediate_size=32,
                                  num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    taken = LowRank().attach(auto.from_config(config)).layers
    assert taken and head not in taken
    assert head in LowRank(target_modules=[head]).attach(auto.from_config(config)).layers


def test_a_block_of_experts_gets_its_config_back():
    model = tiny("mixtral")
    model.set_experts_implementation("grouped_mm")
    for verb in ("detach", "merge"):
        getattr(LowRank().attach(model), verb)()
        experts = model.model.layers[0].mlp.experts
        assert experts.config is model.config and experts.config._experts_implementation == "grouped_mm"


def test_a_merged_packed_layer_trains_as_its_neighbours_do():
    model = small_model()
    quantize_model(model, Affine(8, 8))
    first, second = Bone(r=2).attach(model, "first"), Bone(r=2).attach(model, "second")
    first.merge()
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith(".D"))
    second.merge()
    assert all(p.requires_grad for p in model.parameters())


def test_an_untied_head_is_saved(tmp_path):
    """transformers' class says that it is tied; the model says otherwise."""
    model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16,
                     overrides={"tie_word_embeddings": True}).build().eval()
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    model.config.tie_word_embeddings = False
    attached = randomize(Bone(r=4, target_modules=["lm_head"]).attach(model))
    want = call(model, IDS).logits
    save_model(model, None, tmp_path, attached.folded_weights())
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(call(again, IDS).logits, want, atol=1e-5)


@pytest.mark.parametrize("adapter", [
    WeightCompander(), WeightCompander(path="reference"), WeightCompander(learn="layer"), LrMatched(),
    WeightNorm()])
def test_an_adapter_whose_base_trains_comes_back_with_all_that_it_trained(adapter, tmp_path):
    attached = adapter.attach(small_model())
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        attached.model(x).square().sum().backward()
        optimizer.step()
    save_adapter(attached, tmp_path)
    fresh = small_model()
    load_adapter(fresh, tmp_path)
    assert torch.allclose(call(fresh), call(attached.model), rtol=1e-6)


def test_gpt2_keeps_its_roles_when_it_is_reparameterized(tmp_path):
    model = gpt2()
    before = [(w.name, w.role, w.shape) for w in weights(model)]
    attached = WeightCompander(path="reference", target_modules=["c_fc"]).attach(model)
    assert [(w.name, w.role, w.shape) for w in weights(model)] == before
    save_adapter(attached, tmp_path)
    load_adapter(gpt2(), tmp_path)


def hooked(model):
    model[0].register_forward_hook(lambda m, x, y: 2 * y)


def prehooked(model):
    model[0].register_forward_pre_hook(lambda m, x: (2 * x[0],))


def own_forward(model):
    model[0].forward = lambda x: 3 * nn.functional.linear(x, model[0].weight)


def stood_in(model):
    replace(next(weights(model)), LowRank().attach(small_model()).layers["0"])


@pytest.mark.parametrize("plant", [hooked, prehooked, own_forward, stood_in])
def test_packing_does_not_drop_what_acts_around_a_layer(plant):
    model = small_model()
    plant(model)
    before = call(model)
    with pytest.raises(ConfigError, match=r"^0[: ]"):
        quantize_model(model, Affine(8, 8))
    if plant is not stood_in:
        with pytest.raises(ConfigError, match="0 has forward hooks, or a forward of its own"):
            Bone(r=2).attach(model)
    assert torch.equal(call(model), before)


def test_a_linear_that_keeps_more_is_left_as_it_is():
    class Gained(nn.Linear):
        def __init__(self):
            super().__init__(16, 8)
            self.gain = nn.Parameter(torch.ones(8))

    model = nn.Sequential(Gained(), nn.Linear(8, 8))
    report = quantize_model(model, Affine(8, 8))
    assert set(report["quantized"]) == {"1"} and isinstance(model[0], Gained)


def test_quantizing_under_any_adapter_is_refused():
    for adapter in (WeightCompander(), LrMatched(), WeightNorm(), Bone(r=2, target_modules=["3"])):
        model = small_model()
        adapter.attach(model)
        with pytest.raises(ConfigError, match=r"is adapted by|is reparameterized"):
            quantize_model(model, Affine(8, 8), {"0": 8})


def test_a_checkpoint_refuses_changes_that_it_would_ignore():
    model = small_model()
    with pytest.raises(ConfigError, match="no weight named '2'"):
        list(checkpoint(model, [("2", lambda: torch.ones(8, 24))]))
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="0 is tied with 2: it has one value"):
        list(checkpoint(nn.Sequential(layer, nn.Tanh(), layer), [("0", lambda: torch.ones(4, 4))]))


def test_two_families_in_one_wrapper_keep_their_routers_and_their_blocks():
    model = nn.ModuleList([tiny("gpt_oss"), tiny("mixtral"), tiny("switch_transformers")])
    found = list(weights(model))
    assert {w.name.split(".", 1)[0] for w in found if w.role == "router"} == {"0", "1", "2"}
    assert sum(w.role == "router" for w in found) == 2 + 2 + 3
    assert len({w.expert.layer for w in found if w.expert}) == 2 + 2 + 3
    single = {w.expert.layer for w in weights(nn.Sequential(tiny("mixtral"))) if w.expert}
    assert single == {0, 1}


def test_a_matrix_that_stands_in_goes_by_name_and_from_either_side():
    model = nn.Sequential(nn.Linear(16, 4))
    randomize(Bone(r=2).attach(model))
    x, layer = torch.randn(3, 16), model[0]
    assert torch.allclose(nn.functional.linear(x, weight=layer.weight, bias=layer.bias), layer(x))
    assert torch.allclose(x @ layer.weight.T, layer(x) - layer.bias, atol=1e-6)


@pytest.mark.parametrize("meta", [
    {"entry": ["bone"]}, {"base": None}, {"name": 5}, {"options": [1]}, {"kind": None}, {"version": "1"}])
def test_metadata_of_odd_types_is_named(meta, tmp_path):
    from poise.files import load_bundle, save_bundle

    save_adapter(Bone(r=4).attach(small_model()), tmp_path)
    tensors, kept = load_bundle(tmp_path / "adapter")
    for changed in ({**kept, **meta}, {k: v for k, v in kept.items() if k not in meta}):
        save_bundle(tmp_path / "adapter", tensors, changed)
        with pytest.raises(FileError):
            load_adapter(small_model(), tmp_path)


def test_a_name_is_taken_once_by_adapters_without_layers_too():
    model = small_model()
    first = WeightCompander(target_modules=["0"]).attach(model, "mine")
    with pytest.raises(ConfigError, match="has an adapter named 'mine'"):
        WeightCompander(target_modules=["3"]).attach(model, "mine")
    WeightCompander(target_modules=["3"]).attach(model, "other")
    first.merge()
    WeightCompander(target_modules=["0"]).attach(model, "mine")


def test_experts_are_taken_whether_linears_or_fused():
    model = tiny("switch_transformers")
    routed = {w.name for w in weights(model) if w.role == "expert"}
    assert routed <= set(Bone(r=2).attach(model).layers)
    assert routed <= set(
        WeightCompander(bound_policy="grow").attach(tiny("switch_transformers")).layers)
    fused = tiny("mixtral")
    assert {w.name for w in weights(fused) if w.role == "expert"} <= set(Bone(r=2).attach(fused).layers)
