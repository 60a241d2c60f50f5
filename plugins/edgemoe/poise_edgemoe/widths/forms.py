"""What stores an expert's matrix at each width that is looked at, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise.errors import ConfigError
from poise_edgemoe.store.index import padded, payload, places
from poise_edgemoe.store.schemes import Raw, scheme_quantizer, stored
from poise_edgemoe.widths.rounding import LOW_BITS, Weighted, check_roundable

WIDTHS = (2, 3, 4, 8, 16)
ROUNDINGS = ("nearest", "weighted")


@dataclass(frozen=True)
class Forms:
    """Quantizers of one scheme at some widths.

    Parameters
    ----------
    scheme, group
        As `convert` has them.
    widths : tuple of int
        Ascending; 16 is bfloat16 (float16 for a model that is).
    rounding : str
        "weighted": scales at 2 and 3 bits are fitted to an expert's inputs.
    dtype : str
        Of the model.
    """

    scheme: str
    group: int
    widths: tuple[int, ...]
    rounding: str
    dtype: str

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding={self.rounding!r} is not allowed: it must be one of "
                              f"{', '.join(ROUNDINGS)}")
        check_widths(self.widths)
        for b in self.widths:
            self.plain(b)
        if self.rounding == "weighted":
            if not (low := [b for b in self.widths if b in LOW_BITS]):
                raise ConfigError(f"rounding=weighted has no effect: it is of 2 and 3 bits, and the widths "
                                  f"are {', '.join(map(str, self.widths))}; leave it out")
            check_roundable(self.plain(low[0]))

    def plain(self, bits: int) -> Any:
        """Return what stores a matrix at some bits, rounding to the nearest code.

        Raises
        ------
        ConfigError
            For bits that the scheme does not have.
        """
        if bits == 16:
            return Raw("float16" if self.dtype == "float16" else "bfloat16")
        try:
            return scheme_quantizer(self.scheme, bits, self.group)
        except ConfigError as error:
            raise ConfigError(f"width {bits}: {error}") from None

    def at(self, bits: int, importance: Tensor | None = None) -> Any:
        """Return what stores one matrix, whose inputs have this mean square."""
        plain = self.plain(bits)
        if self.rounding == "weighted" and bits in LOW_BITS and importance is not None:
            return Weighted(plain, importance)
        return plain

    def exact(self, bits: int) -> bool:
        """Return whether a width changes nothing of this model."""
        return bits == 16 and self.dtype != "float32"


def check_widths(widths: Sequence[int]) -> None:
    """Refuse widths that are not at least two of those that there are, ascending.

    Raises
    ------
    ConfigError
    """
    bad = [b for b in widths if isinstance(b, bool) or b not in (2, 3, 4, 5, 6, 7, 8, 16)]
    if bad:
        raise ConfigError(f"width {bad[0]!r} is not allowed: it must be one of 2 to 8, and 16")
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise ConfigError(f"widths={list(widths)} leave no choice: give two or more, each once, ascending")


def round_trip(quantizer: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    """Return a matrix as it comes back from a store, and the bytes that it takes there, pages filled up."""
    _, made = stored(quantizer, weight.contiguous())
    form = {name: (tuple(t.shape), t.dtype) for name, t in made.tensors().items()}
    found = places(form, None if bias is None else (len(bias), bias.dtype))
    return made.dequantize().to(weight.dtype), padded(payload(found))
