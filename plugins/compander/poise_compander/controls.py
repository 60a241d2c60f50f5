"""The control arm: plain weights at the learning rate that a compander amounts to near zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.files import copy_checked
from poise.walk import Weight
from poise_compander.attached import companded_weights
from poise_compander.components import LrMatched
from poise_compander.diagnostics import Watched


def attach(options: LrMatched, model: nn.Module, name: str) -> AttachedLrMatched:
    """Choose the weights whose learning rate is scaled; see `LrMatched.attach`."""
    return AttachedLrMatched(options, model, companded_weights(model, None, options.exclude))


class AttachedLrMatched(Watched):
    """Nothing but parameter groups: the weights' learning rate times (a / b)^2."""

    def __init__(self, options: LrMatched, model: nn.Module, chosen: list[Weight]) -> None:
        self.options, self.model = options, model
        self.layers = {w.name: w.module for w in chosen}

    @property
    def factor(self) -> float:
        """(a / b)^2."""
        return (self.options.a / self.options.b) ** 2

    def trainable(self) -> list[dict[str, Any]]:
        """Return the chosen weights, and all else that trains."""
        own = [layer.weight for layer in self.layers.values()]
        ids = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        return [{"params": own}, {"params": rest}] if rest else [{"params": own}]

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a torch optimizer with the scaled rate on the chosen weights."""
        optimizer = cls(self.trainable(), **options)
        own = optimizer.param_groups[0]
        own["lr"] = own["lr"] * self.factor  # not in place: a tensor is shared by all groups
        if self.options.decay_on == "v" and own.get("weight_decay"):
            own["weight_decay"] = own["weight_decay"] / self.factor
        return optimizer

    def fold(self) -> None:
        """Do nothing: the weights are plain."""

    def unfold(self) -> None:
        """Do nothing: the weights are plain."""

    def folded_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the model's checkpoint."""
        return copy.deepcopy(dict(self.model.state_dict()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chosen weights."""
        return {f"{n}.weight": m.weight.detach() for n, m in self.layers.items()}  # type: ignore[union-attr]

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the chosen weights; raises `FileError` when names or shapes differ."""
        copy_checked(self.state_dict(), tensors, "lr_matched")

    def detach(self) -> nn.Module:
        """Return the model."""
        return self.model

    def report(self) -> dict[str, Any]:
        """Return the factor and the number of layers."""
        return {"method": "lr_matched", "effective_lr_factor": self.factor, "layers": len(self.layers)}
