"""ggml's blocks: the bytes of GGUF files, read without ggml, and multiplied by its own functions."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loads import asked_again
from torch import nn

import poise
from poise.errors import ConfigError, DataError, FileError, MissingExtra
from poise.quantizers import Affine, ggml, quantize_model
from poise.quantizers.blocks import BlockMatrix, OnGgml
from poise.quantizers.formats import FORMATS
from poise.quantizers.sliced import multiply

NAMES, PLAIN = tuple(FORMATS), ("q8_0", "q4_0")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of the largest result


def scheme(name):
    return poise.build("quantizer", name)


def the_library():
    if ggml.library() is None:
        pytest.skip(ggml.status())
    return ggml.library()


def the_kernel():
    if ggml.kernel() is None:
        pytest.skip(ggml.status())
    return ggml.kernel()


def weights(rows=24, columns=512, seed=0):
    """Return a matrix whose rows are of very different sizes, one of them zeros."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    sizes = 10.0 ** torch.arange(rows).remainder(7).sub(3)
    sizes[rows // 2] = 0
    return drawn * sizes[:, None]


def matrix(name, rows=24, columns=512, seed=0):
    """Return any bytes that are a matrix: every code and scale occurs, also such as ggml never chooses."""
    form = FORMATS[name]
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows * -(-columns // form.columns), form.nbytes), dtype=torch.uint8,
                           generator=random)
    for at in form.halves:
        d = torch.rand(len(blocks), 1, generator=random).mul(0.1).sub(0.05).half()
        blocks[:, at : at + 2] = d.view(torch.uint8)
    return BlockMatrix(blocks.view(rows, -1), name, (rows, columns), torch.float32)


# ------------------------------------------------------------------ the formats


@pytest.mark.parametrize("name", NAMES)
def test_bytes_mean_what_the_gguf_package_says(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    packed = matrix(name, 40, 1024)
    want = gguf.quants.dequantize(packed.blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(packed.dequantize(), torch.from_numpy(want))
    assert (form := FORMATS[name]).number == gguf.GGMLQuantizationType[name.upper()].value
    assert gguf.GGML_QUANT_SIZES[form.number] == (form.columns, form.nbytes)


@pytest.mark.parametrize("name", PLAIN)
def test_blocks_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    weight = weights()[:12]  # of zeros it has another sign than ggml
    want = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(scheme(name).quantize(weight).blocks, torch.from_numpy(want))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_of_ggml(name):
    it, weight = the_library(), weights(64)
    weight[3, :64] = torch.arange(64) / 2 - 16  # halves, which are rounded away from zero
    packed = scheme(name).quantize(weight)
    assert torch.equal(packed.blocks, it.quantize(FORMATS[name], weight))
    bits = {"q8_0": 8.5, "q4_0": 4.5, "q4_k": 4.5, "q3_k": 3.4375, "q2_k": 2.625}
    assert packed.bits_per_weight == bits[name]
    whole = scheme(name).quantize(torch.cat([weight, torch.zeros(64, 256)], 1))
    cut = scheme(name).quantize(torch.cat([weight, torch.zeros(64, 7)], 1))
    assert torch.equal(cut.dequantize(), whole.dequantize()[:, :519])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TYPES)
def test_large_matrices_are_made_full_by_ggml_bit_for_bit_as_by_torch(name, dtype, monkeypatch):
    it = the_kernel()
    packed = dataclasses.replace(matrix(name, 1300, 1000), dtype=dtype)
    assert name in it.ggml.widen
    found, before = [], torch.get_num_threads()
    slices = (slice(None), slice(9, 1200), slice(3, 1300, 2))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found += [(rows, packed.dequantize(rows)) for rows in slices]
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(ggml, "kernel", lambda: None)
    want = packed.dequantize()
    assert all(torch.equal(got, want[rows]) for rows, got in found)


@pytest.mark.parametrize(("name", "error"), [
    ("q8_0", 6e-3), ("q4_0", 0.1), ("q4_k", 0.09), ("q3_k", 0.2), ("q2_k", 0.4)])
def test_what_comes_back_is_near(name, error):
    if name not in PLAIN:
        the_library()
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    back = scheme(name).quantize(weight).dequantize()
    assert back.dtype == torch.bfloat16 and (back - weight).float().norm() < error * weight.float().norm()


def test_numbers_that_float16_has_no_scale_for():
    for name in PLAIN:
        with pytest.raises(DataError, match=f"too large for {name}, whose scales are float16"):
            scheme(name).quantize(torch.full((2, 32), 1e8))
        assert not scheme(name).quantize(torch.full((2, 32), 1e-12)).dequantize().any()


def test_bits_are_the_scheme_s_own():
    assert scheme("q8_0").at(8) == scheme("q8_0") and scheme("q3_k").bits == 3
    with pytest.raises(ConfigError, match="bits=8 is not allowed: q4_0 has 4 bits"):
        scheme("q4_0").at(8)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    with pytest.raises(ConfigError, match="q8_0 has 8 bits"):
        quantize_model(model, scheme("q8_0"), {"0": 4})
    made = quantize_model(model, scheme("q8_0"), {"0": 8, "1": {"entry": "q4_0"}})
    assert made["quantized"] == {"0": 8.5, "1": 4.5}


def test_tensors_that_are_no_blocks():
    q = scheme("q4_0")
    for bad in ({}, {"blocks": torch.zeros(3, 18)}, {"blocks": torch.zeros(3, 17, dtype=torch.uint8)}):
        with pytest.raises(FileError, match=r"a matrix \(3, 32\) in q4_0 is"):
            q.from_tensors(bad, (3, 32), torch.float32)


def test_without_the_library_all_but_k_formats_are_made_and_all_are_read(monkeypatch):
    for name in ("_LIBRARY", "_KERNEL"):
        monkeypatch.setattr(ggml, name, asked_again(getattr(ggml, name)))
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)
    assert ggml.status() == "no ggml kernel: libggml-python is not installed: pip install 'poise[ggml]'"
    for name in NAMES:
        packed = matrix(name, 256, 512)
        assert packed.prepared() is packed and packed.dequantize().isfinite().all()
        with pytest.raises(ConfigError, match="kernel=ggml does not take this matrix: no ggml kernel: lib"):
            packed.prepared("ggml")
    assert scheme("q4_0").quantize(torch.ones(2, 32)).dequantize().eq(1).all()
    with pytest.raises(MissingExtra, match=r"q4_k is made by ggml, which is not to be had: .*\[ggml\]"):
        scheme("q4_k").quantize(torch.ones(2, 256))


def other(patch, name, **fields):
    """Have the library held against another format of the same name."""
    changed = dataclasses.replace(FORMATS[name], **fields)
    patch.setattr(ggml, "FORMATS", {**FORMATS, name: changed})


@pytest.mark.parametrize(("fault", "said"), [
    (lambda m: m.setattr(ggml, "processor_flags", frozenset), "built for processors with avx"),
    (lambda m: m.setitem(ggml.ROUNDED, ggml.Q8_0, (32, 36)), "is .* not q8_0 of"),
    (lambda m: m.setattr(ggml, "_address", lambda library, name: 1), "another form"),
    (lambda m: other(m, "q4_0", blocks=lambda v: 0 * FORMATS["q4_0"].blocks(v)), "other blocks of q4_0"),
    (lambda m: other(m, "q3_k", values=lambda b: -FORMATS["q3_k"].values(b)), "other products of q3_k"),
    (lambda m: m.setattr(ggml, "_library_file", lambda folder, name: folder / "none.so"), "none.so"),
])
def test_a_library_that_is_another_is_not_used_and_why_is_said(fault, said, monkeypatch):
    the_library()
    for name in ("_LIBRARY", "_KERNEL"):
        monkeypatch.setattr(ggml, name, asked_again(getattr(ggml, name)))
    fault(monkeypatch)
    assert ggml.kernel() is None
    with pytest.raises(ConfigError, match=said):
        matrix("q4_0", 256).prepared("ggml")
    with pytest.raises(MissingExtra, match=f"{said}.*tested: {ggml.TESTED}"):
        scheme("q2_k").quantize(torch.ones(2, 256))


def test_another_version_is_said(monkeypatch):
    it = the_kernel()
    assert ggml.status().startswith(f"ggml {it.ggml.version}")
    monkeypatch.setattr(ggml, "TESTED", "0.0.1")
    assert "(tested: 0.0.1)" in ggml.status()


# ------------------------------------------------------------------ products


def rounded(x, columns):
    """Return x as ggml rounds it: 8 bits, a scale for each block of columns; ties may go either way."""
    padded = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % columns))
    values = padded.view(len(x), -1, columns)
    d = values.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(d == 0, 0, values / d).round()
    held = d.float().half().double() if columns == 32 else d
    return (codes * held).view(len(x), -1)[:, : x.shape[1]]


