"""Convolutions and embeddings: the added forms, tiled over channels and over the vocabulary. Experimental.

Source: defined here; the paper has linear layers only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import ConfigError
from poise_bone.functional import block_shape, shards, tiled
from poise_bone.layers import BlockLayer
from poise_bone.variants import ADDED


class ConvLayer(BlockLayer):
    """The change of a 2-D convolution: its input channels are tiled, so that it is a convolution of their
    sum.

    Over the flattened weight (out, channels kh kw) it is the form of a linear, with r kh kw in place of r.
    """

    row_block = 1

    def __init__(self, base: nn.Module, variant: str, channels: int, *args: Any, **options: Any) -> None:
        self.variant = variant
        super().__init__(base, *args, **options)
        self.channels = channels

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the product with the change, shape (N, out, h, w)."""
        D, conv = self.block(), _innermost(self)
        kernel = (*conv.kernel_size,)
        x = self.dropped(x)
        if self.variant == "bone_out":
            each = _convolve(conv, x, D.view(len(D), -1, *kernel))
            return y + each[..., shards(self.out_features, len(D), D.device), :, :].to(y.dtype)
        r = len(D) // math.prod(kernel)
        missing = -self.channels % r
        padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        summed = padded.unflatten(-3, (-1, r)).sum(-4)
        each = _convolve(conv, summed, D.T.reshape(-1, r, *kernel))
        return y + (each if self.variant == "bone" else _repeated(each, y))


def _repeated(each: Tensor, y: Tensor) -> Tensor:
    return tiled(each.movedim(-3, -1), y.shape[-3]).movedim(-1, -3)


def _convolve(conv: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return conv._conv_forward(x.to(kernel.dtype), kernel, None).to(x.dtype)


def _innermost(layer: Any) -> Any:
    *_, first = layer.chain()
    return first.base


class EmbeddingLayer(BlockLayer):
    """The change of an embedding (num, dim): token t gets row t mod r of D (r, dim), which tokens share."""

    variant, row_block = "embedding", 1

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + D[x mod r], shape (..., dim)."""
        D = self.block()
        return y + F.dropout(F.embedding(x % len(D), D), self.dropout, self.training).to(y.dtype)

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return the embedding's rows from `first` on, with their change."""
        D = self.block()
        rows = torch.arange(first, first + len(W), device=D.device) % len(D)
        return (W.to(D.dtype) + D[rows]).to(W.dtype)


def conv_shape(conv: Any, variant: str, r: int, mini_r: int | None) -> tuple[int, ...]:
    """Return the shape of a convolution's block.

    Raises
    ------
    ConfigError
        For grouped or transposed convolutions, other dimensions than two, and weight-guided forms.
    """
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        kind = type(conv).__name__
        raise ConfigError(f"{kind}{' with groups' if isinstance(conv, nn.Conv2d) else ''} cannot be "
                          f"adapted: "
                          f"allowed is Conv2d with groups=1")
    if variant not in ADDED:
        raise ConfigError(f"variant={variant} has no form for a convolution: allowed is {', '.join(ADDED)}")
    taps = math.prod(conv.kernel_size)
    shape = block_shape(variant, conv.out_channels, conv.in_channels if variant != "bone_out" else
                        conv.in_channels * taps, r, mini_r)
    return shape if variant == "bone_out" else (shape[0] * taps, shape[1])


def embedding_shape(embedding: Any, variant: str, r: int) -> tuple[int, ...]:
    """Return the shape of an embedding's block.

    Raises
    ------
    ConfigError
        For an embedding that rescales what it looks up, other forms than bone, and r above the vocabulary.
    """
    own = type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None
    if own or variant != "bone":
        what = f"{type(embedding).__name__} with arithmetic of its own" if own else f"variant={variant}"
        raise ConfigError(f"{what}: allowed is a plain embedding, with variant=bone")
    num, dim = embedding.weight.shape
    if r > num:
        raise ConfigError(f"r={r} exceeds the {num} rows of the embedding: lower r")
    return (r, dim)
