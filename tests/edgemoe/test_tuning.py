"""Adapters on a model whose experts stay in a store train as on the same model in memory, bit for bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import some
from moe_models import ids, reference, saved

from poise import load_adapter, save_adapter, weights
from poise.adapters.saved import fingerprint
from poise.errors import ConfigError, FileError, RunError
from poise.quantizers import AbsMax, quantize_model
from poise.testing.families import FAMILIES, tiny
from poise.walk import checkpoint
from poise_bone import Bone
from poise_bone.components import Lora
from poise_edgemoe import Engine, convert
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.tuning.model import open_streamed, shelf_of

SERVED = [f for f in FAMILIES if f != "llama4_text"]
TEXT = ids(2, 12)
STEPS = 6


def streamed(folder, family="mixtral", **how):
    """Return a tiny model in memory, and the same one over a store."""
    model, store = tiny(family), folder / "store"
    convert(model, store, **({"bits": 32} | how))
    return model, open_streamed(store)


def dequantized(folder, model):
    """Return the model in memory that a store of quantized experts stands for."""
    other, plain = open_streamed(folder), copy.deepcopy(model)
    mine = {w.name: w for w in weights(plain)}
    for w in weights(other):
        mine[w.name].write(w.read())
    return plain


def inputs(model):
    more = {"decoder_input_ids": TEXT[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": TEXT, **more}


def train(model, adapter, steps=STEPS):
    """Return what an adapter has become, the losses of some steps, and the gradients of each."""
    model.train()
    attached = adapter.attach(model)
    optimizer = attached.optimizer(torch.optim.AdamW, lr=1e-2)
    losses, gradients = [], []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(step)  # of dropout
        logits = model(**inputs(model), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(),
                                                 TEXT[:, 1:logits.shape[1]].flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: t.grad.clone() for n, t in attached.tensors() if t.grad is not None})
        optimizer.step()
    model.eval()
    return attached, losses, gradients


def same(a, b, close=0.0):
    """Hold two trainings against each other: adapters, losses, gradients of every step."""
    (one, losses, grads), (other, losses_b, grads_b) = a, b
    assert losses == pytest.approx(losses_b, rel=close, abs=0)
    for x, y in zip([*grads, one.state_dict()], [*grads_b, other.state_dict()], strict=True):
        assert x.keys() == y.keys()
        scale = max(float(t.abs().max()) for t in x.values())
        worst = max(float((t - y[k]).abs().max()) for k, t in x.items())
        assert worst <= close * scale


@pytest.mark.parametrize("family", SERVED)
def test_bone_trains_as_in_memory(tmp_path, family):
    """The same bits: losses, gradients of hot blocks and of experts', and what six steps make of them."""
    model, other = streamed(tmp_path, family)
    a = train(model, Bone(r=4, dropout=0.1))
    assert any(".experts." in n for n in a[2][0])
    assert any(".experts." not in n for n in a[2][0])
    assert a[1][-1] < a[1][0]
    # Switch's experts are linears in memory, whose products are of three dimensions
    same(a, train(other, Bone(r=4, dropout=0.1)), close=1e-5 if family == "switch_transformers" else 0.0)


FORMS = {"bat": {}, "bat_row": {}, "bat_left": {}, "bone_out": {}, "mini": {"mini_r": 8}}


@pytest.mark.parametrize("variant", some(FORMS, keep=["bat", "bat_left"]))
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_every_form_of_bone_trains_as_in_memory(tmp_path, variant, family):
    """Forms whose change is made of the weight take what was read, in parts, forward and backward."""
    model, other = streamed(tmp_path, family)
    adapter = Bone(r=4, variant=variant, **FORMS[variant])
    same(train(model, adapter), train(other, adapter))


@pytest.mark.parametrize("adapter", [Bone(r=4, exclude_modules=["experts.*"]), Lora(r=2)])
def test_what_adapts_hot_weights_alone_trains_as_in_memory(tmp_path, adapter):
    if isinstance(adapter, Lora):
        pytest.importorskip("peft")
    found = []
    for model in streamed(tmp_path, "olmoe"):
        torch.manual_seed(0)  # LoRA draws
        found.append(train(model, adapter))
    assert not any("experts" in name for name in found[0][0].state_dict())
    same(*found)


@pytest.mark.parametrize("how", some([{"bits": 4}, {"bits": 3}, {"scheme": "q8_0"}, {"bits": 16}],
                                     keep=[{"bits": 4}]))
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_over_quantized_experts_bone_trains_as_over_the_dequantized_model(tmp_path, family, how):
    model, other = streamed(tmp_path, family, **how, hot="raw")
    plain = dequantized(tmp_path / "store", model)
    for variant in ("bone", "bat"):
        a, b = (train(copy.deepcopy(m), Bone(r=4, variant=variant)) for m in (plain, other))
        same(a, b)


