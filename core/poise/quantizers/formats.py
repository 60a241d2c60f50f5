"""ggml's block formats, plainly: what bytes stand for, and how two of them are made.

A row is a run of blocks, each of `columns` weights in `nbytes` bytes; a GGUF file holds the same bytes. A
row whose width is no multiple of `columns` ends with zeros.

| format | columns | bytes | a weight |
|---|---|---|---|
| q8_0 | 32 | d, 32 codes | d q, q of 8 bits with a sign |
| q4_0 | 32 | d, 16 bytes of codes | d (q - 8) |
| q4_k | 256 | d, dmin, 12 of scales, 128 of codes | d s q - dmin m; s and m of 6 bits for 32 |
| q3_k | 256 | 32 of third bits, 64 of codes, 12 of scales, d | d (s - 32) (q - 4); s of 6 bits for 16 |
| q2_k | 256 | 16 of scales, 64 of codes, d, dmin | d s q - dmin m; s and m of 4 bits for 16 |

d and dmin are float16. Arithmetic is that of ggml's reference, in fp32, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One format.

    Parameters
    ----------
    name : str
        ggml's, in lower case.
    number : int
        ggml's, of `ggml_type`.
    bits : int
        Of a code.
    columns, nbytes : int
        Of a block.
    halves : tuple of int
        Where in a block numbers of float16 begin.
    values : callable
        Bytes of blocks (n, nbytes) to weights (n, columns), fp32.
    blocks : callable or None
        The way back; None where ggml searches for codes.
    """

    name: str
    number: int
    bits: int
    columns: int
    nbytes: int
    halves: tuple[int, ...]
    values: Blocks
    blocks: Blocks | None = None

    def width(self, columns: int) -> int:
        """Return the bytes of a row of so many weights."""
        return -(-columns // self.columns) * self.nbytes

    def decoded(self, octets: Tensor, columns: int) -> Tensor:
        """Return the weights (rows, columns), fp32, of bytes (rows, width)."""
        made = self.values(octets.reshape(-1, self.nbytes))
        return made.view(octets.shape[0], octets.shape[1] // self.nbytes * self.columns)[:, :columns]

    def padded(self, rows: Tensor) -> Tensor:
        """Return rows in fp32, contiguous, with zeros up to whole blocks."""
        values = rows.to(torch.float32)
        return torch.nn.functional.pad(values, (0, -values.shape[1] % self.columns)).contiguous()

    def holds(self, octets: Tensor) -> bool:
        """Return whether every number of float16 in bytes (rows, width) is finite."""
        blocks = octets.reshape(-1, self.nbytes)
        return all(bool(_half(blocks, at).isfinite().all()) for at in self.halves)


def _half(blocks: Tensor, at: int) -> Tensor:
    """Return the float16 at a place of every block as fp32, (n, 1)."""
    return blocks[:, at: at + 2].contiguous().view(torch.float16).to(torch.float32)


def _shifted(octets: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return (n, len(shifts), m): the bits of every byte (n, m) at each shift."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=octets.device)
    return (octets.unsqueeze(1) >> by[:, None]) & mask


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, d, 1 / d).nan_to_num(posinf=0, neginf=0)


def _as_half(d: Tensor) -> Tensor:
    return d.to(torch.float16).view(torch.uint8)


# ------------------------------------------------------------------ blocks of 32


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).to(torch.float32) * _half(blocks, 0)


def _to_q8_0(values: Tensor) -> Tensor:
    d = values.abs().amax(-1, keepdim=True) / 127
    scaled = values * _inverse(d)
    size = scaled.abs()
    whole = size.floor()  # halves go away from zero, which torch.round does not do; size + 0.5 would round
    codes = (whole + (size - whole >= 0.5)) * scaled.sign()
    return torch.cat([_as_half(d), codes.to(torch.int8).view(torch.uint8)], -1)


def _q4_0(blocks: Tensor) -> Tensor:
    codes = _shifted(blocks[:, 2:], (0, 4), 15).flatten(1)
    return (codes.to(torch.float32) - 8) * _half(blocks, 0)


def _to_q4_0(values: Tensor) -> Tensor:
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))  # with its sign: it becomes -8 or 8
    d = torch.where(largest == 0, 0.0, largest) / -8  # of zeros -0, as ggml has it
    codes = (values * _inverse(d) + 8.5).to(torch.int8).clamp(0, 15).view(torch.uint8)
    return torch.cat([_as_half(d), codes[:, :16] | (codes[:, 16:] << 4)], -1)


# ------------------------------------------------------------------ blocks of 256


def _q4_k(blocks: Tensor) -> Tensor:
    low, lows, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], -1).to(torch.float32)
    least = torch.cat([lows & 63, (high >> 4) | ((lows >> 2) & 48)], -1).to(torch.float32)
    codes = _shifted(blocks[:, 16:].reshape(-1, 32), (0, 4), 15).view(-1, 8, 32)
    return _between(blocks, 0, scale, least, codes)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    codes = _shifted(blocks[:, 16:80].reshape(-1, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    return _between(blocks, 80, (scales & 15).to(torch.float32), (scales >> 4).to(torch.float32), codes)


def _between(blocks: Tensor, at: int, scale: Tensor, least: Tensor, codes: Tensor) -> Tensor:
    """Return d s q - dmin m, where d and dmin lie at a place of every block."""
    d, dmin = _half(blocks, at) * scale, _half(blocks, at + 2) * least
    return (d.unsqueeze(-1) * codes.to(torch.float32) - dmin.unsqueeze(-1)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    third = _shifted(blocks[:, :32], tuple(range(8)), 1).reshape(-1, 16, 16)
    codes = _shifted(blocks[:, 32:96].reshape(-1, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    low = _shifted(blocks[:, 96:104], (0, 4), 15).flatten(1)
    high = _shifted(blocks[:, 104:108], (0, 2, 4, 6), 3).flatten(1)
    scale = _half(blocks, 108) * ((low | (high << 4)).to(torch.float32) - 32)
    return (scale.unsqueeze(-1) * ((codes | (third << 2)).to(torch.float32) - 4)).flatten(1)


FORMATS = {f.name: f for f in (
    Format("q8_0", 8, 8, 32, 34, (0,), _q8_0, _to_q8_0),
    Format("q4_0", 2, 4, 32, 18, (0,), _q4_0, _to_q4_0),
    Format("q4_k", 12, 4, 256, 144, (0, 2), _q4_k),
    Format("q3_k", 11, 3, 256, 110, (108,), _q3_k),
    Format("q2_k", 10, 2, 256, 84, (80, 82), _q2_k),
)}
