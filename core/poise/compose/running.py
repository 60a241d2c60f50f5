"""Run once or sweep: what `poise.run` and `poise run` call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from poise.compose.composing import compose, free_directory
from poise.compose.launching import sweep as launch_sweep
from poise.compose.overrides import refuse_sweeps
from poise.config import RunConfig
from poise.runs.building import build_parts
from poise.runs.execute import Outcome, execute


def run(overrides: list[str] | None = None, *, quiet: bool = True) -> Any:
    """Compose and run, as `poise run` does.

    Parameters
    ----------
    overrides : list of str
        Hydra's grammar, for example `["adapter=compander", "seed=1"]`.

    Returns
    -------
    Run, or list of Run when the overrides (or an experiment) ask for a sweep

    Raises
    ------
    PoiseError
        When the configuration is wrong or a run fails.
    """
    outcomes = run_all(list(overrides or []), quiet=quiet)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    runs = [o.run for o in outcomes]
    return runs if len(runs) != 1 else runs[0]


def run_all(
    overrides: list[str], *, sweep: bool = False, quiet: bool = False,
    announce: Callable[[RunConfig, Path], None] | None = None,
) -> list[Outcome]:
    """Run once or sweep, and return the outcomes.

    Parameters
    ----------
    overrides : list of str
    sweep : bool
        As `--multirun` does.
    announce : callable, optional
        Called with (config, directory) before a single run starts.
    """
    if sweep or "hydra.mode=MULTIRUN" in overrides:
        return launch_sweep(overrides, quiet)
    refuse_sweeps(overrides)
    composed = compose(overrides)
    if composed.config is None:
        return launch_sweep(overrides, quiet)
    built = build_parts(composed.config)
    directory = composed.run_dir if composed.explicit_dir else free_directory(composed.run_dir)
    if announce:
        announce(composed.config, directory)
    return [execute(built, directory, quiet=quiet)]
