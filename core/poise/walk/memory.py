"""Parameters that share memory though they are not one: views of one tensor, each called a parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def overlapping(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return by the id of each parameter whose memory reaches into another's the names of those others.

    A parameter that has two names is one. Parts of one buffer that lie beside one another, or that take
    turns in it (columns of one matrix), share nothing.
    """
    placed = sorted(_placed(model), key=lambda one: one[:3])
    found: dict[int, tuple[str, ...]] = {}
    open_: list[tuple[str, int, int, str, Tensor]] = []
    for one in placed:
        open_ = [other for other in open_ if other[0] == one[0] and other[2] > one[1]]
        for other in open_:
            if _meet(other, one):
                for a, b in ((one, other), (other, one)):
                    found[id(a[4])] = (*found.get(id(a[4]), ()), b[3])
        open_.append(one)
    return found


def shared_storages(model: nn.Module) -> set[int]:
    """Return the addresses of storages that hold parameters of several names; 0 stands for no address."""
    seen, twice = set(), {0}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                where = _storage(p)
                (twice if where in seen else seen).add(where)
    return twice


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, sharded, fake
        return 0


def in_storages(tensor: Tensor | None, storages: set[int]) -> bool:
    """Tell whether a tensor may lie in one of some storages; of none it may."""
    return tensor is None or _storage(tensor) in storages


def _placed(model: nn.Module) -> Iterator[tuple[str, int, int, str, Tensor]]:
    """Yield device, first and last address, name and tensor of every parameter that lies in memory."""
    for name, p in model.named_parameters():
        try:
            start = p.data_ptr()
            length = 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride()))
        except RuntimeError:  # sparse, sharded, fake, or not yet of a shape
            continue
        if start and p.numel():
            yield str(p.device), start, start + length * p.element_size(), name, p


def _meet(a: tuple[str, int, int, str, Tensor], b: tuple[str, int, int, str, Tensor]) -> bool:
    """Return whether two parameters have elements in common; the second begins within the first."""
    (_, first, end, _, one), (_, start, stop, _, other) = a, b
    size = one.element_size()
    dense = one.numel() * size == end - first
    if dense or size != other.element_size() or (start - first) % size:
        return True
    taken = torch.zeros((max(end, stop) - first) // size, dtype=torch.bool)
    taken.as_strided(one.shape, one.stride()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), (start - first) // size).any())
