"""Layers that hold packed bytes: of a linear, of one expert, of a table of embeddings.

They never hold a whole dequantized weight, forward or backward.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import FileError
from poise.hooks import Preparable
from poise.quantizers.components import format_of
from poise.quantizers.kernel import watched
from poise.walk import Product, Weight

FORMAT = "poise_format"


class _Matmul(torch.autograd.Function):
    """x @ W.T for a packed W; the backward pass dequantizes slices again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Any) -> Tensor:
        ctx.stored, ctx.dtype = stored, x.dtype
        return stored.matmul(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.stored.matmul_t(grads[0]).to(ctx.dtype), None


def packed_matmul(x: Tensor, stored: Any) -> Tensor:
    """Return x @ W.T, differentiable in x; under autocast in autocast's precision."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Matmul.apply(x, stored)  # type: ignore[return-value]


class Stored(nn.Module):
    """A `QuantizedTensor` whose tensors are buffers, so that it moves and saves with the model.

    Casting the model leaves them as they are and sets the type that `dequantize` returns. The state also
    holds the format, a JSON text as bytes: a state of another format is refused, not misread.
    """

    def __init__(self, stored: Any, quantizer: Any) -> None:
        super().__init__()
        self.quantizer, self.shape, self.dtype = quantizer, stored.shape, stored.dtype
        self.names = list(stored.tensors())
        for name, tensor in stored.tensors().items():
            self.register_buffer(name, tensor)
        text = json.dumps({**format_of(quantizer), "shape": list(stored.shape)}, sort_keys=True)
        self.register_buffer(FORMAT, torch.tensor(list(text.encode()), dtype=torch.uint8))
        self._made: tuple[list[Tensor], Any, Any] = ([], None, None)
        self.kernel = "auto"  # of products that nothing is differentiated through
        self._fast: tuple[Any, str, Any] = (None, "", None)

    def get(self) -> Any:
        """Return the `QuantizedTensor`, the same one until its tensors or its dtype change."""
        tensors = [getattr(self, n) for n in self.names]
        versions = [self.dtype, *(0 if t.is_inference() else t._version for t in tensors)]
        # the tensors themselves are kept: of one that is gone, another may have the identity
        kept, then, made = self._made
        if then != versions or any(a is not b for a, b in zip(kept, tensors, strict=True)):
            made = self.quantizer.from_tensors(dict(zip(self.names, tensors)), self.shape, self.dtype)
            self._made = tensors, versions, made
        return made

    def prepared(self) -> Any:
        """Return it on the kernel that `kernel` names, the same one as long as `get` returns the same."""
        stored = self.get()
        made, name, found = self._fast
        if made is not stored or name != self.kernel:
            found = stored.prepared(self.kernel) if isinstance(stored, Preparable) else stored
            self._fast = stored, self.kernel, found
        return found

    def put(self, matrix: Tensor) -> None:
        """Replace the weight by the quantized form of a dense matrix (out, in)."""
        for name, tensor in self.quantizer.quantize(matrix.to(self.dtype)).tensors().items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        before = {n: getattr(self, n) for n in (*self.names, FORMAT)}
        super()._apply(fn, recurse)
        for name, tensor in before.items():  # model.to(bfloat16) moves codes and scales, no more
            if (moved := getattr(self, name)).dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before[FORMAT].device)).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + FORMAT)
        if saved is None:
            raise FileError(f"the state of {prefix[:-1]} does not say in which format it is packed: save "
                            f"it again with this Poise")
        self._check_type(state_dict, prefix, FORMAT)
        theirs, own = (bytes(t.tolist()).decode(errors="replace") for t in (saved, getattr(self, FORMAT)))
        if theirs != own:
            raise FileError(f"the state of {prefix[:-1]} is packed as {theirs}, this layer as {own}: "
                            f"quantize the model alike first")
        for name in self.names:
            self._check_type(state_dict, prefix, name)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_type(self, state: Any, prefix: str, name: str) -> None:
        """Refuse a tensor of another type, which torch would cast without a word."""
        given, kept = state.get(prefix + name), getattr(self, name)
        if given is not None and (given.dtype, given.dim()) != (kept.dtype, kept.dim()):
            raise FileError(f"the state of {prefix[:-1]} holds {name} as {given.dtype} of {given.dim()} "
                            f"dimensions, not {kept.dtype} of {kept.dim()}: it is damaged")


class PackedLinear(nn.Module):
    """A linear layer over a packed weight (out, in).

    Parameters
    ----------
    stored : QuantizedTensor or Stored
        A `Stored` may be that of other layers, too.
    quantizer : Quantizer
        The one that made it; used to rebuild and to requantize.
    bias : Parameter or None
    like : nn.Module, optional
        The layer that it replaces, which `dense` makes again; without one an `nn.Linear`. Its weight is
        dropped.
    """

    packed: Stored
    is_expert = True  # nothing but a matrix: packing it again may take its place

    def __init__(
        self, stored: Any, quantizer: Any, bias: nn.Parameter | None = None, like: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.packed = stored if isinstance(stored, Stored) else Stored(stored, quantizer)
        self.bias = bias
        shell = like or nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        # a transposed layer (GPT-2's Conv1D, gpt-oss's experts) holds the weight as (in, out)
        self.transposed = like is not None and _is_transposed(like)
        self._shell = (_without_weight(shell),)  # in a tuple: no child of this layer

    @property
    def like(self) -> nn.Module:
        """The layer that it replaced, without its weight."""
        return self._shell[0]

    @property
    def weight(self) -> Product:
        """Stands for the matrix in its own product: models look at a linear's weight."""
        return Product(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (..., out)."""
        seen = torch.is_grad_enabled() or watched()
        y = packed_matmul(x, self.packed.get()) if seen else self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """Return x W^T where nothing is differentiated, traced or compiled."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.packed.prepared().matmul(x)

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the packed weight."""
        stored = self.packed.get()
        yield Weight(
            path or "weight", "linear", (stored.shape[0], stored.shape[1]), stored.dtype,
            f"{path}.weight".lstrip("."), self, "packed", (id(self.packed),),
            _read=lambda rows: self.packed.get().dequantize(rows), _write=self.packed.put, stored=stored,
            replaceable=True, plain=(lambda t: t.T) if self.transposed else (lambda t: t),
            beside=lambda: [] if self.bias is None else [(f"{path}.bias".lstrip("."), self.bias.detach())],
        )

    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return the plain layer with the dequantized weight, or with another matrix (out, in)."""
        whole: Tensor = self.packed.get().dequantize() if matrix is None else matrix
        layer: Any = copy.copy(self.like)
        layer._parameters = dict(layer._parameters)
        layer.weight = nn.Parameter(whole.T.contiguous() if self.transposed else whole)
        if hasattr(layer, "bias"):
            layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        stored = self.packed.get()
        return f"{self.in_features} -> {self.out_features}, {stored.bits_per_weight:.2f} bits"


class PackedEmbedding(nn.Module):
    """A table of embeddings over a packed matrix (rows, width): a row is made in full when it is looked up.

    Parameters
    ----------
    packed : Stored
        An output layer that is tied with the table is a `PackedLinear` of the same one.
    """

    def __init__(self, packed: Stored) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.packed = packed

    @property
    def weight(self) -> Product:
        """Stands for the matrix: models look at an embedding's weight."""
        return Product(self)

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows, shape (..., width).

        Raises
        ------
        IndexError
            For what is no row, below 0 too.
        TypeError
            For what is no int32 or int64: of a mask, True would be row 1.
        """
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"rows of a table are named by int32 or int64, not {ids.dtype}")
        wanted, at = torch.unique(ids, return_inverse=True)
        numbers, stored = wanted.tolist(), self.packed.get()
        if numbers and not 0 <= numbers[0] <= numbers[-1] < self.num_embeddings:
            raise IndexError(f"row {numbers[0] if numbers[0] < 0 else numbers[-1]} is none of the "
                             f"{self.num_embeddings} of this table")
        none = stored.dequantize(slice(0))
        return torch.cat([none, *(stored.dequantize(slice(n, n + 1)) for n in numbers)])[at]

    def held_weights(self, path: str) -> Iterator[Weight]:
        """Yield the packed weight."""
        stored = self.packed.get()
        yield Weight(
            path or "weight", "embedding", (stored.shape[0], stored.shape[1]), stored.dtype,
            f"{path}.weight".lstrip("."), self, "packed", (id(self.packed),),
            _read=lambda rows: self.packed.get().dequantize(rows), _write=self.packed.put, stored=stored)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.get().bits_per_weight:.2f} bits"


def _without_weight(layer: nn.Module) -> nn.Module:
    shell = copy.copy(layer)
    shell._parameters = dict.fromkeys(layer._parameters)
    return shell


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" or bool(getattr(layer, "transposed", False))
