"""What goes through Hydra's own main: the jobs of a sweep, and the flags that show a configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from poise.compose.composing import from_hydra, sweep_directory
from poise.compose.messages import one_line_errors
from poise.compose.overrides import check_overrides, is_sweep, open_key
from poise.compose.schema import HYDRA_VERSION_BASE, conf_root, install
from poise.config import PARTS
from poise.errors import ConfigError, RunError
from poise.runs.execute import Outcome, build_parts, execute
from poise.runs.records import Records, find_runs, load_run


def sweep(overrides: list[str], quiet: bool) -> list[Outcome]:
    """Let Hydra's sweeper and launcher run the jobs, in one directory fixed beforehand."""
    check_overrides(overrides)
    overrides = [open_key(o) for o in overrides]
    with one_line_errors(overrides):
        install()
        directory = sweep_directory([o for o in overrides if not is_sweep(o)])
        _hydra_main(["--multirun", *overrides, f"hydra.sweep.dir={_quoted(directory)}"], quiet)
    return [_outcome(path) for path in find_runs([directory])]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def _outcome(directory: Path) -> Outcome:
    """Return how a job ended, from its records: it may have run in another process."""
    one = load_run(directory)
    if one.state == "done":
        return Outcome(one)
    return Outcome(one, RunError(f"{directory}: {one.state}: {one.status.get('reason', '')}"))


def job(whole: DictConfig) -> None:
    """Execute one job of a sweep; its outcome is in its records, so a failure stops no other job."""
    mine = HydraConfig.get()
    directory, chosen = Path(mine.runtime.output_dir), list(mine.overrides.task)
    try:
        with one_line_errors(chosen):
            built = build_parts(from_hydra(whole))
    except ConfigError as error:
        _record_refusal(directory, chosen, error)
        return
    quiet = bool(os.environ.get("POISE_QUIET"))
    if not quiet:
        print(f"[{mine.job.num}] {' '.join(chosen)}", file=sys.stderr, flush=True)
    outcome = execute(built, directory, quiet=quiet)
    if outcome.exit_code == 130:
        raise KeyboardInterrupt


def _record_refusal(directory: Path, chosen: list[str], error: ConfigError) -> None:
    records = Records(directory)
    records.begin({"refused": chosen, **{k: {"entry": "none"} for k in PARTS}})
    records.status("failed", f"ConfigError: {error}")
    records.close()


def show(argv: list[str]) -> None:
    """Answer `--cfg`, `--info`, `--help` and Hydra's other flags, without running anything."""
    install()
    overrides = [a for a in argv if not a.startswith("-") and "=" in a]
    check_overrides(overrides)
    with one_line_errors(overrides):
        _hydra_main([open_key(a) if a in overrides else a for a in argv])


def _hydra_main(argv: list[str], quiet: bool = False) -> None:
    """Hand argv to Hydra's own main, with its errors raised instead of printed."""
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    root = conf_root()
    decorate = hydra.main(version_base=HYDRA_VERSION_BASE, config_path=root, config_name="config")
    saved, environment = sys.argv, dict(os.environ)
    sys.argv = ["poise", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if quiet:
        os.environ["POISE_QUIET"] = "1"
    try:
        decorate(job)()
    finally:
        sys.argv = saved
        os.environ.clear()
        os.environ.update(environment)
