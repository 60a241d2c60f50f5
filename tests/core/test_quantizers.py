"""Packing is lossless, quantizing is bounded, and a packed model computes what the dense one would."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from cases import some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import ConfigError, DataError, FileError
from poise.models.components import CausalLM
from poise.quantizers import (
    AbsMax,
    Affine,
    PackedLinear,
    PackedMatrix,
    quantize_model,
    stored_bytes,
)
from poise.quantizers.layers import packed_matmul
from poise.quantizers.packing import pack, packed_width, unpack
from poise.walk import checkpoint, weights
from poise.walk.experts import Experts
from poise_compander.components import Companded

BITS = st.integers(2, 8)
SIZES = st.integers(1, 20)
GROUPS = st.sampled_from([-1, 0, 1, 4, 8, 64])
IDS = torch.tensor([[1, 2, 3, 200, 17, 5, 9, 30]])
few = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


# ------------------------------------------------------------------ packing


@few
@given(BITS, st.integers(1, 5), st.integers(1, 70), st.integers(0, 999))
def test_unpack_undoes_pack(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator(seed))
    octets = pack(codes, bits)
    assert octets.dtype == torch.uint8
    assert octets.shape == (rows, math.ceil(columns * bits / 8)) == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(octets, bits, columns).long(), codes)


@few
@given(BITS, st.integers(1, 70))
def test_a_row_is_the_little_endian_number_of_its_codes(bits, columns):
    codes = torch.randint(0, 2**bits, (1, columns), generator=generator(columns))
    number = sum(c << (bits * j) for j, c in enumerate(codes[0].tolist()))
    assert bytes(pack(codes, bits)[0].tolist()) == number.to_bytes(packed_width(columns, bits), "little")


def test_golden_bytes():
    assert pack(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x21, 0x03]]  # low nibble: even column
    assert pack(torch.tensor([[0, 1, 2, 3]]), 2).tolist() == [[0b11_10_01_00]]
    assert pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 3).tolist() == [[0xD1, 0x58, 0x1F]]


def test_golden_absmax_int4():
    stored = AbsMax(bits=4, group=0).quantize(torch.tensor([[7.0, -7.0, 1.4, 0.0], [0.5, -3.5, 1.0, 3.5]]))
    assert stored.scale.tolist() == [[1.0], [0.5]] and stored.scale.dtype == torch.float16
    # codes are q + 8: (15, 1, 9, 8) and (9, 1, 10, 15)
    assert stored.codes.tolist() == [[0x1F, 0x89], [0x19, 0xFA]]
    assert stored.dequantize().tolist() == [[7.0, -7.0, 1.0, 0.0], [0.5, -3.5, 1.0, 3.5]]
    assert stored.nbytes == 4 + 4 and stored.bits_per_weight == 8.0


def test_golden_affine_int2():
    stored = Affine(bits=2, group=2).quantize(torch.tensor([[-1.0, 2.0, 4.0, 10.0]]))
    assert stored.minimum.tolist() == [[-1.0, 4.0]] and stored.scale.tolist() == [[1.0, 2.0]]
    assert stored.codes.tolist() == [[0b11_00_11_00]]
    assert stored.dequantize().tolist() == [[-1.0, 2.0, 4.0, 10.0]]


# ------------------------------------------------------------------ bounds, levels, bytes


def per_weight(per_group, group, shape):
    """Spread values of shape (out, groups) over the columns, written out plainly."""
    width = shape[1] if group <= 0 else group
    grid = per_group.double().expand(shape[0], -1) if group == -1 else per_group.double()
    return torch.stack([grid[:, j // width] for j in range(shape[1])], 1)


@few
@given(BITS, SIZES, SIZES, GROUPS, st.integers(0, 99))
def test_absmax_errs_by_half_a_scale_at_most(bits, rows, columns, group, seed):
    w = matrix(rows, columns, seed=seed)
    stored = AbsMax(bits, group).quantize(w)
    scale = per_weight(stored.scale, group, w.shape)
    error = (stored.dequantize().double() - w.double()).abs()
    assert (error <= scale / 2 * (1 + 1e-3)).all()


@few
@given(BITS, SIZES, SIZES, GROUPS, st.integers(0, 99), st.floats(-20, 20))
def test_affine_errs_by_half_a_scale_and_the_rounding_of_what_is_stored(
    bits, rows, columns, group, seed, offset
):
    w = matrix(rows, columns, seed=seed) + offset
    stored = Affine(bits, group).quantize(w)
    scale = per_weight(stored.scale, group, w.shape)
    minimum = per_weight(stored.minimum, group, w.shape)
    rounding = (minimum.abs() + 2**bits * scale) * 2**-11 + 1e-7
    error = (stored.dequantize().double() - w.double()).abs()
    assert (error <= scale / 2 + rounding).all()


@few
@given(st.sampled_from([AbsMax, Affine]), BITS, st.floats(-10, 8), st.integers(0, 20))
def test_the_bound_holds_at_every_magnitude(quantizer, bits, power, seed):
    """Scales that float16 would round coarsely, or not hold at all, are held by float32."""
    w = matrix(3, 16, seed=seed) * 10.0**power
    stored = quantizer(bits, 8, "float32").quantize(w)
    levels = 2 * (2 ** (bits - 1) - 1) if quantizer is AbsMax else 2**bits - 1
    blocks = w.double().view(3, 2, 8)
    reach = 2 * blocks.abs().amax(-1) if quantizer is AbsMax else blocks.amax(-1) - blocks.amin(-1)
    largest = blocks.abs().amax(-1, keepdim=True)
    error = (stored.dequantize().double() - w.double()).abs().view(3, 2, 8)
    assert (error <= (reach / levels / 2).unsqueeze(-1) + 3e-3 * largest).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-9, 1e9, 1e30])
def test_scales_that_float16_cannot_hold_are_refused_and_kept_in_float32(magnitude):
    w = matrix(4, 16) * magnitude
    for kind in (AbsMax, Affine):
        with pytest.raises(DataError, match=r"float16 does not hold: give scale_dtype='float32'"):
            kind(8, 0).quantize(w)
        stored = kind(8, 0, "float32").quantize(w)
        assert stored.scale.dtype == torch.float32
        assert float((stored.dequantize() - w).abs().max()) < 0.02 * magnitude
    assert AbsMax(8, 0).quantize(matrix(4, 16)).scale.dtype == torch.float16


@few
@given(BITS, SIZES, SIZES)
def test_no_more_levels_than_bits_allow(bits, rows, columns):
    w = matrix(rows, columns, seed=columns)
    assert len(AbsMax(bits, -1).quantize(w).dequantize().unique()) <= 2**bits - 1
    assert len(Affine(bits, -1).quantize(w).dequantize().unique()) <= 2**bits


def test_absmax_is_odd():
    w = matrix(6, 24)
    both = [AbsMax(3, 8).quantize(s * w).dequantize() for s in (1, -1)]
    assert torch.equal(both[0], -both[1])


@few
@given(BITS, st.integers(1, 30), st.integers(1, 70), GROUPS)
def test_bytes_are_those_of_theory(bits, rows, columns, group):
    w = matrix(rows, columns)
    groups = {-1: 1, 0: rows}.get(group) or rows * math.ceil(columns / group)
    codes = rows * math.ceil(columns * bits / 8)
    for quantizer, each in ((AbsMax, 2), (Affine, 4)):
        stored = quantizer(bits, group).quantize(w)
        assert stored.nbytes == codes + each * groups
        assert stored.nbytes == sum(t.numel() * t.element_size() for t in stored.tensors().values())
        assert stored.bits_per_weight == 8 * stored.nbytes / (rows * columns)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [8, 64])
def test_bits_per_weight_are_b_plus_the_scales(bits, group):
    w = matrix(3, 128)
    assert AbsMax(bits, group).quantize(w).bits_per_weight == bits + 16 / group
    assert Affine(bits, group).quantize(w).bits_per_weight == bits + 32 / group


# ------------------------------------------------------------------ special matrices


@pytest.mark.parametrize("quantizer", [
    AbsMax(4, 8), AbsMax(2, 0), AbsMax(8, -1), Affine(4, 8), Affine(2, 0)])
def test_zeros_stay_zeros(quantizer):
    w = matrix(4, 24)
    w[1] = 0
    if quantizer.group != -1:
        assert torch.equal(quantizer.quantize(w).dequantize()[1], torch.zeros(24))
    assert torch.equal(quantizer.quantize(0 * w).dequantize(), torch.zeros(4, 24))


@pytest.mark.parametrize("constant", [0.75, -3.0, 1e6, -1e-6, 1.0 / 3])
def test_constants_survive(constant):
    w = torch.full((3, 10), constant)
    for quantizer in (Affine(2, 4), Affine(8, 0), AbsMax(2, 4), AbsMax(8, -1)):
        wide = dataclasses.replace(quantizer, scale_dtype="float32")
        assert torch.allclose(wide.quantize(w).dequantize(), w, rtol=2**-10, atol=0)


@pytest.mark.parametrize("quantizer", [
    AbsMax(2, 8), AbsMax(5, 0), AbsMax(8, -1), Affine(2, 8), Affine(4, 0)])
def test_quantizing_what_was_quantized_changes_nothing(quantizer):
    once = quantizer.quantize(matrix(8, 32)).dequantize()
    assert torch.equal(quantizer.quantize(once).dequantize(), once)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    w = matrix(4, 16, dtype=dtype)
    stored = Affine(8, 8).quantize(w)
    assert stored.dtype == dtype == stored.dequantize().dtype
    assert float((stored.dequantize() - w).abs().max()) < 0.03
    assert not w.requires_grad and torch.equal(w, matrix(4, 16, dtype=dtype))


@few
@given(BITS, st.integers(1, 12), st.integers(1, 20), GROUPS, st.integers(0, 11), st.integers(0, 11))
def test_rows_are_the_rows_of_all(bits, rows, columns, group, start, stop):
    stored = Affine(bits, group).quantize(matrix(rows, columns))
    assert torch.equal(stored.dequantize(slice(start, stop)), stored.dequantize()[start:stop])
    assert torch.equal(stored.dequantize(slice(None, None, 2)), stored.dequantize()[::2])


@pytest.mark.parametrize(
    "quantizer", some([AbsMax(4, 64), Affine(2, 32), Affine(8, 0)], keep=[Affine(2, 32)]))
def test_a_matrix_is_unpacked_in_little_more_memory_than_it_takes(quantizer):
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("this system does not say what a process holds")

    def held(key):
        return int(next(x for x in status.read_text().splitlines() if x.startswith(key)).split()[1]) * 1024

    packed = quantizer.quantize(torch.randn(4096, 8192).to(torch.bfloat16))
    packed.dequantize()
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    dense = packed.dequantize()
    assert held("VmHWM") - before <= dense.nbytes + 2**24


def test_a_tensor_without_numbers_is_refused():
    for bad, words in (
        (torch.ones(3), r"shape \(3,\)"), (torch.ones(0, 4), r"shape \(0, 4\)"),
        (torch.ones(2, 2, 2), r"shape \(2, 2, 2\)"),
        (torch.tensor([[1.0, float("nan"), float("inf")]]), "2 values that are NaN or Inf"),
    ):
        for quantizer in (AbsMax(), Affine()):
            with pytest.raises(DataError, match=words):
                quantizer.quantize(bad)


def test_stored_tensors_of_another_size_are_refused():
    stored = Affine(4, 8).quantize(matrix(4, 16))
    with pytest.raises(FileError, match="do not fit"):
        Affine(4, 8).from_tensors(stored.tensors(), (4, 18), torch.float32)
    with pytest.raises(FileError, match="do not fit"):
        Affine(5, 8).from_tensors(stored.tensors(), (4, 16), torch.float32)


@pytest.mark.parametrize("fault", [
    lambda t: {**t, "scale": t["scale"][:, :1]}, lambda t: {**t, "minimum": t["minimum"][:2]},
    lambda t: {k: v for k, v in t.items() if k != "scale"},
    lambda t: {k: v for k, v in t.items() if k != "minimum"},
], ids=["fewer scales", "fewer minima", "no scale", "no minimum"])
def test_scales_that_do_not_fit_are_refused(fault):
    quantizer = Affine(4, 8)
    tensors = fault(quantizer.quantize(matrix(4, 16)).tensors())
    with pytest.raises(FileError):
        quantizer.from_tensors(tensors, (4, 16), torch.float32)


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 1}, "bits=1 is not allowed: it must be >= 2 and <= 8"), ({"bits": 9}, "bits=9"),
    ({"group": -2}, "group=-2 is not allowed: it must be >= -1"), ({"bits": 4.0}, "wrong type"),
])
def test_options_out_of_range_are_refused(options, words):
    for quantizer in (AbsMax, Affine):
        with pytest.raises(ConfigError, match=words):
            quantizer(**options)


# ------------------------------------------------------------------ a packed linear


@pytest.fixture
def slices(monkeypatch):
    """The numbers of rows that were dequantized at a time."""
    seen = []
    real = PackedMatrix.dequantize

    def spy(self, rows=None):
        part = real(self, rows)
        seen.append(part.shape[0] / self.shape[0])
        return part

    monkeypatch.setattr(PackedMatrix, "dequantize", spy)
    return seen


@pytest.mark.parametrize("quantizer", [AbsMax(4, 8), Affine(3, 0), AbsMax(2, -1)])
@pytest.mark.parametrize("shape", [(2, 7), (9, 16), (33, 5)])
def test_products_equal_those_of_the_dequantized_weight(quantizer, shape, slices):
    stored = quantizer.quantize(matrix(*shape, dtype=torch.float64))
    dense = stored.dequantize()
    x, dy = (matrix(2, 3, n, dtype=torch.float64, seed=n) for n in (shape[1], shape[0]))
    slices.clear()
    assert torch.allclose(stored.matmul(x), x @ dense.T, rtol=1e-12, atol=1e-12)
    assert torch.allclose(stored.matmul_t(dy), dy @ dense, rtol=1e-12, atol=1e-12)
    assert len(slices) >= 4 and max(slices) < 1 and sum(slices) == pytest.approx(2)


def test_a_wide_matrix_is_taken_a_row_at_a_time(monkeypatch, slices):
    monkeypatch.setattr("poise.quantizers.sliced.SLICE_WEIGHTS", 8)
    stored = AbsMax(4, 8).quantize(matrix(6, 16))
    stored.matmul(matrix(1, 16))
    assert slices == [1 / 6] * 6


def test_a_packed_linear_is_the_dense_one_forward_and_backward(slices):
    torch.manual_seed(0)
    linear = nn.Linear(12, 10).double()
    packed = PackedLinear(Affine(4, 8).quantize(linear.weight), Affine(4, 8), linear.bias)
    dense = packed.dense()
    x = matrix(5, 12, dtype=torch.float64).requires_grad_()
    z = x.detach().clone().requires_grad_()
    slices.clear()
    y = packed(x)
    y.square().sum().backward()
    assert slices and max(slices) <= 0.5
    bias_grad, linear.bias.grad = linear.bias.grad, None
    dense(z).square().sum().backward()
    assert torch.allclose(y, dense(z), rtol=1e-12)
    assert torch.allclose(x.grad, z.grad, rtol=1e-12)
    assert torch.allclose(bias_grad, dense.bias.grad, rtol=1e-12)


def test_the_gradient_passes_gradcheck():
    stored = AbsMax(3, 4).quantize(matrix(6, 5, dtype=torch.float64))
    x = matrix(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_matmul(x, stored), (x,))


def test_autocast_decides_the_precision():
    packed = PackedLinear(Affine(8, 8).quantize(matrix(6, 8)), Affine(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(matrix(2, 8)).dtype == torch.bfloat16
    assert packed(matrix(2, 8)).dtype == torch.float32


# ------------------------------------------------------------------ whole models


def build(name="LlamaForCausalLM", seed=0, **options):
    torch.manual_seed(seed)
    return CausalLM(architecture=name, hidden_size=16, **options).build().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", [
    "LlamaForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM",
    "GraniteMoeForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel",
])
def test_a_packed_model_computes_what_the_dense_one_would(name):
    model, reference = build(name), build(name)
    report = quantize_model(model, Affine(4, 8))
    assert report["quantized"]
    for w in weights(reference):
        if w.name in report["quantized"]:
            w.write(Affine(4, 8).quantize(w.read()).dequantize())
    reference.set_experts_implementation("eager")
    assert torch.allclose(logits(model), logits(reference), atol=1e-5)
    assert not torch.allclose(logits(model), logits(build(name)), atol=1e-5)


@pytest.mark.parametrize("name", [
    "LlamaForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel"])
def test_the_dense_checkpoint_loads_into_a_plain_model(name):
    model, plain = build(name), build(name, seed=1)
    quantize_model(model, Affine(4, 8))
    plain.load_state_dict(dict(checkpoint(model)))
    plain.set_experts_implementation("eager")
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_the_packed_checkpoint_comes_back(name):
    model, other = build(name), build(name, seed=1)
    quantize_model(model, AbsMax(4, 8))
    quantize_model(other, AbsMax(4, 8))
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def packed_one(quantizer, seed=0):
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].weight.data.copy_(matrix(4, 8, seed=seed))
    quantize_model(model, quantizer)
    return model


@pytest.mark.parametrize("other", [
    AbsMax(4, 8, "float32"), AbsMax(5, 8), AbsMax(4, 4), Affine(4, 8), Companded(bits=4, group=8)])
def test_a_state_of_another_format_is_refused(other):
    """A state of absmax fits companded's tensors in every shape, and would mean other numbers."""
    theirs, own = packed_one(other), packed_one(AbsMax(4, 8), seed=1)
    before = {k: v.clone() for k, v in own.state_dict().items() if "packed" in k}
    with pytest.raises(FileError, match=r"the state of 0.packed is packed as .*, this layer as .*AbsMax"):
        own.load_state_dict(theirs.state_dict())
    assert all(torch.equal(own.state_dict()[k], v) for k, v in before.items())


