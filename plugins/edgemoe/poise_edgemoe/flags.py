"""An option that would change nothing is refused: what was given, why, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.errors import ConfigError
from poise_edgemoe.store.planes import ALLOWED, HALF
from poise_edgemoe.store.schemes import BLOCKS, RAW, SCHEMES


def check_convert(
    *, bits: int | None, scheme: str | None, group: int | None, hot: str | None,
    plan: Mapping[str, Any] | None = None, layout: str | None = None, planes: int | None = None,
) -> None:
    """Refuse options without effect, of those that were given (not None), and planes of what has none.

    Raises
    ------
    ConfigError
    """
    if plan is not None and not plan:
        raise ConfigError("plan has no effect: it names nothing; leave it out, or give lines to it")
    widths = [4 if bits is None else bits, *(plan or {}).values()]
    if all(isinstance(w, int) and w in RAW for w in widths):
        for name, value in (("scheme", scheme), ("group", group), ("layout", layout)):
            _refuse(name, value, "16 and 32 bits are not quantized: leave it out, or take 8 bits or fewer")
    grouped = [name for name, (_, has) in SCHEMES.items() if has]
    if scheme is not None and scheme not in grouped:
        _refuse("group", group, f"scheme {scheme} does not take it: leave it out, or take "
                                f"{' or '.join(grouped)}")
    if planes == 2:
        bad = [f"bits={w}" for w in widths if isinstance(w, int) and w not in HALF]
        bad += [f"scheme={scheme}"] if scheme in BLOCKS else []
        bad += [f"layout={layout}"] if layout in ("ggml", "torch") else []
        if bad:
            raise ConfigError(f"planes=2 does not fit {bad[0]}: it takes {ALLOWED}, in plain layout")
    if bits == 32 and hot == "bf16":
        _refuse("hot", hot, "with 32 bits the rest keeps the model's own type: leave it out, or take 16 "
                            "bits")


def check_bits(bits: int | None, model: str, plan: Mapping[str, Any] | None) -> None:
    """Refuse `bits` beside a plan that names every matrix of an expert; 32 says more than that.

    Raises
    ------
    ConfigError
    """
    from poise_edgemoe.store.writer import unnamed

    if bits not in (None, 32) and plan is not None and not unnamed(model, plan):
        _refuse("bits", bits, "the plan names every expert's matrices: leave it out, or name fewer")


def check_trace(prefetch: Any, trace: Any) -> None:
    """Refuse the oracle without a trace, and a trace that feeds nobody.

    Raises
    ------
    ConfigError
    """
    if prefetch == "oracle" and trace is None:
        raise ConfigError("prefetch=oracle needs a trace: give trace=FILE.route.csv.gz, recorded routing")
    if prefetch != "oracle":
        _refuse("trace", trace, "only prefetch=oracle listens to it: leave it out, or take the oracle")


def check_predictor(prefetch: str | None, predictor: str | None, policy: str | None) -> None:
    """Refuse a predictor that nobody asks, and whoever would ask one that is not given.

    Raises
    ------
    ConfigError
    """
    if predictor is None:
        for name, asks in (("prefetch=predictor", prefetch == "predictor"),
                           ("policy=predicted", policy == "predicted")):
            if asks:
                raise ConfigError(f"{name} needs a predictor: give predictor=FILE.json (poise moe fit "
                                  f"makes one)")
    elif prefetch not in (None, "predictor") and policy != "predicted":
        rule = policy or "expected"
        _refuse("predictor", predictor, f"neither prefetch={prefetch} nor policy={rule} asks it: leave it "
                                        f"out, or take prefetch=predictor or policy=predicted")


def _refuse(name: str, value: Any, why: str) -> None:
    if value is not None:
        raise ConfigError(f"{name}={value} has no effect: {why}")
