"""Ratios, tables and pictures from rows: the paper's claims and figures, on what was measured here.

Redrawn: Figs 11 and 16 (speed by way and over the memory limit), 18 (part by part), Table II (loss against
storage), 13 (energy, by its proxies: CPU seconds and bytes read).
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from poise.errors import require
from poise_edgemoe.paper.ways import WAYS

Row = dict[str, Any]
CLAIMS = (  # name, faster, slower, what is asked of it where reading is the bottleneck
    ("edgemoe_over_io_exp", "EdgeMoE", "IO-EXP", 2.5),
    ("edgemoe_over_io_qexp", "EdgeMoE", "IO-QEXP", 1.2),
    ("edgemoe_over_sti_like", "EdgeMoE", "STI-like", 1.2),
    ("ours_over_edgemoe", "ours", "EdgeMoE", 1.3),
    ("ours_over_io_qexp", "ours", "IO-QEXP", 1.2),
    ("literal_over_intent", "EdgeMoE as printed", "EdgeMoE", None),
)
PARTS = ("IO-EXP", "+Q", "+Q+P", "EdgeMoE", "ours")  # Fig. 18, and ours
SHOWN = {"EdgeMoE": ("#8d6a9f", "o"), "EdgeMoE as printed": ("#b9a3c7", "^"), "ours": ("#0b6e99", "o"),
         "STI-like": ("#edae49", "s"), "IO-QEXP at M": ("#7a9e7e", "v"), "IO-EXP at M": ("#d1495b", "v")}
LEVELS = {"IO-EXP": "#d1495b", "IO-QEXP": "#7a9e7e", "IO-QFREE": "#9a9a9a", "IO-FREE": "#222222"}


def summed(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each model, scale, way and limit: medians over repeats."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["scale"], row["way"], row["limit"]), []).append(row)
    return [_median(own) for own in groups.values()]


def _median(own: Sequence[Row]) -> Row:
    made = {}
    for key, first in own[0].items():
        values = [v for row in own if (v := row.get(key)) is not None]
        number = bool(values) and isinstance(values[0], (int, float)) and not isinstance(values[0], bool)
        made[key] = statistics.median(values) if number and key != "limit" else first
    made.pop("repeat", None)
    return made | {"repeats": len(own)}


def of(found: Sequence[Row], model: str, scale: str, way: str, limit: int | None) -> Row | None:
    """Return the row of a way at a limit; of one that knows no limit, its one row; None: it did not fit."""
    limited = next(w.limited for w in WAYS if w.name == way)
    wanted = (model, scale, way, limit if limited else None)
    hit = [r for r in found if (r["model"], r["scale"], r["way"], r["limit"]) == wanted]
    return hit[0] if hit and hit[0]["fits"] else None


def sets(found: Sequence[Row]) -> list[tuple[str, str]]:
    """Return models and scales, in their order."""
    return list(dict.fromkeys((r["model"], r["scale"]) for r in found))


def limits(found: Sequence[Row]) -> list[int]:
    """Return limits, ascending."""
    return sorted({r["limit"] for r in found if r["limit"] is not None})


def ratio(
    found: Sequence[Row], model: str, scale: str, faster: str, slower: str, limit: int
) -> float | None:
    """Return how many times the tokens per second of one way those of another are."""
    a, b = (of(found, model, scale, way, limit) for way in (faster, slower))
    return None if a is None or b is None else a["tokens_per_second"] / b["tokens_per_second"]


def ratios(found: Sequence[Row]) -> dict[str, float]:
    """Return metrics: what the paper claims, at every limit; losses by store; bytes of plans."""
    metrics = {}
    for model, scale in sets(found):
        for limit in limits(found):
            for name, faster, slower, _ in CLAIMS:
                if (value := ratio(found, model, scale, faster, slower, limit)) is not None:
                    metrics[f"machine/{model}/{scale}/{limit}/{name}"] = value
        for row in table_two(found, model):
            metrics[f"{model}/loss/{row['way']}"] = row["loss"]
            metrics[f"{model}/store_bytes/{row['way']}"] = float(row["store_bytes"])
    return metrics


def table_two(found: Sequence[Row], model: str) -> list[Row]:
    """Return storage and loss of every store, as the paper's Table II has them."""
    made = []
    for way in ("IO-FREE", "IO-QFREE", "IO-QEXP", "STI-like", "EdgeMoE", "ours"):
        own, big = ([r for r in found if (r["model"], r["scale"], r["way"]) == (model, scale, way)
                     and r["fits"]] for scale in ("trained", "large"))
        losses = [r["loss"] for r in own if r["loss"] is not None]
        if losses:
            made.append({"way": way, "loss": losses[0], "store_bytes": (big or own)[0]["store_bytes"]})
    return made


