"""What became of experts that were asked for, and of those that were read ahead, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = ("hits", "misses", "guesses", "cancelled", "used", "wasted", "late")


class Counts:
    """Sums by MoE layer, since an engine was opened.

    Attributes
    ----------
    hits, misses
        Experts that had a place when they were asked for (also being read ahead), and those that had not.
    guesses, cancelled
        Experts that were asked for ahead, and those of them that were dropped before they were read.
    used, wasted
        Experts that were read ahead and then asked for, and those that left before that.
    late
        Of those used, the ones that were not yet there.
    demands, blocked
        Times that a layer needed a read, and those at which a wrong guess was being read.
    wasted_bytes, needed_bytes
        Of those that were wasted; of misses and of those used.
    stall
        Seconds in which computing waited for reading.
    """

    def __init__(self, layers: int) -> None:
        self.hits, self.misses, self.guesses, self.cancelled, self.used, self.wasted, self.late = (
            np.zeros(layers, dtype=np.int64) for _ in NAMES)
        self.demands, self.blocked, self.wasted_bytes, self.needed_bytes = (
            np.zeros(layers, dtype=np.int64) for _ in range(4))
        self.stall = np.zeros(layers)

    def clear(self) -> None:
        """Begin again."""
        for sums in vars(self).values():
            sums[:] = 0

    def layer(self, n: int | slice) -> dict[str, Any]:
        """Return the sums of a layer, or of some, as plain values.

        `precision` is the share of guesses that were used, of those whose end is known; `recall` the share
        of needed reads that were made ahead; 0 where there were none.
        """
        said: dict[str, Any] = {name: int(getattr(self, name)[n].sum()) for name in NAMES}
        said["prefetched"] = said.pop("guesses") - said["cancelled"]
        said["precision"] = _share(said["used"], said["wasted"])
        said["recall"] = _share(said["used"], said["misses"])
        said["wasted_bytes"] = int(self.wasted_bytes[n].sum())
        said["stall_seconds"] = float(self.stall[n].sum())
        return said


def _share(some: int, others: int) -> float:
    return some / (some + others) if some else 0.0
