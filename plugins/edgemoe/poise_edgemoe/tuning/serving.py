"""Tune, convert, serve: three stages composed through their files; the recipe `edgemoe_tune_and_serve`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.adapters import load_adapter
from poise.errors import ConfigError
from poise.files import read_json, write_json
from poise.interfaces import Parts
from poise.models.components import CausalLM
from poise.options import options_of
from poise.quantizers.whole import stored_bytes
from poise.runs.context import RunContext
from poise.runs.progress import parts as progress_of
from poise.runs.records import Run
from poise.runs.stages import stage
from poise.walk import weights
from poise_edgemoe.bits import text_windows
from poise_edgemoe.components import EdgeMoEGenerate
from poise_edgemoe.generation import held_out, tokens_per_byte
from poise_edgemoe.store.writer import convert
from poise_edgemoe.stores import in_memory

TUNE, STORE, SERVE, LOSSES = "tune", "store", "serve", "losses.json"
SERVED = ("store_bytes", "memory_bytes", "hit_rate", "bytes_per_token", "machine/tokens_per_second",
          "machine/peak_bytes", "machine/base_bytes", "machine/grown_of_limit")


def run(
    parts: Parts, context: RunContext, *, tune: Mapping[str, Any], convert: Mapping[str, Any],
    serve: EdgeMoEGenerate, served: Mapping[str, Any],
) -> dict[str, float]:
    """Tune a model, convert what was made of it, serve the store; see `EdgeMoETuneAndServe`."""
    here = context.directory
    tuned = stage(context, TUNE, {"recipe": {"entry": "finetune", **tune}, **_none("tracker")})
    losses = _losses(parts, context, serve)
    if not (here / STORE).exists():  # one that was killed goes on where it was
        _convert(here / TUNE / "folded", here / STORE, convert, context.quiet)
    metrics = losses | _of_stages(tuned, _serve(context, serve, served), here)
    rows = (("before tuning", "loss_before", "in_memory_bytes"), ("tuned", "loss_tuned", "in_memory_bytes"),
            ("served", "loss_served", "store_bytes"))
    context.note("stages", [{"stage": name, "held-out loss": metrics[loss], "bytes": int(metrics[size])}
                            for name, loss, size in rows])
    return metrics


def _serve(context: RunContext, serve: EdgeMoEGenerate, served: Mapping[str, Any]) -> Run:
    """Serve the store; a limit that is too small for it is known only now, when much has been done."""
    store = (context.directory / STORE).absolute()
    try:
        return stage(context, SERVE, {
            "recipe": {"entry": "edgemoe_generate", **options_of(serve)},
            "model": {"entry": "edgemoe_store", "store": str(store), **served},
            **_none("adapter", "tracker")})
    except ConfigError as error:
        raise ConfigError(f"{error}; what was tuned is kept, and served by recipe=edgemoe_generate "
                          f"model=edgemoe_store model.store={store}") from None


def _none(*kinds: str) -> dict[str, Any]:
    return {kind: {"entry": "none"} for kind in kinds}


def _convert(folded: Path, store: Path, how: Mapping[str, Any], quiet: bool) -> None:
    with progress_of("converting", quiet) as tell:
        convert(folded, store, progress=tell, **how)


def _losses(parts: Parts, context: RunContext, serve: EdgeMoEGenerate) -> dict[str, float]:
    """Return held-out losses before and after, on the windows that are served; measured once."""
    if (path := context.directory / LOSSES).is_file():
        return read_json(path)
    assert parts.data is not None and parts.model is not None
    splits, tokens = parts.data.load(context.seed), parts.model.tokenizer()  # type: ignore[attr-defined]
    batch = text_windows(splits.test, tokens, serve.length, serve.windows)
    per_byte = tokens_per_byte(splits.test, tokens)

    def measured(model: Any) -> float:
        with in_memory(model, tokens, None) as one:
            return per_byte * held_out(one.logits, batch, context)

    model = parts.model.build(splits.spec)
    found = {"loss_before": measured(model), "in_memory_bytes": float(bytes_in_memory(model))}
    if parts.adapter is None:
        model = CausalLM(path=str(context.directory / TUNE / "folded")).build()
    else:
        attached = load_adapter(model, context.directory / TUNE / "adapter")
        if not any(w.lies_in for w in weights(model)):
            attached.merge()  # to the bit what is converted
    found["loss_tuned"] = measured(model)
    write_json(path, found)
    return found


def bytes_in_memory(model: Any) -> int:
    """Return what a model takes as a whole, experts that lie in a store included."""
    filed = sum(w.numel * w.dtype.itemsize for w in weights(model) if w.lies_in)
    return stored_bytes(model)["total"] + filed


def _of_stages(tuned: Run, served: Run, folder: Path) -> dict[str, float]:
    """Return what the stages measured, under names that say of which."""
    found = {"loss_served": served.metrics["loss"], "tune_seconds": tuned.notes["seconds"],
             "validation_before": tuned.metrics["loss_before"],
             "validation_after": tuned.metrics["loss_after"]}
    found |= {name: served.metrics[name] for name in SERVED if name in served.metrics}
    if (adapter := folder / TUNE / "adapter").is_dir():
        found["adapter_bytes"] = float(sum(f.stat().st_size for f in adapter.iterdir()))
    return found
