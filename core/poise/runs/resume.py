"""What a resume takes over from a run, what it may change, and when it is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poise.config import RunConfig
from poise.errors import ConfigError, FileError, RunError
from poise.runs.building import Built, build_parts
from poise.runs.origin import load_origin
from poise.runs.records import load_config, load_run, load_status

MAY_CHANGE = ("tracker", "tag", "train.log_every", "train.keep", "train.checkpoint_every")


def refuse_resume(directory: Path, state: str, force: bool = False) -> None:
    """Refuse to resume a run that is done, or may still be going on.

    Parameters
    ----------
    state : str
        As `Run.state` has it.
    force : bool
        Go on where nobody can say whether the run lives.

    Raises
    ------
    RunError
    """
    if state == "done":
        raise RunError(f"{directory} is done: there is nothing to resume")
    if state == "running":
        raise RunError(still_running(directory))
    if state == "unknown" and not force:
        host = load_status(directory).get("process", {}).get("host")
        raise RunError(f"{directory} was begun on another machine, {host}, and may still run there: when "
                       f"it does not, continue it with resume={directory} force_resume=true")


def still_running(directory: Path) -> str:
    """Say which process carries out a run."""
    process = load_status(directory).get("process", {})
    who = f" (process {process['pid']} on {process['host']})" if process else ""
    return f"{directory} is still running{who}"


def resumed(directory: Path | str, changes: Mapping[str, Any], force: bool = False) -> Built:
    """Build a run again from its saved configuration, with the few changes that a resume allows.

    Parameters
    ----------
    directory : path of a run
    changes : mapping of dotted key to value
        Keys of `MAY_CHANGE`, and where what the run reads is by now (`data.path`).
    force : bool
        Also where the run was begun on another machine and nobody can say whether it lives.

    Raises
    ------
    ConfigError
        For a change that would make the result differ from the uninterrupted run.
    FileError, RunError
        When there is no run, or it is done or running.
    """
    if not str(directory):
        raise ConfigError("resume= needs the directory of a run")
    saved = load_config(directory)
    if lost := [f.name for f in dataclasses.fields(RunConfig) if f.name not in saved]:
        raise FileError(f"{directory}/resolved.yaml is torn: it lacks {', '.join(lost)}")
    refuse_resume(Path(directory), load_run(directory).state, force)
    origin = load_origin(Path(directory))
    places = {key: one["path"] for key, one in origin.inputs.items()} if origin else {}
    config, places = changed(saved, places, changes)
    return build_parts(RunConfig.from_plain(config), places=places)


def changed(
    config: Mapping[str, Any], places: Mapping[str, str], changes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a saved configuration and the places of what it reads, with the changes of a resume.

    Raises
    ------
    ConfigError
        For a change that would make the result differ.
    """
    config, places = copy.deepcopy(dict(config)), dict(places)
    for key, value in changes.items():
        if key in places:
            places[key] = value
        elif any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE):
            _set(config, key, value)
        else:
            raise ConfigError(
                f"{key}={value}: a resumed run keeps its configuration; only these may change: "
                + ", ".join([*MAY_CHANGE, *places])
            )
    return config, places


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    whole = key
    for parent in parents:
        inner = config.get(parent)
        if not isinstance(inner, dict):
            raise ConfigError(f"{whole}={value}: {parent} has no options")
        config = inner
    if isinstance(config.get(last), dict) and not isinstance(value, dict):
        value = {"entry": value}
    config[last] = value
