"""The edgemoe plugin's components: options and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from poise.errors import ConfigError
from poise.interfaces import Parts
from poise.options import check_options, option, options_of


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
