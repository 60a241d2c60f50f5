"""Figures of a training run: percentile bands of a layer's weights, learned pairs.

Source: arXiv 2306.16993 figures 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poise.errors import require

COLOUR = "#0b6e99"
Series = dict[str, tuple[list[int], list[float]]]


def draw(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw what `metrics` recorded, into `bands.png` and `pairs.png`; what was not recorded is left out.

    Parameters
    ----------
    rows : sequence of mapping
        Metric rows with `step`, `name`, `value`.

    Returns
    -------
    list of Path
        The files that were written. Without two evaluations there is nothing to draw.
    """
    series: Series = {}
    for row in rows:
        steps, values = series.setdefault(row["name"], ([], []))
        steps.append(row["step"])
        values.append(row["value"])
    series = {name: found for name, found in series.items() if len(found[0]) > 1}
    made = []
    for kind, picture in (("bands", _bands), ("pair", _pairs)):
        own = {name.removeprefix(f"{kind}/"): found for name, found in series.items()
               if name.startswith(f"{kind}/")}
        if own:
            folder.mkdir(parents=True, exist_ok=True)
            made.append(folder / {"bands": "bands.png", "pair": "pairs.png"}[kind])
            picture(own).savefig(made[-1], dpi=130)
    return made


def _figure(columns: int = 1) -> tuple[Any, Any]:
    size = 6.0 * columns, 3.6
    figure = require("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, alpha=0.25)
        one.set_xlabel("optimizer step")
    return figure, axes


def _bands(series: Series) -> Any:
    """Draw percentiles of one layer's weights, symmetric ones as a band."""
    layer = next(iter(series)).rpartition("/")[0]
    by_percentile = {float(name.rpartition("/")[2]): found for name, found in series.items()}
    percentiles = sorted(by_percentile)
    figure, (axes,) = _figure()
    steps = by_percentile[percentiles[0]][0]
    for low, high in zip(percentiles, reversed(percentiles)):
        if low < high:
            label = "all weights" if low == 0 else f"{low:g} to {high:g} %"
            axes.fill_between(steps, by_percentile[low][1], by_percentile[high][1], color=COLOUR, lw=0,
                              alpha=0.18, label=label)
    if 50.0 in by_percentile:
        axes.plot(steps, by_percentile[50.0][1], color=COLOUR, lw=1.4, label="median")
    axes.set(ylabel="weight", title=f"Percentiles of the weights of layer {layer}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _pairs(series: Series) -> Any:
    """Draw learned a and b, a line for each layer."""
    figure, panels = _figure(2)
    for axes, which in zip(panels, "ab"):
        for name, (steps, values) in series.items():
            if name.endswith(f"/{which}"):
                axes.plot(steps, values, lw=1.2, label=name.rpartition("/")[0])
        axes.set(ylabel=which, title=f"{which} over training")
    if len(series) <= 24:
        panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
