"""A store of 16 or 32 bits measured as if its experts were stored at other widths.

An expert is rounded when it is read, in the place that it was read to: what is computed is bit for bit what
an engine with `kernel="reference"` computes of a store converted to these widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from poise.errors import ConfigError, DataError
from poise_edgemoe.budget import parse_bytes, plan_memory
from poise_edgemoe.cache.policy import Key
from poise_edgemoe.cache.residents import Resident
from poise_edgemoe.cache.slots import ExpertCache, size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import Index, read_index
from poise_edgemoe.store.schemes import stored
from poise_edgemoe.widths.metrics import Measured, Metric, token_losses

Choice = Mapping[tuple[int, int, str], Any]  # layer, expert, part: what stores it
SHARE_KEPT = 4  # a quarter of the experts is in memory, where nothing else is said
TOKENS = 2048  # that are computed at a time
MOST_LOGITS = 1 << 28  # bytes


class RoundingCache(ExpertCache):
    """Experts in memory, rounded as they come.

    Attributes
    ----------
    chosen : dict
        (layer, expert, part) to the quantizer; what is not there stays as it is.
    """

    chosen: Choice = MappingProxyType({})

    def _view(self, held: Resident, part: str) -> tuple[Any, Tensor | None]:
        matrix, bias = super()._view(held, part)
        quantizer = self.chosen.get((*held.key, part))
        if quantizer is not None:
            flipped = self.index.layers[held.key[0]].transposed
            place = matrix.weight
            made = rounded(quantizer, place.T.contiguous() if flipped else place)
            place.copy_(made.T if flipped else made)
        return matrix, bias

    def forget(self, keys: set[Key]) -> None:
        """Let go of experts, which are read again when they are used."""
        for key in keys & self.resident.keys():
            self._evict(key)


def rounded(quantizer: Any, weight: Tensor) -> Tensor:
    """Return a matrix as it comes back from being stored."""
    return stored(quantizer, weight)[1].dequantize().to(weight.dtype)


class RoundingEngine(Engine):
    """An engine whose experts are rounded as they come."""

    cache_type = RoundingCache


class Bench:
    """Measures a store of 16 or 32 bits at chosen widths; close it, or use `with`.

    Parameters
    ----------
    folder : Path
    quantizers : callable
        From layer, expert, part and bits to what stores the matrix; None: it stays as it is.
    length : int
        Of windows.
    memory : str or int, optional
        Most bytes of the engine; None: what it needs, and a quarter of the experts.
    """

    def __init__(
        self, folder: Path, quantizers: Callable[[int, int, str, int], Any], length: int,
        memory: str | int | None = None,
    ) -> None:
        self.folder, self.quantizers = folder, quantizers
        self.index: Index = read_index(folder)
        self.engine = _opened(folder, self.index, length, memory)
        self.rows = self.engine.budget.batch
        self._bits: dict[tuple[int, int, str], int] = {}

    def set(self, bits: Mapping[tuple[int, int, str], int]) -> None:
        """Choose widths, by layer, expert and part; what is not named is as trained."""
        cache = cast(RoundingCache, self.engine.cache)
        changed = {k[:2] for k in bits.keys() | self._bits.keys() if bits.get(k) != self._bits.get(k)}
        cache.forget(changed)
        made = {k: self.quantizers(*k, b) for k, b in bits.items()}
        cache.chosen, self._bits = {k: q for k, q in made.items() if q is not None}, dict(bits)

    def measure(self, metric: Metric, windows: Tensor) -> Measured:
        """Return the badness at the chosen widths."""
        return metric.measure(self.engine, windows, self.rows)

    def token_losses(self, windows: Tensor) -> Tensor:
        """Return the loss of every token at the chosen widths, in nats, (windows, tokens)."""
        losses = torch.cat([token_losses(self.engine, part) for part in windows.split(self.rows)])
        if not losses.isfinite().all():
            raise DataError(f"the loss of {int((~losses.isfinite()).sum())} of {losses.numel()} tokens is "
                            f"NaN or Inf: the model cannot be measured on these data")
        return losses

    def uniform(self, bits: int) -> dict[tuple[int, int, str], int]:
        """Return the choice of one width for all."""
        return {(n, e, part): bits for n, e, parts in self.index.blobs() for part in parts}

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _opened(folder: Path, index: Index, length: int, memory: str | int | None) -> Engine:
    """Return the engine, for as many rows at a time as are worth it, and as a limit has room for."""
    one = plan_memory(folder, context=length, batch=1)
    rows = max(1, min(TOKENS // length, MOST_LOGITS // (length * one.logits_bytes)))
    every, largest = (f(size_of(m) for _, _, m in index.blobs()) for f in (sum, max))
    while True:
        budget = plan_memory(folder, context=length, batch=rows)
        rest = budget.total - budget.experts
        least = budget.staging + largest
        room = least + every // SHARE_KEPT if memory is None else parse_bytes(memory) - rest
        if room >= least or rows == 1:
            break
        rows //= 2
    if room < least:
        raise ConfigError(f"memory={memory} is too small: the smallest workable value is "
                          f"{-(-(rest + least) // 10**6)}MB for windows of {length} tokens")
    return RoundingEngine(folder, replace(budget, experts=min(budget.experts, room)), "expected",
                          kernel="reference")
