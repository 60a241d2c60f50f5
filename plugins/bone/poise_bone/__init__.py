"""Bone: parameter-efficient fine-tuning by block affine updates (arXiv 2409.15371).

    from poise_bone import Bone
    attached = Bone(r=64).attach(model)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poise_bone.attached import AttachedBone
    from poise_bone.components import Bone
    from poise_bone.functional import bone_delta, bone_forward
    from poise_bone.layers import BoneLinear

_HOMES = {
    "Bone": "components", "AttachedBone": "attached", "BoneLinear": "layers",
    "bone_delta": "functional", "bone_forward": "functional",
}
__all__ = ["AttachedBone", "Bone", "BoneLinear", "bone_delta", "bone_forward"]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise_bone' has no attribute {name!r}")
    return getattr(importlib.import_module(f"poise_bone.{_HOMES[name]}"), name)
