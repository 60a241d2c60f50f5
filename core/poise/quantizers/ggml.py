"""ggml's library, of the package `libggml-python`: its search for codes, and its products of blocks.

It is taken if it has what is needed, was built for what this processor can do, and makes of known numbers
what the reference makes of them (`formats`); its version is said, not asked for.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.errors import MissingExtra
from poise.native import Loaded, built, processor_flags, team
from poise.quantizers.formats import FORMATS, Format
from poise.quantizers.kernel import GRAIN, KINDS

SOURCE = Path(__file__).with_name("ggml.c")
TESTED = "0.20.2"
EXTRA = "pip install 'poise[ggml]'"
Q8_0, Q8_K = 8, 15  # ggml's numbers of what x is rounded to
ROUNDED = {Q8_0: (32, 34), Q8_K: (256, 292)}  # columns and bytes of a block
GEMV = "ggml_gemv_q4_0_8x8_q8_0"  # of 8 interleaved rows
NEEDS = {"avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi2": "bmi2", "avx_vnni": "avx_vnni",
         "avx512": "avx512f", "avx512_vnni": "avx512_vnni", "avx512_vbmi": "avx512_vbmi",
         "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8"}  # ggml's names of instructions, and Linux's


class _Traits(ctypes.Structure):
    _fields_ = [("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p),
                ("vec_dot_type", ctypes.c_int), ("rows", ctypes.c_int64)]


class _Matrix(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("blocks", "round", "one", "several")),
                *((n, ctypes.c_size_t) for n in ("rows", "columns", "whole", "width", "rounded"))]


class _Product(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("matrix", "x", "y")), ("rows", ctypes.c_size_t),
                ("kind", ctypes.c_int)]


class _Full(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("blocks", "widen", "out")),
                *((n, ctypes.c_size_t) for n in ("rows", "columns", "whole", "width", "next")),
                ("kind", ctypes.c_int), ("failed", ctypes.c_int)]


class Told:
    """What the loop is told of a matrix of blocks, which it is to multiply many times."""

    def __init__(
        self, it: Kernel, form: Format, blocks: Tensor, shape: tuple[int, int], several: int | None
    ) -> None:
        dot, rounding, number = it.ggml.functions[form.name]
        whole = -(-shape[1] // form.columns) * form.columns
        columns, nbytes = ROUNDED[number]
        self.matrix = _Matrix(blocks.data_ptr(), rounding, dot, several, *shape, whole, form.width(whole),
                              whole // columns * nbytes)
        self.address, self.shape = ctypes.addressof(self.matrix), shape


class Ggml:
    """The loaded library.

    Attributes
    ----------
    version : str
    functions : dict
        Of each format: product of two rows, rounding of x, ggml's number of what x is rounded to.
    widen : dict
        What makes blocks of a format full, where that is bit for bit what the reference makes.
    gemv : int or None
        Product of interleaved rows of q4_0.
    """

    def __init__(self, folder: Path) -> None:
        base, cpu = (ctypes.CDLL(str(_library_file(folder, name))) for name in ("ggml-base", "ggml-cpu"))
        base.ggml_version.restype = base.ggml_type_name.restype = ctypes.c_char_p
        base.ggml_type_size.restype = base.ggml_quantize_chunk.restype = ctypes.c_size_t
        base.ggml_blck_size.restype = ctypes.c_int64
        self.version = base.ggml_version().decode()
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._quantize = base.ggml_quantize_chunk
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        for form in FORMATS.values():
            self._check(base, form.number, form.name, (form.columns, form.nbytes))
        for number, said in ROUNDED.items():
            self._check(base, number, {Q8_0: "q8_0", Q8_K: "q8_k"}[number], said)
        self._check_processor(cpu)
        cpu.ggml_cpu_init()
        cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)
        self.functions = {name: _functions(cpu, form) for name, form in FORMATS.items()}
        self.gemv = _address(cpu, GEMV)
        full = {name: _address(base, f"dequantize_row_{name.replace('k', 'K')}") for name in FORMATS}
        self.widen = {name: address for name, address in full.items() if address is not None}
        self._try()

    def quantize(self, form: Format, values: Tensor) -> Tensor:
        """Return the bytes (rows, width) of fp32 (rows, whole blocks), contiguous."""
        rows, columns = values.shape
        made = torch.zeros(rows, form.width(columns), dtype=torch.uint8)
        self._quantize(form.number, values.data_ptr(), made.data_ptr(), 0, rows, columns, None)
        return made

    @staticmethod
    def _check(base: Any, number: int, name: str, said: tuple[int, int]) -> None:
        there = base.ggml_type_name(number), (base.ggml_blck_size(number), base.ggml_type_size(number))
        if (there[0] or b"").decode().lower() != name or there[1] != said:
            raise RuntimeError(f"its type {number} is {there}, not {name} of {said} columns and bytes")

    @staticmethod
    def _check_processor(cpu: Any) -> None:
        flags = processor_flags()
        asked = {name: getattr(cpu, f"ggml_cpu_has_{name}", lambda: 0)() for name in NEEDS}
        if lost := [name for name, built_for in asked.items() if built_for and NEEDS[name] not in flags]:
            raise RuntimeError(f"it was built for processors with {', '.join(lost)}")

    def _try(self) -> None:
        """Refuse a library that makes other bytes, or other products, than the reference."""
        values = torch.linspace(-3, 3, 1024).view(4, 256).sin()
        for form in FORMATS.values():
            made = self.quantize(form, values)
            own = form.blocks and form.blocks(values.view(-1, form.columns)).view(4, -1)
            if own is not None and not torch.equal(own, made):
                raise RuntimeError(f"it makes other blocks of {form.name}")
            full = form.decoded(made, 256)
            if form.name in self.widen and not torch.equal(self._full(form, made), full):
                del self.widen[form.name]
            got, want = self._dot(form, made[0], values[1]), full[0] @ values[1]
            if not abs(got - float(want)) < 0.05 * float(values[0].norm() * values[1].norm()):
                raise RuntimeError(f"it makes other products of {form.name}")

    def _full(self, form: Format, octets: Tensor) -> Tensor:
        made = torch.zeros(len(octets), octets.shape[1] // form.nbytes * form.columns)
        _ROUND(self.widen[form.name])(octets.data_ptr(), made.data_ptr(), made.numel())
        return made

    def _dot(self, form: Format, row: Tensor, x: Tensor) -> float:
        dot, rounding, number = self.functions[form.name]
        columns, nbytes = ROUNDED[number]
        codes, y = torch.zeros(len(x) // columns * nbytes, dtype=torch.uint8), torch.zeros(1)
        _ROUND(rounding)(x.data_ptr(), codes.data_ptr(), len(x))
        _DOT(dot)(len(x), y.data_ptr(), 0, row.data_ptr(), 0, codes.data_ptr(), 0, 1)
        return float(y)


_ROUND = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_DOT = ctypes.CFUNCTYPE(None, ctypes.c_int, *(3 * (ctypes.c_void_p, ctypes.c_size_t)), ctypes.c_int)


def _library_file(folder: Path, name: str) -> Path:
    found = sorted(p for end in ("so", "dylib") for p in folder.glob(f"lib*/lib{name}.{end}"))
    if not found:
        raise RuntimeError(f"{folder} holds no lib{name}")
    return found[0]


def _functions(cpu: Any, form: Format) -> tuple[int, int, int]:
    """Return product, rounding and what is rounded to, as the library's own table has them."""
    said = cpu.ggml_get_type_traits_cpu(form.number)[0]
    number = said.vec_dot_type
    if number not in ROUNDED or said.vec_dot != _address(cpu, _dot_name(form, number)):
        raise RuntimeError(f"its table of products has another form ({form.name})")
    return said.vec_dot, cpu.ggml_get_type_traits_cpu(number)[0].from_float, number


