"""Codes of 2 to 8 bits in bytes, and the matrix made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import DataError, FileError
from poise.quantizers.kernel import LARGE, kernel, takes

PIECE = 1 << 16  # weights unpacked at a time: larger pieces are left scattered by the allocator
SLICE_WEIGHTS = 1 << 18  # weights dequantized at a time: 1 MiB of fp32 stays in cache


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


@dataclass(frozen=True)
class PackedMatrix:
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

    @property
    def nbytes(self) -> int:
        """True size in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def resident_bytes(self) -> int:
        """Bytes that it takes in memory: those of its tensors, since it keeps nothing else."""
        return self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

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

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """Return rows (all without it) as a dense tensor, shape (len(rows), in).

        Made some rows at a time: beside the result no more than a few MiB are taken.
        """
        wanted = range(self.shape[0])[rows or slice(None)]
        dense = self.codes.new_empty((len(wanted), self.shape[1]), dtype=self.dtype)
        self._write(wanted, dense)
        return dense

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Write all rows into a contiguous tensor of the matrix's shape and type, and return it."""
        self._write(range(self.shape[0]), out)
        return out

    def _write(self, wanted: range, dense: Tensor) -> None:
        # a subclass may mean something else by a code
        plain = type(self) is PackedMatrix and self.shape[0] * self.shape[1] >= LARGE and wanted.step == 1
        if plain and takes(self, dense) and (native := kernel()) is not None:
            native.rows(self, slice(wanted.start, wanted.stop), dense)
            return
        step = max(1, PIECE // self.shape[1])
        for at in range(0, len(wanted), step):
            part = wanted[at: at + step]
            dense[at: at + step] = self._some(slice(part.start, part.stop, part.step))

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

    def slices(self) -> Iterator[slice]:
        """Yield slices of output rows, each at most half of the matrix."""
        out, columns = self.shape
        step = max(1, min(SLICE_WEIGHTS // columns, -(-out // 2)))
        return (slice(i, min(i + step, out)) for i in range(0, out, step))

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out), a slice of W at a time."""
        made = x.new_empty(*x.shape[:-1], self.shape[0])
        for rows in self.slices():  # small pieces kept between slices would have each take another place
            made[..., rows] = x @ self.dequantize(rows).to(x.dtype).T
        return made

    def matmul_t(self, dy: Tensor) -> Tensor:
        """Return dy @ W, shape (..., in), a slice of W at a time."""
        total = dy.new_zeros((*dy.shape[:-1], self.shape[1]))
        for rows in self.slices():
            total += dy[..., rows] @ self.dequantize(rows).to(dy.dtype)
        return total


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
