"""In which order the bytes of packed experts lie: plain, or as a kernel reads them faster.

An order changes no value and no size. The index says it beside the quantizer (`"layout"`: a tag of
`poise.quantizers.orders`); without it they lie in plain order, which every machine reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError, FileError

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("auto", "plain", "ggml", "torch")
_TRIAL = (64, 256)


@dataclass(frozen=True)
class Laid:
    """A quantizer whose matrices lie in the order of a tag; has what a store needs of one."""

    quantizer: Any
    tag: str

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.quantizer.bits

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 for a format that has its own."""
        return getattr(self.quantizer, "group", 0)

    def layout(self, shape: tuple[int, int], dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return names, shapes and types of what is stored: those of the quantizer."""
        return self.quantizer.layout(shape, dtype)

    def from_tensors(self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: Any) -> Any:
        """Rebuild a matrix, without a copy."""
        from poise.quantizers.orders import ordered

        return ordered(self.quantizer.from_tensors(tensors, shape, dtype), self.tag)


def lay_out(quantizer: Any, made: Any, layout: str) -> tuple[Any, Any]:
    """Return quantizer and matrix in the order that a layout means; what is not packed stays.

    "auto" is "ggml" for blocks of q4_0, where its kernel is at hand, and else "plain": `c` reads plain
    codes at the speed of memory, and no other blocks are interleaved here.

    Raises
    ------
    ConfigError
        For a matrix that cannot lie in the order, which was asked for by name.
    """
    from poise.quantizers.orders import arranged
    from poise.quantizers.sliced import SlicedMatrix

    if layout == "plain" or not isinstance(made, SlicedMatrix) or (layout == "auto" and not _gains(made)):
        return quantizer, made
    made, tag = arranged(made, "ggml" if layout == "auto" else layout)
    return Laid(quantizer, tag), made


def _gains(made: Any) -> bool:
    from poise.quantizers import ggml
    from poise.quantizers.orders import interleaves

    return interleaves(made) and (it := ggml.kernel()) is not None and it.ggml.gemv is not None


def check_layout(layout: str, quantizer: Any, shape: tuple[int, int], dtype: Any) -> None:
    """Refuse a layout that a quantizer's matrices of a shape cannot have.

    Raises
    ------
    ConfigError
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r} is not allowed: it must be one of {', '.join(LAYOUTS)}")
    if layout in ("ggml", "torch"):
        few = shape[0] % _TRIAL[0] + _TRIAL[0], shape[1]  # orders look at no more than the last rows
        lay_out(quantizer, _zeros(quantizer, few, dtype), layout)


def laid(quantizer: Any, tag: Any, where: str) -> Laid:
    """Return the quantizer of an index that names an order.

    Raises
    ------
    FileError
        For the order of another machine, or one that this quantizer's matrices cannot lie in.
    """
    import torch

    from poise.quantizers.orders import unreadable

    if why := unreadable(tag) if isinstance(tag, str) else f"it names no layout: {tag!r:.40}":
        raise FileError(f"{where}: {why}")
    try:
        lay_out(quantizer, _zeros(quantizer, _TRIAL, torch.float32), tag.split(":")[0])
    except ConfigError as error:
        raise FileError(f"{where}: {error}") from None
    return Laid(quantizer, tag)


def _zeros(quantizer: Any, shape: tuple[int, int], dtype: Any) -> Any:
    import torch

    said = quantizer.layout(shape, dtype)
    tensors = {name: torch.zeros(size, dtype=kind) for name, (size, kind) in said.items()}
    return quantizer.from_tensors(tensors, shape, dtype)
