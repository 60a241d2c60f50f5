"""What is recorded and drawn of a companded network in training."""

from __future__ import annotations

import json

import pytest
import torch
from networks import network, steady, train

from poise_compander import LrMatched, WeightCompander, WeightNorm, diagnostics
from poise_compander.plots import draw


def recorded(attached, model, evaluations=3, **options):
    optimizer, rows = attached.optimizer(torch.optim.SGD, lr=0.1, **options), []
    for step in range(evaluations):
        rows += [{"step": step, "name": k, "value": v} for k, v in attached.metrics().items()]
        train(model, optimizer, 5)
    return rows


def test_bands_are_percentiles_of_the_first_layer_and_bounded():
    model = steady()
    attached = WeightCompander(a=0.5, b=0.5).attach(model)
    train(model, attached.optimizer(torch.optim.SGD, lr=5.0), 50)
    metrics = attached.metrics()
    w = model[0].weight.detach().flatten()
    assert metrics["bands/0/50"] == pytest.approx(float(w.quantile(0.5)))
    assert metrics["bands/0/0"] == pytest.approx(float(w.min()))
    assert metrics["bands/0/93"] == pytest.approx(float(w.quantile(0.93)))
    assert max(abs(metrics["bands/0/0"]), metrics["bands/0/100"]) < 0.5 * torch.pi / 2
    assert 0 < metrics["saturated_share"] <= 1
    everything = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
    assert metrics["near_zero_share"] == pytest.approx(float((everything.abs() < 0.01).double().mean()))
    assert not any(name.startswith("pair/") for name in metrics)


def test_learned_pairs_are_recorded_by_layer_or_once():
    by_layer = WeightCompander(learn="layer").attach(steady()).metrics()
    assert by_layer["pair/0/a"] == pytest.approx(0.7) and by_layer["pair/2/b"] == pytest.approx(0.7)
    whole = WeightCompander(learn="network").attach(steady()).metrics()
    assert {n for n in whole if n.startswith("pair/")} == {"pair/pair/a", "pair/pair/b"}


@pytest.mark.parametrize("adapter", [LrMatched(), WeightNorm()])
def test_the_controls_record_the_same_bands(adapter):
    model = steady()
    w = model[0].weight.detach().clone()
    metrics = adapter.attach(model).metrics()
    assert metrics["bands/0/69"] == pytest.approx(float(w.flatten().quantile(0.69)))
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_figures_show_bands_and_pairs(tmp_path, path):
    model = network()
    rows = recorded(WeightCompander(learn="layer", path=path).attach(model), model)
    made = draw(tmp_path / "figures", rows)
    assert [f.name for f in made] == ["bands.png", "pairs.png"]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in made)


def test_nothing_is_drawn_of_one_evaluation(tmp_path):
    model = network()
    assert draw(tmp_path / "figures", recorded(WeightCompander().attach(model), model, evaluations=1)) == []
    assert not (tmp_path / "figures").exists()


def test_the_mean_learning_rate_factor_is_that_of_small_steps():
    """An SGD step of size lr moves w by -lr g Psi'(v)^2 to first order."""
    model = steady()
    attached = WeightCompander(a=0.6, b=0.9).attach(model)
    before = model[0].weight.detach().clone()
    optimizer = attached.optimizer(torch.optim.SGD, lr=1e-7)
    train(model, optimizer, 1)
    moved = (model[0].weight.detach() - before) / -1e-7 / model[0].weight.grad
    table = {row["layer"]: row for row in diagnostics.layer_table(attached)}
    assert float(moved.mean()) == pytest.approx(table["0"]["mean_lr_factor"], rel=1e-5)
    assert table["0"]["effective_lr_factor"] == pytest.approx((0.6 / 0.9) ** 2)


def test_bands_of_a_layer_that_is_larger_than_torchs_quantile_takes():
    w = torch.linspace(-1, 1, 2**24 + 101)
    found = dict(zip(diagnostics.PERCENTILES, diagnostics.bands(w)))
    assert found[7.0] == pytest.approx(-0.86, abs=1e-6) and found[50.0] == pytest.approx(0, abs=1e-6)
