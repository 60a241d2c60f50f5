"""Lossy storage of weights: schemes, packing, packed layers, whole models."""

from __future__ import annotations

_HOMES = {
    "AbsMax": "components", "Affine": "components", "PackedMatrix": "packing",
    "PackedLinear": "layers", "PackedExperts": "layers",
    "quantize_model": "whole", "stored_bytes": "whole", "dense_state_dict": "whole",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise.quantizers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise.quantizers.{_HOMES[name]}"), name)
