"""Build the parts of a run and check that they fit, before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from poise.config import PARTS, RunConfig
from poise.errors import ConfigError
from poise.hooks import Checked, Input
from poise.interfaces import Parts, Recipe, Tracker
from poise.registry import Registry, installed
from poise.runs.origin import inputs_of


@dataclass(frozen=True)
class Built:
    """A run that may start: its configuration, and the components that were built from it and fit."""

    config: RunConfig
    recipe: Recipe
    parts: Parts
    tracker: Tracker | None = None
    components: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, Input]:
        """Return the files that the components read, by key of the configuration."""
        return inputs_of(self.components)

    def places(self) -> dict[str, str]:
        """Return the absolute paths of these files."""
        return {key: str(one.path.absolute()) for key, one in self.inputs().items()}


def build_parts(
    config: RunConfig, registry: Registry | None = None, places: Mapping[str, str] | None = None
) -> Built:
    """Build every component of a run and check that they fit together; nothing heavy is loaded.

    Parameters
    ----------
    places : mapping, optional
        Where inputs are by now, by key of the configuration ("data.path"); the configuration keeps what was
        written.

    Raises
    ------
    ConfigError
        Unknown entry or option, wrong type, out of range, or a task that does not fit.
    """
    registry = registry or installed()
    if config.component("recipe") is None:
        raise ConfigError("recipe=none: a run needs a recipe (see: poise list recipe)")
    built: dict[str, Any] = {
        kind: registry.build_from(kind, _placed(kind, part, places or {}))
        if (part := config.component(kind)) else None
        for kind in PARTS
    }
    components = dict(built)
    _check_tasks(config, registry)
    _check_device(config.device)
    recipe: Recipe = built.pop("recipe")
    tracker: Tracker | None = built.pop("tracker")
    names = {kind: getattr(config, kind)["entry"] for kind in PARTS}
    parts = Parts(**built, train=config.train, names=names)
    if isinstance(recipe, Checked):
        recipe.check(parts)
    return Built(config, recipe, parts, tracker, components)


def _placed(kind: str, part: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    return {**part, **{key.partition(".")[2]: path for key, path in places.items()
                       if key.startswith(f"{kind}.")}}


def _check_tasks(config: RunConfig, registry: Registry) -> None:
    recipe = registry.get("recipe", config.recipe["entry"])
    for kind in PARTS:
        part = config.component(kind)
        if part is None or not recipe.tasks:
            continue
        entry = registry.get(kind, part["entry"])
        if entry.tasks and not set(entry.tasks) & set(recipe.tasks):
            fitting = [
                e.name for e in registry.entries(kind)
                if not e.tasks or set(e.tasks) & set(recipe.tasks)
            ]
            raise ConfigError(
                f"{kind}={entry.name} is for {'/'.join(entry.tasks)}, but recipe={recipe.name} "
                f"needs {'/'.join(recipe.tasks)}: use {kind}=" + "|".join(fitting or ["none"])
            )


def _check_device(name: str) -> None:
    """Refuse a device that is not there; the usual one needs no torch to be known."""
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device={name}: {reason}; write device=cpu, cuda or cuda:0") from None
