"""The Bone update as plain functions.

Shapes: x (..., i), D (r, o), W (o, i). Source: arXiv 2409.15371 v12, eq. 4-6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shard_sum(x: Tensor, r: int) -> Tensor:
    """Return S = sum over blocks of x's last axis, shape (..., r); a last block is zero-padded.

    Half-precision inputs are summed in fp32.
    """
    missing = -x.shape[-1] % r
    padded = F.pad(x, (0, missing)) if missing else x
    blocks = padded.reshape(*x.shape[:-1], -1, r)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return blocks.sum(-2, dtype=wide)


def bone_forward(x: Tensor, D: Tensor) -> Tensor:
    """Return the update's output S D, shape (..., o), in x's dtype."""
    return (shard_sum(x, D.shape[0]).to(D.dtype) @ D).to(x.dtype)


def bone_delta(D: Tensor, in_features: int) -> Tensor:
    """Return the weight change (o, i): delta[p, j] = D[j mod r, p]."""
    columns = torch.arange(in_features, device=D.device) % D.shape[0]
    return D.T[:, columns]


def fold_weight(W: Tensor, D: Tensor) -> Tensor:
    """Return W plus the change, added in at least fp32 and rounded once to W's dtype."""
    wide = torch.promote_types(W.dtype, torch.float32)
    return (W.to(wide) + bone_delta(D.to(wide), W.shape[1])).to(W.dtype)
