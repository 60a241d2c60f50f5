"""On an accelerator all is as on the CPU: values, gradients, folding, experts, packed bases, files."""

from __future__ import annotations

import pytest
import torch
from bone_forms import SHAPES, VARIANTS, options, randn
from torch import nn

from poise import load_adapter, save_adapter
from poise.quantizers import Affine, quantize_model
from poise_bone import Bone
from poise_bone.functional import changed, delta, forward

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")]
LARGE = {"bone": (64, 512), "bone_out": (64, 512), "mini": (64, 128), "bat": (8, 64, 64),
         "bat_row": (8, 64, 64), "bat_left": (8, 64, 64), "bone_free": (2, 4, 64, 64)}


def one(variant, size=(16, 24), shape=None, dtype=torch.float64, scale=0.3):
    """Return a model of one linear there, what is attached, and its layer, with a block that acts."""
    torch.manual_seed(0)
    o, i = size
    model = nn.Sequential(nn.Linear(i, o)).to(DEVICE, dtype)
    attached = Bone(**options(variant, shape or SHAPES[variant])).attach(model)
    layer = attached.layers["0"]
    with torch.no_grad():
        layer.D.copy_(scale * randn(*layer.D.shape, seed=1))
    return model, attached, layer


def near(got, want, most):
    """Whether two tensors differ by at most a part of the largest number."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).abs().max()) <= most * float(want.abs().max())


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_product_and_gradients_are_those_of_the_changed_weight_on_the_cpu(variant, tokens):
    model, _, layer = one(variant)
    x, dy = randn(tokens, 24, seed=2).to(DEVICE).requires_grad_(), randn(tokens, 16, seed=3)
    y = model(x)
    got = torch.autograd.grad(y, [x, layer.D], dy.to(DEVICE))
    W, b = layer.base.weight.detach().cpu(), layer.bias.detach().cpu()
    x2, D = x.detach().cpu().requires_grad_(), layer.D.detach().cpu().requires_grad_()
    want_y = forward(x2, W, D, variant, b)
    want = torch.autograd.grad(want_y, [x2, D], dy)
    assert all(near(a, c, 1e-11) for a, c in zip((y, *got), (want_y, *want), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [1, 32, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_within_its_rounding(variant, tokens, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    model, _, layer = one(variant, (512, 512), LARGE[variant], dtype=dtype, scale=0.05)
    x, dy = (randn(tokens, 512, seed=s, dtype=dtype).to(DEVICE) for s in (2, 3))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = model(x.requires_grad_())
    assert y.dtype == torch.bfloat16 and layer.D.dtype == torch.float32
    got = torch.autograd.grad(y, [x, layer.D], dy.to(y.dtype))
    W, b = layer.base.weight.detach().double(), layer.bias.detach().double()
    x2, D = x.detach().double().requires_grad_(), layer.D.detach().double().requires_grad_()
    want_y = x2 @ (W + delta(W, D, variant)).T + b
    want = torch.autograd.grad(want_y, [x2, D], dy.double())
    assert got[1].dtype == torch.float32
    assert all(near(a, c, 0.03) for a, c in zip((y, *got), (want_y, *want), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folded_weight_is_the_changed_one_and_comes_back_bit_for_bit(variant, dtype):
    model, attached, layer = one(variant, (512, 512), LARGE[variant], dtype=dtype)
    x = randn(7, 512, seed=2, dtype=dtype).to(DEVICE)
    before, y = layer.base.weight.clone(), model(x)
    attached.fold()
    want = changed(before.cpu(), layer.D.detach().cpu(), variant)
    # products of fp32 may be made in fewer bits there
    assert near(layer.base.weight, want, 1e-3 if dtype is torch.float32 else 1e-2)
    assert near(model(x), y, 2e-3 if dtype is torch.float32 else 3e-2) and layer.untouched
    layer.base.weight[:2] = layer.base.weight[[1, 0]]
    assert not layer.untouched
    layer.base.weight[:2] = layer.base.weight[[1, 0]]
    attached.unfold()
    assert torch.equal(layer.base.weight, before)


@pytest.mark.parametrize("tokens", [16, 512])
def test_bat_keeps_nothing_but_its_output(tokens):
    model, _, _ = one("bat", (2048, 2048), (32, 64, 64), dtype=torch.bfloat16)
    x = torch.randn(tokens, 2048, device=DEVICE, dtype=torch.bfloat16)
    model(x).sum().backward()  # the device's libraries take their own room once
    before = torch.cuda.memory_allocated()
    y = model(x)
    assert torch.cuda.memory_allocated() - before <= y.numel() * y.element_size() + 4096


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_base_is_that_of_its_dequantized_weight(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    quantize_model(model, Affine(4, 8))
    W, bias = model[0].packed.get().dequantize(), model[0].bias.detach()
    model.to(DEVICE)
    attached = Bone(**options(variant, SHAPES[variant])).attach(model)
    layer = attached.layers["0"]
    with torch.no_grad():
        layer.D.copy_(0.3 * randn(*layer.D.shape, seed=1))
    x = randn(9, 24, seed=2, dtype=torch.float32)
    want = forward(x, W, layer.D.detach().cpu(), variant, bias)
    assert near(model(x.to(DEVICE)), want, 1e-3)
    attached.fold()
    assert near(layer.base.weight, changed(W, layer.D.detach().cpu(), variant), 1e-3)


@pytest.mark.parametrize("variant", ["bone", "bat", "bat_row"])
def test_a_compiled_model_computes_the_same(variant):
    model, _, layer = one(variant)
    x = randn(40, 24, seed=2).to(DEVICE).requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, layer.D])
    compiled = torch.compile(model, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), [x, layer.D])
    assert all(near(a, b, 1e-10) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("variant", ["bone", "bat", "bat_row"])
def test_a_language_model_trains_there_as_on_the_cpu_and_its_adapter_travels(
    architecture, variant, tmp_path
):
    pytest.importorskip("transformers")
    from poise.models.components import CausalLM

    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    losses, states = [], []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = CausalLM(architecture=architecture, hidden_size=32, layers=1).build().to(device)
        attached = Bone(r=8, variant=variant).attach(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        states.append({k: v.cpu() for k, v in attached.state_dict().items()})
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-3) and losses[2] < losses[0]
    assert all(near(states[1][k], v, 0.05) for k, v in states[0].items() if v.any())
    save_adapter(attached, tmp_path / "saved")
    torch.manual_seed(0)
    fresh = CausalLM(architecture=architecture, hidden_size=32, layers=1).build()
    load_adapter(fresh, tmp_path / "saved")
    with torch.no_grad():
        there, here = model(input_ids=ids.to(DEVICE)).logits, fresh(input_ids=ids).logits
    assert near(there, here, 1e-3)
