"""Several adapters on one model, in order: switched, combined, folded, merged; other layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from bone_forms import SHAPES, VARIANTS, options, randn
from torch import nn

from poise import load_adapter, save_adapter
from poise.errors import ConfigError
from poise.models.components import CausalLM
from poise.testing import check_adapter
from poise.walk import weights
from poise_bone import Bone, combine_adapters
from poise_bone.functional import changed, compose, delta

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])


def layer_of(variant, model, name="default", seed=1, **more):
    attached = Bone(**options(variant, SHAPES[variant]), **more).attach(model, name)
    with torch.no_grad():
        for n, (_, D) in enumerate(attached.tensors()):
            D.copy_(0.3 * randn(*D.shape, seed=seed + n))
    return attached


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16)).double()


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(VARIANTS, VARIANTS)))
def test_the_later_one_acts_on_the_weight_as_the_earlier_left_it(first, second, tokens):
    """Product and gradients of both blocks are those of the changes in turn."""
    model = plain()
    a, b = layer_of(first, model), layer_of(second, model, "second", seed=5)
    x = randn(tokens, 24, seed=9).requires_grad_()
    mine = [a.layers["0"].D, b.layers["0"].D]
    got = torch.autograd.grad(y := model(x), [x, *mine], torch.ones_like(y))
    leaves = [D.detach().clone().requires_grad_() for D in mine]
    base = plain()[0]
    W = changed(changed(base.weight.detach(), leaves[0], first), leaves[1], second)
    want_y = x @ W.T + base.bias.detach()
    want = torch.autograd.grad(want_y, [x, *leaves], torch.ones_like(y))
    for p, q in zip((y, *got), (want_y, *want), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-10)
    with b.disable():
        assert torch.allclose(model(x), x @ changed(base.weight, leaves[0], first).T + base.bias, rtol=1e-9)
    a.fold()
    b.fold()
    assert torch.allclose(model(x), want_y, rtol=1e-9, atol=1e-10)
    b.unfold()
    a.unfold()
    a.active = False
    assert torch.allclose(model(x), x @ changed(base.weight, leaves[1], second).T + base.bias, rtol=1e-9)


def test_two_bats_are_one_composed_bat_and_order_counts():
    model = plain()
    a, b = layer_of("bat", model), layer_of("bat", model, "second", seed=5)
    blocks = [one.layers["0"].D.detach() for one in (a, b)]
    once = layer_of("bat", plain())
    x = randn(40, 24, seed=9)
    once.load_state_dict({"0.D": compose(*blocks, "bat")})
    assert torch.allclose(model(x), once.model(x), rtol=1e-9)
    once.load_state_dict({"0.D": compose(*blocks[::-1], "bat")})
    assert not torch.allclose(model(x), once.model(x), atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_combination_acts_as_the_weighted_sum_and_the_others_rest(variant):
    model = plain()
    a, b = layer_of(variant, model), layer_of(variant, model, "second", seed=5)
    x = randn(40, 24, seed=9)
    mixed = combine_adapters([a, b], [0.7, -0.2], "mixed")
    W = plain()[0].weight.detach()
    first, second = (delta(W, one.layers["0"].D.detach(), variant) for one in (a, b))
    assert torch.allclose(model(x), x @ (W + 0.7 * first - 0.2 * second).T + plain()[0].bias, rtol=1e-9)
    assert (a.active, b.active, mixed.active) == (False, False, True)
    mixed.detach()
    a.active = True
    assert torch.allclose(model(x), x @ changed(W, a.layers["0"].D.detach(), variant).T + plain()[0].bias)


def test_what_cannot_be_combined_is_refused_and_nothing_is_switched():
    model = plain()
    a, b = layer_of("bone", model), layer_of("bat", model, "second")
    with pytest.raises(ConfigError, match="have the same options can be combined"):
        combine_adapters([a, b], [1.0, 1.0])
    with pytest.raises(ConfigError, match="have the same options"):
        combine_adapters([a, layer_of("bone", plain())], [1.0, 1.0])
    with pytest.raises(ConfigError, match="1 blocks and 2 weights"):
        combine_adapters([a], [1.0, 2.0])
    with pytest.raises(ConfigError, match="has an adapter named 'default'"):
        combine_adapters([b], [1.0], "default")
    assert a.active and b.active


def test_an_inactive_adapter_gets_no_gradient():
    model = plain()
    a, b = layer_of("bone", model), layer_of("bat", model, "second")
    a.active = False
    model(randn(40, 24)).sum().backward()
    assert a.layers["0"].D.grad is None and b.layers["0"].D.grad is not None


def test_layers_may_have_ranks_of_their_own(tmp_path):
    torch.manual_seed(0)
    build = CausalLM(architecture="LlamaForCausalLM", hidden_size=16).build
    torch.manual_seed(0)
    model = build().eval()
    fresh = copy.deepcopy(model)
    ranks = {"mlp.*": 8, "layers.1.*.down_proj": 2}
    bone = Bone(r=4, variant="bat", rank_pattern=ranks, exclude_modules=["k_proj"])
    attached = bone.attach(model)
    ranks = {n: layer.block().shape[-1] for n, layer in attached.layers.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 4 and ranks["model.layers.1.mlp.up_proj"] == 8
    assert ranks["model.layers.1.mlp.down_proj"] == 2 and not any(n.endswith("k_proj") for n in ranks)
    with torch.no_grad():
        for n, (_, D) in enumerate(attached.tensors()):
            D.copy_(0.2 * randn(*D.shape, seed=n))
    save_adapter(attached, tmp_path)
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, fresh(input_ids=IDS).logits)
    with pytest.raises(ConfigError, match="rank_pattern 'q_prj' matches none of the 14 layers"):
        Bone(r=4, rank_pattern={"q_prj": 2}).attach(copy.deepcopy(build()))


def test_attach_says_what_it_matched(caplog):
    torch.manual_seed(0)
    model = CausalLM(architecture="MixtralForCausalLM", hidden_size=16, layers=1).build()
    with caplog.at_level("INFO", logger="poise.bone"):
        attached = Bone(r=4).attach(model)
    experts = len({w.expert.number for w in weights(model) if w.expert})
    assert attached.matched == f"4 linears, {2 * experts} matrices of {experts} experts"
    assert attached.matched in caplog.text and attached.report()["matched"] == attached.matched
    assert set(Bone(r=4, target_modules=["all_linear"]).attach(plain()).layers) == {"0"}


@pytest.mark.parametrize("variant", ["bone", "bat", "bat_row", "mini"])
def test_a_merged_model_is_saved_and_read_by_transformers(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = CausalLM(architecture="LlamaForCausalLM", hidden_size=16).build().eval()
    attached = Bone(r=4, variant=variant, **({"mini_r": 4} if variant == "mini" else {})).attach(model)
    with torch.no_grad():
        for n, (_, D) in enumerate(attached.tensors()):
            D.copy_(0.2 * randn(*D.shape, seed=n))
        before = model(input_ids=IDS).logits
    merged = attached.merge()
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, before, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_contract_holds(variant):
    shape = {"bone_free": {"tiles": [2, 4], "r": 4}}.get(variant, {"r": 4})
    mini = {"mini_r": 4} if variant == "mini" else {}
    check_adapter(Bone(variant=variant, **shape, **mini))


# ------------------------------------------------------------------ convolutions and embeddings


@pytest.mark.parametrize("variant", ["bone", "bone_out", "mini"])
@pytest.mark.parametrize(("channels", "kernel", "more"), [
    (10, 3, {"padding": 1, "stride": 2}), (8, 1, {}),
    (6, (1, 3), {"padding": (0, 1), "padding_mode": "reflect"}),
    (4, 2, {"dilation": 2, "bias": False})])
def test_a_convolution_computes_with_its_changed_weight(variant, channels, kernel, more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 6, kernel, **more)).double()
    base = copy.deepcopy(model)
    mini = {"mini_r": 3} if variant == "mini" else {}
    attached = Bone(r=4, variant=variant, target_modules=["0"], **mini).attach(model)
    layer = attached.layers["0"]
    layer.D.data.copy_(0.3 * randn(*layer.D.shape, seed=1))
    x = randn(2, channels, 8, 8, seed=2)
    base[0].weight.data.copy_(layer.altered().view(base[0].weight.shape))
    assert torch.allclose(model(x), base(x), rtol=1e-9, atol=1e-10)
    if variant == "bone":  # tiled over channels: channel c has the change of channel c mod r
        change = layer.altered().view_as(base[0].weight) - layer.base.weight
        assert all(torch.allclose(change[:, c], change[:, c % 4], atol=1e-12) for c in range(channels))
    attached.fold()
    assert torch.allclose(model(x), base(x), rtol=1e-9, atol=1e-10)


def test_an_embedding_shares_its_change_among_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6)).double()
    table = model[0].weight.detach().clone()
    attached = Bone(r=4, target_modules=["0"]).attach(model)
    D = attached.layers["0"].D
    D.data.copy_(randn(4, 6))
    ids = torch.tensor([[0, 5, 10], [4, 3, 9]])
    want = table + D.detach()[torch.arange(11) % 4]
    assert torch.allclose(model(ids), want[ids], rtol=1e-12)
    attached.fold()
    assert torch.allclose(model(ids), want[ids], rtol=1e-12)
    attached.unfold()
    assert torch.equal(model[0].base.weight, table)


@pytest.mark.parametrize(("module", "chosen", "words"), [
    (nn.Conv2d(8, 8, 3, groups=2), {"r": 2}, "Conv2d with groups cannot be adapted"),
    (nn.Conv1d(8, 8, 3), {"r": 2}, "Conv1d cannot be adapted: allowed is Conv2d"),
    (nn.Conv2d(8, 8, 3), {"r": 2, "variant": "bat"}, "variant=bat has no form for a convolution"),
    (nn.Conv2d(8, 8, 3), {"r": 9}, "r=9 must lie between 1 and the 8 inputs"),
    (nn.Embedding(8, 4), {"r": 2, "variant": "mini", "mini_r": 2}, "variant=mini: allowed is a plain "
                                                                   "embedding"),
    (nn.Embedding(8, 4, max_norm=1.0), {"r": 2}, "Embedding with arithmetic of its own"),
    (nn.Embedding(8, 4), {"r": 9}, "r=9 exceeds the 8 rows of the embedding"),
    (nn.LayerNorm(8), {"r": 2}, "matches no weight"),
])
def test_layers_without_a_form_are_refused_in_words(module, chosen, words):
    with pytest.raises(ConfigError, match=words):
        Bone(target_modules=["0"], **chosen).attach(nn.Sequential(module))
    with pytest.raises(ConfigError):  # and never taken unasked
        Bone(variant="bone", r=2).attach(nn.Sequential(module))