def test_a_state_that_does_not_say_its_format_is_refused():
    state = {k: v for k, v in packed_one(AbsMax(4, 8)).state_dict().items() if "format" not in k}
    with pytest.raises(FileError, match=r"the state of 0\.packed does not say in which format"):
        packed_one(AbsMax(4, 8)).load_state_dict(state)


@pytest.mark.parametrize("name, change", [
    ("codes", lambda t: t.float()), ("codes", lambda t: t.to(torch.int8)), ("scale", lambda t: t.double()),
    ("poise_format", lambda t: t.float()), ("poise_format", lambda t: t[None])])
def test_a_state_whose_tensors_are_of_another_type_is_refused(name, change):
    """torch casts what it loads: codes of int8 would become other codes."""
    own, state = packed_one(AbsMax(4, 8), seed=1), packed_one(AbsMax(4, 8)).state_dict()
    key = f"0.packed.{name}"
    state[key] = change(state[key])
    with pytest.raises(FileError, match=rf"the state of 0\.packed holds {name} as torch"):
        own.load_state_dict(state)


@pytest.mark.parametrize("cast", [
    lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half(), lambda m: m.float().half()])
def test_casting_leaves_codes_and_scales_and_sets_the_dtype_of_what_comes_out(cast):
    model = packed_one(Affine(4, 8))
    before = {k: v.clone() for k, v in model.state_dict().items() if "packed" in k}
    dense = model[0].packed.get().dequantize()
    cast(model)
    now = {k: v for k, v in model.state_dict().items() if "packed" in k}
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in now.items())
    stored = model[0].packed.get()
    assert stored.dtype == model[0].bias.dtype == stored.dequantize().dtype
    assert torch.equal(stored.dequantize(), dense.to(stored.dtype))
    assert next(weights(model)).dtype == stored.dtype