@given(name=st.sampled_from(NAMES), dtype=st.sampled_from(TYPES), rows=st.integers(1, 70),
       columns=st.integers(1, 1100), count=st.integers(1, 9), seed=st.integers(0, 9))
def test_products_are_those_of_the_weights_and_of_x_in_8_bits(name, dtype, rows, columns, count, seed):
    the_kernel()
    packed = matrix(name, rows, columns, seed)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 100)).to(dtype)
    y, dense = packed.prepared("ggml").matmul(x), packed.dequantize().double()
    assert y.dtype == dtype and y.shape == (count, rows)
    size = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=1)
    bound = 2.3e-2 if FORMATS[name].columns == 32 else 6.4e-2
    assert ((y.double() - x.double() @ dense.T).abs() <= bound * size + 2**-8 * y.double().abs()).all()
    if name in PLAIN:  # to the last bits: nothing but x is rounded
        power = torch.exp2(torch.frexp(x.float().abs().amax(-1, keepdim=True)).exponent - 1.0)
        want = (rounded(x.float() / power, 32) * power) @ dense.T
        assert ((y.double() - want).abs() <= 1e-3 * size + ROUNDED[dtype] * want.abs()).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_rows_beside_it_nor_on_threads_nor_on_the_call(name):
    the_kernel()
    packed, x = matrix(name, 1100, 1024).prepared("ggml"), torch.randn(11, 1024)
    whole, before = packed.matmul(x), torch.get_num_threads()
    assert type(packed) is OnGgml and torch.equal(packed.matmul(x), whole)
    assert all(torch.equal(packed.matmul(x[i : i + 1]), whole[i : i + 1]) for i in range(11))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(packed.matmul(x), whole)
    finally:
        torch.set_num_threads(before)
    other, small = matrix("q4_0", 64, 1024, 1).prepared("ggml"), matrix(name, 9, 100).prepared("ggml")
    grouped = Affine(4).quantize(torch.randn(256, 1024)).prepared("auto")
    pairs = [(packed, x), (grouped, x), (other, x), (small, x[:, :100].contiguous()), (packed, x.double())]
    found = multiply(pairs)
    assert all(torch.equal(y, w.matmul(x)) for y, (w, x) in zip(found, pairs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [-120, -30, 30, 100])
def test_the_size_of_x_changes_nothing(name, power):
    the_kernel()
    packed = matrix(name).prepared("ggml")
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed.matmul(x * 2.0**power), packed.matmul(x) * 2.0**power)
    assert not packed.matmul(x * 0).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(name, bad):
    the_kernel()
    packed, x = matrix(name).prepared("ggml"), torch.randn(3, 512)
    good = packed.matmul(x)
    x[1, 77] = bad
    for dtype in TYPES:
        y = packed.matmul(x.to(dtype))
        assert y[1].isnan().all() and y[::2].isfinite().all()
    assert torch.equal(packed.matmul(x)[::2], good[::2])


