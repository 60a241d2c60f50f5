"""Bases that bitsandbytes or torchao packed: met by the walk, adapted, folded, packed again."""

from __future__ import annotations

import pytest
import torch
from bone_forms import VARIANTS, options, randn
from torch import nn

from poise.errors import ConfigError
from poise.quantizers import Affine, PackedLinear, quantize_model
from poise.walk import checkpoint, weights
from poise.walk.foreign import ForeignMatrix
from poise_bone import Bone, lean
from poise_bone.functional import changed, forward


def plain(i=64, o=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(i, o))


def nf4(nested=False):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        64, 32, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=nested)
    layer.load_state_dict(plain()[0].state_dict())
    return nn.Sequential(layer.to("cpu"))


def int8():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict(plain()[0].state_dict())
    return nn.Sequential(layer.to("cpu"))


def ao():
    quantization = pytest.importorskip("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


KINDS = {"nf4": nf4, "nf4, scales packed": lambda: nf4(True), "int8": int8, "torchao": ao}


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_meets_the_matrix_and_reads_rows_of_it(kind):
    model = KINDS[kind]()
    (w,) = weights(model)
    assert (w.name, w.role, w.shape, w.replaceable) == ("0", "linear", (32, 64), True)
    assert 4 < w.stored.bits_per_weight < 9
    x = randn(5, 64, dtype=torch.float32)
    assert torch.allclose(x @ w.read().T + model[0].bias, model(x), atol=2e-2)
    for rows in (slice(0, 8), slice(8, 32), slice(3, 4)):
        assert torch.equal(w.read(rows), w.read()[rows])
    with pytest.raises(ConfigError, match=r"is packed by (bitsandbytes|torchao) and not written to"):
        w.write(w.read())
    saved = dict(checkpoint(model))
    assert saved.keys() == plain().state_dict().keys() and torch.equal(saved["0.weight"], w.read())


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradients_are_those_of_the_changed_dequantized_weight(kind, variant, tokens):
    model = KINDS[kind]()
    (w,) = weights(model)
    W, bias = w.read(), model[0].bias.detach()
    shape = {"bone": (5, 32), "bone_out": (3, 64), "mini": (5, 8), "bat": (4, 8, 8), "bat_row": (8, 8, 8),
             "bat_left": (4, 8, 8), "bone_free": (2, 3, 8, 8)}[variant]
    attached = Bone(**options(variant, shape)).attach(model)
    layer = attached.layers["0"]
    layer.D.data.copy_(0.1 * randn(*layer.D.shape, seed=1))
    x = randn(tokens, 64, seed=2, dtype=torch.float32).requires_grad_()
    got = torch.autograd.grad(y := model(x), [x, layer.D], torch.ones_like(y))
    D = layer.D.detach().clone().requires_grad_()
    want_y = forward(x, W, D, variant, bias)
    want = torch.autograd.grad(want_y, [x, D], torch.ones_like(y))
    for a, b in zip((y, *got), (want_y, *want), strict=True):  # their int8 products round activations too
        assert float((a - b).detach().abs().max()) < 0.03 * float(b.detach().abs().max())
    packed = layer.base
    attached.fold()
    assert type(layer.base) is nn.Linear
    assert torch.equal(layer.base.weight, changed(W, layer.D.detach(), variant))
    attached.unfold()
    assert layer.base is packed
    assert type(attached.merge()[0]) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_dequantized_one_chunk_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(lean, "CHUNK", {"cpu": 8 * 64, "other": 8 * 64})
    model = KINDS[kind]()
    attached = Bone(r=8, variant="bat").attach(model)
    layer = attached.layers["0"]
    layer.D.data.fill_(0.1)
    read, seen = ForeignMatrix.dequantize, []

    def dequantize(self, rows=None):
        seen.append(rows)
        return read(self, rows)

    monkeypatch.setattr(ForeignMatrix, "dequantize", dequantize)
    model(randn(40, 64, dtype=torch.float32)).sum().backward()
    assert seen and all(rows is not None and rows.stop - rows.start <= 8 for rows in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_poise_may_pack_it_again(kind):
    model = KINDS[kind]()
    W = next(weights(model)).read()
    quantize_model(model, Affine(8, 16))
    assert isinstance(model[0], PackedLinear)
    assert torch.equal(next(weights(model)).read(), Affine(8, 16).quantize(W).dequantize())
