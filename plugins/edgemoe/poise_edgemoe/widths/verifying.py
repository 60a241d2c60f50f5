"""What a choice of widths really loses: the whole model, measured on the profile's own windows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from poise.errors import ConfigError
from poise_edgemoe.widths.forms import Forms
from poise_edgemoe.widths.gathering import planned
from poise_edgemoe.widths.measuring import Bench
from poise_edgemoe.widths.metrics import Metric, metric_of
from poise_edgemoe.widths.opening import alone, identity_of_model, store_of
from poise_edgemoe.widths.profile_file import Profile, check_identity
from poise_edgemoe.widths.texts import Windows, windows_of

Tell = Callable[[str, int, int], None]
Bits = Mapping[tuple[int, int, str], int]


class Verifier:
    """Measures choices; each is measured once.

    Parameters
    ----------
    bench : Bench
    windows : Windows
    metric : Metric
    measured : dict
        The profile's: badness as trained.
    """

    def __init__(
        self, bench: Bench, windows: Windows, metric: Metric, measured: dict[str, Any], tell: Tell
    ) -> None:
        self.bench, self.windows, self.metric, self.tell = bench, windows, metric, tell
        self.reference = {half: measured[half]["reference"]["badness"]
                          for half in ("calibration", "held_out")}
        self._known: dict[Any, dict[str, float]] = {}

    def _measure(self, bits: Bits, half: str) -> dict[str, float]:
        key = half, tuple(sorted(bits.items()))
        if key not in self._known:
            self.bench.set(bits)
            made = self.bench.measure(self.metric, getattr(self.windows, half))
            self._known[key] = {
                "badness": made.value, "standard_error": made.error,
                "increase": made.value - self.reference[half],
                "loss_percent": self.metric.percent(made.value, self.reference[half]),
                "metric": self.metric.shown(made.value)}
            self.tell("plans measured", len(self._known), len(self._known))
        return self._known[key]

    def increase(self, bits: Bits) -> float:
        """Return what a choice adds to the badness of the calibration half."""
        return self._measure(bits, "calibration")["increase"]

    def percent(self, bits: Bits) -> float:
        """Return the loss in percent on the calibration half, which plans are chosen by."""
        return self._measure(bits, "calibration")["loss_percent"]

    def allowed(self, percent: float) -> float:
        """Return the increase that a loss in percent allows."""
        reference = self.reference["calibration"]
        return self.metric.allowed(percent, reference) - reference

    def full(self, bits: Bits) -> dict[str, Any]:
        """Return what was measured on both halves."""
        return {half: self._measure(bits, half) for half in ("calibration", "held_out")}


def verifier(
    stack: ExitStack, profile: Profile, model: Any, data: Any, metric: Any, memory: Any, tell: Tell, *,
    needed: bool,
) -> Verifier | None:
    """Return what measures, open until the stack is closed; None where it is not needed, nor at hand.

    Raises
    ------
    ConfigError
        For another model, other data or another metric than the profile's; where model or data are missing.
    """
    model = profile.model_source if model is None else model
    data = profile.data_source if data is None else data
    gone = _missing(profile, model, data, metric)
    if gone and not needed:
        return None
    if gone:
        raise ConfigError(f"a plan is measured on the model, and {gone}")
    identity = identity_of_model(model, tell)
    named = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    check_identity(profile, identity, named)
    made = tempfile.TemporaryDirectory(prefix="poise-allocate-", dir=_near(profile))
    work = Path(stack.enter_context(made))
    stack.enter_context(alone(work))
    opened = store_of(model, identity, work, tell)
    o = profile.options
    forms = Forms(o["scheme"], o["group"], tuple(o["widths"]), o["rounding"], opened.index.dtype)
    own = not isinstance(metric, str) and metric is not None
    chosen = metric_of(metric, o["higher_is_better"], opened.tokenizer) if own else \
        metric_of(o["metric"], None, opened.tokenizer)
    stores = planned(forms, opened, dict(profile.moments))
    bench = stack.enter_context(Bench(opened.folder, stores, o["length"],
                                      memory))
    windows = windows_of(data, opened.tokenizer, bench.engine.source.vocab, windows=o["windows"],
                         held_out=o["held_out"], length=o["length"], seed=o["seed"])
    if windows.checksum != profile.data["checksum"]:
        raise ConfigError("the data are not those of the profile: give them, or profile again")
    return Verifier(bench, windows, chosen, profile.measured, tell)


def _near(profile: Profile) -> Path | None:
    """Return the folder of the profile, where there is room for a model; None: the system's own."""
    return profile.path.absolute().parent if profile.path is not None else None


def _missing(profile: Profile, model: Any, data: Any, metric: Any) -> str:
    """Return in words what is not at hand, or nothing."""
    from poise_edgemoe.widths.metrics import NAMES

    for name, value in (("model", model), ("data", data)):
        if value is None:
            return f"the profile was made from a live one: give {name}="
        if isinstance(value, (str, Path)) and not Path(value).exists():
            return f"{value} is not there: give {name}="
    if profile.options["metric"] not in NAMES and (metric is None or isinstance(metric, str)):
        return f"the metric {profile.options['metric']} is a function: give metric="
    return ""
