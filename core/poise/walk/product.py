"""What a model finds where it expects a matrix, when a layer stands in that matrix's product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.walk.weight import Weight

_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
_SECOND = {nn.functional.linear: "weight",
           **dict.fromkeys((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), "mat2")}


def operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return x, the matrix and the bias of a product, given by position or by name."""
    second = _SECOND.get(func, "other")
    given = dict(zip(("input", second, "bias"), args)) | kwargs
    return given.get("input"), given.get(second), given.get("bias")


class Product:
    """Acts as a layer's matrix in its own product: `F.linear(x, m)` or `x @ m` is what the layer returns.

    It is no tensor, and having `__torch_function__` keeps torch's fused paths (`nn.TransformerEncoderLayer`
    in evaluation), which would read the weight beneath and leave the layer out, from taking it.

    Parameters
    ----------
    layer : nn.Module
        Maps x (..., in) to (..., out), and has `held_weights`.
    transposed : bool
        Whether the model multiplies by the matrix from the right, x @ m with m (in, out).
    """

    def __init__(self, layer: nn.Module, *, transposed: bool = False) -> None:
        self.layer, self.transposed = layer, transposed

    @property
    def T(self) -> Product:  # noqa: N802 - as of a tensor
        """The same matrix, to be multiplied by from the other side."""
        return Product(self.layer, transposed=not self.transposed)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix as the model has it."""
        out, columns = self._weight.shape
        return torch.Size((columns, out) if self.transposed else (out, columns))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight beneath."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weight beneath."""
        return self._weight.read(slice(0, 1)).device

    @property
    def _weight(self) -> Weight:
        return next(self.layer.held_weights(""))  # type: ignore[operator]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x, matrix, bias = operands(func, args, kwargs or {})
        if isinstance(matrix, cls) and isinstance(x, Tensor):
            if func is nn.functional.linear and not matrix.transposed:
                return matrix._with_bias(x, bias)
            if func in _PRODUCTS and matrix.transposed:
                return matrix._with_bias(x, None)
        name = getattr(func, "__name__", func)
        raise TypeError(f"a packed or adapted matrix takes part in its own product only, not in {name}")

    def _with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product plus this bias, the layer's own or another."""
        y, own = self.layer(x), getattr(self.layer, "bias", None)
        if own is bias:
            return y
        y = y if own is None else y - own.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)
