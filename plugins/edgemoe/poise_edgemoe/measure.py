"""`poise moe bench`: where the time of a token goes, beside what processor and disk allow (roofline).

A token takes t_c of computing, and its misses t_io of reading; with perfect overlap the longer of the two.
One token's experts again and again, so that nothing is read, give t_c; the reader's speed at experts in
random places gives t_io; both in the process that is measured.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise.runs.progress import progress
from poise_edgemoe.baselines import open_baseline
from poise_edgemoe.bench import opening_prompt, record
from poise_edgemoe.budget import plan_memory, share_kept
from poise_edgemoe.cache import DEFAULT_POLICY
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.cache.traces import RoutingTrace
from poise_edgemoe.engine import Engine
from poise_edgemoe.plots import time_against_roofline
from poise_edgemoe.predictors import load
from poise_edgemoe.replay import replay
from poise_edgemoe.store.index import Index, read_index
from poise_edgemoe.store.reader import Request, mapped

SHARES = (25, 50, 75, 100)  # % of the experts, where no limit is given
NEW, WARM, LEAST = 32, 4, 2  # tokens; of them not counted; the first comes of the prompt
BLOBS, ROUNDS = 16, 3  # reads to calibrate with
SOURCES, PREDICTOR = ("none", "lookahead", "oracle"), "predictor"


@dataclass(frozen=True)
class Line:
    """What a token takes, on average, in milliseconds and bytes.

    Parameters
    ----------
    kernels, stall : float
        Within products and attention of ours, and waiting for reads; the rest of `token` is overhead.
    hits, megabytes : float
        Experts that were there, in %, and what was read.
    speed : float
        Of the reader, in megabytes per millisecond.
    computing : float
        t_c.
    """

    size: str
    name: str
    token: float
    kernels: float
    stall: float
    hits: float
    megabytes: float
    speed: float
    computing: float = 0.0

    @property
    def reading(self) -> float:
        """t_io, in milliseconds."""
        return self.megabytes / self.speed

    @property
    def roofline(self) -> float:
        """The least that a token takes, in milliseconds."""
        return max(self.computing, self.reading)


def measure(
    source: str, memory: Sequence[str], prompt: str | None, max_new_tokens: int | None, context: int | None,
    out: str | None, predictor: str | None = None,
) -> str:
    """Return one table; options as `poise moe bench` has them.

    Raises
    ------
    ConfigError
        For a recording, which cannot be run, an encoder-decoder, too few tokens, or a limit that is too
        small.
    """
    if not Path(source).is_dir():
        raise ConfigError(f"{source} is no store: a recording can only be simulated, with --simulate")
    index, new = read_index(source), NEW if max_new_tokens is None else max_new_tokens
    if any(layer.encoder for layer in index.layers):
        raise ConfigError(f"{source} is an encoder-decoder, whose tokens are not measured: --simulate its "
                          f"routing")
    if new < LEAST:
        raise ConfigError(f"--max-new-tokens {new} leaves nothing to measure: give {LEAST} or more")
    learned = None if predictor is None else load(predictor)
    trace = record(source, index, (), prompt, new, context)
    sizes = memory or [f"{share} %" for share in SHARES]
    ways = [(size, name) for size in sizes for name in _ways(source, index, size, context, learned)]
    lines, computing = [], []
    print("poise: measuring", file=sys.stderr, flush=True)
    with progress(len(ways), "ways") as bar:
        for size, name in ways:
            with _opened(source, index, size, name, trace, context, learned) as engine:
                ids = opening_prompt(engine, source, prompt, engine.budget.context - new)
                lines.append(_line(engine, size, name, ids, new))
                if name == "none":
                    room = max(1, engine.budget.context - 2 * WARM)
                    computing.append(computing_time(engine, trace, ids[:, :room]))
            bar.advance()
    lines = _limited(lines, min(computing))
    if out is not None:
        time_against_roofline(lines, Path(out))
    return table(lines)


def _limited(lines: Sequence[Line], computing: float) -> list[Line]:
    """Return lines with their roofline: the machine's is its best, whatever else has kept it busy."""
    speed = max(one.speed for one in lines)
    return [replace(one, computing=computing, speed=speed) for one in lines]


def _ways(source: str, index: Index, size: str, context: int | None, learned: Any) -> list[str]:
    """Return what is measured at a size: sources of guesses, and baselines of this kind of store."""
    if share_kept(index, _budget(source, index, size, context)) == 1:
        return ["none"]
    raw = all(form["entry"] == "raw" for form in index.quantizers)
    own = [PREDICTOR] if learned is not None else []
    streamed = ["STI"] if index.planes == 1 else []  # which does not take planes
    return [*SOURCES, *own, "IO-EXP" if raw else "IO-QEXP", *streamed]


