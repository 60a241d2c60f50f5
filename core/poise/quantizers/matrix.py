"""A matrix of packed codes in groups, and the kernels that multiply it.

`c` is built with the system's compiler (`poise.native`) for the processor at hand; `torch` is torch's own
product of 4 bits. `poise.quantizers.sliced` has all kernels in one table.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import FileError
from poise.quantizers.kernel import LARGE, Kernel, Told, is_memory, kernel, status, takes
from poise.quantizers.packing import layout, unpack
from poise.quantizers.sliced import MOST_ROWS, OnKernel, Pairs, SlicedMatrix


@dataclass(frozen=True)
class PackedMatrix(SlicedMatrix):
    """A matrix (out, in) as packed codes with a scale, and perhaps a minimum, per group.

    What quantizing makes shares no memory with the weight; what `from_tensors` makes is its tensors.

    Parameters
    ----------
    codes : uint8, shape (out, packed_width)
    scale : float16 or float32, shape (out, groups); (1, 1) for one scale per tensor
    minimum : like scale, or None for the symmetric scheme (codes are then offset by 2^(bits-1))
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    bits: int
    group: int
    shape: tuple[int, int]
    dtype: torch.dtype

    called: ClassVar[str] = "codes in groups"

    @classmethod
    def kernels(cls) -> Mapping[str, type[Any]]:
        """Return what it is on a kernel."""
        return {"c": InPlace, "torch": TorchPack}

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        found = {"codes": self.codes, "scale": self.scale}
        return found if self.minimum is None else {**found, "minimum": self.minimum}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], bits: int, group: int, shape: tuple[int, int],
        dtype: torch.dtype, scale_dtype: str, *, with_minimum: bool,
    ) -> PackedMatrix:
        """Rebuild a matrix from its tensors, which it keeps and does not copy: they may be views of a
        caller's buffer, which must stay as it is for as long as the matrix lives.

        Raises
        ------
        FileError
            When a tensor is missing, or its shape or type is another.
        """
        shape = (shape[0], shape[1])
        expected = layout(bits, group, shape, scale_dtype, with_minimum=with_minimum)
        if odd := sorted(expected.keys() ^ tensors.keys()):
            raise FileError(f"packed tensors should be {sorted(expected)}; {odd[0]} is missing or extra")
        for name, (size, kind) in expected.items():
            got = tensors[name]
            if tuple(got.shape) != size:
                raise FileError(f"packed {name} {tuple(got.shape)} do not fit a matrix {shape} at {bits} "
                                f"bits, which has {size}")
            if got.dtype != kind:
                said = [str(d).removeprefix("torch.") for d in (got.dtype, kind)]
                mend = f": give scale_dtype={said[0]}" if said[0] in ("float16", "float32") else ""
                raise FileError(f"packed {name} is {said[0]}, not {said[1]}{mend}")
        return cls(tensors["codes"], tensors["scale"], tensors.get("minimum"), bits, group, shape, dtype)

    def _write(self, wanted: range, dense: Tensor) -> None:
        # a subclass may mean something else by a code
        plain = type(self).values is PackedMatrix.values and wanted.step == 1
        large = self.shape[0] * self.shape[1] >= LARGE
        if plain and large and takes(self, dense) and (native := kernel()) is not None:
            native.rows(self, slice(wanted.start, wanted.stop), dense)
            return
        super()._write(wanted, dense)

    def _some(self, rows: slice) -> Tensor:
        codes = unpack(self.codes[rows], self.bits, self.shape[1])
        blocks = self._blocks(self.values(codes)).mul_(self._per_block(self.scale, rows))
        if self.minimum is not None:
            blocks.add_(self._per_block(self.minimum, rows))
        return blocks.flatten(1)[:, : self.shape[1]]

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes (uint8) stand for before scaling, fp32, the same shape; a fresh tensor."""
        values = codes.to(torch.float32)
        return values.sub_(2 ** (self.bits - 1)) if self.minimum is None else values

    def _blocks(self, codes: Tensor) -> Tensor:
        """View values (rows, in) as (rows, groups, width); a copy only when a group is short."""
        if self.group <= 0 or self.group >= self.shape[1]:
            return codes.unsqueeze(1)
        missing = -self.shape[1] % self.group
        padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
        return padded.view(codes.shape[0], padded.shape[1] // self.group, self.group)

    def _per_block(self, values: Tensor, rows: slice) -> Tensor:
        """Return a value per group in the shape that spreads over `_blocks`."""
        return (values if self.group == -1 else values[rows]).to(torch.float32).unsqueeze(-1)


def multiply_stacked(matrices: Sequence[Any], x: Tensor, out: Tensor, rows: Sequence[int]) -> bool:
    """Write x W^T of matrices of one shape into rows of `out`; False: kernel `c` does not take all of it.

    Parameters
    ----------
    x : Tensor, (1, in) or (matrices, in)
        One row for all, or one for each.
    out : Tensor, (any, out)
        Of x's type, contiguous.
    """
    shape = matrices[0].shape
    if not all(type(w) is InPlace and w.shape == shape for w in matrices) or not matrices[0].fits(x):
        return False
    inside = 0 <= min(rows) <= max(rows) < len(out)
    if len(x) not in (1, len(matrices)) or out.shape[1] != shape[0] or not inside:
        raise ValueError(f"x {tuple(x.shape)}, out {tuple(out.shape)} and rows {list(rows)} do not fit "
                         f"{len(matrices)} matrices {shape}")
    _library().stacked([w.told for w in matrices], x, out, rows)
    return True


def _library() -> Kernel:
    it = kernel()
    assert it is not None  # what is on it was made while it was there
    return it


class _OnKernel(OnKernel, PackedMatrix):
    plain_type: ClassVar[type[Any]] = PackedMatrix


def _on_c(pairs: Pairs) -> list[Tensor]:
    return _library().products([(w.told, x) for w, x in pairs])


class InPlace(_OnKernel):
    """On kernel `c`."""

    together = staticmethod(_on_c)

    @classmethod
    def refuses(cls, packed: PackedMatrix, *, auto: bool = False) -> str:
        """Return why a matrix cannot be multiplied so, or nothing."""
        if (it := kernel()) is None:
            return f"the kernel is not to be had ({status()})"
        if type(packed).values is not PackedMatrix.values:
            return f"codes of a {type(packed).__name__} are no multiples of a scale"
        if not all(is_memory(t) for t in packed.tensors().values()):
            return "it is not in memory that C reads: on another device, or not contiguous"
        if not it.multiplies(packed):
            return (f"groups of {packed.group} columns do not fall on the processor's vectors at "
                    f"{packed.bits} bits: powers of two from 16 on do")
        slow = auto and it.units == "portable"
        return "the kernel knows no vectors of this processor" if slow else ""

    @functools.cached_property
    def told(self) -> Told:
        """What the library knows of it."""
        return Told(self)


@dataclass(frozen=True)
class _Torch:
    pack: Tensor
    scales: Tensor


def _on_torch(pairs: Pairs) -> list[Tensor]:
    made = []
    for w, x in pairs:
        kept = w._made
        y = torch._weight_int4pack_mm_for_cpu(x.bfloat16(), kept.pack, w.group, kept.scales)
        made.append(y.to(x.dtype))
    return made


class TorchPack(_OnKernel):
    """On torch's own product of 4 bits, for machines without a compiler; keeps a copy in its order.

    x is rounded to bfloat16.
    """

    together = staticmethod(_on_torch)
    most_rows = dict.fromkeys((*MOST_ROWS, torch.float64), MOST_ROWS[torch.bfloat16])

    @classmethod
    def refuses(cls, packed: PackedMatrix, *, auto: bool = False) -> str:
        """Return why a matrix cannot be multiplied so, or nothing."""
        plain = type(packed).values is PackedMatrix.values
        if not plain or packed.bits != 4 or packed.group not in (32, 64, 128, 256):
            return "torch multiplies matrices of 4 bits in groups of 32, 64, 128 or 256 columns"
        if packed.shape[0] % 16 or packed.shape[1] % packed.group:
            return f"torch takes whole groups and multiples of 16 rows, not a matrix {packed.shape}"
        return "" if packed.codes.device.type == "cpu" else f"it is on {packed.codes.device}"

    def _pack(self) -> Tensor:
        codes = unpack(self.codes, self.bits, self.shape[1])
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)

    @functools.cached_property
    def _made(self) -> _Torch:
        scale = self.scale.float()
        zero = torch.zeros_like(scale) if self.minimum is None else self.minimum.float() + 8 * scale
        return _Torch(self._pack(), torch.stack([scale.T, zero.T], -1).bfloat16().contiguous())

    @property
    def resident_bytes(self) -> int:
        """Bytes of both."""
        return self.nbytes + sum(t.numel() * t.element_size() for t in (self._made.pack, self._made.scales))
