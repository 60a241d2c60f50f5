"""One configuration: from overrides to a checked `RunConfig` and the directory of its run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from poise.compose.code import refuse_code
from poise.compose.messages import one_line_errors
from poise.compose.overrides import check_overrides, open_key
from poise.compose.schema import BESIDE, initialized, install, refuse_unknown
from poise.config import MOST_THREADS, RunConfig
from poise.errors import ConfigError, RunError


@dataclass(frozen=True)
class Composed:
    """A checked configuration, None for an experiment that sweeps, and where Hydra wants it to run."""

    config: RunConfig | None
    run_dir: Path
    explicit_dir: bool


def compose(overrides: list[str]) -> Composed:
    """Compose `conf/config.yaml` with overrides and check the result strictly.

    Raises
    ------
    ConfigError
        One line that names the key, what was given and what is allowed.
    """
    install()
    check_overrides(overrides)
    overrides = [open_key(o) for o in overrides]
    with one_line_errors(overrides):
        whole = composed(overrides)
        hydra = whole.hydra
        if not whole.paths.out:
            raise ConfigError("paths.out is empty: write paths.out=DIR, the folder runs are written to")
        config = None if hydra.mode == RunMode.MULTIRUN else from_hydra(whole)
        if not hydra.run.dir:
            raise ConfigError("hydra.run.dir is empty: write hydra.run.dir=DIR, the folder of this run")
        explicit = any(o.startswith("hydra.run.dir=") for o in overrides)
        return Composed(config, Path(hydra.run.dir), explicit)


def composed(overrides: list[str]) -> DictConfig:
    """Return the composed file, Hydra's own node included and resolvable; it names no code to import."""
    with initialized():
        whole = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    for key, shape in BESIDE.items():
        refuse_unknown(OmegaConf.to_container(whole[key], resolve=False), shape, key)
    refuse_code(whole)
    HydraConfig.instance().set_config(whole)
    return whole


def experiments() -> list[str]:
    """Return the names of all experiments on the search path."""
    install()
    with initialized():
        loader = GlobalHydra.instance().config_loader()
        return sorted(loader.get_group_options("experiment"))


def from_hydra(whole: DictConfig) -> RunConfig:
    """Turn a composed Hydra config into a `RunConfig`, strictly."""
    values = {}
    for key in whole:
        if key not in BESIDE:
            node = whole[key]
            is_node = OmegaConf.is_config(node)
            values[key] = (
                OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if is_node else node
            )
    if values.get("threads") is None:
        values["threads"] = default_threads()
    return RunConfig.from_plain(values)


def default_threads() -> int:
    """Return how many threads a run has that does not say: `OMP_NUM_THREADS`, else the cores it may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number a nesting level
    if first.isdecimal() and 1 <= int(first) <= MOST_THREADS:
        return int(first)
    return len(os.sched_getaffinity(0))


def sweep_directory(whole: DictConfig, overrides: list[str]) -> Path:
    """Return a free directory for a sweep, from `hydra.sweep.dir`."""
    wanted = Path(whole.hydra.sweep.dir)
    explicit = any(o.startswith("hydra.sweep.dir=") for o in overrides)
    return wanted if explicit else free_directory(wanted)


def free_directory(directory: Path) -> Path:
    """Make the directory, or the next free one beside it when another run took the same instant.

    Raises
    ------
    RunError
        When it cannot be made.
    """
    for n in range(1000):
        candidate = directory if n == 0 else directory.with_name(f"{directory.name}-{n}")
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not candidate.is_dir():
                break
        except OSError as error:
            raise RunError(
                f"cannot make the run directory {candidate}: {error.strerror}; choose another "
                f"with paths.out=DIR or hydra.run.dir=DIR"
            ) from None
    raise RunError(f"cannot make the run directory {directory}: a file is in the way")
