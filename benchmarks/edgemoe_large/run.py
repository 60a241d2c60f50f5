"""Models far larger than their memory limit: tokens a second, prompt, peak memory, share of the roofline.

Run: POISE_DATA=DIR python benchmarks/edgemoe_large/run.py --folder FOLDER [--only qwen3-30b-a3b] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.cli.doctor import vector_units
from poise_edgemoe import Engine
from poise_edgemoe.budget import parse_bytes, status_bytes
from poise_edgemoe.cache import read_trace
from poise_edgemoe.drawn import drawn_trace, reuse, write_drawn_store
from poise_edgemoe.measure import computing_time, reading_speed
from poise_edgemoe.replay import mapped, replay
from poise_edgemoe.store.index import EXPERTS, read_index

PROMPT, NEW, CONTEXT, WARM = 512, 64, 1024, 8
DISK = 19e9  # bytes that a store may take, with some room
OLMOE = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
         "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
         "vocab_size": 50304}
QWEN = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
        "num_key_value_heads": 4, "vocab_size": 151936}
GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32,
           "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_attention_heads": 64,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "olmoe-1b-7b": ("OlmoeConfig", OLMOE, ("1GB", "2GB", "4GB")),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", QWEN, ("2GB", "4GB", "8GB")),
    "gpt-oss-20b": ("GptOssConfig", GPT_OSS, ("2GB", "4GB", "8GB")),
}
SMALLEST = {"olmoe-1b-7b": "30MB", "qwen3-30b-a3b": "45MB", "gpt-oss-20b": "75MB"}  # of the smoke form
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 1024, "head_dim": 64}


def config_of(name: str, smoke: bool) -> Any:
    kind, sizes, _ = MODELS[name]
    small = {k: v for k, v in SMALL.items() if k in sizes} if smoke else {}
    inner = {k: 256 for k in ("intermediate_size", "moe_intermediate_size") if k in sizes} if smoke else {}
    same = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
            "tie_word_embeddings": False}
    return getattr(transformers, kind)(**sizes | small | inner | same)


def routing(name: str, config: Any, index: Any) -> tuple[Any, str]:
    """Return what is replayed, and in words what it is: Qwen's own, or drawn with Qwen's reuse."""
    layers, experts = len(index.layers), len(index.layers[0].experts)
    recorded = Path(os.environ.get("POISE_DATA", ""), "traces", "qwen.route.csv.gz")
    if not recorded.is_file():
        raise SystemExit("skipped: POISE_DATA names no folder with traces/qwen.route.csv.gz")
    trace = read_trace(recorded)
    if name.startswith("qwen"):
        return mapped(trace, layers, experts), f"recorded, {len(trace.decode) // trace.layers} uses a layer"
    share, top = reuse(trace), config.num_experts_per_tok
    return drawn_trace(layers, experts, top, NEW, share), f"drawn, {100 * share:.0f} % reuse, top {top}"


@contextmanager
def store_of(name: str, folder: Path, smoke: bool) -> Iterator[Path]:
    """Write a store, and remove it: there is room for one at a time."""
    store = folder / f"{name}{'-smoke' if smoke else ''}"
    shutil.rmtree(store, ignore_errors=True)
    started = time.perf_counter()
    write_drawn_store(store, config_of(name, smoke))
    size = (store / EXPERTS).stat().st_size / 1e9
    with open(store / EXPERTS, "rb") as f:  # memory that holds the file would have to be taken back first
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    print(f"{name}: experts {size:.2f} GB, written in {time.perf_counter() - started:.0f} s", flush=True)
    try:
        yield store
    finally:
        shutil.rmtree(store)


@torch.no_grad()
def measure(asked: dict[str, Any]) -> dict[str, Any]:
    """Replay one prompt and some tokens under a limit; of a process of its own."""
    torch.set_num_threads(1)
    store, memory, source = asked["store"], asked["memory"], asked["prefetch"]
    index = read_index(store)
    trace, said = routing(asked["name"], config_of(asked["name"], asked["smoke"]), index)
    more = {"trace": trace} if source == "oracle" else {}
    new = min(NEW, asked["new"])
    with Engine.open(store, memory=memory, context=CONTEXT, prefetch=source, **more) as engine:
        base = engine.base
        prompt = torch.randint(engine.source.vocab, (1, asked["prompt"]),
                               generator=torch.Generator().manual_seed(0))
        with replay(engine, trace):
            first, step = engine.source.start(prompt)
            before, started = engine.reader.bytes_read, time.perf_counter()
            logits = step(first)
            seconds, read = time.perf_counter() - started, engine.reader.bytes_read - before
            for _ in range(new):
                logits = step(logits.argmax(-1, keepdim=True))
        steps = engine.stats()["steps"][-new:][WARM:]
        row = {k: 1e3 * statistics.mean(s[k] for s in steps)
               for k in ("seconds", "kernel_seconds", "stall_seconds")}
        mb = statistics.mean(s["bytes_read"] for s in steps) / 1e6
        hits = sum(s["hits"] for s in steps) / sum(s["hits"] + s["misses"] for s in steps)
        peak, opening = status_bytes("VmHWM"), engine.opening()
        quiet = computing_time(engine, trace, prompt) if source == "none" else 0.0
        speed = reading_speed(engine)
    return {"routing": said, "opening": opening, "token_ms": row["seconds"],
            "kernel_ms": row["kernel_seconds"], "stall_ms": row["stall_seconds"], "mb": mb, "hits": hits,
            "prompt_seconds": seconds, "prompt_mb": read / 1e6, "grown_mb": (peak - base) / 1e6,
            "computing_ms": quiet, "gb_per_second": speed / 1e9}


def run(name: str, folder: Path, smoke: bool) -> list[dict[str, Any]]:
    rows = []
    if not smoke and shutil.disk_usage(folder).free < DISK:
        print(f"{name}: skipped, {folder} has less than {DISK / 1e9:.0f} GB free", flush=True)
        return []
    with store_of(name, folder, smoke) as store:
        limits = (SMALLEST[name],) if smoke else MODELS[name][2]
        for memory in limits:
            computing = 0.0  # t_c, of the run without guesses
            for source in ("none", "oracle"):
                asked = {"name": name, "store": str(store), "memory": memory, "prefetch": source,
                         "smoke": smoke, "prompt": 64 if smoke else PROMPT, "new": 12 if smoke else NEW}
                done = subprocess.run([sys.executable, __file__, "--worker", json.dumps(asked)],
                                      capture_output=True, text=True, check=False)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    print(f"{name}, {memory}, {source}: {last}", flush=True)
                    continue
                row = {"model": name, "memory": memory, "prefetch": source,
                       **json.loads(done.stdout.splitlines()[-1])}
                computing = row["computing_ms"] = row["computing_ms"] or computing
                row["tokens_per_second"] = 1e3 / row["token_ms"]
                row["of_limit"] = row["grown_mb"] * 1e6 / parse_bytes(memory)
                rows.append(row)
                print(f"{name}, {memory}, {source}: {row['tokens_per_second']:.1f} tok/s", flush=True)
    return limited(rows)


def limited(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows their roofline: the disk is as fast as it has been at best, whatever kept it busy since."""
    for row in rows:
        row["reading_ms"] = row["mb"] / max(r["gb_per_second"] for r in rows)
        row["of_roofline"] = max(row["computing_ms"], row["reading_ms"]) / row["token_ms"]
        print(line(row), flush=True)
    return rows


