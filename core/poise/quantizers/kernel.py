"""The C kernel of packed matrices: rows in full, bit for bit those that torch makes, in one pass.

Built at the first matrix that is large enough to be worth it; where it cannot be had (no compiler, another
processor's library), `kernel()` is None and torch makes the rows.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.native import FAILURES, built, team

SOURCE = Path(__file__).with_name("kernel.c")
LARGE = 1 << 20  # weights below which torch is fast enough
GRAIN = 1 << 18  # weights for each thread below which another one does not pay
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_lock = threading.Lock()
_found: dict[str, Any] = {}


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "low")),
        *((name, ctypes.c_size_t) for name in ("rows", "columns", "width", "group", "groups", "stride")),
        *((name, ctypes.c_int) for name in ("bits", "wide")),
    ]


class Kernel:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = ctypes.CDLL(str(path)).poise_rows
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._rows.argtypes = [pointer, pointer, number, number, pointer]
        self._team = team()

    def rows(self, packed: Any, rows: slice, out: Tensor) -> None:
        """Write rows of a `PackedMatrix` in full into `out`, (rows, in), contiguous."""
        matrix = _described(packed, rows)
        threads = max(1, min(torch.get_num_threads(), out.numel() // GRAIN))
        failed = self._rows(ctypes.addressof(matrix), out.data_ptr(), KINDS[out.dtype], threads, self._team)
        assert not failed, "there is no memory for a row"


def takes(packed: Any, out: Tensor) -> bool:
    """Whether a matrix and a place for its rows are real memory that C reads and writes, of types it knows.

    While a program is traced or compiled there is none: tensors are then of classes of their own.
    """
    if torch.compiler.is_compiling() or out.dtype not in KINDS or out.dtype != packed.dtype:
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter, torch.nn.Buffer) and t.device.type == "cpu"
               and t.is_contiguous() for t in (*packed.tensors().values(), out))


def kernel() -> Kernel | None:
    """Return the kernel, built at the first call; None where it cannot be had."""
    if "it" not in _found:
        with _lock:
            if "it" not in _found:
                try:
                    _found["it"] = Kernel(built(SOURCE, "quantizers"))
                except FAILURES as error:
                    _found.update(it=None, why=str(error))
    return _found["it"]


def status() -> str:
    """Return one line for people: where the kernel is, or why there is none."""
    it = kernel()
    return f"C kernel, {it.path}" if it is not None else f"torch, no C kernel: {_found['why']}"


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
