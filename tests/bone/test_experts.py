"""Experts of a fused parameter: one parameter for all their blocks, each acting on its own expert."""

from __future__ import annotations

import copy

import pytest
import torch
from bone_forms import options, randn
from cases import some

from poise import load_adapter, save_adapter
from poise.errors import ConfigError
from poise.models.components import CausalLM
from poise.quantizers import Affine, quantize_model
from poise.testing import check_adapter
from poise.walk import checkpoint, weights
from poise_bone import Bone, save_peft
from poise_bone.components import Lora
from poise_bone.functional import changed

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])
FORMS = {"bone": (4, 0), "mini": (4, 8), "bone_out": (4, 0), "bat": (0, 4, 4), "bat_row": (0, 4, 4),
         "bat_left": (0, 4, 4), "bone_free": (2, 2, 4, 4)}


def build(name="Mixtral", dtype=None):
    torch.manual_seed(0)
    model = CausalLM(architecture=f"{name}ForCausalLM", hidden_size=16, layers=1).build().eval()
    if dtype is None:
        return model
    model.config._experts_implementation = "eager"  # the fused kernel has no float64
    return model.to(dtype)


def experts_of(model):
    return {w.name: w for w in weights(model) if w.role == "expert"}


def attach(model, variant, **more):
    attached = Bone(**options(variant, FORMS[variant]), target_modules=["experts.*"], **more).attach(model)
    with torch.no_grad():
        for n, (_, D) in enumerate(attached.tensors()):
            D.copy_(0.2 * randn(*D.shape, seed=n))
    return attached


@pytest.mark.parametrize("variant", list(FORMS))
def test_experts_of_a_fused_parameter_have_one_block_parameter(variant):
    model = build()
    shapes = {w.state_key: (w.shape, sum(o.state_key == w.state_key for o in experts_of(model).values()))
              for w in experts_of(model).values()}
    attached = attach(model, variant)
    assert {k.removesuffix(".D") for k in attached.state_dict()} == set(shapes)
    for key, ((o, i), n) in shapes.items():
        want = {"bone": (4, o), "mini": (4, 8), "bone_out": (4, i), "bat": (o // 4, 4, 4),
                "bat_row": (i // 4, 4, 4), "bat_left": (o // 4, 4, 4), "bone_free": (2, 2, 4, 4)}[variant]
        assert attached.state_dict()[f"{key}.D"].shape == (n, *want)
    assert "experts" in attached.matched
    assert len(attached.trainable()[0]["params"]) == len(shapes)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "Olmoe", "Llama4"])
@pytest.mark.parametrize("variant", list(FORMS))
def test_the_model_computes_with_the_changed_experts(variant, name):
    model = build(name, torch.float64)
    plain = copy.deepcopy(model)
    attached = attach(model, variant)
    blocks = {n: layer.block().detach().clone() for n, layer in attached.layers.items()}
    for n, w in experts_of(plain).items():
        w.write(changed(w.read(), blocks[n], variant))
    with torch.no_grad():
        got, want = (m(input_ids=IDS).logits for m in (model, plain))
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    folded = attached.folded_state_dict()
    want = dict(checkpoint(plain))
    assert folded.keys() == want.keys()
    assert all(torch.allclose(folded[k], want[k], rtol=1e-12, atol=1e-13) for k in want)


@pytest.mark.parametrize("variant", list(FORMS))
def test_gradients_are_those_of_the_changed_experts_and_zero_where_no_token_went(variant):
    model = build(dtype=torch.float64)
    plain = copy.deepcopy(model)
    attached = attach(model, variant)
    one = IDS[:, :1]  # a single token goes to two of the experts
    model(input_ids=one).logits.square().sum().backward()
    leaves = {n: layer.block().detach().clone().requires_grad_() for n, layer in attached.layers.items()}
    mine = {w.state_key: dict(plain.named_parameters())[w.state_key] for w in experts_of(plain).values()}
    made = {}
    for key in mine:
        members = [w for w in experts_of(plain).values() if w.state_key == key]
        made[key] = torch.stack(
            [w.plain(changed(w.read(), leaves[w.name], variant)) for w in members])
    out = torch.func.functional_call(plain, made, (), {"input_ids": one})
    found = torch.autograd.grad(out.logits.square().sum(), list(leaves.values()), allow_unused=True)
    grads = dict(zip(leaves, found, strict=True))
    unrouted = 0
    for key, D in attached.tensors():
        names = [n for n in attached.layers if attached.fused[n] == key.removesuffix(".D")]
        assert D.grad is not None and D.grad.shape == D.shape
        for place, n in enumerate(names):
            want = torch.zeros_like(D[0]) if grads[n] is None else grads[n]
            unrouted += not D.grad[place].any()
            assert torch.allclose(D.grad[place], want, rtol=1e-8, atol=1e-10), n
    assert unrouted >= 2


def test_gradients_add_up_over_passes_and_steps():
    """The split that experts share must not outlive a step, nor lose a second pass."""
    model = build()
    attached = attach(model, "bone")
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.1)

    def pass_over(n):
        optimizer.zero_grad()
        for k in range(n):
            model(input_ids=IDS[:, k: k + 4]).logits.square().mean().backward()
        return [D.grad.clone() for _, D in attached.tensors()]

    once = [pass_over(1), pass_over(2)]
    fresh = build()
    again = attach(fresh, "bone")
    for (_, a), (_, b) in zip(attached.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)
    total = [torch.zeros_like(D) for _, D in again.tensors()]
    for k in range(2):
        fresh.zero_grad()
        fresh(input_ids=IDS[:, k: k + 4]).logits.square().mean().backward()
        total = [t + D.grad for t, (_, D) in zip(total, again.tensors(), strict=True)]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(once[1], total, strict=True))
    before = [D.detach().clone() for _, D in attached.tensors()]
    optimizer.step()
    grads = pass_over(2)  # with the block as it is now
    assert all(not torch.equal(a, b) for a, b in zip(grads, once[1], strict=True))
    assert all(not torch.equal(a, D) for a, (_, D) in zip(before, attached.tensors(), strict=True))


