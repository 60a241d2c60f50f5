"""How well experts are predicted, who should leave, and what it gives in time.

Run: POISE_DATA=DIR python benchmarks/edgemoe_predict/run.py quality|policies|speed [--smoke]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poise.options import options_of
from poise.registry import build
from poise_edgemoe import ByteMoE, Engine, predictors
from poise_edgemoe.budget import plan_memory
from poise_edgemoe.cache import Belady, RoutingTrace, read_trace, simulate
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.cache.traces import tokens_of
from poise_edgemoe.drawn import write_drawn_store
from poise_edgemoe.measure import computing_time, reading_speed
from poise_edgemoe.predictors.past import replayed
from poise_edgemoe.predictors.tables import PathTable
from poise_edgemoe.recording import Listening, recorded
from poise_edgemoe.replay import replay
from poise_edgemoe.store.index import read_index
from poise_edgemoe.stores import store_of_byte_moe

BIG = {"layers": 8, "experts": 64, "top": 8, "inner": 48}  # OLMoE's routing; trained as the smaller one is
TRACES, KEPT, NEW = 8, 6, 400  # recordings of a trained model, those that are fitted to, tokens of each
REAL = ("qwen", "gemma", "gptoss")
SIZES = (1500, 2000, 2500, 3000, 3500, 4000)  # MiB
SHARES, PROMPT, WARM, LONG = (25, 50), 64, 40, 160
WAYS = ("none", "routing", "predictor", "oracle")  # routing: without the next router


def trained(smoke: bool) -> dict[str, ByteMoE]:
    if smoke:
        return {"tiny": ByteMoE(layers=2, experts=4, hidden=32, inner=32, steps=2, length=32)}
    return {"8 experts, 2 used": ByteMoE(), "64 experts, 8 used": ByteMoE(**BIG)}


def recordings(model: ByteMoE, count: int, new: int) -> list[RoutingTrace]:
    """Return the routing of a trained model that continues pieces of speeches it has not seen."""
    store = store_of_byte_moe(options_of(model), {"bits": 4})
    speeches = build("data", "sotu").load(0)
    ids = model.tokenizer().encode("".join(e.completion for e in speeches.test))
    found, length = [], min(64, model.length)
    with Engine.open(store, prefetch=Listening(), context=min(4 * model.length, length + new)) as engine:
        for n in range(count):
            at = n * (len(ids) - length) // count
            found.append(recorded(engine, torch.tensor([ids[at: at + length]]), new, seed=n))
    return found


def halves(name: str) -> tuple[RoutingTrace, RoutingTrace]:
    """Return a published recording with its prompt and the first half of decoding, and the other half."""
    whole = read_trace(Path(os.environ["POISE_DATA"], "traces", f"{name}.route.csv.gz"))
    tokens = tokens_of(whole.decode, whole.layers)
    first = sum(len(used) for token in tokens[: len(tokens) // 2] for used in token)
    return (dataclasses.replace(whole, decode=whole.decode[:first]),
            dataclasses.replace(whole, prompt=(), prompt_tokens=(), decode=whole.decode[first:]))


# ------------------------------------------------------------------ quality


Case = tuple[int, list[int], Any]  # layer, experts used, chances of all


def asked(predictor: Any, traces: list[RoutingTrace], ahead: int) -> Iterator[Case]:
    """Yield layer, experts used and chances of all, as an engine would have them."""
    for trace in traces:
        running = predictor.started()
        running._fast = None  # all chances, not those that are worth a read
        looked = trace.looked
        for t, token in enumerate(tokens_of(trace.decode, trace.layers)):
            for n, used in enumerate(token):
                if looked and "looked" in running.blocks:
                    running.blocks["looked"].ranks[n] = [list(looked[t][n])]
                yield n, used, running.chances(n, running.past, ahead)
                running.note(n, used)


def scored(cases: Iterator[Case], threshold: float = 0.5) -> dict[str, Any]:
    """Return recall at k and 2k, precision and share of guesses beyond the threshold, by layer too."""
    rows: dict[int, list[tuple[float, ...]]] = {}
    for n, used, chances in cases:
        order, k = np.argsort(-chances, kind="stable"), len(used)
        said = set(np.flatnonzero(chances > threshold).tolist())
        at = [len(set(order[:m].tolist()) & set(used)) for m in (k, 2 * k)]
        happened = np.isin(np.arange(len(chances)), used)
        p = np.clip(chances, 1e-6, 1 - 1e-6)
        nats = -(happened * np.log(p) + ~happened * np.log1p(-p)).sum()
        rows.setdefault(n, []).append((k, *at, len(said), len(said & set(used)), nats))
    by_layer = {n: np.sum(found, 0) for n, found in sorted(rows.items())}
    k, one, two, said, right, nats = np.sum(list(by_layer.values()), 0)
    whole = {"recall": one / k, "recall_2k": two / k, "precision": right / max(1, said), "said": right / k,
             "nats": nats / sum(map(len, rows.values()))}
    return {**{key: round(float(value), 3) for key, value in whole.items()},
            "by_layer": [round(float(s[1] / s[0]), 3) for s in by_layer.values()]}


def by_layers_before(early: list[RoutingTrace], late: list[RoutingTrace]) -> dict[str, float]:
    """Return recall at k of the paper's table that knows no, one and two layers before."""
    predictor, found = predictors.fit(early, "table", depth=1), {}
    for known in range(3):
        hit = used_ = 0
        for trace in late:
            running = predictor.started()
            table, past = running.blocks["path"], running.past
            assert isinstance(table, PathTable)
            for n, used in replayed(tokens_of(trace.decode, trace.layers), past):
                first, second, *_ = past.before(n)
                p = (running.usual.share(n) if known == 0 else
                     table.inclusion(n, first, second if known == 2 else ()))
                hit += len(set(np.argsort(-p, kind="stable")[: len(used)].tolist()) & set(used))
                used_ += len(used)
                for block in running.blocks.values():
                    block.learn(n, used, past)
        found[f"{known} layers"] = round(hit / used_, 3)
    return found


