"""Entries of the bone plugin."""

from __future__ import annotations


def register(registry) -> None:
    """Add the adapters."""
    registry.add(
        "adapter", "bone", "poise_bone.components:Bone",
        "block update of frozen weights: Bone (MiSS), mini, output-sharded, Bat by column, row or left",
        tasks=("causal_lm", "classification"), example={"r": 4},
        paper="arXiv 2409.15371 (v12: MiSS, efficient form; v1 to v7: Bat)",
    )
    registry.add(
        "adapter", "lora", "poise_bone.components:Lora", "LoRA through PEFT, what Bone is compared with",
        tasks=("causal_lm", "classification"), example={"r": 2, "lora_alpha": 2.0},
        paper="arXiv 2106.09685",
    )