def test_the_object_lives_until_its_tensors_change():
    model = build("MixtralForCausalLM")
    quantize_model(model, AbsMax(4, 8))
    made = []
    real = AbsMax.from_tensors

    def spy(*arguments):
        made.append(1)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbsMax, "from_tensors", spy)
        logits(model)
        first = len(made)
        for _ in range(3):
            logits(model)
        assert len(made) == first <= sum(w.stored is not None for w in weights(model))
        layer = model.model.layers[0].self_attn.q_proj.packed
        kept = layer.get()
        layer.codes.add_(1)
        assert layer.get() is not kept
        layer.put(torch.ones(layer.shape))
        assert torch.allclose(layer.get().dequantize(), torch.ones(layer.shape), rtol=1e-3)


def test_what_quantizing_makes_is_its_own_and_what_is_rebuilt_is_the_buffer():
    w = matrix(4, 16)
    stored = Affine(4, 8).quantize(w)
    dense = stored.dequantize()
    w.zero_()
    assert torch.equal(stored.dequantize(), dense)
    buffers = {k: v.clone() for k, v in stored.tensors().items()}
    rebuilt = Affine(4, 8).from_tensors(buffers, (4, 16), torch.float32)
    assert all(rebuilt.tensors()[k].data_ptr() == v.data_ptr() for k, v in buffers.items())
    assert rebuilt.resident_bytes == rebuilt.nbytes == stored.nbytes


