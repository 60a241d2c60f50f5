"""The recipe `edgemoe_paper`: options with defaults and ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.errors import ConfigError
from poise.interfaces import Parts
from poise.options import check_options, option, options_of
from poise_edgemoe.components import ByteMoE

if TYPE_CHECKING:
    from poise_edgemoe.paper.making import Settings


@dataclass(frozen=True)
class EdgeMoEPaper:
    """The paper's comparison: its baselines, EdgeMoE as in the paper, and ours, under memory limits.

    Ways: IO-FREE and IO-QFREE (all in memory), IO-EXP and IO-QEXP (no expert is kept), both with a cache,
    STI-like (all experts stream), EdgeMoE (the paper's plan, table and eviction as meant, and as printed),
    its parts, and ours. Losses are those of the trained model. Speed is that of its own small experts
    ("trained") and of its routing replayed over larger ones ("large"), whose widths the plans choose.

    Each measurement is kept when it ends: a run that was killed goes on. `rows.jsonl` has all of them.
    """

    top: list[int] = option([2, 1], "experts a token, a model for each; 1: Switch-style")
    limits: list[int] = option([20, 30, 40, 60, 80, 100],
                               "memory for experts, in % of all of them at 4 bits")
    loss: float = option(2.0, "what plans may lose, in percent of perplexity", above=0)
    tokens: int = option(48, "measured tokens", low=1)
    warm: int = option(16, "tokens before them", low=1)
    prompt_length: int = option(64, "of each prompt", low=1, high=256, unit="tokens")
    calibration: int = option(6, "prompts whose routing guesses are fitted to", low=1)
    calibration_tokens: int = option(256, "after each of them", low=8, unit="tokens")
    windows: int = option(64, "of text, for plans and for losses", low=2)
    length: int = option(128, "of each", low=8, high=512, unit="tokens")
    hidden: int | None = option(1024, "width of the model with larger experts, a multiple of 64; null: "
                                      "none", low=64)
    inner: int = option(2048, "inner width of larger experts, a multiple of 64", low=64)
    repeats: int = option(3, "measurements of each way, of which the median counts", low=1)

    def __post_init__(self) -> None:
        check_options(self)
        for name, low, high in (("top", 1, 64), ("limits", 1, 100)):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values) or min(values) < low or max(values) > high:
                raise ConfigError(f"{name}={values} is not allowed: it must be whole numbers from {low} to "
                                  f"{high}, each once")
        for name in ("hidden", "inner"):
            if (value := getattr(self, name)) is not None and value % 64:
                raise ConfigError(f"{name}={value} is not a multiple of 64")

    def check(self, parts: Parts) -> None:
        """Refuse parts that do not fit, before anything is loaded."""
        for kind in ("data", "model"):
            if getattr(parts, kind) is None:
                raise ConfigError(f"{kind}=none: recipe=edgemoe_paper needs a {kind}")
        for kind in ("quantizer", "adapter", "aggregator"):
            if getattr(parts, kind) is not None:
                raise ConfigError(f"{kind}={parts.names.get(kind)} has no effect: recipe=edgemoe_paper has "
                                  f"its own; write {kind}=none")
        model = parts.model
        if not isinstance(model, ByteMoE):
            raise ConfigError(f"model={parts.names.get('model')} is not allowed: recipe=edgemoe_paper "
                              f"trains models with routed experts of its own; write model=byte_moe")
        if max(self.top) > model.experts:
            raise ConfigError(f"recipe.top={self.top} exceeds model.experts={model.experts}: lower it")
        self._check_room(model)

    def _check_room(self, model: ByteMoE) -> None:
        """Refuse limits with room for fewer experts than a token uses in a layer."""
        every, most = model.layers * model.experts, max(self.top)
        least = -(-100 * most // every)
        if min(self.limits) < least:
            raise ConfigError(f"recipe.limits={self.limits}: {min(self.limits)} % is too small: a token "
                              f"uses {most} of {every} experts in a layer; the smallest workable value is "
                              f"{least}")
        after = max(1 + self.warm + self.tokens, self.calibration_tokens)
        needed = max(self.prompt_length + after, self.length)
        if needed > 4 * model.length:
            raise ConfigError(f"model.length={model.length} is too short: prompts and what follows have "
                              f"{needed} tokens, and the model takes {4 * model.length}")

    def run(self, parts: Parts, context: Any) -> dict[str, float]:
        """Compare; return ratios at every limit, losses and bytes."""
        from poise_edgemoe.paper.comparing import run

        return run(parts, context, self._settings(), self.top)

    def _settings(self) -> Settings:
        from poise_edgemoe.paper.making import Settings

        return Settings(**{k: v for k, v in options_of(self).items() if k != "top"})

    @staticmethod
    def report(runs: Any) -> tuple[list[Any], list[Any]]:
        """Return tables and figures over the runs of this recipe."""
        from poise_edgemoe.paper.figures import report

        return report(runs)
