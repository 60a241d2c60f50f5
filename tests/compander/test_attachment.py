"""What attach returns, of all adapters of the plugin: names, switching, merging, checkpoints, options."""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Tied, loss_of, network, steady, train, w_of
from torch import nn
from torch.nn.utils import parametrizations

from poise.errors import ConfigError, FileError, RunError
from poise.walk import checkpoint
from poise_compander import LrMatched, PaperCompander, PowerPropagation, WeightCompander, WeightNorm
from poise_compander.attached import Attachment

SGD = torch.optim.SGD
ADAPTERS = {
    "fast": WeightCompander(a=0.9), "reference": WeightCompander(a=0.9, path="reference"),
    "fast, learned": WeightCompander(learn="layer"),
    "reference, learned": WeightCompander(learn="network", path="reference"),
    "paper": PaperCompander(), "paper, reference": PaperCompander(path="reference"),
    "lr-matched": LrMatched(a=1.0, b=0.5), "powerprop": PowerPropagation(), "weight norm": WeightNorm(),
}
each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
kinds = pytest.mark.parametrize(
    "kind", [WeightCompander, PaperCompander, LrMatched, PowerPropagation, WeightNorm])


def trained(adapter, make=steady, steps=3):
    model = make()
    attached = adapter.attach(model)
    return attached, train(model, attached.optimizer(SGD, lr=0.05), steps)


def hooks_of(model):
    """Return the hooks of all modules, and their classes."""
    return [(type(m), {k: list(v.values()) for k, v in vars(m).items() if k.endswith("hooks")})
            for m in model.modules()]


def values_of(attached):
    return {k: v.clone() for k, v in [*attached.state_dict().items(), *attached.model.state_dict().items()]}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], v) for k, v in second.items())


# ------------------------------------------------------------------ who it is


@each
def test_it_knows_its_name_and_the_very_component_that_attached_it(adapter):
    attached = adapter.attach(steady(), "mine")
    assert attached.name == "mine" and attached.adapter is adapter and isinstance(attached, Attachment)
    assert adapter.attach(steady()).name == "default"


@each
def test_it_cannot_be_switched_off(adapter):
    attached = adapter.attach(steady())
    before = values_of(attached)
    attached.active = True
    assert attached.active
    words = r"holds its weights alone: it cannot be switched off; use detach\(\)/merge\(\)"
    with pytest.raises(ConfigError, match=words):
        attached.active = False
    with pytest.raises(ConfigError, match=words), attached.disable():
        pass
    assert attached.active and same(values_of(attached), before)


HOLDING = {name: a for name, a in ADAPTERS.items() if not isinstance(a, LrMatched)}


@each
@pytest.mark.parametrize("first", HOLDING.values(), ids=HOLDING)
def test_a_second_adapter_on_weights_that_are_held_is_refused(first, adapter):
    attached, model = trained(first)
    before = values_of(attached)
    with pytest.raises(ConfigError, match=r"0 is (companded|reparameterized) already: .*detach"):
        adapter.attach(model)
    assert same(values_of(attached), before)
    attached.detach()
    adapter.attach(model)


@each
def test_an_optimizer_has_the_options_that_it_is_given(adapter):
    attached = adapter.attach(steady())
    optimizer = attached.optimizer(SGD, lr=0.25, momentum=0.9, nesterov=True, dampening=0.0)
    assert all((g["momentum"], g["nesterov"]) == (0.9, True) for g in optimizer.param_groups)
    factor = 4.0 if isinstance(adapter, LrMatched) else 1.0
    assert optimizer.param_groups[0]["lr"] == 0.25 * factor
    with pytest.raises(TypeError):
        attached.optimizer(SGD, lr=0.1, no_such_option=1)


# ------------------------------------------------------------------ fold, merge, detach


