"""An adapter in a folder: options, tensors, what it was trained on, checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from poise.adapters.attached import AttachedLayers
from poise.errors import ConfigError, FileError
from poise.files import copy_checked, load_bundle, save_bundle
from poise.registry import installed
from poise.walk import weights

STEM = "adapter"
OWN, MODEL = "adapter.", "model."  # the method's tensors, and the model's where its base trains
KIND = "poise adapter"
FILE_VERSION = 1


def save_adapter(attached: Any, folder: Path | str) -> Path:
    """Write an attached adapter to a folder; `load_adapter` puts it on a model again.

    One that freezes its base is its own tensors. Of one whose base trains too, the whole model's state is
    kept beside them: biases and norms train with it.

    Raises
    ------
    ConfigError
        When the component's class is no registered entry: nobody could build it again.
    FileError
        When the folder cannot be written.
    """
    entry = _entry_of(attached.adapter)
    meta = {
        "kind": KIND, "version": FILE_VERSION, "entry": entry, "name": attached.name,
        "options": dataclasses.asdict(attached.adapter), "base": fingerprint(attached.model),
        "over": _over(attached),
    }
    tensors = {f"{OWN}{key}": value for key, value in attached.state_dict().items()}
    if not attached.adapter.freezes_base:
        tensors |= {f"{MODEL}{key}": value for key, value in attached.model.state_dict().items()}
    save_bundle(Path(folder) / STEM, tensors, meta)
    return Path(folder)


def load_adapter(model: nn.Module, folder: Path | str, name: str | None = None) -> Any:
    """Attach the adapter that a folder holds, under the name it was saved with or another.

    A warning tells of one that depends on the weight and acts over other adapters than when it was saved.

    Raises
    ------
    FileError
        For a folder that is missing, torn, altered, or not an adapter's, or an adapter of another base.
    ConfigError
        For an entry that is not installed here, or options that it does not take any more.
    """
    tensors, meta = load_bundle(Path(folder) / STEM)
    _check(meta, Path(folder))
    if meta["base"] != (here := fingerprint(model)):
        raise FileError(f"{folder} was trained on another base: its weights' names and shapes have the "
                        f"hash {meta['base'][:12]}, this model's {here[:12]}")
    adapter = installed().build_from("adapter", {"entry": meta["entry"], **meta["options"]})
    attached = adapter.attach(model, name or meta["name"])
    if (over := meta.get("over", [])) != (here := _over(attached)):
        warnings.warn(f"{folder}: the change depends on the weight, and was saved over the adapters "
                      f"{over}; here it acts over {here} and is another: attach those that it was saved "
                      f"over first", stacklevel=2)
    before = {k: v.clone() for k, v in model.state_dict().items()} if not adapter.freezes_base else {}
    try:
        if before:
            copy_checked(model.state_dict(), _below(tensors, MODEL), str(folder))
        attached.load_state_dict(_below(tensors, OWN))
    except Exception:
        if before:
            copy_checked(model.state_dict(), before, str(folder))
        attached.detach()
        raise
    return attached


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check(meta: Mapping[str, Any], folder: Path) -> None:
    """Refuse what is no adapter's metadata, whoever wrote it."""
    if meta.get("kind") != KIND or meta.get("version") != FILE_VERSION:
        raise FileError(f"{folder} holds no adapter of version {FILE_VERSION} (kind {meta.get('kind')!r}, "
                        f"version {meta.get('version')!r})")
    wanted = {"entry": str, "name": str, "base": str, "options": dict}
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            raise FileError(f"{folder}: {key} is {meta.get(key)!r}, not a {kind.__name__}")


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the names and shapes of a model's weights, the same when packed or adapted."""
    facts = sorted((w.name, *w.shape) for w in weights(model))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _over(attached: Any) -> list[str]:
    """Return the adapters on whose changes this one's depends."""
    return attached.over() if isinstance(attached, AttachedLayers) else []


def _entry_of(adapter: Any) -> str:
    kind = type(adapter)
    path = f"{kind.__module__}:{kind.__qualname__}"
    for entry in installed().entries("adapter"):
        if entry.component == path:
            return entry.name
    raise ConfigError(f"{path} is no registered adapter, so nobody could build it again: add an entry for "
                      f"it (docs/writing-a-plugin.md)")
