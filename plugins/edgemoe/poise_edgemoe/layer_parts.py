"""What C is told of a layer with experts: its modules, found by names and kinds, and its products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.quantizers.kernel import KINDS, is_memory
from poise.quantizers.layers import PackedLinear
from poise.quantizers.sliced import SlicedMatrix, on_kernel, refusal
from poise_edgemoe.experts import StoredExperts
from poise_edgemoe.fused import Attention, AttentionCall, Library, Norm, address, slides

ROUTERS = ("gate", "router")
NAMES = ("self_attn", "input_layernorm", "post_attention_layernorm")


class LinearCall(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("packed", "full", "bias")),
                *((n, ctypes.c_size_t) for n in ("rows", "columns")), ("kind", ctypes.c_int)]


class LayerCall(ctypes.Structure):
    _fields_ = [
        ("multiply", ctypes.c_void_p), ("run", ctypes.c_void_p), ("attention", AttentionCall),
        *((n, LinearCall) for n in ("q", "k", "v", "o", "router")),
        *((n, ctypes.c_void_p) for n in ("first_norm", "second_norm", "state", "normed", "every",
                                         "experts", "weights", "there")),
        *((n, ctypes.c_size_t) for n in ("hidden", "chosen")),
        *((n, ctypes.c_float) for n in ("first_eps", "second_eps", "alpha", "limit")),
        *((n, ctypes.c_int) for n in ("threads", "of_all", "gate")),
    ]


class _Expert(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("first", "second", "first_bias", "second_bias")),
                ("kind", ctypes.c_int)]


class Told:
    """What C is told of an expert for as long as it is in memory: it stands in the layer's table."""

    def __init__(
        self, table: Any, e: int, first: tuple[Any, Tensor | None], second: tuple[Any, Tensor | None]
    ) -> None:
        self._table, self._e, self._held = table, e, (first, second)
        (a, a_bias), (b, b_bias) = first, second
        self._expert = _Expert(a.told.address, b.told.address, address(a_bias), address(b_bias),
                               KINDS[a.dtype])
        self.address = table[e] = ctypes.addressof(self._expert)

    def gone(self) -> None:
        """Take it out of the table: its memory becomes another's."""
        self._table[self._e] = None


class Scratch:
    """Memory for numbers of one token, the same for all layers."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, size: int) -> Tensor:
        """Return `size` floats."""
        if (name, size) not in self._held:
            self._held[name, size] = torch.empty(size, dtype=torch.float32)
        return self._held[name, size]


@dataclass(frozen=True)
class Parts:
    """Modules that a layer is made of."""

    attention: Attention
    first: Norm
    second: Norm
    router: Any
    experts: StoredExperts
    block: nn.Module

    def linears(self) -> list[Any]:
        """Return those that are products: q, k, v, o and the router."""
        return [*(getattr(self.attention, f"{n}_proj") for n in "qkvo"), self.router]

    def kind(self, layer: nn.Module) -> Any:
        """Return what layers have in common that compute the same."""
        types = [type(m) for m in (layer, self.block, self.router, *self.experts._like, *self.linears())]
        plain = type(self.attention._plain[0]), type(self.first._plain[0])
        return *types, *plain, slides(self.attention), self.first._eps, self.second._eps, self.router.top_k


def parts_of(module: nn.Module) -> Parts | None:
    """Return the parts of a layer, by their names and kinds; None: it has others."""
    attention, first, second = (getattr(module, name, None) for name in NAMES)
    if not (isinstance(attention, Attention) and isinstance(first, Norm) and isinstance(second, Norm)):
        return None
    others = [child for name, child in module.named_children() if name not in NAMES]
    held = dict(others[0].named_children()) if len(others) == 1 else {}
    router, experts = next((held[n] for n in ROUTERS if n in held), None), held.get("experts")
    if len(held) != 2 or not isinstance(getattr(router, "top_k", None), int):
        return None  # of shared experts, too
    if not isinstance(experts, StoredExperts) or experts.switch:
        return None
    return Parts(attention, first, second, router, experts, others[0])


def linear_call(module: Any, kept: list[Any], copied: Callable[[Tensor], Tensor]) -> LinearCall | None:
    """Return a product as C reads it, whose memory is put into `kept`; None: it cannot.

    Parameters
    ----------
    copied : callable
        Makes floats of a bias, and keeps them.
    """
    bias = getattr(module, "bias", None)
    bias = None if bias is None else copied(bias)
    if isinstance(module, PackedLinear):
        plain = module.packed.get()
        if not isinstance(plain, SlicedMatrix) or refusal(plain, "c"):
            return None
        kept.append(w := on_kernel(plain, "c"))
        return LinearCall(w.told.address, None, address(bias), *w.shape, 0)
    w = getattr(module, "weight", None)
    if not isinstance(w, Tensor) or w.ndim != 2 or not is_memory(w) or w.dtype not in KINDS:
        return None
    kept.append(w)
    return LinearCall(None, address(w), address(bias), *w.shape, KINDS[w.dtype])


def layer_call(
    parts: Parts, linears: list[Any], it: Library, multiplier: Any, scratch: Scratch
) -> LayerCall:
    """Return what C is told of a layer; where its experts are is left out."""
    q, k, v, o, router = linears
    hidden = len(parts.first._scale)
    sizes = {"q": q.rows, "k": k.rows, "v": v.rows, "out": o.columns}
    attention = parts.attention.call([scratch(n, size).data_ptr() for n, size in sizes.items()], 1)
    return LayerCall(
        multiplier, it.team, attention, q, k, v, o, router, address(parts.first._scale),
        address(parts.second._scale), address(scratch("state", hidden)), address(scratch("normed", hidden)),
        address(scratch("every", parts.router.top_k * hidden)), None, None, None, hidden,
        parts.router.top_k, parts.first._eps, parts.second._eps)


