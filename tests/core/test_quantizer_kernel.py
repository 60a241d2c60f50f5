"""The C kernel makes the rows that torch makes, bit for bit; without a compiler torch makes them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loads import absent, asked_again
from torch._subclasses.fake_tensor import FakeTensorMode

from poise.quantizers import AbsMax, Affine, PackedMatrix, kernel, quantize_model

SCHEMES, TYPES = (AbsMax, Affine), (torch.float32, torch.bfloat16, torch.float16)


def the_kernel():
    it = kernel.kernel()
    if it is None:
        pytest.skip(kernel.status())
    return it


def made(packed, rows):
    """Return rows as the library writes them."""
    out = torch.full((rows.stop - rows.start, packed.shape[1]), 7.0, dtype=packed.dtype)
    the_kernel().rows(packed, rows, out)
    return out


GROUPS = (-1, 0, 1, 7, 8, 64, 100)


@given(
    scheme=st.sampled_from(SCHEMES), bits=st.integers(2, 8), group=st.sampled_from(GROUPS),
    kind=st.sampled_from(("float16", "float32")), dtype=st.sampled_from(TYPES), rows=st.integers(1, 40),
    columns=st.integers(1, 300), seed=st.integers(0, 9),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rows_are_those_of_torch(scheme, bits, group, kind, dtype, rows, columns, seed, part):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed = scheme(bits, group=group, scale_dtype=kind).quantize(weight)
    want = packed._some(slice(0, rows)).to(dtype)
    assert torch.equal(made(packed, slice(0, rows)), want)
    first, last = sorted(int(p * rows) for p in part)
    if first < last:
        assert torch.equal(made(packed, slice(first, last)), want[first:last])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_large_matrix_goes_through_it_on_any_number_of_threads(bits, threads, monkeypatch):
    packed = Affine(bits).quantize(torch.randn(1500, 1024, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 1024)
    before, calls, real = torch.get_num_threads(), [], kernel.Kernel.rows
    monkeypatch.setattr(kernel.Kernel, "rows", lambda *given: (calls.append(given[2]), real(*given)))
    the_kernel()
    torch.set_num_threads(threads)
    try:
        dense, product = packed.dequantize(), packed.matmul(x)
        some = packed.dequantize(slice(100, 700))
    finally:
        torch.set_num_threads(before)
    assert calls[0] == slice(0, 1500) and len(calls) > 2
    monkeypatch.setattr(kernel, "_LOADED", absent("a test"))
    assert torch.equal(dense, packed.dequantize()) and torch.equal(some, dense[100:700])
    assert torch.equal(product, packed.matmul(x))


def test_without_a_compiler_torch_makes_them(monkeypatch, tmp_path):
    packed = Affine(4).quantize(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    want = packed.dequantize()
    monkeypatch.setattr(kernel, "_LOADED", asked_again(kernel._LOADED))
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert torch.equal(packed.dequantize(), want)
    assert kernel.status() == "torch, no C kernel: compiler no-such-compiler is not there"


def large():
    return Affine(4).quantize(torch.randn(1024, 1025, generator=torch.Generator().manual_seed(0)))


def test_what_lies_elsewhere_or_is_of_another_type_is_left_to_torch():
    packed = Affine(4).quantize(torch.randn(1024, 1024).double())
    assert packed.dequantize().dtype == torch.float64
    assert not kernel.takes(packed, torch.empty(0).double())
    packed = large()
    assert kernel.takes(packed, torch.empty(1)) and not kernel.takes(packed, torch.empty(1).half())
    assert not kernel.takes(packed, torch.empty(4, 4).T[1:])


@pytest.mark.parametrize(
    "rows", [slice(5, 5), slice(-3, None), slice(0, 100, 3), slice(1023, 2000)], ids=str)
def test_any_slice_of_a_large_matrix(rows):
    packed = large()
    assert torch.equal(packed.dequantize(rows), packed.dequantize()[rows])
    place = torch.full((1024, 1025), 7.0)
    assert packed.dequantize_into(place) is place and torch.equal(place, packed._some(slice(0, 1024)))


def test_a_subclass_whose_codes_mean_something_else_is_left_to_torch():
    """What a code stands for is `values`, which a quantizer may change; C knows the plain ones."""

    class Squared(PackedMatrix):
        def values(self, codes):
            return super().values(codes).square_()

    plain = large()
    odd = Squared(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
    assert torch.equal(odd.dequantize(), odd._some(slice(0, 1024)))
    assert torch.equal(odd.dequantize_into(torch.empty(1024, 1025)), odd._some(slice(0, 1024)))


def test_a_large_packed_layer_is_traced_and_exported():
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024))
    quantize_model(model, Affine(4))
    x = torch.randn(2, 1024)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.randn(2, 1024)).shape == (2, 1024)
