"""A change that depends on the weight is another over other adapters, and in a file of its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from bone_forms import randn
from safetensors.torch import load_file
from torch import nn

from poise import load_adapter, save_adapter
from poise.errors import ConfigError
from poise.walk import checkpoint
from poise_bone import Bone, export_lora, load_peft, save_peft
from poise_bone.functional import delta

peft = pytest.importorskip("peft")
GUIDED = [("bat", 8), ("bat_row", 8), ("bat_left", 4), ("bone_free", 8)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24))


def x():
    return randn(6, 24, seed=9, dtype=torch.float32)


def attach(model, name, seed=0, **bone):
    attached = Bone(**bone).attach(model, name)
    for n, (_, D) in enumerate(attached.tensors()):
        D.data.copy_(0.3 * randn(*D.shape, seed=seed + n))
    return attached


def two(**upper):
    """Two adapters, the second over the first."""
    model = network()
    return attach(model, "lower", r=8), attach(model, "upper", 20, **upper)


@pytest.mark.parametrize(("variant", "r"), GUIDED)
def test_what_depends_on_another_adapters_change_is_not_written_alone(variant, r, tmp_path):
    """The file on the bare base would be another change, without a word."""
    lower, upper = two(variant=variant, r=r)
    writes = [lambda: export_lora(upper, tmp_path / "lora", rank=4)]
    if variant == "bat":
        writes.append(lambda: save_peft(upper, tmp_path / "peft"))
    for state in (lambda: None, lower.fold):
        state()
        for write in writes:
            with pytest.raises(ConfigError, match=rf"^upper: the change of {variant} depends on the weight"
                                                  r", which 'lower' changes before it.*merge\(\) 'lower'"):
                write()
    assert not list(tmp_path.iterdir())
    lower.unfold()
    lower.active = False  # now it acts on the base alone, as the file does
    export_lora(upper, tmp_path / "lora", rank=16)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in upper.layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        want = delta(layer.weight_beneath.read(), layer.block().detach(), variant)
        assert torch.allclose(B @ A, want, atol=1e-5)
    lower.active = True
    export_lora(lower, tmp_path / "lower")  # the first of them never depends


def test_an_adapter_beneath_that_is_merged_is_in_the_base_that_the_file_is_for(tmp_path):
    lower, upper = two(variant="bat", r=8)
    want = upper.model(x())
    lower.merge()
    save_peft(upper, tmp_path)
    base = network()
    base.load_state_dict(dict(checkpoint(upper.model)))
    load_peft(base, tmp_path)
    assert torch.allclose(base(x()), want, atol=1e-5)


@pytest.mark.parametrize("more", [
    {"variant": "bone", "scale": "row_norm"}, {"variant": "mini", "mini_r": 8, "scale": "row_norm"},
    {"variant": "bone_out"}])
def test_what_does_not_depend_on_the_weight_is_written_over_another_adapter_too(more, tmp_path):
    model = network()
    lower, upper = attach(model, "lower", r=8, variant="bat"), attach(model, "upper", 20, r=8, **more)
    assert set(export_lora(upper, tmp_path / "lora").values()) == {0.0}
    lower.detach()
    theirs = peft.PeftModel.from_pretrained(network(), str(tmp_path / "lora"))
    want = upper.model(x())
    assert torch.allclose(theirs(x()), want, atol=2e-6)
    if more["variant"] != "bone_out":
        save_peft(upper, tmp_path / "peft")
        assert torch.allclose(load_peft(network(), tmp_path / "peft").model(x()), want, atol=2e-6)


def test_an_adapter_that_is_loaded_over_others_than_it_was_saved_over_is_pointed_out(tmp_path):
    lower, upper = two(variant="bat", r=8)
    save_adapter(lower, tmp_path / "lower")
    save_adapter(upper, tmp_path / "upper")
    with pytest.warns(UserWarning, match=r"saved over the adapters \['lower'\]; here it acts over \[\]"):
        load_adapter(network(), tmp_path / "upper")
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path / "lower")
        load_adapter(model, tmp_path / "upper")
    assert torch.equal(model(x()), upper.model(x()))
