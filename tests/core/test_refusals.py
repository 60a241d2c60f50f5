"""Guards that no other test meets: each is reached by what it is there for, and nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from refusal import Around
from torch import nn

import poise
import poise.files
from poise import load_adapter, save_adapter
from poise.adapters import attach_layers, choose_layers
from poise.errors import ConfigError, DataError, FileError, RunError
from poise.files import load_bundle, save_bundle
from poise.quantizers import Affine, PackedMatrix, quantize_model
from poise.quantizers.whole import resolve
from poise.testing.adapter import small_model
from poise.testing.families import tiny
from poise.testing.lowrank import LowRank, SumLayer
from poise.walk import replace, weights
from poise.walk.experts import PlainExpert


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


# ------------------------------------------------------------------ adapters


@dataclass(frozen=True)
class Whole(LowRank):
    """W + B A where W trains too."""

    freezes_base: ClassVar[bool] = False

    def attach(self, model, name="default"):
        chosen = choose_layers(model, "whole", self.target_modules, None, ("linear", "expert"))
        layers = {w.name: SumLayer(w.layer, self.r) for w in chosen}
        return attach_layers(model, layers, chosen, adapter=self, name=name)


@pytest.mark.parametrize("adapter", [LowRank(), Whole()])
def test_what_is_gone_neither_trains_nor_acts(adapter):
    attached = adapter.attach(small_model())
    attached.merge()
    for action in (attached.trainable, lambda: attached.optimizer(torch.optim.SGD, lr=1.0)):
        with pytest.raises(RunError, match="was merged or detached: attach again"):
            action()
    if adapter.freezes_base:
        assert not attached.active
        attached.active = False  # as it is
        with pytest.raises(RunError, match="was merged or detached: attach again"):
            attached.active = True


def test_what_is_gone_says_so_before_anything_else():
    attached = LowRank().attach(small_model())
    attached.active = False
    attached.detach()
    with pytest.raises(RunError, match="was merged or detached"):
        attached.merge()


def test_what_is_so_already_is_no_change():
    attached = LowRank().attach(small_model())
    attached.load_state_dict({k: torch.ones_like(v) for k, v in attached.state_dict().items()})
    attached.fold()
    folded = state(attached.model)
    attached.active = True  # of a folded one only a change is refused
    attached.fold()
    assert unchanged(attached.model, folded)
    attached.unfold()
    assert all(layer.untouched for layer in attached.layers.values())


def test_a_merged_adapter_keeps_no_copy_of_the_weights():
    attached = LowRank().attach(small_model())
    attached.fold()
    attached.merge()
    attached, other = LowRank().attach(small_model()), attached
    attached.merge()
    for one in (attached, other):
        kept = [v for layer in one.layers.values() for v in layer._before]
        assert not any(isinstance(v, torch.Tensor) and v.ndim == 2 for v in kept)


def test_a_layer_that_somebody_put_over_an_adapter_is_named():
    model = small_model()
    attached = LowRank().attach(model)
    undo = replace(next(weights(model)), Around(model[0]))
    with pytest.raises(ConfigError, match=r"default: another layer \(Around\) was put over it: undo that"):
        attached.detach()
    undo()
    assert attached.detach() is model


def packed():
    model = small_model()
    quantize_model(model, Affine(8, 8), {"0": 8})
    return model


def under(adapter):
    model = small_model()
    adapter.attach(model, "first")
    return model


@pytest.mark.parametrize(("model", "words"), [
    (packed, "second: 0 is packed and cannot train: exclude it, or take an adapter that freezes"),
    (lambda: under(LowRank(target_modules=["0"])), "second: it trains the base, and an adapter"),
    (lambda: under(Whole(target_modules=["0"])), "0 is held by 'first', which reparameterizes it"),
])
def test_an_adapter_whose_base_trains_has_its_weights_to_itself(model, words):
    model = model()
    before = state(model)
    with pytest.raises(ConfigError, match=words):
        Whole(target_modules=["0"]).attach(model, "second")
    assert unchanged(model, before)


def test_an_adapted_weight_that_nobody_froze_is_not_shared_either():
    model = small_model()
    quantize_model(model, Affine(8, 8), {"0": 8})
    LowRank(target_modules=["0"]).attach(model, "first")
    with pytest.raises(ConfigError, match="second: 0 is adapted by 'first', and this adapter holds"):
        Whole(target_modules=["0"]).attach(model, "second")


def test_an_adapter_that_freezes_the_base_meets_none_that_trains_it():
    model = small_model()
    Whole(target_modules=["0"]).attach(model, "first")
    before = state(model)
    with pytest.raises(ConfigError, match="second: it freezes the base, and 'first' trains it: merge"):
        LowRank(target_modules=["3"]).attach(model, "second")
    assert unchanged(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_head_alone_is_adapted_only_when_it_is_named():
    model = nn.ModuleDict({"lm_head": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match=r"low_rank: no linear layer to adapt \(the head is adapted only"):
        LowRank().attach(model)
    assert list(LowRank(target_modules=["lm_head"]).attach(model).layers) == ["lm_head"]


def test_an_adapters_own_children_are_its_own_and_its_base_is_not():
    class Deep(SumLayer):
        def __init__(self, base, r):
            super().__init__(base, r)
            self.gate = nn.Linear(2, 1)

    layer = Deep(nn.Linear(4, 3), 2)
    assert set(layer.own()) == {"A", "B", "gate.weight", "gate.bias"} and len(layer.own_parameters()) == 4


def test_an_adapter_that_cannot_be_read_leaves_the_model_as_it_was(tmp_path):
    from poise_compander import WeightNorm

    save_adapter(WeightNorm().attach(small_model()), tmp_path)
    tensors, meta = load_bundle(tmp_path / "adapter")
    own = next(k for k in tensors if k.startswith("adapter."))
    changed = {k: v + 1 for k, v in tensors.items() if k != own}
    save_bundle(tmp_path / "adapter", changed, meta)
    model = small_model()
    before = state(model)
    with pytest.raises(FileError, match="is missing"):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert all(torch.allclose(after[k], v, atol=1e-6) for k, v in before.items())


# ------------------------------------------------------------------ quantizers


def test_a_name_that_quantizers_do_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'poise\.quantizers' has no attribute 'Sign'"):
        _ = poise.quantizers.Sign
    assert not hasattr(poise.quantizers, "Sign")


@pytest.mark.parametrize(("tensor", "words"), [
    ("scale", "packed scale is float32, not float16: give scale_dtype=float32"),
    ("codes", "packed codes is float32, not uint8: give|packed codes is float32, not uint8$"),
])
def test_stored_tensors_of_another_type_are_refused(tensor, words):
    tensors = Affine(4, 8).quantize(torch.randn(4, 16)).tensors()
    tensors[tensor] = tensors[tensor].float()
    with pytest.raises(FileError, match=words):
        Affine(4, 8).from_tensors(tensors, (4, 16), torch.float32)


def test_a_matrix_of_whole_numbers_is_refused():
    for kind in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(DataError, match=f"cannot quantize {kind}: give real numbers"):
            Affine().quantize(torch.ones(2, 8, dtype=kind))


def test_a_minimum_may_be_off_by_a_share_of_its_scale():
    """float16 holds no 1e-9; beside a scale of 1/15 that is nothing."""
    stored = Affine(4, 8).quantize(torch.tensor([[1e-9, 1.0]]))
    assert isinstance(stored, PackedMatrix)
    assert stored.dequantize()[0].tolist() == pytest.approx([0, 1], abs=1e-3)


@pytest.mark.parametrize(("plan", "words"), [
    ([("0", 4)], "a plan is a mapping of names or patterns to bits or quantizers, not"),
    (["0"], "a plan is a mapping of names or patterns to bits or quantizers, not"),
    ({0: 4}, "a plan is a mapping of names or patterns to bits or quantizers, not"),
    ({"0": {"bits": 4}}, "plan: 0: .* has no entry"), ({"0": {"entry": 4}}, "plan: 0: .* has no entry"),
    ({"0": Affine}, "plan: 0: .*Affine.* is neither bits nor a quantizer"),
])
def test_a_plan_of_another_form_is_refused(plan, words):
    model = small_model()
    with pytest.raises(ConfigError, match=words):
        quantize_model(model, Affine(), plan)
    with pytest.raises(ConfigError, match=words):
        resolve(weights(model), Affine(), plan)
    assert unchanged(model, state(small_model()))


def test_what_is_packed_twice_is_the_plain_layer_when_it_is_unpacked():
    model = small_model()
    for bits in (8, 4):
        quantize_model(model, Affine(bits, 8), {"0": bits})
    plain = model[0].dense()
    assert type(plain) is nn.Linear and set(plain.state_dict()) == {"weight", "bias"}
    assert set(LowRank().attach(model).merge().state_dict()) == set(small_model().state_dict())


def test_an_expert_of_its_own_among_fused_ones_leaves_them_alone():
    model = tiny("mixtral")
    found = [w for w in weights(model) if w.role == "expert"]
    values = {w.name: w.read().clone() for w in found}
    undo = replace(found[0], PlainExpert(found[0].plain(found[0].read()).clone(), transposed=False))
    assert {w.name: w.read().tolist() for w in weights(model) if w.role == "expert"} == {
        name: value.tolist() for name, value in values.items()}
    undo()
    assert next(w for w in weights(model) if w.role == "expert").index == found[0].index == 0


def test_packing_does_not_drop_a_layer_of_somebodys_own():
    model = small_model()
    undo = replace(next(weights(model)), Around(model[0]))
    with pytest.raises(ConfigError, match="0: Around stands in its place: undo that first"):
        quantize_model(model, Affine(8, 8))
    undo()
    mixture = tiny("mixtral")
    one, other, *_ = (w for w in weights(mixture) if w.role == "expert")
    replace(one, Around(one.layer))
    with pytest.raises(ConfigError, match=f"{other.name}: Around stands in for an expert of its block"):
        quantize_model(mixture, Affine(8, 8), {other.name: 8})