@few
@given(st.sampled_from([AbsMax, Affine]), BITS, SIZES, SIZES, GROUPS,
       st.sampled_from(["float16", "float32"]))
def test_the_layout_is_known_before_the_data(kind, bits, rows, columns, group, scale_dtype):
    quantizer = kind(bits, group, scale_dtype)
    found = quantizer.quantize(matrix(rows, columns).abs() + 0.1).tensors()
    assert quantizer.layout((rows, columns), torch.float32) == {
        k: (tuple(v.shape), v.dtype) for k, v in found.items()}


def test_other_bits_are_asked_for_in_words():
    assert AbsMax(4, 32).at(3) == AbsMax(3, 32)
    with pytest.raises(ConfigError, match="bits=9 is not allowed: it must be >= 2 and <= 8"):
        Affine().at(9)


def test_the_report_tells_bytes_and_bits():
    model = build()
    before = sum(p.numel() * 4 for p in model.parameters())
    linears = sum(w.numel for w in weights(model) if w.role == "linear")
    report = quantize_model(model, AbsMax(4, 16))
    assert report["bytes_before"] == before
    assert set(report["quantized"].values()) == {5.0}
    assert report["kept"] == ["model.embed_tokens"]
    assert report["bytes_after"] == before - 4 * linears + linears * 5 // 8
    parts = stored_bytes(model)
    assert parts == {"packed": linears * 5 // 8, "plain": before - 4 * linears,
                     "total": report["bytes_after"]}


