"""Quantization in the companded domain."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import ConfigError, DataError, FileError
from poise.quantizers import AbsMax, quantize_model
from poise.quantizers.packing import unpack
from poise.registry import build
from poise.testing import check_quantizer
from poise_compander.components import Companded
from poise_compander.functions import FUNCTIONS
from poise_compander.quantizer import levels

BITS = (2, 3, 4, 5, 6, 7, 8)
NAMES = ("arctan", "erf", "arsinh", "tanh")


def heavy(*shape, seed=0):
    """Return weights with a few large ones, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(*shape, generator=generator)
    return gaussian * (1 + 0.3 * torch.randn(*shape, generator=generator).square())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("function", NAMES)
def test_it_keeps_the_contract(function, bits):
    check_quantizer(Companded(bits=bits, group=8, function=function))
    check_quantizer(Companded(bits=bits, group=0, function=function))
    check_quantizer(Companded(bits=bits, group=-1, function=function))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("function", NAMES)
def test_levels_are_evenly_spaced_once_compressed(function, bits):
    assert torch.isfinite(levels(FUNCTIONS[function], 10.0, bits)).all()  # the end of the option's range
    k, psi = 1.7, FUNCTIONS[function]
    table = levels(psi, k, bits).double()
    assert table[0] == -1 and table[-1] == 1 and len(table) == 2**bits
    assert torch.equal(table, -table.flip(0))
    companded = psi.forward(k * table, 1.0, 1.0) / psi.forward(k, 1.0, 1.0)
    assert torch.allclose(companded, torch.linspace(-1, 1, 2**bits, dtype=torch.float64), atol=3e-7)
    if bits > 2:  # denser near zero
        gaps = table.diff()
        assert gaps.argmin() == len(gaps) // 2 and gaps[0] > 1.5 * gaps[len(gaps) // 2]


@pytest.mark.parametrize("function", NAMES)
def test_a_function_that_is_hardly_bent_gives_uniform_levels(function):
    table = levels(FUNCTIONS[function], 1e-3, 4)
    assert torch.allclose(table, torch.linspace(-1, 1, 16), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), name=st.sampled_from(NAMES), k=st.floats(0.1, 4),
       group=st.sampled_from([-1, 0, 1, 3, 16]), seed=st.integers(0, 999), power=st.integers(-6, 4))
def test_each_weight_goes_to_its_nearest_level(bits, name, k, group, seed, power):
    w = heavy(5, 21, seed=seed) * 10.0**power
    quantizer = Companded(bits=bits, group=group, function=name, sharpness=k, scale_dtype="float32")
    stored = quantizer.quantize(w)
    table = stored.levels
    codes = unpack(stored.codes, bits, 21).long()
    span = 21 if group <= 0 else group
    wide = stored.scale.float().expand(5, -1) if group == -1 else stored.scale.float()
    scale = wide.repeat_interleave(span, dim=1)[:, :21]
    distance = (w.unsqueeze(-1) - scale.unsqueeze(-1) * table).abs()
    chosen = distance.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    assert torch.all(chosen <= distance.amin(-1) + 1e-5 * scale)
    assert torch.allclose((stored.dequantize() - w).abs(), chosen, atol=1e-5 * float(scale.max()))


def test_true_bits_are_counted():
    stored = Companded(bits=4, group=64).quantize(heavy(32, 128))
    assert stored.bits_per_weight == pytest.approx(4 + 16 / 64)
    assert set(stored.tensors()) == {"codes", "scale"}  # the table follows from the options


@pytest.mark.parametrize("bits", (3, 4, 5, 8))
def test_on_weights_with_tails_it_errs_less_than_uniform_levels_at_equal_bytes(bits):
    """Each has one fp16 scale a group; the claim is about weights whose largest are rare."""
    w = heavy(64, 512)
    error = {type(q).__name__: float((q.quantize(w).dequantize() - w).norm() / w.norm())
             for q in (Companded(bits=bits, group=0, sharpness=2.0), AbsMax(bits=bits, group=0))}
    assert error["Companded"] < 0.8 * error["AbsMax"]


def test_a_group_of_zeros_stays_small_and_a_row_of_one_value_is_kept():
    w = torch.zeros(2, 8)
    w[1] = 0.37
    dense = Companded(bits=8, group=8).quantize(w).dequantize()
    assert dense[0].abs().max() < 0.01
    assert torch.allclose(dense[1], w[1], rtol=1e-3)


