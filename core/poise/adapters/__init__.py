"""What adapters share: a layer beside a weight's product, its life on a model, and its files."""

from __future__ import annotations

from poise.adapters.attached import AttachedLayers, HoldsAlone
from poise.adapters.attaching import attach_layers, choose_layers
from poise.adapters.layer import AdaptedLayer, adapter_parameters
from poise.adapters.saved import load_adapter, save_adapter

__all__ = [
    "AdaptedLayer", "AttachedLayers", "HoldsAlone", "adapter_parameters", "attach_layers", "choose_layers",
    "load_adapter", "save_adapter",
]
