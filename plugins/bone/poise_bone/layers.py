"""A linear layer, plain or packed, with a Bone update beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.adapters import AdaptedLayer
from poise_bone.functional import bone_forward, fold_weight


class BoneLinear(AdaptedLayer):
    """Adds S D to the product of the layer that it wraps.

    Parameters
    ----------
    base : nn.Module
        A linear, a packed one, or another adapter's layer.
    r : int
        Block size, at most the layer's inputs.
    """

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base)
        beneath = self.weight_beneath
        # the update is small: half-precision bases get a full-precision one
        wide = torch.promote_types(beneath.dtype, torch.float32)
        device = beneath.read(slice(0, 1)).device
        self.D = nn.Parameter(torch.zeros(r, beneath.shape[0], dtype=wide, device=device))

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + S D, shape (..., out)."""
        return y + bone_forward(x, self.D).to(y.dtype)

    def changed(self, W: Tensor) -> Tensor:
        """Return W with D^T added to every block of r columns."""
        return fold_weight(W, self.D)
