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

from poise.errors import DataError, FileError
from poise.quantizers.packing import PackedMatrix, grouped, pack, packed_width
from poise_compander.functions import Function

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
_EXACT = 2.0**-9  # share of itself by which a stored scale may be off: the largest of 256 codes still fits


@dataclass(frozen=True)
class CompandedMatrix(PackedMatrix):
    """A matrix whose codes are indices into a table of levels, times a scale per group.

    Parameters
    ----------
    levels : fp32, shape (2^bits,)
        Between -1 and 1, rising; follows from the quantizer's options, so it is not stored.
    """

    levels: Tensor

    @property
    def resident_bytes(self) -> int:
        """Bytes that it keeps in memory: those of its tensors. All matrices of a quantizer share one table
        of levels (2^bits numbers), which is not counted."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def values(self, codes: Tensor) -> Tensor:
        return self.levels.to(codes.device)[codes.int()]


def levels(function: Function, sharpness: float, bits: int) -> Tensor:
    """Return the table of levels, fp32, shape (2^bits,): -1 to 1, symmetric."""
    unit = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    inner = function.inverse(unit * function.forward(sharpness, 1.0, 1.0), 1.0, 1.0) / sharpness
    inner[0], inner[-1] = -1.0, 1.0  # there psi may round to its bound, which has no inverse
    return inner.clamp(-1, 1).to(torch.float32)


def layout(bits: int, group: int, scale_dtype: str, shape: tuple[int, int]) -> Layout:
    """Return name, shape and dtype of each tensor that a matrix of this shape is stored in."""
    rows, columns = shape
    groups = (1, 1) if group == -1 else (rows, -(-columns // group) if group else 1)
    return {"codes": ((rows, packed_width(columns, bits)), torch.uint8),
            "scale": (groups, getattr(torch, scale_dtype))}


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
    scale = _stored_scale(scale_dtype, torch.where(largest > 0, largest, torch.ones_like(largest)))
    table = table.to(weight.device)
    borders = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scale.to(torch.float32).unsqueeze(-1), borders)
    codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    shape = (weight.shape[0], weight.shape[1])
    return CompandedMatrix(pack(codes, bits), scale, None, bits, group, shape, weight.dtype, table)


def _stored_scale(scale_dtype: str, scale: Tensor) -> Tensor:  # core's stored_scale will do this
    """Return the scale as it is stored; raises `DataError` where float16 would distort it."""
    stored = scale.to(getattr(torch, scale_dtype))
    distorted = (stored.to(torch.float32) - scale).abs() > scale.abs() * _EXACT
    if bool(distorted.any()):
        worst = float(scale[distorted].max())
        raise DataError(f"{int(distorted.sum())} scales (the largest is {worst:.3g}) are too large or too "
                        f"small for {scale_dtype}: give scale_dtype=float32")
    return stored


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
    plain = PackedMatrix.from_tensors(tensors, bits, group, shape, dtype, with_minimum=False)
    for name, (_, wanted) in layout(bits, group, scale_dtype, plain.shape).items():
        if tensors[name].dtype != wanted:
            said = [str(d).removeprefix("torch.") for d in (tensors[name].dtype, wanted)]
            mend = f": give scale_dtype={said[0]}" if said[0] in ("float16", "float32") else ""
            raise FileError(f"packed {name} is {said[0]}, not {said[1]}{mend}")
    return CompandedMatrix(plain.codes, plain.scale, None, bits, group, plain.shape, dtype, table)
