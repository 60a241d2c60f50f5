"""How one matrix is stored: the paper's schemes, ggml's formats, any registered quantizer, or as it is.

Source: EdgeMoE section III-B names a linear quantizer with one scale for each channel (`sym_channel`); the
others store a minimum too, or a scale for each group of columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, DataError, FileError, nearest
from poise.options import options_of
from poise.registry import build, entries
from poise_edgemoe.store.layouts import Laid, laid
from poise_edgemoe.store.planes import Planed, in_planes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCHEMES = {  # name: quantizer, whether it has groups
    "sym_channel": ("absmax", False), "asym_channel": ("affine", False),
    "sym_group": ("absmax", True), "asym_group": ("affine", True),
}
BLOCKS = {"q8_0": 8, "q4_0": 4, "q4_k": 4, "q3_k": 3, "q2_k": 2}  # ggml's formats, and their bits
HOTS = ("bf16", "raw", "8", "4", *BLOCKS)  # how all else is stored, by name
RAW = {16: "bfloat16", 32: "float32"}  # bits that mean: not quantized
WIDTHS = (2, 3, 4, 8, *RAW)


@dataclass(frozen=True)
class RawMatrix:
    """A matrix as it is."""

    weight: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """Return output rows."""
        return (self.weight if rows is None else self.weight[rows]).to(self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the matrix by name."""
        return {"weight": self.weight}


@dataclass(frozen=True)
class Raw:
    """Stores a matrix as it is, or rounded to a type; has what a store needs of a quantizer."""

    kind: str = "float32"

    @property
    def bits(self) -> int:
        """Of one weight."""
        return 8 * self._dtype.itemsize

    @property
    def _dtype(self) -> Any:
        import torch

        return getattr(torch, self.kind)

    def quantize(self, weight: Tensor) -> RawMatrix:
        """Return the matrix in the type; NaN and Inf are refused."""
        rounded = weight.to(self._dtype)
        if not rounded.isfinite().all():
            raise DataError(f"holds NaN or Inf (as {self.kind}): a store holds finite numbers")
        return RawMatrix(rounded, weight.dtype)

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return the one tensor that is stored."""
        return {"weight": (tuple(shape), self._dtype)}

    def from_tensors(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> RawMatrix:
        """Return what was stored, a view."""
        return RawMatrix(tensors["weight"], dtype)


def scheme_quantizer(scheme: str, bits: int, group: int) -> Any:
    """Return what stores a matrix under a scheme at some bits.

    Raises
    ------
    ConfigError
        For an unknown scheme, bits that it does not have, or a group that is none.
    """
    if bits in RAW:
        return Raw(RAW[bits])
    if scheme in SCHEMES:
        name, grouped = SCHEMES[scheme]
        if grouped and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
            raise ConfigError(f"group={group!r} is not allowed in {scheme}: it must be >= 1 columns")
        _check_bits(bits)
        return build("quantizer", name, bits=bits, group=group if grouped else 0)
    known = [*SCHEMES, *(e.name for e in entries("quantizer"))]
    if scheme not in known:
        raise ConfigError(f"scheme={scheme!r} is not allowed{nearest(scheme, known)} (have: "
                          f"{', '.join(known)})")
    return build("quantizer", scheme).at(bits)


def bits_of(scheme: str, bits: int | None) -> int:
    """Return bits that were given, or else those that a scheme has: 4, or a format's own."""
    return BLOCKS.get(scheme, 4) if bits is None else bits


def _check_bits(bits: Any) -> None:
    if bits not in WIDTHS or isinstance(bits, bool):
        raise ConfigError(f"bits={bits!r} is not allowed: it must be one of {', '.join(map(str, WIDTHS))}")


def stored(quantizer: Any, matrix: Tensor) -> tuple[Any, Any]:
    """Return the quantizer that was used and what it made; scales that fp16 does not hold are kept in fp32.

    Raises
    ------
    DataError
        For NaN and Inf.
    """
    if hasattr(quantizer, "stored"):  # chooses scales for a plain one (`rounding.Weighted`)
        return quantizer.stored(matrix)
    try:
        return quantizer, quantizer.quantize(matrix)
    except DataError:
        if getattr(quantizer, "scale_dtype", "") != "float16" or not matrix.isfinite().all():
            raise
        wider = dataclasses.replace(quantizer, scale_dtype="float32")
        return wider, wider.quantize(matrix)


def written(quantizer: Any) -> dict[str, Any]:
    """Return what the index says of a quantizer: its registered name and options.

    Raises
    ------
    ConfigError
        For one that is not registered: nothing could read the store.
    """
    if isinstance(quantizer, Raw):
        return {"entry": "raw", "kind": quantizer.kind, "bits": quantizer.bits}
    if hasattr(quantizer, "plain"):  # of which it chooses the scales (`rounding.Weighted`)
        return written(quantizer.plain)
    if isinstance(quantizer, Planed):
        return {**written(quantizer.quantizer), "planes": 2}
    if isinstance(quantizer, Laid):
        return {**written(quantizer.quantizer), "layout": quantizer.tag}
    for entry in entries("quantizer"):
        if entry.load() is type(quantizer):
            return {"entry": entry.name, **options_of(quantizer)}
    raise ConfigError(f"{type(quantizer).__name__} is no registered quantizer: a "
                      f"store names what can read it")


def read_quantizer(said: Any, where: str) -> Any:
    """Return the quantizer that an index names.

    Raises
    ------
    FileError
        For what is not installed here, options that it does not take, or the byte order of another machine.
    """
    if not isinstance(said, dict) or not isinstance(said.get("entry"), str):
        raise FileError(f"{where} names no quantizer: {said!r}")
    options = {k: v for k, v in said.items() if k not in ("entry", "layout", "planes")}
    if "planes" in said and (type(said["planes"]) is not int or said["planes"] != 2 or "layout" in said):
        raise FileError(f"{where}: {said['planes']!r:.40} planes of experts are not known here: 2 in plain "
                        f"order are")
    if said["entry"] == "raw" and "planes" not in said:
        if options.get("kind") not in ("float32", "bfloat16", "float16"):
            raise FileError(f"{where}: raw weights of the type {options.get('kind')!r} are not known here")
        return Raw(options["kind"])
    try:
        found = build("quantizer", said["entry"], **options)
    except (ConfigError, TypeError) as error:
        raise FileError(f"{where}: {error}") from None
    if "planes" in said:
        return _planed(found, where)
    return laid(found, said["layout"], where) if "layout" in said else found


def _planed(quantizer: Any, where: str) -> Planed:
    try:
        return in_planes(quantizer, "a matrix", (16, 64))
    except ConfigError as error:
        raise FileError(f"{where}: {error}") from None
