"""While weights hold a change: other parameters are noticed, the base is frozen, and it comes back."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from poise.errors import ConfigError
from poise.quantizers import Affine, quantize_model
from poise.testing.adapter import small_model
from poise.testing.families import IDS, tiny
from poise.testing.lowrank import LowRank
from poise.walk import weights
from poise_bone import Bone
from poise_bone.components import Lora


def packed_model():
    model = small_model()
    quantize_model(model, Affine(8, 8))
    return model


def x():
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def call(model):
    return model(input_ids=IDS).logits if hasattr(model, "config") else model(x())


def randomize(attached):
    for n, (_, t) in enumerate(attached.tensors()):
        t.data.copy_(0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(n)))
    return attached


def folded(adapter, make=small_model):
    """A folded adapter, the matrices before, and the output with its change."""
    model = make()
    attached = randomize(adapter.attach(model))
    base, acting = {w.name: w.read().clone() for w in weights(model)}, call(model)
    attached.fold()
    return attached, base, acting


def restored(attached, base):
    return all(torch.equal(w.read(), base[w.name]) for w in weights(attached.model))


def step(attached):
    """An optimizer's step with a gradient that was there before."""
    optimizer = attached.optimizer(torch.optim.SGD, lr=1.0)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()


def in_place(attached):
    next(iter(attached.tensors()))[1].data.view(-1)[-1] += 1  # not seen by the version counter


def swapped(attached):
    """The same numbers in other places."""
    tensor = list(attached.tensors())[-1][1].data
    tensor.copy_(tensor.flip(0))


CHANGES = [step, in_place, swapped]
CASES = {
    "low_rank": (LowRank(), small_model), "multiply": (LowRank(multiply=True), small_model),
    "bone": (Bone(r=4), small_model), "bat": (Bone(r=4, variant="bat"), small_model),
    "packed": (Bone(r=4), packed_model),
    "experts": (Bone(r=4, target_modules=["experts.*"]), lambda: tiny("mixtral")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_parameters_that_change_while_they_are_folded_are_noticed(case, change):
    attached, base, acting = folded(*CASES[case])
    change(attached)
    assert torch.allclose(call(attached.model), acting, atol=1e-4)  # the weights hold those of before
    for verb in ("fold", "merge", "folded_weights"):
        said = "fold" if verb == "folded_weights" else verb
        with pytest.raises(ConfigError, match=rf"^default: its parameters were changed after fold\(\), and "
                                              rf"the weights hold .* before: unfold\(\), then {said}$"):
            getattr(attached, verb)()
    with pytest.warns(UserWarning, match=r"default: its parameters were changed after fold\(\): from here"):
        attached.unfold()
    assert restored(attached, base) and not torch.allclose(call(attached.model), acting, atol=1e-3)
    changed = call(attached.model)
    attached.fold()
    assert torch.allclose(call(attached.model), changed, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_base_comes_back_whatever_became_of_the_parameters(case):
    attached, base, _ = folded(*CASES[case])
    step(attached)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.detach()  # they go with the adapter
    assert restored(attached, base)


@pytest.mark.parametrize("case", CASES)
def test_parameters_that_are_as_they_were_are_not_spoken_of(case):
    attached, base, acting = folded(*CASES[case])
    kept = {k: t.clone() for k, t in attached.state_dict().items()}
    step(attached)
    with torch.no_grad():
        for k, t in attached.tensors():
            t.copy_(kept[k])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.fold()
        attached.unfold()
    assert restored(attached, base) and torch.equal(call(attached.model), acting)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_loaded_into_what_is_folded(case):
    attached, base, acting = folded(*CASES[case])
    kept = {k: t.clone() for k, t in attached.state_dict().items()}
    with pytest.raises(ConfigError, match=r"^default: it is folded into the weights: unfold\(\) before"):
        attached.load_state_dict({k: t + 1 for k, t in kept.items()})
    assert all(torch.equal(t, kept[k]) for k, t in attached.state_dict().items())
    attached.unfold()
    assert restored(attached, base) and torch.equal(call(attached.model), acting)
    attached.load_state_dict({k: t + 1 for k, t in kept.items()})


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_cast_is_no_change_and_hides_none(case, changed):
    """Experts were taken for written to: their parameter is cast after the layers beside it."""
    attached, base, _ = folded(*CASES[case])
    if changed:
        step(attached)
    attached.model.double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attached.unfold()
    assert [("changed after fold()" in str(w.message)) for w in said] == [True] * changed
    assert all(w.dtype == torch.float64 and torch.allclose(w.read(), base[w.name].double(), atol=1e-6)
               for w in weights(attached.model))


def test_a_cast_hides_no_write_to_a_folded_weight():
    attached, _, _ = folded(Bone(r=4))
    w = next(weights(attached.model))
    w.write(2 * w.read())
    attached.model.double()
    with pytest.raises(ConfigError, match=r"default: 0 was written to after fold\(\)"):
        attached.unfold()


def test_parameters_of_modules_beside_the_base_are_watched_too():
    pytest.importorskip("peft")
    attached, base, _ = folded(Lora(r=2))
    next(iter(attached.layers.values())).lora_A.weight.data.add_(1)
    with pytest.warns(UserWarning, match="its parameters were changed after"):
        attached.unfold()
    assert restored(attached, base)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(16, 16, bias=False)), lambda: tiny("mixtral")], ids=["linear", "moe"])
def test_a_packed_layer_without_a_bias_stays_frozen_as_a_plain_one(make):
    """No parameter of its own told that it is frozen, and a later adapter refused its gradient."""
    model = make()
    quantize_model(model, Affine(8, 8))
    first = randomize(Bone(r=2).attach(model, "first"))
    second = randomize(Bone(r=2, variant="bat").attach(model, "second"))
    given, want = (IDS if hasattr(model, "config") else x()), call(model)

    def base():
        return [p.requires_grad for n, p in model.named_parameters() if not n.endswith(".D")]

    first.fold()
    assert not any(base()) and torch.allclose(call(model), want, atol=1e-4)
    y = model(given)
    (y if isinstance(y, torch.Tensor) else y.logits).square().sum().backward()
    assert all(D.grad is not None for _, D in second.tensors())
    first.merge()
    assert not any(base())
    second.merge()
    assert all(base())