@each
def test_folding_twice_and_unfolding_without_a_fold_change_nothing(adapter):
    attached, model = trained(adapter)
    start = values_of(attached)
    attached.unfold()
    assert same(values_of(attached), start)
    attached.fold()
    folded = {k: v.clone() for k, v in model.state_dict().items()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    attached.fold()
    assert same(model.state_dict(), folded) and {n: id(p) for n, p in model.named_parameters()} == ids
    attached.unfold()
    attached.unfold()
    assert same(values_of(attached), start)


@each
@pytest.mark.parametrize("way", ["merge", "detach", "fold, merge"])
def test_merging_leaves_the_plain_model(adapter, way):
    attached, model = trained(adapter)
    plain = steady()
    want = {k: v.clone() for k, v in attached.folded_state_dict().items()}
    with torch.no_grad():  # as in an evaluation
        if way == "fold, merge":
            attached.fold()
        assert (attached.detach if way == "detach" else attached.merge)() is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert same(model.state_dict(), want)
    assert [(n, type(p), p.requires_grad) for n, p in model.named_parameters()] == [
        (n, type(p), p.requires_grad) for n, p in plain.named_parameters()]
    assert hooks_of(model) == hooks_of(plain)
    assert attached.merge() is attached.detach() is model and same(model.state_dict(), want)
    train(model, SGD(model.parameters(), lr=0.1), 1)
    adapter.attach(model)


@each
def test_after_merging_late_calls_are_refused_in_words(adapter):
    attached, model = trained(adapter)
    saved = {k: v.clone() for k, v in attached.state_dict().items()}
    optimizer = attached.optimizer(SGD, lr=0.1)
    attached.merge()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for act in (attached.fold, attached.unfold, lambda: attached.load_state_dict(saved)):
        with pytest.raises(RunError, match="detached for good: attach again"):
            act()
    with pytest.raises((ConfigError, RunError), match="detached for good: attach again"):
        attached.optimizer(SGD, lr=0.1)
    loss_of(model).backward()
    if not isinstance(adapter, LrMatched | WeightNorm):  # theirs is torch's own
        with pytest.raises(RunError, match="take an optimizer of the plain model"):
            optimizer.step()
    assert same(model.state_dict(), before)


@each
@pytest.mark.parametrize("frozen", [(), ("0.weight",), ("0.bias", "2.weight")])
def test_what_trains_is_what_trained_before(adapter, frozen):
    model = steady()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    want = {n: p.requires_grad for n, p in model.named_parameters()}
    attached = adapter.attach(model)
    attached.fold()
    assert all(isinstance(model.get_parameter(n), nn.Parameter) for n in want)
    attached.unfold()
    attached.merge()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == want
    model = steady()
    attached = adapter.attach(model)
    for p in model.parameters():
        p.requires_grad_(False)  # frozen meanwhile, v too
    attached.merge()
    assert model[0].weight.requires_grad and model[2].weight.requires_grad


@pytest.mark.parametrize("adapter", [a for a in ADAPTERS.values() if not isinstance(a, WeightNorm)],
                         ids=[n for n in ADAPTERS if n != "weight norm"])
def test_tied_weights_stay_tied(adapter):
    def loss(model):
        ids = torch.arange(10)
        return nn.functional.cross_entropy(model(ids), ids.flip(0))

    model = Tied().double()
    attached = adapter.attach(model)
    optimizer = attached.optimizer(SGD, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    want = w_of(model)
    attached.fold()
    assert model[0].weight is model[2].weight
    attached.unfold()
    attached.merge()
    assert model[0].weight is model[2].weight
    assert list(model.state_dict()) == list(Tied().state_dict())
    assert torch.allclose(w_of(model)["0"], want["0"], rtol=1e-14)
    before = model[2].weight.detach().clone()
    SGD(model.parameters(), lr=0.1).zero_grad()
    loss(model).backward()
    SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model[0].weight, before) and torch.equal(model[0].weight, model[2].weight)


@pytest.mark.parametrize("adapter", [
    WeightCompander(a=6.0), WeightCompander(a=6.0, path="reference"), WeightNorm()],
    ids=["fast", "reference", "weight norm"])
def test_a_merged_language_model_is_saved_as_the_plain_one(adapter, tmp_path):
    transformers = pytest.importorskip("transformers")

    def made():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True))

    model, plain = made(), made()
    attached = adapter.attach(model)
    optimizer = attached.optimizer(SGD, lr=0.1)
    ids = torch.arange(12).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    plain.load_state_dict(attached.folded_state_dict())
    attached.merge()
    for name, one in (("merged", model), ("plain", plain)):
        one.save_pretrained(tmp_path / name)
    merged, want = (tmp_path / name / "model.safetensors" for name in ("merged", "plain"))
    assert merged.read_bytes() == want.read_bytes()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, made().lm_head.weight)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_weights_that_were_written_over_the_bound_while_folded_are_refused_as_a_whole(path):
    attached, model = trained(WeightCompander(path=path))
    attached.fold()
    kept = model[2].weight.detach().clone()
    with torch.no_grad():
        model[2].weight.fill_(5.0)
    with pytest.raises((ConfigError, RunError), match="24 weights of 2 reach the bound"):
        attached.unfold()
    assert attached.folded and isinstance(model[0].weight, nn.Parameter)
    with torch.no_grad():
        model[2].weight.copy_(kept)
    attached.unfold()
    train(model, attached.optimizer(SGD, lr=0.1), 1)


