"""Pictures: loss against bytes, hits over size, the time of a token."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.errors import require
from poise.files import write_bytes


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
    _finish(figure, axes, target)


def hits_over_share(shares: list[float], hits: dict[str, list[float | None]], target: Path) -> None:
    """Draw decode hits over the share of experts that is kept, a line per policy, Belady's dashed."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=["#d1495b", "#edae49", "#7a9e7e", "#8d6a9f", "#b08968", "#66a182", "#c77dff",
                               "#9a9a9a", "#e07a5f"])
    for name, found in hits.items():
        points = sorted((100 * s, 100 * rate) for s, rate in zip(shares, found) if rate is not None)
        style = {"expected": {"lw": 2.4, "color": "#0b6e99", "zorder": 5},
                 "belady": {"color": "#222222", "ls": "--"}}.get(name, {"lw": 1.1})
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", ms=3, label=name, **style)
    axes.set(xlabel="experts that are kept (%)", ylabel="decode hits (%)", xlim=(0, 100), ylim=(0, 100),
             title="Which experts stay: hits of every policy after the prompt")
    _finish(figure, axes, target)


def _finish(figure: Any, axes: Any, target: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, target)


def _save(figure: Any, target: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    write_bytes(target, drawn.getvalue())


def token_time(rows: list[dict[str, Any]], title: str, target: Path) -> None:
    """Draw what each call of the model took, computing and waiting stacked, and its hits below.

    Parameters
    ----------
    rows : list of dict
        Of one prompt: `part` ("prompt" or "token"), `seconds`, `stall_seconds`, `hits`, `misses`.
    """
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 4.4), layout="constrained")
    time, hits = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    pieces = sum(r["part"] == "prompt" for r in rows)
    at = [n - pieces + 1 for n in range(len(rows))]  # the first token that is fed back is 1
    waited = [1e3 * r["stall_seconds"] for r in rows]
    computed = [1e3 * r["seconds"] - w for r, w in zip(rows, waited)]
    time.bar(at, computed, 1.0, color="#0b6e99", label="computing")
    time.bar(at, waited, 1.0, bottom=computed, color="#d1495b", label="waiting for experts")
    most = max(a + b for a, b, r in zip(computed, waited, rows) if r["part"] == "token")
    hits.bar(at, [100 * r["hits"] / max(1, r["hits"] + r["misses"]) for r in rows], 1.0, color="#7a9e7e")
    for axes in (time, hits):
        axes.axvspan(at[0] - 0.5, 0.5, color="#f0e6c8", zorder=-1)
    prompt = sum(r["seconds"] for r in rows if r["part"] == "prompt")
    time.text(at[0], 1.15 * most, f" prompt: {1e3 * prompt:.0f} ms", fontsize=8, va="top",
              backgroundcolor="#f0e6c8")
    time.set(ylabel="ms a call", ylim=(0, 1.2 * most), title=title)
    time.title.set_fontsize(9)
    hits.set(xlabel="token", ylabel="hits (%)", ylim=(0, 100))
    hits.spines[["top", "right"]].set_visible(False)
    _finish(figure, time, target)


def time_against_roofline(lines: list[Any], target: Path) -> None:
    """Draw a token's time by what it goes to, a bar for each way, and the least that it could be.

    Parameters
    ----------
    lines : list of `poise_edgemoe.measure.Line`
    """
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(7, 1.2 + 0.32 * len(lines)), layout="constrained")
    axes = figure.subplots()
    at, left = list(range(len(lines))), [0.0] * len(lines)
    for name, colour, sizes in (
        ("kernels", "#0b6e99", [one.kernels for one in lines]),
        ("overhead", "#edae49", [one.token - one.kernels - one.stall for one in lines]),
        ("waiting for experts", "#d1495b", [one.stall for one in lines]),
    ):
        axes.barh(at, sizes, left=left, color=colour, label=name, height=0.7)
        left = [a + b for a, b in zip(left, sizes)]
    least = [one.roofline for one in lines]
    axes.vlines(least, [n - 0.42 for n in at], [n + 0.42 for n in at], color="#222222", lw=2,
                label="roofline")
    axes.set_yticks(at, [f"{one.size}  {one.name}" for one in lines])
    axes.invert_yaxis()
    axes.set(xlabel="ms a token", title="Where the time of a token goes")
    _finish(figure, axes, target)


def width_map(plan: Mapping[str, int], target: Path) -> None:
    """Draw the bits of each expert, layers downwards; its matrices side by side where they differ."""
    colours = require("matplotlib.colors", "plots")
    rows: dict[str, dict[int, list[int]]] = {}
    for name, bits in plan.items():
        path, expert, _ = name.rsplit(".", 2)
        rows.setdefault(path, {}).setdefault(int(expert), []).append(bits)
    mixed = any(len(set(found)) > 1 for one in rows.values() for found in one.values())
    lines = [[bits for e in sorted(one) for bits in (one[e] if mixed else one[e][:1])]
             for one in rows.values()]
    longest = max(map(len, lines))
    grid = [[*line, *[float("nan")] * (longest - len(line))] for line in lines]
    widths = sorted({bits for line in lines for bits in line})
    figure = require("matplotlib.figure", "plots").Figure(
        figsize=(max(4.5, min(14, 1.8 + 0.28 * longest)), max(2.2, min(12, 1.4 + 0.28 * len(lines)))),
        layout="constrained")
    axes = figure.subplots()
    shades = ["#d1495b", "#edae49", "#7a9e7e", "#0b6e99", "#222222", "#8d6a9f", "#b08968", "#9a9a9a"]
    place = {b: n for n, b in enumerate(widths)}
    axes.imshow([[place.get(b, float("nan")) for b in line] for line in grid], aspect="auto",
                cmap=colours.ListedColormap(shades[: len(widths)]), vmin=-0.5, vmax=len(widths) - 0.5)
    for b in widths:
        axes.plot([], [], "s", color=shades[place[b]], label=f"{b} bits")
    parts = len(next(iter(next(iter(rows.values())).values())))
    axes.set(xlabel="expert" + (f", its {parts} matrices side by side" if mixed else ""),
             ylabel="layer with experts", yticks=range(len(lines)), title="Bits of each expert")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, target)


def plans_against_bytes(rows: list[dict[str, Any]], target: Path, ylabel: str) -> None:
    """Draw what plans lose against the experts' bytes, a colour for each way of choosing.

    Parameters
    ----------
    rows : list of dict
        `way`, `bytes`, `loss` of each plan.
    """
    figure = require("matplotlib.figure", "plots").Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    looks = {"uniform": ("#222222", "s"), "random": ("#aaaaaa", "o"), "frequency": ("#edae49", "o"),
             "paper": ("#8d6a9f", "^"), "hull": ("#0b6e99", "o"), "exact": ("#d1495b", "x")}
    for way, (colour, mark) in looks.items():
        dots = sorted((r["bytes"] / 1e6, r["loss"]) for r in rows if r["way"] == way)
        if dots:
            axes.plot([x for x, _ in dots], [y for _, y in dots], mark, color=colour, label=way, ms=5,
                      ls="-" if way == "uniform" else "", lw=0.8)
    axes.set(xlabel="bytes of all experts (MB, scales and pages included)", ylabel=ylabel, xscale="log")
    _finish(figure, axes, target)
