"""Bytes in a kernel's own order stand for the same values, and are multiplied as they lie."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import some
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import ConfigError
from poise.quantizers import AbsMax, Affine, ggml
from poise.quantizers.components import GgmlQ4, GgmlQ8
from poise.quantizers.orders import GGML_TAG, arranged, ordered, torch_tag, unreadable

SLICES = (slice(None), slice(3, 9), slice(63, 66), slice(10, 50, 7), slice(0, 0))


def weights(rows, columns=256, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(scheme=st.sampled_from((AbsMax, Affine)), group=st.sampled_from((32, 64, 128, 256)),
       kind=st.sampled_from(("float16", "float32")), sixteens=st.integers(1, 10), groups=st.integers(1, 3),
       dtype=st.sampled_from((torch.float32, torch.bfloat16)), seed=st.integers(0, 9))
def test_torch_s_order_is_inverted_exactly(scheme, group, kind, sixteens, groups, dtype, seed):
    weight = weights(16 * sixteens, group * groups, seed).to(dtype)
    plain = scheme(4, group=group, scale_dtype=kind).quantize(weight)
    made, tag = arranged(plain, "torch")
    assert tag == torch_tag() and not unreadable(tag) and made.nbytes == plain.nbytes
    assert all(torch.equal(made.tensors()[n], t) for n, t in plain.tensors().items() if n != "codes")
    assert all(torch.equal(made.dequantize(rows), plain.dequantize(rows)) for rows in SLICES)
    assert torch.equal(made.dequantize_into(torch.empty_like(weight)), plain.dequantize())
    x = weights(3, group * groups, seed + 1).to(dtype)
    assert torch.equal(made.prepared("torch").matmul(x), plain.prepared("torch").matmul(x))
    assert made.prepared("torch").prepared("reference").dequantize().equal(plain.dequantize())


def test_large_matrices_are_brought_into_plain_order_in_parts():
    for packed, layout in ((Affine(4).quantize(weights(1200, 2048)), "torch"),
                           (GgmlQ4().quantize(weights(1208, 2048)), "ggml")):
        made, want = arranged(packed, layout)[0], packed.dequantize()
        for rows in (slice(None), slice(500, 1100), slice(7, 1200, 3)):
            assert torch.equal(made.dequantize(rows), want[rows])


def test_a_matrix_in_torch_s_order_keeps_no_copy_of_its_codes():
    made, _ = arranged(Affine(4).quantize(weights(256, 256)), "torch")
    fast = made.prepared()
    fast.matmul(weights(1))
    assert fast._pack() is made.codes and fast.resident_bytes < 1.4 * made.nbytes
    with pytest.raises(ConfigError, match="codes in torch's order are multiplied by torch"):
        made.prepared("c")


@pytest.mark.parametrize("capability", some(["default", "avx2", "avx512"], keep=["default"]))
def test_the_order_of_other_processors(capability):
    """Their orders are inverted too; where one differs, it has another tag, and is not read as this one."""
    code = ("import torch; from poise.quantizers import Affine; from poise.quantizers.orders import *\n"
            "for n in (16, 48, 64, 80, 208):\n"
            " p = Affine(4).quantize(torch.randn(n, 128)); m, tag = arranged(p, 'torch')\n"
            " assert torch.equal(m.dequantize(), p.dequantize())\n"
            "print(tag, m.codes.equal(p.codes))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
    tag = done.stdout.split()[0]
    same = tag == torch_tag()
    assert same == (not unreadable(tag))
    if not same:
        told = f"lie in the order {tag}, and this machine's is {torch_tag()}: convert the model again"
        assert told in unreadable(tag)


@given(eights=st.integers(1, 13), columns=st.integers(1, 200), seed=st.integers(0, 9))
def test_interleaved_rows_are_the_same_values(eights, columns, seed):
    plain = GgmlQ4().quantize(weights(8 * eights, columns, seed))
    made, tag = arranged(plain, "ggml")
    assert tag == GGML_TAG and made.nbytes == plain.nbytes and not unreadable(tag)
    assert all(torch.equal(made.dequantize(rows), plain.dequantize(rows)) for rows in SLICES)
    again = ordered(GgmlQ4().from_tensors(made.tensors(), made.shape, made.dtype), tag)
    assert torch.equal(again.dequantize(), plain.dequantize())
    if ggml.kernel() is None or ggml.kernel().ggml.gemv is None:
        return
    x = weights(3, columns, seed + 1)
    y, fast = plain.prepared("ggml").matmul(x), made.prepared("ggml")
    size = x.norm(dim=-1, keepdim=True) * plain.dequantize().norm(dim=1)
    assert ((fast.matmul(x) - y).abs() <= 1e-5 * size).all()
    assert all(torch.equal(fast.matmul(x[i : i + 1]), fast.matmul(x)[i : i + 1]) for i in range(3))


def test_interleaved_rows_on_any_number_of_threads():
    if ggml.kernel() is None:
        pytest.skip(ggml.status())
    made, x = arranged(GgmlQ4().quantize(weights(1096, 1024)), "ggml")[0].prepared(), weights(4, 1024)
    whole, before = made.matmul(x), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(made.matmul(x), whole)
    finally:
        torch.set_num_threads(before)


def test_a_library_without_the_product_of_interleaved_rows(monkeypatch):
    if ggml.kernel() is None:
        pytest.skip(ggml.status())
    made, _ = arranged(GgmlQ4().quantize(weights(256)), "ggml")
    monkeypatch.setattr(ggml.library(), "gemv", None)
    with pytest.raises(ConfigError, match="lacks ggml_gemv_q4_0_8x8_q8_0"):
        made.prepared("ggml")
    assert type(made.prepared()) is type(made)


@pytest.mark.parametrize(("packed", "layout", "said"), [
    (lambda: GgmlQ4().quantize(weights(12)), "ggml", r"\(12, 256\): it interleaves blocks of q4_0, 8 rows"),
    (lambda: GgmlQ8().quantize(weights(16)), "ggml", "interleaves blocks of q4_0"),
    (lambda: Affine(4).quantize(weights(16)), "ggml", "interleaves blocks of q4_0"),
    (lambda: GgmlQ4().quantize(weights(16)), "torch", "holds no codes in groups"),
    (lambda: Affine(8).quantize(weights(16)), "torch", "matrices of 4 bits in groups of 32"),
    (lambda: Affine(4).quantize(weights(24)), "torch", "multiples of 16 rows"),
])
def test_matrices_that_an_order_does_not_take(packed, layout, said):
    with pytest.raises(ConfigError, match=f"layout={layout} does not take .*{said}.*layout=plain"):
        arranged(packed(), layout)
