"""A weight of a live model may lie in a file: it is adapted and read, never written, packed or trained."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from poise.adapters import AdaptedLayer, attach_layers, choose_layers
from poise.errors import ConfigError
from poise.files import load_bundle, save_bundle
from poise.quantizers import AbsMax, quantize_model
from poise.walk import Weight, weights
from poise_bone import Bone


class Filed(nn.Module):
    """x W^T with W read from a file each time."""

    def __init__(self, stem, shape):
        super().__init__()
        self.stem, self.shape = stem, shape

    def read(self, rows=None):
        whole = load_bundle(self.stem)[0]["weight"]
        return whole if rows is None else whole[rows]

    def forward(self, x):
        return x @ self.read().T

    def held_weights(self, path):
        def write(matrix):
            raise ConfigError("it lies in a file")

        yield Weight(path, "linear", self.shape, torch.float32, f"{path}.weight", self, "file", (id(self),),
                     _read=self.read, _write=write, replaceable=True, lies_in=str(self.stem))


@dataclass(frozen=True)
class Alone:
    """An adapter whose base trains."""

    freezes_base = False

    def attach(self, model, name="default"):
        chosen = choose_layers(model, "alone", None, None)
        layers = {w.name: AdaptedLayer(w.layer) for w in chosen}
        return attach_layers(model, layers, chosen, adapter=self, name=name)


@pytest.fixture
def pair(tmp_path):
    """A model in memory, and the same one with its second weight in a file."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    save_bundle(tmp_path / "w", {"weight": plain[2].weight.detach().clone()}, {})
    filed = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Filed(tmp_path / "w", (4, 8)))
    filed[0].load_state_dict(plain[0].state_dict())
    return plain, filed


@pytest.mark.parametrize("variant", ["bone", "bat", "bat_left"])
def test_it_is_adapted_as_in_memory(pair, variant):
    found = []
    for model in pair:
        attached = Bone(r=4, variant=variant).attach(model)
        with torch.no_grad():
            for _, D in attached.tensors():
                D.normal_(generator=torch.Generator().manual_seed(1), std=0.2)
        model(torch.ones(3, 8)).square().sum().backward()
        found.append([*(D.grad for _, D in attached.tensors()), *attached.folded_state_dict().values()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_it_is_written_by_nobody(pair):
    _, filed = pair
    live = filed[0].weight
    before = live.clone()
    attached = Bone(r=4).attach(filed)
    with torch.no_grad():
        for _, D in attached.tensors():
            D.fill_(0.1)
    for verb in (attached.fold, attached.merge):
        with pytest.raises(ConfigError, match=r"default: 2 lies in .*, which \w+\(\) does not write"):
            verb()
    assert torch.equal(live, before)  # what could be written was not
    assert not attached.folded
    assert attached.detach() is filed
    with pytest.raises(ConfigError, match=r"2 lies in .*in the bits that it was written with"):
        quantize_model(filed, AbsMax(bits=4))
    with pytest.raises(ConfigError, match=r"2 lies in .* and cannot train: exclude it, or take an adapter"):
        Alone().attach(filed)
    assert [w.lies_in for w in weights(filed)] == ["", str(filed[2].stem)]
