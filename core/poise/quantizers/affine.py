"""Asymmetric quantization between the smallest and the largest value of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.quantizers.matrix import PackedMatrix
from poise.quantizers.packing import grouped, pack, stored_scale


def quantize(weight: Tensor, bits: int, group: int, scale_dtype: str) -> PackedMatrix:
    """Quantize a matrix (out, in) with 2^bits levels per group.

    The error of a weight is at most half its group's scale plus the rounding of the stored
    minimum and scale.
    """
    blocks = grouped(weight, group)
    levels = 2**bits - 1
    low, high = blocks.amin(-1), blocks.amax(-1)
    spread = (high - low) / levels
    # a constant group has no spread: any scale does, and its own size is as well held as itself
    flat = torch.where(low != 0, low.abs(), torch.ones_like(low))
    scale, minimum = stored_scale(
        scale_dtype, torch.where(spread > 0, spread, flat), low)
    shifted = blocks - minimum.to(torch.float32).unsqueeze(-1)
    codes = torch.round(shifted / scale.to(torch.float32).unsqueeze(-1)).clamp_(0, levels)
    codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    shape = (weight.shape[0], weight.shape[1])
    return PackedMatrix(pack(codes, bits), scale, minimum, bits, group, shape, weight.dtype)
