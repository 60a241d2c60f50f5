"""A plain checkpoint of any model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from poise.errors import ConfigError, nearest
from poise.walk.live import speaks, weights
from poise.walk.plain import children, joined, own_state
from poise.walk.weight import Weight

Changed = Iterable[tuple[str, Callable[[], Tensor]]]


def checkpoint(model: nn.Module, changed: Changed = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the key and tensor of every entry of the plain model's `state_dict`, each once.

    Packed weights are dequantized and parametrized ones computed when their turn comes; adapters are left
    out. The live model is untouched, and what is not computed is the live tensor, not a copy.

    Parameters
    ----------
    changed : iterable of (weight name, function)
        Weights with other values: a function without arguments returns the matrix (out, in).

    Raises
    ------
    ConfigError
        For a changed weight that the model does not have, or that is tied.
    """
    by_key: dict[str, list[Weight]] = {}
    others, found = dict(changed), set()
    for weight in weights(model):
        by_key.setdefault(weight.state_key, []).append(weight)
        found.add(weight.name)
        if weight.name in others and weight.tied_with:
            raise ConfigError(f"{weight.name} is tied with {', '.join(weight.tied_with)}: it has one value")
    if missing := sorted(others.keys() - found):
        raise ConfigError(f"no weight named {missing[0]!r}{nearest(missing[0], sorted(found))}")
    yield from _entries(model, "", by_key, others)


def _entries(
    module: nn.Module, path: str, by_key: dict[str, list[Weight]], changed: dict[str, Callable[[], Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    if (spoken := speaks(module, path)) is not None:
        held = list(spoken)
        for key in dict.fromkeys(w.state_key for w in held):
            own = [w for w in held if w.state_key == key]
            yield key, _plain(by_key.get(key, own), changed)
        for weight in held:
            yield from weight.beside()
        return
    for key, tensor in own_state(module, path):
        found = by_key.get(key, [])
        yield key, _plain(found, changed) if any(w.name in changed for w in found) else tensor
    for name, child in children(module):
        yield from _entries(child, joined(path, name), by_key, changed)


def _plain(found: list[Weight], changed: dict[str, Callable[[], Tensor]]) -> Tensor:
    """Return the plain tensor that some weights make up: one, or all experts of a fused parameter."""
    if found[0].index is None:
        (weight,) = found
        return weight.plain(_value(weight, changed)).contiguous()
    out = torch.empty(0)
    for number, weight in enumerate(found):
        one = weight.plain(_value(weight, changed))
        if not number:
            out = one.new_empty((len(found), *one.shape))
        out[number] = one
    return out


def _value(weight: Weight, changed: dict[str, Callable[[], Tensor]]) -> Tensor:
    return changed[weight.name]() if weight.name in changed else weight.read()
