"""`poise moe convert | inspect | plan | generate | bench`: stores and engines from the command line.

A flag that changes nothing in the case at hand is refused, where it was given: hence None for what was not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise.options import check_options, option, options_of
from poise.quantizers.names import KERNELS
from poise_edgemoe.store.layouts import LAYOUTS
from poise_edgemoe.store.schemes import HOTS

MEMORY = "most bytes that the engine holds, 900MB or 4GB; without: room for all experts"
TOTAL = "most bytes of the whole process, in place of --memory"
CONTEXT = "most tokens of prompt and continuation; without: the model's, at most 4096"
FREQUENCIES = 'JSON file, {"layer,expert": uses per token}, for static and the paper\'s policies'


@dataclass(frozen=True)
class Convert:
    """Write a mixture-of-experts model as a store; a conversion that was cut short goes on."""

    model: str = option(help="a transformers directory")
    store: str = option(help="the folder to make")
    bits: int | None = option(None, "of experts; without: 4, or the scheme's; 16 and 32 are not quantized",
                              choices=(2, 3, 4, 8, 16, 32))
    scheme: str | None = option(None, "asym_group (without), asym_channel, sym_group, sym_channel, or a "
                                      "quantizer")
    group: int | None = option(None, "columns that share a scale, 64 without", low=1)
    hot: str | None = option(None, "the rest: bf16 (without); raw, the model's own type, which 32 bits "
                                   "imply; 8 or 4 bits; one of ggml's formats", choices=HOTS)
    layout: str | None = option(None, "order of packed bytes, which changes no value: auto (without), "
                                      "plain, ggml, torch (for this processor)", choices=LAYOUTS)
    plan: str | None = option(None, "JSON file: names or patterns of experts' matrices to bits")
    planes: int | None = option(None, "2: each matrix as a base of half the bits, and the rest, for "
                                      "generate --base-share; 1 without", choices=(1, 2))

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> int:
        """Convert, with progress."""
        from poise.runs.progress import parts
        from poise_edgemoe.flags import check_bits, check_convert
        from poise_edgemoe.store.writer import convert

        plan = self._plan()
        check_convert(bits=self.bits, scheme=self.scheme, group=self.group, hot=self.hot, plan=plan,
                      layout=self.layout, planes=self.planes)
        check_bits(self.bits, self.model, plan)
        hot: Any = int(self.hot) if self.hot in ("8", "4") else self.hot
        given = {"bits": self.bits, "scheme": self.scheme, "group": self.group, "hot": hot, "plan": plan,
                 "layout": self.layout, "planes": self.planes}
        with parts("layers written") as tell:
            print(convert(self.model, self.store, progress=tell,
                          **{k: v for k, v in given.items() if v is not None}))
        return 0

    def _plan(self) -> Mapping[str, Any] | None:
        from poise.files import read_json

        if self.plan is None:
            return None
        if not isinstance(plan := read_json(self.plan), Mapping):
            raise ConfigError(f"{self.plan} holds no plan: it is to map names or patterns to bits")
        return plan


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
    """Say what a memory limit would be spent on, and which hits to expect, before anything is loaded."""

    store: str = option(help="as convert made it")
    memory: str | None = option(None, MEMORY)
    total: str | None = option(None, TOTAL)
    context: int | None = option(None, CONTEXT, low=1, unit="tokens")
    batch: int = option(1, "rows at a time", low=1)
    trace: str | None = option(None, "recorded routing (.route.csv.gz) to simulate; without: a range")

    def __post_init__(self) -> None:
        check_options(self)

    def run(self) -> int:
        """Print every term of the budget, and the hits to expect."""
        from poise_edgemoe.budget import explain, plan_memory
        from poise_edgemoe.forecast import forecast

        budget = plan_memory(self.store, memory=self.memory, total=self.total, context=self.context,
                             batch=self.batch)
        hits = forecast(self.store, budget, self.trace)
        print(explain(self.store, budget))
        print(f"  {hits}")
        return 0


@dataclass(frozen=True)
class Generate:
    """Continue a text under a memory limit."""

    store: str = option(help="as convert made it")
    prompt: str | None = option(None, "the text to continue; needed")
    memory: str | None = option(None, MEMORY)
    total: str | None = option(None, TOTAL)
    context: int | None = option(None, CONTEXT, low=1, unit="tokens")
    policy: str | None = option(None, "which experts leave; expected without")
    frequencies: str | None = option(None, FREQUENCIES)
    freq_source: str | None = option(None, "of the paper's policies; mixed without",
                                     choices=("offline", "online", "mixed"))
    prefetch: str | None = option(None, "who says what the next layer will use, to be read ahead; none "
                                        "without", choices=("none", "lookahead", "oracle"))
    trace: str | None = option(None, "recorded routing (.route.csv.gz) of the store, for the oracle")
    kernel: str | None = option(None, "what multiplies packed matrices; auto without; reference: each made "
                                      "in full, exact", choices=KERNELS)
    base_share: float | None = option(None, "share of expert uses that bases may serve while the rest is "
                                            "read, of a store with planes; 0 without", low=0, high=1)
    max_new_tokens: int = option(128, "most tokens that are made", low=1)
    do_sample: bool = option(False, "draw tokens; otherwise the likeliest are taken")
    temperature: float | None = option(None, "what logits are divided by before a draw, 1 without", above=0)
    top_k: int | None = option(None, "draw from that many likeliest tokens", low=1)
    top_p: float | None = option(None, "draw from the likeliest tokens of this share", above=0, high=1)
    seed: int | None = option(None, "of the draws", low=0, high=2**63 - 1)
    stop: list[str] = option([], "a text that ends generation; may be given several times")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.prompt:
            raise ConfigError("moe generate needs --prompt TEXT: the text to continue")
        given = [n for n in ("temperature", "top_k", "top_p", "seed") if getattr(self, n) is not None]
        if given and not self.do_sample:
            name, value = given[0].replace("_", "-"), getattr(self, given[0])
            raise ConfigError(f"--{name} {value} has no effect without --do-sample: give it, or leave "
                              f"--{name} out")

    def run(self) -> int:
        """Print the text as it is made, and what it took on stderr."""
        from poise.runs.progress import parts
        from poise_edgemoe.cache.choosing import chosen_policy
        from poise_edgemoe.engine import Engine
        from poise_edgemoe.store.index import read_index

        names = ("do_sample", "temperature", "top_k", "top_p", "seed", "stop")
        sampling = {n: getattr(self, n) for n in names if getattr(self, n) not in (None, [])}
        policy = chosen_policy(read_index(self.store), self.policy, self.frequencies, self.freq_source)
        with Engine.open(self.store, memory=self.memory, total=self.total, context=self.context,
                         policy=policy, prefetch=self.prefetch or "none", trace=self.trace,
                         kernel=self.kernel or "auto", base_share=self.base_share or 0.0) as engine:
            print(engine.opening(), file=sys.stderr, flush=True)
            with parts("prompt") as engine.progress:
                # what is wrong is refused before anything is printed
                prompt = self.prompt or ""
                pieces = engine.stream(prompt, self.max_new_tokens, **sampling)
                print(prompt, end="", flush=True)
                for piece in pieces:
                    print(piece, end="", flush=True)
            print()
            print(engine.summary(), file=sys.stderr)
        return 0


@dataclass(frozen=True)
class Bench:
    """Measure where a token's time goes, or simulate eviction policies on a store's or recorded routing."""

    source: str = option(help="a store, or recorded routing (.route.csv.gz)")
    simulate: bool = option(False, "replay the routing under every policy, and Belady's optimum")
    memory: list[str] = option([], "a limit, as for generate (of a recording: bytes of experts); may be "
                                   "given several times; without: shares of the experts")
    prompt: str | None = option(None, "what a store continues; without: the packaged speeches")
    max_new_tokens: int | None = option(None, "tokens that a store draws; without: 32, or 128 to simulate",
                                         low=1)
    context: int | None = option(None, CONTEXT, low=1, unit="tokens")
    frequencies: str | None = option(None, FREQUENCIES)
    frequencies_out: str | None = option(None, "a file to write the uses per token to")
    out: str | None = option(None, "a picture to write, FILE.png")

    def __post_init__(self) -> None:
        check_options(self)
        given = {"--frequencies": self.frequencies, "--frequencies-out": self.frequencies_out}
        if idle := [flag for flag, value in given.items() if value is not None and not self.simulate]:
            raise ConfigError(f"{idle[0]} has no effect without --simulate: give that, or leave it out")
        if self.out is not None and not self.out.endswith(".png"):
            raise ConfigError(f"--out {self.out} is no picture: give FILE.png")
        if self.out is not None and not Path(self.out).absolute().parent.is_dir():
            raise ConfigError(f"--out {self.out}: there is no folder {Path(self.out).absolute().parent}")

    def run(self) -> int:
        """Print one table."""
        given = {k: v for k, v in options_of(self).items() if k != "simulate"}
        if self.simulate:
            from poise_edgemoe.bench import bench

            print(bench(**given))
            return 0
        from poise_edgemoe.measure import measure

        print(measure(**{k: v for k, v in given.items() if not k.startswith("frequencies")}))
        return 0
