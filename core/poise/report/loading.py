"""What a report is about: runs, jobs of sweeps that were never started, and what could not be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from poise.errors import FileError
from poise.runs.records import SWEEP, Run, find_runs, load_run
from poise.runs.sweeps import begun, load_jobs, telling


@dataclass(frozen=True)
class Found:
    """Everything at or below some paths.

    Parameters
    ----------
    runs : list of Run
    waiting : dict
        Jobs of sweeps that were never started: directory to the overrides that tell it from the others.
    told : dict
        The same overrides, of every job of these sweeps.
    jobs : int
        How many jobs these sweeps have.
    damaged : list of FileError
        One for each run or sweep whose records cannot be read.
    """

    runs: list[Run]
    waiting: dict[Path, str]
    told: dict[Path, str]
    jobs: int
    damaged: list[FileError]

    def overrides(self, run: Run) -> str | None:
        """Return what tells a job of a sweep from the others; None for any other run."""
        return self.told.get(run.directory.absolute())


def load(paths: Iterable[Path | str]) -> Found:
    """Read all runs and sweeps at or below the paths.

    Raises
    ------
    FileError
        For a path without any, or when none can be read.
    """
    paths = list(map(Path, paths))
    runs, damaged = [], []
    for directory in find_runs(paths):
        try:
            runs.append(load_run(directory))
        except FileError as error:
            damaged.append(error)
    below = sorted({p.parent for path in paths for p in path.rglob(SWEEP)})
    around = {p for run in runs for p in run.directory.absolute().parents if (p / SWEEP).is_file()}
    told, waiting, jobs = {}, {}, 0
    for sweep in [*below, *sorted(around - {p.absolute() for p in below})]:
        try:
            listed = load_jobs(sweep)
        except FileError as error:
            damaged.append(error)
            continue
        for job, words in zip(listed, telling(listed), strict=True):
            told[(sweep / job.name).absolute()] = words
            if sweep in below and not begun(sweep / job.name):
                waiting[sweep / job.name] = words
        jobs += len(listed) if sweep in below else 0
    if damaged and not runs and not waiting:
        raise damaged[0]
    return Found(runs, waiting, told, jobs, damaged)
