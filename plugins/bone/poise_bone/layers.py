"""Layers with a change beside the product that they wrap: plain, packed, or one expert's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.adapters import AdaptedLayer
from poise.errors import RunError
from poise.holding import tensor_of
from poise_bone.functional import add_rows, change_rows, pull_bat, shard_sum, shards
from poise_bone.lean import Rows, blockwise, factored, recomputed, suits_factored


class Blocks(nn.Module):
    """The blocks of all experts of a fused parameter, as one parameter (E, ...).

    An expert that no token was routed to gets a gradient of zero.
    """

    def __init__(self, n: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(n, *shape, dtype=dtype, device=device))
        self._parts: tuple[Any, ...] = ()

    def part(self, number: int) -> Tensor:
        """Return one expert's block.

        All that are used between two steps come from one split: gradients of single slices would each be as
        large as the whole.
        """
        if not (torch.is_grad_enabled() and self.D.requires_grad):
            return self.D[number]
        # a cast or a move puts other memory under the same parameter, and raises no version
        key = id(self.D), self.D._version, self.D.data_ptr(), self.D.dtype
        if self._parts[:1] != (key,):
            self._parts = key, self.D.unbind(0)
        return self._parts[1][number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": ()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Blocks:
        other = Blocks.__new__(Blocks)
        memo[id(self)] = other
        nn.Module.__init__(other)
        other._parts = ()
        other.D = nn.Parameter(self.D.detach().clone(), requires_grad=self.D.requires_grad)
        return other.train(self.training)


class BlockLayer(AdaptedLayer):
    """What the layers of all variants share.

    Parameters
    ----------
    base : nn.Module
        A linear, a packed one, one expert's product, or another adapter's layer.
    shape : tuple of int
        Of the block; see `functional.block_shape`.
    scale : float
        Factor of an added change.
    dropout : float
        Probability with which an input is left out of the change, in training.
    shared : (Blocks, int), optional
        Where the block lies, when experts share a parameter; otherwise it is a parameter of this layer.
    """

    variant: str

    def __init__(
        self, base: nn.Module, shape: tuple[int, ...], *, scale: float = 1.0, dropout: float = 0.0,
        shared: tuple[Blocks, int] | None = None,
    ) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        self._shared = shared
        if shared is None:
            dtype, device = kind_of(self)
            self.D = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        elif shared[1] == 0:
            self.blocks = shared[0]  # the first expert's layer owns them

    def own_block(self) -> Tensor:
        """Return what trains, as this layer has it."""
        return self.D if self._shared is None else self._shared[0].part(self._shared[1])

    def block(self) -> Tensor:
        """Return what trains, times its scale."""
        D = self.own_block()
        return D if self.scale == 1.0 else D * self.scale

    def trained(self) -> list[Tensor]:
        """Return what the change depends on and trains."""
        return [D] if (D := self.own_block()).requires_grad else []

    def changed(self, W: Tensor, first: int = 0) -> Tensor:
        """Return W, output rows from `first` on, with its change, rounded once."""
        return change_rows(W, self.block(), self.variant, first, self.out_features).to(W.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """Return what the change is made of: x, some of it left out in training."""
        return F.dropout(x, self.dropout, self.training)

    @property
    def drops(self) -> bool:
        """Whether inputs are left out now."""
        return self.training and self.dropout > 0


def kind_of(layer: AdaptedLayer) -> tuple[torch.dtype, torch.device]:
    """Return type and place of a block: a small change of a half-precision base needs full precision."""
    beneath = layer.weight_beneath
    return torch.promote_types(beneath.dtype, torch.float32), beneath.read(slice(0, 1)).device


# ------------------------------------------------------------------ added forms


class TiledLayer(BlockLayer):
    """What bone and mini share: the same sum in every block of columns."""

    row_block = 1

    def change_into(self, out: Tensor, W: Tensor, first: int) -> None:
        """Write the changed rows, as one sum where the types are one."""
        if not add_rows(out, W, self.block(), first):
            super().change_into(out, W, first)


class BoneLayer(TiledLayer):
    """y + S D."""

    variant = "bone"

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + S D, shape (..., out)."""
        D = self.block()
        return plus_product(y, shard_sum(self.dropped(x), len(D)), D)


