"""Our engine, the paper's baselines, transformers in memory, accelerate's disk offload: one JSON line.

    engine    a store, under `memory` or with all experts in memory
    replayed  the same with the routing of a recorded trace, half of the experts cached, and its roofline
    prefill   a prompt, half of the experts cached, and what no engine can pass
    baseline  a store as `open_baseline` opens it
    memory    transformers, bfloat16, by `experts`: eager or grouped_mm
    offload   the same, the experts of all layers on disk (accelerate)
    device    the speed of the device and of the reader at the size of an expert
"""

from __future__ import annotations

import inspect
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.olmoe.modeling_olmoe as olmoe
from measuring import decode, given, held, limit, say

from poise_edgemoe import Engine
from poise_edgemoe.baselines import open_baseline
from poise_edgemoe.budget import plan_memory, share_kept
from poise_edgemoe.cache import read_trace
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.replay import mapped, replay
from poise_edgemoe.store.index import EXPERTS, Matrix, read_index
from poise_edgemoe.store.reader import HUGE, Reader, Request
from poise_edgemoe.store.reader import mapped as place

ROUNDS, EACH = 7, 1 << 28  # of the device's speed: rounds, bytes of one
KERNEL = 16 << 20  # page tables and the like, which a group's limit counts and the engine's does not


def limited(asked: dict[str, Any], open_: Callable[[], Any]) -> float:
    """Put the process under its limit beside what its libraries hold; return those in MB.

    A first opening makes libraries set themselves up: their memory is none of the engine's.
    """
    if asked["limit"]:
        open_().close()
    base = held(asked["group"]) if asked["group"] else 0
    if asked["limit"]:
        limit(asked["group"], base + asked["limit"])
    return base / 1e6


def memory_of(asked: dict[str, Any]) -> int | None:
    """Return what the engine is told to hold at most."""
    return asked["limit"] - KERNEL if asked["limit"] else None


