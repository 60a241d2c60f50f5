"""A matrix of packed codes, and the kernels that multiply it, by name.

| kernel | reads | x | error, as a share of |row of W| |x| |
|---|---|---|---|
| `reference` | slices made in full | as it is | that of adding |
| `c` | the bytes as they lie | 16 bits, a scale for 4 to 16 columns | 2e-5 |
| `torch` | a copy in torch's order, made once | bfloat16, scales too | 1e-2 |

`c` is built with the system's compiler (`poise.native`) for the processor at hand; what it makes of a row
of x does not depend on the rows beside it nor on the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from poise.errors import ConfigError, FileError
from poise.quantizers.kernel import KINDS, LARGE, Kernel, Told, is_memory, kernel, status, takes
from poise.quantizers.packing import layout, unpack

PIECE = 1 << 16  # weights unpacked at a time: larger pieces are left scattered by the allocator
SLICE_WEIGHTS = 1 << 18  # weights dequantized at a time: 1 MiB of fp32 stays in cache
KERNELS = ("auto", "reference", "c", "torch")
SMALL = 1 << 16  # weights that torch unpacks in a moment
MOST_ROWS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}  # beyond, a dense product is faster


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
        plain = type(self).values is PackedMatrix.values and wanted.step == 1
        large = self.shape[0] * self.shape[1] >= LARGE
        if plain and large and takes(self, dense) and (native := kernel()) is not None:
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

    def prepared(self, kernel: str = "auto") -> PackedMatrix:
        """Return a matrix of the same values, its tensors shared, on a kernel; see `prepared`."""
        return prepared(self, kernel)

    def fits(self, x: Tensor) -> bool:
        """Whether a kernel multiplies it with x, of which it may have too many rows."""
        return False

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


def prepared(packed: PackedMatrix, name: str = "auto") -> PackedMatrix:
    """Return a matrix of the same values whose `matmul` uses a kernel.

    Parameters
    ----------
    packed : PackedMatrix
    name : "auto", "reference", "c" or "torch"
        "auto": `c` where it takes the matrix, is fast, and there are weights enough to matter, else
        `reference`; `torch` takes more memory.

    Raises
    ------
    ConfigError
        For a kernel that does not take this matrix, or is not to be had here: with the reason.
    """
    if name not in KERNELS:
        raise ConfigError(f"kernel={name!r} is not allowed: it must be one of {', '.join(KERNELS)}")
    plain = PackedMatrix(**_fields(packed)) if isinstance(packed, _OnKernel) else packed
    small = name == "auto" and packed.shape[0] * packed.shape[1] < SMALL
    if name == "reference" or small:
        return plain
    if (why := refusal(plain, name)) and name != "auto":
        raise ConfigError(f"kernel={name} does not take this matrix: {why}")
    kind = TorchPack if name == "torch" else InPlace
    return plain if why else kind(**_fields(plain))


def refusal(packed: PackedMatrix, name: str) -> str:
    """Return why a kernel does not take a matrix, or nothing; "auto" is `c`, if it is fast here."""
    if why := (TorchPack if name == "torch" else InPlace).refuses(packed):
        return why
    slow = name == "auto" and _library().units == "portable"
    return "the kernel knows no vectors of this processor" if slow else ""


def multiply(pairs: Sequence[tuple[PackedMatrix, Tensor]]) -> list[Tensor]:
    """Return x W^T of several matrices in one call: of those on kernel `c` all at once.

    Parameters
    ----------
    pairs : list of (matrix, x)
        x of shape (rows, in).
    """
    looked, at_once = (None, False), []
    for w, x in pairs:
        if looked[0] is not x:  # many matrices, one x
            looked = x, isinstance(w, InPlace) and w.fits(x)
        at_once.append(looked[1] and isinstance(w, InPlace))
    told = [(w.told, x) for (w, x), c in zip(pairs, at_once) if c]  # type: ignore[attr-defined]
    made = iter(_library().products(told) if told else ())
    return [next(made) if c else w.matmul(x) for (w, x), c in zip(pairs, at_once)]


def multiply_stacked(matrices: Sequence[Any], x: Tensor, out: Tensor, rows: Sequence[int]) -> bool:
    """Write x W^T of matrices of one shape into rows of `out`; False: not all of them are on kernel `c`.

    Parameters
    ----------
    x : Tensor, (1, in) or (matrices, in)
        One row for all, or one for each.
    out : Tensor, (any, out)
        Of x's type, contiguous.
    """
    if not (all(type(w) is InPlace for w in matrices) and is_memory(x) and x.dtype in KINDS):
        return False
    _library().stacked([w.told for w in matrices], x, out, rows)
    return True


def _library() -> Kernel:
    it = kernel()
    assert it is not None  # what is on it was made while it was there
    return it


class _OnKernel(PackedMatrix):
    def __getstate__(self) -> dict[str, Any]:
        return _fields(self)  # what a kernel was told holds addresses: a copy has others


class InPlace(_OnKernel):
    """On kernel `c`."""

    @classmethod
    def refuses(cls, packed: PackedMatrix) -> str:
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
        return ""

    @functools.cached_property
    def told(self) -> Told:
        """What the library knows of it."""
        return Told(self)

    def fits(self, x: Tensor) -> bool:
        """Whether x is memory that C reads, of few enough rows."""
        return (x.dtype in KINDS and x.numel() // self.shape[1] <= MOST_ROWS[x.dtype] and is_memory(x))

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out)."""
        if not self.fits(x):
            return super().matmul(x)
        (y,) = _library().products([(self.told, x.reshape(-1, self.shape[1]))])
        return y.view(*x.shape[:-1], self.shape[0])


