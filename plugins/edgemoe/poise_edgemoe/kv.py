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
        super().__init__()
        self.context = context
        self._places: tuple[Tensor, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set memory aside; the system gives it page by page, when it is written to."""
        super().lazy_initialization(key_states, value_states)
        self._places = tuple(t.new_empty(*t.shape[:2], self.context, t.shape[3])
                             for t in (key_states, value_states))
        self.keys, self.values = (p[:, :, :0] for p in self._places)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write behind what is there, and return all of it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.get_seq_length()
        end = at + key_states.shape[2]
        for place, new in zip(self._places, (key_states, value_states), strict=True):
            place[:, :, at:end] = new
        self.keys, self.values = (p[:, :, :end] for p in self._places)
        return self.keys, self.values

    def has_room(self, rows: int) -> bool:
        """Return whether a token of so many rows may be put behind what is there."""
        return (self.is_initialized and len(self._places[0]) == rows and is_memory(self._places[0])
                and self.get_seq_length() < self.context)

    def grow(self) -> tuple[Tensor, Tensor, int]:
        """Count a token more, and return the places of all, and where in them it is to be written."""
        at = self.get_seq_length()
        self.keys, self.values = (p[:, :, : at + 1] for p in self._places)
        keys, values = self._places
        return keys, values, at

    def reset(self) -> None:
        """Give the memory back."""
        self._places = ()
        super().reset()


def kept_cache(config: Any, context: int) -> Any:
    """Return an empty cache for a causal model; layers that slide over a window stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [KeptLayer(context) if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