# ------------------------------------------------------------------ checkpoints


@each
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_part_of_a_checkpoint_is_refused_as_a_whole(adapter, data):
    attached, _ = trained(adapter)
    other, _ = trained(adapter, steps=5)
    saved = {k: v.clone() for k, v in other.state_dict().items()}
    names = sorted(saved)
    dropped = data.draw(st.sets(st.sampled_from(names)), "dropped")
    extra = data.draw(st.sets(st.sampled_from(["5.v", "weight", "0.weights", "pairs.spec"])), "extra")
    reshaped = data.draw(st.sets(st.sampled_from([n for n in names if "spec" not in n])), "reshaped")
    if dropped | extra | reshaped:
        bad = {k: v[None] if k in reshaped else v for k, v in saved.items() if k not in dropped}
        bad |= {k: torch.zeros(2) for k in extra}
        before = values_of(attached)
        with pytest.raises(FileError):
            attached.load_state_dict(bad)
        assert same(values_of(attached), before)
    attached.load_state_dict(saved)
    assert same(attached.state_dict(), saved)


class Odd(nn.Module):
    """Names that look like those of parametrizations, buffers, a layer without a bias, one layer twice."""

    def __init__(self, twice):
        super().__init__()
        torch.manual_seed(0)
        self.database = nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("original", torch.ones(6))
        self.original0 = nn.Linear(6, 6, bias=False)
        self.parametrizations_x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.weight = nn.ModuleDict({"original": nn.Linear(6, 6), "base": nn.Linear(6, 6)})
        if twice:
            self.again = self.database

    def forward(self, x):
        x = self.original0(self.database(x)) * self.gain + self.original
        return self.weight["base"](self.weight["original"](self.parametrizations_x(x)))


@each
def test_the_plain_checkpoint_has_the_plain_models_keys_in_order_whatever_layers_are_called(adapter):
    plain = Odd(twice=not isinstance(adapter, WeightNorm))
    keys = list(plain.state_dict())
    model = copy.deepcopy(plain)
    attached = adapter.attach(model)
    optimizer = attached.optimizer(SGD, lr=0.05)
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()
    streamed = attached.folded_weights()
    assert next(streamed)[0] == keys[0]  # a generator
    pairs = list(attached.folded_weights())
    assert [key for key, _ in pairs] == keys and not any(t.requires_grad for _, t in pairs)
    assert torch.equal(dict(pairs)["database.weight"], model.database.weight)
    snapshot = attached.folded_state_dict()
    assert list(snapshot) == keys and same(snapshot, dict(pairs))
    live = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not live & {t.data_ptr() for t in snapshot.values()}
    plain.load_state_dict(snapshot)
    attached.merge()
    assert list(model.state_dict()) == keys and same(model.state_dict(), plain.state_dict())


def test_a_child_that_is_called_parametrizations_is_ones_own():
    model = nn.Module()
    model.parametrizations = nn.ModuleDict({"weight": nn.Linear(2, 2)})
    model.weight = parametrizations.weight_norm(nn.Linear(2, 2))
    assert [key for key, _ in checkpoint(model)] == [
        "parametrizations.weight.weight", "parametrizations.weight.bias", "weight.weight", "weight.bias"]


