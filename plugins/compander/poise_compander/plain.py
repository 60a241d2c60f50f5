"""The plain model behind reparameterized weights: names of its parameters, and the way back to it.

By the structure of the modules, never by names: a layer may be called `parametrizations_x` or `original0`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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
class Home:
    """A parameter's name in a module: where a weight lives."""

    module: nn.Module
    parameter: str = "weight"

    @property
    def tensor(self) -> Any:
        """What the module holds there: a parameter, or what is computed in its place."""
        return getattr(self.module, self.parameter)

    @property
    def plain(self) -> nn.Parameter:
        """The parameter, which nothing computes."""
        return self.module.get_parameter(self.parameter)

    @property
    def parts(self) -> Any:
        """What the weight is computed from."""
        return self.module.parametrizations[self.parameter]  # type: ignore[index, union-attr]

    @property
    def is_computed(self) -> bool:
        """Whether torch's parametrize computes it."""
        return parametrize.is_parametrized(self.module, self.parameter)

    def compute_by(self, how: nn.Module) -> None:
        """Have torch's parametrize compute it from now on."""
        parametrize.register_parametrization(self.module, self.parameter, how)


@dataclass(frozen=True)
class Place:
    """Where a weight stands in its module, and whether it trains, before it is reparameterized."""

    home: Home
    order: tuple[str, ...]
    trains: bool

    @staticmethod
    def of(home: Home) -> Place:
        """Return the place of a weight that is plain."""
        return Place(home, tuple(home.module._parameters), home.plain.requires_grad)

    def free(self) -> None:
        """Leave the computed weight as a plain parameter, where it was among the others."""
        module, parameter = self.home.module, self.home.parameter
        own = module._parameters
        with torch.enable_grad():  # without, torch would make a buffer of a weight of several parts
            parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
        if parameter not in own:  # frozen parts
            weight: Any = module._buffers.pop(parameter)
            module.register_parameter(parameter, nn.Parameter(weight.detach(), requires_grad=False))
        found = {name: own[name] for name in (*self.order, *own) if name in own}
        own.clear()
        own.update(found)

    def release(self) -> None:
        """Have the weight train, or not, as it did."""
        self.home.plain.requires_grad_(self.trains)
