"""The jobs of a sweep as they were composed, so that what is missing of it can be finished later."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poise.config import RunConfig
from poise.errors import ConfigError, FileError, PoiseError, RunError
from poise.files import read_json, write_json
from poise.options import fits
from poise.runs.building import Built, build_parts
from poise.runs.execute import Outcome, execute, hold
from poise.runs.records import SWEEP, load_run
from poise.runs.resume import changed, resumed
from poise.runs.signals import interruptible

_KEYS = {"name": str, "overrides": list[str], "config": dict[str, Any], "places": dict[str, str]}


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Parameters
    ----------
    name : str
        Its directory, below the sweep's.
    overrides : list of str
        What was asked for.
    config : dict
        The whole configuration, as plain data.
    places : dict
        Absolute paths of what it reads, by key of the configuration.
    """

    name: str
    overrides: list[str]
    config: dict[str, Any]
    places: dict[str, str]


def write_jobs(directory: Path, jobs: Sequence[Job]) -> None:
    """Write down the jobs of a sweep before the first one starts.

    Raises
    ------
    ConfigError
        When two jobs have one place, or a place is not below the directory.
    RunError
        When the directory holds a sweep, or runs in the jobs' places.
    """
    names = [job.name for job in jobs]
    for n, name in enumerate(names):
        if not _inside(name) or names.index(name) < n:
            raise ConfigError(f"hydra.sweep.subdir={name}: each job needs a folder of its own below "
                              f"hydra.sweep.dir, as '${{hydra.job.num}}' gives it")
    taken = [directory / SWEEP, *(directory / job.name / "resolved.yaml" for job in jobs)]
    if any(path.exists() for path in taken):
        raise RunError(f"{directory} already holds a run or a sweep: choose another hydra.sweep.dir, or "
                       f"finish it with resume={directory}")
    write_json(directory / SWEEP, {"jobs": [asdict(job) for job in jobs]})


def load_jobs(directory: Path) -> list[Job]:
    """Read the jobs of a sweep.

    Raises
    ------
    FileError
        When it is damaged.
    """
    value = read_json(directory / SWEEP)
    rows = value.get("jobs") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not all(map(_is_job, rows)):
        raise FileError(f"{directory / SWEEP} is damaged: it does not hold the jobs of a sweep")
    return [Job(**row) for row in rows]


def _is_job(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != _KEYS.keys():
        return False
    return all(fits(row[key], hint) for key, hint in _KEYS.items()) and _inside(row["name"])


def _inside(name: str) -> bool:
    return not {"", ".", "..", "/"} & {name, *Path(name).parts}


def begun(directory: Path) -> bool:
    """Tell whether a directory holds a run."""
    return (directory / "resolved.yaml").is_file()


def telling(jobs: Sequence[Job]) -> list[str]:
    """Return for each job the overrides that not all of them have, as one text."""
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(o for o in job.overrides if o not in shared) for job in jobs]


def finish(
    directory: Path, changes: Mapping[str, Any], force: bool = False, quiet: bool = False
) -> list[Outcome]:
    """Carry out what is missing of a sweep, one job after the other: resume what began, start the rest.

    Everything is built before the first job runs. Returns how all jobs ended, those of before included.

    Parameters
    ----------
    changes, force
        As `resumed` takes them, for each job.

    Raises
    ------
    ConfigError, FileError, RunError
        When a job cannot go on, or none is missing.
    KeyboardInterrupt
        When a job is interrupted; later ones are not started.
    """
    jobs = load_jobs(directory)
    with interruptible(), contextlib.ExitStack() as held:
        hold(directory, held, resume=True)
        missing = [n for n, job in enumerate(jobs) if not _done(directory / job.name)]
        if not missing:
            raise RunError(f"{directory} is done: there is nothing to resume")
        built = {n: _built(directory, n, jobs, changes, force) for n in missing}
        for n in missing:
            if not quiet:
                print(f"[{n + 1}/{len(jobs)}] {' '.join(jobs[n].overrides)}", file=sys.stderr, flush=True)
            place = directory / jobs[n].name
            if execute(built.pop(n), place, resume=begun(place), quiet=quiet).exit_code == 130:
                raise KeyboardInterrupt(interrupted(directory))
    return [outcome_of(directory / job.name) for job in jobs]


def interrupted(directory: Path) -> str:
    """Say how a sweep that was interrupted is finished."""
    return f"interrupted; finish the sweep with: poise run resume={shlex.quote(str(directory))}"


def _done(directory: Path) -> bool:
    return begun(directory) and load_run(directory).state == "done"


def _built(directory: Path, n: int, jobs: Sequence[Job], changes: Mapping[str, Any], force: bool) -> Built:
    job = jobs[n]
    try:
        if begun(directory / job.name):
            return resumed(directory / job.name, changes, force)
        config, places = changed(job.config, job.places, changes)
        return build_parts(RunConfig.from_plain(config), places=places)
    except ConfigError as error:
        raise ConfigError(f"job {n + 1} of {len(jobs)} ({' '.join(job.overrides)}): {error}") from None


def outcome_of(directory: Path) -> Outcome:
    """Return how a job ended, from its records: it may have run in another process, or before."""
    try:
        one = load_run(directory)
    except PoiseError as error:
        raise RunError(f"a job of the sweep left no record: {error}") from None
    if one.state == "done":
        return Outcome(one)
    return Outcome(one, RunError(f"{directory}: {one.state}: {one.status.get('reason', '')}"))
