"""What a profile is made of: passes over a store, each measurement kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from poise.files import write_bytes
from poise_edgemoe.cache.slots import size_of
from poise_edgemoe.cache.traces import RoutingTrace
from poise_edgemoe.widths.damages import Row, measure_expert
from poise_edgemoe.widths.forms import Forms
from poise_edgemoe.widths.journal import Journal
from poise_edgemoe.widths.measuring import Bench
from poise_edgemoe.widths.metrics import Measured, Metric
from poise_edgemoe.widths.opening import Opened, Tell
from poise_edgemoe.widths.profile_file import Entry
from poise_edgemoe.widths.raw_experts import RawExperts
from poise_edgemoe.widths.scaling import damages_of
from poise_edgemoe.widths.spool import Spool
from poise_edgemoe.widths.texts import Windows

MOST_USES = 1 << 21  # that a trace holds


@dataclass
class Work:
    """All that a profile is made with."""

    opened: Opened
    forms: Forms
    windows: Windows
    metric: Metric
    ask: dict[str, Any]
    folder: Path
    journal: Journal
    bench: Bench
    tell: Tell


def planned(
    forms: Forms, opened: Opened, moments: dict[str, torch.Tensor]
) -> Callable[[int, int, str, int], Any]:
    """Return what tells a bench what stores a matrix at some bits."""

    def quantizer(layer: int, expert: int, part: str, bits: int) -> Any:
        if forms.exact(bits):
            return None
        return forms.at(bits, moments.get(f"{opened.index.layers[layer].path}.{expert}.{part}"))

    return quantizer


# ------------------------------------------------------------------ what is measured


def measure_experts(did: Work, spool: Spool) -> tuple[list[Row], dict[str, torch.Tensor]]:
    """Return a row for each expert, or matrix, and mean squares of inputs where they are used."""
    experts, index, rows = RawExperts(did.opened.folder, did.opened.index), did.opened.index, []
    moments: dict[str, torch.Tensor] = {}
    every, done = sum(len(layer.experts) for layer in index.layers), 0
    did.tell("experts measured", 0, every)
    for n, layer in enumerate(index.layers):
        inputs = None
        for e in range(len(layer.experts)):
            key = f"expert {n} {e}"
            if not did.journal.has(key) and inputs is None:
                inputs = spool.layer(n)
            made = did.journal.get(key, lambda n=n, e=e, i=inputs: _measure(did, experts, n, e, i))
            rows += [_row(one) for one in made]
            moments |= _kept_moments(did, n, e)
            done += 1
            did.tell("experts measured", done, every)
    return rows, moments


def _measure(did: Work, experts: RawExperts, n: int, e: int, inputs: Any) -> list[dict[str, Any]]:
    path = did.opened.index.layers[n].path
    rows, moments = measure_expert(did.bench.engine.experts[n], e, experts.read((n, e)), inputs, did.forms,
                                   did.ask["tokens_per_expert"], per=did.ask["per"], path=path)
    if did.forms.rounding == "weighted" and moments:
        from safetensors.torch import save

        named = {f"{path}.{e}.{part}": m.contiguous() for part, m in moments.items()}
        write_bytes(did.folder / "moments" / f"{n:04d}-{e:06d}.safetensors", save(named))
    return [asdict(row) for row in rows]


def _kept_moments(did: Work, n: int, e: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    path = did.folder / "moments" / f"{n:04d}-{e:06d}.safetensors"
    return load(path.read_bytes()) if path.is_file() else {}


def _row(said: dict[str, Any]) -> Row:
    by_width = ("nbytes", "weight_error", "output_error", "output_error_se")
    made: dict[str, Any] = {k: {int(b): x for b, x in v.items()} if k in by_width else v
                            for k, v in said.items()}
    return Row(**made)


def measure_model(did: Work) -> dict[str, Any]:
    """Return badness on both halves at every uniform width, and what the narrowest adds in each layer."""
    bench, index = did.bench, did.opened.index
    halves = {"calibration": did.windows.calibration, "held_out": did.windows.held_out}
    asked: list[tuple[str, dict[Any, int]]] = [("reference", {})]
    asked += [(str(b), bench.uniform(b)) for b in did.forms.widths]
    found: dict[str, Any] = {half: {} for half in halves}
    steps, done = 2 * len(asked) + len(index.layers), 0
    did.tell("models measured", 0, steps)
    for name, bits in asked:
        for half, windows in halves.items():
            found[half][name] = did.journal.get(f"{half} {name}",
                                                lambda b=bits, w=windows: _badness(did, b, w))
            done += 1
            did.tell("models measured", done, steps)
    did.metric.check_reference(found["calibration"]["reference"]["badness"])
    found["layers"], right = [], []
    for n in range(len(index.layers)):
        found["layers"].append(did.journal.get(f"layer {n}", lambda n=n: _divergence(did, n, right)))
        done += 1
        did.tell("models measured", done, steps)
    return found


def _divergence(did: Work, layer: int, right: list[torch.Tensor]) -> float:
    """Return how far a layer's narrowest width moves what the model says, in nats.

    Half the mean square by which losses of tokens change, which is the divergence to second order: it is
    far less noisy than their mean, and never negative.
    """
    windows = did.windows.calibration
    if not right:
        did.bench.set({})
        right.append(did.bench.token_losses(windows))
    low = did.forms.widths[0]
    did.bench.set({k: low for k in did.bench.uniform(low) if k[0] == layer})
    return float((did.bench.token_losses(windows) - right[0]).square().mean()) / 2


def _badness(did: Work, bits: dict[Any, int], windows: torch.Tensor) -> dict[str, float]:
    did.bench.set(bits)
    made = did.bench.measure(did.metric, windows)
    return {"badness": made.value, "standard_error": made.error}


def measure_losses(did: Work, rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Return by how much each expert at the low width worsens the model with all others at the high one."""
    base, found = did.bench.uniform(did.ask["high"]), {}
    did.bench.set(base)
    start: list[Measured] = []
    did.tell("losses measured", 0, len(rows))
    for n, row in enumerate(rows):

        def measure(row: Row = row) -> list[float]:
            if not start:
                did.bench.set(base)
                start.append(did.bench.measure(did.metric, did.windows.calibration))
            did.bench.set({**base, **{(row.layer, row.expert, p): did.ask["low"] for p in row.parts}})
            return list(did.bench.measure(did.metric, did.windows.calibration).above(start[0]))

        found[row.name] = tuple(did.journal.get(f"loss {row.name}", measure))
        did.tell("losses measured", n + 1, len(rows))
    return found


