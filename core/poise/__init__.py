"""Poise: four papers about weights as composable plugins.

Public names, loaded on first use: `build`, `entries`, `describe`, `run`, `load_run`, `weights`,
`open_weights`, `save_adapter`, `load_adapter`.
(No submodule bears one of these names, so importing a submodule never shadows a function.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from poise.version import __version__

if TYPE_CHECKING:
    from poise.adapters import load_adapter, save_adapter
    from poise.compose import run
    from poise.registry import build, describe, entries
    from poise.runs.records import load_run
    from poise.walk import open_weights, weights

_HOMES = {
    "build": "poise.registry",
    "entries": "poise.registry",
    "describe": "poise.registry",
    "load_run": "poise.runs.records",
    "run": "poise.compose",
    "weights": "poise.walk",
    "open_weights": "poise.walk",
    "save_adapter": "poise.adapters",
    "load_adapter": "poise.adapters",
}

__all__ = [
    "__version__", "build", "describe", "entries", "load_adapter", "load_run", "open_weights", "run",
    "save_adapter", "weights",
]


def __getattr__(name: str):
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'poise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
