"""A head that is the input embedding: never changed by the way, and named with what it is tied to."""

from __future__ import annotations

import json

import pytest
import torch
from bone_forms import randn
from torch import nn

from poise import load_adapter, open_weights, save_adapter
from poise.errors import ConfigError, FileError
from poise.models.causal_lm import save_model
from poise.models.components import CausalLM
from poise.quantizers import AbsMax, quantize_model
from poise_bone import Bone, load_peft, read_adapter, save_peft
from poise_bone.components import Lora

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])
TIED = (r"lm_head is tied with model\.embed_tokens, and changing one changes the other: exclude it, or "
        r"untie it first by a weight of its own, nn\.Parameter\(weight\.detach\(\)\.clone\(\)\); set "
        r"config\.tie_word_embeddings = False too")


def llama(tied=True):
    torch.manual_seed(0)
    return CausalLM(architecture="LlamaForCausalLM", hidden_size=16, layers=1,
                    overrides={"tie_word_embeddings": tied}).build().eval()


def untie(model):
    """Do what the message says."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def random(attached):
    for n, (_, t) in enumerate(attached.tensors()):
        t.data.copy_(0.2 * randn(*t.shape, seed=n))
    return attached


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("pattern", ["lm_head", "*head", "lm_*", "[l]m_head"])
def test_a_tied_head_that_is_named_is_refused_with_what_it_is_tied_to(pattern):
    for adapter in (Bone(r=4, target_modules=[pattern]), Bone(r=4, target_modules=["q_proj", pattern])):
        model = llama()
        with pytest.raises(ConfigError, match=f"^bone: {TIED}"):
            adapter.attach(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"^plan: lm_head is tied with model\.embed_tokens: leave it out"):
        quantize_model(llama(), AbsMax(8, 8), {pattern: 8})


def test_every_adapter_of_layers_says_so():
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=f"^lora: {TIED}"):
        Lora(r=2, target_modules=["lm_head"]).attach(llama())


def test_the_embedding_that_is_named_is_refused_with_its_head():
    with pytest.raises(ConfigError, match=r"^bone: model\.embed_tokens is tied with lm_head, .*untie"):
        Bone(r=4, target_modules=["embed_tokens"]).attach(llama())


@pytest.mark.parametrize("chosen", [
    {}, {"target_modules": ["all_linear"]}, {"target_modules": ["*"]}, {"exclude_modules": ["lm_head"]}])
def test_a_tied_head_is_left_alone_where_it_is_not_named(chosen):
    model = llama()
    before = model.lm_head.weight.detach().clone()
    attached = random(Bone(r=4, **chosen).attach(model))
    assert len(attached.layers) == 7 and not {"lm_head", "model.embed_tokens"} & attached.layers.keys()
    want = logits(model)
    attached.merge()
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits(model), want, atol=1e-5)


def test_an_untied_head_is_folded_and_read_again(tmp_path):
    model = untie(llama())
    embedding = model.model.embed_tokens.weight.detach().clone()
    attached = random(Bone(r=4, target_modules=["lm_head"]).attach(model))
    want = logits(model)
    attached.merge()
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    save_model(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again), want, atol=1e-5)
    read = {w.name: w for w in open_weights(tmp_path)}
    assert torch.equal(read["lm_head"].read(), model.lm_head.weight)
    assert torch.equal(read["model.embed_tokens"].read(), embedding)


def test_an_untied_head_whose_configuration_ties_it_is_refused():
    model = untie(llama())
    model.config.tie_word_embeddings = True
    said = r"^bone: lm_head has a weight of its own, .*is tied.*set config\.tie_word_embeddings = False$"
    with pytest.raises(ConfigError, match=said):
        Bone(r=4, target_modules=["lm_head"]).attach(model)
    Bone(r=4).attach(model)  # the head is not in it


def test_head_and_embedding_of_their_own_are_both_saved(tmp_path):
    model = untie(llama())
    attached = random(Bone(r=4, target_modules=["lm_head", "embed_tokens"]).attach(model))
    want = logits(model)
    save_model(model, None, tmp_path, attached.folded_weights())
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path).eval()), want, atol=1e-5)


def test_a_head_that_was_tied_after_attach_is_not_folded():
    model = untie(llama())
    attached = random(Bone(r=4, target_modules=["lm_head"]).attach(model))
    model.lm_head.base.weight = model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    for act in (attached.fold, attached.merge):
        with pytest.raises(ConfigError, match=r"^default: model\.embed_tokens is tied with lm_head"):
            act()
    with pytest.raises(ConfigError, match=r"tied with lm_head|no weight named 'lm_head'"):
        dict(attached.folded_weights())
    assert torch.equal(model.model.embed_tokens.weight, embedding) and not attached.folded


def test_a_file_with_a_block_of_a_tied_head_is_refused_with_the_tie(tmp_path):
    untied = untie(llama())
    attached = random(Bone(r=4, target_modules=["lm_head", "q_proj"]).attach(untied))
    save_peft(attached, tmp_path / "peft")
    save_adapter(attached, tmp_path / "poise")
    torch.save({"lm_head.disha": torch.ones(4, 257)}, tmp_path / "rwkv.pth")
    reads = [lambda m: load_peft(m, tmp_path / "peft"), lambda m: read_adapter(tmp_path / "peft").attach(m),
             lambda m: read_adapter(tmp_path / "rwkv.pth").attach(m),
             lambda m: read_adapter(tmp_path / "poise").attach(m)]
    for read in reads:
        with pytest.raises(FileError, match=f"^the adapter changes lm_head, and {TIED}"):
            read(llama())
    with pytest.raises(FileError, match="was trained on another base"):
        load_adapter(llama(), tmp_path / "poise")
    model = untie(llama())
    load_peft(model, tmp_path / "peft")
    assert torch.allclose(logits(model), logits(untied), atol=1e-6)