# ------------------------------------------------------------------ what is kept


def entries_of(
    did: Work, spool: Spool, rows: list[Row], measured: dict[str, Any],
    increases: dict[str, tuple[float, float]],
) -> list[Entry]:
    damages = damages_of(rows, did.ask["damage"], did.ask["low"], measured, increases)
    tokens = [spool.tokens(n) for n in range(len(did.opened.index.layers))]
    return [Entry(**asdict(row), reads=row.tokens / tokens[row.layer], damage=damages[row.name],
                  loss_increase=increases.get(row.name, (None, None))[0],
                  loss_increase_se=increases.get(row.name, (None, None))[1]) for row in rows]


def trace_of(opened: Opened, spool: Spool) -> RoutingTrace:
    """Return the routing of the calibration as one sequence of decoded tokens, an encoder's left out."""
    layers = [n for n, layer in enumerate(opened.index.layers) if not layer.encoder]
    each = [spool.uses(n) for n in layers]
    most = MOST_USES // max(1, sum(len(e) for _, e in each) // max(1, spool.tokens(layers[0])))
    uses: list[tuple[int, int, int]] = []
    for place, (token, expert) in enumerate(each):
        uses += [(t, place, e) for t, e in zip(token.tolist(), expert.tolist(), strict=True) if t < most]
    sizes = tuple(max(map(size_of, opened.index.layers[n].experts)) for n in layers)
    experts = max(len(opened.index.layers[n].experts) for n in layers)
    return RoutingTrace(len(layers), experts, sizes, (), tuple((n, e) for _, n, e in sorted(uses)))
