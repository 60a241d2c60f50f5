"""LoRA behind the contract is PEFT's own: the same start, steps and merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from bone_forms import randn
from torch import nn

from poise.testing import check_adapter
from poise_bone import Bone, Lora
from poise_bone.functional import to_lora

peft = pytest.importorskip("peft")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24))


def losses(model, optimizer, steps=6):
    x, found = randn(6, 24, seed=9, dtype=torch.float32), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("rs", [False, True])
def test_it_starts_trains_and_merges_as_peft_does(rs):
    model = network()
    config = peft.LoraConfig(r=3, lora_alpha=6, use_rslora=rs, target_modules=["0", "2"])
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    mine = Lora(r=3, lora_alpha=6.0, use_rslora=rs).attach(model)
    given = dict(theirs.named_parameters())
    for name, layer in mine.layers.items():  # A is random: from the same start
        prefix = f"base_model.model.{name}.lora_"
        assert layer.lora_A.weight.shape == given[f"{prefix}A.default.weight"].shape
        assert not layer.lora_B.weight.any()
        layer.lora_A.weight.data.copy_(given[f"{prefix}A.default.weight"])
    first = losses(theirs, torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01))
    second = losses(mine.model, mine.optimizer(torch.optim.AdamW, lr=0.01))
    assert first == pytest.approx(second, rel=1e-5) and first[-1] < first[0]
    merged, folded = theirs.merge_and_unload().state_dict(), mine.folded_state_dict()
    assert all(torch.allclose(merged[k], folded[k], atol=1e-6) for k in folded)


def test_bone_is_a_lora_with_a_frozen_tiled_a_step_for_step():
    """A = the tiled identity and B = D^T, scaling 1: twenty steps of Adam give the same losses."""
    bone = Bone(r=4).attach(network())
    lora = Lora(r=4, lora_alpha=4.0).attach(network())
    for name, layer in lora.layers.items():
        A, _, _ = to_lora(layer.beneath(), bone.layers[name].block().detach())
        layer.lora_A.weight.data.copy_(A)
        layer.lora_A.weight.requires_grad_(False)
    second = torch.optim.Adam([layer.lora_B.weight for layer in lora.layers.values()], lr=0.01)
    first = losses(bone.model, bone.optimizer(torch.optim.Adam, lr=0.01), 20)
    assert first == pytest.approx(losses(lora.model, second, 20), rel=1e-5)


def test_the_contract_holds():
    check_adapter(Lora(r=2, lora_alpha=2.0))
