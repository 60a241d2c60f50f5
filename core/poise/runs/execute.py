"""Execute a run: build the parts, call the recipe, close the records."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.config import PARTS, RunConfig
from poise.errors import ConfigError, PoiseError, RunError
from poise.hooks import Checked
from poise.interfaces import Parts, Recipe, Tracker
from poise.registry import Registry, installed
from poise.runs.context import Interrupted, RunContext
from poise.runs.liveness import HeldError, lock
from poise.runs.records import Run, load_run, load_status
from poise.runs.resume import refuse_resume, still_running


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    error: BaseException | None = None

    @property
    def exit_code(self) -> int:
        """0 done, 1 failed, 2 configuration error, 130 interrupted."""
        if self.error is None:
            return 0
        if isinstance(self.error, (Interrupted, KeyboardInterrupt)):
            return 130
        return getattr(self.error, "exit_code", 1)


@dataclass(frozen=True)
class Built:
    """A run that may start: its configuration, and the components that were built from it and fit."""

    config: RunConfig
    recipe: Recipe
    parts: Parts
    tracker: Tracker | None = None


def build_parts(config: RunConfig, registry: Registry | None = None) -> Built:
    """Build every component of a run and check that they fit together; nothing heavy is loaded.

    Raises
    ------
    ConfigError
        Unknown entry or option, wrong type, out of range, or a task that does not fit.
    """
    registry = registry or installed()
    if config.component("recipe") is None:
        raise ConfigError("recipe=none: a run needs a recipe (see: poise list recipe)")
    built: dict[str, Any] = {
        kind: registry.build_from(kind, part) if (part := config.component(kind)) else None
        for kind in PARTS
    }
    _check_tasks(config, registry)
    _check_device(config.device)
    recipe: Recipe = built.pop("recipe")
    tracker: Tracker | None = built.pop("tracker")
    names = {kind: getattr(config, kind)["entry"] for kind in PARTS}
    parts = Parts(**built, train=config.train, names=names)
    if isinstance(recipe, Checked):
        recipe.check(parts)
    return Built(config, recipe, parts, tracker)


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


def execute(
    built: Built, directory: Path | str, *, resume: bool = False, quiet: bool = False
) -> Outcome:
    """Carry out a built run in a directory and return how it ended.

    Only what goes wrong before the directory is claimed is raised; afterwards the error is in the
    outcome, and in `status.json`.
    """
    directory = Path(directory)
    with contextlib.ExitStack() as held:
        _hold(directory, held, resume)
        error = _carry_out(built, _context(built, directory, resume, quiet))
    return Outcome(load_run(directory), error)


def _carry_out(built: Built, context: RunContext) -> BaseException | None:
    """Call the recipe and close the records; return what ended the run early, if anything did."""
    config, tracker = built.config, built.tracker
    try:
        _prepare_torch(config)
        context.records.environment(config.threads, config.device)
        context.records.status("running")
        if tracker:
            tracker.start(context.directory, config.tag, config.plain())
        started = time.perf_counter()
        metrics = built.recipe.run(built.parts, context)
        context.note("seconds", round(time.perf_counter() - started, 2))
        context.records.summary(metrics)
        return _close(context, tracker, "done", None, metrics)
    except (Interrupted, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        return _close(context, tracker, "interrupted", error, {}, reason)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, PoiseError):
            _keep_traceback(context.directory)
        return _close(context, tracker, "failed", error, {}, reason)


def _hold(directory: Path, held: contextlib.ExitStack, resume: bool) -> None:
    """Make the directory and take its lock, before anything of the run is written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(directory))
    except OSError as error:
        raise RunError(
            f"cannot make the run directory {directory}: {error.strerror}; choose another with "
            f"paths.out=DIR or hydra.run.dir=DIR"
        ) from None
    except HeldError:
        if resume:
            raise RunError(still_running(directory)) from None
        raise RunError(f"{directory} already holds a run, which is still running: choose another "
                       f"hydra.run.dir") from None


def _keep_traceback(directory: Path) -> None:
    try:
        (directory / "traceback.txt").write_text(traceback.format_exc())
    except OSError:  # the disk may be what failed the run
        traceback.print_exc()


def _context(built: Built, directory: Path, resume: bool, quiet: bool) -> RunContext:
    config = built.config
    context = RunContext(
        directory, config.seed, config.device, keep=config.train.keep, tracker=built.tracker, quiet=quiet
    )
    if resume:
        if load_status(directory).get("state") == "done":  # by another resume, since it was looked at
            refuse_resume(directory, "done")
        context.resume_from = context.checkpoints.newest()
        rows = context.resume_from.meta["rows"] if context.resume_from else 0
        context.records.open(keep_rows=rows)
    else:
        context.records.begin(config.plain())
    return context


def _prepare_torch(config: RunConfig) -> None:
    import torch

    torch.set_num_threads(config.threads)


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


def _close(
    context: RunContext, tracker: Tracker | None, state: str, error: BaseException | None,
    metrics: Mapping[str, float], reason: str = "",
) -> BaseException | None:
    try:
        context.records.status(state, reason)
    except PoiseError as full:  # the disk that failed the run may refuse the status as well
        error = error or full
    context.records.close()
    if tracker:
        tracker.finish(state, metrics)
    return error


__all__ = ["Built", "Outcome", "build_parts", "execute"]
