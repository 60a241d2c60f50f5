"""Adapter files as others leave them: damaged, hostile, or of layers whose names are endings of others."""

from __future__ import annotations

import json

import pytest
import torch
from bone_forms import randn
from torch import nn

from poise.errors import ConfigError, FileError
from poise_bone import Bone, export_lora, load_peft, read_adapter, save_peft

peft = pytest.importorskip("peft")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))


def nested():
    """`0` is the ending of `1.0`, which no adapter here is on."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Sequential(nn.Linear(8, 8)))


def random(attached):
    for n, (_, t) in enumerate(attached.tensors()):
        t.data.copy_(0.2 * randn(*t.shape, seed=n))
    return attached


def configure(folder, **fields):
    now = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**now, **fields}))


# ------------------------------------------------------------------ numbers and kinds of tensors


@pytest.mark.parametrize("tensor", [
    torch.zeros(2, 8, 8, device="meta"), torch.eye(8).expand(2, 8, 8).to_sparse(),
    torch.ones(2, 8, 8).to(torch.float8_e4m3fn), torch.ones(1).expand(10**6, 2 * 10**6),
    torch.ones(2, 8, 8, dtype=torch.complex64), torch.zeros(8, 0), torch.zeros(0, 8, 8),
    torch.full((2, 8, 8), 1e300, dtype=torch.float64),
])
def test_a_tensor_that_cannot_be_a_block_is_refused(tensor, tmp_path):
    torch.save({"0.disha": tensor}, tmp_path / "a.pth")
    with pytest.raises(FileError, match=r"the block of 0 (is no plain tensor|has numbers that)"):
        read_adapter(tmp_path / "a.pth")


def test_a_changed_byte_of_a_pth_file_is_noticed(tmp_path):
    numbers = torch.arange(128.0).reshape(2, 8, 8)
    torch.save({"0.disha": numbers}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.find(numbers.numpy().tobytes()) + 241] ^= 0xFF
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(FileError, match="the checksum of a/data/0 is not right"):
        read_adapter(tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_a_directory_with_other_numbers_is_refused(dtype, tmp_path):
    from safetensors.torch import load_file, save_file

    save_peft(random(Bone(r=4).attach(network())), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({k: t.abs().to(dtype) for k, t in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(FileError, match=r"is no plain tensor|torn or altered"):
        read_adapter(tmp_path)


# ------------------------------------------------------------------ fields


@pytest.mark.parametrize(("fields", "words"), [
    ({"target_modules": 5}, "target_modules=5 is no list of names"),
    ({"target_modules": True}, "target_modules=True is no list of names"),
    ({"exclude_modules": {"0": 1}}, r"exclude_modules=\{'0': 1\} is no list of names"),
    ({"peft_type": []}, r"is of peft_type \[\]"), ({"peft_type": {}}, r"is of peft_type \{\}"),
])
def test_fields_of_another_kind_are_refused(fields, words, tmp_path):
    save_peft(random(Bone(r=4).attach(network())), tmp_path)
    configure(tmp_path, **fields)
    with pytest.raises(FileError, match=words):
        load_peft(network(), tmp_path)


# ------------------------------------------------------------------ names that are endings of others


def test_a_name_that_is_the_ending_of_another_goes_to_peft_and_back(tmp_path):
    model, x = nested(), torch.randn(5, 16)
    attached = random(Bone(r=4, target_modules=["0"], exclude_modules=["1.0"]).attach(model))
    save_peft(attached, tmp_path)
    theirs = peft.PeftModel.from_pretrained(nested(), tmp_path)
    blocks = [n for n, _ in theirs.named_parameters() if "miss" in n]
    assert blocks == ["base_model.model.0.miss_block.default"]
    torch.testing.assert_close(theirs(x), model(x))
    here = nested()
    assert list(load_peft(here, tmp_path).layers) == ["0"]
    assert torch.equal(here(x), model(x))


def test_each_layer_gets_its_own_rank_whatever_its_name_ends_with(tmp_path):
    blocks = {"0": randn(1, 8, 8), "1.0": randn(2, 4, 4), "1.1": randn(2, 4, 4)}
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    torch.save({f"{k}.disha": b for k, b in blocks.items()}, tmp_path / "a.pth")
    state = read_adapter(tmp_path / "a.pth").attach(model).state_dict()
    assert {k: t.shape for k, t in state.items()} == {f"{k}.D": b.shape for k, b in blocks.items()}


# ------------------------------------------------------------------ LoRA


def test_a_lora_is_made_from_the_weights_without_the_change(tmp_path):
    attached = random(Bone(r=4, variant="bat").attach(network()))
    attached.fold()
    with pytest.raises(ConfigError, match=r"made from the weights without it: unfold\(\) first"):
        export_lora(attached, tmp_path, rank=4)
    attached.merge()
    with pytest.raises(ConfigError, match="attach it again first"):
        export_lora(attached, tmp_path, rank=4)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "4"])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_rank_that_is_none_is_refused(variant, rank, tmp_path):
    with pytest.raises(ConfigError, match="is not allowed: it must be a whole number >= 1"):
        export_lora(random(Bone(r=4, variant=variant).attach(network())), tmp_path, rank=rank)