def test_only_the_experts_a_plan_names_are_packed():
    model = build("MixtralForCausalLM")
    before = {w.name: w.read().clone() for w in weights(model)}
    name = "model.layers.0.mlp.experts.1.down"
    report = quantize_model(model, AbsMax(4, 8), {name: 4})
    assert list(report["quantized"]) == [name]
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, Experts)
    for w in weights(model):
        same = torch.equal(w.read(), before[w.name])
        assert same == (w.name != name), w.name
    assert torch.isfinite(logits(model)).all()


def test_the_experts_left_plain_can_be_packed_later():
    model = build("MixtralForCausalLM")
    quantize_model(model, AbsMax(8, 8), {"experts.1.*": 8})
    report = quantize_model(model, AbsMax(4, 8), {"experts.0.*": 4})
    bits = {w.name: w.stored.bits for w in weights(model) if w.stored}
    assert len(report["quantized"]) == 4
    assert all(bits[f"model.layers.{i}.mlp.experts.{e}.down"] == (4, 8)[e] for i in (0, 1) for e in (0, 1))


# ------------------------------------------------------------------ plans


def test_later_lines_of_a_plan_win_and_sixteen_keeps():
    model = build()
    plan = {"*_proj": 8, "q_proj": 4, "layers.1.*": 2, "model.layers.1.mlp.up_proj": 16}
    bits = quantize_model(model, AbsMax(group=8), plan)["quantized"]
    assert bits["model.layers.0.self_attn.q_proj"] == 6
    assert bits["model.layers.0.self_attn.k_proj"] == 10
    assert bits["model.layers.1.self_attn.q_proj"] == 4
    assert "model.layers.1.mlp.up_proj" not in bits and "lm_head" not in bits
    assert isinstance(model.model.layers[1].mlp.up_proj, nn.Linear)


