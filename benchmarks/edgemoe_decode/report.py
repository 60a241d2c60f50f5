"""The table, the ratios that are asked for, and the picture."""

from __future__ import annotations

import datetime
import io
import platform
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from lines import BUDGETS, Line

from poise.cli.doctor import vector_units
from poise.files import write_bytes, write_json

Row = dict[str, Any]
COLUMNS = (  # of the table: what is shown, times what, with how many digits
    ("tok/s", "tokens_per_second", 1, 2), ("CPU ms/tok", "cpu_ms", 1, 0), ("MB/tok", "read_mb", 1, 1),
    ("hits %", "hit_rate", 100, 0), ("stall ms", "stall_ms", 1, 1), ("first s", "prompt_seconds", 1, 1),
    ("peak MB", "peak_mb", 1, 0), ("of it libs", "base_mb", 1, 0), ("load", "load", 1, 1))
RATE, CPU = "tokens_per_second", "cpu_ms"
RATIOS = (  # name, how two lines begin (of several the best), what is divided, what is asked for
    ("ours / llama.cpp mmap at 75 %", "ours, 75 %", "llama.cpp mmap, 75 %", RATE, ">= 5"),
    ("ours / llama.cpp mmap at 56 %", "ours, 56 %", "llama.cpp mmap, 56 %", RATE, ">= 8"),
    ("ours at 75 % / accelerate", "ours, 75 %", "accelerate", RATE, ">= 10"),
    ("the same, bytes read a second", "ours, 75 %", "accelerate", "read_mb_per_second", ""),
    ("CPU of a token, all cached: ours / llama.cpp repacked", "ours, none", "llama.cpp repacked, none", CPU,
     "<= 1.3"),
    ("all cached, ours / llama.cpp repacked", "ours, none", "llama.cpp repacked, none", RATE, ""),
    ("all cached, ours / transformers", "ours, none", "transformers", RATE, ""),
    ("ours, 75 % / IO-EXP (paper: 2.6 to 3.2)", "ours, 75 %", "IO-EXP, same", RATE, ""),
    ("ours, 75 % / IO-QEXP (paper: 1.2 to 2.1)", "ours, 75 %", "IO-QEXP", RATE, ""),
    ("ours, 75 % / STI-like (paper: 1.2 to 2.8)", "ours, 75 %", "STI-like, 75 %", RATE, ""),
)
SHARES = (  # name, how a line begins, what is shown, what is asked for
    ("reader / raw device, at an expert's size", "device", "reader_of_raw", ">= 0.85"),
    ("share of the roofline, no prefetch", "replayed, none", "of_roofline", ""),
    ("share of the roofline, lookahead", "replayed, lookahead", "of_roofline", ""),
    ("share of the roofline, oracle", "replayed, oracle", "of_roofline", ">= 0.9"),
    ("prompt / the longer of computing and reading", "prompt", "of_bound", "<= 1.5"),
    ("reads of an expert per layer and chunk", "prompt", "reads_of_an_expert", "<= 1"),
    ("own overhead a layer, all cached (ms)", "ours, none", "overhead_ms", "<= 0.3"))
PICTURED = {
    "ours": "#0b6e99", "llama.cpp mmap": "#d1495b", "llama.cpp repacked": "#edae49", "STI-like": "#7a9e7e",
    "accelerate bf16, disk": "#8d6a9f", "transformers bf16, grouped_mm": "#222222"}


class Measured:
    """Rows by line and repeat."""

    def __init__(self, chosen: list[Line], rows: list[Row]) -> None:
        self.lines = chosen
        self.rows: dict[str, list[Row]] = {line.key: [] for line in chosen}
        for row in sorted(rows, key=lambda r: r["repeat"]):
            if row["line"] in self.rows:
                rate = row.get("tokens_per_second", 0) * row.get("read_mb", 0)
                self.rows[row["line"]].append(row | {"read_mb_per_second": rate})

    def median(self, key: str, what: str) -> float | None:
        """Return the median of a line; None where it was not measured."""
        found = [r[what] for r in self.rows.get(key, ()) if what in r]
        return statistics.median(found) if found else None

    def medians(self, key: str) -> dict[str, float]:
        """Return those of all numbers of a line."""
        names = sorted({w for r in self.rows[key] for w, v in r.items() if isinstance(v, (int, float))})
        return {what: round(m, 4) for what in names if (m := self.median(key, what)) is not None}

    def best(self, starts: str, what: str = RATE) -> str | None:
        """Return the line, of those that begin so, with the best median: the peer's choice of threads."""
        medians = {key: self.median(key, what) for key in self.rows if key.startswith(starts)}
        found = {key: median for key, median in medians.items() if median is not None}
        pick: Callable[..., str] = min if what == CPU else max
        return pick(found, key=found.__getitem__) if found else None

    def ratio(self, a: str | None, b: str | None, what: str) -> float | None:
        """Return the median of the ratios of rows that were measured in the same repeat."""
        if a is None or b is None:
            return None
        other = {r["repeat"]: r[what] for r in self.rows[b] if what in r}
        pairs = [r[what] / other[r["repeat"]] for r in self.rows[a] if what in r and other.get(r["repeat"])]
        return statistics.median(pairs) if pairs else None


