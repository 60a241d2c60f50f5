"""Lossy storage of weights: schemes, packing, packed layers, whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise.quantizers.components import AbsMax, Affine
    from poise.quantizers.layers import PackedEmbedding, PackedLinear
    from poise.quantizers.matrix import PackedMatrix
    from poise.quantizers.whole import quantize_model, resolve, stored_bytes

_HOMES = {
    "AbsMax": "components", "Affine": "components", "PackedMatrix": "matrix", "resolve": "whole",
    "PackedLinear": "layers", "PackedEmbedding": "layers",
    "quantize_model": "whole", "stored_bytes": "whole",
}
__all__ = [
    "AbsMax", "Affine", "PackedEmbedding", "PackedLinear", "PackedMatrix", "quantize_model", "resolve",
    "stored_bytes",
]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise.quantizers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise.quantizers.{_HOMES[name]}"), name)