@pytest.mark.parametrize("variant", list(FORMS))
def test_experts_that_are_applied_at_once_start_as_the_model_and_all_train(variant):
    """Llama4 multiplies by all experts of a block in one product, and reads the parameter's shape."""
    model = build("Llama4")
    with torch.no_grad():
        bare = model(input_ids=IDS).logits
    attached = Bone(**options(variant, FORMS[variant]), target_modules=["experts.*"]).attach(model)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, bare, rtol=1e-5, atol=1e-6)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(D.grad is not None and D.grad.any() for _, D in attached.tensors())
    attached.optimizer(torch.optim.SGD, lr=1.0).step()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
    assert not torch.equal(trained, bare)
    attached.merge()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-5)


def test_lora_adapts_what_is_beside_experts_that_are_applied_at_once():
    pytest.importorskip("peft")
    model = build("Llama4")
    with torch.no_grad():
        bare = model(input_ids=IDS).logits
        Lora(r=2).attach(model)
        assert torch.allclose(model(input_ids=IDS).logits, bare, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: None])
def test_after_a_cast_or_other_data_experts_train_with_the_blocks_that_are_there(change):
    """The split that experts share is of the blocks as they are: a cast raises no version counter."""
    model = build()
    model.config._experts_implementation = "eager"
    attached = attach(model, "bone")
    model(input_ids=IDS).logits.sum().backward()  # the split is made
    change(model)
    for _, D in attached.tensors():
        D.grad, D.data = None, torch.full_like(D.data, 0.1)
    training = model(input_ids=IDS).logits
    with torch.no_grad():
        assert torch.equal(training, model(input_ids=IDS).logits)
    training.sum().backward()
    assert all(D.grad.dtype == D.dtype and D.grad.any() for _, D in attached.tensors())


@pytest.mark.parametrize("variant", some(["bone", "bat", "bat_row", "bat_left"], keep=["bone", "bat_left"]))
def test_the_contract_holds_on_experts(variant):
    check_adapter(Bone(r=4, variant=variant), build, IDS, lambda out: out.logits)


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_packed_experts_are_adapted_alike(variant):
    model = build()
    quantize_model(model, Affine(4, 8))
    attached = attach(model, variant)
    plain = build()
    plain.load_state_dict(attached.folded_state_dict())
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=2e-5)
    assert all(t.ndim == (3 if variant == "bone" else 4) for _, t in attached.tensors())


def test_several_adapters_with_dropout_act_on_fused_experts(tmp_path):
    model = build(dtype=torch.float64)
    first = attach(model, "bone", dropout=0.5)
    second = Bone(r=4, variant="bat", target_modules=["experts.*"], dropout=0.25).attach(model, "second")
    with torch.no_grad():
        for n, (_, D) in enumerate(second.tensors()):
            D.copy_(0.2 * randn(*D.shape, seed=10 + n))
    model.train()
    torch.manual_seed(0)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(D.grad.any() for a in (first, second) for _, D in a.tensors())
    model.eval()
    with torch.no_grad():
        acting = model(input_ids=IDS).logits
        plain = build(dtype=torch.float64)
        for name, w in experts_of(plain).items():
            once = changed(w.read(), first.layers[name].block(), "bone")
            w.write(changed(once, second.layers[name].block(), "bat"))
        assert torch.allclose(acting, plain(input_ids=IDS).logits, rtol=1e-9, atol=1e-10)
    save_adapter(second, tmp_path)
    other = build(dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"saved over the adapters \['default'\]; here it acts over \[\]"):
        loaded = load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(loaded.tensors(), second.tensors(), strict=True))


def test_peft_has_no_form_for_experts(tmp_path):
    attached = attach(build(), "bone")
    with pytest.raises(ConfigError, match=r"is an expert, .*poise\.save_adapter can"):
        save_peft(attached, tmp_path)
    assert not list(tmp_path.iterdir())


def test_experts_of_one_parameter_need_one_rank():
    with pytest.raises(ConfigError, match=r"share one parameter, so give them one r"):
        Bone(r=4, rank_pattern={"experts.0.*": 8}).attach(build())


def test_a_square_expert_is_changed_by_its_rows_not_its_columns():
    """Experts whose matrices are square: orientation comes from the module, not from the shape."""
    for name in ("GptOss", "Mixtral", "Llama4"):
        torch.manual_seed(0)
        model = CausalLM(architecture=f"{name}ForCausalLM", hidden_size=16, layers=1,
                         overrides={"intermediate_size": 16}).build().eval().double()
        down = next(w for w in experts_of(model).values() if w.expert.part == "down")
        assert down.shape == (16, 16)
        attached = Bone(r=4, variant="bat", target_modules=["experts.*.down"]).attach(model)
        layer = attached.layers[down.name]
        with torch.no_grad():
            for _, D in attached.tensors():
                D.copy_(randn(*D.shape, seed=3))
        x = randn(5, 16, seed=4)
        W = down.read()  # (out, in), whichever way the parameter lies
        assert torch.allclose(layer(x), x @ changed(W, layer.block().detach(), "bat").T, rtol=1e-10)
        raw = dict(model.named_parameters())
        key = next(k for k in raw if k.endswith(("down_proj.fused", "down_proj")))
        lies = raw[key][0]
        assert torch.equal(W, lies if name == "Mixtral" else lies.T)
