"""What goes through Hydra's own main: the jobs of a sweep, and the flags that show a configuration."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from poise.compose.composing import composed, default_threads, from_hydra, sweep_directory
from poise.compose.messages import KNOWN, one_line_errors
from poise.compose.overrides import check_overrides, is_sweep, open_key
from poise.compose.schema import HYDRA_VERSION_BASE, conf_root, install
from poise.config import RunConfig
from poise.errors import ConfigError
from poise.runs.building import Built, build_parts
from poise.runs.execute import Outcome, execute, hold
from poise.runs.records import find_runs
from poise.runs.signals import interruptible
from poise.runs.sweeps import Job, interrupted, outcome_of, write_jobs
from poise.streams import fit_streams


def sweep(overrides: list[str], quiet: bool) -> list[Outcome]:
    """Let Hydra's sweeper and launcher run the jobs, in one directory fixed beforehand.

    Every job is composed and its parts are built before the first one runs: one that is refused, or names
    code, refuses the sweep.
    """
    check_overrides(overrides)
    overrides = [open_key(o) for o in overrides]
    with one_line_errors(overrides):
        install()
        single = [o for o in overrides if not is_sweep(o)]
        whole = composed(single)
        jobs = _jobs(whole, overrides)
        made = [_check(number, len(jobs), chosen) for number, chosen in enumerate(jobs)]
        directory = sweep_directory(whole, single)
    argv = ["--multirun", *overrides, f"hydra.sweep.dir={_quoted(directory)}"]
    with interruptible(), contextlib.ExitStack() as held, one_line_errors(overrides, KNOWN):
        hold(directory, held)
        write_jobs(directory, made)
        try:
            # a launcher's processes have fewer threads, and would take that for their default
            told = {_TOTAL: str(len(jobs)), "OMP_NUM_THREADS": str(default_threads())}
            _hydra_main(argv, quiet, told)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(interrupted(directory)) from None
    return [outcome_of(path) for path in find_runs([directory])]


def _jobs(whole: DictConfig, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job, as Hydra's own sweeper splits them."""
    params = whole.hydra.sweeper.get("params") or {}
    asked = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = OverridesParser.create().parse_overrides(asked)
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


_TOTAL = "POISE_JOBS"
_built: dict[str, Built] = {}  # parts that `_check` has built, by configuration, until their job takes them


def _check(number: int, total: int, chosen: list[str]) -> Job:
    try:
        with one_line_errors(chosen):
            whole = composed([*chosen, f"hydra.job.num={number}", f"hydra.job.id={number}"])
            name = str(whole.hydra.sweep.subdir)
            config = from_hydra(whole)
        built = build_parts(config)
    except ConfigError as error:
        raise ConfigError(f"job {number + 1} of {total} ({' '.join(chosen)}): {error}") from None
    _built[_key(built.config)] = built
    own = [o for o in chosen if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    return Job(name, own, built.config.plain(), built.places())


def _key(config: RunConfig) -> str:
    return json.dumps(config.plain(), sort_keys=True, default=str)


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def job(whole: DictConfig) -> None:
    """Execute one job of a sweep; its outcome is in its records, so a failure stops no other job."""
    mine = HydraConfig.get()
    directory, chosen = Path(mine.runtime.output_dir), list(mine.overrides.task)
    with one_line_errors(chosen):
        config = from_hydra(whole)
    built = _built.pop(_key(config), None) or build_parts(config)  # a launcher's process builds its own
    quiet = bool(os.environ.get("POISE_QUIET"))
    if not quiet:
        fit_streams()  # a launcher's process has its own
        number = f"{int(mine.job.num) + 1}/{os.environ[_TOTAL]}"
        print(f"[{number}] {' '.join(chosen)}", file=sys.stderr, flush=True)
    outcome = execute(built, directory, quiet=quiet)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt


def show(argv: list[str]) -> None:
    """Answer `--cfg`, `--info`, `--help` and Hydra's other flags, without running anything."""
    install()
    overrides = [a for a in argv if not a.startswith("-") and "=" in a]
    check_overrides(overrides)
    with one_line_errors(overrides):
        composed([open_key(o) for o in overrides if not is_sweep(o)])  # --help sets up logging
        _hydra_main([open_key(a) if a in overrides else a for a in argv])


def _hydra_main(argv: list[str], quiet: bool = False, told: Mapping[str, str] | None = None) -> None:
    """Hand argv to Hydra's own main, with its errors raised instead of printed; jobs find `told` in their
    environment."""
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    root = conf_root()
    decorate = hydra.main(version_base=HYDRA_VERSION_BASE, config_path=root, config_name="config")
    saved, environment = sys.argv, dict(os.environ)
    sys.argv = ["poise", *argv]
    os.environ |= {"HYDRA_FULL_ERROR": "1", **(told or {})}
    if quiet:
        os.environ["POISE_QUIET"] = "1"
    try:
        decorate(job)()
    finally:
        sys.argv = saved
        os.environ.clear()
        os.environ.update(environment)