@pytest.mark.parametrize(("tensors", "error"), [
    ({"codes": torch.zeros(4, 3, dtype=torch.uint8), "scale": torch.ones(4, 1)}, FileError),
    ({"codes": torch.zeros(4, 4, dtype=torch.uint8)}, FileError),
    ({"codes": torch.zeros(4, 4, dtype=torch.uint8), "scale": torch.ones(4, 1)}, FileError),  # float32
    ({"codes": torch.zeros(4, 4), "scale": torch.ones(4, 1, dtype=torch.float16)}, FileError),
])
def test_tensors_of_another_size_are_refused(tensors, error):
    with pytest.raises(error):
        Companded(bits=4, group=0).from_tensors(tensors, (4, 8), torch.float32)


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"group": -2}, "group"), ({"sharpness": 0.0}, "sharp"),
    ({"scale_dtype": "bfloat16"}, "one of float16, float32"),
    ({"sharpness": float("nan")}, "sharpness"), ({"function": "arctanh"}, "did you mean 'arctan'"),
])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build("quantizer", "companded", **options)


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="1 values that are NaN"):
        Companded().quantize(torch.tensor([[1.0, float("nan")]]))


# ------------------------------------------------------------------ what is known before data


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(BITS), group=st.sampled_from([-1, 0, 1, 3, 16, 64]), rows=st.integers(1, 9),
       columns=st.integers(1, 70), scale_dtype=st.sampled_from(["float16", "float32"]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_layout_is_what_is_really_made(bits, group, rows, columns, scale_dtype, dtype):
    quantizer = Companded(bits=bits, group=group, scale_dtype=scale_dtype)
    stored = quantizer.quantize(heavy(rows, columns).to(dtype))
    made = stored.tensors()
    assert quantizer.layout((rows, columns), dtype) == {n: (tuple(t.shape), t.dtype)
                                                        for n, t in made.items()}
    assert stored.resident_bytes == stored.nbytes == sum(t.nbytes for t in made.values())
    again = quantizer.from_tensors(made, (rows, columns), dtype)
    assert torch.equal(again.dequantize(), stored.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_at_changes_the_bits_and_nothing_else(bits):
    start = Companded(bits=4, group=16, function="tanh", sharpness=2.0, scale_dtype="float32")
    assert start.at(bits) == Companded(bits, 16, "tanh", 2.0, "float32") and start.at(4) == start
    assert start.at(bits).quantize(heavy(4, 16)).bits == bits


@pytest.mark.parametrize("bits", [1, 9, 4.5, "4", True])
def test_at_other_numbers_of_bits_is_refused(bits):
    with pytest.raises(ConfigError, match=r"Companded\.bits="):
        Companded().at(bits)


@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e5, 3e38])
def test_scales_that_float16_does_not_hold_are_refused_with_the_option_that_does(size):
    weight = torch.ones(2, 8)
    weight[1] *= size
    with pytest.raises(DataError, match=r"^has scales .* not hold: give scale_dtype='float32'$"):
        Companded(group=8).quantize(weight)
    stored = Companded(group=8, scale_dtype="float32").quantize(weight)
    assert stored.scale.dtype == torch.float32
    assert torch.allclose(stored.dequantize(), weight, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(size=st.floats(1e-9, 1e6))
def test_a_scale_is_stored_within_a_512th_of_itself_or_refused(size):
    weight = torch.full((1, 4), size)
    try:
        stored = Companded(group=0).quantize(weight)
    except DataError:
        held = float(weight[0, 0].half())
        assert abs(held - float(weight[0, 0])) > float(weight[0, 0]) * 2**-9
    else:
        assert abs(float(stored.scale) - float(weight[0, 0])) <= float(weight[0, 0]) * 2**-9


def test_tensors_of_the_other_scale_dtype_are_refused_with_the_option_that_fits():
    for made, asked in (("float32", "float16"), ("float16", "float32")):
        tensors = Companded(scale_dtype=made).quantize(heavy(4, 8)).tensors()
        with pytest.raises(FileError, match=f"scale is {made}, not {asked}: give scale_dtype={made}"):
            Companded(scale_dtype=asked).from_tensors(tensors, (4, 8), torch.float32)


def mixture():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64)
    return transformers.MixtralForCausalLM(config).eval()


def test_the_walk_takes_it_to_the_experts_of_a_mixture():
    model, ids = mixture(), torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        report = quantize_model(model, Companded(bits=8, group=16), plan={"*.experts.*": 8})
        after = model(ids).logits
    experts = [n for n in report["quantized"] if ".experts." in n]
    assert len(experts) == len(report["quantized"]) >= 2 * 4 * 2
    assert 0 < float((after - before).abs().max()) < 0.05 * float(before.abs().max())
    assert report["bytes_after"] < 0.6 * report["bytes_before"]


def test_a_quantized_layer_saves_and_loads():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))

    model, x = made(), torch.randn(3, 32)
    quantize_model(model, Companded(bits=3, group=16))
    other = made()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    quantize_model(other, Companded(bits=3, group=16))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


def test_a_large_matrix_is_made_as_a_small_one():
    """Core makes rows of large plain matrices in C, which knows nothing of a companded domain."""
    weight = torch.randn(1024, 1025, generator=torch.Generator().manual_seed(0))
    quantizer = build("quantizer", "companded", bits=4)
    whole = quantizer.quantize(weight)
    parts = torch.cat([whole._some(slice(at, at + 64)) for at in range(0, 1024, 64)])
    assert torch.equal(whole.dequantize(), parts)
    assert (whole.dequantize() - weight).abs().max() < 1
