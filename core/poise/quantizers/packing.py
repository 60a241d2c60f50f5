"""Codes of 2 to 8 bits in bytes; groups of columns and their scales."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import DataError


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes (rows, columns) < 2^bits into bytes (rows, packed_width), little endian.

    Eight codes of b bits fill b bytes; a row is padded to whole bytes.
    """
    rows, columns = codes.shape
    if bits == 8:
        return codes.to(torch.uint8)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -columns % 8))
    shifts = bits * torch.arange(8)
    words = (padded.view(rows, -1, 8) << shifts).sum(-1)
    octets = (words.unsqueeze(-1) >> (8 * torch.arange(bits))) & 255
    return octets.to(torch.uint8).reshape(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack(octets: Tensor, bits: int, columns: int) -> Tensor:
    """Return the uint8 codes (rows, columns) that `pack` packed."""
    rows = octets.shape[0]
    if bits == 8:
        return octets
    if bits in (2, 4):  # whole codes per byte: no wide words needed
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)
        codes = (octets.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return codes.flatten(1)[:, :columns]
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % bits)).to(torch.int64)
    shifts = 8 * torch.arange(bits, device=octets.device)
    words = (padded.view(rows, padded.shape[1] // bits, bits) << shifts).sum(-1)
    codes = (words.unsqueeze(-1) >> (bits * torch.arange(8, device=octets.device))) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(1)[:, :columns]


def grouped(weight: Tensor, group: int) -> Tensor:
    """View a finite matrix (out, in) as (out, groups, width); one group (1, 1, all) for -1.

    A last, shorter group is padded with its own last column, which changes neither its largest
    nor its smallest value.

    Raises
    ------
    DataError
        For NaN, Inf or an empty matrix.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise DataError(f"cannot quantize a tensor of shape {tuple(weight.shape)}: give a matrix")
    if not weight.is_floating_point():
        raise DataError(f"cannot quantize {weight.dtype}: give real numbers")
    values = weight.detach().to(torch.float32)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise DataError(f"holds {bad} values that are NaN or Inf: repair the weights first")
    if group == -1:
        return values.reshape(1, 1, -1)
    width = min(group or values.shape[1], values.shape[1])
    missing = -values.shape[1] % width
    if missing:
        values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
    return values.view(values.shape[0], -1, width)


def stored_scale(dtype: str, scale: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return a scale, and a minimum, in the type in which they are stored.

    A relative error of 2^-9 still keeps the largest of 256 codes within half a step; a minimum may
    also be off by that share of its scale.

    Raises
    ------
    DataError
        When the type does not hold the values.
    """
    kept = tuple(v.to(getattr(torch, dtype)) for v in (scale, *others))
    slack = [scale.abs(), *(torch.maximum(v.abs(), scale.abs()) for v in others)]
    for held, value, size in zip(kept, (scale, *others), slack, strict=True):
        if not bool(((held.to(torch.float32) - value).abs() <= size * 2.0**-9).all()):
            low, high = float(value.abs().min()), float(value.abs().max())
            raise DataError(f"has scales or minima of sizes {low:.2g} to {high:.2g}, which {dtype} does "
                            f"not hold: give scale_dtype='float32'")
    return kept


def layout(
    bits: int, group: int, shape: tuple[int, int], scale_dtype: str, *, with_minimum: bool
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the names, shapes and types of what a packed matrix of this shape keeps."""
    rows, columns = shape
    groups = (1, 1) if group == -1 else (rows, -(-columns // group) if group else 1)
    kept = (groups, getattr(torch, scale_dtype))
    found = {"codes": ((rows, packed_width(columns, bits)), torch.uint8), "scale": kept}
    return {**found, "minimum": kept} if with_minimum else found