@torch.no_grad()
def served(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    """Feed an engine its prompt and tokens; return what it took, with hits and waiting."""
    first, step = engine.source.start(torch.tensor([asked["prompt"]]))
    tokens, steps = asked["tokens"], engine.statistics.steps
    row = decode(lambda: step(first), lambda token: step(torch.tensor([[token]])), tokens)
    made = list(steps)[-len(tokens):]
    asked_for = sum(s.hits + s.misses for s in made)
    return row | {
        "hit_rate": sum(s.hits for s in made) / asked_for,
        "stall_ms": 1e3 * sum(s.stall_seconds for s in made) / len(made),
        "overhead_ms": 1e3 / len(engine.index.layers) * statistics.median(
            s.seconds - s.kernel_seconds - s.stall_seconds for s in made),
        "read_mb": sum(s.bytes_read for s in made) / len(made) / 1e6, "block_mb": row["read_mb"],
        "kept": share_kept(engine.index, engine.budget),
    }


def engine(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure the engine."""
    options = {"memory": memory_of(asked), "context": asked["context"], **asked.get("options", {})}
    if missing := _missing(options):
        return {"skipped": f"Engine.open has no option {missing} yet"}
    base = limited(asked, lambda: Engine.open(asked["path"], **options))
    with Engine.open(asked["path"], **options) as opened:
        return served(opened, asked) | {"base_mb": base}


def baseline(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure a baseline of the paper."""
    def opened() -> Engine:
        return open_baseline(asked["baseline"], asked["path"], memory=memory_of(asked),
                             context=asked["context"])

    base = limited(asked, opened)
    with opened() as engine:
        return served(engine, asked) | {"base_mb": base}


def replayed(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure the engine on recorded routing at a share of the experts, against what no engine can pass.

    A token cannot take less than computing it with all experts in memory (t_c), nor less than reading what
    it misses (t_io); both are measured here, in this process.
    """
    options = {"context": asked["context"], **asked.get("options", {})}
    if missing := _missing(options):
        return {"skipped": f"Engine.open has no option {missing} yet"}
    index = read_index(asked["path"])
    trace = mapped(read_trace(asked["trace"]), len(index.layers), len(index.layers[0].experts))
    if options.get("prefetch") == "oracle":
        options["trace"] = trace
    with Engine.open(asked["path"], context=asked["context"]) as whole:
        for _ in range(2):  # what the first reads is there for the second
            with replay(whole, trace):
                t_c = served(whole, asked)["cpu_ms"]
    memory = memory_for(asked["path"], asked["context"], asked["share"])
    with Engine.open(asked["path"], memory=memory, **options) as engine, replay(engine, trace):
        row = served(engine, asked)
    speed = device(asked)["raw_gb_per_second"]
    t_io = row["read_mb"] / speed  # a GB/s is a MB/ms
    bound = 1e3 / max(t_c, t_io)
    return row | {"limit": memory, "t_c_ms": t_c, "t_io_ms": t_io, "gb_per_second": speed,
                  "roofline": bound, "of_roofline": row["tokens_per_second"] / bound}


def prefill(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure a prompt, whose experts are not there, against computing it and reading them."""
    with Engine.open(asked["path"], context=asked["context"]) as whole:
        fed(whole, asked)  # reads all of them
        computing = fed(whole, asked)
    memory = memory_for(asked["path"], asked["context"], asked["share"])
    with Engine.open(asked["path"], memory=memory, context=asked["context"]) as engine:
        seconds, read = fed(engine, asked), engine.cache.reader.bytes_read
        chunks = -(-len(asked["prompt"]) // engine.budget.chunk)
        most = max(engine.cache.counts.misses.tolist()) / len(engine.index.layers[0].experts) / chunks
    speed = device(asked)["raw_gb_per_second"]
    reading = read / speed / 1e9
    return {"prompt_seconds": seconds, "computing_seconds": computing, "reading_seconds": reading,
            "read_mb": read / 1e6, "reads_of_an_expert": most, "chunks": chunks,
            "of_bound": seconds / max(computing, reading)}


@torch.no_grad()
def fed(engine: Engine, asked: dict[str, Any]) -> float:
    """Return the seconds in which an engine takes a prompt."""
    first, step = engine.source.start(torch.tensor([asked["prompt"]]))
    started = time.perf_counter()
    step(first)
    return time.perf_counter() - started


def memory_for(path: str, context: int, share: float) -> int:
    """Return the limit under which that share of the experts' bytes is kept."""
    index = read_index(path)
    every = sum(size_of(m) for _, _, m in index.blobs())
    least, most = every // 8, 2 * plan_memory(path, context=context).total
    while most - least > 1 << 20:
        middle = (least + most) // 2
        try:
            enough = share_kept(index, plan_memory(path, memory=middle, context=context)) >= share
        except ValueError:  # too small for the rest
            enough = False
        least, most = (least, middle) if enough else (middle, most)
    return most


def _missing(options: dict[str, Any]) -> str | None:
    known = inspect.signature(Engine.open).parameters
    return next((name for name in options if name not in known), None)


@torch.no_grad()
def in_memory(asked: dict[str, Any]) -> dict[str, Any]:
    """Measure transformers on the bfloat16 checkpoint, in memory or with experts offloaded to disk."""
    base = held(asked["group"]) if asked["group"] else 0
    more: dict[str, Any] = {}
    if asked["worker"] == "offload":
        layers = olmoe.OlmoeConfig.from_pretrained(asked["path"]).num_hidden_layers
        places = {f"model.layers.{n}.mlp": "disk" for n in range(layers)}
        places |= {f"model.layers.{n}.{part}": "cpu" for n in range(layers)
                   for part in ("self_attn", "input_layernorm", "post_attention_layernorm")}
        outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        more = {"device_map": places | dict.fromkeys(outside, "cpu"), "offload_folder": asked["offload"]}
    started = time.perf_counter()
    model = olmoe.OlmoeForCausalLM.from_pretrained(asked["path"], dtype=torch.bfloat16, **more).eval()
    model.set_experts_implementation(asked["experts"])
    loaded = time.perf_counter() - started
    if asked["limit"]:  # loading takes more than running: it is not held against the peer
        limit(asked["group"], base + asked["limit"])
    kept: Any = None

    def feed(*tokens: int) -> None:
        nonlocal kept
        kept = model(input_ids=torch.tensor([tokens]), past_key_values=kept, use_cache=True,
                     logits_to_keep=1).past_key_values

    row = decode(lambda: feed(*asked["prompt"]), feed, asked["tokens"])
    return row | {"base_mb": base / 1e6, "load_seconds": loaded}


def device(asked: dict[str, Any]) -> dict[str, Any]:
    """Return GB/s of bare direct reads and of the reader, at the size of an expert, in turns.

    Bare reads go into huge pages, the best that the device does; the reader's into a place as experts have.
    """
    folder, index = Path(asked["path"]), read_index(asked["path"])
    size = max(size_of(m) for _, _, m in index.blobs())
    handle = os.open(folder / EXPERTS, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    reader, draw = Reader(folder), random.Random(0)
    neighbours = [place(size) for _ in range(8)]  # as places of experts lie, in huge pages
    buffer = neighbours[4]
    huge = memoryview(place(-(-size // HUGE) * HUGE))[:size]
    count = max(1, min(EACH, os.fstat(handle).st_size) // size)

    def offsets() -> list[int]:
        return [size * draw.randrange(os.fstat(handle).st_size // size) for _ in range(count)]

    ways = {"raw": lambda at: os.preadv(handle, [huge], at),
            "reader": lambda at: _read(reader, buffer, at, size)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(ROUNDS):
        for name in list(ways)[:: 1 if n % 2 else -1]:
            places, started = offsets(), time.perf_counter()
            for at in places:
                ways[name](at)
            rates[name].append(count * size / (time.perf_counter() - started) / 1e9)
    reader.close()
    os.close(handle)
    pairs = [a / b for a, b in zip(rates["reader"], rates["raw"], strict=True)]
    return {"blob_mb": size / 1e6, "raw_gb_per_second": statistics.median(rates["raw"]),
            "reader_gb_per_second": statistics.median(rates["reader"]),
            "reader_of_raw": statistics.median(pairs)}


def _read(reader: Reader, buffer: mmap.mmap, at: int, size: int) -> None:
    request = Request({"all": Matrix(at, size, 0, 0)}, memoryview(buffer), "an expert", False)
    reader.demand([request])
    request.wait()


WORKERS = {"engine": engine, "baseline": baseline, "replayed": replayed, "prefill": prefill,
           "memory": in_memory, "offload": in_memory, "device": device}

if __name__ == "__main__":
    asked = given()
    torch.set_num_threads(asked["threads"])
    say(WORKERS[asked["worker"]](asked) | {"version": torch.__version__})
