"""Which of a model's weights are companded, on which path, and what is said of the others."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import largest_difference
from torch import nn

import poise
from poise.errors import ConfigError
from poise.models.components import CausalLM
from poise_compander import LrMatched, WeightCompander, WeightNorm
from poise_compander.functions import FUNCTIONS

IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])


def language(architecture):
    torch.manual_seed(0)
    return CausalLM(architecture=architecture, hidden_size=16, layers=2, context=64).build().train()


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = kind(16, 8, num_layers=2, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.body(x)[0])


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)


def gpt2():
    return language("GPT2LMHeadModel")


def mixtral():
    model = language("MixtralForCausalLM")
    model.set_experts_implementation("eager")  # grouped products have no float64
    return model


MODELS = {"gpt2": gpt2, "mixtral": mixtral, "encoder": encoder, "lstm": lambda: Recurrent(nn.LSTM),
          "gru": lambda: Recurrent(nn.GRU)}


def output(model, seed=1):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed),
                    dtype=next(model.parameters()).dtype)
    return model(input_ids=IDS).logits if hasattr(model, "config") else model(x)


def attach(adapter, model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached = adapter.attach(model)
    return attached, [str(w.message) for w in caught]


def matrices(model):
    return {n: p for n, p in model.named_parameters() if p.ndim > 1}


LEFT = {  # what is no matrix of a linear, a convolution or an expert
    "gpt2": {"transformer.wpe.weight"},
    "mixtral": {"model.embed_tokens.weight", *(f"model.layers.{i}.mlp.gate.weight" for i in (0, 1))},
    "encoder": set(), "lstm": set(), "gru": set(),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_companded_but_embeddings_and_routers(name):
    model = MODELS[name]()
    left = {n: p.numel() for n, p in matrices(model).items() if n in LEFT[name]}
    assert left.keys() == LEFT[name]
    total = sum(p.numel() for p in matrices(model).values())
    attached, said = attach(WeightCompander(bound_policy="grow"), model)
    report = attached.report()
    assert report["share"] == pytest.approx(1 - sum(left.values()) / total, abs=1e-12)
    held = {id(attached.parameter(n)) for n in attached.companded}
    assert {n for n, p in matrices(model).items() if id(p) not in held} == LEFT[name]
    reasons = report["left_out"]
    assert sum(r["share"] for r in reasons.values()) == pytest.approx(1 - report["share"], abs=1e-12)
    assert len(said) == bool(left)
    if left:
        assert said[0].startswith(f"compander takes {100 * report['share']:.3g} % of the model's weights")
        assert all(reason in said[0] for reason in reasons)


def test_what_the_reference_path_cannot_compute_is_named():
    model = Recurrent(nn.LSTM)
    attached, said = attach(WeightCompander(path="reference"), model)
    assert attached.companded.keys() == {"head"}
    (reason,) = attached.report()["left_out"]
    assert "path='fast' can" in reason and reason in said[0] and "body.weight_ih_l0" in said[0]
    total = sum(p.numel() for p in matrices(model).values())
    assert attached.report()["share"] == pytest.approx(64 / total)


@pytest.mark.parametrize("adapter", [WeightNorm(), LrMatched(a=0.5, b=0.7)], ids=["norm", "matched"])
def test_the_controls_say_it_too(adapter):
    model = encoder()
    total = sum(p.numel() for p in matrices(model).values())
    attached, said = attach(adapter, model)
    report = attached.report()
    if isinstance(adapter, LrMatched):  # what a compander would take
        assert report["share"] == 1 and not said
    else:
        inner = sum(p.numel() for n, p in matrices(model).items() if n.endswith("in_proj_weight"))
        assert report["share"] == pytest.approx(1 - inner / total)
        assert report["left_out"].popitem()[1]["weights"] == 2 and "attention" in said[0]


def test_what_was_asked_for_is_in_the_report_and_no_reason_to_warn():
    attached, said = attach(WeightCompander(exclude_modules=["linear1"]), encoder())
    (reason,), report = attached.report()["left_out"], attached.report()
    assert "exclude_modules" in reason and report["left_out"][reason]["weights"] == 2 and not said


@pytest.mark.parametrize(("adapter", "make", "named", "why"), [
    (WeightCompander(target_modules=["wpe"]), gpt2, "transformer.wpe", "embeddings"),
    (WeightCompander(path="reference", target_modules=["body.*"]), lambda: Recurrent(nn.LSTM),
     "body.weight_ih_l0", "path='fast' can"),
    (WeightNorm(target_modules=["in_proj_weight"]), encoder, "self_attn.in_proj_weight", "attention"),
], ids=["embedding", "recurrent", "attention"])
def test_what_is_named_and_cannot_be_taken_says_why(adapter, make, named, why):
    with pytest.raises(ConfigError, match="is named and cannot be taken") as refused:
        adapter.attach(make())
    assert named in str(refused.value) and why in str(refused.value)


def test_experts_of_one_parameter_are_taken_together():
    model = mixtral()
    every, _ = attach(WeightCompander(bound_policy="grow", target_modules=["experts.*.gate_up"]), model)
    assert every.companded.keys() == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)}
    with pytest.raises(ConfigError, match=r"1 of the \d experts of model.layers.0.mlp.experts.down_proj"):
        WeightCompander(target_modules=["layers.0.mlp.experts.1.down"]).attach(mixtral())
    router, _ = attach(WeightCompander(target_modules=["mlp.gate"], bound_policy="grow"), mixtral())
    assert router.companded.keys() == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}


def trained(path, make, cls, steps=4, **options):
    model = make().double()
    attached, _ = attach(WeightCompander(a=4.0, b=3.0, path=path), model)
    optimizer = attached.optimizer(cls, weight_decay=0.02, **options)
    for step in range(steps):
        optimizer.zero_grad()
        output(model, step).square().mean().backward()
        optimizer.step()
    return model, attached


@pytest.mark.parametrize("rule", [(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
                                  (torch.optim.AdamW, {"lr": 0.003})], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "encoder"])
def test_both_paths_train_the_same_numbers_there(name, rule):
    found = {path: dict(trained(path, MODELS[name], rule[0], **rule[1])[1].folded_weights())
             for path in ("fast", "reference")}
    start = {n: t.double() for n, t in MODELS[name]().state_dict().items()}
    assert list(found["fast"]) == list(found["reference"]) == list(start)
    assert largest_difference(found["fast"], start) > 0.005
    assert largest_difference(found["fast"], found["reference"]) < 1e-9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_step_of_a_recurrent_matrix_is_the_chain_rules(kind):
    model, a, b, lr = Recurrent(kind).double(), 4.0, 3.0, 0.05
    plain = copy.deepcopy(model)
    attached, _ = attach(WeightCompander(a=a, b=b), model)
    optimizer = attached.optimizer(torch.optim.SGD, lr=lr)
    for one in (model, plain):
        output(one).square().mean().backward()
    optimizer.step()
    psi = FUNCTIONS["arctan"]
    for name in ("weight_ih_l0", "weight_hh_l1_reverse"):
        w = getattr(plain.body, name)
        v = psi.inverse(w.detach(), a, b)
        want = psi.forward(v - lr * w.grad * psi.derivative(v, a, b), a, b)
        assert torch.allclose(getattr(model.body, name), want, rtol=0, atol=1e-12)
        assert not torch.allclose(want, w.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "encoder", "lstm"])
def test_folding_merging_and_keeping_hold_there_too(name, path, tmp_path):
    model, attached = trained(path, MODELS[name], torch.optim.SGD, lr=0.05)
    model.eval()
    with torch.no_grad():
        before = output(model)
        kept = {n: t.clone() for n, t in attached.state_dict().items()}
        streamed = {n: t.clone() for n, t in attached.folded_weights()}
        attached.fold()
        assert torch.allclose(output(model), before, rtol=0, atol=1e-12)
        attached.unfold()
        assert torch.allclose(output(model), before, rtol=0, atol=1e-12)
        attached.load_state_dict(kept)
        merged = attached.merge().state_dict()
        assert torch.allclose(output(model), before, rtol=0, atol=1e-12)
    assert list(merged) == list(MODELS[name]().state_dict())
    assert all(torch.allclose(merged[n], t, rtol=0, atol=1e-12) for n, t in streamed.items())


def test_a_runs_record_holds_the_share(tmp_path):
    run = poise.run(["recipe=classify", "model=mlp", "data=digits", "data.limit=60", "train.steps=1",
                     "adapter=compander", "threads=1", f"hydra.run.dir={tmp_path}"])
    assert poise.load_run(tmp_path).notes["adapter"]["share"] == 1.0, run
