"""What every recipe that trains a network does first and last: build, quantize, attach; fold, save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from poise.adapters import save_adapter
from poise.errors import ConfigError, DataError
from poise.files import save_bundle
from poise.hooks import Cached, Drawn, Observed
from poise.interfaces import Parts, Splits
from poise.quantizers.whole import quantize_model, stored_bytes
from poise.runs.context import RunContext
from poise.runs.records import read_rows
from poise.walk import checkpoint, count


def load_splits(parts: Parts, context: RunContext) -> Splits:
    """Load a run's data and note where it is from.

    Raises
    ------
    DataError
        When a split is empty: training chooses by validation rows, and test rows are looked at once.
    """
    assert parts.data is not None
    splits = parts.data.load(context.seed)
    context.note("data", splits.provenance)
    for name in ("train", "validation", "test"):
        if not len(getattr(splits, name)):
            raise DataError(f"data={parts.names.get('data')} gives no {name} rows, and this recipe needs "
                            f"some: raise data.{name}, or give it more rows")
    return splits


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
    """Return the context in which an adapter wants to be evaluated: `cached()`."""
    return attached.cached() if isinstance(attached, Cached) else contextlib.nullcontext()


def observed(attached: Any) -> dict[str, float]:
    """Return what an adapter wants recorded at each evaluation: `metrics()`."""
    return attached.metrics() if isinstance(attached, Observed) else {}


def finish(attached: Any, context: RunContext) -> None:
    """Note an adapter's last report, and let it draw its figures from the records, if it has `draw`."""
    if attached is None:
        return
    context.note("adapter", attached.report())
    if isinstance(attached, Drawn):
        attached.draw(context.directory / "figures", read_rows(context.directory / "metrics.jsonl"))


def sizes(model: Any) -> dict[str, float]:
    """Return the counts that every summary holds."""
    return {
        "trainable_parameters": float(count(model)["trainable"]),
        "model_bytes": float(stored_bytes(model)["total"]),
    }


def save_final(model: Any, attached: Any, context: RunContext) -> None:
    """Write the adapter, and the trained model as one plain, folded checkpoint: `final.safetensors`."""
    meta = {"folded": attached is not None}
    save_bundle(context.directory / "final", dict(folded_weights(model, attached)), meta)
    keep_adapter(attached, context)


def keep_adapter(attached: Any, context: RunContext) -> None:
    """Write `adapter/`, which `poise.load_adapter` puts on the base again."""
    if attached is None:
        return
    try:
        save_adapter(attached, context.directory / "adapter")
    except ConfigError as error:  # a component of no entry, made by hand: the trained model is kept
        context.note("adapter_not_kept", str(error))


def folded_weights(model: Any, attached: Any) -> Iterator[tuple[str, Any]]:
    """Yield the plain checkpoint of a model, with its adapter folded in."""
    return attached.folded_weights() if attached is not None else checkpoint(model)
