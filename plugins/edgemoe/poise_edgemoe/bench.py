"""`poise moe bench --simulate`: the routing of a store or of a recording, under every policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise.runs.progress import progress
from poise_edgemoe.budget import parse_bytes, plan_memory, share_kept
from poise_edgemoe.cache.choosing import (
    encoder_layers,
    frequencies_of,
    read_frequencies,
    write_frequencies,
)
from poise_edgemoe.cache.hits import hits_of_all, slots_at
from poise_edgemoe.cache.policies import DEFAULT_POLICY, POLICIES
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.cache.traces import RoutingTrace, read_trace
from poise_edgemoe.engine import Engine
from poise_edgemoe.plots import hits_over_share
from poise_edgemoe.predictors import load
from poise_edgemoe.recording import recorded
from poise_edgemoe.store.index import Index, read_index

SHARES = range(10, 100, 10)  # % of the experts
PROMPT, NEW = 256, 128  # tokens, where nothing else is said


@dataclass(frozen=True)
class Size:
    """A size to simulate: what it is called, and its slots."""

    name: str
    slots: int


def bench(
    source: str, memory: Sequence[str], prompt: str | None, max_new_tokens: int | None, context: int | None,
    frequencies: str | None, frequencies_out: str | None, predictor: str | None, out: str | None,
) -> str:
    """Return the table of decode hits, and which policy to take; options as `poise moe bench` has them.

    Raises
    ------
    ConfigError
        For a flag that has no effect on a recording; a limit that is too small.
    """
    if Path(source).is_dir():
        index = read_index(source)
        sizes = [_limited(source, index, m, context) for m in memory]
        trace = record(source, index, memory, prompt, max_new_tokens, context)
        encoder = encoder_layers(index)
    else:
        _check_recording({"prompt": prompt, "max-new-tokens": max_new_tokens, "context": context})
        trace, encoder = read_trace(source), []
        sizes = [_recorded(trace, m) for m in memory]
    sizes = sizes or [Size(f"{s} %", slots_at(trace, s / 100)) for s in SHARES]
    known = None if frequencies is None else read_frequencies(frequencies)
    learned = None if predictor is None else load(predictor)
    if learned is not None:
        learned.check(trace.layers, trace.experts, trace.model)
    # with Belady's; static needs frequencies
    policies = len(POLICIES) + (known is not None) + (learned is not None)
    print(f"poise: simulating {policies} policies at {len(sizes)} sizes", file=sys.stderr, flush=True)
    with progress(policies * len(sizes), "simulations") as bar:
        hits = hits_of_all(trace, [s.slots for s in sizes], known, encoder, bar.advance,
                           learned and (lambda: learned.policy(encoder)))
    if frequencies_out is not None:
        write_frequencies(frequencies_out, frequencies_of(trace.decode, _tokens(trace)))
    if out is not None:
        hits_over_share([s.slots / (trace.layers * trace.experts) for s in sizes], hits, Path(out))
    return "\n".join([*_table(trace, sizes, hits), "", *_advice(trace, sizes, hits, bool(memory))])


def record(
    store: str, index: Index, memory: Sequence[str], prompt: str | None, new: int | None,
    context: int | None,
) -> RoutingTrace:
    """Run a store on a prompt, under the largest of the limits; return which experts it asked for."""
    limit = max(memory, key=parse_bytes, default=None)
    budget = plan_memory(store, memory=limit, context=context)
    new = min(NEW, max(1, budget.context // 2)) if new is None else new
    print(f"poise: recording the routing of {store}: a prompt, {new} tokens", file=sys.stderr, flush=True)
    with Engine(Path(store), budget, DEFAULT_POLICY) as engine, progress(new, "tokens") as bar:
        ids = opening_prompt(engine, store, prompt, budget.context - new)
        return recorded(engine, ids, new, advance=bar.advance)


def opening_prompt(engine: Engine, store: str, prompt: str | None, room: int) -> Any:
    """Return the prompt's ids (1, tokens): a speech, if none is given; random without a tokenizer."""
    import torch

    tokenizer, size = engine.source.tokenizer, max(1, min(PROMPT, room))
    if tokenizer is None and prompt is not None:
        raise ConfigError(f"{store} has no tokenizer: put its tokenizer.json into the folder")
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(engine.source.vocab, (1, size), generator=generator)
    if prompt is not None:
        return torch.tensor([tokenizer.encode(prompt)])
    from poise.registry import build

    speech = "".join(e.completion for e in build("data", "sotu").load(0).test[:8])
    return torch.tensor([tokenizer.encode(speech)[:size]])


def _recorded(trace: RoutingTrace, memory: str) -> Size:
    """Return the slots of a recorded model for some bytes of experts."""
    slots = parse_bytes(memory) // trace.expert_bytes
    if slots >= trace.layers * trace.experts:
        raise _all_stay(memory)
    return Size(memory, slots)


def _all_stay(memory: str) -> ConfigError:
    return ConfigError(f"--memory {memory} has no effect, as all experts stay in memory: leave it out, or "
                       f"give a lower limit")


def _limited(store: str, index: Index, memory: str, context: int | None) -> Size:
    """Return the slots under a limit: places for the largest of the experts."""
    budget = plan_memory(store, memory=memory, context=context)
    if share_kept(index, budget) == 1:
        raise _all_stay(memory)
    largest = max(size_of(m) for _, _, m in index.blobs())
    return Size(memory, (budget.experts - budget.staging) // largest)


def _check_recording(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name} has no effect on a recording: leave it out, or give a store")


def _tokens(trace: RoutingTrace) -> int:
    """Return how many tokens were decoded: a token ends where the layer number falls."""
    return 1 + sum(b < a for (a, _), (b, _) in pairwise(trace.decode))


# ------------------------------------------------------------------ what is said


def _table(trace: RoutingTrace, sizes: list[Size], hits: dict[str, list[float | None]]) -> list[str]:
    best = [_best(hits, n) for n in range(len(sizes))]
    width = max(7, *(len(s.name) + 1 for s in sizes))
    rows = [f"decode hits in %, after the prompt, of {len(trace.decode)} uses of {trace.layers} x "
            f"{trace.experts} experts; * the best that can be had", "",
            f"{'':14}" + "".join(f"{s.name:>{width}} " for s in sizes),
            f"{'experts kept':14}" + "".join(f"{s.slots:>{width}} " for s in sizes)]
    for name, found in hits.items():
        cells = ("-" if rate is None else f"{100 * rate:.1f}" for rate in found)
        marked = (f"{cell:>{width}}" + ("*" if name == b else " ") for cell, b in zip(cells, best))
        rows.append(f"{name:14}" + "".join(marked))
    return [row.rstrip() for row in rows]


def _best(hits: dict[str, list[float | None]], n: int) -> str:
    """Return the policy with the most hits at a size; Belady's, which knows the future, left out."""
    return max((name for name in hits if name != "belady"), key=lambda name: hits[name][n] or 0.0)


def _advice(
    trace: RoutingTrace, sizes: list[Size], hits: dict[str, list[float | None]], limited: bool
) -> list[str]:
    if not limited:
        return ["give --memory for what to take under a limit"]
    said = []
    for n, size in enumerate(sizes):
        best = _best(hits, n)
        ours, most = (100 * (hits[name][n] or 0.0) for name in ("expected", best))
        more = "" if best == "expected" else f", the default expected {ours:.1f} %"
        said.append(f"{size.name}: take --policy {best}, {most:.1f} % of hits{more} ({size.slots} of "
                    f"{trace.layers * trace.experts} experts kept)")
    return said
