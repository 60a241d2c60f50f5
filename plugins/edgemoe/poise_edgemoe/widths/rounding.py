"""Scales and minima chosen by what a matrix is multiplied with: the same codes and bytes, smaller errors.

A column counts as much as its inputs are large, m_j = E[x_j^2]: sum_j m_j (w_j - z - s q_j)^2 is least. The
range is tried at several shares of its width, each followed by a weighted least-squares fit of s and z to
the codes. Ours; the paper (arXiv 2308.14352) takes the largest magnitude.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, DataError
from poise.quantizers.components import AbsMax, Affine
from poise.quantizers.matrix import PackedMatrix
from poise.quantizers.packing import grouped, pack, stored_scale

SHARES = tuple(1.0 - n / 20 for n in range(13))  # of the range, 1 to 0.4
LEAST = 1e-6  # of the mean importance: no column is worth nothing
LOW_BITS = (2, 3)  # widths at which it is worth its time


class Weighted:
    """A linear quantizer that rounds for a matrix's own inputs; what it makes is in the form of `plain`.

    Parameters
    ----------
    plain : AbsMax or Affine
    importance : Tensor, (in,)
        Mean square of each input.
    """

    def __init__(self, plain: Any, importance: Tensor) -> None:
        check_roundable(plain)
        self.plain, self.importance = plain, importance
        self.bits = plain.bits

    @property
    def checksum(self) -> int:
        """Tells one importance from another."""
        return zlib.crc32(self.importance.contiguous().numpy().tobytes())

    def quantize(self, weight: Tensor) -> PackedMatrix:
        """Quantize a matrix (out, in); see `AbsMax.quantize`."""
        return weighted(weight, self.plain, self.importance)

    def stored(self, weight: Tensor) -> tuple[Any, PackedMatrix]:
        """Return the plain quantizer of what was made, and it; scales are in fp32 where fp16 fails."""
        try:
            return self.plain, self.quantize(weight)
        except DataError:
            if self.plain.scale_dtype != "float16" or not weight.isfinite().all():
                raise
            wider = dataclasses.replace(self.plain, scale_dtype="float32")
            return wider, weighted(weight, wider, self.importance)

    def layout(self, shape: tuple[int, int], dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return names, shapes and types of what is stored: those of the plain quantizer."""
        return self.plain.layout(shape, dtype)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: Any
    ) -> PackedMatrix:
        """Rebuild a matrix, without a copy."""
        return self.plain.from_tensors(tensors, shape, dtype)


def check_roundable(plain: Any) -> None:
    """Refuse a quantizer whose scales are not chosen here.

    Raises
    ------
    ConfigError
    """
    if not isinstance(plain, (AbsMax, Affine)) or plain.group < 0:
        raise ConfigError(f"rounding=weighted chooses scales of sym_group, asym_group, sym_channel and "
                          f"asym_channel, not of {type(plain).__name__}: leave it out, or take one of them")


def weighted(weight: Tensor, plain: Any, importance: Tensor) -> PackedMatrix:
    """Return a matrix (out, in) in the form of a plain quantizer, scales fitted to its inputs."""
    blocks = grouped(weight, plain.group)
    share = _shares(importance, blocks, weight.shape[1])
    scale, low = _best(blocks, share, plain)
    if isinstance(plain, AbsMax):
        (scale,) = stored_scale(plain.scale_dtype, scale)
        limit = 2 ** (plain.bits - 1) - 1
        codes = torch.round(blocks / scale.float()[..., None]).clamp_(-limit, limit) + limit + 1
        minimum = None
    else:
        scale, minimum = stored_scale(plain.scale_dtype, scale, low)
        codes = torch.round((blocks - minimum.float()[..., None]) / scale.float()[..., None])
        codes = codes.clamp_(0, 2**plain.bits - 1)
    codes = codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    shape = (weight.shape[0], weight.shape[1])
    return PackedMatrix(pack(codes, plain.bits), scale, minimum, plain.bits, plain.group, shape,
                        weight.dtype)


def _shares(importance: Tensor, blocks: Tensor, columns: int) -> Tensor:
    """Return what each column counts, (1, groups, width); columns that pad a group count nothing."""
    if importance.shape != (columns,):
        raise DataError(f"importance of shape {tuple(importance.shape)} for {columns} columns")
    if not importance.isfinite().all() or (importance < 0).any():
        raise DataError("importance of inputs is negative or not finite")
    mean = importance.float().mean().clamp_min(1e-30)
    share = (importance.float() / mean).clamp_min(LEAST)
    padded = torch.zeros(blocks.shape[1] * blocks.shape[2])
    padded[:columns] = share
    return padded.view(1, *blocks.shape[1:])


def _best(blocks: Tensor, share: Tensor, plain: Any) -> tuple[Tensor, Tensor]:
    """Return scale and minimum (0 for symmetric ones) of least weighted error, (out, groups)."""
    symmetric = isinstance(plain, AbsMax)
    start_scale, start_low = _start(blocks, plain)
    best = torch.full(start_scale.shape, torch.inf)
    kept_scale, kept_low = start_scale.clone(), start_low.clone()
    for part in SHARES:
        scale = start_scale * part
        middle = start_low + start_scale * (2**plain.bits - 1) / 2
        low = start_low if symmetric else middle - scale * (2**plain.bits - 1) / 2
        for _ in range(3):  # the given range, then two fits
            codes = _codes(blocks, scale, low, plain)
            error = (share * (blocks - low[..., None] - scale[..., None] * codes).square()).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            kept_scale = torch.where(better, scale, kept_scale)
            kept_low = torch.where(better, low, kept_low)
            scale, low = _fit(blocks, codes, share, scale, low, symmetric)
    return kept_scale, kept_low


def _start(blocks: Tensor, plain: Any) -> tuple[Tensor, Tensor]:
    """Return scale and minimum as the plain quantizer has them."""
    if isinstance(plain, AbsMax):
        largest = blocks.abs().amax(-1)
        scale = torch.where(largest > 0, largest / (2 ** (plain.bits - 1) - 1), torch.ones_like(largest))
        return scale, torch.zeros_like(scale)
    low, high = blocks.amin(-1), blocks.amax(-1)
    spread = (high - low) / (2**plain.bits - 1)
    flat = torch.where(low != 0, low.abs(), torch.ones_like(low))
    return torch.where(spread > 0, spread, flat), low


def _codes(blocks: Tensor, scale: Tensor, low: Tensor, plain: Any) -> Tensor:
    limit = 2 ** (plain.bits - 1) - 1
    bounds = (-limit, limit) if isinstance(plain, AbsMax) else (0, 2**plain.bits - 1)
    return torch.round((blocks - low[..., None]) / scale[..., None]).clamp_(*bounds)


def _fit(
    blocks: Tensor, codes: Tensor, share: Tensor, scale: Tensor, low: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted least-squares scale and minimum for given codes; else the old ones."""
    if symmetric:
        over, under = (share * blocks * codes).sum(-1), (share * codes.square()).sum(-1)
        made = over / under.clamp_min(1e-30)
        return torch.where((under > 0) & (made > 0), made, scale), low
    total = share.sum(-1)
    q, w = (share * codes).sum(-1) / total, (share * blocks).sum(-1) / total
    off = codes - q[..., None]
    under = (share * off.square()).sum(-1)
    made = (share * off * (blocks - w[..., None])).sum(-1) / under.clamp_min(1e-30)
    good = (under > 0) & (made > 0)
    made = torch.where(good, made, scale)
    return made, torch.where(good, w - made * q, low)
