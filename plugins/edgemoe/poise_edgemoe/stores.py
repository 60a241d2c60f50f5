"""Stores of models as runs use them: converted once, kept in the cache, opened under a limit."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from poise.caches import cache_folder
from poise.errors import FileError
from poise.models.serving import InMemory
from poise_edgemoe import small_moe
from poise_edgemoe.chosen import chosen
from poise_edgemoe.engine import Engine
from poise_edgemoe.store.index import VERSION, read_index
from poise_edgemoe.store.writer import convert


def open_store(
    folder: Path, *, policy: str | None, frequencies: str | None, freq_source: str | None,
    prefetch: str | None, predictor: str | None, **limits: Any,
) -> Engine:
    """Open a store; options as `EdgeMoEStore` has them."""
    how = chosen(folder, policy=policy, frequencies=frequencies, freq_source=freq_source, prefetch=prefetch,
                 predictor=predictor)
    return Engine.open(folder, **how, **limits)


def store_of_directory(path: Path, how: Mapping[str, Any]) -> Path:
    """Return the store of a transformers directory, from the cache when it was converted before.

    Parameters
    ----------
    how : mapping
        Options of `convert`.
    """
    seen = [[f.name, f.stat().st_size, f.stat().st_mtime_ns]
            for f in sorted(path.glob("*")) if f.suffix in (".safetensors", ".json")]
    return _kept([str(path.absolute()), seen], how, lambda store: convert(path, store, **how))


def store_of_byte_moe(options: Mapping[str, Any], how: Mapping[str, Any]) -> Path:
    """Return the store of the small trained model, from the cache when it was converted before.

    Parameters
    ----------
    options : mapping
        All of `ByteMoE`.
    """

    def make(store: Path) -> None:
        convert(small_moe.build(**options), store, **how)

    store = _kept(small_moe.cache_key(options), how, make)
    small_moe.tokenizer().save(store)
    return store


def _kept(source: Any, how: Mapping[str, Any], make: Callable[[Path], Any]) -> Path:
    """Return a store of the cache; make it where it is not there, or is no store any more."""
    facts = json.dumps([VERSION, source, dict(how)], sort_keys=True, default=str)
    store = cache_folder("edgemoe_stores") / hashlib.sha256(facts.encode()).hexdigest()[:16]
    try:
        if store.exists():
            read_index(store)
            return store
    except FileError as error:
        print(f"poise: the cached store is damaged and made again: {error}", file=sys.stderr)
        shutil.rmtree(store)
    print(f"poise: converting the model once, to {store}", file=sys.stderr, flush=True)
    make(store)
    return store


def in_memory(model: Any, tokenizer: Any, context: int | None) -> InMemory:
    """Return a model in memory, on transformers' plain loop over experts: the engine's arithmetic."""
    model.set_experts_implementation("eager")
    return InMemory(model, tokenizer, context)