def test_a_plan_takes_quantizers_and_their_descriptions():
    model = build()
    plan = {"q_proj": Affine(3, 8), "k_proj": {"entry": "affine", "bits": 5, "group": 4}, "v_proj": 2}
    bits = quantize_model(model, AbsMax(8, 16), plan)["quantized"]
    one = {n.rpartition(".")[2]: b for n, b in bits.items()}
    assert one == {"q_proj": 3 + 32 / 8, "k_proj": 5 + 32 / 4, "v_proj": 2 + 16 / 16}


@pytest.mark.parametrize(("plan", "words"), [
    ({"model.layers.0.self_attn.q_prj": 4},
     "matches no weight; did you mean 'model.layers.0.self_attn.q_proj'"),
    ({"q_proj": 9}, r"q_proj: .*bits=9 is not allowed.* or 16 to leave it"),
    ({"q_proj": 1}, "bits=1 is not allowed"),
    ({"q_proj": "four"}, "'four' is neither bits nor a quantizer"),
    ({"q_proj": True}, "True is neither bits nor a quantizer"),
    ({"q_proj": 4.5}, "4.5 is neither bits nor a quantizer"),
    ({"q_proj": {"entry": "afine"}}, "no quantizer named 'afine'; did you mean 'affine'"),
    ({"q_proj": {"entry": "affine", "bit": 3}}, "no option 'bit'; did you mean 'bits'"),
    ({"model.embed_tokens": 4}, "'model.embed_tokens' matches no weight"),
])
def test_a_bad_plan_is_refused_and_nothing_is_changed(plan, words):
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        quantize_model(model, AbsMax(), plan)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


