"""What adapters share: a layer beside a weight's product, its life on a model, and its files."""

from __future__ import annotations

from poise.adapters.attached import AttachedLayers, HoldsAlone, attach_layers, choose_layers
from poise.adapters.holding import freeze, hold, release, thaw, who_holds
from poise.adapters.layer import AdaptedLayer
from poise.adapters.saved import load_adapter, save_adapter

__all__ = [
    "AdaptedLayer", "AttachedLayers", "HoldsAlone", "attach_layers", "choose_layers", "freeze", "hold",
    "load_adapter", "release", "save_adapter", "thaw", "who_holds",
]
