"""Core's quantizers: options and schemes. The arithmetic is in `absmax.py` and `affine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poise.options import check_options, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from poise.quantizers.packing import PackedMatrix

_GROUP = "columns that share a scale; 0: a whole row (per channel); -1: the whole tensor"


@dataclass(frozen=True)
class AbsMax:
    """Symmetric: w = s q with |q| <= 2^(bits-1) - 1 and s = max|w| / (2^(bits-1) - 1).

    Takes bits + 16 / group bits per weight: the scale is stored as fp16 (fp32 for a tensor whose
    scales fp16 cannot hold). Source: EdgeMoE, arXiv 2308.14352, section III-B.
    """

    bits: int = option(4, "bits per weight", low=2, high=8, unit="bits")
    group: int = option(64, _GROUP, low=-1)

    def __post_init__(self) -> None:
        check_options(self)

    def quantize(self, weight: Tensor) -> PackedMatrix:
        """Quantize a matrix (out, in); raises `DataError` for NaN or Inf."""
        from poise.quantizers.absmax import quantize

        return quantize(weight, self.bits, self.group)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> PackedMatrix:
        """Rebuild what `PackedMatrix.tensors` returned."""
        from poise.quantizers.packing import PackedMatrix

        return PackedMatrix.from_tensors(
            tensors, self.bits, self.group, shape, dtype, with_minimum=False
        )


@dataclass(frozen=True)
class Affine:
    """Asymmetric: w = m + s q with 0 <= q <= 2^bits - 1, per group of columns.

    Takes bits + 32 / group bits per weight (fp16 scale and minimum).
    """

    bits: int = option(4, "bits per weight", low=2, high=8, unit="bits")
    group: int = option(64, _GROUP, low=-1)

    def __post_init__(self) -> None:
        check_options(self)

    def quantize(self, weight: Tensor) -> PackedMatrix:
        """Quantize a matrix (out, in); raises `DataError` for NaN or Inf."""
        from poise.quantizers.affine import quantize

        return quantize(weight, self.bits, self.group)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> PackedMatrix:
        """Rebuild what `PackedMatrix.tensors` returned."""
        from poise.quantizers.packing import PackedMatrix

        return PackedMatrix.from_tensors(
            tensors, self.bits, self.group, shape, dtype, with_minimum=True
        )