def test_a_tied_weight_is_left_alone_or_refused_by_name():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.Linear(4, 4), other)
    with pytest.raises(ConfigError, match="0 is tied with 2"):
        quantize_model(copy.deepcopy(model), AbsMax(), {"0": 4})
    assert list(quantize_model(model, AbsMax())["quantized"]) == ["1"]
    assert model[0] is layer and model[2] is other


@pytest.mark.parametrize("plan", [None, {"0": 4}, {"*": 4}])
def test_a_layer_that_is_registered_twice_is_packed_in_both_places(plan):
    """It was left as it was, and listed as kept, without a word."""
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    once = nn.Sequential(copy.deepcopy(layer))
    made = quantize_model(model, AbsMax(bits=4), plan)
    quantize_model(once, AbsMax(bits=4))
    assert list(made["quantized"]) == ["0"] and not made["kept"]
    assert model[0] is model[2] and isinstance(model[0], PackedLinear)
    assert torch.equal(model(x), once(once(x).tanh()))
    assert [n for n, _ in checkpoint(model)] == [
        "0.weight", "0.bias", "2.weight", "2.bias"]
    again = nn.Sequential(layer, nn.Tanh(), layer)
    quantize_model(again, AbsMax(bits=4))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.2.down"])
def test_a_weight_that_is_not_finite_is_named_and_the_model_is_unchanged(name, bad):
    model = build("MixtralForCausalLM")
    w = next(w for w in weights(model) if w.name == name)
    values = w.read().clone()
    values[1, 1] = bad
    w.write(values)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=f"weight {name} holds 1 values that are NaN or Inf"):
        quantize_model(model, AbsMax())
    now = model.state_dict()
    assert now.keys() == kept.keys()
    assert all(torch.equal(now[k].nan_to_num(), v.nan_to_num()) for k, v in kept.items())


def test_a_bare_linear_is_packed_or_refused_in_words():
    """The model itself is the layer: there is no parent to put a packed one into."""
    with pytest.raises(ConfigError):
        quantize_model(nn.Linear(4, 4), AbsMax())


@pytest.mark.parametrize("quantizer", [AbsMax, Affine])
def test_a_group_wider_than_a_row_is_the_row_and_takes_no_more_room(quantizer):
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    wide, row = quantizer(4, 10**12).quantize(w), quantizer(4, 0).quantize(w)
    assert torch.equal(wide.dequantize(), row.dequantize()) and wide.nbytes == row.nbytes
    assert torch.equal(wide.dequantize(slice(1, 3)), row.dequantize()[1:3])
    x = torch.randn(2, 7)
    assert torch.equal(wide.matmul(x), row.matmul(x))
