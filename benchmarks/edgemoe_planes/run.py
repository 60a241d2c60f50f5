"""What bases cost and give: held-out loss, bytes, waiting and speed, by the share of uses they may serve.

Run: POISE_DATA=DIR python benchmarks/edgemoe_planes/run.py --folder FOLDER [--rounds 3] [--smoke]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

import poise
from poise.cli.doctor import vector_units
from poise_edgemoe import ByteMoE, Engine, convert
from poise_edgemoe.bits import mean_loss, text_windows
from poise_edgemoe.budget import plan_memory
from poise_edgemoe.cache import read_trace
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.drawn import write_drawn_store
from poise_edgemoe.generation import token_by_token
from poise_edgemoe.replay import mapped, replay
from poise_edgemoe.store.index import read_index

SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
KEPT = 25  # % of experts in memory
PROMPT, WARM, NEW = 24, 8, 40  # tokens of a decoded answer
LENGTH, WINDOWS = 96, 24  # of the held-out loss
SIZES = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 3, "num_experts": 64,
         "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16,
         "vocab_size": 16384}
SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
         "vocab_size": 512}
Row = dict[str, Any]


def opened(store: Path, share: float, context: int, kept: int = KEPT) -> Engine:
    """Open a store with that % of its experts in memory, whatever else it needs."""
    budget = plan_memory(store, context=context, base_share=share)
    sizes = [size_of(m) for _, _, m in read_index(store).blobs()]
    room = max(1, len(sizes) * kept // 100) * max(sizes)
    return Engine(store, dataclasses.replace(budget, experts=budget.staging + room), "expected",
                  base_share=share)


def took(engine: Engine, steps: list[Row]) -> Row:
    """Return what a token took, on average of some steps, and what bases have served."""
    n, total = len(steps), {k: sum(s[k] for s in steps) for k in steps[0]}
    uses = total["hits"] + total["misses"]
    return {"tokens_per_second": n / total["seconds"], "ms": 1e3 * total["seconds"] / n,
            "stall_ms": 1e3 * total["stall_seconds"] / n, "mb": total["bytes_read"] / n / 1e6,
            "hits": total["hits"] / uses, "from_base": total["from_base"] / uses}


# ------------------------------------------------------------------ quality


def quality(folder: Path, smoke: bool) -> list[Row]:
    """Return held-out loss of the trained byte model, fed token by token, by store and share."""
    component = ByteMoE(layers=2, hidden=64, inner=64, steps=20) if smoke else ByteMoE()
    model, rows = component.build(), []
    length, windows = (16, 2) if smoke else (LENGTH, WINDOWS)
    text = poise.build("data", "sotu").load(0).test
    batch = text_windows(text, component.tokenizer(), length, windows)
    cases = [(bits, planes) for bits in (4, 8) for planes in (1, 2)] + [(2, 1)]
    for bits, planes in cases:
        how = {"bits": bits, "group": 32, "hot": "raw", "planes": planes}
        store = convert(model, folder / f"byte-{bits}-{planes}", **how)
        for share in SHARES if planes == 2 else (0.0,):
            with opened(store, share, length + 8) as engine:
                loss = mean_loss(token_by_token(engine), batch, rows=1)
                rows.append({"bits": bits, "planes": planes, "share": share, "loss": loss,
                             **took(engine, engine.stats()["steps"])})
            print(line(rows[-1]), flush=True)
    return rows


# ------------------------------------------------------------------ speed


@torch.no_grad()
def decoded(store: Path, share: float, kept: int, trace: Any, new: int) -> Row:
    """Return what a token took that was decoded under recorded routing."""
    ids = torch.randint(3, 500, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with opened(store, share, PROMPT + WARM + new + 8, kept) as engine, replay(engine, trace):
        first, step = engine.source.start(ids)
        logits = step(first)
        for _ in range(WARM + new):
            logits = step(logits.argmax(-1, keepdim=True))
        return took(engine, engine.stats()["steps"][-new:])


def speed(folder: Path, rounds: int, smoke: bool) -> list[Row]:
    """Return medians of interleaved rounds on a store of OLMoE-1B-7B's sizes, three of its layers."""
    sizes = SIZES | (SMALL if smoke else {})
    config = transformers.OlmoeConfig(**sizes, max_position_embeddings=1024, pad_token_id=0,
                                      bos_token_id=None, eos_token_id=None)
    recorded = Path(os.environ.get("POISE_DATA", ""), "traces", "qwen.route.csv.gz")
    if not recorded.is_file():
        print("speed: skipped, POISE_DATA names no folder with traces/qwen.route.csv.gz")
        return []
    trace = mapped(read_trace(recorded), sizes["num_hidden_layers"], sizes["num_experts"])
    stores = {n: write_drawn_store(folder / f"olmoe-{n}", config, planes=n) for n in (1, 2)}
    every = [(n, share, kept) for kept in (KEPT, 2 * KEPT) for n in stores
             for share in (SHARES if n == 2 else (0.0,))]
    runs: dict[Any, list[Row]] = {case: [] for case in every}
    for turn in range(rounds):
        for planes, share, kept in every if turn % 2 == 0 else reversed(every):
            made = decoded(stores[planes], share, kept, trace, 4 if smoke else NEW)
            runs[planes, share, kept].append(made)
        print(f"round {turn + 1} of {rounds}", flush=True)
    rows = [{"planes": planes, "share": share, "kept": kept,
             **{k: statistics.median(r[k] for r in found) for k in found[0]}}
            for (planes, share, kept), found in runs.items()]
    for row in rows:
        print(line(row))
    return rows


def line(row: Row) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where stores are written, 1.5 GB, and removed again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; nothing is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = {"quality": quality(Path(folder), args.smoke),
                "speed": speed(Path(folder), 1 if args.smoke else args.rounds, args.smoke)}
    if args.smoke:
        return
    said = {"date": str(date.today()), "vector_units": vector_units(), "threads": 1, "kept": KEPT,
            "windows": [WINDOWS, LENGTH], "rounds": args.rounds, **rows}
    target = Path(__file__).parent / "results" / "latest.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