def test_kernels_by_name_and_copies():
    the_kernel()
    large, small = matrix("q4_k", 256, 512), matrix("q4_k")
    assert type(small.prepared()) is BlockMatrix and type(large.prepared()) is OnGgml
    assert type(large.prepared().prepared("reference")) is BlockMatrix
    x = torch.randn(2, 512)
    assert torch.equal(copy.deepcopy(large.prepared()).matmul(x), large.prepared().matmul(x))
    for name in ("c", "torch"):
        with pytest.raises(ConfigError, match="ggml's blocks are multiplied by ggml"):
            large.prepared(name)
    with pytest.raises(ConfigError, match="another device, or not contiguous"):
        BlockMatrix(large.blocks.T.contiguous().T, "q4_k", large.shape, large.dtype).prepared("ggml")
    many = torch.randn(100, 512)  # of many rows a dense product is faster
    assert torch.equal(large.prepared().matmul(many), large.matmul(many))


def test_a_packed_layer_is_multiplied_by_it_and_differentiated():
    the_kernel()
    model = nn.Sequential(nn.Linear(512, 256))
    quantize_model(model, scheme("q8_0"))
    x = torch.randn(3, 512, requires_grad=True)
    y = model(x)
    y.sum().backward()
    with torch.no_grad():
        fast = model(x)
    stored = model[0].packed.get()
    assert torch.allclose(x.grad, stored.dequantize().sum(0).expand(3, -1), atol=1e-4)
    assert torch.equal(fast, stored.prepared("ggml").matmul(x) + model[0].bias)
    assert 0 < (fast - y).abs().max() < 2.3e-2 * y.abs().max()
