"""A matrix that is never in full when it is multiplied, and the kernels that multiply it, by name.

| kernel | takes | x | error, as a share of |row of W| |x| |
|---|---|---|---|
| `reference` | every matrix, slices of which it makes in full | as it is | that of adding |
| `c` | codes in groups, the bytes as they lie | 16 bits, a scale for 4 to 16 columns | 2e-5 |
| `torch` | 4 bits in groups, a copy in torch's order, made once | bfloat16, scales too | 1e-2 |
| `ggml` | ggml's blocks, as they lie | 8 bits, a scale for 32 or 256 columns | 2.3e-2, of K blocks 6.4e-2 |

What a kernel makes of a row of x does not depend on the rows beside it nor on the number of threads. The
error of `ggml` is a bound that no x passes; of a row of random numbers it is near 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from poise.errors import ConfigError
from poise.quantizers.kernel import is_memory
from poise.quantizers.names import KERNELS

PIECE = 1 << 16  # weights unpacked at a time: larger pieces are left scattered by the allocator
SLICE_WEIGHTS = 1 << 18  # weights dequantized at a time: 1 MiB of fp32 stays in cache
SMALL = 1 << 16  # weights that torch unpacks in a moment
MOST_ROWS = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 16}  # beyond, a dense product is faster
Pairs = Sequence[tuple[Any, Tensor]]


class SlicedMatrix:
    """What matrices (out, in) of packed bytes have in common: a dataclass says its fields.

    A subclass gives `tensors` and `_some`; on a kernel it is one of `kernels()`.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    called: ClassVar[str] = "such a matrix"
    """What a message calls it."""
    together: ClassVar[Callable[[Pairs], list[Tensor]] | None] = None
    """Multiplies many (matrix, x) that fit at once; of one on a kernel."""

    @classmethod
    def kernels(cls) -> Mapping[str, type[Any]]:
        """Return what such a matrix is on a kernel, by the kernel's name; the first is that of "auto"."""
        return {}

    @classmethod
    def refuses(cls, packed: Any, *, auto: bool = False) -> str:
        """Return why a matrix cannot be multiplied by this kernel (with `auto`: should not), or nothing."""
        return ""

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name."""
        raise NotImplementedError

    def _some(self, rows: slice) -> Tensor:
        """Return some rows, fp32."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """True size in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def resident_bytes(self) -> int:
        """Bytes that it takes in memory: those of its tensors, unless a kernel keeps something."""
        return self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """Return rows (all without it) as a dense tensor, shape (len(rows), in).

        Made some rows at a time: beside the result no more than a few MiB are taken.
        """
        wanted = range(self.shape[0])[rows or slice(None)]
        first = next(iter(self.tensors().values()))
        dense = first.new_empty((len(wanted), self.shape[1]), dtype=self.dtype)
        self._write(wanted, dense)
        return dense

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Write all rows into a contiguous tensor of the matrix's shape and type, and return it."""
        self._write(range(self.shape[0]), out)
        return out

    def _write(self, wanted: range, dense: Tensor) -> None:
        step = max(1, PIECE // self.shape[1])
        for at in range(0, len(wanted), step):
            part = wanted[at: at + step]
            dense[at: at + step] = self._some(slice(part.start, part.stop, part.step))

    def prepared(self, kernel: str = "auto") -> Any:
        """Return a matrix of the same values, its tensors shared, on a kernel; see `prepared`."""
        return prepared(self, kernel)

    def plain(self) -> Self:
        """Return the matrix on no kernel."""
        return self

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


class OnKernel(SlicedMatrix):
    """Before a `SlicedMatrix` of a kind: one on a kernel, of which a copy is told anew where things lie."""

    plain_type: ClassVar[type[Any]]
    most_rows: ClassVar[Mapping[torch.dtype, int]] = MOST_ROWS
    """Of x, by its type; others are not taken."""

    def fits(self, x: Tensor) -> bool:
        """Whether x is memory that C reads, as wide as the matrix, of few enough rows."""
        return (x.ndim > 0 and x.shape[-1] == self.shape[1] and is_memory(x)
                and x.numel() <= self.most_rows.get(x.dtype, -1) * self.shape[1])

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out)."""
        if not self.fits(x):
            return super().matmul(x)
        together = type(self).together
        assert together is not None
        (y,) = together([(self, x.reshape(-1, self.shape[1]))])
        return y.view(*x.shape[:-1], self.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return values_of(self, self.plain_type)

    def plain(self) -> Any:
        """Return the matrix on no kernel."""
        return self.plain_type(**values_of(self, self.plain_type))


def values_of(packed: Any, kind: type[Any]) -> dict[str, Any]:
    """Return a matrix's fields, those of a dataclass."""
    return {f.name: getattr(packed, f.name) for f in fields(kind)}


def prepared(packed: Any, name: str = "auto") -> Any:
    """Return a matrix of the same values whose `matmul` uses a kernel.

    Parameters
    ----------
    packed : SlicedMatrix
    name : "auto", "reference", "c", "torch" or "ggml"
        "auto": `c` or `ggml` where it takes the matrix, is fast, and there are weights enough to matter,
        else `reference`; `torch` takes more memory.

    Raises
    ------
    ConfigError
        For a kernel that does not take this matrix, or is not to be had here: with the reason.
    """
    if name not in KERNELS:
        raise ConfigError(f"kernel={name!r} is not allowed: it must be one of {', '.join(KERNELS)}")
    plain = packed.plain()
    small = name == "auto" and packed.shape[0] * packed.shape[1] < SMALL
    if name == "reference" or small:
        return plain
    if (why := refusal(plain, name)) and name != "auto":
        raise ConfigError(f"kernel={name} does not take this matrix: {why}")
    return plain if why else on_kernel(plain, name)


def on_kernel(plain: Any, name: str) -> Any:
    """Return a matrix on a kernel that takes it, which nothing looks at again."""
    kinds = plain.kernels()
    kind = kinds[next(iter(kinds)) if name == "auto" else name]
    return kind(**values_of(plain, kind.plain_type))


def refusal(packed: Any, name: str) -> str:
    """Return why a kernel does not take a matrix, or nothing; "auto" is the first, if it is fast here."""
    kinds = packed.kernels()
    if not kinds:
        return f"no kernel multiplies {packed.called}"
    if name != "auto" and name not in kinds:
        return f"{packed.called} are multiplied by {' or '.join(kinds)}"
    kind = kinds[next(iter(kinds)) if name == "auto" else name]
    return kind.refuses(packed, auto=name == "auto")


def multiply(pairs: Pairs) -> list[Tensor]:
    """Return x W^T of several matrices, of those on one kernel in one call, where it has one.

    Parameters
    ----------
    pairs : list of (matrix, x)
        x of shape (rows, in).
    """
    looked: tuple[Any, Any, int, bool] = (None, None, 0, False)
    made: list[Any] = [None] * len(pairs)
    groups: dict[Any, list[int]] = {}
    for n, (w, x) in enumerate(pairs):
        if looked[:3] != (id(x), w.together, w.shape[1]):  # many matrices, one x
            looked = id(x), w.together, w.shape[1], w.together is not None and w.fits(x)
        if looked[3]:
            groups.setdefault(w.together, []).append(n)
        else:
            made[n] = w.matmul(x)
    for together, chosen in groups.items():
        for n, y in zip(chosen, together([pairs[n] for n in chosen]), strict=True):
            made[n] = y
    return made
