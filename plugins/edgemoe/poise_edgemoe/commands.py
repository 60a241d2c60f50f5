"""`poise moe convert | inspect | plan | generate | bench | profile | allocate`, from the command line.

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
PREDICTOR = "as moe fit wrote it (FILE.json): reads ahead, and evicts with policy predicted"
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
        from poise_edgemoe.widths.plan import load_plan

        return None if self.plan is None else load_plan(self.plan)


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
    prefetch: str | None = option(None, "who says what layers to come will use, to be read ahead; none "
                                        "without, or the predictor that is given",
                                  choices=("none", "lookahead", "oracle", "predictor"))
    predictor: str | None = option(None, PREDICTOR)
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
        from poise_edgemoe.chosen import chosen
        from poise_edgemoe.engine import Engine

        names = ("do_sample", "temperature", "top_k", "top_p", "seed", "stop")
        sampling = {n: getattr(self, n) for n in names if getattr(self, n) not in (None, [])}
        how = chosen(self.store, policy=self.policy, frequencies=self.frequencies,
                     freq_source=self.freq_source, prefetch=self.prefetch, predictor=self.predictor)
        with Engine.open(self.store, memory=self.memory, total=self.total, context=self.context,
                         trace=self.trace, kernel=self.kernel or "auto",
                         base_share=self.base_share or 0.0, **how) as engine:
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
    predictor: str | None = option(None, "as moe fit wrote it: what it gives, beside the others")
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


@dataclass(frozen=True)
class Profile:
    """Measure how much each width damages each expert; one that was cut short goes on."""

    model: str = option(help="a transformers directory, or a store of 16 or 32 bits")
    data: str | None = option(None, "a text file: its first half calibrates, its second is held out; "
                                    "needed")
    out: str | None = option(None, "the profile to write, profile.json; needed")
    widths: list[int] = option([], "a width to look at; may be given several times; without: 2, 3, 4, 8, "
                                   "16")
    scheme: str = option("asym_group", "how experts are quantized, as for convert")
    group: int = option(64, "columns that share a scale", low=1)
    rounding: str = option("nearest", "weighted: scales at 2 and 3 bits are fitted to what experts are "
                                      "given",
                           choices=("nearest", "weighted"))
    damage: str = option("output", "error of an expert's output, or of its weights; loss: of the model "
                                   "with it "
                                   "alone narrow, as in the paper, a run each",
                         choices=("output", "weight", "loss"))
    per: str = option("expert", "what has a width of its own", choices=("expert", "projection"))
    metric: str = option("cross_entropy", "what losses are of",
                         choices=("cross_entropy", "accuracy", "rouge2"))
    low: int = option(2, "width of the one expert, with --damage loss")
    high: int = option(4, "width of the others, with --damage loss")
    seed: int = option(0, "draws the windows of the first half", low=0)
    windows: int = option(64, "of the first half", low=1)
    held_out: int = option(64, "windows of the second half", low=1)
    length: int = option(128, "of a window", low=4, high=512, unit="tokens")
    tokens_per_expert: int = option(256, "most that an output's error is taken on", low=1)
    memory: str | None = option(None, MEMORY.replace("room for all experts", "a quarter of the experts"))

    def __post_init__(self) -> None:
        check_options(self)
        _need(self, "profile", data="FILE", out="profile.json")

    def run(self) -> int:
        """Profile, with progress; print where it is and what should be known."""
        from poise_edgemoe.widths.forms import WIDTHS
        from poise_edgemoe.widths.profiling import profile
        from poise_edgemoe.widths.telling import about_profile, telling

        given = options_of(self)
        given["widths"] = sorted(given["widths"]) or list(WIDTHS)
        with telling() as tell:
            made = profile(given.pop("model"), given.pop("data"), progress=tell, **given)
        print(about_profile(made, str(self.out)))
        return 0


@dataclass(frozen=True)
class Allocate:
    """Choose a width for each expert of a profile, within a budget, and measure the plan."""

    profile: str = option(help="as moe profile wrote it")
    loss: str | None = option(None, "the budget: most loss of the model as trained, 2%")
    bytes: str | None = option(None, "or: most bytes of all experts in the store, 900MB")
    speed: str | None = option(None, "or: most bytes of experts that a token reads when none is in memory, "
                                     "40MB")
    method: str = option("hull", "upgrades by damage removed per byte; the best choice; the paper's",
                         choices=("hull", "exact", "paper"))
    objective: str | None = option(None, "of --loss, what is saved: bytes (without), or reads of a token",
                                   choices=("bytes", "reads"))
    min_bits: int | None = option(None, "no expert gets fewer")
    ends: int | None = option(None, "no expert of the first and the last layer gets fewer; 4 is usual")
    model: str | None = option(None, "where the model is now; without: where it was")
    data: str | None = option(None, "where the text is now; without: where it was")
    memory: str | None = option(None, MEMORY.replace("room for all experts", "a quarter of the experts"))
    verify: bool = option(True, "measure the plan on the whole model")
    out: str | None = option(None, "the plan to write, for convert --plan; without: plan.json beside the "
                                   "profile")
    plot: str | None = option(None, "a picture of widths by layer and expert to write, FILE.png")

    def __post_init__(self) -> None:
        check_options(self)
        given = [n for n in ("loss", "bytes", "speed") if getattr(self, n) is not None]
        if len(given) != 1:
            what = f"--{' and --'.join(given)} are given" if given else "no budget is given"
            raise ConfigError(f"moe allocate: {what}: give one of --loss 2%, --bytes 900MB, --speed 40MB")
        if self.objective is not None and self.loss is None:
            raise ConfigError(f"--objective {self.objective} has no effect without --loss: leave it out "
                              f"(--speed is of reads, --bytes of bytes)")

    def run(self) -> int:
        """Allocate, with progress; print the plan's table."""
        from poise_edgemoe.widths.allocating import allocate
        from poise_edgemoe.widths.telling import about_plan, telling

        given = {k: v for k, v in options_of(self).items() if k not in ("profile", "speed", "out", "plot")}
        given["objective"] = "reads" if self.speed is not None else self.objective or "bytes"
        given["bytes"] = self.speed if self.speed is not None else self.bytes
        given["verify"] = True if self.verify else None if self.loss is not None else False
        target = Path(self.out) if self.out is not None else Path(self.profile).with_name("plan.json")
        with telling() as tell:
            plan = allocate(self.profile, progress=tell, **given)
        plan.save(target)
        if self.plot is not None:
            from poise_edgemoe.plots import width_map

            width_map(plan, Path(self.plot))
        print(about_plan(plan, str(target)))
        return 0


def _need(component: Any, verb: str, **named: str) -> None:
    """Refuse a verb without an option that it needs."""
    for name, shown in named.items():
        if getattr(component, name) is None:
            raise ConfigError(f"moe {verb} needs --{name} {shown}")
