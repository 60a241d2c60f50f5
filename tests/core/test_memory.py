"""Parameters that share memory though they are not one: to change one would change the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.errors import ConfigError
from poise.quantizers import Affine, quantize_model
from poise.walk import weights
from poise_bone import Bone
from poise_compander import WeightCompander, WeightNorm

TOGETHER = ("whole", "rows", "turned", "columns in common", "another type")
APART = ("tied", "beside", "columns", "one element apart")


def sharing(how):
    """Return a model whose second linear has memory of its own (`APART`), or the first one's, or a part."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    first, buffer = model[0].weight, 0.1 * torch.randn(16, 16)
    if how == "tied":
        model[2].weight = first
    elif how == "whole":
        model[2].weight = nn.Parameter(first)
    elif how == "turned":
        model[2].weight = nn.Parameter(first.detach().T)
    elif how == "another type":
        model[2] = model[2].double()
        model[2].weight = nn.Parameter(first.detach().view(torch.float64).view(8, 4))
    elif how in ("rows", "beside"):
        start = 4 if how == "rows" else 8
        flat = buffer.view(-1)
        model[0].weight = nn.Parameter(flat[:64].view(8, 8))
        model[2].weight = nn.Parameter(flat[8 * start:8 * start + 64].view(8, 8))
    else:  # matrices that take turns in one buffer
        start = 7 if how == "columns in common" else 8
        model[0].weight = nn.Parameter(buffer[:8, :8])
        model[2].weight = nn.Parameter(buffer[:8, start:start + 8])
        if how == "one element apart":
            model[0].weight, model[2].weight = (nn.Parameter(buffer[:8, s::2]) for s in (0, 1))
    return model


@pytest.mark.parametrize("how", [*TOGETHER, *APART])
def test_the_walk_knows_parameters_that_share_memory(how):
    found = list(weights(sharing(how)))
    expected = {"0": ("2.weight",), "2": ("0.weight",)} if how in TOGETHER else {"0": (), "2": ()}
    assert {w.name: w.overlaps for w in found} == {w.name: expected[w.name] for w in found}
    assert [w.tied_with for w in found] == ([("2",)] if how == "tied" else [(), ()])


@pytest.mark.parametrize("adapter", [
    WeightCompander(path="fast"), WeightCompander(path="reference"), WeightNorm(), Bone(r=2),
], ids=["fast", "reference", "weight_norm", "bone"])
@pytest.mark.parametrize("how", ["whole", "rows"])
def test_no_adapter_takes_a_weight_that_shares_memory(adapter, how):
    """The folded and the live model's outputs differed by 2e-4."""
    model = sharing(how)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=r": 0 shares memory with 2\.weight, another parameter"):
        adapter.attach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert type(model[0]) is nn.Linear and adapter.attach(sharing("beside")) is not None


def test_a_weight_that_shares_memory_stays_as_it_is_or_is_refused_by_name():
    model = sharing("rows")
    report = quantize_model(model, Affine(bits=8))
    assert report["kept"] == ["0", "2"] and not report["quantized"]
    with pytest.raises(ConfigError, match=r"0 is tied with 2\.weight"):
        quantize_model(model, Affine(bits=8), {"0": 4})


@pytest.mark.parametrize("sizes", [(8, 8), (8, 0), (0, 8)])
def test_weights_without_memory_share_none(sizes):
    model = nn.Sequential(nn.Linear(*sizes, device="meta"), nn.Linear(*sizes[::-1], device="meta"))
    if 0 in sizes:
        model = model.to_empty(device="cpu")
    assert [w.overlaps for w in weights(model)] == [(), ()]
