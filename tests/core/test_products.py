"""Products on packed bytes are those of the weights in full, to the error that a kernel states."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loads import absent
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from poise.errors import ConfigError
from poise.native import Loaded, built, processor_flags
from poise.quantizers import AbsMax, Affine, PackedMatrix, kernel, quantize_model
from poise.quantizers.matrix import InPlace, TorchPack, multiply_stacked
from poise.quantizers.sliced import multiply

SCHEMES, TYPES = (AbsMax, Affine), (torch.float32, torch.bfloat16, torch.float16)
C = 2e-5  # stated error, as a share of |row of W| |x|, with a code's offset as part of W
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # of the result


def the_kernel():
    it = kernel.kernel()
    if it is None:
        pytest.skip(kernel.status())
    return it


def on_c(packed):
    the_kernel()
    return packed.prepared("c")


def matrix(scheme, bits, group, rows=70, columns=512, seed=0, **more):
    return scheme(bits, group=group, **more).quantize(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def share(packed, x, y):
    """Return the largest error, as the docstring of `prepared` counts it."""
    dense = packed.prepared("reference").dequantize().double()
    exact = x.double() @ dense.T
    size = x.double().norm(dim=-1, keepdim=True) * (dense.norm(dim=1) + packed.scale.abs().max().double())
    slack = ROUNDED[y.dtype] * exact.abs()
    return float((((y.double() - exact).abs() - slack) / size.clamp(min=1e-30)).max())


@given(
    scheme=st.sampled_from(SCHEMES), bits=st.integers(2, 8), kind=st.sampled_from(("float16", "float32")),
    group=st.sampled_from((-1, 0, 16, 32, 64, 128, 256, 512)), dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 70), columns=st.integers(1, 1100), count=st.integers(1, 9), seed=st.integers(0, 9))
def test_products_are_those_of_the_weights_in_full(
    scheme, bits, kind, group, dtype, rows, columns, count, seed
):
    the_kernel()
    packed = matrix(scheme, bits, group, rows, columns, seed, scale_dtype=kind)
    if InPlace.refuses(packed):
        assert group < 64 or group == 0
        return
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 100)).to(dtype)
    y = on_c(packed).matmul(x)
    assert y.dtype == dtype and y.shape == (count, rows)
    assert share(packed, x, y) < C


# vectors of 32 bytes with products in them: of processors that have AVX-512, its instruction does the same
AVX_VNNI = {"avx_vnni": ["-march=alderlake"],
            "avx512_vnni": ["-march=haswell", "-mavx512vl", "-mavx512vnni", "-D__AVXVNNI__=1",
                            "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"]}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("units", ["AVX2", "AVX2, AVX-512 without products", "AVX-VNNI", "portable"])
def test_other_processors_of_the_family_make_the_same(bits, units, monkeypatch):
    if platform.machine() != "x86_64":
        pytest.skip("of x86-64")
    the_kernel()
    here = next((flags for name, flags in AVX_VNNI.items() if name in processor_flags()), None)
    if units == "AVX-VNNI" and here is None:
        pytest.skip("no processor with such products, nor one that can stand for it")
    flags = {"AVX2": ["-march=haswell"], "portable": ["-march=x86-64"], "AVX-VNNI": here}.get(
        units, ["-march=skylake-avx512"])
    other = kernel.Kernel(built(kernel.SOURCE, "quantizers", flags=flags))
    assert other.units == units.partition(",")[0]
    monkeypatch.setattr(kernel, "_LOADED", Loaded(lambda: other))
    for scheme, group, columns in ((Affine, 64, 1000), (AbsMax, 0, 333), (Affine, 32, 256)):
        packed, x = matrix(scheme, bits, group, columns=columns), torch.randn(5, columns)
        assert share(packed, x, on_c(packed).matmul(x)) < C


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_does_not_depend_on_rows_beside_it_nor_on_threads_nor_on_the_call(bits):
    packed, x = on_c(matrix(Affine, bits, 64, rows=1100, columns=1024)), torch.randn(11, 1024)
    whole, before = packed.matmul(x), torch.get_num_threads()
    assert all(torch.equal(packed.matmul(x[i : i + 1]), whole[i : i + 1]) for i in range(11))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(packed.matmul(x), whole)
    finally:
        torch.set_num_threads(before)
    other = on_c(matrix(AbsMax, 4, 32, columns=1024, seed=1))
    small = matrix(Affine, 4, 64, columns=64)
    found = multiply([(packed, x), (other, x), (small, x[:, :64]), (packed, x[:1]), (packed, x.double())])
    assert torch.equal(found[0], whole) and torch.equal(found[1], other.matmul(x))
    assert torch.equal(found[2], small.matmul(x[:, :64])) and torch.equal(found[3], whole[:1])
    assert torch.allclose(found[4], whole.double(), atol=1e-2) and multiply([]) == []


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_large_x_costs_the_others_nothing(bits):
    packed, x = on_c(matrix(Affine, bits, 64)), torch.randn(1, 512)
    weight = packed.dequantize()
    x[0, 200] = 1e6
    error = (packed.matmul(x) - x[0, 200] * weight[:, 200]).double()
    x[0, 192:208] = 0
    near = 1e6 * 2**-15 * weight[:, 192:208].abs().amax(1) * 20
    assert ((error - x.double() @ weight.double().T).abs() < near + 1).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, dtype):
    packed, x = on_c(matrix(Affine, 4, 64)), torch.randn(3, 512).to(dtype)
    good = packed.matmul(x)
    x[1, 77] = bad
    y = packed.matmul(x)
    assert y[1].isnan().all() and torch.equal(y[0], good[0]) and torch.equal(y[2], good[2])


def test_the_smallest_and_the_largest_numbers():
    packed = on_c(matrix(Affine, 4, 64))
    assert torch.equal(packed.matmul(torch.zeros(1, 512)), torch.zeros(1, 70))
    for size in (1e-28, 1e-12, 1e12, 1e30):
        x = torch.randn(1, 512, generator=torch.Generator().manual_seed(3)) * size
        assert share(packed, x, packed.matmul(x)) < C
    assert packed.matmul(torch.full((1, 512), 1e-40)).abs().max() < 1e-35


def test_kernels_by_name_and_what_they_refuse():
    packed, odd = matrix(Affine, 4, 64), matrix(Affine, 4, 24)
    the_kernel()
    assert type(packed.prepared()) is PackedMatrix  # small: as before
    large = matrix(Affine, 4, 64, rows=256)
    assert type(large.prepared()) is InPlace
    assert type(large.prepared().prepared("reference")) is PackedMatrix
    assert large.prepared().codes is large.codes and large.prepared().resident_bytes == large.nbytes
    assert type(matrix(Affine, 4, 24, rows=256).prepared()) is PackedMatrix
    for name, of, said in (("c", odd, "groups of 24"), ("torch", packed, "multiples of 16 rows"),
                           ("torch", odd, "32, 64, 128 or 256"), ("cuda", packed, "must be one of"),
                           ("ggml", packed, "codes in groups are multiplied by c or torch"),
                           ("c", on_meta(packed), "another device")):
        with pytest.raises(ConfigError, match=said):
            of.prepared(name)


def on_meta(packed):
    tensors = (t.to("meta") for t in packed.tensors().values())
    return PackedMatrix(*tensors, packed.bits, packed.group, packed.shape, packed.dtype)


def test_without_a_compiler_the_reference_is_taken_and_the_reason_said(monkeypatch):
    monkeypatch.setattr(kernel, "_LOADED", absent("no compiler"))
    large = matrix(Affine, 4, 64, rows=256)
    assert type(large.prepared()) is PackedMatrix
    with pytest.raises(ConfigError, match="no compiler"):
        large.prepared("c")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchs_product_of_four_bits_is_as_near_as_bfloat16(scheme):
    packed = matrix(scheme, 4, 64, rows=64).prepared("torch")
    assert type(packed) is TorchPack and packed.resident_bytes > 1.9 * packed.nbytes
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 3, 512).to(dtype)
        y = packed.matmul(x)
        assert y.shape == (2, 3, 64) and y.dtype == dtype and share(packed, x, y) < 1e-2
    many = torch.randn(40, 512)
    assert torch.equal(packed.matmul(many), packed.prepared("reference").matmul(many))


def test_packed_layers_use_it_where_nothing_is_differentiated():
    the_kernel()
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 512))
    quantize_model(model, Affine(4))
    x = torch.randn(2, 512)
    exact = model(x).detach()
    keys = list(model.state_dict())
    with torch.no_grad():
        fast = model(x)
        assert type(model[0].packed.prepared()) is InPlace
        assert model[0].packed.prepared() is model[0].packed.prepared()
        assert not torch.equal(fast, exact) and (fast - exact).abs().max() < 1e-4 * exact.abs().max()
        for layer in (model[0], model[2]):
            layer.packed.kernel = "reference"
        assert torch.equal(model(x), exact)
        model[0].packed.kernel = "auto"
        first = model[0](x)
        model[0].packed.put(torch.zeros(256, 512))  # another weight: nothing of the old one is left
        assert torch.equal(model[0](x), model[0].bias.expand(2, -1)) and first.abs().max() > 0
    assert list(model.state_dict()) == keys


def test_a_copy_does_not_look_into_the_first_ones_memory():
    the_kernel()
    layer = nn.Sequential(nn.Linear(512, 256))
    quantize_model(layer, Affine(4))
    x = torch.randn(1, 512)
    with torch.no_grad():
        y = layer(x)
        twin = copy.deepcopy(layer)
        layer[0].packed.codes.zero_()
        assert torch.equal(twin(x), y) and not torch.equal(layer(x), y)
        torch.save(twin.state_dict(), "/dev/null")


def test_columns_of_x_that_do_not_lie_side_by_side_are_taken_in_another_way():
    packed, x = on_c(matrix(Affine, 4, 64)), torch.randn(512, 3)
    assert torch.allclose(packed.matmul(x.T), packed.matmul(x.T.contiguous()), atol=1e-2)
    assert packed.matmul(torch.randn(0, 512)).shape == (0, 70)
    assert packed.matmul(torch.randn(512)).shape == (70,)
    assert packed.matmul(torch.randn(200, 512)).shape == (200, 70)


def warm_layer():
    """Return a packed layer that has multiplied on the kernel."""
    the_kernel()
    layer = nn.Sequential(nn.Linear(512, 256))
    quantize_model(layer, Affine(4))
    with torch.no_grad():
        layer(torch.randn(1, 512))
    assert type(layer[0].packed.prepared()) is InPlace
    return layer


@torch.no_grad()
def test_what_torch_records_or_transforms_is_done_by_torch():
    layer, a, b = warm_layer(), torch.randn(2, 512), torch.randn(2, 512)
    want = layer(b)
    assert torch.allclose(make_fx(layer)(a)(b), want, atol=1e-3)
    for backend in ("eager", "aot_eager"):
        assert torch.allclose(torch.compile(layer, backend=backend)(b), want, atol=1e-3)
    with FlopCounterMode(display=False) as counted:
        layer(a)
    assert counted.get_total_flops() == 2 * 2 * 256 * 512
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(a, torch.ones_like(a)))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.vmap(layer)(torch.randn(3, 512))
    with pytest.raises(RuntimeError):  # a trace of it was not to be had before there was a kernel either
        torch.jit.trace(layer, (a,), check_trace=False)
    assert torch.equal(layer(b), want) and type(layer[0].packed.prepared()) is InPlace


@pytest.mark.parametrize("dtype", TYPES)
def test_scales_that_are_no_numbers_give_none_whatever_their_bits(dtype):
    packed = Affine(4).quantize(torch.randn(1100, 1024).to(dtype))
    packed.scale.view(torch.int16)[0, 0] = 0x7FFF  # of these bits rounding once made a zero
    dense = packed.dequantize()
    assert dense[0, :64].isnan().all() and dense[0, 64:].isfinite().all() and dense[1:].isfinite().all()
    y = on_c(packed).matmul(torch.randn(1, 1024).to(dtype))
    assert y[0, 0].isnan() and y[0, 1:].isfinite().all()


def test_nothing_is_read_or_written_beyond_its_end():
    w = on_c(matrix(Affine, 4, 64))
    out = torch.zeros(2, 70)
    for narrow in (torch.randn(1, 64), torch.randn(2, 256), torch.randn(1, 1024)):
        with pytest.raises(RuntimeError):
            multiply([(w, narrow)])
        assert not multiply_stacked([w, w], narrow, out, [0, 1])
    x = torch.randn(2, 512)
    with pytest.raises(RuntimeError):
        multiply([(w, x), (on_c(matrix(Affine, 4, 64, columns=256)), x)])
    assert not multiply_stacked([w, on_c(matrix(Affine, 4, 64, rows=71))], x, out, [0, 1])
    for wrong in ((out[:, :69].contiguous(), [0, 1]), (out, [0, 2]), (out, [-1, 0])):
        with pytest.raises(ValueError, match="do not fit"):
            multiply_stacked([w, w], x, *wrong)
    assert multiply_stacked([w, w], x, out, [1, 0]) and torch.equal(out[[1, 0]], w.matmul(x))
