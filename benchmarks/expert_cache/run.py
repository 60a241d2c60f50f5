"""Which experts stay: decode hits of every policy on three recorded traces, and what a decision costs.

Run: POISE_DATA=DIR python benchmarks/expert_cache/run.py
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from poise_edgemoe.cache import POLICIES, RoutingTrace, make_policy, read_trace, simulate

SHOWN = ("lru", "fld_lru", "lfu", "layer_lfu", "paper_intent", "expected", "belady")
ROWS = {"qwen": (500, 2000, 4000), "gemma": (3000,), "gptoss": (3000,)}  # MiB


def hits(trace: RoutingTrace, mebibytes: int) -> dict[str, float]:
    """Return the decode hit rate of each policy in percent, the prompt replayed first."""
    slots = mebibytes * 2**20 // trace.expert_bytes
    found: dict[str, float] = {"slots": slots}
    for policy in SHOWN:
        uses = trace.prompt + trace.decode
        found[policy] = round(100 * simulate(uses, slots, policy, len(trace.prompt), pins=True).hit_rate, 1)
    return found


def decision(name: str) -> dict[str, float]:
    """Return microseconds of a victim among 48 x 128 residents, after tokens of 8 experts a layer."""
    options = {"frequencies": np.ones((48, 128))} if name == "static" else {}
    policy = make_policy(name, layers=48, experts=128, **options)
    draw, times = np.random.default_rng(0), []
    for key in np.ndindex(48, 128):
        policy.added(key)
    for _ in range(20):
        for layer in range(48):
            group = [(layer, int(j)) for j in draw.choice(128, 8, replace=False)]
            for key in group:
                policy.used(key)
            started = time.perf_counter()
            policy.victim(group[0], pinned=group)
            times.append(1e6 * (time.perf_counter() - started))
        policy.next_token()
    return {"median": round(statistics.median(times), 1), "p99": round(float(np.quantile(times, 0.99)), 1)}


def main() -> None:
    if not os.environ.get("POISE_DATA"):
        print("skipped: POISE_DATA is not set; it names the folder that holds traces/*.route.csv.gz")
        return
    figures = {}
    for name, rows in ROWS.items():
        trace = read_trace(Path(os.environ["POISE_DATA"], "traces", f"{name}.route.csv.gz"))
        for mebibytes in rows:
            key = f"{name} {mebibytes} MiB"
            figures[key] = hits(trace, mebibytes)
            print(f"{key:20s}", figures[key], flush=True)
    costs = {name: decision(name) for name in POLICIES}
    print("microseconds a decision:", costs)
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"decode_hits_percent": figures, "microseconds": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
