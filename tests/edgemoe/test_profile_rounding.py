"""Scales that are fitted to inputs: smaller weighted errors, the same form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import ConfigError, DataError
from poise.quantizers import AbsMax, Affine
from poise.quantizers.components import GgmlQ4
from poise_edgemoe.store.schemes import stored, written
from poise_edgemoe.widths.rounding import Weighted

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def error(made, weight, importance):
    return float((importance * (made.dequantize().double() - weight.double()).square()).sum())


@few
@given(st.integers(0, 999), st.sampled_from([AbsMax, Affine]), st.sampled_from([2, 3]),
       st.sampled_from([0, 5, 8]), st.sampled_from([8, 13]))
def test_the_weighted_error_is_no_larger_and_the_form_the_same(seed, kind, bits, group, columns):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, columns, generator=draw)
    weight[2] = 0
    importance = torch.rand(columns, generator=draw) ** 4
    plain = kind(bits=bits, group=group)
    made, nearest = Weighted(plain, importance).quantize(weight), plain.quantize(weight)
    # scales are stored in fp16, which may undo the last of a gain
    assert error(made, weight, importance) <= error(nearest, weight, importance) * 1.01 + 1e-9
    assert {k: (t.shape, t.dtype) for k, t in made.tensors().items()} == \
        {k: (t.shape, t.dtype) for k, t in nearest.tensors().items()}
    again = plain.from_tensors(made.tensors(), (6, columns), weight.dtype)
    assert torch.equal(again.dequantize(), made.dequantize()) and not made.dequantize()[2].any()


def test_at_two_bits_the_gain_is_large():
    draw = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(64, 64, generator=draw), torch.rand(64, generator=draw) ** 2
    for plain in (AbsMax(bits=2, group=32), Affine(bits=2, group=32)):
        made = Weighted(plain, importance).quantize(weight)
        assert error(made, weight, importance) < 0.75 * error(plain.quantize(weight), weight, importance)


def test_scales_that_fp16_does_not_hold_are_kept_in_fp32_and_the_plain_quantizer_is_written():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * 1e6
    used, made = stored(Weighted(Affine(bits=2, group=8), torch.ones(8)), weight)
    assert used == Affine(bits=2, group=8, scale_dtype="float32") and made.scale.dtype == torch.float32
    assert written(Weighted(Affine(bits=2), torch.ones(8))) == written(Affine(bits=2))
    with pytest.raises(DataError, match="NaN or Inf"):
        stored(Weighted(Affine(bits=2), torch.ones(8)), torch.full((4, 8), float("nan")))


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ConfigError, match="rounding=weighted chooses scales of"):
        Weighted(GgmlQ4(), torch.ones(32))
    for bad in (torch.ones(7), torch.full((8,), float("nan")), -torch.ones(8)):
        with pytest.raises(DataError, match="importance"):
            Weighted(Affine(bits=2), bad).quantize(torch.ones(4, 8))
