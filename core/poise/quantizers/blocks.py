"""A matrix in ggml's blocks, the bytes of a GGUF file, and the kernel that multiplies it: ggml's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import DataError, FileError
from poise.quantizers import ggml
from poise.quantizers.formats import FORMATS, Format
from poise.quantizers.kernel import KINDS, is_memory
from poise.quantizers.packing import grouped
from poise.quantizers.sliced import SMALL, OnKernel, Pairs, SlicedMatrix

ROWS = 1 << 20  # weights that are quantized at a time


@dataclass(frozen=True)
class BlockMatrix(SlicedMatrix):
    """A matrix (out, in) in one of ggml's formats.

    Parameters
    ----------
    blocks : uint8, shape (out, bytes of a row)
    form : str
        A name in `formats.FORMATS`.
    """

    blocks: Tensor
    form: str
    shape: tuple[int, int]
    dtype: torch.dtype

    called: ClassVar[str] = "ggml's blocks"

    @classmethod
    def kernels(cls) -> Mapping[str, type[Any]]:
        """Return what it is on a kernel."""
        return {"ggml": OnGgml}

    @property
    def format(self) -> Format:
        """The format."""
        return FORMATS[self.form]

    def tensors(self) -> dict[str, Tensor]:
        """Return the blocks by name."""
        return {"blocks": self.blocks}

    def _write(self, wanted: range, dense: Tensor) -> None:
        own = self.blocks[wanted.start : wanted.stop]
        real = wanted.step == 1 and dense.numel() >= SMALL and is_memory(own) and is_memory(dense)
        it = ggml.kernel() if real and dense.dtype in KINDS else None
        if it is not None and self.form in it.ggml.widen:
            it.rows(self.format, own, dense)
        else:
            super()._write(wanted, dense)

    def _some(self, rows: slice) -> Tensor:
        return self.format.decoded(self.blocks[rows], self.shape[1])


def layout(form: str, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name, shape and type of what a matrix of this shape keeps."""
    return {"blocks": ((shape[0], FORMATS[form].width(shape[1])), torch.uint8)}


def from_tensors(
    tensors: Mapping[str, Tensor], form: str, shape: tuple[int, int], dtype: torch.dtype,
    kind: type[BlockMatrix] = BlockMatrix,
) -> BlockMatrix:
    """Rebuild a matrix from its tensors, which it keeps and does not copy.

    Raises
    ------
    FileError
        When the blocks are missing, or of another shape or type.
    """
    shape = (shape[0], shape[1])
    said = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    if said != (expected := layout(form, shape)):
        raise FileError(f"a matrix {shape} in {form} is {expected}, not {said}")
    return kind(tensors["blocks"], form, shape, dtype)


def quantize(weight: Tensor, form: str) -> BlockMatrix:
    """Quantize a matrix (out, in) as ggml does, bit for bit.

    Numbers so small that float16 does not hold their scale become zeros, as in ggml.

    Raises
    ------
    DataError
        For NaN, Inf, an empty matrix, and numbers too large for a scale in float16.
    MissingExtra
        For codes that ggml's library searches for, where it is not to be had.
    """
    grouped(weight, 0)  # refuses what is no matrix of finite numbers
    known = FORMATS[form]
    found = weight.detach().cpu()
    step = max(1, ROWS // found.shape[1])
    parts = [_quantized(known, part) for part in found.split(step)]
    blocks = torch.cat(parts).to(weight.device)
    if not known.holds(blocks):
        raise DataError(f"holds numbers up to {float(found.abs().max()):.2g}, too large for {form}, whose "
                        f"scales are float16: divide the weights, or take another scheme")
    return BlockMatrix(blocks, form, (found.shape[0], found.shape[1]), weight.dtype)


def _quantized(form: Format, rows: Tensor) -> Tensor:
    values = form.padded(rows)
    if form.blocks is None:
        return ggml.searched(form, values)
    return form.blocks(values.view(-1, form.columns)).view(len(rows), form.width(rows.shape[1]))


# ------------------------------------------------------------------ on a kernel


def _on_ggml(pairs: Pairs) -> list[Tensor]:
    it = ggml.kernel()
    assert it is not None  # what is on it was made while it was there
    return it.products([(w.told, x) for w, x in pairs])


class OnGgml(OnKernel, BlockMatrix):
    """On kernel `ggml`: the bytes as they lie, x rounded to 8 bits.

    The error is that of rounding x: of each number at most 1/254 of the largest of 32 neighbours (256 in K
    formats), which is 2.3e-2 (6.4e-2) |row of W| |x| at the very most.
    """

    plain_type: ClassVar[type[Any]] = BlockMatrix
    together = staticmethod(_on_ggml)

    @classmethod
    def refuses(cls, packed: BlockMatrix, *, auto: bool = False) -> str:
        """Return why a matrix cannot be multiplied so, or nothing."""
        if ggml.kernel() is None:
            return ggml.status()
        there = is_memory(packed.blocks)
        return "" if there else "it is not in memory that C reads: on another device, or not contiguous"

    @functools.cached_property
    def told(self) -> ggml.Told:
        """What the loop knows of it."""
        it = ggml.kernel()
        assert it is not None
        return ggml.Told(it, self.format, self.blocks, self.shape, self._several(it.ggml))

    def _several(self, library: ggml.Ggml) -> int | None:
        """Return the function that multiplies rows which lie interleaved."""
        return None
