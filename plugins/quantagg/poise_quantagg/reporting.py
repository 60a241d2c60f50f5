"""Tables and figures over runs of the recipe `quantile`: the paper's kind (its Figs 6 to 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from poise_quantagg.comparison import relative_bootstrap

TIE = 0.01  # ratios within 1 % of one count as ties
REFERENCES = ("best", "local_fine")
Scores = Mapping[str, Mapping[str, list[dict[str, Any]]]]


Table = tuple[str, list[str], list[list[str]]]


def report(runs: Sequence[Any]) -> tuple[list[Table], list[tuple[str, bytes]]]:
    """Return ([(title, columns, rows)], [(title, PNG)]) over all finished runs of the recipe."""
    by_set = collect(runs)
    if not by_set:
        return [], []
    methods = list(dict.fromkeys(name for table in by_set.values() for name in table))
    tables, figures = [], []
    for reference in REFERENCES:
        if all(reference in table for table in by_set.values()):
            rows = relative_rows(by_set, methods, reference)
            tables.append(_relative_table(rows, by_set, reference))
            figures.append((f"WIS relative to {reference}", _picture(rows, reference, len(by_set))))
    if len(by_set) > 1:
        tables.append(_per_set(by_set, methods))
    tables += [_isotonisation(by_set, methods), _coverage(by_set, methods)]
    return tables, figures


def collect(runs: Sequence[Any]) -> Scores:
    """Return rows by data set and method, one row per split: of a split that was run twice, the later one.

    Runs with an adapter count as methods of their own; scores at different levels are sums of different
    size, so each grid is a set of its own.
    """
    found: dict[tuple[str, Any], dict[str, dict[Any, dict[str, Any]]]] = {}
    for run in runs:
        notes = run.notes.get("by_split")
        if not isinstance(notes, dict):
            continue
        adapter = getattr(run, "config", {}).get("adapter", {}).get("entry", "none")
        table = found.setdefault((str(notes.get("data")), notes.get("levels")), {})
        for row in notes.get("rows", []):
            name = row["name"] if adapter == "none" else f"{row['name']} + {adapter}"
            table.setdefault(name, {})[row["split"]] = row
    names = [data for data, _ in found]
    return {
        data if names.count(data) == 1 else f"{data}, {levels} levels":
            {name: list(rows.values()) for name, rows in table.items()}
        for (data, levels), table in found.items()
    }


def _column(table: Mapping[str, list[dict[str, Any]]], method: str, key: str) -> np.ndarray:
    return np.array([row[key] for row in table[method]], dtype=float)


def relative_rows(by_set: Scores, methods: Sequence[str], reference: str) -> list[tuple[str, Any]]:
    """Return (method, Relative) for methods that ran on every set and split of the reference."""
    rows = []
    base = {name: _column(table, reference, "wis_paper") for name, table in by_set.items()}
    for method in methods:
        if any(method not in t or len(t[method]) != len(base[name]) for name, t in by_set.items()):
            continue
        own = {name: _column(table, method, "wis_paper") for name, table in by_set.items()}
        rows.append((method, relative_bootstrap(own, base)))
    return sorted(rows, key=lambda row: row[1].ratio)


def _relative_table(rows, by_set: Scores, reference: str):
    base = {name: _column(table, reference, "wis_paper").mean() for name, table in by_set.items()}
    lines = []
    for method, found in rows:
        ratios = [_column(t, method, "wis_paper").mean() / base[name] for name, t in by_set.items()]
        wins = sum(r < 1 - TIE for r in ratios)
        losses = sum(r > 1 + TIE for r in ratios)
        seconds = np.mean([_column(t, method, "cpu_seconds").mean() for t in by_set.values()])
        lines.append([method, f"{found.ratio:.3f}", f"{found.lower:.3f} to {found.upper:.3f}",
                      f"{wins}/{len(ratios) - wins - losses}/{losses}", f"{seconds:.1f}"])
    splits = sum(len(t[reference]) for t in by_set.values())
    title = (f"WIS relative to {reference}: geometric mean over {len(by_set)} set(s), {splits} splits, "
             f"95 % bootstrap interval over splits (any convention: the ratio is the same)")
    return title, ["method", "ratio", "interval", "win/tie/loss", "CPU s"], lines


def _picture(rows, reference: str, sets: int) -> bytes:
    from poise_quantagg.plots import relative

    return relative([(m, r.ratio, r.lower, r.upper) for m, r in rows], reference=reference,
                    title=f"Geometric mean over {sets} data set(s)")


def _per_set(by_set: Scores, methods: Sequence[str]):
    lines = []
    for name, table in by_set.items():
        reference = "best" if "best" in table else methods[0]
        base = _column(table, reference, "wis_paper").mean()
        lines.append([name, f"{base:.3f}", *(
            f"{_column(table, m, 'wis_paper').mean() / base:.3f}" if m in table else "-" for m in methods)])
    return "WIS by set relative to best (whose WIS, 2 sum of pinball, comes first)", \
        ["set", "WIS of best", *methods], lines


def _isotonisation(by_set: Scores, methods: Sequence[str]):
    lines = []
    for method in methods:
        own = [t[method] for t in by_set.values() if method in t]
        if not any(row["crossing_raw"] > 0 for rows in own for row in rows):
            continue
        cells = []
        for how in ("sort", "pava", "minmax"):
            ratio = np.array([row[f"wis_{how}"] / row["wis_none"] for rows in own for row in rows])
            worse = int((ratio > 1 + 1e-12).sum())
            cells.append(f"{np.exp(np.log(ratio).mean()):.4f} ({worse} of {len(ratio)} worse)")
        crossing = np.mean([row["crossing_raw"] for rows in own for row in rows])
        lines.append([method, f"{crossing:.3f}", *cells])
    return "Isotonisation after prediction: WIS relative to none", \
        ["method", "crossing", "sort", "pava", "minmax"], lines


def _coverage(by_set: Scores, methods: Sequence[str]):
    lines = []
    for method in methods:
        rows = [row for t in by_set.values() for row in t.get(method, [])]
        sets = [np.mean([r["coverage_80"] for r in t[method]]) for t in by_set.values() if method in t]
        plus = [np.mean([r["coverage_80_cv"] for r in t[method]]) for t in by_set.values() if method in t]
        longer = np.mean([r["length_80_cv"] / r["length_80"] for r in rows if r["length_80"] > 0])
        lines.append([method, f"{np.mean(sets):.3f}", f"{min(sets):.3f} to {max(sets):.3f}",
                      f"{np.mean(plus):.3f}", f"{min(plus):.3f} to {max(plus):.3f}", f"{longer:.2f}"])
    return "Coverage at nominal 0.8, as predicted and by CV+; mean and range over sets", \
        ["method", "raw", "range", "CV+", "range of CV+", "length CV+ / raw"], lines