def _dot_name(form: Format, number: int) -> str:
    return f"ggml_vec_dot_{form.name.replace('k', 'K')}_{'q8_0' if number == Q8_0 else 'q8_K'}"


def _address(library: Any, name: str) -> int | None:
    found = getattr(library, name, None)
    return None if found is None else ctypes.cast(found, ctypes.c_void_p).value


class Kernel:
    """The loop over rows, and the library whose functions it calls."""

    def __init__(self, ggml: Ggml, path: Path) -> None:
        self.ggml, self.path = ggml, path
        loop = ctypes.CDLL(str(path))
        self._products, self._rows = loop.poise_ggml_products, loop.poise_ggml_rows
        self._products.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        self._rows.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        self._team = team()
        self.seconds = 0.0  # in products so far

    def products(self, pairs: Sequence[tuple[Told, Tensor]]) -> list[Tensor]:
        """Return x W^T for each matrix and x (rows, in) of a type in `KINDS`, contiguous."""
        made, told = [], (_Product * len(pairs))()
        for one, (w, x) in zip(told, pairs, strict=True):
            y = x.new_empty((x.shape[0], w.shape[0]))
            one.matrix, one.x, one.y, one.rows = w.address, x.data_ptr(), y.data_ptr(), x.shape[0]
            one.kind = KINDS[x.dtype]
            made.append(y)
        work = sum(x.shape[0] * w.shape[0] * w.shape[1] for w, x in pairs)
        threads = max(1, min(torch.get_num_threads(), work // GRAIN))
        started = time.perf_counter()
        failed = self._products(ctypes.addressof(told), len(pairs), threads, self._team)
        self.seconds += time.perf_counter() - started
        if failed:
            raise MemoryError("there is no memory for what a product needs")
        return made

    def rows(self, form: Format, blocks: Tensor, out: Tensor) -> None:
        """Write bytes of rows in full into `out`, (rows, in), of a type in `KINDS`; both contiguous."""
        whole = blocks.shape[1] // form.nbytes * form.columns
        told = _Full(blocks.data_ptr(), self.ggml.widen[form.name], out.data_ptr(), *out.shape, whole,
                     blocks.shape[1], 0, KINDS[out.dtype], 0)
        threads = max(1, min(torch.get_num_threads(), out.numel() // GRAIN))
        if self._rows(ctypes.addressof(told), threads, self._team):
            raise MemoryError("there is no memory for a row")


def _load() -> Ggml:
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"libggml-python is not installed: {EXTRA}")
    return Ggml(Path(next(iter(spec.submodule_search_locations))))


def _build() -> Kernel:
    if (ggml := library()) is None:
        raise RuntimeError(_LIBRARY.why)
    return Kernel(ggml, built(SOURCE, "quantizers", ["-lm"]))


_LIBRARY, _KERNEL = Loaded(_load), Loaded(_build)


def library() -> Ggml | None:
    """Return the library, loaded and tried at the first call; None where it cannot be had (`status`)."""
    return _LIBRARY.get()


def kernel() -> Kernel | None:
    """Return library and loop, built at the first call; None where they cannot be had."""
    return _KERNEL.get()


def status() -> str:
    """Return one line for people: which ggml there is, or why none is used."""
    it = kernel()
    if it is None:
        return f"no ggml kernel: {_KERNEL.why}"
    other = "" if it.ggml.version == TESTED else f" (tested: {TESTED})"
    return f"ggml {it.ggml.version}{other}, {it.path}"


def seconds() -> float:
    """Return the time that products have taken in this process."""
    it = _KERNEL.made()
    return it.seconds if it is not None else 0.0


def searched(form: Format, values: Tensor) -> Tensor:
    """Return the bytes of a format whose codes ggml searches for.

    Raises
    ------
    MissingExtra
        Where ggml's library is not to be had.
    """
    it = library()
    if it is None:
        why = _LIBRARY.why
        more = "" if EXTRA in why else f" (another version? tested: {TESTED}; {EXTRA})"
        raise MissingExtra(f"{form.name} is made by ggml, which is not to be had: {why}{more}")
    return it.quantize(form, values)
