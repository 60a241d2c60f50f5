"""Weight normalisation for comparison: torch's own parametrization behind the contract of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from poise.errors import ConfigError
from poise.files import copy_checked
from poise.walk import select
from poise_compander.attached import KINDS, is_companded
from poise_compander.components import WeightNorm
from poise_compander.diagnostics import Watched
from poise_compander.reference import folded_state_dict


def attach(options: WeightNorm, model: nn.Module) -> AttachedWeightNorm:
    """Normalise the weights of linears and convolutions; see `WeightNorm.attach`."""
    chosen = select(model, None, options.exclude or None, KINDS)
    for w in chosen:
        if parametrize.is_parametrized(w.module, "weight"):
            raise ConfigError(f"weight_norm: {w.name} is reparameterized already: detach that first")
        if is_companded(w.module):
            raise ConfigError(f"weight_norm: {w.name} is companded: detach the compander first")
        if w.tied_with:
            raise ConfigError(f"weight_norm: {w.name} shares its weight with {w.tied_with[0]}: exclude it")
        zero = int((w.read().norm(dim=1) == 0).sum())
        if zero:
            raise ConfigError(f"weight_norm: {w.name} has {zero} rows of zeros, which have no direction: "
                              f"initialise it, or exclude it")
    for w in chosen:
        weight_norm(w.module)
    return AttachedWeightNorm(model, {w.name: w.module for w in chosen})


class AttachedWeightNorm(Watched):
    """Weight normalisation on a model.

    Parameters
    ----------
    model : nn.Module
    layers : dict of nn.Module
        The layers whose weights are normalised, by name.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.model, self.layers = model, layers
        self._folded: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def trainable(self) -> list[dict[str, Any]]:
        """Return every parameter that trains: norms, directions, and all else."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a plain torch optimizer."""
        return cls(self.trainable(), **options)

    def fold(self) -> None:
        """Put g v / ||v|| into plain weights, in place."""
        if self._folded:
            return
        for name, layer in self.layers.items():
            g, v = (t.detach().clone() for t in self._parts(name))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            self._folded[name] = g, v, layer.weight.detach().clone()  # type: ignore[union-attr]

    @torch.no_grad()
    def unfold(self) -> None:
        """Normalise again; g and v come back exactly where the weight was not changed meanwhile."""
        for name, (g, v, w) in self._folded.items():
            layer = self.layers[name]
            untouched = torch.equal(layer.weight, w)  # type: ignore[arg-type]
            weight_norm(layer)
            if untouched:
                for own, before in zip(self._parts(name), (g, v)):
                    own.copy_(before)
        self._folded = {}

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return a plain checkpoint; the live model is untouched."""
        return folded_state_dict(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every norm and direction: `NAME.g`, `NAME.v`."""
        return {f"{name}.{key}": t.detach() for name in self.layers
                for key, t in zip("gv", self._folded.get(name) or self._parts(name))}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load norms and directions; raises `FileError` when names or shapes differ."""
        copy_checked(self.state_dict(), tensors, "weight_norm")

    def detach(self) -> nn.Module:
        """Fold for good and return the plain model."""
        self.fold()
        return self.model

    def report(self) -> dict[str, Any]:
        """Return the number of layers."""
        return {"method": "weight_norm", "layers": len(self.layers)}

    def _parts(self, name: str) -> tuple[Tensor, Tensor]:
        held = self.layers[name].parametrizations["weight"]  # type: ignore[index]
        return held.original0, held.original1
