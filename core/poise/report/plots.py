"""Figures from records, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from poise.errors import require
from poise.report.groups import Group

COLOURS = ("#0b6e99", "#d1495b", "#3b7a57", "#8e6c8a", "#edae49", "#5c5c5c")


def figure(width: float = 7.0, height: float = 3.4) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, with light grids and no frame on top and right."""
    module = require("matplotlib.figure", "plots")
    fig = module.Figure(figsize=(width, height), layout="constrained")
    axes = fig.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.25)
    return fig, axes


def png(fig: Any) -> bytes:
    """Return a figure as PNG bytes."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=130)
    return out.getvalue()


def curves(groups: Mapping[str, Group], name: str) -> bytes | None:
    """Draw one metric over steps, a line per run, a colour per group; None when nothing to draw."""
    fig, axes = figure()
    drawn = False
    for i, (label, group) in enumerate(groups.items()):
        for j, run in enumerate(group.runs):
            steps, values = run.series(name)
            if len(steps) < 2:
                continue
            drawn = True
            axes.plot(steps, values, color=COLOURS[i % len(COLOURS)], alpha=0.8, lw=1.4,
                      label=label if j == 0 else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(name.replace("_", " "))
    if drawn and len(groups) > 1:
        axes.legend(frameon=False, fontsize=8)
    return png(fig) if drawn else None


def dots(groups: Mapping[str, Group], name: str) -> bytes | None:
    """Draw one final metric, a row per group, a dot per seed, same seeds joined; None if trivial."""
    rows = {label: group.values(name) for label, group in groups.items()}
    if len(rows) < 2 or max(len(v) for v in rows.values()) < 2:
        return None
    fig, axes = figure(height=0.7 + 0.45 * len(rows))
    for i, values in enumerate(rows.values()):
        axes.plot(list(values.values()), [i] * len(values), "o", color=COLOURS[i % len(COLOURS)])
    for seed in {s for v in rows.values() for s in v}:
        line = [(v[seed], i) for i, v in enumerate(rows.values()) if seed in v]
        axes.plot(*zip(*line), color="#999999", lw=0.7, zorder=0)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{name.replace('_', ' ')} (one dot a seed, same seeds joined)")
    return png(fig)
