"""What C is told of layers and experts (`layer.h`), and memory for numbers of one token."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from poise.quantizers.kernel import KINDS
from poise_edgemoe.fused import AttentionCall, address


class LinearCall(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("packed", "full", "bias")),
                *((n, ctypes.c_size_t) for n in ("rows", "columns")), ("kind", ctypes.c_int)]


class LayerCall(ctypes.Structure):
    _fields_ = [
        ("multiply", ctypes.c_void_p), ("run", ctypes.c_void_p), ("attention", AttentionCall),
        *((n, LinearCall) for n in ("q", "k", "v", "o", "router")),
        *((n, ctypes.c_void_p) for n in ("first_norm", "second_norm", "state", "normed", "experts",
                                         "weights")),
        *((n, ctypes.c_size_t) for n in ("hidden", "chosen")),
        *((n, ctypes.c_float) for n in ("first_eps", "second_eps", "alpha", "limit")),
        *((n, ctypes.c_int) for n in ("threads", "of_all", "gate")),
    ]


class ExpertCall(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in ("first", "second", "first_bias", "second_bias")),
                ("kind", ctypes.c_int)]


class Told:
    """What C is told of an expert, for as long as it is in memory."""

    def __init__(self, first: tuple[Any, Tensor | None], second: tuple[Any, Tensor | None]) -> None:
        self._held = (a, a_bias), (b, b_bias) = first, second
        self._expert = ExpertCall(a.told.address, b.told.address, address(a_bias), address(b_bias),
                               KINDS[a.dtype])
        self.address = ctypes.addressof(self._expert)


class Scratch:
    """Memory for numbers of one token, the same for all layers."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, size: int) -> Tensor:
        """Return `size` floats."""
        if (name, size) not in self._held:
            self._held[name, size] = torch.empty(size, dtype=torch.float32)
        return self._held[name, size]
