"""From overrides to a checked `RunConfig`, and from there to runs: the only room that imports Hydra.

Registered components become typed nodes of Hydra's config store, so a new entry can be chosen and
overridden without a YAML file. Nothing is instantiated from configuration: the registry builds
components by name. Every composition error leaves here as one line.

The modules import one way: schema, overrides, messages, composing, launching, running.
"""

from __future__ import annotations

from poise.compose.composing import Composed, compose, experiments, free_directory
from poise.compose.launching import show
from poise.compose.overrides import parse_changes
from poise.compose.running import run, run_all
from poise.compose.schema import conf_root, initialized, install

__all__ = [
    "Composed", "compose", "conf_root", "experiments", "free_directory", "initialized", "install",
    "parse_changes", "run", "run_all", "show",
]
