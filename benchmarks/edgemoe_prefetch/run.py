"""What reading ahead gives: sources, shares of experts in memory, one read per expert or per matrix.

Run: POISE_DATA=DIR python benchmarks/edgemoe_prefetch/run.py [--rounds 5] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from poise_edgemoe import engine as engines
from poise_edgemoe.budget import Budget, plan_memory
from poise_edgemoe.cache import RoutingTrace, read_trace
from poise_edgemoe.cache.slots import ExpertCache, size_of
from poise_edgemoe.engine import Engine
from poise_edgemoe.replay import mapped, replay
from poise_edgemoe.store.index import read_index
from poise_edgemoe.store.writer import convert
from poise_edgemoe.synthetic import write_olmoe

LAYERS, EXPERTS, INNER = 4, 64, 288  # 3.5 MB an expert in bfloat16, as one of OLMoE-1B-7B's in 4 bits
SHARES = (10, 25, 50, 75)  # % of experts in memory
TIGHT = SHARES[:2]  # where reading takes long enough for its manner to matter
PROMPT, WARM, NEW = 24, 16, 32  # tokens
READS = {"expert": True, "matrix": False}


def make_store(folder: Path) -> Path:
    model = write_olmoe(folder / "model", layers=LAYERS, experts=EXPERTS, inner=INNER, context=1024)
    return convert(model, folder / "store", bits=16)


def budget_of(store: Path, share: int) -> Budget:
    budget = plan_memory(store, context=PROMPT + WARM + NEW + 8)
    sizes = [size_of(m) for _, _, m in read_index(store).blobs()]
    kept = len(sizes) * share // 100 * max(sizes)
    return dataclasses.replace(budget, experts=budget.staging + kept)


def measure(
    store: Path, share: int, source: str, reads: str, trace: RoutingTrace | None
) -> dict[str, float]:
    """Decode after a prompt, under a trace or as the random routers will; return what a token took."""
    engines.ExpertCache = functools.partial(ExpertCache, whole=READS[reads])  # type: ignore[assignment]
    known = trace if source == "oracle" else None
    ids = torch.randint(3, 16000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with Engine(store, budget_of(store, share), "expected", prefetch=source, trace=known) as engine:
        if trace is None:
            return decode(engine, ids)
        with replay(engine, trace):
            return decode(engine, ids)


def decode(engine: Engine, ids: torch.Tensor) -> dict[str, float]:
    stream = engine.stream(ids, WARM + NEW, stop=[], do_sample=True, seed=0)
    for _ in range(WARM):
        next(stream)
    before, reader, started = engine.stats(), engine.reader, time.perf_counter()
    bytes_read, seconds = reader.bytes_read, reader.seconds
    for _ in stream:
        pass
    took, after = time.perf_counter() - started, engine.stats()
    ahead = {k: after["prefetch"][k] - before["prefetch"][k] for k in ("used", "wasted", "late")}
    misses, hits = (after[k] - before[k] for k in ("misses", "hits"))
    read = reader.bytes_read - bytes_read
    return {
        "ms": 1e3 * took / NEW, "stall_ms": 1e3 * (after["stall_seconds"] - before["stall_seconds"]) / NEW,
        "MB": read / NEW / 1e6, "GB/s": read / max(1e-9, reader.seconds - seconds) / 1e9,
        "hits": hits / (hits + misses), "recall": ahead["used"] / max(1, ahead["used"] + misses),
        "precision": ahead["used"] / max(1, ahead["used"] + ahead["wasted"]), "late": ahead["late"] / NEW,
    }


def cases(traces: dict[str, RoutingTrace | None]) -> list[tuple[str, int, str, str]]:
    """Return (routing, share, source, reads); the oracle knows recordings only."""
    found = [(name, 100, "none", "expert") for name in traces]
    for name, trace in traces.items():
        sources, shares = ("none", "lookahead", "oracle"), SHARES
        if trace is None:
            sources, shares = sources[:2], TIGHT
        found += [(name, share, source, "expert") for share in shares for source in sources]
        if trace is not None:
            found += [(name, share, source, "matrix") for share in TIGHT for source in ("none", "oracle")]
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def report(name: str, made: dict[tuple, dict[str, float]]) -> dict[str, Any]:
    """Return the table of a routing, and how near the oracle comes to max(computing, reading)."""
    computing = made[name, 100, "none", "expert"]["ms"]
    print(f"\n{name}: a token takes {computing:.1f} ms with all experts in memory")
    table: dict[str, Any] = {"all in memory, ms": computing}
    for (routing, share, source, reads), m in made.items():
        if routing != name or share == 100:
            continue
        reading = made[name, share, "none", reads]["MB"] / m["GB/s"]
        m["of_roofline"] = round(max(computing, reading) / m["ms"], 3)
        table[f"{share} %, {source}, read by {reads}"] = m
        print(f"  {share} % {source:9} {reads:6} " + "  ".join(f"{k} {v:g}" for k, v in m.items()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["POISE_DATA"], "traces")
    trace = mapped(read_trace(data / "qwen.route.csv.gz"), LAYERS, EXPERTS)
    traces: dict[str, RoutingTrace | None] = {"qwen": trace, "own": None}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        store, every = make_store(Path(folder)), cases(traces)
        runs: dict[tuple, list[dict[str, float]]] = {case: [] for case in every}
        for n in range(args.rounds):
            for case in every if n % 2 == 0 else reversed(every):
                routing, share, source, reads = case
                runs[case].append(measure(store, share, source, reads, traces[routing]))
            print(f"round {n + 1} of {args.rounds}", flush=True)
    made = {case: medians(found) for case, found in runs.items()}
    result = {"rounds": args.rounds, **{name: report(name, made) for name in traces}}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
