"""The plain model behind reparameterized weights: names of its parameters, and the way back to it.

By the structure of the modules, never by names: a layer may be called `parametrizations_x` or `original0`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter by its id; of one that a tensor is computed from, the tensor's."""
    first: dict[int, str] = {}
    for path, found in _parametrizations(model):
        for name, parts in found.items():
            if parts.is_tensor:
                first.setdefault(id(parts.original), f"{_prefix(path)}{name}")
    return {id(p): n for n, p in model.named_parameters()} | first


def _parametrizations(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is computed in each module, by name, under every path of the module."""
    for path, module in model.named_modules(remove_duplicate=False):
        parts: Any = getattr(module, "parametrizations", None)
        found = {name: one for name, one in parts.items() if isinstance(one, ParametrizationList)} \
            if isinstance(parts, nn.ModuleDict) else {}
        if found:
            yield path, found


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


@dataclass(frozen=True)
class Place:
    """Where a weight stands in its module, and whether it trains, before it is reparameterized."""

    module: nn.Module
    order: tuple[str, ...]
    trains: bool

    @staticmethod
    def of(module: nn.Module) -> Place:
        """Return the place of a module's weight."""
        return Place(module, tuple(module._parameters), module.get_parameter("weight").requires_grad)

    def free(self) -> None:
        """Leave the computed weight as a plain parameter, where it was among the others."""
        module, own = self.module, self.module._parameters
        with torch.enable_grad():  # without, torch would make a buffer of a weight of several parts
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        if "weight" not in own:  # frozen parts
            module.register_parameter("weight", nn.Parameter(_popped(module), requires_grad=False))
        found = {name: own[name] for name in (*self.order, *own) if name in own}
        own.clear()
        own.update(found)

    def release(self) -> None:
        """Have the weight train, or not, as it did."""
        self.module.get_parameter("weight").requires_grad_(self.trains)


def _popped(module: nn.Module) -> Tensor:
    weight: Any = module._buffers.pop("weight")
    return weight.detach()
