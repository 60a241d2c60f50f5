"""Linears that another library packed: bitsandbytes' 4 and 8 bits, torchao's tensors.

They are recognised by where their classes come from: no library is imported that a model has not brought.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import ConfigError
from poise.walk.weight import Weight


@dataclass(frozen=True)
class ForeignMatrix:
    """A packed matrix (out, in) of another library, to be read and counted.

    Parameters
    ----------
    module : nn.Module
        The linear that holds it.
    """

    module: Any
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """True size in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def resident_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name, as far as the library shows them."""
        weight = self.module.weight
        if _library(self.module) == "torchao":
            return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        codes, scales = _int8(self.module)
        if codes is not None:
            return {"codes": codes, "scales": scales}
        return {"codes": weight.detach(), "scales": weight.quant_state.absmax}

    def dequantize(self, rows: slice | None = None) -> Tensor:
        """Return output rows `rows` (all without it), shape (len(rows), in)."""
        with torch.no_grad():
            return _dequantize(self.module, rows).to(self.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """Return x @ W.T, shape (..., out), as the library's layer computes it."""
        y = self.module(x)
        return y if self.module.bias is None else y - self.module.bias

    def matmul_t(self, dy: Tensor) -> Tensor:
        """Return dy @ W, shape (..., in)."""
        return dy @ self.dequantize().to(dy.dtype)


def foreign_weights(module: nn.Module, path: str) -> Iterator[Weight] | None:
    """Return the weight of a linear that another library packed, for the walk; None for all else."""
    if not isinstance(module, nn.Linear) or not _is_packed(module):
        return None
    return iter([_weight(module, path)])


def dense_linear(module: Any, matrix: Tensor) -> nn.Module:
    """Return a plain linear with another matrix (out, in) and the same bias."""
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(matrix)
    plain.bias = module.bias
    return plain.train(module.training)


def _weight(module: nn.Linear, path: str) -> Weight:
    kind = getattr(module, "compute_dtype", None) or _plain_dtype(module)
    stored = ForeignMatrix(module, (module.out_features, module.in_features), kind)

    def refuse(_: Tensor) -> None:
        raise ConfigError(f"{path} is packed by {_library(module)} and not written to: fold an adapter, or "
                          f"replace the layer")

    key = f"{path}.weight".lstrip(".")
    return Weight(
        path or "weight", "linear", stored.shape, kind, key, module, "weight", (id(module),),
        _read=stored.dequantize, _write=refuse, stored=stored, replaceable=True,
        beside=lambda: [] if module.bias is None else [(f"{path}.bias".lstrip("."), module.bias.detach())])


def _library(module: nn.Module) -> str:
    """Return the library that packed a linear; empty for a plain one."""
    for thing in (type(module), type(getattr(module, "weight", None))):
        name = thing.__module__.partition(".")[0]
        if name in ("bitsandbytes", "torchao"):
            return name
    return ""


def _is_packed(module: Any) -> bool:
    library = _library(module)
    if library == "torchao":
        return hasattr(module.weight, "dequantize")
    # not quantized before it is moved to its device: until then, a plain linear with a forward of its own
    return library == "bitsandbytes" and (
        getattr(module.weight, "quant_state", None) is not None or _int8(module)[0] is not None)


def _plain_dtype(module: Any) -> torch.dtype:
    if _library(module) == "torchao":
        return module.weight.dtype
    return torch.float32 if module.bias is None else module.bias.dtype


def _int8(module: Any) -> tuple[Any, Any]:
    """Return codes and row scales of bitsandbytes' 8 bits, which move at the first forward pass."""
    state, weight = getattr(module, "state", None), module.weight
    if state is not None and state.CB is not None:
        return state.CB, state.SCB
    return getattr(weight, "CB", None), getattr(weight, "SCB", None)


def _dequantize(module: Any, rows: slice | None) -> Tensor:
    if _library(module) == "torchao":
        weight = module.weight.detach()
        return (weight if rows is None else weight[rows]).dequantize()
    codes, scales = _int8(module)
    if codes is not None:
        part = slice(None) if rows is None else rows
        return codes[part].float() * (scales[part, None].float() / 127)
    return _dequantize4(module, rows)


def _dequantize4(module: Any, rows: slice | None) -> Tensor:
    """Return rows of bitsandbytes' 4 bits; of rows that share a block of scales, by way of the whole."""
    functional = sys.modules["bitsandbytes.functional"]
    state, data, columns = module.weight.quant_state, module.weight.data, module.in_features
    start, stop, _ = (rows or slice(None)).indices(module.out_features)
    first, last = start * columns, stop * columns
    if rows is None or first % state.blocksize or last % state.blocksize:
        return functional.dequantize_4bit(data, state)[start:stop]
    part = copy.copy(state)
    absmax = state.absmax
    if state.nested:  # scales that are packed themselves are few: all at once
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    part.absmax = absmax[first // state.blocksize: last // state.blocksize].float()
    part.shape, part.nested, part.state2 = torch.Size((stop - start, columns)), False, None
    return functional.dequantize_4bit(data.view(-1)[first // 2: last // 2].view(-1, 1), part)
