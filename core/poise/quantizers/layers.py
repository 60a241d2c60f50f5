"""Layers that hold packed bytes: a linear, and the experts of a fused parameter.

Neither ever holds a whole dequantized weight, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.walk import expert_name


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


class _Stored(nn.Module):
    """A `QuantizedTensor` whose tensors are buffers, so that it moves and saves with the model."""

    def __init__(self, stored: Any, quantizer: Any) -> None:
        super().__init__()
        self.quantizer, self.shape, self.dtype = quantizer, stored.shape, stored.dtype
        self.names = list(stored.tensors())
        for name, tensor in stored.tensors().items():
            self.register_buffer(name, tensor)

    def get(self) -> Any:
        tensors = {n: getattr(self, n) for n in self.names}
        return self.quantizer.from_tensors(tensors, self.shape, self.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> _Stored:
        before = {n: getattr(self, n).dtype for n in self.names}
        super()._apply(fn, recurse)
        for name, dtype in before.items():  # model.to(bfloat16) moves codes and scales, no more
            if getattr(self, name).dtype != dtype:
                raise ConfigError(
                    f"a packed weight keeps its {name} in {dtype}: cast the model before quantizing it"
                )
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in self.names:  # a checkpoint may hold scales of another width than ours
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(getattr(self, name), dtype=saved.dtype))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def put(self, matrix: Tensor) -> None:
        for name, tensor in self.quantizer.quantize(matrix.to(self.dtype)).tensors().items():
            setattr(self, name, tensor)


class PackedLinear(nn.Module):
    """A linear layer over a packed weight (out, in).

    Parameters
    ----------
    stored : QuantizedTensor
    quantizer : Quantizer
        The one that made it; used to rebuild and to requantize.
    bias : Parameter or None
    transposed : bool
        Whether the layer it replaces keeps its weight as (in, out), as GPT-2's Conv1D does.
    """

    packed: _Stored

    def __init__(
        self, stored: Any, quantizer: Any, bias: nn.Parameter | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = stored.shape
        self.packed = _Stored(stored, quantizer)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, shape (..., out)."""
        y = packed_matmul(x, self.packed.get())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def packed_weights(self, path: str) -> Iterator[tuple[str, int | None, Callable[[], Any]]]:
        """Yield (name, index, getter) for the walk over weights."""
        yield path, None, self.packed.get

    def requantize(self, matrix: Tensor, index: int | None = None) -> None:
        """Replace the weight by the quantized form of a dense matrix."""
        self.packed.put(matrix)

    def dense(self) -> nn.Linear:
        """Return a plain linear with the dequantized weight."""
        stored = self.packed.get()
        linear = nn.Linear(self.in_features, self.out_features, bias=False, dtype=stored.dtype)
        linear.weight.data = stored.dequantize()
        linear.bias = self.bias
        return linear

    def extra_repr(self) -> str:
        stored = self.packed.get()
        return f"{self.in_features} -> {self.out_features}, {stored.bits_per_weight:.2f} bits"


class _Expert:
    """Stands where a model expects one expert's matrix; linear and matmul go to the packed form."""

    def __init__(self, stored: Any, transposed: bool) -> None:
        self.stored, self.transposed = stored, transposed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and isinstance(args[1], cls) and not args[1].transposed:
            y = packed_matmul(args[0], args[1].stored)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return y if bias is None else y + bias
        products = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
        if func in products and isinstance(args[1], cls) and args[1].transposed:
            return packed_matmul(args[0], args[1].stored)
        raise TypeError(f"a packed expert takes part in its own product only, not in {func}")


class PackedExperts(nn.Module):
    """Takes the place of a fused expert parameter: `experts[e]` acts as expert e's matrix.

    Parameters
    ----------
    experts : list of (stored, quantizer) or of Tensor
        Packed matrices (out, in), or plain tensors as the fused parameter held them.
    name : str
        Name of the parameter that is replaced (`gate_up_proj`).
    transposed : bool
        Whether the model multiplies by the matrix from the right (gpt-oss).
    """

    def __init__(self, experts: list[Any], name: str, transposed: bool) -> None:
        super().__init__()
        self.name, self.transposed, self.n = name, transposed, len(experts)
        for e, expert in enumerate(experts):
            if isinstance(expert, Tensor):
                self.register_parameter(f"plain_{e}", nn.Parameter(expert.detach().clone()))
            else:
                self.add_module(f"packed_{e}", _Stored(*expert))

    def __getitem__(self, index: Any) -> Any:
        e = int(index)
        plain = self._parameters.get(f"plain_{e}")
        return plain if plain is not None else _Expert(self.stored(e), self.transposed)

    def pack(self, index: int, stored: Any, quantizer: Any) -> None:
        """Put a packed matrix in the place of one expert."""
        self._parameters.pop(f"plain_{index}", None)
        self.add_module(f"packed_{index}", _Stored(stored, quantizer))

    def stored(self, index: int) -> Any:
        """Return the `QuantizedTensor` of one expert."""
        return getattr(self, f"packed_{index}").get()

    def packed_weights(self, path: str) -> Iterator[tuple[str, int | None, Callable[[], Any]]]:
        """Yield (name, index, getter) for the walk; the getter gives a Tensor where one is plain."""
        parent = path.rpartition(".")[0]
        for e in range(self.n):
            name = expert_name(parent, e, self.name)
            if f"plain_{e}" in self._parameters:
                yield name, e, lambda e=e: self._as_rows(getattr(self, f"plain_{e}"))
            else:
                yield name, e, lambda e=e: self.stored(e)

    def requantize(self, matrix: Tensor, index: int | None = None) -> None:
        """Replace one expert by the quantized form of a dense matrix."""
        if f"plain_{index}" in self._parameters:
            self._as_rows(getattr(self, f"plain_{index}").data).copy_(matrix)
        else:
            getattr(self, f"packed_{index}").put(matrix)

    def _as_rows(self, plain: Tensor) -> Tensor:
        return plain.T if self.transposed else plain
