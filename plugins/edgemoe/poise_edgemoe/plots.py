"""The picture of a bits experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from poise.errors import require


def loss_against_bytes(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw held-out loss against the experts' bytes, a dot per plan."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, colour, label in (
        ("_bit", "#0b6e99", "uniform"), ("half_random", "#aaaaaa", "half and half, random"),
        ("half_chosen", "#d1495b", "half and half, by weight error"),
    ):
        dots = [r for r in rows if kind in r["plan"]]
        axes.plot([r["expert_bytes"] / 1e3 for r in dots], [r["loss"] for r in dots], "o",
                  color=colour, label=label, ms=6)
        for r in dots if kind == "_bit" else []:
            axes.annotate(r["plan"].replace("_", " "), (r["expert_bytes"] / 1e3, r["loss"]),
                          textcoords="offset points", xytext=(6, 5), fontsize=8)
    axes.set(xlabel="bytes of all experts (kB, scales included)", ylabel="held-out loss (nats per byte)",
             xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
