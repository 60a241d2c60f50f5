"""Keys and values of a conversation in memory that is set aside once, for the whole context.

transformers' own cache lays all of a layer's keys and values out anew for every token: twice the memory,
and work that grows with the square of the length.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from poise.quantizers.kernel import is_memory


class KeptLayer(DynamicLayer):
    """Keys and values of one layer, (batch, heads, time, width), views of a place for `context` tokens."""

    def __init__(self, context: int) -> None:
        self.context, self._lengths = context, [0, 0]  # of keys, and of values
        self._places: list[Tensor] = []
        self._own = False  # places are plain memory
        super().__init__()

    @property
    def keys(self) -> Any:  # type: ignore[override] - views, made when somebody looks
        """Keys so far."""
        return self._shown(0)

    @keys.setter
    def keys(self, kept: Tensor | None) -> None:
        self._put(0, kept)

    @property
    def values(self) -> Any:  # type: ignore[override]
        """Values so far."""
        return self._shown(1)

    @values.setter
    def values(self, kept: Tensor | None) -> None:
        self._put(1, kept)

    def _shown(self, n: int) -> Tensor | None:
        return self._places[n][:, :, : self._lengths[n]] if self._places else None

    def _put(self, n: int, kept: Tensor | None) -> None:
        """Keep what others have made: the first ones of what is there, or other numbers in a new place."""
        if not self._places or kept is None:
            return
        place, length = self._places[n], kept.shape[2]
        shown = place[:, :, :length]
        if (kept.data_ptr(), kept.shape, kept.stride()) != (shown.data_ptr(), shown.shape, shown.stride()):
            rows, heads, _, width = kept.shape
            place = kept.new_empty(rows, heads, max(length, self.context), width)
            place[:, :, :length] = kept
            self._places[n] = place
        self._lengths[n] = length
        self._own = all(is_memory(p) for p in self._places)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set memory aside; the system gives it page by page, when it is written to."""
        super().lazy_initialization(key_states, value_states)
        self._places = [t.new_empty(*t.shape[:2], self.context, t.shape[3])
                        for t in (key_states, value_states)]
        self._own, self._lengths = all(is_memory(p) for p in self._places), [0, 0]

    def get_seq_length(self) -> int:
        """Return how many tokens are kept."""
        return self._lengths[0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write behind what is there, and return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ends = [n + key_states.shape[2] for n in self._lengths]
        for place, at, end, new in zip(self._places, self._lengths, ends, (key_states, value_states),
                                       strict=True):
            place[:, :, at:end] = new
        self._lengths = ends  # once there was room for them
        return self.keys, self.values

    def has_room(self, rows: int) -> bool:
        """Return whether C may put a token of so many rows behind what is there."""
        return self._own and len(self._places[0]) == rows and self._lengths[0] < self.context

    def grow(self) -> tuple[Tensor, Tensor, int]:
        """Count a token more, and return the places of all, and where in them it is to be written."""
        at = self._lengths[0]
        self._lengths = [at + 1, at + 1]
        keys, values = self._places
        return keys, values, at

    def reset(self) -> None:
        """Give the memory back."""
        self._places, self._own, self._lengths = [], False, [0, 0]
        super().reset()


def kept_cache(config: Any, context: int) -> Any:
    """Return an empty cache for a causal model; layers that slide over a window stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [KeptLayer(context) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