# ------------------------------------------------------------------ tables


def report(runs: Sequence[Any]) -> tuple[list[tuple], list[tuple[str, bytes]]]:
    """Return tables and pictures over the finished runs of the recipe; of some, the last one's."""
    done = [run for run in runs if isinstance(run.notes.get("ways"), list)]
    if not done:
        return [], []
    found, plans = done[-1].notes["ways"], done[-1].notes.get("plans", {})
    tables = [_speeds(found, model, scale) for model, scale in sets(found)]
    tables += [_claims(found), _costs(found), *[_losses(found, m, plans) for m in _models(found)]]
    return tables, drawn(found)


def _models(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in found))


def _speeds(found: Sequence[Row], model: str, scale: str) -> tuple:
    columns = ["way", *[f"{limit} %" for limit in limits(found)]]
    rows = []
    for way in WAYS:
        own = [of(found, model, scale, way.name, limit) for limit in limits(found)]
        said = ["does not fit" if r is None else f"{r['tokens_per_second']:.1f}" for r in own]
        rows.append([way.name, *said])
    return f"{model}, {scale} experts: tokens a second over the limit", columns, rows


def _claims(found: Sequence[Row]) -> tuple:
    rows = []
    for model, scale in sets(found):
        for name, faster, slower, asked in CLAIMS:
            own = [ratio(found, model, scale, faster, slower, limit) for limit in limits(found)]
            rows.append([f"{model}, {scale}: {name.replace('_', ' ')}",
                         "-" if asked is None else f">= {asked}",
                         *["-" if r is None else f"{r:.2f}" for r in own]])
    return "Speed-ups at each limit", ["what", "asked", *[f"{x} %" for x in limits(found)]], rows


def _costs(found: Sequence[Row]) -> tuple:
    """Return what a token takes at every limit: the energy proxies, hits, t_c and t_io."""
    columns = ["model", "way", "limit", "MB read", "hits %", "CPU ms", "t_c ms", "t_io ms", "grown MB"]
    rows = []
    for r in found:
        if r["fits"]:
            asked = max(1, r["hits"] + r["misses"])
            limit = "-" if r["limit"] is None else f"{r['limit']} %"
            grown = "-" if r["grown_bytes"] is None else f"{r['grown_bytes'] / 1e6:.0f}"
            ms = [f"{1e3 * r[k]:.2f}" for k in ("cpu_seconds", "computing_seconds", "reading_seconds")]
            rows.append([f"{r['model']}, {r['scale']}", r["way"], limit,
                         f"{r['bytes_per_token'] / 1e6:.2f}", f"{100 * r['hits'] / asked:.0f}", *ms, grown])
    return "What a token takes", columns, rows


def _losses(found: Sequence[Row], model: str, plans: Mapping[str, Any]) -> tuple:
    rows, base = [], None
    for r in table_two(found, model):
        base = r["loss"] if base is None else base
        rows.append([r["way"], f"{r['store_bytes'] / 1e6:.1f}", f"{r['loss']:.4f}",
                     f"{r['loss'] - base:+.4f}"])
    return f"{model}: held-out loss against storage", ["way", "store MB", "nats a token", "more"], rows


