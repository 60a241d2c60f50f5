"""Names of the forms; without torch."""

from __future__ import annotations

ADDED = ("bone", "bone_out", "mini")
GUIDED = ("bat", "bat_row", "bat_left", "bone_free")
VARIANTS = (*ADDED, *GUIDED)
EXPERIMENTAL = ("bat_left", "bone_free")
