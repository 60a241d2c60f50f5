"""Entries of the bone plugin."""

from __future__ import annotations


def register(registry) -> None:
    """Add the Bone adapter."""
    registry.add(
        "adapter", "bone", "poise_bone.components:Bone",
        "block affine update, one r x out matrix a layer shared by all input blocks",
        tasks=("causal_lm", "classification"), example={"r": 4},
        paper="arXiv 2409.15371 (v12: MiSS, efficient form)",
    )