def test_a_parametrization_of_ones_own_is_computed_too():
    own = parametrizations.spectral_norm(nn.Linear(8, 3))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), own).eval()
    attached = WeightCompander(target_modules=["0"], path="reference").attach(model)
    found = dict(attached.folded_weights())
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(found["2.weight"], model[2].weight)
    assert dict(checkpoint(nn.Linear(2, 2))).keys() == {"weight", "bias"}  # a model that is one layer


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_a_model_that_is_one_layer(path):
    model = nn.Linear(6, 3).double()
    attached = WeightCompander(path=path).attach(model)
    assert next(attached.folded_weights())[0] == "weight"
    optimizer = attached.optimizer(SGD, lr=0.1, groups=[{"params": ["weight"], "lr": 0.2}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    train(model, optimizer, 2)
    attached.merge()
    assert list(model.state_dict()) == ["weight", "bias"]


def test_the_fast_checkpoint_is_streamed_without_copies():
    model = network()
    attached = WeightCompander().attach(model)
    pointers = {k: v.data_ptr() for k, v in model.state_dict().items()}
    assert {k: t.data_ptr() for k, t in attached.folded_weights()} == pointers


# ------------------------------------------------------------------ who owns v


def test_v_is_the_attachments_and_no_optimizers():
    model = steady()
    attached = WeightCompander().attach(model)
    pointers = {n: attached.v(n).data_ptr() for n in attached.companded}
    optimizers = [attached.optimizer(SGD, lr=0.05, momentum=0.9) for _ in range(2)]
    for optimizer in optimizers:
        train(model, optimizer, 2)
        assert all("v" not in state for state in optimizer.state.values())
        saved = optimizer.state_dict()
        numbers = saved["param_groups"][0]["params"]
        assert [saved["state"][i]["v"].data_ptr() for i in numbers] == list(pointers.values())
        optimizer.load_state_dict(copy.deepcopy(saved))
    attached.fold()
    attached.unfold()
    attached.load_state_dict({k: v.clone() for k, v in attached.state_dict().items()})
    assert {n: attached.v(n).data_ptr() for n in attached.companded} == pointers


def test_v_goes_with_the_state_of_an_optimizer_that_took_no_step_yet():
    """It was trained by another one, say; from w alone v comes back only but for rounding."""
    attached, model = trained(WeightCompander())
    again = WeightCompander().attach(steady())
    optimizer = again.optimizer(SGD, lr=0.1)
    again.model.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(attached.optimizer(SGD, lr=0.1).state_dict()))
    assert all(torch.equal(again.v(n), attached.v(n)) for n in attached.companded)
    train(again.model, optimizer, 1)


def test_a_v_of_another_shape_is_refused_before_any_state_is_loaded():
    attached, _ = trained(WeightCompander())
    optimizer = attached.optimizer(SGD, lr=0.1, momentum=0.9)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.7
    saved["state"][1]["v"] = saved["state"][1]["v"][:1]
    before = values_of(attached)
    with pytest.raises(FileError, match=r"optimizer state of 2: v has shape \(1, 8\), here \(3, 8\)"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1 and same(values_of(attached), before)


# ------------------------------------------------------------------ options


@kinds
def test_layers_are_chosen_by_the_same_options_in_all_adapters(kind):
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    assert fields["target_modules"] is None is fields["exclude_modules"]
    assert list(kind().attach(steady()).layers) == ["0", "2"]
    assert list(kind(exclude_modules=["2"]).attach(steady()).layers) == ["0"]
    assert list(kind(target_modules=["2"]).attach(steady()).layers) == ["2"]
    for option in ("target_modules", "exclude_modules"):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\.{option}=\[\]: .*leave it out \(null\)"):
            kind(**{option: []})
        with pytest.raises(ConfigError, match="pattern '7' matches no weight"):
            kind(**{option: ["7"]}).attach(steady())
    with pytest.raises(TypeError):
        kind(exclude=["2"])


def test_what_is_not_chosen_is_left_as_it_is():
    for adapter in ADAPTERS.values():
        model = steady()
        before = model[2].weight
        attached = dataclasses.replace(adapter, target_modules=["0"]).attach(model)
        assert model[2].weight is before and isinstance(before, nn.Parameter)
        with contextlib.suppress(RunError):
            attached.unfold()
        assert attached.merge()[2].weight is before
