"""The edgemoe plugin's components: options and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from poise.errors import ConfigError
from poise.hooks import Input
from poise.interfaces import Parts
from poise.models.components import DTYPES, CausalLM
from poise.options import check_options, make, option, options_of
from poise.quantizers.names import KERNELS
from poise_edgemoe.store.layouts import LAYOUTS
from poise_edgemoe.store.schemes import HOTS


@dataclass(frozen=True)
class ByteMoE:
    """A small byte-level mixture-of-experts language model (transformers' Mixtral class).

    Trained on the packaged speeches the first time it is built, with these options as the key of
    the cache; no trained mixture-of-experts model is packaged anywhere.
    """

    layers: int = option(4, "decoder layers, each with experts", low=1)
    experts: int = option(8, "experts a layer", low=2)
    top: int = option(2, "experts a token", low=1)
    hidden: int = option(96, "width; a multiple of 8", low=8)
    inner: int = option(192, "inner width of an expert", low=8)
    length: int = option(128, "training context", low=16, unit="bytes")
    steps: int = option(450, "training steps", low=0)
    batch_size: int = option(16, "training sequences a step", low=1)
    lr: float = option(3e-3, "peak learning rate of training", above=0)
    seed: int = option(0, "seed of initial weights and of the order of training", low=0)

    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        if self.top > self.experts:
            raise ConfigError(f"top={self.top} exceeds experts={self.experts}: lower top")
        if self.hidden % 8:
            raise ConfigError(f"hidden={self.hidden} is not a multiple of 8")

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return the trained `MixtralForCausalLM`, from the cache when it was built before."""
        from poise_edgemoe.small_moe import build

        return build(**options_of(self))

    def tokenizer(self) -> Any:
        """Return the byte tokenizer."""
        from poise_edgemoe.small_moe import tokenizer

        return tokenizer()


@dataclass(frozen=True)
class EdgeMoEBits:
    """Held-out loss against bytes of the experts: uniform bitwidths and half/half plans.

    A half/half plan stores half of the experts at `high` bits and half at `low`: the half with the
    larger weight error at `low` keeps `high` (chosen), against random halves.
    """

    bits: list[int] = option([16, 8, 4, 2], "uniform bitwidths to measure; 16: as trained")
    high: int = option(4, "bits of the kept half", low=2, high=8, unit="bits")
    low: int = option(2, "bits of the other half", low=2, high=8, unit="bits")
    random_plans: int = option(5, "random halves to measure", low=1)
    length: int = option(128, "evaluation context", low=16, unit="bytes")
    windows: int = option(128, "evaluation windows, the same for every plan", low=1)

    def __post_init__(self) -> None:
        check_options(self)
        if bad := [b for b in self.bits if b != 16 and not 2 <= b <= 8]:
            raise ConfigError(f"bits={bad[0]} is not allowed: 16 (as trained) or 2 to 8")
        if self.low >= self.high:
            raise ConfigError(f"low={self.low} must be below high={self.high}")

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        for kind in ("data", "model", "quantizer"):
            if getattr(parts, kind) is None:
                raise ConfigError(f"{kind}=none: recipe=edgemoe_bits needs a {kind}")
        for bits in {*self.bits, self.high, self.low} - {16}:
            parts.quantizer.at(bits)  # type: ignore[union-attr] - refuses in words, before anything trains
        if not getattr(parts.model, "trained", False):
            raise ConfigError(
                f"model={parts.names.get('model')} is untrained: bits of random weights say "
                f"nothing; use model=byte_moe or model.path=DIR"
            )
        if parts.adapter is not None:
            raise ConfigError("recipe=edgemoe_bits takes no adapter: write adapter=none")

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Measure every plan; return loss and bytes by plan."""
        from poise_edgemoe.bits import run

        return run(parts, context, **options_of(self))


@dataclass(frozen=True)
class EdgeMoEStore:
    """A mixture-of-experts model served from disk, under a memory limit.

    Of a transformers directory (`path`), or of the small byte model, a store is made once and kept in the
    cache; `store` names one that is there.
    """

    path: str | None = option(None, "a transformers directory; null: the byte model")
    byte_moe: dict[str, Any] = option({}, "options of the byte model, as model=byte_moe has them")
    store: str | None = option(None, "a store that is there already, in place of a model")
    bits: int | None = option(None, "of experts; null: 4, or the scheme's; 16 and 32 are not quantized",
                              choices=(2, 3, 4, 8, 16, 32))
    scheme: str | None = option(None, "how experts are quantized; null: asym_group")
    group: int | None = option(None, "columns that share a scale; null: 64", low=1)
    hot: str | None = option(None, "the rest; null: bf16, with 32 bits the model's own type", choices=HOTS)
    layout: str | None = option(None, "order of packed bytes, which changes no value; null: auto",
                                choices=LAYOUTS)
    planes: int | None = option(None, "2: a base of half the bits, and the rest, for base_share; null: 1",
                                choices=(1, 2))
    memory: str | None = option(None, "most bytes that the engine holds; null: room for all experts")
    total: str | None = option(None, "most bytes of the whole process, in place of memory")
    context: int | None = option(None, "longest prompt and continuation; null: the model's, at most 4096",
                                 low=1, unit="tokens")
    batch: int = option(1, "rows at a time", low=1)
    policy: str | None = option(None, "which experts leave; null: expected")
    frequencies: str | None = option(None, 'JSON file, {"layer,expert": uses per token}')
    freq_source: str | None = option(None, "of the paper's policies; null: mixed",
                                     choices=("offline", "online", "mixed"))
    prefetch: str | None = option(None, "who says what layers to come will use, to be read ahead; null: "
                                        "none, or the predictor that is given",
                                  choices=("none", "lookahead", "oracle", "predictor"))
    predictor: str | None = option(None, "as poise moe fit wrote it (FILE.json): reads ahead, and evicts "
                                         "with policy=predicted")
    trace: str | None = option(None, "recorded routing (.route.csv.gz) of the store, for the oracle")
    kernel: str = option("auto", "what multiplies packed matrices; reference: each made in full, exact",
                         choices=KERNELS)
    base_share: float = option(0.0, "share of an answer's expert uses that bases may serve, of planes=2",
                               low=0, high=1)

    trained: ClassVar[bool] = True
    form: ClassVar[str] = "served"

    def __post_init__(self) -> None:
        check_options(self)
        if self.memory is not None and self.total is not None:
            raise ConfigError("memory and total are both given: give one of them")
        of_model = ("path", "byte_moe", "bits", "scheme", "group", "hot", "layout", "planes")
        if self.store is not None and (bad := [n for n in of_model if getattr(self, n)]):
            raise ConfigError(f"{bad[0]}={getattr(self, bad[0])} has no effect beside store={self.store}, "
                              f"which is converted already: leave one of them out")
        if self.path is not None and self.byte_moe:
            raise ConfigError(f"byte_moe has no effect beside path={self.path}: leave one of them out")
        from poise_edgemoe.cache.allowance import check_share
        from poise_edgemoe.flags import check_convert, check_predictor, check_trace

        check_trace(self.prefetch, self.trace)
        check_predictor(self.prefetch, self.predictor, self.policy)
        if self.store is None:
            check_convert(bits=self.bits, scheme=self.scheme, group=self.group, hot=self.hot,
                          layout=self.layout, planes=self.planes)
            check_share(self.base_share, self.planes or 1)
        self._byte_moe()
        self._check_policy()

    def build(self, spec: Mapping[str, Any] | None = None) -> Any:
        """Return the `Engine`, open; whoever builds it closes it."""
        from poise_edgemoe.stores import open_store

        names = ("memory", "total", "context", "batch", "policy", "frequencies", "freq_source", "prefetch",
                 "predictor", "trace", "kernel", "base_share")
        return open_store(self.folder(), **{n: getattr(self, n) for n in names})

    def folder(self) -> Path:
        """Return the store; convert the model the first time."""
        from poise_edgemoe.stores import store_of_byte_moe, store_of_directory

        if self.store is not None:
            return Path(self.store)
        hot = int(self.hot) if self.hot in ("8", "4") else self.hot
        given = {"bits": self.bits, "scheme": self.scheme, "group": self.group, "hot": hot,
                 "layout": self.layout, "planes": self.planes}
        how = {k: v for k, v in given.items() if v is not None}
        if self.path is not None:
            return store_of_directory(Path(self.path), how)
        return store_of_byte_moe(options_of(self._byte_moe()), how)

    def reference(self) -> Any:
        """Return the same model in memory (`InMemory`), before it was quantized; None for a store alone."""
        from poise_edgemoe.stores import in_memory

        if self.store is not None:
            return None
        model = CausalLM(path=self.path, dtype=self._dtype()) if self.path else self._byte_moe()
        return in_memory(model.build(), model.tokenizer(), self.context)

    def tokenizer(self) -> Any:
        """Return the tokenizer of the directory or store, or the byte model's."""
        from poise.models.tokenizers import load_tokenizer

        where = self.path or self.store
        return load_tokenizer(where) if where else self._byte_moe().tokenizer()

    def inputs(self) -> dict[str, Input]:
        """Return the files that it reads: of a directory or store, frequencies, a trace."""
        found = {n: Input(Path(where), ("*.json", "*.safetensors", "*.bin"))
                 for n in ("path", "store") if (where := getattr(self, n))}
        single = {n: Input(Path(where)) for n in ("frequencies", "trace") if (where := getattr(self, n))}
        if self.predictor is not None:
            stem = self.predictor.removesuffix(".json")
            single["predictor"] = Input(Path(f"{stem}.json"))
        return found | single

    def _dtype(self) -> str:
        """Return what the model in memory is of: what is stored, where that is all of it; else float32."""
        from poise_edgemoe.store.index import read_index

        stored = read_index(self.folder()).dtype
        return stored if self.bits == 32 and stored in DTYPES else "float32"

    def _check_policy(self) -> None:
        names = ("frequencies", "freq_source")
        if given := [n for n in ("policy", *names) if getattr(self, n) is not None]:
            from poise_edgemoe.cache.policies import DEFAULT_POLICY, check_policy

            if given != ["policy"] or self.policy != "predicted":
                check_policy(self.policy or DEFAULT_POLICY, [n for n in given if n in names])

    def _byte_moe(self) -> ByteMoE:
        return make(ByteMoE, self.byte_moe, "byte_moe")


@dataclass(frozen=True)
class EdgeMoEGenerate:
    """Continue held-out text under a memory limit, and say what every token took.

    It writes `text.txt`, `steps.csv` (a line for every call of the model) and the picture of a token's
    time; metrics that begin with `machine/` are measurements of this machine. The held-out loss is taken
    through the engine, and through the same model in memory where there is one: they differ by nothing when
    experts are stored as they are, and by what quantizing costs otherwise.
    """

    prompts: int = option(2, "pieces of held-out text that are continued", low=1)
    prompt_length: int = option(64, "of each prompt", low=1, high=512, unit="tokens")
    max_new_tokens: int = option(128, "of each continuation", low=2, high=512, unit="tokens")
    temperature: float | None = option(0.8, "of the draws; null: the likeliest token is taken", above=0)
    length: int = option(64, "evaluation context", low=1, unit="tokens")
    windows: int = option(32, "evaluation windows", low=1)
    compare: bool = option(True, "load the model in memory too, for its held-out loss, where it is at hand")

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        for kind in ("data", "model"):
            if getattr(parts, kind) is None:
                raise ConfigError(f"{kind}=none: recipe=edgemoe_generate needs a {kind}")
        for kind in ("quantizer", "adapter", "aggregator"):
            if getattr(parts, kind) is not None:
                raise ConfigError(f"{kind}={parts.names.get(kind)} has no effect: recipe=edgemoe_generate "
                                  f"serves a store as it is; write {kind}=none (bits: model.bits)")
        if not isinstance(parts.model, EdgeMoEStore):
            raise ConfigError(f"model={parts.names.get('model')} is not served from disk: write "
                              f"model=edgemoe_store")
        context = parts.model.context
        needed = max(self.prompt_length + self.max_new_tokens, self.length)
        if context is not None and context < needed:
            raise ConfigError(f"model.context={context} is too short: recipe.prompt_length="
                              f"{self.prompt_length} and max_new_tokens={self.max_new_tokens}, or length="
                              f"{self.length}, need {needed}")

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Generate, measure, compare; return the metrics."""
        from poise_edgemoe.generation import run

        return run(parts, context, **options_of(self))