@dataclass(frozen=True)
class _Torch:
    pack: Tensor
    scales: Tensor


class TorchPack(_OnKernel):
    """On torch's own product of 4 bits, for machines without a compiler; keeps a copy in its order."""

    @classmethod
    def refuses(cls, packed: PackedMatrix) -> str:
        """Return why a matrix cannot be multiplied so, or nothing."""
        plain = type(packed).values is PackedMatrix.values
        if not plain or packed.bits != 4 or packed.group not in (32, 64, 128, 256):
            return "torch multiplies matrices of 4 bits in groups of 32, 64, 128 or 256 columns"
        if packed.shape[0] % 16 or packed.shape[1] % packed.group:
            return f"torch takes whole groups and multiples of 16 rows, not a matrix {packed.shape}"
        return "" if packed.codes.device.type == "cpu" else f"it is on {packed.codes.device}"

    @functools.cached_property
    def _made(self) -> _Torch:
        codes = unpack(self.codes, self.bits, self.shape[1])
        pack = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scale = self.scale.float()
        zero = torch.zeros_like(scale) if self.minimum is None else self.minimum.float() + 8 * scale
        return _Torch(pack, torch.stack([scale.T, zero.T], -1).bfloat16().contiguous())

    @property
    def resident_bytes(self) -> int:
        """Bytes of both."""
        return self.nbytes + sum(t.numel() * t.element_size() for t in (self._made.pack, self._made.scales))

    def fits(self, x: Tensor) -> bool:
        """Whether x is in this machine's memory, of few enough rows."""
        return x.numel() // self.shape[1] <= MOST_ROWS[torch.bfloat16] and is_memory(x)

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out), of x rounded to bfloat16."""
        if not self.fits(x):
            return super().matmul(x)
        made, rows = self._made, x.reshape(-1, self.shape[1])
        y = torch._weight_int4pack_mm_for_cpu(rows.bfloat16(), made.pack, self.group, made.scales)
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])


def _fields(packed: PackedMatrix) -> dict[str, Any]:
    return {f.name: getattr(packed, f.name) for f in fields(PackedMatrix)}
