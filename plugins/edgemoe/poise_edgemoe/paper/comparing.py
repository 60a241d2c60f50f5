"""The recipe `edgemoe_paper`: every way, under every limit, on every model; a line for each as it ends."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from poise.errors import ConfigError
from poise.files import write_bytes, write_text
from poise.interfaces import Parts
from poise.options import options_of
from poise_edgemoe.bits import mean_loss
from poise_edgemoe.budget import resident_bytes
from poise_edgemoe.engine import Engine
from poise_edgemoe.generation import forget_peak, peak_bytes
from poise_edgemoe.loading import give_back
from poise_edgemoe.paper.figures import drawn, ratios, summed
from poise_edgemoe.paper.making import Made, Settings, go_on, known, make
from poise_edgemoe.paper.ways import WAYS, Known, Way, memory_at, open_way, too_small
from poise_edgemoe.replay import replay
from poise_edgemoe.store.index import EXPERTS, read_index
from poise_edgemoe.widths.journal import Journal

NAMES = {1: "switch"}  # by experts a token
VERSION = 1  # of a row
Row = dict[str, Any]


def name_of(top: int) -> str:
    """Return what a model is called in rows."""
    return NAMES.get(top, f"top{top}")


def run(parts: Parts, context: Any, settings: Settings, tops: list[int]) -> dict[str, float]:
    """Compare; see `EdgeMoEPaper`."""
    assert parts.data is not None
    splits, component = parts.data.load(context.seed), parts.model
    context.note("data", splits.provenance)
    work = context.directory / "work"
    work.mkdir(parents=True, exist_ok=True)
    facts = [VERSION, asdict(settings), options_of(component), splits.provenance, context.seed]
    journal = Journal(work, hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest())
    rows, plans = [], {}
    for top in tops:
        one = replace(component, top=top)  # type: ignore[type-var]
        made, said = _model(one, name_of(top), work, journal, splits, settings, context)
        rows += made
        plans[name_of(top)] = said
    found = summed(rows)
    metrics = ratios(found)
    context.note("ways", found)
    context.note("plans", plans)
    write_text(context.directory / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name, picture in drawn(found):
        write_bytes(context.directory / "figures" / f"{name}.png", picture)
    context.log(0, metrics)
    return metrics


def keys_of(name: str, settings: Settings) -> list[tuple[str, str, Way, int | None, int]]:
    """Return what is measured of a model: key, scale, way, limit, repeat.

    Ways take turns at each limit, so that what else the machine does falls on all of them.
    """
    scales = ["trained"] + (["large"] if settings.hidden is not None else [])
    turns = [(way, None) for way in WAYS if not way.limited]
    turns += [(way, limit) for limit in settings.limits for way in WAYS if way.limited]
    return [(f"{name}/{scale}/{way.name}/{limit}/{repeat}", scale, way, limit, repeat)
            for scale in scales for repeat in range(settings.repeats) for way, limit in turns]


def _model(
    component: Any, name: str, work: Path, journal: Journal, splits: Any, settings: Settings, context: Any
) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of a model and its plans; stores are removed once all of it is measured."""
    asked, plans = keys_of(name, settings), f"{name}/plans"
    if not all(journal.has(key) for key, *_ in asked) or not journal.has(plans):
        with context.progress(None, f"{name}: making stores and plans") as bar:
            made = make(work / name, component, splits, settings, context.seed_for,
                        lambda note: bar.advance(note=note))
        journal.get(plans, lambda: made.plans)
        with context.progress(len(asked), f"{name}: ways measured") as bar:
            routing: dict[str, Known] = {}
            for key, scale, way, limit, repeat in asked:
                if not journal.has(key):
                    if scale not in routing:
                        routing[scale] = _known(made, scale, settings)
                    journal.get(key, _measuring(made, routing[scale], name, scale, way, limit, repeat,
                                                settings, context.seed_for(f"{name} continued")))
                bar.advance(note=f"{scale} {way.name}")
        shutil.rmtree(work / name)

    def missing() -> Any:
        raise AssertionError("all was measured")

    return [journal.get(key, missing) for key, *_ in asked], journal.get(plans, missing)


