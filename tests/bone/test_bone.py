"""Bone: delta[p, j] = D[j mod r, p]; the forward never builds it; folding adds it; nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import ConfigError, FileError
from poise.models.components import CausalLM
from poise.quantizers import Affine, PackedLinear, quantize_model
from poise.testing import check_adapter
from poise.walk import weights
from poise_bone import Bone
from poise_bone.functional import changed, delta, shard_sum
from poise_bone.layers import BoneLayer

few = settings(max_examples=60, derandomize=True, deadline=None, database=None)
IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bone_delta(D, i):
    return delta(torch.zeros(D.shape[1], i, dtype=D.dtype), D)


def bone_forward(x, D):
    """What a layer adds to a product of zero."""
    layer = BoneLayer(nn.Linear(x.shape[-1], D.shape[1], dtype=x.dtype), D.shape)
    layer.D.data = D
    return layer.output(x, torch.zeros(*x.shape[:-1], D.shape[1], dtype=x.dtype)).detach()


def shapes():
    """(inputs, outputs, r) with 1 <= r <= inputs; r need not divide anything."""
    return st.integers(1, 24).flatmap(
        lambda i: st.tuples(st.just(i), st.integers(1, 9), st.integers(1, i)))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 3))


def llama(**options):
    torch.manual_seed(0)
    return CausalLM(architecture="LlamaForCausalLM", hidden_size=16, **options).build().eval()


def randomize(attached, scale=0.1):
    for n, layer in enumerate(attached.layers.values()):
        layer.D.data.copy_(scale * randn(*layer.D.shape, seed=n))
    return attached


# ------------------------------------------------------------------ the formula


@few
@given(shapes())
def test_the_change_is_the_double_loop(sizes):
    i, o, r = sizes
    D = randn(r, o)
    delta = bone_delta(D, i)
    assert delta.shape == (o, i)
    for p in range(o):
        for j in range(i):
            assert delta[p, j] == D[j % r, p]


@few
@given(shapes())
def test_the_forward_is_x_times_the_change(sizes):
    i, o, r = sizes
    x, D = randn(2, 3, i), randn(r, o, seed=1)
    assert torch.allclose(bone_forward(x, D), x @ bone_delta(D, i).T, rtol=1e-12, atol=1e-12)


@few
@given(shapes())
def test_the_shard_sum_adds_the_blocks_of_the_input(sizes):
    i, _, r = sizes
    x = randn(4, i)
    S = torch.zeros(4, r, dtype=torch.float64)
    for j in range(i):
        S[:, j % r] += x[:, j]
    assert torch.allclose(shard_sum(x, r), S, rtol=1e-12, atol=1e-12)


@few
@given(shapes())
def test_a_layer_is_base_plus_change(sizes):
    i, o, r = sizes
    base = nn.Linear(i, o).double()
    layer = BoneLayer(base, (r, o))
    layer.D.data.copy_(randn(r, o))
    x = randn(5, i, seed=1)
    want = x @ (base.weight + bone_delta(layer.D, i)).T + base.bias
    assert torch.allclose(layer(x), want, rtol=1e-11, atol=1e-12)


@few
@given(shapes())
def test_the_gradients_are_those_of_the_algebra(sizes):
    """dD = S^T dy, and dx = dy (W + delta)."""
    i, o, r = sizes
    layer = BoneLayer(nn.Linear(i, o).double(), (r, o))
    layer.base.requires_grad_(False)
    layer.D.data.copy_(randn(r, o))
    x, dy = randn(5, i, seed=1).requires_grad_(), randn(5, o, seed=2)
    layer(x).backward(dy)
    assert torch.allclose(layer.D.grad, shard_sum(x.detach(), r).T @ dy, rtol=1e-11, atol=1e-11)
    changed = layer.base.weight + bone_delta(layer.D.detach(), i)
    assert torch.allclose(x.grad, dy @ changed, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("i", "r"), [(12, 4), (13, 4), (12, 12), (12, 1)])
def test_the_update_has_rank_r_at_most_and_reaches_it(i, r):
    delta = bone_delta(randn(r, 15), i)
    assert torch.linalg.matrix_rank(delta) == r


def test_the_change_is_a_lora_with_a_tiled_identity():
    """delta = D^T E with E[k, j] = 1 iff j mod r = k."""
    D = randn(4, 6)
    E = torch.eye(4, dtype=torch.float64).repeat(1, 3)[:, :10]
    assert torch.equal(bone_delta(D, 10), D.T @ E)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_fp32(dtype):
    x = torch.full((1, 4096), 1.0, dtype=dtype)
    x[0, 0] = 2048
    assert shard_sum(x, 1).dtype == torch.float32
    assert float(shard_sum(x, 1)) == 2048 + 4095
    assert bone_forward(x, torch.ones(1, 1)).dtype == dtype


@pytest.mark.parametrize("sizes", [(12, 8, 4), (13, 8, 4), (9, 5, 9), (7, 3, 2)])
def test_it_is_peft_miss(sizes):
    peft = pytest.importorskip("peft")
    i, o, r = sizes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(i, o))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.MissConfig(r=r, target_modules=["0"]))
    attached = randomize(Bone(r=r).attach(model), 0.5)
    block = dict(theirs.named_parameters())["base_model.model.0.miss_block.default"]
    assert block.shape == attached.layers["0"].D.shape
    block.data.copy_(attached.layers["0"].D)
    x = randn(6, i, dtype=torch.float32)
    assert torch.allclose(model(x), theirs(x), atol=1e-6)
    merged = theirs.merge_and_unload()
    assert torch.allclose(attached.folded_state_dict()["0.weight"], merged[0].weight, atol=1e-6)


# ------------------------------------------------------------------ attach


def test_attaching_changes_nothing_and_freezes_all_but_the_blocks():
    model = network()
    x = randn(3, 10, dtype=torch.float32)
    before = model(x).detach()
    attached = Bone(r=4).attach(model)
    assert torch.equal(model(x), before)
    assert list(attached.layers) == ["0", "2"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.D", "2.D"}
    assert attached.report()["trainable_parameters"] == 4 * (7 + 3)
    assert attached.report()["bytes"] == 4 * 4 * (7 + 3)


def test_the_head_is_adapted_only_when_asked_for():
    names = set(Bone(r=4).attach(llama()).layers)
    everything = {w.name for w in weights(llama()) if w.role == "linear"}
    assert names == everything - {"lm_head"} and len(names) == 14
    assert set(Bone(r=4, target_modules=["lm_head"]).attach(llama()).layers) == {"lm_head"}


def test_patterns_choose_the_layers():
    bone = Bone(r=4, target_modules=["q_proj", "mlp.*"], exclude_modules=["layers.1.*"])
    chosen = bone.attach(llama()).layers
    assert set(chosen) == {f"model.layers.0.{n}" for n in (
        "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    with pytest.raises(ConfigError, match="'q_prj' matches no weight; did you mean 'q_proj'"):
        Bone(r=4, target_modules=["q_prj"]).attach(llama())


def test_a_block_wider_than_the_input_is_refused_and_nothing_is_changed():
    model = network()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"bone: 2 \(3, 7\): r=8 must lie between 1 and the 7 inputs: "
                                          r"lower r"):
        Bone(r=8).attach(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert set(Bone(r=7).attach(network()).layers) == {"0", "2"}


def test_tied_weights_are_refused():
    model = llama(overrides={"tie_word_embeddings": True})
    assert "lm_head" not in Bone(r=4).attach(copy.deepcopy(model)).layers
    with pytest.raises(ConfigError):
        Bone(r=4, target_modules=["lm_head"]).attach(model)
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="bone: 0 is tied with 2"):
        Bone(r=2).attach(nn.Sequential(layer, nn.Tanh(), layer))


@pytest.mark.parametrize("model", [
    nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Sequential(nn.Embedding(3, 4)), nn.Sequential()])
def test_a_model_without_linears_is_refused(model):
    with pytest.raises(ConfigError, match="no weight is selected"):
        Bone(r=1).attach(model)


def test_a_bare_linear_is_refused_in_words_or_adapted():
    model = nn.Linear(4, 4)
    try:
        attached = Bone(r=2).attach(model)
    except ConfigError as error:
        assert "Linear" in str(error)
    else:
        assert list(attached.layers) and attached.model is not model


@pytest.mark.parametrize(
    "options", [{"r": 0}, {"r": 2.5}, {"variant": "bat2"}, {"target_modules": "q_proj"}, {"mini_r": 2},
    {"mini_r": None, "variant": "mini"}, {"scale": "rownorm"}, {"scale": 2.0, "variant": "bat"},
    {"tiles": [2, 1]}, {"dropout": 1.0},
    {"rank_pattern": {"q_proj": 0}}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"Bone.{next(iter(options))}="):
        Bone(**options)


# ------------------------------------------------------------------ fold, unfold, save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fold_then_unfold_is_bit_exact(dtype):
    model = network().to(dtype)
    attached = randomize(Bone(r=4).attach(model), 1.0)
    x = randn(3, 10, dtype=dtype)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(x).detach()
    for _ in range(3):
        attached.fold()
        folded = model[0].base.weight.detach().clone()
        attached.fold()  # folding twice adds the change once
        assert torch.equal(model[0].base.weight, folded) and not torch.equal(folded, kept["0.base.weight"])
        attached.unfold()
        attached.unfold()
        assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_adds_the_change_once_rounded(dtype):
    W, D = randn(7, 10, dtype=dtype), randn(4, 7, dtype=torch.float32)
    exact = W.double() + bone_delta(D.double(), 10)
    assert torch.equal(changed(W, D), exact.to(torch.float32).to(dtype))


def test_the_folded_checkpoint_is_plain_and_the_live_model_goes_on_training():
    model, plain = network(), network(seed=1)
    attached = randomize(Bone(r=3).attach(model))
    x = randn(5, 10, dtype=torch.float32)
    before = model(x).detach()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    plain.load_state_dict(attached.folded_state_dict())
    assert torch.allclose(plain(x), before, atol=1e-6)
    assert torch.equal(plain[0].bias, model[0].base.bias)
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    attached.fold()
    plain.load_state_dict(attached.folded_state_dict())
    assert torch.allclose(plain(x), before, atol=1e-6)


def test_state_dicts_hold_blocks_only_and_are_checked():
    attached = randomize(Bone(r=4).attach(network()))
    saved = {k: v.clone() for k, v in attached.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in saved.items()} == {"0.D": (4, 7), "2.D": (4, 3)}
    other = Bone(r=4).attach(network())
    other.load_state_dict(saved)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in saved.items())
    for bad, words in (
        ({**saved, "0.D": saved["0.D"].T}, r"0.D has shape \(7, 4\), here \(4, 7\)"),
        ({"0.D": saved["0.D"]}, "2.D is missing"),
        ({**saved, "5.D": saved["0.D"]}, "5.D is not of this model"),
    ):
        fresh = Bone(r=4).attach(network())
        with pytest.raises(FileError, match=words):
            fresh.load_state_dict(bad)
        assert all(not t.any() for t in fresh.state_dict().values())  # nothing is half loaded


def test_detach_gives_the_base_back_as_it_was():
    model, reference = network(), network()
    model[0].bias.requires_grad_(False)
    attached = randomize(Bone(r=4).attach(model))
    attached.fold()
    assert attached.detach() is model
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


def test_a_model_can_be_adapted_again_after_detaching():
    model = network()
    Bone(r=4).attach(model).detach()
    assert list(Bone(r=2).attach(model).layers) == ["0", "2"]


# ------------------------------------------------------------------ packed base


def packed_llama():
    model = llama()
    quantize_model(model, Affine(4, 8))
    return model


def test_on_a_packed_base_the_contract_holds():
    check_adapter(Bone(r=4), packed_llama, IDS, lambda out: out.logits, llama)


def test_folding_a_packed_base_puts_a_plain_layer_in_its_place_and_back():
    model = packed_llama()
    attached = randomize(Bone(r=4, target_modules=["q_proj"]).attach(model))
    layer = attached.layers["model.layers.0.self_attn.q_proj"]
    packed = layer.base
    dense = packed.packed.get().dequantize()
    bytes_before = {k: v.clone() for k, v in packed.state_dict().items()}
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        attached.fold()
        assert type(layer.base) is nn.Linear
        assert torch.equal(layer.base.weight, dense + bone_delta(layer.D, 16))
        assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-5)
        attached.unfold()
        assert layer.base is packed and isinstance(packed, PackedLinear)
        assert all(torch.equal(v, bytes_before[k]) for k, v in packed.state_dict().items())
        assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plain_layer_of_half_precision_keeps_blocks_in_fp32(dtype):
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    attached = Bone(r=4).attach(model, "half")
    assert {t.dtype for t in attached.state_dict().values()} == {torch.float32}
    assert model(torch.zeros(2, 16, dtype=dtype)).dtype == dtype


def test_a_packed_layer_with_a_half_precision_base_keeps_blocks_in_fp32():
    model = llama(dtype="bfloat16")
    quantize_model(model, Affine(4, 8))
    attached = Bone(r=4).attach(model)
    assert {layer.D.dtype for layer in attached.layers.values()} == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_training_moves_the_blocks_only(cls):
    model = network()
    attached = Bone(r=4).attach(model)
    base = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("D")}
    optimizer = attached.optimizer(cls, lr=0.1, weight_decay=0.01)
    x = randn(8, 10, dtype=torch.float32)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    assert attached.report()["largest_change"] > 0


def test_training_the_block_is_training_the_folded_weight_along_it():
    """One SGD step on D moves the effective weight by -lr times the blocks' summed gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 5)).double()
    reference = copy.deepcopy(model)
    x, lr, r = randn(4, 10), 0.1, 3
    attached = Bone(r=r).attach(model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=lr)
    model(x).square().sum().backward()
    optimizer.step()
    reference(x).square().sum().backward()
    G = reference[0].weight.grad
    summed = torch.stack([G[:, k::r].sum(1) for k in range(r)])
    want = reference[0].weight - lr * bone_delta(summed, 10)
    assert torch.allclose(attached.folded_state_dict()["0.weight"], want, rtol=1e-10)
