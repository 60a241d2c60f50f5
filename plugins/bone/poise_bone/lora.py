"""LoRA as PEFT makes it, behind the adapter contract: what Bone is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.adapters import AdaptedLayer, AttachedLayers, attach_layers, choose_layers
from poise.errors import require


def adapt(
    model: nn.Module, *, adapter: Any, name: str, target_modules: list[str] | None,
    exclude_modules: list[str] | None, **options: Any,
) -> AttachedLayers:
    """Put PEFT's LoRA on the matching linears and freeze all else; see `Lora.attach`."""
    peft = require("peft", "peft")
    chosen = choose_layers(model, "lora", target_modules, exclude_modules, ("linear",))
    layers = {w.name: LoraLayer(w.layer, peft, options) for w in chosen}
    return attach_layers(model, layers, chosen, adapter=adapter, name=name)


class LoraLayer(AdaptedLayer):
    """y + s B A dropout(x), with the modules that PEFT makes for a linear of this size.

    Parameters
    ----------
    base : nn.Module
        A linear, a packed one, or another adapter's layer.
    peft : module
    options : dict
        Of `peft.LoraConfig`.
    """

    row_block = 1

    def __init__(self, base: nn.Module, peft: Any, options: dict[str, Any]) -> None:
        super().__init__(base)
        beneath = self.weight_beneath
        out, columns = beneath.shape
        device = beneath.read(slice(0, 1)).device
        stand_in = nn.Linear(columns, out, bias=False, device="meta").to_empty(device=device)
        config = peft.LoraConfig(target_modules=["it"], **options)
        made: Any = peft.inject_adapter_in_model(config, nn.ModuleDict({"it": stand_in}))["it"]
        (self.lora_A,), (self.lora_B,) = made.lora_A.values(), made.lora_B.values()
        (self.lora_dropout,) = made.lora_dropout.values()
        (self.scaling,) = made.scaling.values()

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A x, shape (..., out)."""
        x = x.to(self.lora_A.weight.dtype)
        return y + (self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling).to(y.dtype)

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return W, output rows from `first` on, with s B A added, rounded once."""
        A, B = self.lora_A.weight, self.lora_B.weight
        wide = torch.promote_types(W.dtype, A.dtype)
        return (W.to(wide) + self.scaling * (B[first: first + len(W)] @ A)).to(W.dtype)
