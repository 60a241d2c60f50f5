"""Quantization with levels that are uniform in the companded domain.

A group with scale s = max|w| is compressed to u = psi(k w / s) / psi(k) in [-1, 1], where k is the
sharpness; 2^bits levels lie there at even distances, +-1 among them, and what they stand for is
s psi^-1(u psi(k)) / k: close together near zero, where most weights are, and wide apart at the ends.

Source: companding quantizers (Bennett, 1948), with the functions of arXiv 2306.16993.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.quantizers.matrix import PackedMatrix
from poise.quantizers.packing import grouped, pack, stored_scale
from poise_compander.functions import Function


@dataclass(frozen=True)
class CompandedMatrix(PackedMatrix):
    """A matrix whose codes are indices into a table of levels, times a scale per group.

    Parameters
    ----------
    levels : fp32, shape (2^bits,)
        Between -1 and 1, rising; follows from the quantizer's options, so it is not stored. All matrices of
        a quantizer share it, and `resident_bytes` leaves it out.
    """

    levels: Tensor

    def values(self, codes: Tensor) -> Tensor:
        return self.levels.to(codes.device)[codes.int()]


def levels(function: Function, sharpness: float, bits: int) -> Tensor:
    """Return the table of levels, fp32, shape (2^bits,): -1 to 1, symmetric."""
    unit = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    inner = function.inverse(unit * function.forward(sharpness, 1.0, 1.0), 1.0, 1.0) / sharpness
    inner[0], inner[-1] = -1.0, 1.0  # there psi may round to its bound, which has no inverse
    return inner.clamp(-1, 1).to(torch.float32)


def quantize(weight: Tensor, table: Tensor, bits: int, group: int, scale_dtype: str) -> CompandedMatrix:
    """Quantize a matrix (out, in), each weight to the level nearest to it.

    The error of a weight is at most half the distance between the levels around it, times the scale.

    Raises
    ------
    DataError
        For NaN, Inf or an empty matrix, and for scales that float16 does not hold, where it is to.
    """
    blocks = grouped(weight, group)
    largest = blocks.abs().amax(-1)
    (scale,) = stored_scale(scale_dtype, largest)  # 0 for a group of zeros: no level is 0, but 0 x level is
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).to(torch.float32)
    table = table.to(weight.device)
    borders = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / divisor.unsqueeze(-1), borders)
    codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    shape = (weight.shape[0], weight.shape[1])
    return CompandedMatrix(pack(codes, bits), scale, None, bits, group, shape, weight.dtype, table)


def rebuild(
    tensors: Mapping[str, Tensor], table: Tensor, bits: int, group: int, scale_dtype: str,
    shape: tuple[int, int], dtype: torch.dtype,
) -> CompandedMatrix:
    """Rebuild what `CompandedMatrix.tensors` returned.

    Raises
    ------
    FileError
        When names, sizes or dtypes are not those of `layout`.
    """
    plain = PackedMatrix.from_tensors(
        tensors, bits, group, shape, dtype, scale_dtype, with_minimum=False)
    return CompandedMatrix(plain.codes, plain.scale, None, bits, group, plain.shape, dtype, table)
