"""Symmetric quantization by the largest magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.quantizers.matrix import PackedMatrix
from poise.quantizers.packing import grouped, pack, stored_scale


def quantize(weight: Tensor, bits: int, group: int, scale_dtype: str) -> PackedMatrix:
    """Quantize a matrix (out, in); the error of a weight is at most half its group's scale.

    Codes are computed with the scale as it is stored, so nothing is lost between quantizing and
    dequantizing.
    """
    blocks = grouped(weight, group)
    limit = 2 ** (bits - 1) - 1
    largest = blocks.abs().amax(-1)
    (scale,) = stored_scale(
        scale_dtype, torch.where(largest > 0, largest / limit, torch.ones_like(largest)))
    codes = torch.round(blocks / scale.to(torch.float32).unsqueeze(-1)).clamp_(-limit, limit)
    codes = (codes + 2 ** (bits - 1)).reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    shape = (weight.shape[0], weight.shape[1])
    return PackedMatrix(pack(codes, bits), scale, None, bits, group, shape, weight.dtype)
