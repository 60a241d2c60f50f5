"""Who holds which parameter: what is frozen for how many adapters, what one adapter has to itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from poise.errors import ConfigError
from poise.walk import Weight
from poise.walk.plain import computed

_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> [requires_grad before, holders]
_alone: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> who has it to itself


def freeze(parameters: Iterable[nn.Parameter], holder: Any) -> None:
    """Stop parameters from training for as long as one holder needs that."""
    for p in parameters:
        if p not in _frozen:
            _frozen[p] = (p.requires_grad, set())
        _frozen[p][1].add(id(holder))
        p.requires_grad_(False)


def thaw(parameters: Iterable[nn.Parameter], holder: Any) -> None:
    """Let a holder go; a parameter that nobody else froze trains again if it did before."""
    for p in parameters:
        if p not in _frozen:
            continue
        before, holders = _frozen[p]
        holders.discard(id(holder))
        if not holders:
            p.requires_grad_(before)
            del _frozen[p]


def hold(tensor: Tensor, who: str) -> None:
    """Note that an adapter has a tensor to itself: it changes how the tensor is parameterized."""
    _alone[tensor] = who


def release(tensor: Tensor) -> None:
    """Let a tensor go."""
    _alone.pop(tensor, None)


def who_holds(tensor: Tensor | None) -> str | None:
    """Return who has a tensor to itself, if anybody."""
    return None if tensor is None else _alone.get(tensor)


def refuse_held(chosen: Iterable[Weight], what: str) -> None:
    """Raise `ConfigError` for a weight that another adapter has to itself."""
    for w in chosen:
        if w.module is not None and w.parameter in computed(w.module):
            raise ConfigError(f"{what}: {w.name} is reparameterized (torch's parametrize): merge or remove "
                              f"that first, or exclude it")
        tensor = getattr(w.module, w.parameter, None)
        if isinstance(tensor, Tensor) and (who := who_holds(tensor)):
            raise ConfigError(f"{what}: {w.name} is held by {who!r}, which reparameterizes it and shares "
                              f"it with no other adapter: call merge() on that first, or exclude it")
