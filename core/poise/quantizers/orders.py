"""Matrices whose bytes lie as a kernel reads them: the same values, in as many bytes, in another order.

| order | of | read by |
|---|---|---|
| `torch` | codes of 4 bits, as torch packs them for this processor | torch's product, without a copy |
| `ggml` | blocks of q4_0, 8 rows interleaved, 8 bytes of each in turn | ggml's product of 8 rows |

A tag says the order. Torch's depends on the processor and is torch's own affair: it is found by packing
known numbers, and its tag holds a checksum of them packed, so that another order is never read as this one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import ConfigError
from poise.quantizers import ggml
from poise.quantizers.blocks import BlockMatrix, OnGgml
from poise.quantizers.matrix import PackedMatrix, TorchPack
from poise.quantizers.packing import unpack
from poise.quantizers.sliced import SlicedMatrix, values_of

GGML_TAG = "ggml:q4_0:8x8"
TRIED = (16, 32, 64, 128)  # rows that torch may pack together
EIGHT, SIGNS = 8, 0x88  # rows that ggml interleaves; it stores codes with a sign
AT_ONCE = 1 << 20  # weights brought into plain order at a time
HERE = "layout=plain is read on every machine"
UNKNOWN = f"layout=torch cannot be used: torch {torch.__version__} packs in an unknown order; {HERE}"


# ------------------------------------------------------------------ torch's order of 4 bits


def _packed(codes: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1).view(codes.shape[0], -1)


@cache
def _together() -> int:
    """Return how many rows torch packs together; raises `ConfigError` where no number explains it."""
    codes = torch.randint(0, 16, (2 * TRIED[-1], 32), generator=torch.Generator().manual_seed(0))
    whole = _packed(codes)
    for rows in TRIED:
        if torch.equal(whole, torch.cat([_packed(part) for part in codes.split(rows)])):
            return rows
    raise ConfigError(UNKNOWN)


@cache
def _order(rows: int) -> Tensor:
    """Return the rows whose codes follow each other in a column of a pack of so many rows."""
    number = torch.arange(rows)[:, None].expand(-1, 32)
    low, high = (_nibbles(_packed(digit), rows)[0] for digit in (number % 16, number // 16))
    return low.long() + 16 * high.long()


def _nibbles(octets: Tensor, rows: int) -> Tensor:
    """Return the codes (in, rows) of a pack, in its order."""
    return unpack(octets.reshape(-1, rows // 2), 4, rows)


@cache
def torch_tag() -> str:
    """Return the tag of torch's order here."""
    whole = _packed(torch.arange(80)[:, None].add(torch.arange(32)).remainder(16))
    checksum = zlib.crc32(whole.numpy().tobytes())
    return f"torch:{torch.backends.cpu.get_cpu_capability().lower()}:{checksum:08x}"


# ------------------------------------------------------------------ matrices in an order


