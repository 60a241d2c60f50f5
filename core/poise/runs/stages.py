"""Runs within a run: a recipe made of several, each in a folder of its own, composed through files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poise.config import RunConfig
from poise.errors import RunError
from poise.runs.building import build_parts
from poise.runs.context import RunContext
from poise.runs.execute import execute
from poise.runs.records import Run, load_config, load_run
from poise.runs.resume import resumed


def stage(context: RunContext, name: str, parts: Mapping[str, Any]) -> Run:
    """Carry out a run in the folder `name` of a run's directory, and return it once it is done.

    What is done is not done again, and what began goes on from its newest checkpoint: a run of stages that
    was interrupted is resumed by calling its recipe anew. What ends a stage early ends the run around it.

    Parameters
    ----------
    context : RunContext
        Of the run around it, whose configuration holds for all that is not given.
    parts : mapping
        What is other than there: `{"recipe": {"entry": "finetune"}, "adapter": {"entry": "none"}}`.

    Raises
    ------
    RunError
        When the context is of no run, or the folder holds a run of another configuration.
    """
    directory = context.directory / name
    config = RunConfig.from_plain({**_around(context), **parts})
    if (directory / "resolved.yaml").is_file():
        if load_config(directory) != config.plain():
            raise RunError(f"{directory} holds a run of another configuration: remove it, or choose "
                           f"another hydra.run.dir")
        if (run := load_run(directory)).state == "done":
            return run
        # whoever holds the run around it holds this one too
        outcome = execute(resumed(directory, {}, force=True), directory, resume=True, quiet=context.quiet)
    else:
        outcome = execute(build_parts(config), directory, quiet=context.quiet)
    if outcome.error is not None:
        raise outcome.error
    return outcome.run


def _around(context: RunContext) -> dict[str, Any]:
    if not (context.directory / "resolved.yaml").is_file():
        raise RunError(f"{context.directory} holds no run that stages could be part of: call poise.run, or "
                       f"poise run")
    return dict(load_config(context.directory))
