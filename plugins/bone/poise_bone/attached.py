"""Bone on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from poise.adapters import AttachedLayers, attach_layers, choose_layers
from poise.errors import ConfigError
from poise_bone.layers import BoneLinear


def adapt(
    model: nn.Module, *, adapter: Any, name: str, r: int, target_modules: list[str] | None,
    exclude_modules: list[str] | None,
) -> AttachedBone:
    """Put Bone's layers on the matching linears and freeze all else; see `Bone.attach`."""
    chosen = choose_layers(
        model, "bone", target_modules, exclude_modules, ("linear", "expert"), fused=False)
    for w in chosen:
        if r > w.shape[1]:
            raise ConfigError(f"bone: r={r} exceeds the {w.shape[1]} inputs of {w.name}: lower r")
    layers = {w.name: BoneLinear(w.layer, r) for w in chosen}
    return attach_layers(model, layers, chosen, adapter=adapter, name=name, cls=AttachedBone)


class AttachedBone(AttachedLayers):
    """A Bone adapter on a model."""

    def report(self) -> dict[str, Any]:
        """Return the variant, numbers of layers, parameters and bytes, and the change's largest entry."""
        largest = max(float(layer.D.detach().abs().max()) for layer in self.layers.values())
        return {"method": "bone", "variant": self.adapter.variant, "r": self.adapter.r, **super().report(),
                "largest_change": largest}
