"""One expert's matrix as a layer that holds none: it is read for each product, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.quantizers.sliced import SlicedMatrix
from poise.walk import Weight
from poise_edgemoe.store.schemes import RawMatrix
from poise_edgemoe.tuning.shelf import Shelf


class _Product(torch.autograd.Function):
    """x W^T; the backward pass asks for W again and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StreamedExpert) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        with layer.lent() as W:
            return F.linear(x, W)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with ctx.layer.lent() as W:
            return (dy @ W.to(dy.dtype)).to(ctx.dtype), None


class StreamedExpert(nn.Module):
    """The product with one matrix of an expert that lies in a store.

    Parameters
    ----------
    shelf : Shelf
    layer, expert, part
        Which matrix of the store.
    like : Weight
        The weight that it stands in for.
    """

    kind: Tensor

    def __init__(self, shelf: Shelf, layer: int, expert: int, part: str, like: Weight) -> None:
        super().__init__()
        self._shelf = (shelf,)  # in a tuple, as what follows: no part of the model
        self.at = layer, expert, part
        self._form = like.shape, like.plain
        self.transposed = shelf.index.layers[layer].transposed
        # empty: it is moved and cast with the model, and says to where and to what
        self.register_buffer("kind", torch.empty(0, dtype=like.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T, shape (..., out)."""
        y: Any = _Product.apply(x, self)
        return y

    def read(self, rows: slice | None = None) -> Tensor:
        """Return the matrix (out, in), or some of its output rows, as the model would hold it."""
        stored, _ = self._shelf[0].matrix(*self.at)
        if not self.transposed:
            return stored.dequantize(rows).to(self.kind)
        # the model has it as (in, out), and a product may depend in its last bit on how a matrix lies
        whole: Tensor = stored.dequantize()
        whole = (whole if isinstance(stored, RawMatrix) else whole.T.contiguous()).T
        return (whole if rows is None else whole[rows]).to(self.kind)

    @contextmanager
    def lent(self) -> Iterator[Tensor]:
        """Yield the same matrix for one product: one that has to be made is made where the last one was.

        Matrices that come and go would leave an allocator's memory in pieces, one layer's size of it.
        """
        (shelf,), kind = self._shelf, self.kind
        stored, _ = shelf.matrix(*self.at)
        if kind.device.type != "cpu" or not isinstance(stored, (RawMatrix, SlicedMatrix)):
            yield self.read()
            return
        with shelf.alone():
            if isinstance(stored, RawMatrix):
                made = shelf.cast(stored.weight, stored.dtype)
            else:
                made = stored.dequantize_into(shelf.scratch("dense", stored.shape, stored.dtype))
                if self.transposed:
                    made = shelf.scratch("transposed", made.T.shape, made.dtype).copy_(made.T)
            made = shelf.cast(made, kind.dtype)
            yield made.T if self.transposed else made

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the matrix, for the walk."""
        (shelf,), (shape, plain) = self._shelf, self._form
        yield Weight(
            path, "expert", shape, self.kind.dtype, f"{path}.weight".lstrip("."), self, "streamed",
            (id(self),), _read=self._detached, _write=self._refuse, replaceable=True, plain=plain,
            lies_in=str(shelf.folder))

    def extra_repr(self) -> str:
        out, columns = self._form[0]
        return f"{columns} -> {out}, expert {self.at[1]} of layer {self.at[0]} in {self._shelf[0].folder}"

    def _detached(self, rows: slice | None) -> Tensor:
        with torch.no_grad():
            return self.read(rows)

    def _refuse(self, matrix: Tensor) -> None:
        raise ConfigError(f"expert {self.at[1]} of layer {self.at[0]} lies in {self._shelf[0].folder}, "
                          f"which is only read: write to the model in memory, and convert that")
