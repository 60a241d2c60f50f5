"""`poise moe fit`: a predictor of experts, from a store or from recorded routing."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise.options import check_options, option

METHODS = ("auto", "table", "factored", "both", "lookahead", "combined", "all")
CHARACTERS = 1 << 16  # of a text, at most, that prompts are taken from


@dataclass(frozen=True)
class Fit:
    """Fit a predictor of experts of layers to come to the routing of a store, or to recordings of it."""

    source: str = option(help="a store, or recorded routing (.route.csv.gz)")
    more: list[str] = option([], "more recordings of the same model; may be given several times")
    out: str | None = option(None, "the file to write, FILE.json, and FILE.safetensors beside it; needed")
    method: str = option("auto", "the paper's table, each expert for itself, the next router, or what is "
                                 "best for each layer", choices=METHODS)
    depth: int | None = option(None, "layers ahead, 1 or 2; without: 2, or 1 with lookahead", low=1, high=2)
    data: str | None = option(None, "a text whose pieces a store continues; without: the packaged speeches")
    prompts: int | None = option(None, "pieces that a store continues; 8 without", low=1)
    max_new_tokens: int | None = option(None, "tokens that a store draws after each; 256 without", low=2)
    memory: str | None = option(None, "most bytes that a store's engine holds; without: all experts")
    seed: int | None = option(None, "of the draws; 0 without", low=0, high=2**31)

    def __post_init__(self) -> None:
        check_options(self)
        if self.out is None:
            raise ConfigError("moe fit needs --out FILE.json: where the predictor goes")
        if not Path(self.out).absolute().parent.is_dir():
            raise ConfigError(f"--out {self.out}: there is no folder {Path(self.out).absolute().parent}")
        if not Path(self.source).is_dir():
            names = ("data", "prompts", "max_new_tokens", "memory", "seed")
            if given := [n for n in names if getattr(self, n) is not None]:
                raise ConfigError(f"--{given[0].replace('_', '-')} has no effect on a recording: leave it "
                                  f"out, or give a store")

    def run(self) -> int:
        """Record where there is a store, fit, write, and say what was fitted."""
        from poise_edgemoe.cache.traces import read_trace
        from poise_edgemoe.predictors import fit, save
        from poise_edgemoe.predictors.files import stem_of

        traces = self._recorded() if Path(self.source).is_dir() else [read_trace(self.source)]
        traces += [read_trace(path) for path in self.more]
        predictor = fit(traces, self.method, depth=self.depth)
        stem = stem_of(Path(str(self.out)))
        save(predictor, stem)
        print(told(predictor, f"{stem}.json"))
        return 0

    def _recorded(self) -> list[Any]:
        """Return the routing of a store that continues some pieces of text."""
        import torch

        from poise.runs.progress import progress
        from poise_edgemoe.engine import Engine
        from poise_edgemoe.recording import Listening, recorded

        new, found = self.max_new_tokens or 256, []
        with Engine.open(self.source, memory=self.memory, prefetch=Listening()) as engine:
            pieces = self._pieces(engine, new)
            print(f"poise: recording the routing of {self.source}: {len(pieces)} prompts, {new} tokens "
                  f"each", file=sys.stderr, flush=True)
            with progress(len(pieces) * new, "tokens") as bar:
                for n, ids in enumerate(pieces):
                    seed = (self.seed or 0) + n
                    found.append(recorded(engine, torch.tensor([ids]), new, seed, bar.advance))
        return found

    def _pieces(self, engine: Any, new: int) -> list[list[int]]:
        """Return the prompts, evenly from a text; random ones for a store without tokenizer."""
        import random

        count, length = self.prompts or 8, max(1, min(64, engine.budget.context - new))
        if engine.budget.context <= new:
            raise ConfigError(f"--max-new-tokens {new} leaves no room for a prompt in the context of "
                              f"{engine.budget.context} tokens")
        tokenizer = engine.source.tokenizer
        if tokenizer is None:
            if self.data is not None:
                raise ConfigError(f"{self.source} has no tokenizer: put its tokenizer.json into the folder")
            draw = random.Random(self.seed or 0)
            return [[draw.randrange(engine.source.vocab) for _ in range(length)] for _ in range(count)]
        ids = tokenizer.encode(self._text())
        if len(ids) < 2:
            raise ConfigError(f"--data {self.data} has no text: nothing can be continued")
        length = min(length, max(1, len(ids) // count))
        starts = [n * (len(ids) - length) // count for n in range(count)]
        return [ids[at: at + length] for at in starts]

    def _text(self) -> str:
        from poise.files import read_regular

        if self.data is not None:
            return read_regular(self.data, 1 << 30)[:CHARACTERS].decode("utf-8", errors="ignore")
        from poise.registry import build

        return "".join(e.completion for e in build("data", "sotu").load(0).train)[:CHARACTERS]


def told(predictor: Any, where: str) -> str:
    """Return in some lines what a predictor is made of."""
    lines = [f"{where}: {predictor.layers} layers of {predictor.experts} experts, "
             f"{predictor.nbytes / 1e6:.1f} MB in an engine"]
    for ahead, by_layer in enumerate(predictor.methods, 1):
        counts = {m: by_layer.count(m) for m in dict.fromkeys(by_layer)}
        layers = "layer" if ahead == 1 else "layers"
        lines.append(f"  {ahead} {layers} ahead: " + ", ".join(f"{m} ({n} of {len(by_layer)})"
                                                               for m, n in counts.items()))
    return "\n".join([*lines, f"use it: poise moe generate STORE --predictor {where} --policy predicted"])