def quality(smoke: bool) -> dict[str, Any]:
    pairs = {}
    for name, model in trained(smoke).items():
        traces = recordings(model, 3 if smoke else TRACES, 24 if smoke else NEW)
        cut = 2 if smoke else KEPT
        pairs[name] = traces[:cut], traces[cut:]
    if not smoke:
        pairs |= {name: tuple([half] for half in halves(name)) for name in REAL}
    found: dict[str, Any] = {}
    for name, (early, late) in pairs.items():
        found[name] = {"table by layers before": by_layers_before(early, late)}
        looks = ["lookahead", "combined"] if early[0].looked else []
        for method in ("table", "factored", "both", *looks, "auto"):
            predictor = predictors.fit(early, method)
            for ahead in range(1, predictor.depth + 1):
                found[name][f"{method}, {ahead} ahead"] = scored(asked(predictor, late, ahead))
        for way, line in found[name].items():
            print(name, "|", way, "|", {k: v for k, v in line.items() if k != "by_layer"}, flush=True)
    return found


# ------------------------------------------------------------------ policies


def policies(smoke: bool) -> dict[str, Any]:
    """Return hits of the second half of decoding, and the share of the way from LRU to the optimum."""
    found: dict[str, Any] = {}
    for name in REAL[:1] if smoke else REAL:
        early, late = halves(name)
        uses, warm = early.prompt + early.decode + late.decode, len(early.prompt + early.decode)
        predictor = predictors.fit([early], depth=1)
        for mib in SIZES[:1] if smoke else SIZES:
            slots = mib * 2**20 // early.expert_bytes
            hits = {p: simulate(uses, slots, p, warm, pins=True).hit_rate
                    for p in ("lru", "layer_lfu", "expected", "paper_intent", "paper_literal")}
            hits["predicted"] = simulate(uses, slots, predictor.policy(), warm, pins=True).hit_rate
            best = Belady(early.layers, early.experts, uses, bypass=True)
            hits["belady"] = simulate(uses, slots, best, warm).hit_rate
            way = hits["belady"] - hits["lru"]
            line: dict[str, Any] = {p: round(100 * h, 1) for p, h in hits.items()}
            line["closed"] = {p: round((hits[p] - hits["lru"]) / way, 2) for p in ("expected", "predicted")}
            found[f"{name}, {mib} MiB"] = line
            print(name, mib, line, flush=True)
    return found


# ------------------------------------------------------------------ speed


