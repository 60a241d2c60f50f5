"""Score every prediction in WORKDIR/pred; write results/peers.json and print tables.

Run: python benchmarks/quantile_ensembles/score_peers.py WORKDIR [--reference PEER] [--peers ...]
    [--seeds 0 1 2]

Convention "paper": WIS = 2 x sum over the 99 levels of the pinball loss; the mean pinball loss is
WIS / 198. The target is standardised. Scores are those of the sorted quantiles (sorting never raises
the pinball loss); `wis_raw` and the crossing rate are those of the quantiles as given. Cover and length
concern the central interval. The crossing rate is the share of neighbouring pairs in the wrong order.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from splits import TABLES
from store import LEVELS

Row = dict[str, Any]
SCORES = ("wis", "wis_raw", "pinball", "cover80", "cover90", "length80", "crossing")
USED = ("seconds", "cpu_seconds", "peak_rss_mib")
OURS = "poise_default"
COLUMNS = ("set", "seed", "peer", *SCORES, *USED)


def pinball(q: np.ndarray, y: np.ndarray) -> float:
    error = y[:, None] - q
    return float(np.maximum(LEVELS * error, (LEVELS - 1) * error).mean())


def interval(q: np.ndarray, nominal: float) -> tuple[np.ndarray, np.ndarray]:
    tail = round(100 * (1 - nominal) / 2)  # the level in hundredths: LEVELS[k] is (k + 1) / 100
    return q[:, tail - 1], q[:, 99 - tail]


def cover(q: np.ndarray, y: np.ndarray, nominal: float) -> float:
    low, high = interval(q, nominal)
    return float(((low <= y) & (y <= high)).mean())


def scores(q: np.ndarray, raw: np.ndarray, y: np.ndarray) -> dict[str, float]:
    low, high = interval(q, 0.8)
    per_level = pinball(q, y)
    return {
        "wis": 198 * per_level, "wis_raw": 198 * pinball(raw, y), "pinball": per_level,
        "cover80": cover(q, y, 0.8), "cover90": cover(q, y, 0.9), "length80": float((high - low).mean()),
        "crossing": float((np.diff(raw, axis=1) < -1e-9).mean()),
    }


def read(workdir: Path, seeds: list[int]) -> tuple[list[Row], list[Row]]:
    """Return a row per scored prediction, and the records of runs that failed."""
    rows, failures = [], []
    for path in sorted((workdir / "pred").glob("*.json")):
        name, seed, peer = path.stem.split("-", 2)
        if name not in TABLES or int(seed) not in seeds:
            continue
        record = json.loads(path.read_text())
        row = {"set": name, "seed": int(seed), "peer": peer, "record": record}
        if not path.with_suffix(".npz").exists():
            error = record.get("error", "no prediction").strip().splitlines()[-1]
            failures.append(row | {"error": error})
            continue
        with np.load(path.with_suffix(".npz")) as data:
            q, raw = data["q"], data.get("raw", data["q"])
        with np.load(workdir / f"{name}-{seed}.npz") as data:
            y = data["y_test"]
        rows.append(row | scores(q, raw, y) | {key: record.get(key, float("nan")) for key in USED})
    return rows, failures


def means(rows: list[Row], key: str) -> dict[tuple[str, str], float]:
    """Return the mean of a column over seeds, by set and peer."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["peer"]), []).append(row[key])
    return {group: float(np.mean(values)) for group, values in groups.items()}


def ratio(rows: list[Row], peer: str, reference: str) -> tuple[float, int]:
    """Return the geometric mean over sets of the ratio of WIS, on the splits both have."""
    wis = {(r["set"], r["seed"], r["peer"]): r["wis"] for r in rows}
    logs: dict[str, list[float]] = {}
    for (name, seed, who), value in wis.items():
        if who == peer and (name, seed, reference) in wis:
            logs.setdefault(name, []).append(np.log(value / wis[name, seed, reference]))
    per_set = [float(np.mean(values)) for values in logs.values()]
    return (float(np.exp(np.mean(per_set))) if per_set else float("nan")), len(per_set)


