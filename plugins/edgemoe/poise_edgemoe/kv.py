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
        self.context, self._length = context, 0
        self._places: tuple[Tensor, ...] = ()
        self._own = False  # places are plain memory
        super().__init__()

    @property
    def keys(self) -> Any:  # type: ignore[override] - views, made when somebody looks
        """Keys so far."""
        return self._shown(0)

    @keys.setter
    def keys(self, kept: Tensor | None) -> None:
        self._length = 0 if kept is None or not self._places else kept.shape[2]

    @property
    def values(self) -> Any:  # type: ignore[override]
        """Values so far."""
        return self._shown(1)

    @values.setter
    def values(self, kept: Tensor | None) -> None:
        self.keys = kept

    def _shown(self, n: int) -> Tensor | None:
        return self._places[n][:, :, : self._length] if self._places else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set memory aside; the system gives it page by page, when it is written to."""
        super().lazy_initialization(key_states, value_states)
        self._places = tuple(t.new_empty(*t.shape[:2], self.context, t.shape[3])
                             for t in (key_states, value_states))
        self._own, self._length = all(is_memory(p) for p in self._places), 0

    def get_seq_length(self) -> int:
        """Return how many tokens are kept."""
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write behind what is there, and return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at, self._length = self._length, self._length + key_states.shape[2]
        for place, new in zip(self._places, (key_states, value_states), strict=True):
            place[:, :, at: self._length] = new
        return self.keys, self.values

    def has_room(self, rows: int) -> bool:
        """Return whether C may put a token of so many rows behind what is there."""
        return self._own and len(self._places[0]) == rows and self._length < self.context

    def grow(self) -> tuple[Tensor, Tensor, int]:
        """Count a token more, and return the places of all, and where in them it is to be written."""
        self._length += 1
        keys, values = self._places
        return keys, values, self._length - 1

    def reset(self) -> None:
        """Give the memory back."""
        self._places, self._own = (), False
        super().reset()


def kept_cache(config: Any, context: int) -> Any:
    """Return an empty cache for a causal model; layers that slide over a window stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [KeptLayer(context) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
