"""What every call of a model took: time, waiting, bytes, hits, pages that came from a disk."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from poise.quantizers import ggml, kernel
from poise_edgemoe import fused
from poise_edgemoe.cache.slots import ExpertCache

LAST = 1024  # calls that are remembered: a long conversation must not grow


@dataclass
class Step:
    """One call of the model: a token of every row, or a piece of a prompt.

    Parameters
    ----------
    tokens : int
        That were fed, of all rows.
    seconds : float
        In all; `stall_seconds` of it computing waited for reading, `kernel_seconds` were products of packed
        matrices and attention of tokens; the rest is overhead, or the reference's arithmetic.
    bytes_read : int
        Padding to pages included.
    hits, misses : int
        Experts that were in memory when they were asked for, or being read ahead, and those that were not.
    from_base : int
        Of those misses, the ones that were served from their bases.
    major_faults : int
        Pages of the process that the system had to read from a disk: 0 while all it needs stays in memory.
    """

    tokens: int
    seconds: float
    stall_seconds: float
    kernel_seconds: float
    bytes_read: int
    hits: int
    misses: int
    from_base: int
    major_faults: int


class Statistics:
    """Sums since the beginning, and the last `LAST` steps."""

    def __init__(self, cache: ExpertCache) -> None:
        self.cache = cache
        self.steps: deque[Step] = deque(maxlen=LAST)
        self.tokens, self.seconds, self.faults = 0, 0.0, 0

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Measure what is done within, also where it fails."""
        before = self._counters()
        try:
            yield
        finally:
            made = [b - a for a, b in zip(before, self._counters(), strict=True)]
            self.steps.append(Step(tokens, *made))  # type: ignore[arg-type]
            self.tokens += tokens
            self.seconds += self.steps[-1].seconds
            self.faults += self.steps[-1].major_faults

    def summary(self, off: list[int], idle: list[int]) -> dict[str, Any]:
        """Return all of it as plain JSON values.

        Parameters
        ----------
        off, idle : list of int
            Layers for which nothing is read ahead any more; about which nobody is asked now, as that costs
            more than it gives.
        """
        cache = self.cache
        whole, each = cache.counts.layer(slice(None)), range(len(cache.index.layers))
        hits, misses = whole.pop("hits"), whole.pop("misses")
        return {
            "tokens": self.tokens, "seconds": self.seconds, "hits": hits, "misses": misses,
            "hit_rate": hits / (hits + misses) if hits else 0.0, "bytes_read": cache.reader.bytes_read,
            "stall_seconds": whole.pop("stall_seconds"), "major_faults": self.faults,
            "direct": cache.reader.direct, "prefetch": {**whole, "off": off, "idle": idle},
            "layers": [cache.counts.layer(n) for n in each], "steps": [asdict(s) for s in self.steps],
            "planes": cache.planes(),
        }

    def _counters(self) -> tuple[float, ...]:
        cache, counts = self.cache, self.cache.counts
        return (time.perf_counter(), float(counts.stall.sum()),
                kernel.seconds() + ggml.seconds() + fused.seconds(), cache.reader.bytes_read,
                int(counts.hits.sum()), int(counts.misses.sum()), cache.from_base,
                resource.getrusage(resource.RUSAGE_SELF).ru_majflt)
