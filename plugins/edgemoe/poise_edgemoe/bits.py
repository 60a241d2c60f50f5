"""Held-out loss and bytes under plans of bits per expert."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.errors import DataError
from poise.interfaces import Parts
from poise.quantizers import quantize_model
from poise.walk import weights
from poise_edgemoe.plots import loss_against_bytes
from poise_edgemoe.widths.plans import expert_errors, half_plan, random_plan, uniform_plan

HALF = 16  # the bits of an expert as stored unquantized


def run(
    parts: Parts, context: Any, *, bits: list[int], high: int, low: int, random_plans: int, length: int,
    windows: int,
) -> dict[str, float]:
    """Measure every plan on the same held-out text; see `EdgeMoEBits`."""
    assert parts.data is not None and parts.model is not None
    splits = parts.data.load(context.seed)
    context.note("data", splits.provenance)
    model = parts.model.build(splits.spec).eval()
    tokens = parts.model.tokenizer()  # type: ignore[attr-defined]
    batch = text_windows(splits.test, tokens, length, windows)
    named = plans(model, parts.quantizer, context, bits=bits, high=high, low=low, random_plans=random_plans)
    rows = []
    with context.progress(len(named), "plans") as bar:
        for step, (name, plan) in enumerate(named.items()):
            rows.append(measure(model, parts.quantizer, name, plan, batch))
            context.log(step, {f"loss/{name}": rows[-1]["loss"]})
            bar.advance(note=name)
    context.note("plans", rows)
    context.note("chosen plan", named["half_chosen"])
    loss_against_bytes(rows, context.directory / "figures" / "loss_against_bytes.png")
    return summary(rows)


def plans(
    model: nn.Module, quantizer: Any, context: Any, *, bits: list[int], high: int, low: int,
    random_plans: int,
) -> dict[str, dict]:
    """Return the plans to measure, by name."""
    errors = expert_errors(model, quantizer, low)
    found = {f"{b}_bit": uniform_plan(model, b) for b in bits}
    found["half_chosen"] = half_plan(model, errors, high, low)
    for i in range(random_plans):
        seed = context.seed_for(f"random plan {i}")
        found[f"half_random_{i}"] = random_plan(model, seed, high, low)
    return found


def measure(
    model: nn.Module, quantizer: Any, name: str, plan: dict[str, int], batch: Tensor
) -> dict[str, Any]:
    """Return loss (nats per byte) and the experts' bytes under one plan."""
    stored = copy.deepcopy(model)
    made = quantize_model(stored, quantizer, plan)
    sizes = {w.name: w.numel for w in weights(model) if w.role == "expert"}
    bits = {n: made["quantized"].get(n, float(HALF)) for n in sizes}
    total = sum(sizes[n] * bits[n] for n in sizes) / 8
    return {
        "plan": name, "loss": loss_of(stored, batch), "expert_bytes": int(total),
        "bits_per_weight": 8 * total / sum(sizes.values()),
    }


def loss_of(model: nn.Module, batch: Tensor) -> float:
    """Return the mean next-token loss over windows (n, length + 1)."""
    return mean_loss(lambda ids: model(input_ids=ids, use_cache=False).logits, batch)


@torch.no_grad()
def mean_loss(logits_of: Callable[[Tensor], Tensor], batch: Tensor, rows: int = 16) -> float:
    """Return the mean next-token loss (nats) over windows (n, length + 1), some rows at a time."""
    losses = []
    for part in batch.split(rows):
        logits = logits_of(part[:, :-1]).float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return float(sum(losses)) / (batch.shape[0] * (batch.shape[1] - 1))


def text_windows(examples: Any, tokens: Any, length: int, count: int) -> Tensor:
    """Return evenly spread windows of the held-out text, shape (count, length + 1).

    Raises
    ------
    DataError
        When the text is shorter than one window.
    """
    stream = torch.tensor([t for e in examples for t in tokens.encode(e.completion)])
    if len(stream) < length + 1:
        raise DataError(f"the held-out text has {len(stream)} tokens, one window needs {length + 1}")
    starts = torch.linspace(0, len(stream) - length - 1, count).long()
    return stream[starts[:, None] + torch.arange(length + 1)]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of a run: loss by plan, the random plans as one mean, and the gain."""
    loss = {r["plan"]: r["loss"] for r in rows}
    random = [v for k, v in loss.items() if k.startswith("half_random")]
    metrics = {f"loss/{k}": v for k, v in loss.items() if not k.startswith("half_random")}
    metrics["loss/half_random"] = statistics.fmean(random)
    metrics["chosen_minus_random"] = loss["half_chosen"] - metrics["loss/half_random"]
    return metrics