class MiniLayer(TiledLayer):
    """y + S P, repeated over the outputs: P (r, m)."""

    variant = "mini"

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus S P in every block of m outputs, shape (..., out)."""
        P = self.block()
        update = shard_sum(self.dropped(x), len(P)).to(P.dtype) @ P
        return (y.unflatten(-1, (-1, P.shape[1])) + update.unsqueeze(-2).to(y.dtype)).flatten(-2)


class BoneOutLayer(BlockLayer):
    """y plus x D^T, one number for each shard of outputs: D (N, in)."""

    variant, row_block = "bone_out", 1

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with x D^T of its shard added to each output, shape (..., out)."""
        D = self.block()
        update = (self.dropped(x).to(D.dtype) @ D.T).to(y.dtype)
        if not y.shape[-1] % len(D):
            return (y.unflatten(-1, (len(D), -1)) + update.unsqueeze(-1)).flatten(-2)
        return y + update[..., shards(y.shape[-1], len(D), y.device)]


def plus_product(y: Tensor, S: Tensor, D: Tensor) -> Tensor:
    """Return y + S D, as one product where the types are one."""
    S = S.to(D.dtype)
    if y.dtype == D.dtype and not torch.is_autocast_enabled(y.device.type):
        return torch.addmm(y.flatten(0, -2), S.flatten(0, -2), D).view(y.shape) if y.ndim > 1 else y + S @ D
    return y + (S @ D).to(y.dtype)


# ------------------------------------------------------------------ weight-guided forms