def wis_table(rows: list[Row], peers: list[str]) -> list[str]:
    counts, wis = Counter((r["set"], r["peer"]) for r in rows), means(rows, "wis")
    lines = ["| set | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    most = max(counts.values())
    for name in [n for n in TABLES if any((n, p) in wis for p in peers)]:
        best = min(wis[name, p] for p in peers if (name, p) in wis)
        cells = []
        for p in peers:
            value = wis.get((name, p))
            text = "–" if value is None else f"{value:.2f}"
            text = f"**{text}**" if value == best else text
            cells.append(text + (f" ({counts[name, p]})" if 0 < counts[name, p] < most else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def summary_table(rows: list[Row], peers: list[str], reference: str) -> list[str]:
    keys = ("cover80", "cover90", "length80", "crossing", *USED)
    lines = ["| peer | splits | WIS ratio to " + reference + " (sets) | " + " | ".join(keys) + " |",
             "|---" * (len(keys) + 3) + "|"]
    for p in peers:
        mine = [r for r in rows if r["peer"] == p]
        value, sets = ratio(rows, p, reference)
        cells = [f"{np.mean([r[k] for r in mine]):.3g}" for k in keys]
        lines.append(f"| {p} | {len(mine)} | {value:.3f} ({sets}) | " + " | ".join(cells) + " |")
    return lines


def bootstrap(logs: dict[str, list[float]], draws: int = 2000) -> tuple[float, float, float]:
    """Return a geometric mean over sets of ratios, with a 95 % interval over splits (log ratios by set)."""
    rng = np.random.default_rng(0)
    sets = [np.array(values) for values in logs.values()]
    drawn = np.mean([v[rng.integers(0, len(v), (draws, len(v)))].mean(axis=1) for v in sets], axis=0)
    low, high = np.exp(np.quantile(drawn, [0.025, 0.975]))
    return float(np.exp(np.mean([v.mean() for v in sets]))), float(low), float(high)


def against(rows: list[Row], peer: str, other: str) -> dict[str, list[float]]:
    """Return log ratios of WIS by set, on the splits both have; other "best": the single model that the
    peer's own out-of-fold scores chose."""
    wis = {(r["set"], r["seed"], r["peer"]): r["wis"] for r in rows}
    logs: dict[str, list[float]] = {}
    for row in rows:
        same = wis.get((row["set"], row["seed"], other))
        base = row["record"].get("wis_of_best") if other == "best" else same
        if row["peer"] == peer and base:
            logs.setdefault(row["set"], []).append(float(np.log(row["wis"] / base)))
    return logs


def ours_tables(rows: list[Row], peer: str, others: list[str]) -> list[str]:
    """Return how the peer compares with each other one: mean ratio, interval, wins, ratios by set."""
    lines = [f"| {peer} relative to | ratio | 95 % interval | splits | better / worse sets |",
             "|---|---|---|---|---|"]
    by_set = {}
    for other in ["best", *others]:
        logs = against(rows, peer, other)
        if not logs:
            continue
        value, low, high = bootstrap(logs)
        by_set[other] = {name: float(np.exp(np.mean(v))) for name, v in logs.items()}
        better = sum(r < 1 for r in by_set[other].values())
        count = sum(len(v) for v in logs.values())
        lines.append(f"| {other} | {value:.3f} | {low:.3f} to {high:.3f} | {count} | "
                     f"{better} / {len(logs) - better} |")
    head = " | ".join(f"to {other}" for other in by_set)
    lines += ["", f"| set | {head} | cover80 raw | CV+ | length CV+ / raw |",
              "|---" * (len(by_set) + 4) + "|"]
    for name in next(iter(by_set.values()), {}):
        own = [r for r in rows if r["peer"] == peer and r["set"] == name]
        cells = [f"{by_set[o][name]:.3f}" if name in by_set[o] else "–" for o in by_set]
        plus = np.mean([r["record"]["cv_plus_cover80"] for r in own])
        longer = np.mean([r["record"]["cv_plus_length80"] / r["length80"] for r in own])
        raw = np.mean([r["cover80"] for r in own])
        lines.append(f"| {name} | {' | '.join(cells)} | {raw:.3f} | {plus:.3f} | {longer:.2f} |")
    return lines


def models(rows: list[Row]) -> dict[str, Any]:
    """Return, for peers that pick among models, how often each was fitted, failed, and won."""
    out: dict[str, Any] = {}
    for peer in sorted({r["peer"] for r in rows if "models" in r["record"]}):
        records = [r["record"] for r in rows if r["peer"] == peer]
        out[peer] = {
            "runs": len(records),
            "fitted": dict(Counter(m["model"] for r in records for m in r["models"])),
            "failed": dict(Counter(m for r in records for m in r["failed"])),
            "weighted": dict(Counter(m for r in records for m in r["weights"])),
            "best": dict(Counter(r["best"] for r in records)),
        }
    return out


def used_versions(rows: list[Row]) -> dict[str, str]:
    """Return every package's version; more than one, if runs differ, in one text."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for package, version in row["record"].get("versions", {}).items():
            found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(many)) for package, many in sorted(found.items())}


def short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--reference", default="lightgbm_cqr")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--peers", nargs="+", help="columns of the tables; left out: every peer found")
    args = parser.parse_args()
    rows, failures = read(args.workdir, args.seeds)
    peers = sorted({r["peer"] for r in rows})
    result = {
        "convention": "paper: WIS = 2 x sum over 99 levels = 198 x mean pinball; standardised target",
        "versions": used_versions(rows),
        "models": models(rows),
        "failures": [{k: r[k] for k in ("set", "seed", "peer", "error")} for r in failures],
        "columns": COLUMNS,
    }
    lines = [json.dumps([short(r[c]) for c in COLUMNS]) for r in rows]
    text = json.dumps(result, indent=1)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    target = Path(__file__).parent / "results" / "peers.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    shown = args.peers or peers
    print("\n".join([*wis_table(rows, shown), "", *summary_table(rows, shown, args.reference)]))
    if any(r["peer"] == OURS for r in rows):
        print("\n".join(["", *ours_tables(rows, OURS, [p for p in shown if p != OURS])]))
    for row in [f for f in failures if f["peer"] in shown]:
        print(f"failed: {row['set']}-{row['seed']} {row['peer']}: {row['error']}")


if __name__ == "__main__":
    main()
