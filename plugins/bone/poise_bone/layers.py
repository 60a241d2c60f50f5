"""A linear layer, plain or packed, with a Bone update beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.quantizers import PackedLinear
from poise_bone.functional import bone_forward, fold_weight


class BoneLinear(nn.Module):
    """Wraps a linear as its child `base` and adds S D to its output.

    Parameters
    ----------
    base : nn.Linear or PackedLinear
    r : int
        Block size, at most the layer's inputs.
    """

    wraps_base = True  # the walk over weights looks through this layer

    base: nn.Linear | PackedLinear

    def __init__(self, base: nn.Linear | PackedLinear, r: int) -> None:
        super().__init__()
        self.base = base
        held = base.weight if isinstance(base, nn.Linear) else next(base.buffers())
        dtype = base.weight.dtype if isinstance(base, nn.Linear) else torch.float32
        # the update is small: half-precision bases get a full-precision one
        wide = torch.promote_types(dtype, torch.float32)
        self.D = nn.Parameter(torch.zeros(r, base.out_features, dtype=wide, device=held.device))
        self._unfolded: PackedLinear | Tensor | None = None

    @property
    def folded(self) -> bool:
        """Whether the base holds the change already."""
        return self._unfolded is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b + S D, shape (..., out)."""
        y = self.base(x)
        return y if self.folded else y + bone_forward(x, self.D).to(y.dtype)

    def folded_weight(self) -> Tensor:
        """Return the dense weight with the change in it, shape (out, in)."""
        if isinstance(self.base, PackedLinear):
            return fold_weight(self.base.packed.get().dequantize(), self.D.detach())
        weight = self.base.weight.detach()
        return weight if self.folded else fold_weight(weight, self.D.detach())

    def checkpoint_weight(self) -> Tensor:
        """Return `folded_weight` the way round that the model's own checkpoint has it."""
        held = self._unfolded if self.folded else self.base
        flipped = isinstance(held, PackedLinear) and held.transposed
        return self.folded_weight().T.contiguous() if flipped else self.folded_weight()

    def fold(self) -> None:
        """Put the change into the base; a packed base makes room for a plain one."""
        if self.folded:
            return
        weight = self.folded_weight()
        if isinstance(self.base, PackedLinear):
            self._unfolded = self.base
            plain = self.base.dense()
            plain.requires_grad_(False)
            plain.weight.data = weight
            self.base = plain
        else:
            # the original is kept: subtracting the change again would not restore it bit for bit
            self._unfolded = self.base.weight.detach().clone()
            self.base.weight.data = weight

    def unfold(self) -> None:
        """Restore the base exactly as it was before `fold`."""
        if isinstance(self._unfolded, PackedLinear):
            self.base = self._unfolded
        elif self._unfolded is not None and isinstance(self.base, nn.Linear):
            self.base.weight.data = self._unfolded
        self._unfolded = None
