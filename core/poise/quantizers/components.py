"""Core's quantizers: options and schemes. The arithmetic is in `absmax.py`, `affine.py` and `blocks.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from poise.errors import ConfigError
from poise.options import check_options, option, options_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from poise.quantizers.blocks import BlockMatrix
    from poise.quantizers.matrix import PackedMatrix


@dataclass(frozen=True)
class Grouped:
    """What the schemes share: codes of some bits, and numbers per group of columns."""

    bits: int = option(4, "bits per weight", low=2, high=8, unit="bits")
    group: int = option(64, "columns that share a scale; 0: a whole row (per channel); -1: the tensor",
                        low=-1)
    scale_dtype: str = option("float16", "how scales are stored; float32: where float16 does not hold them",
                              choices=("float16", "float32"))

    with_minimum: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    def at(self, bits: int) -> Self:
        """Return the same scheme at other bits; raises `ConfigError` for bits out of range."""
        return dataclasses.replace(self, bits=bits)

    def layout(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the names, shapes and types of the tensors that a matrix (out, in) will be stored as."""
        from poise.quantizers.packing import layout

        return layout(self.bits, self.group, shape, self.scale_dtype, with_minimum=self.with_minimum)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> PackedMatrix:
        """Rebuild what `PackedMatrix.tensors` returned, without a copy."""
        from poise.quantizers.matrix import PackedMatrix

        return PackedMatrix.from_tensors(tensors, self.bits, self.group, shape, dtype, self.scale_dtype,
                                         with_minimum=self.with_minimum)


@dataclass(frozen=True)
class AbsMax(Grouped):
    """Symmetric: w = s q with |q| <= 2^(bits-1) - 1 and s = max|w| / (2^(bits-1) - 1).

    Takes bits + 16 / group bits per weight. Source: EdgeMoE, arXiv 2308.14352, section III-B.
    """

    def quantize(self, weight: Tensor) -> PackedMatrix:
        """Quantize a matrix (out, in).

        Raises
        ------
        DataError
            For NaN, Inf, or scales that `scale_dtype` does not hold.
        """
        from poise.quantizers.absmax import quantize

        return quantize(weight, self.bits, self.group, self.scale_dtype)


@dataclass(frozen=True)
class Affine(Grouped):
    """Asymmetric: w = m + s q with 0 <= q <= 2^bits - 1, per group of columns.

    Takes bits + 32 / group bits per weight (scale and minimum).
    """

    with_minimum: ClassVar[bool] = True

    def quantize(self, weight: Tensor) -> PackedMatrix:
        """Quantize a matrix (out, in); see `AbsMax.quantize`."""
        from poise.quantizers.affine import quantize

        return quantize(weight, self.bits, self.group, self.scale_dtype)


@dataclass(frozen=True)
class Blocks:
    """What ggml's formats share: blocks of columns, each with its scales, the bytes of GGUF files."""

    form: ClassVar[str]
    bits: ClassVar[int]
    searches: ClassVar[bool] = False  # for levels, in ggml's library

    def at(self, bits: int) -> Self:
        """Return the same; raises `ConfigError` for other bits than its own."""
        if bits != self.bits or isinstance(bits, bool):
            raise ConfigError(f"bits={bits} is not allowed: {self.form} has {self.bits} bits; leave it out "
                              f"or take another scheme")
        return self

    def quantize(self, weight: Tensor) -> BlockMatrix:
        """Quantize a matrix (out, in); see `blocks.quantize`."""
        from poise.quantizers.blocks import quantize

        return quantize(weight, self.form)

    def layout(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the name, shape and type of the blocks of a matrix (out, in)."""
        from poise.quantizers.blocks import layout

        return layout(self.form, shape)

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> BlockMatrix:
        """Rebuild what `BlockMatrix.tensors` returned, without a copy."""
        from poise.quantizers.blocks import from_tensors

        return from_tensors(tensors, self.form, shape, dtype)


@dataclass(frozen=True)
class GgmlQ8(Blocks):
    """ggml's q8_0: 8.5 bits per weight; blocks of 32 columns."""

    form: ClassVar[str] = "q8_0"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class GgmlQ4(Blocks):
    """ggml's q4_0: 4.5 bits per weight; blocks of 32 columns."""

    form: ClassVar[str] = "q4_0"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class GgmlQ4K(Blocks):
    """ggml's Q4_K: 4.5 bits per weight; blocks of 256 columns; ggml searches for codes (`poise[ggml]`)."""

    form: ClassVar[str] = "q4_k"
    bits: ClassVar[int] = 4
    searches: ClassVar[bool] = True


@dataclass(frozen=True)
class GgmlQ3K(Blocks):
    """ggml's Q3_K: 3.44 bits per weight; blocks of 256 columns; ggml searches for codes (`poise[ggml]`)."""

    form: ClassVar[str] = "q3_k"
    bits: ClassVar[int] = 3
    searches: ClassVar[bool] = True


@dataclass(frozen=True)
class GgmlQ2K(Blocks):
    """ggml's Q2_K: 2.63 bits per weight; blocks of 256 columns; ggml searches for codes (`poise[ggml]`)."""

    form: ClassVar[str] = "q2_k"
    bits: ClassVar[int] = 2
    searches: ClassVar[bool] = True


def format_of(quantizer: Any) -> dict[str, Any]:
    """Return what two quantizers that store alike have in common, as plain values."""
    kind = type(quantizer)
    options = options_of(quantizer) if dataclasses.is_dataclass(quantizer) else {}
    return {"quantizer": f"{kind.__module__}:{kind.__qualname__}", "options": options}
