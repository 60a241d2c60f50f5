"""Bone on a model: attach, train, fold, save, detach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.files import copy_checked
from poise.quantizers import PackedLinear, dense_state_dict
from poise.walk import path_of, refuse_tied, replace_module, select
from poise_bone.components import Bone
from poise_bone.layers import BoneLinear


def attach(bone: Bone, model: nn.Module, name: str) -> AttachedBone:
    """Wrap the matching linears and freeze all else; see `Bone.attach`."""
    if any(isinstance(m, BoneLinear) for m in model.modules()):
        raise ConfigError("bone: the model is adapted already: detach that adapter first")
    chosen = select(model, bone.include or None, bone.exclude or None, ("linear", "packed"))
    chosen = [w for w in chosen if isinstance(w.module, (nn.Linear, PackedLinear))]
    if not bone.include:  # the output head stays as it is unless it is asked for
        chosen = [w for w in chosen if not w.name.endswith("lm_head")]
    if not chosen:
        raise ConfigError("bone: no linear layer to adapt (the head is adapted only when included)")
    refuse_tied(chosen, "bone")
    for w in chosen:
        if bone.r > w.shape[1]:
            raise ConfigError(f"bone: r={bone.r} exceeds the {w.shape[1]} inputs of {w.name}: lower r")
    if any(w.module is model for w in chosen):
        raise ConfigError("bone: the model itself is the Linear: wrap it, nn.Sequential(model)")
    were_trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    model.requires_grad_(False)
    layers: dict[str, BoneLinear] = {}
    for w in chosen:
        assert isinstance(w.module, (nn.Linear, PackedLinear))
        layers[w.name] = BoneLinear(w.module, bone.r)
        replace_module(model, path_of(model, w.module), layers[w.name])
    return AttachedBone(bone, model, name, layers, were_trainable)


class AttachedBone:
    """A Bone adapter on a model.

    Parameters
    ----------
    layers : dict of name to BoneLinear
        By the name the walk over weights gives them.
    """

    def __init__(
        self, bone: Bone, model: nn.Module, name: str, layers: dict[str, BoneLinear],
        were_trainable: Mapping[str, bool],
    ) -> None:
        self.bone, self.model, self.name, self.layers = bone, model, name, layers
        self._were_trainable = were_trainable

    def trainable(self) -> list[dict[str, Any]]:
        """Return one group with every D; weight decay acts on it as the optimizer says."""
        return [{"params": [layer.D for layer in self.layers.values()]}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a torch optimizer over every D."""
        return cls(self.trainable(), **options)

    def fold(self) -> None:
        """Put the changes into the weights, in place."""
        for layer in self.layers.values():
            layer.fold()

    def unfold(self) -> None:
        """Restore the weights exactly."""
        for layer in self.layers.values():
            layer.unfold()

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return a plain checkpoint of the folded model; the live model is untouched."""
        tensors = {}
        wrapped = {path_of(self.model, layer): layer for layer in self.layers.values()}
        for key, value in dense_state_dict(self.model).items():
            path, _, last = key.rpartition(".")
            owner = path.removesuffix(".base") if path.endswith(".base") else path
            if path == "base":
                owner = ""
            layer = wrapped.get(owner)
            if layer is None:
                tensors[key] = value
            elif last != "D":
                folded = layer.checkpoint_weight() if last == "weight" else value
                tensors[f"{owner}.{last}".lstrip(".")] = folded
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Return every D by layer name, `NAME.D` of shape (r, out)."""
        return {f"{name}.D": layer.D.detach() for name, layer in self.layers.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load every D.

        Raises
        ------
        FileError
            When names or shapes differ, naming the first.
        """
        copy_checked(self.state_dict(), tensors, "bone")

    def detach(self) -> nn.Module:
        """Remove the adapter and its change; what trained before attach trains again."""
        self.unfold()
        for layer in self.layers.values():
            replace_module(self.model, path_of(self.model, layer), layer.base)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._were_trainable.get(name, p.requires_grad))
        return self.model

    def report(self) -> dict[str, Any]:
        """Return the number of layers, trainable parameters, bytes, and the change's largest entry."""
        trained = sum(layer.D.numel() for layer in self.layers.values())
        return {
            "method": "bone", "variant": self.bone.variant, "r": self.bone.r,
            "layers": len(self.layers), "trainable_parameters": trained,
            "bytes": sum(x.D.numel() * x.D.element_size() for x in self.layers.values()),
            "largest_change": max(float(x.D.detach().abs().max()) for x in self.layers.values()),
        }
