"""Bone: parameter-efficient fine-tuning by block affine updates (arXiv 2409.15371).

    from poise_bone import Bone
    attached = Bone(r=64).attach(model)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_bone.attached import AttachedBone, combine_adapters
    from poise_bone.components import Bone, Lora
    from poise_bone.exchange import export_lora, load_peft, save_peft
    from poise_bone.reading import SavedAdapter, read_adapter

_HOMES = {
    "Bone": "components", "Lora": "components", "AttachedBone": "attached", "combine_adapters": "attached",
    "save_peft": "exchange", "load_peft": "exchange", "export_lora": "exchange",
    "SavedAdapter": "reading", "read_adapter": "reading",
}
__all__ = [
    "AttachedBone", "Bone", "Lora", "SavedAdapter", "combine_adapters", "export_lora", "load_peft",
    "read_adapter", "save_peft",
]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_bone' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_bone.{_HOMES[name]}"), name)