def olmoe(layers: int, experts: int, top: int) -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=16, num_key_value_heads=16, num_experts=experts, num_experts_per_tok=top,
        max_position_embeddings=4096, dtype=torch.bfloat16)


class Speed:
    """Tokens of a store of OLMoE's sizes that follow a trained model's recorded routing."""

    def __init__(self, folder: Path, smoke: bool) -> None:
        model = list(trained(smoke).values())[-1]
        traces = [dataclasses.replace(t, model=None) for t in recordings(
            model, 3 if smoke else TRACES, 24 if smoke else NEW)]
        early, late = traces[:-2] or traces[:1], traces[-2:]
        self.trace = max(late, key=lambda t: len(t.decode))
        self.sources = {"routing": predictors.fit(early, "factored"), "predictor": predictors.fit(early)}
        self.store = folder / "store"
        write_drawn_store(self.store, olmoe(model.layers, model.experts, model.top))
        self.warm, self.new = (2, 8) if smoke else (WARM, LONG)
        self.ids = torch.randint(3, 16000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def budget(self, share: int) -> Any:
        budget = plan_memory(self.store, context=512)
        sizes = [size_of(m) for _, _, m in read_index(self.store).blobs()]
        return dataclasses.replace(budget, experts=budget.staging + len(sizes) * share // 100 * max(sizes))

    def case(self, share: int, way: str, policy: str) -> dict[str, float]:
        source: Any = self.sources.get(way, way)
        rule = self.sources["predictor"].policy() if policy == "predicted" else policy
        known = self.trace if way == "oracle" else None
        with Engine(self.store, self.budget(share), rule, prefetch=source, trace=known) as engine:
            with replay(engine, self.trace):
                made = engine.stream(self.ids, self.warm + self.new, stop=[])
                for _ in range(self.warm):
                    next(made)
                before, started = engine.stats(), time.perf_counter()
                for _ in made:
                    pass
                took, after = time.perf_counter() - started, engine.stats()
            speed = reading_speed(engine)
        each = {k: (after["prefetch"][k] - before["prefetch"][k]) / self.new
                for k in ("used", "late", "wasted", "cancelled")}
        hits, misses = (after[k] - before[k] for k in ("hits", "misses"))
        return {"ms": 1e3 * took / self.new, "GB/s": speed / 1e9, "hits": hits / (hits + misses), **each,
                "stall_ms": 1e3 * (after["stall_seconds"] - before["stall_seconds"]) / self.new,
                "MB": (after["bytes_read"] - before["bytes_read"]) / self.new / 1e6}

    def computing(self) -> float:
        with Engine(self.store, self.budget(100), "expected") as engine:
            return computing_time(engine, self.trace, self.ids)


def speed(smoke: bool, rounds: int, folder: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as here:
        at = Speed(Path(here), smoke)
        cases = [(s, w, p) for s in SHARES for p in ("expected", "predicted") for w in WAYS
                 if (w, p) != ("oracle", "predicted")]
        found: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
        computing = []
        for n in range(rounds):
            computing.append(at.computing())
            for case in cases[:: -1 if n % 2 else 1]:
                found[case].append(at.case(*case))
    lines = {case: {k: statistics.median(one[k] for one in ones) for k in ones[0]}
             for case, ones in found.items()}
    best = max(one["GB/s"] for ones in found.values() for one in ones)
    said = {}
    for (share, way, policy), line in lines.items():
        none, oracle = lines[share, "none", "expected"], lines[share, "oracle", "expected"]
        least = max(min(computing), none["MB"] / best)
        line |= {"of_roofline": least / line["ms"], "of_none": line["ms"] / none["ms"]}
        if (gain := none["ms"] - oracle["ms"]) > 0:  # where there was something to be won
            line["of_oracles_gain"] = (none["ms"] - line["ms"]) / gain
        said[f"{share} %, {way}, {policy}"] = {k: round(v, 3) for k, v in line.items()}
        print(share, way, policy, said[f"{share} %, {way}, {policy}"], flush=True)
    return {"computing_ms": computing, "GB/s": best, **said}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("quality", "policies", "speed"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "speed":
        found = speed(given.smoke, 1 if given.smoke else given.rounds, given.folder)
    else:
        found = {"quality": quality, "policies": policies}[given.part](given.smoke)
    if not given.smoke:
        out = Path(__file__).with_name("results") / f"{given.part}.json"
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
