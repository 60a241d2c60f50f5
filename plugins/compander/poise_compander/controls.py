"""The control arm: plain weights at the learning rate that a compander amounts to near zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from poise.files import copy_checked
from poise_compander.attached import Attachment
from poise_compander.coverage import Coverage
from poise_compander.plain import Home
from poise_compander.selection import choose_companded, refuse_held


def match_rates(
    model: nn.Module, a: float, b: float, *, decay_on: str = "w", adapter: Any = None,
    name: str = "default", target_modules: list[str] | None = None,
    exclude_modules: list[str] | None = None,
) -> AttachedLrMatched:
    """Choose the weights whose learning rate is scaled, those that a compander would take.

    Raises
    ------
    ConfigError
        When no layer matches, or something reparameterizes a weight.
    """
    chosen, coverage = choose_companded(model, target_modules, exclude_modules)
    for one in chosen:
        refuse_held("lr_matched", one)
    homes = {one.name: one.homes[0] for one in chosen}
    return AttachedLrMatched(adapter, model, name, homes, coverage, a, b, decay_on)


class AttachedLrMatched(Attachment):
    """Nothing but parameter groups: the weights' learning rate times (a / b)^2."""

    method = "lr_matched"

    def __init__(self, adapter: Any, model: nn.Module, name: str, homes: dict[str, Home],
                 coverage: Coverage, a: float, b: float, decay_on: str) -> None:
        super().__init__(adapter, model, name, homes.values(), coverage)
        self.homes, self.factor, self.decay_on = homes, (a / b) ** 2, decay_on

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules whose weights have another rate, by name."""
        return {name: home.module for name, home in self.homes.items()}

    def trainable(self) -> list[dict[str, Any]]:
        """Return the chosen weights, and all else that trains."""
        own = list(self._own().values())
        ids = {id(p) for p in own}
        rest = [p for p in self.everything_else() if id(p) not in ids]
        return [{"params": own}, {"params": rest}] if rest else [{"params": own}]

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: home.plain for name, home in self.homes.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self._own().items()}

    def optimizer(self, cls: type, **options: Any) -> torch.optim.Optimizer:
        """Return a torch optimizer with the scaled rate on the chosen weights."""
        self.check_here()
        optimizer = cls(self.trainable(), **options)
        own = optimizer.param_groups[0]
        own["lr"] = own["lr"] * self.factor  # not in place: a tensor is shared by all groups
        if self.decay_on == "v" and own.get("weight_decay"):
            own["weight_decay"] = own["weight_decay"] / self.factor
        return optimizer

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chosen weights."""
        return {f"{name}.weight": weight.detach() for name, weight in self._own().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the chosen weights; raises `FileError` when names or shapes differ."""
        self.check_here()
        copy_checked(self.state_dict(), tensors, "lr_matched")

    def report(self) -> dict[str, Any]:
        """Return the factor, the number of layers, and what share of the model they are."""
        return {"method": "lr_matched", "effective_lr_factor": self.factor, "layers": len(self.homes),
                **self.coverage.report()}
