"""Pictures of quantile predictions. Drawn without pyplot, so nothing global is touched."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from poise.errors import require
from poise_quantagg.checks import level_index
from poise_quantagg.monotone import sort
from poise_quantagg.scores import coverage

# Okabe and Ito's colours, told apart by every kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = "osD^vPX*"
BANDS = ((0.9, "#c9dcee"), (0.8, "#93bbdc"), (0.5, "#4c8cbf"))


def _figure(width: float, height: float, panels: int = 1):
    figure = require("matplotlib.figure", "quantagg").Figure(
        figsize=(width, height), layout="constrained"
    )
    require("matplotlib.backends.backend_agg", "quantagg").FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, all_axes


def _save(figure, path: Path | str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def reliability(
    path: Path | str, y: np.ndarray, panels: dict[str, dict[str, np.ndarray]], levels: np.ndarray,
    *, title: str = "", band: float = 0.9,
) -> Path:
    """Draw how far the share of y <= quantile is from the level it was predicted for.

    The difference is drawn, not the share itself: on the usual diagonal, curves that matter lie on
    top of one another. The grey band holds, level by level, `band` of what a calibrated forecast
    gives on n independent rows (exact binomial quantiles).

    Parameters
    ----------
    path : path
        Where the PNG goes; folders are made.
    y : array, shape (n,)
    panels : dict of panel title to (dict of name to array, shape (n, m))
    levels : array, shape (m,)
    title : str
    band : float
        Probability of the grey band at each level.
    """
    stats = require("scipy.stats", "quantagg")
    n, percent = len(y), 100 * np.asarray(levels)
    figure, all_axes = _figure(1.0 + 4.6 * len(panels), 5.6, len(panels))
    low, high = (100 * stats.binom.ppf(q, n, levels) / n - percent
                 for q in ((1 - band) / 2, (1 + band) / 2))
    for axes, (name, predictions) in zip(all_axes, panels.items()):
        axes.fill_between(percent, low, high, color="#e9e9e9", zorder=0,
                          label=f"{band:.0%} band if calibrated")
        axes.axhline(0, color="#777777", linewidth=1)
        for i, (label, q) in enumerate(predictions.items()):
            axes.plot(percent, 100 * coverage(y, q) - percent, label=label, linewidth=1.6,
                      color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4)
        axes.set(xlim=(0, 100), xlabel="nominal level (%)", title=name)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, ncols=2)
    all_axes[0].set_ylabel("share of rows with y ≤ quantile\nminus level (percentage points)")
    figure.suptitle(title)
    return _save(figure, path)


def fan(
    path: Path | str, y: np.ndarray, q: np.ndarray, levels: np.ndarray,
    *, title: str = "", unit: str = "y", rows: int = 150,
) -> Path:
    """Draw central 90, 80 and 50 % bands and what was observed, rows by predicted median.

    Parameters
    ----------
    path : path
        Where the PNG goes; folders are made.
    y : array, shape (n,)
    q : array, shape (n, m)
        Sorted before drawing.
    levels : array, shape (m,)
        Must hold 0.5; bands whose ends are missing are left out.
    title : str
    unit : str
        Label of the vertical axis, with the unit.
    rows : int
        Largest number of rows drawn; more are thinned evenly after sorting.
    """
    q, middle = sort(q), level_index(levels, [0.5])[0]
    order = np.argsort(q[:, middle], kind="stable")
    order = order[np.linspace(0, len(y) - 1, min(rows, len(y))).round().astype(int)]
    y, q, place = y[order], q[order], np.arange(len(order)) + 1
    figure, (axes,) = _figure(8.4, 5.4)
    widest = np.ones(len(y), dtype=bool)
    for nominal, colour in BANDS:
        ends = _ends(levels, nominal)
        if ends is None:
            continue
        low, high = q[:, ends[0]], q[:, ends[1]]
        inside = (low <= y) & (y <= high)
        widest = inside if nominal == BANDS[0][0] else widest
        axes.fill_between(place, low, high, color=colour, step="mid", linewidth=0,
                          label=f"central {nominal:.0%}: holds {inside.mean():.0%}")
    axes.step(place, q[:, middle], where="mid", color="#0b2f52", linewidth=1.4, label="median")
    axes.scatter(place[widest], y[widest], s=9, color="black", zorder=3, label="observed")
    axes.scatter(place[~widest], y[~widest], s=14, color="#D55E00", zorder=3,
                 label="observed, outside 90%")
    axes.set(xlim=(0.5, len(y) + 0.5), ylabel=unit, title=title,
             xlabel=f"test rows by predicted median ({len(y)} drawn)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), frameon=False, ncols=3)
    return _save(figure, path)


def _ends(levels: np.ndarray, nominal: float) -> np.ndarray | None:
    wanted = np.array([(1 - nominal) / 2, (1 + nominal) / 2])
    there = np.isclose(levels[:, None], wanted, atol=1e-9).any(axis=0).all()
    return level_index(levels, wanted) if there else None
