"""A matrix in two planes: the high half of its codes with scales and bias, and the low half of its codes.

A code of b bits is q = 2^h hi + lo, h = b / 2. The first plane, the base, is a matrix by itself: where lo
is not there, the middle of what it may be stands in for it,

    w = s q + m   becomes   (2^h s) hi + (m + s (2^h - 1) / 2).

Both planes together are the codes, scales and bias of the ordinary store, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HALF = {8: 4, 4: 2}  # bits of a code: of its high half
ALLOWED = "codes of 4 or 8 bits in the schemes asym_group, asym_channel, sym_group and sym_channel"
Layout = dict[str, tuple[tuple[int, ...], Any]]


@dataclass(frozen=True)
class Planed:
    """A quantizer whose matrices are stored in two planes; what is laid out is the whole matrix."""

    quantizer: Any

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.quantizer.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.quantizer.group

    @property
    def half(self) -> int:
        """Bits of a code that the base has."""
        return HALF[self.bits]

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """Return what both planes make: names, shapes and types of the quantizer."""
        return self.quantizer.layout(shape, dtype)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Any:
        """Rebuild a whole matrix, without a copy."""
        return self.quantizer.from_tensors(tensors, shape, dtype)

    def high(self, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """Return what the base stores."""
        whole = self.layout(shape, dtype)
        return {**whole, **self.low(shape, dtype)}

    def low(self, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """Return what the second plane stores."""
        (rows, width), kind = self.layout(shape, dtype)["codes"]
        return {"codes": ((rows, width // 2), kind)}

    def split(self, made: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of both planes of a matrix that the quantizer has made."""
        from poise.quantizers.packing import pack, unpack

        codes, half = unpack(made.codes, self.bits, made.shape[1]), self.half
        high = {**made.tensors(), "codes": pack(codes >> half, half)}
        return high, {"codes": pack(codes & (2**half - 1), half)}

    def base(
        self, high: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, room: Tensor
    ) -> Any:
        """Return the matrix that the base is, its codes not copied.

        Parameters
        ----------
        room : Tensor, float32
            Where its scales and minima are written, one after the other: fp16 might not hold them.
        """
        from poise.quantizers.matrix import PackedMatrix

        stored, count = high["scale"], high["scale"].numel()
        fine = stored.float()
        low = fine * -(2.0 ** (self.bits - 1)) if high.get("minimum") is None else high["minimum"].float()
        scale, minimum = (room[at: at + count].view(stored.shape) for at in (0, count))
        minimum.copy_(low + fine * ((2**self.half - 1) / 2))
        scale.copy_(fine * 2**self.half)
        return PackedMatrix(high["codes"], scale, minimum, self.half, self.group, shape, dtype)


def in_planes(quantizer: Any, name: str, shape: tuple[int, int]) -> Planed:
    """Return what stores a matrix in two planes.

    Raises
    ------
    ConfigError
        For a quantizer or a shape that has none.
    """
    from poise.quantizers.components import AbsMax, Affine

    if type(quantizer) not in (AbsMax, Affine) or quantizer.bits not in HALF:
        bits = getattr(quantizer, "bits", None)
        said = type(quantizer).__name__ + ("" if bits is None else f" of {bits} bits")
        raise ConfigError(f"planes=2 does not fit {name}, stored by {said}: it takes {ALLOWED}")
    if shape[1] * HALF[quantizer.bits] % 8:
        raise ConfigError(f"planes=2 does not fit {name}, {shape[1]} columns wide: its halves are to fill "
                          f"bytes, so give a width of a multiple of {8 // HALF[quantizer.bits]}")
    return Planed(quantizer)