# ------------------------------------------------------------------ pictures


def drawn(found: Sequence[Row]) -> list[tuple[str, bytes]]:
    """Return pictures by name."""
    made = []
    for model, scale in sets(found):
        made.append((f"{model}_{scale}_over_limit", _over_limit(found, model, scale)))
        made.append((f"{model}_{scale}_parts", _parts(found, model, scale)))
    made += [(f"{model}_loss_against_storage", _storage(found, model)) for model in _models(found)]
    return made


def _over_limit(found: Sequence[Row], model: str, scale: str) -> bytes:
    figure = require("matplotlib.figure", "plots").Figure(figsize=(9, 3.8), layout="constrained")
    speed, read = figure.subplots(1, 2)
    for way, (colour, mark) in SHOWN.items():
        own = [r for limit in limits(found) if (r := of(found, model, scale, way, limit)) is not None]
        at = [r["limit"] for r in own]
        for axes, values in ((speed, [r["tokens_per_second"] for r in own]),
                             (read, [r["bytes_per_token"] / 1e6 for r in own])):
            axes.plot(at, values, marker=mark, ms=4, color=colour, label=way)
    for way, colour in LEVELS.items():
        if (r := of(found, model, scale, way, limits(found)[0])) is not None:
            speed.axhline(r["tokens_per_second"], color=colour, lw=0.9, ls="--", label=way)
    speed.set(ylabel="tokens a second", title=f"{model}, {scale} experts", ylim=(0, None))
    read.set(ylabel="MB read for a token", title="Bytes", ylim=(0, None))
    for axes in (speed, read):
        axes.set(xlabel="memory for experts (% of all at 4 bits)")
        _plain(axes)
    speed.legend(frameon=False, fontsize=7)
    return _png(figure)


def _parts(found: Sequence[Row], model: str, scale: str) -> bytes:
    """Draw the ablation at the smallest limit: time of a token, waiting and computing, and CPU seconds."""
    figure = require("matplotlib.figure", "plots").Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    own = [(way, r) for way in PARTS if (r := of(found, model, scale, way, limits(found)[0])) is not None]
    names = {"IO-EXP": "none", "EdgeMoE": "+Q+P+C\n(EdgeMoE)"}
    at = list(range(len(own)))
    computing = [1e3 * r["computing_seconds"] for _, r in own]
    axes.bar(at, computing, 0.5, color="#0b6e99", label="computing")
    axes.bar(at, [1e3 * r["stall_seconds"] for _, r in own], 0.5, bottom=computing, color="#d1495b",
             label="waiting for experts")
    spent = [1e3 * r["cpu_seconds"] for _, r in own]
    axes.plot(at, spent, "D", color="#222222", ms=5, label="CPU time")
    axes.set_xticks(at, [names.get(way, way) for way, _ in own])
    axes.set(ylabel="ms a token",
             title=f"{model}, {scale} experts, limit {limits(found)[0]} %: part by part")
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _storage(found: Sequence[Row], model: str) -> bytes:
    figure = require("matplotlib.figure", "plots").Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for r in table_two(found, model):
        colour = SHOWN.get(r["way"], (LEVELS.get(r["way"], "#222222"), ""))[0]
        axes.plot(r["store_bytes"] / 1e6, r["loss"], "o", color=colour)
        axes.annotate(r["way"], (r["store_bytes"] / 1e6, r["loss"]), textcoords="offset points",
                      xytext=(5, 5), fontsize=8)
    axes.set(xlabel="store (MB)", ylabel="held-out loss (nats a token)", xscale="log",
             title=f"{model}: loss against storage")
    _plain(axes)
    return _png(figure)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, alpha=0.2)


def _png(figure: Any) -> bytes:
    made = io.BytesIO()
    figure.savefig(made, dpi=130, format="png")
    return made.getvalue()