def test_a_store_as_it_is_made_by_default_trains_in_half_precision_with_hot_weights_packed(tmp_path):
    """Packed products round otherwise than those of matrices in full: losses agree, bits do not."""
    model, other = streamed(tmp_path, bits=4, hot=8)
    plain = dequantized(tmp_path / "store", model.to(torch.bfloat16))
    (a, losses, _), (b, others, _) = (train(m, Bone(r=4)) for m in (plain, other))
    assert losses == pytest.approx(others, rel=2e-3)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert others[-1] < others[0]


def test_under_autocast_and_in_full_over_a_store_in_half_precision(tmp_path):
    """What is computed in is the model's matter, as in memory: bits of the same model, cast alike."""
    path, store = saved(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "store"
    convert(path, store, bits=16, hot="raw")
    for dtype in ("float32", None):
        plain = reference(path, getattr(torch, dtype or "bfloat16")).model
        other = open_streamed(store, dtype=dtype)
        assert {p.dtype for p in other.parameters()} == {p.dtype for p in plain.parameters()}
        same(train(copy.deepcopy(plain), Bone(r=4)), train(other, Bone(r=4)))
        if dtype:
            other = open_streamed(store, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                a, b = (train(m, Bone(r=4, variant="bat")) for m in (plain, other))
            same(a, b)


def test_without_recomputing_and_in_evaluation_gradients_are_the_same(tmp_path):
    """Weights are never kept for the backward pass; what is recomputed is a matter of activations."""
    model, other = streamed(tmp_path)
    kept = open_streamed(tmp_path / "store", recompute=False)
    found = []
    for one in (model, other, kept):
        attached = Bone(r=4).attach(one.eval())
        one(TEXT, use_cache=False).logits.square().mean().backward()
        found.append({n: t.grad for n, t in attached.tensors()})
    for other_one in found[1:]:
        assert all(torch.equal(g, other_one[n]) for n, g in found[0].items())


def test_one_layer_is_read_at_a_time_and_the_one_at_the_turn_once(tmp_path):
    model, store = tiny("olmoe", num_hidden_layers=3), tmp_path / "store"
    convert(model, store, bits=32)
    other = open_streamed(store)
    shelf, seen = shelf_of(other), []
    turn = shelf._turn

    def watched(n):
        seen.append(n)
        return turn(n)

    shelf._turn = watched
    train(other, Bone(r=4), steps=1)
    order = [n for n, before in zip(seen, [-1, *seen]) if n != before]
    # attach looks at one expert's type in each; then up, and down again
    assert order[-5:] == [0, 1, 2, 1, 0]
    before = shelf.reads
    train_again(other, 1)
    assert shelf.reads - before <= 4 * 4 * 2  # of five layers' turns the first is there still; all experts


def train_again(model, steps):
    for _ in range(steps):
        model.train()(TEXT, use_cache=False).logits.square().mean().backward()


def test_layers_below_what_trains_are_not_read_again(tmp_path):
    model, store = tiny("olmoe", num_hidden_layers=3), tmp_path / "store"
    convert(model, store, bits=32)
    other = open_streamed(store)
    Bone(r=4, target_modules=["layers.2.mlp.experts.*"]).attach(other)
    before = shelf_of(other).reads
    train_again(other, 2)
    assert shelf_of(other).reads - before <= 2 * 3 * 4 * 2  # forward alone
    Bone(r=4, target_modules=["embed_tokens"]).attach(other, "tokens")  # which nothing listens to


def test_the_walk_meets_the_same_weights_and_values(tmp_path):
    for family in ("mixtral", "gpt_oss", "switch_transformers"):
        model, store = tiny(family), tmp_path / family
        convert(model, store, bits=32)
        other = open_streamed(store)
        assert fingerprint(model) == fingerprint(other)
        for mine, theirs in zip(weights(model), weights(other), strict=True):
            assert (mine.name, mine.role, mine.shape, mine.state_key, mine.expert, mine.dtype) == (
                theirs.name, theirs.role, theirs.shape, theirs.state_key, theirs.expert, theirs.dtype)
            assert torch.equal(mine.read(), theirs.read())
            assert torch.equal(mine.read(slice(1, 3)), theirs.read(slice(1, 3)))
            assert theirs.lies_in == (str(store) if mine.role == "expert" else "")
        before = model.state_dict()
        after = dict(checkpoint(other))
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[k]) for k, t in before.items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_was_trained_folds_converts_and_is_served(tmp_path, family):
    """Adapter beside, on the model in memory, folded, converted, served: the tuned model's logits."""
    model, other = streamed(tmp_path, family)
    attached, _, _ = train(other, Bone(r=4, variant="bat"))
    with torch.no_grad():
        acting = other(TEXT).logits
    save_adapter(attached, tmp_path / "adapter")
    folded = attached.folded_state_dict()  # through the store, one layer at a time
    load_adapter(model, tmp_path / "adapter").merge()
    assert folded.keys() == model.state_dict().keys()
    assert all(torch.equal(folded[k], t) for k, t in model.state_dict().items())
    with torch.no_grad():
        tuned = model(TEXT).logits
    assert torch.allclose(tuned, acting, atol=1e-5)
    convert(model, tmp_path / "tuned", bits=32)
    with Engine.open(tmp_path / "tuned", batch=2, context=32) as engine:
        assert torch.equal(engine.logits(TEXT), tuned)
    again = open_streamed(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.equal(again(TEXT).logits, tuned)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    attached, _, _ = train(streamed(tmp_path)[1], Bone(r=4), steps=1)
    save_adapter(attached, tmp_path / "adapter")
    convert(tiny("mixtral", num_hidden_layers=3), tmp_path / "deeper", bits=32)
    with pytest.raises(FileError, match="was trained on another base"):
        load_adapter(open_streamed(tmp_path / "deeper"), tmp_path / "adapter")


def test_what_would_write_to_the_store_is_refused_before_anything_changes(tmp_path):
    _, other = streamed(tmp_path)
    attached, _, _ = train(other, Bone(r=4), steps=1)
    before = {k: t.clone() for k, t in other.state_dict().items()}
    with torch.no_grad():
        logits = other(TEXT).logits
    for verb in (attached.fold, attached.merge):
        with pytest.raises(ConfigError, match=r"lies in .*store, which .*load it on the model in memory"):
            verb()
    expert = next(w for w in weights(other) if w.role == "expert")
    with pytest.raises(ConfigError, match="which is only read"):
        expert.write(expert.read())
    assert all(torch.equal(t, before[k]) for k, t in other.state_dict().items())
    with torch.no_grad():
        assert torch.equal(other(TEXT).logits, logits)
    assert attached.detach() is other
    with pytest.raises(ConfigError, match=r"lies in .*, in the bits that it was written with"):
        quantize_model(other, AbsMax(bits=4))
    made = quantize_model(other, AbsMax(bits=8), {"q_proj": 8})
    assert len(made["quantized"]) == 2


def test_hot_weights_that_trained_alone_can_be_folded_and_converted(tmp_path):
    model, other = streamed(tmp_path)
    adapter = Bone(r=4, exclude_modules=["experts.*"])
    for one in (model, other):
        train(one, adapter, steps=2)[0].merge()
    convert(other, tmp_path / "tuned", bits=32)  # its experts go from store to store
    with Engine.open(tmp_path / "tuned", batch=2, context=32) as engine, torch.no_grad():
        assert torch.equal(engine.logits(TEXT), model(TEXT).logits)


def test_several_adapters_stand_on_one_expert(tmp_path):
    found = []
    for model in streamed(tmp_path):
        first = Bone(r=4, target_modules=["experts.*"]).attach(model)
        with torch.no_grad():
            for n, (_, D) in enumerate(first.tensors()):
                D.normal_(generator=torch.Generator().manual_seed(n), std=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = Bone(r=4, variant="bat", target_modules=["experts.*"]).attach(model, "second")
        model.train()(TEXT, use_cache=False).logits.square().mean().backward()
        found.append([t.grad for a in (first, second) for _, t in a.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_copy_reads_from_the_same_store_and_is_cast_with_its_model(tmp_path):
    model, other = streamed(tmp_path)
    with torch.no_grad():
        wide = copy.deepcopy(other).double()(TEXT).logits
        assert wide.dtype == torch.float64
        assert torch.allclose(wide, copy.deepcopy(model).double()(TEXT).logits, rtol=1e-12, atol=1e-12)
        assert torch.equal(other(TEXT).logits, model(TEXT).logits)


def test_a_store_that_is_torn_or_altered_is_said_and_nothing_is_made_up(tmp_path):
    _, other = streamed(tmp_path)
    Bone(r=4).attach(other)
    index = read_index(tmp_path / "store")
    at = index.layers[1].experts[2]["down"].offset
    path = tmp_path / "store" / EXPERTS
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(FileError, match="is altered: the checksum of down of expert 2 in layer 1"):
        train_again(other, 1)
    path.write_bytes(whole)
    train_again(other, 1)  # what failed is read again
    with open(path, "r+b") as f:
        f.truncate(at)
    with pytest.raises(FileError, match=r"ends at .*the file was cut since"):
        train_again(other, 1)
    with pytest.raises(FileError, match="bytes"):
        open_streamed(tmp_path / "store")


def test_a_fork_is_refused(tmp_path):
    _, other = streamed(tmp_path)
    shelf_of(other)._pid = -1
    with pytest.raises(RunError, match="belongs to the process that opened it"):
        other(TEXT)
