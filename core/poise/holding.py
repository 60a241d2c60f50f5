"""Who holds which parameter: what is frozen for how many adapters, what one adapter has to itself."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from poise.errors import ConfigError
from poise.walk import Weight
from poise.walk.experts import Experts
from poise.walk.plain import computed

_frozen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> [requires_grad before, holders]
_names: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # adapters that have no layers on it
_alone: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> who has it to itself


def freeze(parameters: Iterable[nn.Parameter], holder: object) -> None:
    """Stop parameters from training for as long as one holder needs that: an object made for it alone."""
    for p in parameters:
        if p not in _frozen:
            _frozen[p] = (p.requires_grad, set())
        _frozen[p][1].add(holder)
        p.requires_grad_(False)


def thaw(holder: object) -> None:
    """Let a holder go; a parameter that nobody else froze trains again if it did before."""
    for p in [p for p, (_, holders) in _frozen.items() if holder in holders]:
        before, holders = _frozen[p]
        holders.discard(holder)
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


def refuse_name(model: nn.Module, name: str, others: Iterable[str] = ()) -> None:
    """Raise `ConfigError` when the model has an adapter of this name, noted here or among others."""
    taken = sorted({*others, *_names.get(model, set())})
    if name in taken:
        raise ConfigError(f"the model has an adapter named {name!r} (it has {', '.join(taken)}): attach "
                          f"this one under another name, or detach that one first")


def take_name(model: nn.Module, name: str) -> None:
    """Note the name of an adapter that has no layers to say it; refused as `refuse_name` does."""
    refuse_name(model, name)
    _names.setdefault(model, set()).add(name)


def give_name(model: nn.Module, name: str) -> None:
    """Let a name go."""
    _names.get(model, set()).discard(name)


def tensor_of(weight: Weight) -> Tensor | None:
    """Return the parameter that a weight of a live model lies in, where it is a plain one."""
    held = getattr(weight.module, weight.parameter, None)
    held = held.fused if isinstance(held, Experts) else held
    return held if isinstance(held, Tensor) else None


def frozen_by_others(p: nn.Parameter) -> bool:
    """Tell whether an adapter keeps a parameter from training."""
    return p in _frozen


def trains(p: nn.Parameter) -> bool:
    """Tell whether a parameter trains, or would if no adapter froze it."""
    return _frozen[p][0] if p in _frozen else p.requires_grad


def adopt(p: nn.Parameter, holders: Iterable[object], when_free: bool = True) -> None:
    """Let a new parameter of a model train when it is free, frozen for as long as one of these holds it."""
    p.requires_grad_(when_free)
    for holder in holders:
        freeze([p], holder)


def refuse_held(chosen: Iterable[Weight], what: str) -> None:
    """Raise `ConfigError` for a weight that another adapter has to itself."""
    for w in chosen:
        if w.module is not None and w.parameter in computed(w.module):
            raise ConfigError(f"{what}: {w.name} is reparameterized (torch's parametrize): merge or remove "
                              f"that first, or exclude it")
        if who := who_holds(tensor_of(w)):
            raise ConfigError(f"{what}: {w.name} is held by {who!r}, which reparameterizes it and shares "
                              f"it with no other adapter: call merge() on that first, or exclude it")


def refuse_trained(parameters: Iterable[nn.Parameter], what: str) -> None:
    """Raise `ConfigError` when an adapter that freezes the base meets one that trains it."""
    for p in parameters:
        if who := who_holds(p):
            raise ConfigError(f"{what}: it freezes the base, and {who!r} trains it: merge() that first")


def refuse_frozen(parameters: Iterable[nn.Parameter], what: str) -> None:
    """Raise `ConfigError` when an adapter that trains the base meets one that freezes it."""
    if any(frozen_by_others(p) for p in parameters):
        raise ConfigError(f"{what}: it trains the base, and an adapter on the model freezes it: call "
                          f"merge() or detach() on that first")
