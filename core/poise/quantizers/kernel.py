"""The C kernel of packed matrices: rows in full, bit for bit those of torch, and products.

Built at the first matrix that is large enough to be worth it; where it cannot be had (no compiler, another
processor's library), `kernel()` is None and torch makes the rows.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from poise.native import Loaded, built, team

SOURCE = Path(__file__).with_name("kernel.c")
LARGE = 1 << 20  # weights below which torch is fast enough
GRAIN = 1 << 18  # weights for each thread below which another one does not pay
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "low")),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "width", "group", "groups", "stride")),
        *((name, ctypes.c_int) for name in ("bits", "wide")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "x", "y")), ("rows", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("x_kind", "y_kind")),
    ]


class Told:
    """What the library is told of a matrix, which it is to multiply many times."""

    def __init__(self, packed: Any) -> None:
        self.matrix = _described(packed, slice(0, packed.shape[0]))
        self.address = ctypes.addressof(self.matrix)
        self.shape = packed.shape


class Kernel:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        self._rows, self._multiplies, self._products = (
            getattr(library, f"poise_{name}") for name in ("rows", "multiplies", "products"))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._rows.argtypes = [pointer, pointer, number, number, pointer]
        self._multiplies.argtypes = [pointer]
        self._products.argtypes = [pointer, number, number, pointer]
        library.poise_units.restype = ctypes.c_char_p
        self.units = library.poise_units().decode()  # vector instructions of products
        self._team = team()
        self.multiplier = ctypes.cast(self._products, ctypes.c_void_p)  # for other C: `packed.h`
        self.seconds = 0.0  # in products so far

    def multiplies(self, packed: Any) -> bool:
        """Whether there are products of a matrix with these groups."""
        told = Told(packed)  # held for as long as C looks at it
        return bool(self._multiplies(told.address))

    def products(self, pairs: Sequence[tuple[Told, Tensor]]) -> list[Tensor]:
        """Return x W^T for each matrix and x (rows, in) of a type in `KINDS`, contiguous."""
        made, told = [], (_Product * len(pairs))()
        for one, (w, x) in zip(told, pairs, strict=True):
            y = x.new_empty((x.shape[0], w.shape[0]))
            kind = KINDS[x.dtype]
            one.matrix, one.x, one.y, one.rows = w.address, x.data_ptr(), y.data_ptr(), x.shape[0]
            one.x_kind = one.y_kind = kind
            made.append(y)
        self._run(told, sum(x.shape[0] * w.shape[0] * w.shape[1] for w, x in pairs))
        return made

    def stacked(self, matrices: Sequence[Told], x: Tensor, out: Tensor, rows: Sequence[int]) -> None:
        """Write x W^T of matrices of one shape into rows of `out`, of x's type, contiguous.

        Parameters
        ----------
        x : Tensor, (1, in) or (matrices, in)
            One row for all, or one for each.
        """
        size, kind = x.element_size(), KINDS[x.dtype]
        from_, to = x.data_ptr(), out.data_ptr()
        apart, wide = size * x.shape[1] if x.shape[0] > 1 else 0, size * out.shape[1]
        told = (_Product * len(matrices))(*(
            (w.address, from_ + n * apart, to + row * wide, 1, kind, kind)
            for n, (w, row) in enumerate(zip(matrices, rows, strict=True))))
        self._run(told, len(matrices) * x.shape[1] * out.shape[1])

    def _run(self, told: Any, work: int) -> None:
        threads = max(1, min(torch.get_num_threads(), work // GRAIN))
        started = time.perf_counter()
        failed = self._products(ctypes.addressof(told), len(told), threads, self._team)
        self.seconds += time.perf_counter() - started
        if failed:
            raise MemoryError("there is no memory for what a product needs")

    def rows(self, packed: Any, rows: slice, out: Tensor) -> None:
        """Write rows of a `PackedMatrix` in full into `out`, (rows, in), contiguous."""
        matrix = _described(packed, rows)
        threads = max(1, min(torch.get_num_threads(), out.numel() // GRAIN))
        failed = self._rows(ctypes.addressof(matrix), out.data_ptr(), KINDS[out.dtype], threads, self._team)
        assert not failed, "there is no memory for a row"


def takes(packed: Any, out: Tensor) -> bool:
    """Whether a matrix and a place for its rows are memory that C reads and writes, of types it knows."""
    if out.dtype not in KINDS or out.dtype != packed.dtype:
        return False
    return all(is_memory(t) for t in (*packed.tensors().values(), out))


def is_memory(t: Tensor) -> bool:
    """Whether a tensor is plain memory that C reads; while torch watches what is done there is none."""
    return (type(t) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and t.device.type == "cpu"
            and t.is_contiguous() and not watched())


def watched() -> bool:
    """Whether torch records or transforms what is done to tensors: what C does, it would not see.

    Compiling, exporting, tracing (also by a dispatch mode: make_fx, a counter of operations), forward
    differentiation and torch.func's transforms.
    """
    return (torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0
            or torch._C._functorch.maybe_current_level() is not None)


_LOADED = Loaded(lambda: Kernel(built(SOURCE, "quantizers")))


def kernel() -> Kernel | None:
    """Return the kernel, built at the first call; None where it cannot be had."""
    return _LOADED.get()


def seconds() -> float:
    """Return the time that products have taken in this process."""
    it = _LOADED.made()
    return it.seconds if it is not None else 0.0


def status() -> str:
    """Return one line for people: where the kernel is, or why there is none."""
    it = kernel()
    return f"C kernel, {it.path}" if it is not None else f"torch, no C kernel: {_LOADED.why}"


def _described(packed: Any, rows: slice) -> _Matrix:
    """Return what the library is told of some rows, one after the other."""
    codes, scale, low, (_, columns) = packed.codes, packed.scale, packed.minimum, packed.shape
    one = packed.group == -1  # scale of the whole tensor
    group = columns if packed.group <= 0 or packed.group >= columns else packed.group
    groups = -(-columns // group)
    at = 0 if one else rows.start * groups * scale.element_size()
    return _Matrix(
        codes.data_ptr() + rows.start * codes.shape[1], scale.data_ptr() + at,
        None if low is None else low.data_ptr() + at, rows.stop - rows.start, columns, codes.shape[1],
        group, groups, 0 if one else groups, packed.bits, scale.dtype == torch.float32)
