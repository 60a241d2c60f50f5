"""What the compander is compared with, and the paper's own pairs."""

from __future__ import annotations

import pytest
import torch
from networks import X, Y, loss_of, steady, train
from torch import nn

from poise.errors import ConfigError
from poise.registry import build
from poise.testing import check_adapter
from poise_compander import LrMatched, PaperCompander, PowerPropagation, WeightCompander, WeightNorm
from poise_compander.functions import power
from poise_compander.presets import PAIRS


@pytest.mark.parametrize("adapter", [
    WeightNorm(), PowerPropagation(), PowerPropagation(alpha=1.5, decay_on="w"), LrMatched(a=1.0, b=0.6),
    PaperCompander(), PaperCompander(learned=True, bound_policy="grow"),
], ids=lambda a: f"{type(a).__name__}-{getattr(a, 'alpha', getattr(a, 'learned', ''))}")
def test_each_keeps_the_contract_of_adapters(adapter):
    check_adapter(adapter)


def test_weight_norm_is_torchs_own():
    model, other = steady(), steady()
    attached = WeightNorm().attach(model)
    for layer in other:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.weight_norm(layer)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
    train(model, attached.optimizer(torch.optim.SGD, **options), 20)
    train(other, torch.optim.SGD(other.parameters(), **options), 20)
    assert torch.equal(loss_of(model), loss_of(other))


def test_weight_norm_takes_convolutions_row_by_row():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv1d(4, 5, 2))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    attached = WeightNorm().attach(model)
    g = attached.state_dict()
    for name, layer in attached.layers.items():
        assert torch.allclose(g[f"{name}.g"].flatten(), before[f"{name}.weight"].flatten(1).norm(dim=1))
        assert g[f"{name}.g"].numel() == layer.weight.shape[0]


def test_weight_norm_refuses_what_has_no_direction_or_two_names():
    model = steady()
    with torch.no_grad():
        model[0].weight[2] = 0
    with pytest.raises(ConfigError, match="0 has 1 rows of zeros"):
        WeightNorm().attach(model)
    with pytest.raises(ConfigError, match="reparameterized already"):
        WeightNorm().attach(WeightNorm().attach(steady()).model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match="shares its weight with 1"):
        WeightNorm().attach(tied)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.0])
def test_powerpropagation_is_a_step_on_v_through_the_chain_rule(alpha):
    """v is stepped by plain SGD on dL/dv, which autograd takes through w = v |v|^(alpha - 1)."""
    mine = steady()
    attached = PowerPropagation(alpha=alpha).attach(mine)
    optimizer = attached.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)
    theirs = steady()
    tensors = {n: (p.sign() * p.abs() ** (1 / alpha) if n.endswith("weight") else p).detach()
               .requires_grad_() for n, p in theirs.named_parameters()}
    plain = torch.optim.SGD(tensors.values(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(20):
        loss = loss_of(mine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights = {n: (v * v.abs() ** (alpha - 1) if n.endswith("weight") else v)
                   for n, v in tensors.items()}
        again = (torch.func.functional_call(theirs, weights, (X,)) - Y).square().mean()
        plain.zero_grad()
        again.backward()
        plain.step()
        assert torch.allclose(loss, again, rtol=1e-10)


def test_powerpropagation_slows_small_weights_and_reports_it():
    attached = PowerPropagation(alpha=2.0).attach(steady())
    report = attached.report()
    assert report["function"] == "power2" and 0 <= report["saturated_share"] <= 1
    assert power(2.0) is power(2.0)
    with pytest.raises(ConfigError, match="alpha"):
        PowerPropagation(alpha=0.5)
    with pytest.raises(ConfigError, match="alpha"):
        PowerPropagation(alpha=float("nan"))


def test_the_papers_pairs():
    assert len(PAIRS) == 13
    assert PaperCompander("resnet34", "cifar100").options == WeightCompander(a=0.7, b=0.8)
    factor = {pair: round((a / b) ** 2, 2) for pair, (a, b) in PAIRS.items()}
    assert factor["resnet18", "cifar10"] == 2.78 and factor["resnet50", "imagenet"] == 0.73
    learned = PaperCompander(learned=True).options
    assert learned == WeightCompander(a=0.5, b=1.0, learn="layer", guard="none")
    assert learned.settings.decays_v and not PaperCompander().options.settings.decays_v


@pytest.mark.parametrize(("model", "data", "words"), [
    ("resnet81", "cifar10", "did you mean 'resnet18'"), ("wrn28_10", "cifar10", "the paper has resnet18"),
    ("resnet18", "cifar", "did you mean 'cifar10'"), ("resnet18", "imagenet", "resnet50"),
])
def test_a_pair_that_the_paper_does_not_have_is_refused(model, data, words):
    with pytest.raises(ConfigError, match=words):
        build("adapter", "compander_paper", model=model, data=data)


def test_folded_weights_are_parameters_that_train_again():
    model = steady()
    attached = WeightNorm().attach(model)
    attached.fold()
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {"0.weight", "2.weight"}
    attached.unfold()
    before = model[0].weight.detach().clone()
    train(model, attached.optimizer(torch.optim.SGD, lr=0.1), 2)
    assert not torch.equal(model[0].weight, before)
    WeightNorm().attach(attached.detach())
