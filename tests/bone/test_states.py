"""The adapted model as any torch module: its modes, its state, and what is said where it is misused."""

from __future__ import annotations

import copy

import pytest
import torch
from bone_forms import SHAPES, VARIANTS, options, randn
from torch import nn

from poise.errors import ConfigError, RunError
from poise_bone import Bone, combine_adapters, load_peft, save_peft
from poise_bone.components import Lora


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def random(attached, seed=0):
    for n, (_, t) in enumerate(attached.tensors()):
        t.data.copy_(0.2 * randn(*t.shape, seed=seed + n))
    return attached


X = randn(20, 16)

# ------------------------------------------------------------------ modes


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_on_a_model_in_eval_mode_drops_nothing(variant):
    model = nn.Sequential(nn.Linear(24, 16)).eval()
    random(Bone(**options(variant, SHAPES[variant]), dropout=0.5).attach(model))
    x = torch.randn(9, 24)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_an_adapter_of_a_file_drops_nothing_on_a_model_in_eval_mode(tmp_path):
    model = network().eval()
    save_peft(random(Bone(r=4, dropout=0.5).attach(model)), tmp_path)
    other = network().eval()
    load_peft(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))


def test_lora_drops_nothing_on_a_model_in_eval_mode():
    pytest.importorskip("peft")
    model = network().eval()
    random(Lora(r=2, lora_dropout=0.5).attach(model))
    assert torch.equal(model(X), model(X))


# ------------------------------------------------------------------ state


def test_a_state_of_folded_weights_is_not_read_as_one_of_plain_ones_nor_the_other_way():
    model = network()
    attached = random(Bone(r=4, variant="bat").attach(model))
    y, plain = model(X), copy.deepcopy(model.state_dict())
    attached.fold()
    folded = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0 is not folded in the state and folded here: call unfold"):
        model.load_state_dict(plain)
    model.load_state_dict(folded)
    torch.testing.assert_close(model(X), y)
    attached.unfold()
    with pytest.raises(RuntimeError, match=r"0 is folded in the state and not folded here: call fold"):
        model.load_state_dict(folded)
    model.load_state_dict(plain)
    assert torch.equal(model(X), y)


def test_an_error_names_the_layer():
    model = network()
    random(Bone(r=4, variant="bat").attach(model))
    loss = model(X).sum()
    with torch.no_grad():
        model[2].base.weight.mul_(2)
    with pytest.raises(RunError, match="the weight of 2 was changed"):
        loss.backward()
    model[2].base.requires_grad_(True)
    with pytest.raises(RunError, match="2 requires a gradient"):
        model(X)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_input_of_no_width_is_torchs_own_error(variant, tokens):
    model = nn.Sequential(nn.Linear(24, 16))
    random(Bone(**options(variant, SHAPES[variant])).attach(model))
    with pytest.raises(RuntimeError):
        model(torch.zeros(tokens, 0))


# ------------------------------------------------------------------ combinations


def two(variant, third=None):
    model = network()
    a = random(Bone(r=4, variant=variant).attach(model, "a"))
    b = random(Bone(r=4, variant=variant).attach(model, "b"), 5)
    c = random(third.attach(model, "c"), 9) if third else None
    return model, a, b, c


def test_a_folded_adapter_is_not_combined_and_the_others_go_on():
    model, a, b, _ = two("bone")
    a.fold()
    y = model(X)
    with pytest.raises(ConfigError, match="a is folded and cannot be combined: unfold it first"):
        combine_adapters([b, a], [0.5, 0.5])
    assert b.active and torch.equal(model(X), y)


def test_an_adapter_that_is_gone_is_not_combined():
    model, a, b, _ = two("bone")
    b.detach()
    y = model(X)
    with pytest.raises(ConfigError, match="b is gone from the model and cannot be combined"):
        combine_adapters([a, b], [1.0, 1.0])
    assert a.active and torch.equal(model(X), y)


@pytest.mark.parametrize(("variant", "third"), [("bat", Bone(r=2)), ("bone", Bone(r=2, variant="bat"))])
def test_a_later_adapter_is_not_moved_before_the_combination(variant, third):
    model, a, b, c = two(variant, third)
    y = model(X)
    with pytest.raises(ConfigError, match="'c' was attached after 'a' and would act before"):
        combine_adapters([a, b], [0.3, 0.7])
    assert a.active and b.active and torch.equal(model(X), y)
    c.active = False
    combine_adapters([a, b], [1.0, 0.0])


def test_among_added_changes_the_order_says_nothing():
    model, a, b, _ = two("bone", Bone(r=3, variant="bone_out"))
    y = model(X)
    combine_adapters([a, b], [1.0, 1.0])
    torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_a_weight_that_is_no_number_is_refused(weight):
    _, a, b, _ = two("bone")
    with pytest.raises(ConfigError, match="is not allowed: it must be a finite number"):
        combine_adapters([a, b], [1.0, weight])
    assert a.active and b.active