def _budget(source: str, index: Index, size: str, context: int | None) -> Any:
    if not size.endswith("%"):
        return plan_memory(source, memory=size, context=context)
    whole = plan_memory(source, context=context)
    every, largest = whole.experts - whole.staging, max(size_of(m) for _, _, m in index.blobs())
    kept = max(largest, int(every * float(size[:-1]) / 100))
    return replace(whole, experts=whole.staging + kept)


@contextmanager
def _opened(
    source: str, index: Index, size: str, name: str, trace: RoutingTrace, context: int | None, learned: Any
) -> Iterator[Engine]:
    budget = _budget(source, index, size, context)
    if name not in (*SOURCES, PREDICTOR):
        with open_baseline(name, source, memory=budget.total, context=context) as engine:
            yield engine
        return
    known = trace if name == "oracle" else None
    policy = learned.policy() if name == PREDICTOR else DEFAULT_POLICY
    asked = learned if name == PREDICTOR else name
    with Engine(Path(source), budget, policy, prefetch=asked, trace=known) as engine:
        yield engine


def _line(engine: Engine, size: str, name: str, ids: Any, new: int) -> Line:
    for _ in engine.stream(ids, new, do_sample=True, seed=0):
        pass
    steps = [s for s in engine.stats()["steps"][-(new - 1):] if s["tokens"] == 1][min(WARM, new // 2):]
    n = len(steps)
    total = {k: sum(s[k] for s in steps) for k in steps[0]}
    asked = max(1, total["hits"] + total["misses"])
    per = {k: 1e3 * total[k] / n for k in ("seconds", "kernel_seconds", "stall_seconds")}
    return Line(size, name, per["seconds"], per["kernel_seconds"], per["stall_seconds"],
                100 * total["hits"] / asked, total["bytes_read"] / n / 1e6, reading_speed(engine) / 1e9)


def computing_time(engine: Engine, trace: RoutingTrace, prompt: Any) -> float:
    """Return the milliseconds of a token that needs no reading: the same experts again and again.

    Parameters
    ----------
    prompt : Tensor, (1, tokens)
        What those whose time is compared come after: attention goes over as many. No expert sees it.
    """
    first, before = [], -1
    for layer, e in trace.decode:
        if layer < before:
            break
        first.append((layer, e))
        before = layer
    again = replace(trace, prompt=(), decode=tuple(first))
    with replay(engine, again):
        for _ in engine.stream(prompt, 2 * WARM):
            pass
    steps = engine.stats()["steps"][-WARM:]
    return 1e3 * statistics.median(s["seconds"] - s["stall_seconds"] for s in steps)


def reading_speed(engine: Engine) -> float:
    """Return the bytes per second of the reader at random experts, the best of some rounds."""
    blobs, draw = list(engine.index.blobs()), random.Random(0)
    places = [mapped(max(size_of(m) for _, _, m in blobs)) for _ in range(2)]
    return max(_round(engine, draw.choices(blobs, k=BLOBS), places) for _ in range(ROUNDS))


def _round(engine: Engine, blobs: Sequence[Any], places: Sequence[Any]) -> float:
    reader, waiting = engine.reader, deque[Request]()
    before = reader.bytes_read, reader.seconds
    for n, (layer, e, parts) in enumerate(blobs):
        if len(waiting) == len(places):  # one is asked for while the other is read
            waiting.popleft().wait()
        buffer = memoryview(places[n % len(places)])[: size_of(parts)]
        waiting.append(Request(parts, buffer, f"expert {e} in layer {layer}", False))
        reader.demand([waiting[-1]])
    for request in waiting:
        request.wait()
    return (reader.bytes_read - before[0]) / (reader.seconds - before[1])


def table(lines: Sequence[Line]) -> str:
    """Return lines as a table."""
    said = ["ms a token, and the least it could be; overhead is all but kernels and waiting", "",
            f"{'memory':>8} {'way':<10}{'tok/s':>8}{'token':>8}{'kernels':>9}{'waiting':>9}{'overhead':>10}"
            f"{'hits %':>8}{'MB':>8}{'t_c':>8}{'t_io':>8}{'roofline':>10}"]
    for one in lines:
        said.append(
            f"{one.size:>8} {one.name:<10}{1e3 / one.token:>8.1f}{one.token:>8.1f}{one.kernels:>9.1f}"
            f"{one.stall:>9.1f}{one.token - one.kernels - one.stall:>10.1f}{one.hits:>8.1f}"
            f"{one.megabytes:>8.1f}{one.computing:>8.1f}{one.reading:>8.1f}"
            f"{100 * one.roofline / one.token:>8.0f} %")
    return "\n".join(said)
