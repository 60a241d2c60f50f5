"""The kit's own adapter: a low-rank update, on linears and on experts, plain and packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from poise.adapters import AdaptedLayer, AttachedLayers, attach_layers, choose_layers
from poise.options import check_options, option


@dataclass(frozen=True)
class LowRank:
    """W + B A, or (I + B A) W with `multiply`, which depends on the weight as earlier adapters leave it."""

    r: int = option(2, "rank of the update", low=1)
    multiply: bool = option(False, "act on the output rows instead of adding to the weight")
    target_modules: list[str] | None = option(None, "patterns of weights; null: linears, experts, no head")
    exclude_modules: list[str] | None = option(None, "patterns of weights to leave alone")

    freezes_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def attach(self, model: nn.Module, name: str = "default") -> AttachedLayers:
        """Attach to the matching linears and experts, in place; see `poise.interfaces.Adapter`."""
        chosen = choose_layers(model, "low_rank", self.target_modules, self.exclude_modules,
                               ("linear", "expert"))
        made = LeftLayer if self.multiply else SumLayer
        layers = {w.name: made(w.layer, self.r) for w in chosen}
        return attach_layers(model, layers, chosen, adapter=self, name=name)


class SumLayer(AdaptedLayer):
    """W + B A; A is random and B zero, so that attaching changes nothing."""

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base)
        out, columns = self.weight_beneath.shape
        dtype = torch.promote_types(self.weight_beneath.dtype, torch.float32)
        self.A = nn.Parameter(torch.randn(r, columns, dtype=dtype) / columns**0.5)
        self.B = nn.Parameter(torch.zeros(out, r, dtype=dtype))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + x A^T B^T."""
        return y + (x.to(self.A.dtype) @ self.A.T @ self.B.T).to(y.dtype)

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return W + B A."""
        return (W.to(self.A.dtype) + self.B @ self.A).to(W.dtype)


class LeftLayer(AdaptedLayer):
    """(I + B A) W: the change is a function of the weight beneath."""

    guided = True

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base)
        out, _ = self.weight_beneath.shape
        dtype = torch.promote_types(self.weight_beneath.dtype, torch.float32)
        self.A = nn.Parameter(torch.randn(r, out, dtype=dtype) / out**0.5)
        self.B = nn.Parameter(torch.zeros(out, r, dtype=dtype))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return (y - b) (I + B A)^T + b: the bias is not part of the weight."""
        product = (y if self.bias is None else y - self.bias).to(self.A.dtype)
        return y + (product @ self.A.T @ self.B.T).to(y.dtype)

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return (I + B A) W."""
        wide = W.to(self.A.dtype)
        return (wide + self.B @ (self.A @ wide)).to(W.dtype)
