"""What every recipe that trains a network does first and last: build, quantize, attach; fold, save."""

from __future__ import annotations

import contextlib
from typing import Any

from poise.files import save_bundle
from poise.interfaces import Parts
from poise.quantizers.whole import dense_state_dict, quantize_model, stored_bytes
from poise.runs.context import RunContext
from poise.runs.records import read_rows
from poise.walk import count


def prepare(parts: Parts, context: RunContext, spec: dict[str, Any] | None) -> tuple[Any, Any]:
    """Build the model, quantize it, attach the adapter; note sizes in the summary.

    Returns
    -------
    model, attached
        `attached` is None without an adapter.
    """
    import torch

    assert parts.model is not None
    with context.seeded("init"):
        model = parts.model.build(spec).to(torch.device(context.device))
    if parts.quantizer is not None:
        made = quantize_model(model, parts.quantizer)
        context.note("quantized", {k: v for k, v in made.items() if k != "kept"})
    with context.seeded("adapter"):
        attached = parts.adapter.attach(model) if parts.adapter is not None else None
    if attached is not None:
        context.note("adapter", attached.report())
    context.note("size", {**count(model), **{f"bytes_{k}": v for k, v in stored_bytes(model).items()}})
    return model, attached


def evaluating(attached: Any) -> contextlib.AbstractContextManager:
    """Return the context in which an adapter wants to be evaluated: `cached()`, where it has that."""
    return getattr(attached, "cached", contextlib.nullcontext)()


def observed(attached: Any) -> dict[str, float]:
    """Return what an adapter wants recorded at each evaluation: `metrics()`, where it has that."""
    return getattr(attached, "metrics", dict)()


def finish(attached: Any, context: RunContext) -> None:
    """Note an adapter's last report, and let it draw its figures from the records, if it has `draw`."""
    if attached is None:
        return
    context.note("adapter", attached.report())
    if hasattr(attached, "draw"):
        attached.draw(context.directory / "figures", read_rows(context.directory / "metrics.jsonl"))


def sizes(model: Any) -> dict[str, float]:
    """Return the counts that every summary holds."""
    return {
        "trainable_parameters": float(count(model)["trainable"]),
        "model_bytes": float(stored_bytes(model)["total"]),
    }


def save_final(model: Any, attached: Any, context: RunContext) -> None:
    """Write the trained model as one plain, folded checkpoint: `final.safetensors`."""
    meta = {"folded": attached is not None}
    save_bundle(context.directory / "final", folded_tensors(model, attached), meta)


def folded_tensors(model: Any, attached: Any) -> dict[str, Any]:
    """Return the plain checkpoint of a model, with its adapter folded in."""
    return attached.folded_state_dict() if attached is not None else dense_state_dict(model)