def line(r: dict[str, Any]) -> str:
    return (f"{r['model']:15}{r['memory']:>6} {r['prefetch']:8}{r['tokens_per_second']:6.1f} tok/s "
            f"{r['token_ms']:7.1f} ms (kernels {r['kernel_ms']:.1f}, waiting {r['stall_ms']:.1f}) hits "
            f"{100 * r['hits']:.0f} %, {r['mb']:.1f} MB; t_c {r['computing_ms']:.1f}, t_io "
            f"{r['reading_ms']:.1f}: {100 * r['of_roofline']:.0f} % of the roofline; prompt "
            f"{r['prompt_seconds']:.1f} s, {r['prompt_mb']:.0f} MB; grown {r['grown_mb']:.0f} MB; "
            f"{r['routing']}")


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Draw tokens per second over the memory limit, and the roofline as an open mark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(MODELS, ("#0b6e99", "#d1495b", "#edae49"), strict=True):
        for source, style in (("none", "-o"), ("oracle", "--s")):
            found = [r for r in rows if (r["model"], r["prefetch"]) == (name, source)]
            at = [parse_bytes(r["memory"]) / 1e9 for r in found]
            axes.plot(at, [r["tokens_per_second"] for r in found], style, color=colour,
                      label=f"{name}, {'no guesses' if source == 'none' else 'oracle'}")
            if source == "oracle":
                least = [1e3 / max(r["computing_ms"], r["reading_ms"]) for r in found]
                axes.plot(at, least, "_", color=colour, ms=14, mew=2)
    axes.set(xlabel="memory limit (GB)", ylabel="tokens a second", xscale="log", ylim=(0, None),
             title="4-bit models larger than memory; bars: the oracle's roofline")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(target, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where stores are written, one at a time: 19 GB free")
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; nothing is kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(json.loads(args.worker))))
        return
    if args.folder is None:
        raise SystemExit("skipped: give --folder, with 19 GB free")
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = [r for name in MODELS if args.only in name for r in run(name, args.folder, args.smoke)]
    if args.smoke or not rows:
        return
    results = Path(__file__).parent / "results"
    kept = results / "latest.json"
    before = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    names = {r["model"] for r in rows}
    rows = [r for r in before if r["model"] not in names] + rows
    said = {"date": str(date.today()), "vector_units": vector_units(), "threads": 1, "context": CONTEXT,
            "prompt": PROMPT, "tokens": NEW - WARM, "rows": rows}
    kept.write_text(json.dumps(said, indent=1) + "\n")
    draw(rows, results / "tokens_over_memory.png")


if __name__ == "__main__":
    main()
