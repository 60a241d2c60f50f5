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


def weights_by_level(
    path: Path | str, w: np.ndarray, models: list[str], levels: np.ndarray, *, title: str = "",
) -> Path:
    """Draw weights (p, m) over levels: stacked when they lie on the simplex, as lines otherwise."""
    figure, (axes,) = _figure(8.4, 4.6)
    percent = 100 * np.asarray(levels)
    if w.min() >= -1e-9 and np.allclose(w.sum(axis=0), 1, atol=1e-6):
        axes.stackplot(percent, np.maximum(w, 0), labels=models, colors=_colours(len(models)), linewidth=0)
        axes.set_ylim(0, 1)
    else:
        for i, (name, row) in enumerate(zip(models, w)):
            axes.plot(percent, row, label=name, color=_colours(len(models))[i], linewidth=1.6)
        axes.axhline(0, color="#777777", linewidth=1)
    axes.set(xlim=(percent[0], percent[-1]), xlabel="level (%)", ylabel="weight", title=title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, ncols=4)
    return _save(figure, path)


def weights_by_feature(
    path: Path | str, X: np.ndarray, w: np.ndarray, models: list[str], columns: list[str],
    *, title: str = "", bins: int = 10, panels: int = 3,
) -> Path:
    """Draw mean weights (n, p) over the features that move them most, in bins of equal counts.

    A feature's importance here is the variance of the binned mean weights, summed over models.
    """
    curves = []
    for column in range(X.shape[1]):
        edges = np.unique(np.quantile(X[:, column], np.linspace(0, 1, bins + 1)))
        if len(edges) < 3:
            continue
        at = np.clip(np.searchsorted(edges, X[:, column], side="right") - 1, 0, len(edges) - 2)
        counts = np.bincount(at, minlength=len(edges) - 1)
        means = np.stack([np.bincount(at, w[:, j], len(edges) - 1) for j in range(w.shape[1])])
        keep = counts > 0
        middle = np.array([np.median(X[at == b, column]) for b in np.flatnonzero(keep)])
        means = means[:, keep] / counts[keep]
        spread = float((counts[keep] / len(X) * (means - w.mean(axis=0)[:, None]) ** 2).sum())
        curves.append((spread, column, middle, means))
    curves = sorted(curves, key=lambda c: -c[0])[:panels]
    figure, all_axes = _figure(1.0 + 3.8 * max(1, len(curves)), 4.6, max(1, len(curves)))
    for axes, (_, column, middle, means) in zip(all_axes, curves):
        axes.stackplot(middle, means, labels=models, colors=_colours(len(models)), linewidth=0)
        axes.set(xlim=(middle[0], middle[-1]), ylim=(0, 1), xlabel=f"{columns[column]} (standardised)")
    all_axes[0].set_ylabel("mean weight")
    middle_axes = all_axes[len(all_axes) // 2]
    middle_axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, ncols=4)
    figure.suptitle(title)
    return _save(figure, path)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] if i < len(COLOURS) else "#bbbbbb" for i in range(count)]


def relative(
    rows: list[tuple[str, float, float, float]], *, title: str = "", reference: str = "", log: bool = True,
) -> bytes:
    """Draw ratios with intervals, best first, as PNG bytes; rows are (name, ratio, lower, upper)."""
    import io

    rows = sorted(rows, key=lambda row: row[1])
    figure, (axes,) = _figure(8.0, 1.2 + 0.3 * len(rows))
    place = np.arange(len(rows))[::-1]
    ratio, low, high = (np.array([row[k] for row in rows]) for k in (1, 2, 3))
    axes.errorbar(ratio, place, xerr=[ratio - low, high - ratio], fmt="o", color=COLOURS[0], markersize=4,
                  elinewidth=1.4)
    axes.axvline(1, color="#777777", linewidth=1)
    axes.set_yticks(place, [row[0] for row in rows])
    if log:
        from matplotlib.ticker import NullFormatter, ScalarFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        ticks = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.25, 1.5, 2, 3, 5)
        axes.set_xticks(sorted({1, *(t for t in ticks if low.min() <= t <= high.max())}))
    axes.set(xlabel=f"WIS relative to {reference}", title=title)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