class _Ordered(SlicedMatrix):
    def together_rows(self) -> int:
        """Return how many rows lie together."""
        raise NotImplementedError

    def _restored(self, first: int, last: int) -> Any:
        """Return rows as a plain matrix; `first` begins rows that lie together, `last` ends some."""
        raise NotImplementedError

    def _write(self, wanted: range, dense: Tensor) -> None:
        if wanted.step != 1:
            between = dense.new_empty((max(0, wanted.stop - wanted.start), self.shape[1]))
            self._write(range(wanted.start, wanted.stop), between)
            dense.copy_(between[:: wanted.step])
            return
        rows = self.together_rows()
        step = max(1, AT_ONCE // (rows * self.shape[1])) * rows
        for at in range(wanted.start // rows * rows, wanted.stop, step):
            first, last = max(at, wanted.start), min(at + step, wanted.stop)
            own = self._restored(at, min(at + step, self.shape[0])).dequantize(slice(first - at, last - at))
            dense[first - wanted.start : last - wanted.start] = own


class TorchOrdered(_Ordered, PackedMatrix):
    """Codes of 4 bits in torch's order; scales and minima as ever."""

    called: ClassVar[str] = "codes in torch's order"

    @classmethod
    def kernels(cls) -> Mapping[str, type[Any]]:
        """Return what it is on a kernel."""
        return {"torch": OnTorch}

    def together_rows(self) -> int:
        """Return how many rows torch packs together."""
        return _together()

    def _restored(self, first: int, last: int) -> PackedMatrix:
        rest, columns = (last - first) % self.together_rows(), self.shape[1]
        whole, other = self.codes[first:last].split([last - first - rest, rest])
        packs = ((whole, self.together_rows()), (other, rest))
        parts = [_plain(octets.view(-1, rows, columns // 2), rows) for octets, rows in packs if len(octets)]
        low = None if self.minimum is None else self.minimum[first:last]
        shape = (last - first, columns)
        return PackedMatrix(torch.cat(parts), self.scale[first:last], low, 4, self.group, shape, self.dtype)


def _plain(packs: Tensor, rows: int) -> Tensor:
    """Return codes (n rows, in / 2) in plain order of n packs of so many rows."""
    nibbles = _nibbles(packs, rows).view(len(packs), -1, rows).transpose(1, 2)
    codes = torch.empty_like(nibbles, memory_format=torch.contiguous_format)
    codes[:, _order(rows)] = nibbles
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).flatten(0, 1)


class OnTorch(TorchOrdered, TorchPack):
    """On torch's product, of the codes as they lie."""

    plain_type: ClassVar[type[Any]] = TorchOrdered

    def _pack(self) -> Tensor:
        return self.codes

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tensors, and of the scales as torch takes them."""
        return self.nbytes + self._made.scales.numel() * 2


class Interleaved(_Ordered, BlockMatrix):
    """Blocks of q4_0, those of 8 rows interleaved."""

    called: ClassVar[str] = "interleaved blocks"

    @classmethod
    def kernels(cls) -> Mapping[str, type[Any]]:
        """Return what it is on a kernel."""
        return {"ggml": OnEight}

    def together_rows(self) -> int:
        """Return how many rows lie interleaved."""
        return EIGHT

    def _restored(self, first: int, last: int) -> BlockMatrix:
        count = self.blocks.shape[1] // 18
        whole = self.blocks[first:last].reshape(-1, count, EIGHT * 18)
        d = whole[..., : 2 * EIGHT].view(-1, count, EIGHT, 2).transpose(1, 2)
        codes = (whole[..., 2 * EIGHT :] ^ SIGNS).view(-1, count, 2, EIGHT, 8).permute(0, 3, 1, 2, 4)
        blocks = torch.cat([d, codes.flatten(3)], -1).reshape(last - first, -1)
        return BlockMatrix(blocks, self.form, (last - first, self.shape[1]), self.dtype)


def _interleaved(blocks: Tensor) -> Tensor:
    """Return blocks of q4_0 (rows, bytes), those of 8 rows interleaved."""
    count = blocks.shape[1] // 18
    whole = blocks.reshape(-1, EIGHT, count, 18)
    d = whole[..., :2].transpose(1, 2).reshape(-1, count, 2 * EIGHT)
    codes = whole[..., 2:].view(-1, EIGHT, count, 2, 8).permute(0, 2, 3, 1, 4) ^ SIGNS
    return torch.cat([d, codes.reshape(-1, count, 16 * EIGHT)], -1).view(blocks.shape)


class OnEight(Interleaved, OnGgml):
    """On ggml's product of 8 interleaved rows."""

    plain_type: ClassVar[type[Any]] = Interleaved

    @classmethod
    def refuses(cls, packed: Any, *, auto: bool = False) -> str:
        """Return why a matrix cannot be multiplied so, or nothing."""
        why, it = OnGgml.refuses(packed, auto=auto), ggml.library()
        lacks = not why and it is not None and it.gemv is None
        return f"ggml {it.version} lacks {ggml.GEMV}" if lacks and it is not None else why

    def _several(self, library: ggml.Ggml) -> int | None:
        return library.gemv


# ------------------------------------------------------------------ by name, by tag


def arranged(packed: Any, layout: str) -> tuple[Any, str]:
    """Return a matrix of the same values in a kernel's order, and the tag of that order.

    Parameters
    ----------
    packed : PackedMatrix or BlockMatrix
    layout : "torch" or "ggml"

    Raises
    ------
    ConfigError
        For a matrix that the kernel does not take.
    """
    if layout == "torch":
        grouped = type(packed) is PackedMatrix
        if why := TorchPack.refuses(packed) if grouped else "it holds no codes in groups":
            raise ConfigError(f"layout=torch does not take this matrix: {why}; {HERE}")
        made = ordered(packed, torch_tag(), _packed(unpack(packed.codes, 4, packed.shape[1])))
        if not torch.equal(made.dequantize(), packed.dequantize()):
            raise ConfigError(UNKNOWN)
        return made, torch_tag()
    if not interleaves(packed):
        raise ConfigError(f"layout=ggml does not take this matrix {packed.shape}: it interleaves blocks of "
                          f"q4_0, {EIGHT} rows at a time; {HERE}")
    return ordered(packed, GGML_TAG, _interleaved(packed.blocks)), GGML_TAG


def interleaves(packed: Any) -> bool:
    """Return whether rows of a matrix can be interleaved."""
    return type(packed) is BlockMatrix and packed.form == "q4_0" and packed.shape[0] % EIGHT == 0


def ordered(packed: Any, tag: str, octets: Tensor | None = None) -> Any:
    """Return a matrix whose bytes (its own, or these) lie in the order of a tag."""
    kind, name = (Interleaved, "blocks") if tag == GGML_TAG else (TorchOrdered, "codes")
    values = values_of(packed, kind)
    return kind(**values if octets is None else {**values, name: octets})


def unreadable(tag: str) -> str:
    """Return why bytes in the order of a tag cannot be read here, or nothing."""
    if tag == GGML_TAG or (tag.startswith("torch:") and tag == torch_tag()):
        return ""
    here = f"this machine's is {torch_tag()}" if tag.startswith("torch:") else "it is not known here"
    return f"its matrices lie in the order {tag}, and {here}: convert the model again here; {HERE}"
