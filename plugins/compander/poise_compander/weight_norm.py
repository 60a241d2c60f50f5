"""Weight normalisation for comparison: torch's own parametrization behind the contract of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from poise.errors import ConfigError
from poise.files import copy_checked
from poise_compander.attached import Attachment
from poise_compander.coverage import Coverage
from poise_compander.plain import Home
from poise_compander.selection import choose_layers, refuse_held


def normalize_rows(
    model: nn.Module, *, adapter: Any = None, name: str = "default",
    target_modules: list[str] | None = None, exclude_modules: list[str] | None = None,
) -> AttachedWeightNorm:
    """Normalise the rows of the weights of linears and convolutions, in place.

    Raises
    ------
    ConfigError
        When no layer matches, a weight is reparameterized or tied, or one of its rows is zero.
    """
    chosen, coverage = choose_layers(model, target_modules, exclude_modules)
    for one in chosen:
        refuse_held("weight_norm", one)
        if one.tied_with:
            raise ConfigError(f"weight_norm: {one.name} shares its weight with {one.tied_with[0]}: exclude "
                              f"it")
        zero = int((one.weight.detach().flatten(1).norm(dim=1) == 0).sum())  # as torch norms them
        if zero:
            raise ConfigError(f"weight_norm: {one.name} has {zero} rows of zeros, which have no direction: "
                              f"initialise it, or exclude it")
    layers = {one.name: one.homes[0].module for one in chosen}
    return AttachedWeightNorm(adapter, model, name, layers, coverage)


class AttachedWeightNorm(Attachment):
    """Weight normalisation on a model.

    Parameters
    ----------
    adapter : component
    model : nn.Module
    name : str
    layers : dict of nn.Module
        The layers whose weights are normalised, by name; they are still plain.
    """

    method = "weight_norm"

    def __init__(self, adapter: Any, model: nn.Module, name: str, layers: dict[str, nn.Module],
                 coverage: Coverage) -> None:
        super().__init__(adapter, model, name, map(Home, layers.values()), coverage)
        self.layers = layers
        self._folded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._hooks = {name: _normalize(layer) for name, layer in layers.items()}

    def trainable(self) -> list[dict[str, Any]]:
        """Return every parameter that trains: norms, directions, and all else."""
        return [{"params": self.everything_else()}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a plain torch optimizer."""
        self.check_here()
        return cls(self.trainable(), **options)

    def _fold(self) -> None:
        for name, layer in self.layers.items():
            g, v = (t.detach().clone() for t in self._parts(name))
            self._places[Home(layer)].free()
            for hook in self._hooks.pop(name):
                del layer._load_state_dict_pre_hooks[hook]
            self._folded[name] = g, v, layer.get_parameter("weight").detach().clone()

    @torch.no_grad()
    def _unfold(self) -> None:
        for name, (g, v, w) in self._folded.items():
            layer = self.layers[name]
            untouched = torch.equal(layer.get_parameter("weight"), w)
            self._hooks[name] = _normalize(layer)
            if untouched:
                for own, before in zip(self._parts(name), (g, v)):
                    own.copy_(before)
        self._folded = {}

    def weights(self) -> dict[str, Tensor]:
        return {name: Home(layer).tensor.detach() for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return every norm and direction: `NAME.g`, `NAME.v`."""
        return {f"{name}.{key}": t.detach() for name in self.layers
                for key, t in zip("gv", self._folded.get(name) or self._parts(name))}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load norms and directions; raises `FileError` when names or shapes differ."""
        self.check_here()
        copy_checked(self.state_dict(), tensors, "weight_norm")

    def report(self) -> dict[str, Any]:
        """Return the number of layers, and what share of the model they are."""
        return {"method": "weight_norm", "layers": len(self.layers), **self.coverage.report()}

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[name]
        held = layer.parametrizations["weight"]
        return held.original0, held.original1


def _normalize(layer: nn.Module) -> set[int]:
    """Normalise a layer; return the hooks that torch adds and does not take off again."""
    before = set(layer._load_state_dict_pre_hooks)
    weight_norm(layer)
    return layer._load_state_dict_pre_hooks.keys() - before