class GuidedLayer(BlockLayer):
    """What the weight-guided forms share: their change is a function of the weight beneath."""

    guided = True

    def __init__(self, base: nn.Module, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(base, shape, **options)
        self.row_block = self.r = shape[-1]  # rows of a block change together

    def product(self, x: Tensor) -> Tensor:
        """Return the product with the changed weight, shape (..., out)."""
        if self.drops:
            return self.base(x) + self.change(self.dropped(x))
        return self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        """Return x W'^T and the bias."""
        raise NotImplementedError

    def change(self, x: Tensor) -> Tensor:
        """Return x (W' - W)^T."""
        raise NotImplementedError

    def product_without_bias(self, x: Tensor) -> Tensor:
        """Return x W^T of the weight beneath."""
        y = self.base(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)


class BatRowLayer(GuidedLayer):
    """(x + v) W^T plus the sum of v's blocks, v[b] = x[b] B[b]^T: no changed weight is ever built."""

    variant = "bat_row"

    def whole(self, x: Tensor) -> Tensor:
        """Return x W'^T and the bias."""
        v = self._v(x)
        return self._plus_sum(self.base(x + v), v)

    def change(self, x: Tensor) -> Tensor:
        """Return x (W' - W)^T."""
        v = self._v(x)
        return self._plus_sum(self.product_without_bias(v), v)

    def _v(self, x: Tensor) -> Tensor:
        B = self.block()
        return blockwise(x.reshape(-1, *B.shape[:2]), B.mT).reshape(x.shape)

    def _plus_sum(self, y: Tensor, v: Tensor) -> Tensor:
        r = self.block().shape[-1]
        total = shard_sum(v, r).to(y.dtype)
        return (y.unflatten(-1, (-1, r)) + total.unsqueeze(-2)).flatten(-2)


class BatLeftLayer(GuidedLayer):
    """h[a] + (h[a] + S) B[a] with h = x W^T: the weight itself is never looked at. Experimental."""

    variant = "bat_left"

    def whole(self, x: Tensor) -> Tensor:
        """Return x W'^T and the bias."""
        y = self.base(x)
        h = y if self.bias is None else y - self.bias.to(y.dtype)
        return self._plus_change(y, h, x)

    def change(self, x: Tensor) -> Tensor:
        """Return x (W' - W)^T."""
        h = self.product_without_bias(x)
        return self._plus_change(torch.zeros_like(h), h, x)

    def _plus_change(self, y: Tensor, h: Tensor, x: Tensor) -> Tensor:
        B = self.block()
        S = shard_sum(x, B.shape[-1]).to(h.dtype)
        both = (h.unflatten(-1, B.shape[:2]) + S.unsqueeze(-2)).reshape(-1, *B.shape[:2])
        return y + blockwise(both, B).reshape(y.shape)


class RecomputedLayer(GuidedLayer):
    """A form whose product needs the changed weight: it is built chunk by chunk and not kept."""

    @property
    def drops(self) -> bool:
        """Whether inputs are left out now, here or beneath: the change is then made beside the product."""
        return any(self.training and one.acts and getattr(one, "dropout", 0) > 0 for one in self.chain())

    def whole(self, x: Tensor) -> Tensor:
        """Return x W'^T and the bias."""
        return recomputed(x, self.block(), self.rows(self._changed), self.bias)

    def change(self, x: Tensor) -> Tensor:
        """Return x (W' - W)^T."""
        return recomputed(x, self.block(), replace(self.rows(self._added), base=None))

    def _changed(self, W: Tensor, part: Tensor, first: int) -> Tensor:
        return change_rows(W, part.to(W.dtype), self.variant, first, self.out_features)

    def _added(self, W: Tensor, part: Tensor, first: int) -> Tensor:
        return change_rows(W, part.to(W.dtype), self.variant, first, self.out_features, added=False)

    def part(self, rows: slice) -> slice:
        """Return which of the block's first axis some output rows depend on."""
        return slice(None)

    def pull(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return a gradient of the block that is written out, where there is one."""
        return None

    def rows(self, change: Callable[[Tensor, Tensor, int], Tensor]) -> Rows:
        """Return the weight beneath as rows to be built."""
        others = tuple(t for one in self.chain() if one is not self and one.acts for t in one.trained())
        weight = self.weight_beneath
        held, module = tensor_of(weight), weight.module
        if held is not None and held.requires_grad:
            raise RunError(f"{self.place} requires a gradient, and {self.adapter!r} freezes its base: set "
                           f"requires_grad = False again")
        assert module is not None
        sources = [held] if held is not None else list(module.buffers())
        alone = not isinstance(self.base, AdaptedLayer)
        return Rows(
            weight.shape, weight.dtype, self.r, weight.read if alone else self.beneath, change,
            self.pull(), self.part, others, self.base, lambda: [t._version for t in (*sources, *others)],
            views=alone and weight.stored is None, packed=weight.stored is not None, name=self.place)


class BatLayer(RecomputedLayer):
    """W[a, b] B[a] + B[a] for every block of outputs a."""

    variant = "bat"

    def whole(self, x: Tensor) -> Tensor:
        """Return x W'^T and the bias."""
        B, rows = self.block(), self.rows(self._changed)
        return (factored if suits_factored(x, B, rows) else recomputed)(x, B, rows, self.bias)

    def part(self, rows: slice) -> slice:
        """Return the blocks of B that some output rows depend on."""
        r = self.r
        return slice(rows.start // r, rows.stop // r)

    def pull(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the gradient of some rows' blocks: the same whether W itself is in the rows or not."""
        return lambda W, G: pull_bat(W, G, self.r)

    def _changed(self, W: Tensor, part: Tensor, first: int) -> Tensor:
        return change_rows(W, part.to(W.dtype), self.variant, 0, len(W))  # part is of these rows alone

    def _added(self, W: Tensor, part: Tensor, first: int) -> Tensor:
        return change_rows(W, part.to(W.dtype), self.variant, 0, len(W), added=False)


class BoneFreeLayer(RecomputedLayer):
    """W[a, b] B[a mod p, b mod q] + B[a mod p, b mod q]. Experimental."""

    variant = "bone_free"


LAYERS: dict[str, type[BlockLayer]] = {
    cls.variant: cls for cls in (
        BoneLayer, BoneOutLayer, MiniLayer, BatLayer, BatRowLayer, BatLeftLayer, BoneFreeLayer)}