def _known(made: Made, scale: str, settings: Settings) -> Known:
    """Return what is known of routing; our policy is the one that simulation prefers at each limit."""
    stores = made.stores[scale]
    sizes = {name: (stores[name] / EXPERTS).stat().st_size for name in ("int4", "ours")}
    return known(made.traces, settings.limits, lambda limit: limit / 100 * sizes["int4"] / sizes["ours"])


def _measuring(
    made: Made, routing: Known, name: str, scale: str, way: Way, limit: int | None, repeat: int,
    settings: Settings, seed: int,
) -> Callable[[], Row]:
    return lambda: measured(made, routing, name, scale, way, limit, repeat, settings, seed)


# ------------------------------------------------------------------ one way


def measured(
    made: Made, routing: Known, name: str, scale: str, way: Way, limit: int | None, repeat: int,
    settings: Settings, seed: int,
) -> Row:
    """Return what one way took on some tokens after a prompt."""
    store = made.stores[scale][way.store]
    memory = None if limit is None else memory_at(limit, made.stores[scale]["int4"], settings.context)
    row: Row = {"model": name, "scale": scale, "way": way.name, "limit": limit, "repeat": repeat,
                "memory": memory, "fits": True, "store_bytes": sum(
                    f["bytes"] for f in read_index(store).files.values())}
    gc.collect()
    give_back()
    before, watched = resident_bytes(), forget_peak()
    try:
        engine = open_way(way, store, memory, settings.context, routing, limit)
    except ConfigError as error:
        if not too_small(error):
            raise
        return row | {"fits": False}
    with engine:
        with _routed(engine, made, scale):
            row |= decoded(engine, made.prompt, settings, seed)
        row["grown_bytes"] = peak_bytes() - before if watched else None
        row["budget"], row["policy"] = engine.budget.total, engine.cache.policy.name
        # one limit is enough: whatever is in memory, the loss is that of the store
        measure = scale == "trained" and not repeat and limit in (None, max(settings.limits))
        row["loss"] = mean_loss(engine.logits, made.batch, rows=1) if measure else None
    return row


@contextmanager
def _routed(engine: Engine, made: Made, scale: str) -> Iterator[None]:
    """Let larger experts be used as the trained ones were; those are routed as they say."""
    if scale == "trained":
        yield
        return
    with replay(engine, made.test):
        yield


def decoded(engine: Engine, prompt: torch.Tensor, settings: Settings, seed: int) -> Row:
    """Return what the tokens after the first ones took, by token, and the prompt."""
    new = 1 + settings.warm + settings.tokens
    go_on(engine)
    made = engine.stream(prompt, new, do_sample=True, seed=seed % 2**31, stop=[])
    started = time.perf_counter()
    next(made)
    first = time.perf_counter() - started
    for _ in range(settings.warm):
        next(made)
    processor, reading, guesses = time.process_time(), engine.reader.seconds, _guesses(engine)
    for _ in made:
        pass
    processor, reading = time.process_time() - processor, engine.reader.seconds - reading
    steps = engine.stats()["steps"][-settings.tokens:]
    total = {k: sum(s[k] for s in steps) for k in steps[0]}
    n = len(steps)
    return {"tokens": n, "tokens_per_second": n / total["seconds"], "first_token_seconds": first,
            "cpu_seconds": processor / n, "bytes_per_token": total["bytes_read"] / n,
            "stall_seconds": total["stall_seconds"] / n, "reading_seconds": reading / n,
            "computing_seconds": (total["seconds"] - total["stall_seconds"]) / n,
            "hits": total["hits"], "misses": total["misses"], "major_faults": total["major_faults"],
            **_since(guesses, _guesses(engine))}


def _guesses(engine: Engine) -> Mapping[str, float]:
    said = engine.stats()["prefetch"]
    return {k: said[k] for k in ("prefetched", "used", "wasted")}


def _since(before: Mapping[str, float], after: Mapping[str, float]) -> Row:
    return {f"guesses_{k}": after[k] - before[k] for k in before}