def table(measured: Measured) -> list[str]:
    """Return a line of text for each line that was measured, and the reasons of those that were not."""
    keys = [line.key for line in measured.lines if line.worker != "device"]
    width = max(len(k) for k in keys) + 1 if keys else 1
    said = [" " * width + "".join(f"{name:>11}" for name, *_ in COLUMNS)]
    for key in keys:
        values = [(measured.median(key, what), times, digits) for _, what, times, digits in COLUMNS]
        reason = next((r["skipped"] for r in measured.rows[key] if "skipped" in r), None)
        if values[0][0] is None:
            said.append(f"{key:{width}}  {reason or 'not measured'}")
        else:
            cells = ("-" if v is None else f"{v * times:.{digits}f}" for v, times, digits in values)
            said.append(f"{key:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return said


def ratios(measured: Measured) -> list[dict[str, Any]]:
    """Return what is asked for, and what was measured."""
    found = []
    for name, ours, theirs, what, asked in RATIOS:
        by = CPU if what == CPU else RATE
        a, b = measured.best(ours, by), measured.best(theirs, by)
        found.append({"name": name, "measured": measured.ratio(a, b, what), "asked": asked, "of": [a, b]})
    for name, starts, what, asked in SHARES:
        key = measured.best(starts, what)
        found.append({"name": name, "asked": asked, "of": [key],
                      "measured": None if key is None else measured.median(key, what)})
    return [*found, _growing(measured)]


def _growing(measured: Measured) -> dict[str, Any]:
    """Return what becomes of the speed with the next larger budget, where it is worst."""
    keys = [f"ours, {limit}, -t 1" for limit in BUDGETS]
    known = [key for key in keys if measured.rows.get(key) and measured.median(key, RATE)]
    steps = [(measured.ratio(b, a, RATE) or 0.0, [b, a]) for a, b in pairwise(known)]
    worst, of = min(steps, default=(None, [None]))
    return {"name": "a larger budget / the one before, at worst", "measured": worst, "asked": ">= 0.95",
            "of": of}


def picture(measured: Measured, limits: dict[str, int], target: Path) -> None:
    """Draw tokens per second over the memory limit, a line per engine; without a limit at its peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in PICTURED.items():
        dots = []
        for limit in (*BUDGETS[:-1], "3 GB", "none"):
            key = measured.best(f"{name}, {limit},")
            if key is not None:
                at = limits[limit] / 1e6 if limit in limits else measured.median(key, "peak_mb")
                dots.append((at, measured.median(key, RATE)))
        if dots:
            axes.plot(*zip(*dots), marker="o", color=colour, label=name)
    axes.set(xlabel="memory limit, or peak without one (MB)", ylabel="tokens per second", xscale="log",
             yscale="log", title="Decoding after 512 tokens, 6 layers of OLMoE's shape, random routing")
    for written in (axes.xaxis, axes.yaxis):
        written.set_major_formatter("{x:g}")
        written.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="both", alpha=0.2)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format="png")
    write_bytes(target, drawn.getvalue())


def finish(chosen: list[Line], rows: list[Row], more: dict[str, Any], target: Path) -> str:
    """Write `latest.json` and the picture; return the tables."""
    measured = Measured(chosen, rows)
    found = ratios(measured)
    medians = {key: measured.medians(key) for key, kept in measured.rows.items() if kept}
    skipped = {k: r[0]["skipped"] for k, r in measured.rows.items() if r and "skipped" in r[0]}
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "latest.json", {
        "date": datetime.date.today().isoformat(), "processor": processor(), "vector_units": vector_units(),
        "versions": versions(rows), "repeats": max((r["repeat"] for r in rows), default=-1) + 1, **more,
        "ratios": found, "medians": medians, "skipped": skipped})
    picture(measured, more["limits"], target / "tokens_over_memory.png")
    width = max(len(r["name"]) for r in found)
    shown = [f"{r['name']:{width}}  {'-' if r['measured'] is None else format(r['measured'], '.2f'):>7}  "
             f"{r['asked']:8} {' : '.join(k or 'not measured' for k in r['of'])}" for r in found]
    return "\n".join(["", *table(measured), "", *shown])


def processor() -> str:
    """Return the processor's name and how many of its cores there are."""
    names = [x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
             if x.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def versions(rows: list[Row]) -> dict[str, str]:
    """Return those of libraries."""
    import accelerate

    said = [r["version"] for r in rows if r["line"].startswith("llama") and "version" in r]
    return {"torch": torch.__version__, "transformers": transformers.__version__,
            "accelerate": accelerate.__version__, "llama-cpp-python": said[-1] if said else "not there"}
