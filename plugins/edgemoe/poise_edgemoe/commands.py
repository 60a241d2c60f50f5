"""`poise moe convert | inspect | plan | generate`: stores and engines from the command line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise.options import check_options, option

MEMORY = "most bytes that the engine holds, 900MB or 4GB; without: room for all experts"
TOTAL = "most bytes of the whole process, in place of --memory"
CONTEXT = "most tokens of prompt and continuation; without: the model's, at most 4096"


@dataclass(frozen=True)
class Convert:
    """Write a mixture-of-experts model as a store; a conversion that was cut short goes on."""

    model: str = option(help="a transformers directory")
    store: str = option(help="the folder to make")
    bits: int = option(4, "of experts; 16 and 32 are not quantized", choices=(2, 3, 4, 8, 16, 32))
    scheme: str = option("asym_group", "sym_channel, asym_channel, sym_group, asym_group, or a quantizer")
    group: int = option(64, "columns that share a scale", low=1)
    hot: str | None = option(None, "the rest: bf16, raw, 8 or 4; without: raw at 32 bits, otherwise bf16",
                             choices=("bf16", "raw", "8", "4"))
    plan: str | None = option(None, "JSON file: names or patterns of experts' matrices to bits")

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> int:
        """Convert, with a line for every layer."""
        from poise.files import read_json
        from poise_edgemoe.store.writer import convert

        hot: Any = int(self.hot) if self.hot in ("8", "4") else self.hot

        def tell(done: int, of: int) -> None:
            print(f"poise: {done} of {of} layers are written", file=sys.stderr, flush=True)

        plan = None if self.plan is None else read_json(self.plan)
        path = convert(self.model, self.store, bits=self.bits, plan=plan, scheme=self.scheme,
                       group=self.group, hot=hot, progress=tell)
        print(path)
        return 0


@dataclass(frozen=True)
class Inspect:
    """Say what is in a store, and where the bytes are."""

    store: str = option(help="as convert made it")

    def run(self) -> int:
        """Print one table."""
        from poise_edgemoe.store.inspecting import table

        print(table(Path(self.store)))
        return 0


@dataclass(frozen=True)
class Plan:
    """Say what a memory limit would be spent on, before anything is loaded."""

    store: str = option(help="as convert made it")
    memory: str | None = option(None, MEMORY)
    total: str | None = option(None, TOTAL)
    context: int | None = option(None, CONTEXT, low=1, unit="tokens")
    batch: int = option(1, "rows at a time", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> int:
        """Print every term of the budget."""
        from poise_edgemoe.budget import explain, plan_memory

        budget = plan_memory(self.store, memory=self.memory, total=self.total, context=self.context,
                             batch=self.batch)
        print(explain(self.store, budget))
        return 0


@dataclass(frozen=True)
class Generate:
    """Continue a text under a memory limit."""

    store: str = option(help="as convert made it")
    prompt: str = option("", "the text to continue")
    memory: str | None = option(None, MEMORY)
    total: str | None = option(None, TOTAL)
    context: int | None = option(None, CONTEXT, low=1, unit="tokens")
    policy: str = option("expected", "which experts leave")
    max_new_tokens: int = option(128, "most tokens that are made", low=1)
    do_sample: bool = option(False, "draw tokens; otherwise the likeliest are taken")
    temperature: float = option(1.0, "what logits are divided by before a draw", above=0)
    top_k: int | None = option(None, "draw from that many likeliest tokens", low=1)
    top_p: float | None = option(None, "draw from the likeliest tokens of this share", above=0, high=1)
    seed: int | None = option(None, "of the draws", low=0)
    stop: list[str] = option([], "a text that ends generation; may be given several times")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.prompt:
            raise ConfigError("moe generate needs --prompt TEXT: the text to continue")

    def run(self) -> int:
        """Print the text as it is made, and what it took on stderr."""
        from poise_edgemoe.engine import Engine

        names = ("do_sample", "temperature", "top_k", "top_p", "seed")
        sampling: dict[str, Any] = {n: getattr(self, n) for n in names} | {"stop": self.stop or None}
        with Engine.open(self.store, memory=self.memory, total=self.total, context=self.context,
                         policy=self.policy) as engine:
            print(engine.opening(), file=sys.stderr, flush=True)
            print(self.prompt, end="", flush=True)
            for piece in engine.stream(self.prompt, self.max_new_tokens, **sampling):
                print(piece, end="", flush=True)
            print()
            print(engine.summary(), file=sys.stderr)
        return 0
